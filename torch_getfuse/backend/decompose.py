"""Takes composite functions in a Dynamo graph apart into ATen operators.

Dynamo keeps Python-level functions such as ``F.multi_head_attention_forward`` or
``F.local_response_norm`` as one node, where ``torch.export`` records the operators they call.
So that both give one operator graph, such nodes are traced on their own and replaced, in a copy.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from torch_getfuse.backend.fx_values import flat_tensors, traced_value
from torch_getfuse.backend.normalise import normalise
from torch_getfuse.backend.op_rules import BY_TARGET, FACTORIES, positional

log = logging.getLogger(__name__)

_KEPT = FACTORIES | {"setitem", "fill", "copy", "tensor", "lstm", "gru"}


def expand_composites(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` itself, or a copy in which every composite function is replaced by its operators."""
    found = {node.name: sub for node in gm.graph.nodes if (sub := _trace(node)) is not None}
    if not found:
        return gm
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {}, return_output_node=True)
    if isinstance(output, tuple):
        value, old_output = output
        graph.output(value).meta = dict(old_output.meta)
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for node in list(graph.nodes):
        if node.name in found:
            _splice(copy, node, found[node.name])
    copy.recompile()
    return copy


def _trace(node: fx.Node) -> fx.GraphModule | None:
    """The operators behind a node; ``None`` where it is one operator, or cannot be traced."""
    if node.op not in ("call_function", "call_method"):
        return None
    if isinstance(node.target, torch._ops.OperatorBase):
        return None
    if not flat_tensors(traced_value(node)):
        return None
    inputs = [n for n in node.all_input_nodes if isinstance(traced_value(n), torch.Tensor)]
    call = normalise(node, positional)
    # A number divided by a tensor is a reciprocal and a product.
    known = call.name in BY_TARGET or call.name in _KEPT
    if call.name == "div" and not isinstance(call.args.get("input"), fx.Node):
        known = False
    if known or not inputs or len(inputs) != len(node.all_input_nodes):
        return None
    fakes = [traced_value(n) for n in inputs]

    def run(*tensors: torch.Tensor) -> Any:
        given = dict(zip(inputs, tensors, strict=True))
        args = fx.map_arg(node.args, lambda n: given[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: given[n])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    try:
        # Inside a backend Dynamo's context holds another fake mode than the one of the trace.
        with tracing(None), _fake_mode(fakes[0]):
            traced = make_fx(run, pre_dispatch=True)(*fakes)
    except Exception as error:
        # Tracing a stranger's function can raise anything; the node then stays as it is, one
        # operator without a rule, which capture reports by name.
        log.debug("%s cannot be taken apart: %r", node.target, error)
        return None
    calls = [
        n for n in traced.graph.nodes if n.op == "call_function" and flat_tensors(n.meta.get("val"))
    ]
    if len(calls) < 2 or any(n.op in ("get_attr", "call_module") for n in traced.graph.nodes):
        return None
    value = traced_value(node)
    if isinstance(value, (tuple, list)):
        # A result within a result (histogramdd's list of edges) is picked apart in two steps.
        nested = any(isinstance(item, (tuple, list)) for item in value)
        if nested or not all(_picks(user) for user in node.users):
            return None
    return traced


def _fake_mode(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else contextlib.nullcontext()


def _picks(user: fx.Node) -> bool:
    call = normalise(user, positional) if user.op == "call_function" else None
    return call is not None and call.name == "getitem" and isinstance(call.args["index"], int)


def _splice(gm: fx.GraphModule, node: fx.Node, traced: fx.GraphModule) -> None:
    """Puts the traced operators where ``node`` is."""
    given = [n for n in node.all_input_nodes if isinstance(traced_value(n), torch.Tensor)]
    placed: dict[fx.Node, fx.Node] = {}
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    placed.update(zip(placeholders, given, strict=True))
    kept: dict[str, Any] = {
        key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta
    }
    result: Any = None
    with gm.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "output":
                result = inner.args[0]
            elif inner.op != "placeholder":
                new = gm.graph.node_copy(inner, _lookup(placed))
                new.meta = {**kept, "example_value": inner.meta.get("val")}
                placed[inner] = new
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(placed[result])
    else:
        for user in list(node.users):
            part = result[user.args[1]]
            if isinstance(part, fx.Node):
                user.replace_all_uses_with(placed[part])
            gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _lookup(placed: dict[fx.Node, fx.Node]) -> Callable[[fx.Node], fx.Node]:
    return lambda node: placed[node]
