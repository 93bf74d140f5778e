"""FX graph -> operator graph and the way back (docs/method.md, sections 1 and 2).

One model and one set of shapes give one :class:`~torch_getfuse.ir.OpGraph`, whether the FX
graph came from Dynamo or from ``torch.export``: names are module paths and kinds, the order is
that of the program, sizes are per sample.
"""

from __future__ import annotations

import contextvars
import functools
import logging
import random
import re
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from torch_getfuse.backend.capture.decompose import expand_composites
from torch_getfuse.backend.capture.eager_quantised import is_eager_quantised, reference_of
from torch_getfuse.backend.capture.exported_regions import inline_regions
from torch_getfuse.backend.capture.graph_builder import GraphBuilder
from torch_getfuse.backend.capture.graph_inputs import batch_size, is_weight_argument
from torch_getfuse.backend.capture.graph_values import CoreCall, Feature, Role, View
from torch_getfuse.backend.capture.idle_casts import without_idle_casts
from torch_getfuse.backend.capture.op_order import OperatorOrder
from torch_getfuse.backend.capture.operators import (
    fold_batch_norms,
    fold_scales,
    names_of,
    operator_of,
    unique,
)
from torch_getfuse.backend.capture.quantisation import (
    move_dequantizes,
    settle_quantisation,
    with_own_dequantize,
)
from torch_getfuse.backend.capture.view_changes import (
    changing_inputs,
    exported_without_view_changes,
    without_view_changes,
)
from torch_getfuse.backend.fx_nodes.values import has_value, traced_value
from torch_getfuse.backend.torch_private import (
    BackendCompilerFailed,
    FakeTensorMode,
    TorchDynamoException,
    TorchRuntimeError,
    Unsupported,
    compiled_apart,
    drop_guards,
    dynamo_settings,
    is_dynamo_weight,
    original_module,
    tree_leaves,
)
from torch_getfuse.backend.torch_versions import warn_if_untried
from torch_getfuse.errors import CaptureError, GetfuseError, NoOperatorError, PlanError
from torch_getfuse.ir import OpGraph, Tensor
from torch_getfuse.partition.plan import PartitionPlan

log = logging.getLogger(__name__)

_DEFAULT_WIDTH = 4
_FUSED = frozenset(("_transformer_encoder_layer_fwd", "_native_multi_head_attention"))


@dataclass(frozen=True)
class Capture:
    """An operator graph and where its operators are in an FX graph.

    Attributes:
        graph: the operator graph, sizes per sample.
        graph_module: the FX graph whose nodes are named below: the one given, or a copy in
            which composite functions (attention, local response norm) are taken apart, changes
            of shape in place are views, and casts that do nothing are left out.
        nodes: operator name -> its FX nodes in order: a convolution with its folded batch norm,
            and the views, ``getitem`` and dropout that alias what it wrote. Aliases of graph
            inputs, those that must wait for more than their operator does, and nodes that compute
            on weights alone, belong to no operator.
        unsupported: FX target name -> number of operators that have no rule.
        calls: operator name -> the calls among its nodes that compute it; none for a write into
            a part of a tensor.
        views: what each node shows of a tensor, of the nodes that give one feature map.
        batch_axes: tensor name -> axis that the batch is in, and the product of the sizes inside
            of it there; ``None`` where the traced batch does not appear.
        samples: the traced batch.
    """

    graph: OpGraph
    graph_module: fx.GraphModule
    nodes: Mapping[str, tuple[fx.Node, ...]]
    unsupported: Mapping[str, int]
    calls: Mapping[str, tuple[CoreCall, ...]]
    views: Mapping[fx.Node, View]
    batch_axes: Mapping[str, tuple[int, int] | None]
    samples: int

    def check(self, plan: PartitionPlan) -> None:
        """Refuse a plan of another graph, and say so where only the grad mode may be another.

        A model may look at it. So do ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention``:
        without gradients they call one operator that computes all of it.

        Raises:
            PlanError: with the first difference.
        """
        try:
            plan.check_graph(self.graph)
        except PlanError as error:
            ours, theirs = (any(op.kind in _FUSED for op in g) for g in (self.graph, plan.graph))
            if ours != theirs:
                why = (
                    f"it was made with gradients {'off' if theirs else 'on'}: under "
                    "torch.no_grad() attention is one fused operator of torch (never in "
                    "torch.export); make the plan in the grad mode that the model runs in"
                )
            elif torch.is_grad_enabled():
                why = (
                    "if it is the same model and shape: plan() traces under torch.no_grad(), "
                    "this call has gradients enabled"
                )
            else:
                raise
            raise PlanError(f"{error}; {why}") from error

    def moved(self, gm: fx.GraphModule, found: Mapping[fx.Node, fx.Node]) -> Capture:
        """The same operators in another graph: ``found`` gives each node there.

        Nodes that it does not give are left out.
        """

        def call(old: CoreCall) -> CoreCall:
            return CoreCall(found[old.node], tuple((found[n], v) for n, v in old.operands))

        return replace(
            self,
            graph_module=gm,
            nodes={
                name: tuple(found[node] for node in own if node in found)
                for name, own in self.nodes.items()
            },
            calls={
                name: tuple(map(call, own))
                for name, own in self.calls.items()
                if all(c.node in found and all(n in found for n, _ in c.operands) for c in own)
            },
            views={found[node]: view for node, view in self.views.items() if node in found},
        )


