"""Gradients that a split graph adds up in another order than the model.

Autograd runs the operators of a backward in the reverse of the order in which the forward ran them,
and adds up the gradients of a value as they come: those of its last reader first. Floating-point
sums of three or more terms depend on that order. So where fusion groups run parallel branches in
another order than the model, gradients differ from eager's in the last bits (docs/torch-compile.md,
"Training", has the figures).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.fx_nodes.effects import written_at
from torch_getfuse.backend.fx_nodes.targets import target_of
from torch_getfuse.backend.fx_nodes.values import flat_tensors, traced_value

# Each may return the very tensor that it was given, whose readers are then its own.
_PASSES_ON = frozenset(
    {"contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16", "flatten"}
    | {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"}
    | {"feature_alpha_dropout"}
)


def moved_sums(gm: fx.GraphModule, split: fx.GraphModule) -> list[fx.Node]:
    """Values of ``gm`` whose gradients autograd would add up in another order for ``split``.

    Two gradients can be swapped; the sum of three cannot, to the last bit. What comes from outside,
    a parameter or an input, may have one more reader there.

    Args:
        gm: a Dynamo graph.
        split: the same graph, split by :func:`split_graph_module`.
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
        edges += node.op in ("placeholder", "get_attr")
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
