"""Inputs that overlap in memory at a call, and did not when the graph was traced.

Dynamo has no guard for it: a graph compiled for two tensors is later called with two views of one.
A plan orders what it saw to be one memory, and a group compiled on its own takes its inputs for
apart. So before a graph that writes to inputs runs as planned, their addresses are looked at;
where one that is written lies across another, the graph runs as Dynamo gave it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.fx_nodes.effects import input_storages
from torch_getfuse.backend.fx_nodes.values import traced_value
from torch_getfuse.backend.torch_private import is_traced


def apart_or_unplanned(
    gm: fx.GraphModule, planned: Callable[..., Any], tell: Callable[[], None]
) -> Callable[..., Any]:
    """``planned``, or ``gm`` at calls where an input overlaps one that ``gm`` writes to.

    Costs nothing where ``gm`` writes to no input: ``planned`` itself is returned.

    Args:
        gm: the graph as it was traced.
        planned: computes the same for inputs that overlap as they did in the trace.
        tell: called at the first such call.
    """
    storages, written = input_storages(gm)
    if not written or len(set(storages.values())) < 2:
        return planned
    inputs = gm.graph.find_nodes(op="placeholder")
    checked = [
        (position, storage, _known_extent(traced_value(inputs[position])))
        for position, storage in storages.items()
    ]
    unplanned = gm.forward
    told = False

    def run(*args: Any) -> Any:
        nonlocal told
        if not _overlap(args, checked, written):
            return planned(*args)
        if not told:
            told = True
            tell()
        return unplanned(*args)

    return run


def _overlap(
    args: Sequence[Any], inputs: Sequence[tuple[int, int, int | None]], written: set[int]
) -> bool:
    """Whether a written storage lies across another one.

    Args:
        args: of the call.
        inputs: position, number of the traced storage, and bytes from the first element to the
            last, ``None`` where sizes may change.
        written: the numbers of the storages that are written.
    """
    if is_traced():
        return False  # traced again: there is no memory to look at
    spans = []
    for position, storage, extent in inputs:
        start = args[position].data_ptr()
        spans.append((start, start + (extent or _extent(args[position])), storage))
    spans.sort()
    reach = 0
    for start, end, _ in spans:
        if start < reach:
            break
        reach = end
    else:
        return False
    return any(
        storage in written
        and other != storage
        and other_start < end
        and start < other_end
        and start < end
        and other_start < other_end
        for start, end, storage in spans
        for other_start, other_end, other in spans
    )


def _known_extent(traced: torch.Tensor) -> int | None:
    sizes = (*traced.shape, *traced.stride())
    return None if any(isinstance(size, torch.SymInt) for size in sizes) else _extent(traced)


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element of a tensor to the last."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.itemsize