def capture_fx(gm: fx.GraphModule, example_inputs: Sequence[object] | None = None) -> Capture:
    """The operator graph of what a ``torch.compile`` backend receives.

    Args:
        gm: parameters and buffers are placeholders (or attributes); shapes come from the nodes'
            metadata.
        example_inputs: needed only where the metadata is missing, or an input changes its shape
            in place.

    Raises:
        CaptureError: without metadata and inputs, or without any tensor operator.
    """
    if not all(has_value(n) for n in gm.graph.nodes if n.op == "placeholder"):
        if example_inputs is None:
            raise CaptureError(
                "the FX graph records no shapes: give capture_fx the example inputs as well"
            )
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        FakeTensorProp(gm, mode).propagate(*example_inputs)

    def role(node: fx.Node) -> Role:
        return Role.WEIGHT if is_dynamo_weight(node) else Role.INPUT

    return _capture(expand_composites(without_view_changes(gm, example_inputs)), role)


def capture_exported(program: ExportedProgram) -> Capture:
    """The operator graph of an exported program, before ``run_decompositions``.

    Raises:
        CaptureError: where the program has no tensor operator.
    """
    kinds: dict[str, Role] = {}
    written = {
        node.args[0].name
        for overload in (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)
        for node in program.graph.find_nodes(op="call_function", target=overload)
    }
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            kinds[spec.arg.name] = Role.INPUT
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            kinds[spec.arg.name] = Role.WEIGHT
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            # A tensor written in forward() is a constant in Dynamo's graph, with no placeholder.
            # It is copied before it is used; one that is kept somewhere is not.
            kinds[spec.arg.name] = Role.CONSTANT if spec.arg.name in written else Role.WEIGHT
    kept = {
        position
        for position, output in enumerate(program.graph_signature.output_specs)
        if output.kind is OutputKind.USER_OUTPUT
    }
    return _capture(
        exported_without_view_changes(inline_regions(program.graph_module)),
        lambda node: kinds.get(node.name, Role.NEITHER),
        outputs=kept,
    )


# -- tracing ----------------------------------------------------------------------------------


class _Recorded(BaseException):
    """Leaves the compiled model with the graph, before it runs anything.

    No ``Exception``, which the model may catch. Not from within the backend: of what leaves Dynamo
    while it compiles, torch (2.13) does not count that it has left, and every call of a Python
    function in the process takes a third longer from then on.
    """


_Graphs = list[tuple[fx.GraphModule, Sequence[Any]]]
"""Graphs and the inputs that each was compiled for."""

_RECORDER: contextvars.ContextVar[_Graphs | None] = contextvars.ContextVar(
    "torch_getfuse_recorder", default=None
)


