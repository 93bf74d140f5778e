"""Gradients that a split graph sums in another order than the model.

Autograd runs the operators of a backward in the reverse of the order in which the forward ran them,
and adds up the gradients of a value as they come: those of its last reader first. Floating-point
sums of three or more terms depend on that order. Where fusion groups run parallel branches in
another order than the model, such a gradient differs from eager's by rounding, and the report says
so (docs/torch-compile.md, "Training").
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from torch_getfuse.backend.fx_nodes.targets import target_of
from torch_getfuse.backend.fx_nodes.values import traced_value

# Each may return the very tensor that it was given, whose readers are then its own.
_PASSES_ON = frozenset(
    {"contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16", "flatten"}
    | {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"}
    | {"feature_alpha_dropout"}
)


def moved_sums(gm: fx.GraphModule, split: fx.GraphModule) -> list[fx.Node]:
    """Values of ``gm`` whose gradients autograd would add up in another order for ``split``.

    Two gradients can be swapped; the sum of three cannot, to the last bit.

    Args:
        gm: a Dynamo graph.
        split: the same graph, split by :func:`split_graph_module`.
    """
    position = {name: i for i, name in enumerate(_executed(split))}
    found = []
    for node in gm.graph.nodes:
        if not _has_gradient(node):
            continue
        readers = [reader for reader in _all_readers(node) if reader.op != "output"]
        edges = sum(_times_read(node, reader) for reader in _all_readers(node))
        at = [position[reader.name] for reader in readers]
        if edges > 2 and at != sorted(at):
            found.append(node)
    return found


def _has_gradient(node: fx.Node) -> bool:
    value = traced_value(node)
    if not isinstance(value, torch.Tensor):
        return False
    learned = node.op != "placeholder" or value.requires_grad
    return learned and (value.is_floating_point() or value.is_complex())


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
