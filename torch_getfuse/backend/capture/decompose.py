"""Replaces what has no rule in a Dynamo graph by the ATen operators that it calls.

Dynamo keeps functions such as ``F.multi_head_attention_forward``, ``F.grid_sample`` or ``x.mT`` as
one node, where ``torch.export`` records the operators behind them. So that both give one operator
graph, such nodes are traced on their own and replaced, in a copy. Only torch's own functions are:
what somebody else has put in the graph (``allow_in_graph``) is run as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from torch_getfuse.backend.fx_nodes.effects import storage_of
from torch_getfuse.backend.fx_nodes.fake_run import FakeRun
from torch_getfuse.backend.fx_nodes.normalize import is_torchs, normalise
from torch_getfuse.backend.fx_nodes.values import (
    STANDS_FOR,
    copy_node,
    fake_mode_of,
    flat_tensors,
    is_plain,
    result_of,
    rewritten,
    traced_value,
)
from torch_getfuse.backend.rules.registry import find_rule, positional
from torch_getfuse.backend.torch_private import FakeTensor, OperatorBase, tracing

log = logging.getLogger(__name__)

_KEPT = frozenset(("setitem", "fill", "copy", "tensor", "lstm", "gru"))


class _Expansion(NamedTuple):
    """The operators behind one node.

    Attributes:
        graph: they, with a placeholder per tensor that the node reads.
        values: by node of it, the traced values at this place.
    """

    graph: fx.Graph
    values: Mapping[fx.Node, Any]


def expand_composites(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` itself, or a copy in which functions of torch without a rule are operators."""
    known: dict[Hashable, fx.GraphModule | None] = {}
    found = {
        node.name: expansion
        for node in gm.graph.nodes
        if (expansion := _expand(node, known)) is not None
    }
    if not found:
        return gm
    copy = rewritten(gm, copy_node)
    for node in list(copy.graph.nodes):
        if node.name in found:
            _splice(copy, node, found[node.name])
    copy.recompile()
    return copy