def _recording_backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A torch.compile backend, one for all captures: torch keeps each it has seen for ever."""
    recorder = _RECORDER.get()
    assert recorder is not None, "only capture_model compiles with it"
    recorder.append((gm, example_inputs))
    drop_guards()
    return _leave


def _leave(*args: Any) -> NoReturn:
    raise _Recorded


def _counting_backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    recorder = _RECORDER.get()
    if recorder is not None:
        recorder.append((gm, example_inputs))
    return gm.forward


def capture_model(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> Capture:
    """The operator graph of a module with inputs, traced by Dynamo and not run.

    The trace is under ``no_grad`` with a code object of its own, so that nothing that the user
    has compiled is reused, recompiled or thrown away, and the model is left as it is.

    Raises:
        CaptureError: for a model that Dynamo breaks into several graphs (how many, and why at
            the first break), or that has no tensor operator.
    """
    model = original_module(model)
    kwargs = kwargs or {}
    if is_eager_quantised(model):
        model = reference_of(model)
    drawn = random.getstate()  # before it calls a graph, compiled code draws what that asks for
    try:
        with _tracing() as graphs:
            _compiled(model, _recording_backend, fullgraph=True)(*args, **kwargs)
    except _Recorded:
        return capture_fx(*graphs[0])
    except Unsupported as error:
        if _raised(error):
            raise does_not_run(model, args, error) from error
        why = str(error).strip().split("\n")[0]
        count = _count_graphs(model, args, kwargs)
        how = f"not as one graph but as {count}" if count != "0" else "as no graph at all"
        raise CaptureError(
            f"Dynamo traces {type(model).__name__} {how}: {why}. "
            "torch._dynamo.explain(model)(*inputs) shows every break"
        ) from error
    except GetfuseError:
        raise
    except Exception as error:  # a model fails in its own code, by whatever it raises
        raise does_not_run(model, args, error) from error
    finally:
        random.setstate(drawn)
    raise CaptureError(
        f"{type(model).__name__} ran without giving Dynamo a graph: it has no tensor operator, "
        "or torch.compile is turned off (TORCHDYNAMO_DISABLE, torch.compiler.set_stance)"
    )


def does_not_run(model: nn.Module, args: Sequence[object], error: Exception) -> CaptureError:
    """What a model says to inputs that it does not take, without what Dynamo says around it."""
    reason = _raised(error)
    cause: BaseException = error
    while isinstance(cause, TorchDynamoException):
        inner = cause.__cause__ or cause.__context__
        if inner is None:
            break
        cause = inner
    reason = reason or (str(cause).strip() or type(cause).__name__).splitlines()[0]
    shapes = [
        f"{'x'.join(map(str, leaf.shape))} {str(leaf.dtype).removeprefix('torch.')}"
        if isinstance(leaf, torch.Tensor)
        else type(leaf).__name__
        for leaf in tree_leaves(args)
    ]
    return CaptureError(f"{type(model).__name__} does not run on {', '.join(shapes)}: {reason}")


def _raised(error: BaseException) -> str:
    """What the model itself has raised while Dynamo traced it, as Dynamo quotes it; or empty."""
    own = re.search(r"^Observed exception$.*raised exception (.+?)$", str(error), re.M | re.S)
    return own[1] if own else ""


@contextmanager
def _tracing() -> Iterator[_Graphs]:
    """Collects graphs; attention takes the path that it would take in the caller's grad mode."""
    graphs: _Graphs = []
    token = _RECORDER.set(graphs)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast and not torch.is_grad_enabled())
    try:
        # Dynamo leaves nn.LSTM and its like to eager unless it is told otherwise; a graph with one
        # operator for them is better than none.
        with torch.no_grad(), dynamo_settings(suppress_errors=False, allow_rnn=True):
            yield graphs
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        _RECORDER.reset(token)


def _compiled(
    model: nn.Module, backend: Callable[..., Any], *, fullgraph: bool
) -> Callable[..., Any]:
    """A fresh function around the model, compiled in a cache region of its own.

    Dynamo files what it compiles under code objects. The fresh one here goes away with the
    function; the model's own are inlined, or, where the graph breaks, isolated.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    fresh = types.FunctionType(
        run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__
    )
    return compiled_apart(fresh, backend=backend, fullgraph=fullgraph, dynamic=False)


_RUNNER: contextvars.ContextVar[Callable[[Capture], Callable[..., Any]] | None] = (
    contextvars.ContextVar("torch_getfuse_runner", default=None)
)


def _running_backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A torch.compile backend, one for all runs, like :func:`_recording_backend`."""
    make = _RUNNER.get()
    if make is None:
        return gm.forward
    return changing_inputs(gm, make(capture_fx(gm, example_inputs)))


def run_captured(
    model: nn.Module, args: tuple[Any, ...], make: Callable[[Capture], Callable[..., Any]]
) -> Any:
    """Trace a module as :func:`capture_model` does, and run what ``make`` makes of the trace.

    Args:
        make: gets the capture, and returns a callable that takes the inputs of its graph and
            returns a tuple.

    Returns:
        The results in the model's own structure.

    Raises:
        CaptureError: for a model that Dynamo breaks into several graphs.
        GetfuseError: whatever ``make`` raises of them.
    """
    token = _RUNNER.set(make)
    try:
        with _tracing():
            return _compiled(model, _running_backend, fullgraph=True)(*args)
    except Unsupported as error:
        if _raised(error):
            raise does_not_run(model, args, error) from error
        why = str(error).strip().split("\n")[0]
        name = type(model).__name__
        raise CaptureError(f"Dynamo does not trace {name} as one graph: {why}") from error
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, GetfuseError):
            raise error.inner_exception from error
        raise
    except TorchRuntimeError as error:
        raise does_not_run(model, args, error) from error
    finally:
        _RUNNER.reset(token)


def _count_graphs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """How many graphs Dynamo makes of a model that breaks; needs one run, so only in eval."""
    if any(module.training for module in model.modules()):
        return "several"
    with _tracing() as graphs:
        _compiled(model, _counting_backend, fullgraph=False)(*args, **kwargs)
    return str(len(graphs))


