"""Scatters to axes of size one as sums, for inductor.

Where the axes that ``index_put`` adds to have size one, every index is zero, and inductor (torch
2.13) takes the write for an ordinary one: fused with what reads the result, it may come after it,
and the reader gets what was there before (pytorch issue 191571). The gradient of an interpolation
from a 1x1 map, as in DeepLab's image pooling, is such a scatter: its gradients came out as zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.fx_nodes.values import has_value, traced_value
from torch_getfuse.backend.torch_private import unsafe_index_put

_SCATTERS = (torch.ops.aten.index_put.default, unsafe_index_put)


def sum_scatters(gm: fx.GraphModule) -> int:
    """Replace ``index_put(x, indices, values, accumulate=True)`` by ``x`` and a sum of ``values``.

    Only where all indexed axes of ``x`` have size one, and ``values`` need no broadcasting.

    Returns:
        The number of replaced nodes.
    """
    count = 0
    for node in list(gm.graph.nodes):
        axes = _summed(node)
        if axes is not None:
            target, indices, values = _operands(node)
            with gm.graph.inserting_before(node):
                total = values
                if axes:
                    total = gm.graph.call_function(torch.ops.aten.sum.dim_IntList, (values, axes))
                for axis, index in enumerate(indices):
                    if index is not None:
                        total = gm.graph.call_function(
                            torch.ops.aten.unsqueeze.default, (total, axis)
                        )
                added = gm.graph.call_function(torch.ops.aten.add.Tensor, (target, total))
            added.meta = dict(node.meta)
            node.replace_all_uses_with(added)
            gm.graph.erase_node(node)
            count += 1
    if count:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return count


def _summed(node: fx.Node) -> list[int] | None:
    """Axes of the values over which they are summed; ``None`` for a node that stays."""
    if node.target not in _SCATTERS or len(node.args) != 4 or not node.args[3]:
        return None
    target, indices, values = _operands(node)
    nodes = [target, values, *(index for index in indices if index is not None)]
    if len(nodes) == 2 or not all(isinstance(one, fx.Node) and has_value(one) for one in nodes):
        return None
    shape, full = list(traced_value(target).shape), list(traced_value(values).shape)
    found = [traced_value(index) for index in nodes[2:]]
    where = [axis for axis, index in enumerate(indices) if index is not None]
    if any(index.dtype == torch.bool for index in found):
        return None
    if not all(_is_one(shape[axis]) for axis in where):
        return None
    rank = max(index.dim() for index in found)
    # The indices' own axes stand where the indexed ones were, or first if these are apart.
    start = where[0] if where[-1] - where[0] + 1 == len(where) else 0
    kept = [[size] for axis, size in enumerate(shape) if axis not in where]
    spread = [
        [i.shape[axis - rank] for i in found if i.dim() >= rank - axis] for axis in range(rank)
    ]
    sizes = [*kept[:start], *spread, *kept[start:]]
    if len(full) != len(sizes):
        return None
    # Symbolic sizes are not compared, which would specialise the graph; only ones can broadcast.
    if any(
        _is_one(size) and not all(map(_is_one, those))
        for size, those in zip(full, sizes, strict=True)
    ):
        return None
    return list(range(start, start + rank))


def _operands(node: fx.Node) -> tuple[Any, Sequence[Any], Any]:
    """The tensor, the indices (``None``: an axis that is kept) and the values of a scatter."""
    target, indices, values, *_ = node.args
    assert isinstance(indices, Sequence)
    return target, indices, values


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1