def _expand(node: fx.Node, known: dict[Hashable, fx.GraphModule | None]) -> _Expansion | None:
    """The operators behind a node; ``None`` where it is one already, or cannot be traced.

    Args:
        known: traces by what they depend on; takes new ones. A network calls most functions once
            per layer, and a second trace costs several times a run of the first one.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    if isinstance(node.target, OperatorBase) or not is_torchs(node.target):
        return None
    if not flat_tensors(traced_value(node)):
        return None
    inputs = [n for n in node.all_input_nodes if isinstance(traced_value(n), torch.Tensor)]
    call = normalise(node, positional)
    # A number divided by a tensor is a reciprocal and a product.
    has_rule = find_rule(call.name) is not None or call.name in _KEPT
    if call.name == "div" and not isinstance(call.args.get("input"), fx.Node):
        has_rule = False
    if has_rule or not inputs or len(inputs) != len(node.all_input_nodes):
        return None
    value = traced_value(node)
    if isinstance(value, (tuple, list)):
        # A result within a result (histogramdd's list of edges) is picked apart in two steps.
        nested = any(isinstance(item, (tuple, list)) for item in value)
        if nested or not all(map(_picks, node.users)):
            return None
    fakes = [traced_value(n) for n in inputs]
    form = _form(node, inputs, fakes)
    # Inside a backend Dynamo's context holds another fake mode than the one of the trace.
    with tracing(None), fake_mode_of(fakes) as mode:
        if form is None or form not in known:
            traced = _trace(node, inputs, fakes)
            if form is not None:
                known[form] = traced
            if traced is None:
                return None
            return _Expansion(traced.graph, {n: n.meta.get("val") for n in traced.graph.nodes})
        traced = known[form]
        if traced is None:
            return None
        run = FakeRun(traced, mode)
        run.run(*fakes)
        return _Expansion(traced.graph, run.values)


def _form(
    node: fx.Node, inputs: Sequence[fx.Node], fakes: Sequence[torch.Tensor]
) -> Hashable | None:
    """All that the trace of a node depends on; ``None`` where it may depend on more.

    As text, for ``True``, ``1`` and ``1.0`` are equal, and symbolic sizes have no hash.
    """
    if not all(isinstance(t, FakeTensor) and is_plain(t) and t.constant is None for t in fakes):
        return None
    names = {n: f"<{k}>" for k, n in enumerate(inputs)}
    storages = [storage_of(tensor) for tensor in fakes]
    tensors = [
        f"{t.dtype} {t.device} {tuple(t.shape)} {t.stride()} {t.storage_offset()} "
        f"{t.requires_grad} {isinstance(t, nn.Parameter)} {t.is_conj()} {t.is_neg()} "
        f"{storages.index(storage)}"
        for t, storage in zip(fakes, storages, strict=True)
    ]
    call = fx.map_arg((node.args, dict(node.kwargs)), names.__getitem__)
    return node.op, node.target, repr(call), *tensors


def _trace(
    node: fx.Node, inputs: Sequence[fx.Node], fakes: Sequence[torch.Tensor]
) -> fx.GraphModule | None:
    """The trace of a node's call, with a placeholder per input, if it says more than the node."""

    def run(*tensors: torch.Tensor) -> Any:
        given = dict(zip(inputs, tensors, strict=True))
        args = fx.map_arg(node.args, lambda n: given[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: given[n])
        return result_of(node, args, kwargs)

    try:
        traced = make_fx(run, pre_dispatch=True)(*fakes)
    except Exception as error:
        # Tracing a stranger's function can raise anything; the node then stays as it is, one
        # operator without a rule, which capture reports by name.
        log.debug("%s cannot be taken apart: %r", node.target, error)
        return None
    calls = [
        n for n in traced.graph.nodes if n.op == "call_function" and flat_tensors(n.meta.get("val"))
    ]
    if not calls or any(n.op in ("get_attr", "call_module") for n in traced.graph.nodes):
        return None
    if any(n.target is node.target for n in calls):
        return None
    return traced


def _picks(user: fx.Node) -> bool:
    call = normalise(user, positional) if user.op == "call_function" else None
    return call is not None and call.name == "getitem" and isinstance(call.args["index"], int)


def _splice(gm: fx.GraphModule, node: fx.Node, traced: _Expansion) -> None:
    """Puts the traced operators where ``node`` is."""
    given = [n for n in node.all_input_nodes if isinstance(traced_value(n), torch.Tensor)]
    placed: dict[fx.Node, fx.Node] = {}
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    placed.update(zip(placeholders, given, strict=True))
    kept: dict[str, Any] = {
        key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta
    }
    result: Any = None
    stands_for = _replaced_values(node, traced)
    with gm.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "output":
                result = inner.args[0]
            elif inner.op != "placeholder":
                new = gm.graph.node_copy(inner, _lookup(placed))
                value = traced.values[inner]
                new.meta = {**kept, "example_value": value}
                # Views further down are traced over the storage of the node that goes.
                if same := [
                    old for t in flat_tensors(value) for old in stands_for.get(storage_of(t), ())
                ]:
                    new.meta[STANDS_FOR] = same
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


def _replaced_values(node: fx.Node, traced: _Expansion) -> dict[Hashable, list[torch.Tensor]]:
    """Storages of what the traced operators return -> the traced values of ``node`` itself."""
    (result,) = traced.graph.output_node().args
    parts = result if isinstance(result, (tuple, list)) else [result]
    olds = traced_value(node)
    found: dict[Hashable, list[torch.Tensor]] = {}
    for part, old in zip(parts, olds if isinstance(olds, (tuple, list)) else [olds]):
        if isinstance(part, fx.Node) and isinstance(old, torch.Tensor):
            for tensor in flat_tensors(traced.values[part]):
                found.setdefault(storage_of(tensor), []).append(old)
    return found


def _lookup(placed: dict[fx.Node, fx.Node]) -> Callable[[fx.Node], fx.Node]:
    return lambda node: placed[node]
