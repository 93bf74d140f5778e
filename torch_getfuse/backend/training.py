"""Training through AOTAutograd: the planned forward, and a backward graph with a plan of its own.

The forward plan is the one of Dynamo's graph. Each of its nodes is marked with its child's name;
AOTAutograd carries the mark to the ATen nodes that it becomes, so the same groups are built again
from them. The backward graph is planned as it is: operators without a rule read everything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from functorch.compile import (  # type: ignore[import-untyped]
    default_partition,
    make_boxed_func,
    min_cut_rematerialization_partition,
)
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import RestartAnalysis
from torch._higher_order_ops.wrap import tag_activation_checkpoint

from torch_getfuse.backend.capture.capture import Capture, capture_fx
from torch_getfuse.backend.fx_nodes.values import is_dynamo_weight, mark_weight
from torch_getfuse.backend.inner.compile_groups import compile_children, is_eager
from torch_getfuse.backend.split.submodules import split_graph_module
from torch_getfuse.errors import NoOperatorError
from torch_getfuse.options import Options
from torch_getfuse.partition.plan import PartitionPlan

log = logging.getLogger(__name__)

_MARK = "getfuse_child"
_PRIMAL = "primals_"

Children = Mapping[str, Sequence[fx.Node]]
"""Name of a child -> its nodes."""


def needs_gradients(example_inputs: Sequence[object]) -> bool:
    """Whether a graph is compiled for a call that autograd records."""
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs
    )


def plans_backward(options: Options) -> bool:
    """Whether the backward graph is planned and split.

    With ``backward="auto"`` only where groups are compiled: eager trains through autograd, bit
    for bit, and tracing a backward that nobody asked for costs seconds.
    """
    return not is_eager(options.inner) if options.backward == "auto" else bool(options.backward)


def has_checkpoint(gm: fx.GraphModule) -> bool:
    """Whether a graph has a checkpointed region, which only AOTAutograd differentiates rightly.

    Run by eager, Dynamo's form of it draws other random numbers when it is computed again, and
    refuses batch norms.
    """
    return any(node.target is tag_activation_checkpoint for node in gm.graph.nodes)


class JointCompiler:
    """Compiles one graph for training.

    Args:
        options: of the forward, used for the backward as well, except a given plan.
        plan: plans a backward graph.
        children: of a capture and its plan: the nodes of each group.
        report: told of a backward's capture and plan, with notes.
        fail: told which part ("forward", "backward") runs unplanned and why; raises where the
            options are strict.
        forward_notes: told what compiling the forward groups gave.
    """

    def __init__(
        self,
        options: Options,
        plan: Callable[[Capture], PartitionPlan],
        children: Callable[[Capture, PartitionPlan], Children],
        report: Callable[[Capture, PartitionPlan, Sequence[str]], None],
        fail: Callable[[str, Exception], None],
        forward_notes: Callable[[Sequence[str]], None],
    ) -> None:
        self._options = options
        self._plan = plan
        self._children = children
        self._report = report
        self._fail = fail
        self._forward_notes = forward_notes
        self._names: list[str] = []
        self._weights: set[str] = set()

    def compile(
        self, capture: Capture, plan: PartitionPlan, example_inputs: Sequence[object]
    ) -> Callable[..., Any]:
        """A callable with the signature of the captured graph, which returns a tuple."""
        gm = capture.graph_module
        groups = self._children(capture, plan)
        self._names = list(groups)
        for name, nodes in groups.items():
            for node in nodes:
                node.meta["custom"] = {**node.meta.get("custom", {}), _MARK: name}
        placeholders = gm.graph.find_nodes(op="placeholder")
        self._weights = {
            f"{_PRIMAL}{i + 1}" for i, node in enumerate(placeholders) if is_dynamo_weight(node)
        }
        compiled: Callable[..., Any] = aot_autograd(
            fw_compiler=self._forward,
            bw_compiler=self._backward,
            partition_fn=(
                min_cut_rematerialization_partition
                if plans_backward(self._options) or has_checkpoint(gm)
                else default_partition  # keeps what eager keeps, and is found at once
            ),
            # Else buffers are updated after the graph, under what its backward has saved of them.
            keep_inference_input_mutations=True,
        )(gm, example_inputs)
        return compiled

    def _forward(self, gm: fx.GraphModule, example_inputs: Sequence[object]) -> Any:
        groups: dict[str, list[fx.Node]] = {}
        for node in gm.graph.nodes:
            name = node.meta.get("custom", {}).get(_MARK)
            if name is not None and node.op not in ("placeholder", "output", "get_attr"):
                groups.setdefault(name, []).append(node)
        groups = {name: groups[name] for name in self._names if name in groups}
        try:
            split = split_graph_module(gm, list(groups.values()), list(groups))
            self._forward_notes(_compile(split, self._options))
        except RestartAnalysis:
            raise  # Dynamo's, see compile_children
        except Exception as error:
            self._fail("forward", error)
            return make_boxed_func(gm.forward)
        return make_boxed_func(split.forward)

    def _backward(self, gm: fx.GraphModule, example_inputs: Sequence[object]) -> Any:
        if not plans_backward(self._options):
            return make_boxed_func(gm.forward)
        for node in gm.graph.nodes:
            # A backward operator belongs to the module whose forward it differentiates.
            if "nn_module_stack" not in node.meta and "fwd_nn_module_stack" in node.meta:
                node.meta["nn_module_stack"] = node.meta["fwd_nn_module_stack"]
            if node.op == "placeholder" and node.name in self._weights:
                mark_weight(node)
        try:
            capture = capture_fx(gm, example_inputs)
            plan = self._plan(capture)
            groups = self._children(capture, plan)
            split = split_graph_module(capture.graph_module, list(groups.values()), list(groups))
            self._report(capture, plan, _compile(split, self._options))
        except RestartAnalysis:
            raise
        except NoOperatorError:
            log.info("a backward graph without operators runs as it is")
            return make_boxed_func(gm.forward)
        except Exception as error:
            self._fail("backward", error)
            return make_boxed_func(gm.forward)
        return make_boxed_func(split.forward)


def _compile(split: fx.GraphModule, options: Options) -> list[str]:
    """Children of a graph that AOTAutograd has differentiated already."""
    with torch.no_grad():
        return compile_children(split, options)
