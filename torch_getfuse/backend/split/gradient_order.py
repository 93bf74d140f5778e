"""Keeps the order in which autograd adds up gradients, where fusion groups run in another order.

Autograd runs the operators of a backward in the reverse of the order in which the forward made
them, and adds up the gradients of a value as they come: those of its last reader first. Floating
point sums of three or more depend on that order. Where groups run parallel branches in another
order than the model, each reader of the value they start from gets an alias of its own, and one
operator adds up the gradients of the aliases in the model's order.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.fx_nodes.effects import writers, written_at
from torch_getfuse.backend.fx_nodes.targets import target_of
from torch_getfuse.backend.fx_nodes.values import flat_tensors, is_dynamo_weight, traced_value
from torch_getfuse.backend.split.submodules import split_graph_module

# Each may return the very tensor that it was given, whose readers are then its own.
_PASSES_ON = frozenset(
    {"contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16", "flatten"}
    | {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"}
    | {"feature_alpha_dropout"}
)


def split_in_gradient_order(
    gm: fx.GraphModule, children: Mapping[str, Sequence[fx.Node]]
) -> tuple[fx.GraphModule, str]:
    """``gm`` split into children whose gradients eager autograd adds up as it does for ``gm``.

    Args:
        gm: a Dynamo graph; it is not changed.
        children: name of each child -> its nodes.

    Returns:
        The split graph, and why some gradient may still be another to the last bit; empty where
        none is.

    Raises:
        PlanError: as :func:`split_graph_module`.
    """
    split = split_graph_module(gm, list(children.values()), list(children))
    moved = moved_sums(gm, split)
    if not moved:
        return split, ""
    for value in moved:
        if why := _hindrance(gm, value):
            return split, f"the gradients of {value.name} add up in another order: {why}"
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, env)
    graph.output(result)
    graph.set_codegen(copy.copy(gm.graph._codegen))
    branched = fx.GraphModule(gm, graph)
    branched.meta.update(gm.meta)
    for node, new in env.items():
        # Dynamo hangs the source of an input (and with it a parameter's name) on the node.
        if hasattr(node, "_dynamo_source"):
            new._dynamo_source = node._dynamo_source
    for value in moved:
        _branch(graph, env[value], [env[reader] for reader in _readers(value)])
    groups = [[env[node] for node in nodes] for nodes in children.values()]
    return split_graph_module(branched, groups, list(children)), ""


def moved_sums(gm: fx.GraphModule, split: fx.GraphModule) -> list[fx.Node]:
    """Values of ``gm`` whose gradients autograd would add up in another order for ``split``.

    Two gradients can be swapped; the sum of three cannot, to the last bit.
    """
    position = {name: i for i, name in enumerate(_executed(split))}
    learned, used = _learned(gm.graph), _used(gm)
    found = []
    for node in gm.graph.nodes:
        if node not in learned:
            continue
        everywhere = [reader for reader in _all_readers(node) if reader in used]
        readers = [reader for reader in everywhere if reader.op != "output"]
        edges = sum(_times_read(node, reader) for reader in everywhere)
        at = [position[reader.name] for reader in readers]
        if edges > 2 and at != sorted(at):
            found.append(node)
    return found


def _learned(graph: fx.Graph) -> set[fx.Node]:
    """The values that may have a gradient: parameters, and what is computed from them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        own = any(tensor.requires_grad for tensor in flat_tensors(traced_value(node)))
        if own or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return {node for node in found if _is_differentiable(traced_value(node))}


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _used(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes that a result depends on, or something that is written: others have no gradient."""
    nodes = list(gm.graph.nodes)
    pending = [nodes[-1], *(nodes[i] for i in set().union(*written_at(gm).values()))]
    found: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a value, in the order of the graph."""
    return sorted(node.users)


def _all_readers(node: fx.Node) -> list[fx.Node]:
    """The readers of a value, and of what may be the very same tensor under another name."""
    found = set(node.users)
    for reader in node.users:
        if _passes_on(reader):
            found.update(_all_readers(reader))
    return sorted(found)


def _passes_on(node: fx.Node) -> bool:
    called = node.op in ("call_function", "call_method")
    return called and target_of(node).name in _PASSES_ON


def _times_read(node: fx.Node, reader: fx.Node) -> int:
    """How often ``reader`` has ``node`` among its arguments; once where it reads an alias."""
    times = 0

    def count(source: fx.Node) -> fx.Node:
        nonlocal times
        times += source is node
        return source

    fx.map_arg((reader.args, reader.kwargs), count)
    return max(times, 1)


def _executed(split: fx.GraphModule) -> Iterator[str]:
    """Names of the original nodes in the order in which a split graph runs them."""
    for node in split.graph.nodes:
        child = getattr(split, str(node.target), None) if node.op == "call_module" else None
        if isinstance(child, fx.GraphModule):
            yield from (inner.name for inner in child.graph.nodes if inner.op != "placeholder")
        else:
            yield node.name


def _hindrance(gm: fx.GraphModule, value: fx.Node) -> str:
    """Why the readers of a value cannot be given aliases of it; empty where they can."""
    readers = _readers(value)
    if any(reader.op == "output" for reader in readers):
        return "it is returned as well"
    if any(_passes_on(reader) for reader in readers):
        return "it may have a second name"
    if any(_times_read(value, reader) > 1 for reader in readers[:-1]):
        return "an operator reads it twice"
    if any(writer > value for writer in writers(gm, value)):
        return "it is changed in place"
    if value.op == "placeholder" and (
        is_dynamo_weight(value) or torch.is_autocast_enabled(traced_value(value).device.type)
    ):
        return "autocast may keep one copy of it for all"
    return ""


def _branch(graph: fx.Graph, value: fx.Node, readers: Sequence[fx.Node]) -> None:
    """Give each of ``readers``, in their order, an alias of ``value``."""
    traced = traced_value(value)
    # Where the value is an input, the aliases still belong beside its readers: at the first.
    with graph.inserting_before(readers[0]):
        aliases = graph.call_function(branch_point, (value, len(readers)))
        aliases.meta["example_value"] = (traced,) * len(readers)
        for i, reader in enumerate(readers):
            alias = graph.call_function(operator.getitem, (aliases, i))
            alias.meta["example_value"] = traced
            reader.replace_input_with(value, alias)


def branch_point(value: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """``count`` aliases of ``value``, whose gradients add up from the last to the first.

    That is the order in which eager autograd adds up the gradients of ``count`` readers that run
    one after the other, whatever order the readers of the aliases run in.
    """
    aliases: tuple[torch.Tensor, ...] = _BranchPoint.apply(value, count)  # type: ignore[no-untyped-call]
    return aliases


class _BranchPoint(torch.autograd.Function):
    """See :func:`branch_point`."""

    @staticmethod
    def forward(value: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        # Not view_as, which gives axes of size one other strides: kernels go by those.
        return tuple(torch.ops.aten.alias.default(value) for _ in range(count))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # A reader that nothing is asked of gives no gradient; zeros would turn -0.0 to 0.0.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        total: torch.Tensor | None = None
        for grad in reversed(grads):
            if grad is not None:
                total = grad if total is None else total + grad
        return total, None
