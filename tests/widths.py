"""How tensors are stored (docs/method.md, "Widths and storage"), as plain as possible.

It shares with the package only the graph: bits are counted one element after another, and what is
written over what is worked out anew.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from torch_getfuse.ir import OpGraph, Tensor

BITS = (1, 2, 4, 8, 8, 12, 16, 32)


def bits_in(graph: OpGraph, name: str) -> int:
    """Bits of an element."""
    bits = graph.tensors[name].bits
    return int(8 * graph.activation_bytes) if bits is None else bits


def channels_along(tensor: Tensor) -> int | None:
    """The axis of channels: second where the rows come later, else last if it has no rows."""
    rank = len(tensor.shape)
    if tensor.stream_axis is not None and tensor.stream_axis >= 2:
        return 1
    return None if rank < 2 or tensor.stream_axis == rank - 1 else rank - 1


def unit_bytes(graph: OpGraph, name: str, pixel: bool = False) -> int:
    """Whole bytes of a row, or of a pixel, with its padding."""
    tensor, count = graph.tensors[name], 1
    along = channels_along(tensor)
    for axis, size in enumerate(tensor.shape):
        in_rows = axis == tensor.stream_axis
        in_cols = len(tensor.shape) == 4 and axis - 1 == tensor.stream_axis
        if in_rows or (pixel and in_cols):
            continue
        while axis == along and size % graph.align_channels:
            size += 1
        count *= size
    total = count * bits_in(graph, name)
    while total % 8:
        total += 1
    return total // 8


def whole_bytes(graph: OpGraph, name: str) -> int:
    """Bytes of a tensor: of its rows."""
    return unit_bytes(graph, name) * graph.tensors[name].rows


def written_over(graph: OpGraph) -> list[bool]:
    """Per operator, whether it writes over its operand."""
    found = []
    for op in graph.ops:
        over = op.in_place
        for read in op.reads if over else ():
            readers = [
                other for other in graph.ops if read.tensor in {r.tensor for r in other.reads}
            ]
            over = len(readers) == 1 and read.tensor not in graph.outputs
            over = over and bits_in(graph, read.tensor) == bits_in(graph, op.writes)
            over = over and whole_bytes(graph, read.tensor) == whole_bytes(graph, op.writes)
        found.append(over)
    return found


def mixed_widths(rng: Random, graph: OpGraph) -> OpGraph:
    """The graph with tensors of several widths, some of them equal, perhaps with padding."""
    few = rng.sample(BITS, rng.choice((1, 2, 3)))
    tensors = {
        name: replace(tensor, bits=rng.choice((None, *few)))
        for name, tensor in graph.tensors.items()
    }
    align = rng.choice((1, 1, 2, 4, 16))
    width = rng.choice((0.5, 1, 2, 4))
    return replace(graph, tensors=tensors, activation_bytes=width, align_channels=align)