# -- FX to operators --------------------------------------------------------------------------


def _capture(
    gm: fx.GraphModule, recorded: Callable[[fx.Node], Role], outputs: set[int] | None = None
) -> Capture:
    warn_if_untried()
    gm = with_own_dequantize(without_idle_casts(gm))

    @functools.cache
    def role(node: fx.Node) -> Role:
        own = recorded(node)
        return Role.WEIGHT if own is Role.INPUT and is_weight_argument(node) else own

    builder = GraphBuilder(batch_size(_given(gm, role)), role, gm, kept_outputs=outputs).build()
    # What only operators read that nothing comes of does not say what the batch is.
    read = builder.read_inputs()
    if read and (batch := batch_size(list(read))) != builder.batch:
        builder = GraphBuilder(batch, role, gm, kept_outputs=outputs).build()
        read = builder.read_inputs()
    live = builder.live()
    order = OperatorOrder(gm, live)
    drafts = fold_batch_norms(live, builder.outputs, order)
    drafts = fold_scales(drafts, builder.outputs, order)
    stored_bits = settle_quantisation(drafts, builder.values, builder.returned)
    move_dequantizes(drafts, builder.scales)
    if not drafts:
        raise NoOperatorError("the graph has no tensor operator on the way to what it returns")
    names = names_of(drafts)
    tensors = {draft.writes: name for draft, name in zip(drafts, names, strict=True)}
    taken = set(names)
    for base in read.values():
        tensors[base] = unique("input", taken)
    ops = tuple(
        operator_of(
            draft,
            name,
            len(builder.bases[draft.writes].info.shape),
            tensors,
            tuple(names[k] for k in after),
        )
        for draft, name, after in zip(drafts, names, order.after(drafts), strict=True)
    )
    width = _input_width(read)
    # An input that is returned as it is crosses no operator; Dynamo does not even record it.
    returned = [draft.writes for draft in drafts if draft.writes in builder.outputs]
    graph = OpGraph(
        inputs=tuple(tensors[base] for base in read.values()),
        outputs=tuple(tensors[base] for base in returned),
        ops=ops,
        tensors={
            name: _stored(builder.bases[base].tensor, name, width, stored_bits.get(base))
            for base, name in tensors.items()
        },
        activation_bytes=width,
    )
    nodes = {
        name: tuple(node for node in draft.nodes if order.joins(node, draft))
        for name, draft in zip(names, drafts, strict=True)
    }
    unsupported = Counter(d.target for d in drafts if d.reason.startswith("no rule"))
    for target, times in unsupported.items():
        log.info("no rule for %s (%d operators): whole inputs", target, times)

    def view(feature: Feature, name: str = "") -> View:
        batch = builder.bases.find_batch(feature)
        # What a convolution writes before its folded batch norm goes by the operator's name.
        tensor = tensors.get(feature.base, name)
        return View(tensor, feature.layout, batch[0] if batch else None)

    calls = {
        name: tuple(
            CoreCall(node, tuple((operand, view(shown, name)) for operand, shown in operands))
            for node, operands in draft.calls
            if all(isinstance(shown, Feature) for _, shown in operands)
        )
        for name, draft in zip(names, drafts, strict=True)
    }
    views = {
        node: view(value)
        for node, value in builder.values.items()
        if isinstance(value, Feature) and value.base in tensors
    }
    batch_axes = {name: builder.bases[base].batch for base, name in tensors.items()}
    return Capture(graph, gm, nodes, dict(unsupported), calls, views, batch_axes, builder.batch)


def _given(gm: fx.GraphModule, role: Callable[[fx.Node], Role]) -> list[fx.Node]:
    """The tensors among a graph's inputs that something is computed with."""
    inputs = [n for n in gm.graph.find_nodes(op="placeholder") if role(n) is Role.INPUT]
    # Dynamo drops the inputs that nothing computes with, torch.export keeps them.
    used = [n for n in inputs if any(user.op != "output" for user in n.users)]
    return [n for n in used if isinstance(traced_value(n), torch.Tensor)]


def _stored(tensor: Tensor, name: str, width: int, quantised: int | None) -> Tensor:
    """A tensor under its name; its width is left out where it is that of the graph."""
    bits = tensor.bits if quantised is None else quantised
    return replace(tensor, name=name, bits=None if bits == 8 * width else bits)


def _input_width(inputs: Iterable[fx.Node]) -> int:
    for node in inputs:
        if (dtype := traced_value(node).dtype).is_floating_point:
            return int(dtype.itemsize)
    return _DEFAULT_WIDTH
