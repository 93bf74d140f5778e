"""BRR: buffer requirement reduction, after Optimus (arXiv 2501.00636 section III; method.md 4).

Only feature maps bind the buffer. A group runs in tiles of whole rows; its convolutions
alternate between *full* (hold all output channels) and *partial* (hold ``kappa``), so that a
partial one streams channels from a full one; local operators (pooling, add, concat,
elementwise, depthwise convolution) keep nothing. Weights are read once if they fit beside the
maps, else once per tile: fewer rows held means more passes over the weights.

    F_min  = sum over convolutions of channels x m x W  + held outside inputs      (= F_b)
    F_line = the same with one more tile line of rows in place of m
    T      = 1 if F_min + W <= B, else ceil(H_s / h), h = min(H_s, (B - F_min) // F_line + 1)
    F_D    = W x T + outside inputs once + outside outputs once

where ``m`` is the fewest rows of an operator that one tile line of the sinks needs. Both starts
(the first convolution full, or partial) are tried; the one with the smaller
``F_line / (B - F_min)`` is kept.

Differences from Optimus, all decided by method.md section 4: depthwise weights count; local
operators alone cost their input and output; a group may start with a local operator, which then
streams its input and holds m rows of it; passes are rounded up; a one-row tensor that a taller
one reads (the scale of Squeeze-and-Excite) has no rate, so a group with that edge inside is
invalid; where predecessors of a convolution disagree it follows a full one; the windows of
dilated convolutions are as tall as they reach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from torch_getfuse.ir import OpGraph, Read, Tensor, WindowKind
from torch_getfuse.partition.cost import CostTerm, Dram, boundary
from torch_getfuse.partition.group import bits

KAPPA = 32


class _Rows(NamedTuple):
    """Row kernel and stride of an operand; no stride where it has no rate."""

    kernel: int
    stride: Fraction | None


@dataclass(frozen=True, slots=True)
class _Tiling:
    """The rows of a group: per operator its rate and its fewest rows; tile lines of the sinks."""

    rate: dict[int, Fraction]
    rows: dict[int, int]
    lines: int


class Brr:
    """The BRR cost model of one graph.

    Args:
        graph: the operator graph.
        activation_bytes, weight_bytes: element widths in bytes.
        kappa: output channels that a partial convolution holds.
    """

    name = "brr"

    def __init__(
        self, graph: OpGraph, activation_bytes: int = 1, weight_bytes: int = 1, kappa: int = KAPPA
    ) -> None:
        self.graph = graph
        self.kappa = kappa
        self._width = activation_bytes
        self._weights = [op.weight_elements * weight_bytes for op in graph.ops]
        self._out = [graph.tensors[op.writes] for op in graph.ops]
        self._reads = [[(r, _rows_of(graph, r, op.writes)) for r in op.reads] for op in graph.ops]
        self._local = [_is_local(graph, i) for i in range(len(graph))]
        self._producer = graph.producer
        cumulative = {name: Fraction(1) for name in graph.inputs}
        for i, op in enumerate(graph.ops):
            strides = [cumulative[r.tensor] * (rows.stride or 1) for r, rows in self._reads[i]]
            cumulative[op.writes] = max(strides, default=Fraction(1))
        self._cumulative = [cumulative[op.writes] for op in graph.ops]
        # Operators whose operand from inside a group would have no rate: op -> mask of producers.
        self._rateless = [
            sum(
                1 << graph.producer[r.tensor]
                for r, rows in self._reads[i]
                if rows.stride is None and r.tensor in graph.producer
            )
            for i in range(len(graph))
        ]

    # -- the two figures ------------------------------------------------------------------

    def buffer(self, mask: int, buffer_bytes: int) -> int | None:
        """``F_b`` in bytes; ``None`` for a group whose operators have no common rate."""
        found = self._choose(mask, buffer_bytes)
        return None if found is None else found[0]

    def floor(self, mask: int) -> int:
        """``F_min`` if the sinks needed one row each: no group grown downstream needs less.

        Which convolutions are full depends on what stands above them alone, and the fewest rows
        of an operator only grow with further consumers.
        """
        positions = list(bits(mask))
        rows: dict[int, int] = {}
        for i in reversed(positions):
            if self._rateless[i] & mask:
                return 1 << 62
            rows[i] = max(rows.get(i, 1), 1)
            self._demand(i, rows[i], mask, rows)
        return min(
            sum(term.bytes for term in self._held(positions, mask, rows, None, full))
            for full in (True, False)
        )

    def dram(self, mask: int, buffer_bytes: int) -> Dram:
        """``F_D`` of a valid group: the weights are read once per pass."""
        reads, writes = boundary(self.graph, mask)
        tensors = self.graph.tensors
        read = sum(tensors[name].elements for name in reads) * self._width
        write = sum(tensors[name].elements for name in writes) * self._width
        weight = sum(self._weights[i] for i in bits(mask))
        chosen = self._choose(mask, buffer_bytes)
        assert chosen is not None, "only valid groups have a traffic"
        need, line, lines, _ = chosen
        passes = 1
        if need + weight > buffer_bytes:
            tile = min(lines, (buffer_bytes - need) // line + 1) if line else lines
            passes = -(-lines // tile)
        return Dram(read, write, weight * passes)

    def terms(self, mask: int, buffer_bytes: int) -> tuple[CostTerm, ...]:
        """What is held: rows of convolutions' outputs and of outside inputs; sums to ``F_b``."""
        found = self._choose(mask, buffer_bytes)
        return () if found is None else found[3]

    # -- rows and channels ----------------------------------------------------------------

    def _choose(
        self, mask: int, buffer_bytes: int
    ) -> tuple[int, int, int, tuple[CostTerm, ...]] | None:
        """``F_min``, ``F_line``, tile lines and terms of the better start."""
        tiling = self._tile(mask)
        if tiling is None:
            return None
        positions = list(bits(mask))
        best = None
        for full in (True, False):
            terms = self._held(positions, mask, tiling.rows, None, full)
            per_line = self._held(positions, mask, tiling.rows, tiling.rate, full)
            need = sum(term.bytes for term in terms)
            line = sum(term.bytes for term in per_line)
            room = buffer_bytes - need
            # A start that does not fit counts only where neither does.
            rank = (0, Fraction(line, room)) if room > 0 else (1, Fraction(need))
            if best is None or rank < best[0]:
                best = (rank, (need, line, tiling.lines, tuple(terms)))
        assert best is not None
        return best[1]

    def _tile(self, mask: int) -> _Tiling | None:
        positions = list(bits(mask))
        sinks = [i for i in positions if not self.graph.successors[i] & mask]
        common = _lcm([self._cumulative[i] for i in sinks])
        rate: dict[int, Fraction] = {i: common / self._cumulative[i] for i in sinks}
        rows: dict[int, int] = {i: math.ceil(rate[i]) for i in sinks}
        for i in reversed(positions):
            if self._rateless[i] & mask:
                return None
            for operand, window in self._reads[i]:
                if not self._inside(operand.tensor, mask):
                    continue
                assert window.stride is not None
                above = self._producer[operand.tensor]
                wanted = window.stride * rate[i]
                if rate.setdefault(above, wanted) != wanted:
                    return None
            self._demand(i, rows[i], mask, rows)
        lines = max(math.ceil(self._out[i].rows / rate[i]) for i in sinks)
        return _Tiling(rate, rows, lines)

    def _demand(self, i: int, count: int, mask: int, rows: dict[int, int]) -> None:
        """Raise the rows of an operator's producers in the group to what ``count`` rows need."""
        for operand, window in self._reads[i]:
            if self._inside(operand.tensor, mask):
                above = self._producer[operand.tensor]
                rows[above] = max(rows.get(above, 0), self._input_rows(operand, window, count))

    def _input_rows(self, operand: Read, window: _Rows, count: int) -> int:
        """``min(H, (count - 1) * t + k)`` rows of an operand."""
        height = self.graph.tensors[operand.tensor].rows
        if window.stride is None:
            return height
        return min(height, math.ceil((count - 1) * window.stride) + window.kernel)

    def _held(
        self,
        positions: list[int],
        mask: int,
        rows: dict[int, int],
        rate: dict[int, Fraction] | None,
        start_full: bool,
    ) -> list[CostTerm]:
        """What a start holds: with ``rate``, for one more tile line; without, at least."""
        full: dict[int, bool] = {}
        terms: list[CostTerm] = []
        inputs: dict[str, CostTerm] = {}
        for i in positions:
            before = [full[j] for j in bits(self.graph.predecessors[i] & mask)]
            outside = [
                (operand, window)
                for operand, window in self._reads[i]
                if not self._inside(operand.tensor, mask)
            ]
            if self._local[i]:
                full[i] = any(before) if before else start_full
                if not before:
                    for operand, _ in outside:
                        reduces = operand.window.kind is WindowKind.REDUCE
                        count = 1 if reduces else self._count(i, rows, rate)
                        self._hold(inputs, operand, count)
                continue
            full[i] = not any(before) if before else start_full
            out = self._out[i]
            channels = _channels(out)
            held = channels if full[i] else min(channels, self.kappa)
            unit = held * out.cols * self._width
            kind = "full" if full[i] else "partial"
            terms.append(CostTerm(kind, out.name, self._count(i, rows, rate), unit))
            if not before and not full[i]:
                for operand, window in outside:
                    if operand.window.kind is WindowKind.REDUCE:
                        count = 1
                    elif rate is None:
                        count = self._input_rows(operand, window, rows[i])
                    else:
                        count = math.ceil(rate[i] * (window.stride or 1))
                    self._hold(inputs, operand, count)
        return [*terms, *inputs.values()]

    def _count(self, i: int, rows: dict[int, int], rate: dict[int, Fraction] | None) -> int:
        return rows[i] if rate is None else math.ceil(rate[i])

    def _hold(self, inputs: dict[str, CostTerm], operand: Read, count: int) -> None:
        source = self.graph.tensors[operand.tensor]
        unit = source.elements // source.rows * self._width
        known = inputs.get(source.name)
        if known is None or known.units < count:
            inputs[source.name] = CostTerm("input", source.name, count, unit)

    def _inside(self, tensor: str, mask: int) -> bool:
        return bool(mask >> self._producer.get(tensor, len(self.graph)) & 1)


def _rows_of(graph: OpGraph, read: Read, writes: str) -> _Rows:
    window = read.window
    height, tall = graph.tensors[read.tensor].rows, graph.tensors[writes].rows
    reach = window.dilation[0] * (window.kernel[0] - 1)
    if window.everything:
        return _Rows(height, Fraction(height))
    if window.kind is WindowKind.RESIZE:
        return _Rows(2, Fraction(height, tall))
    if window.kind is WindowKind.TRANSPOSED:
        return _Rows(reach // window.stride[0] + 1, Fraction(1, window.stride[0]))
    if window.kind is WindowKind.IDENTITY and height == 1 and tall > 1:
        return _Rows(1, None)
    return _Rows(reach + 1, Fraction(window.stride[0]))


def _channels(tensor: Tensor) -> int:
    return tensor.elements // (tensor.rows * tensor.cols)


def _is_local(graph: OpGraph, position: int) -> bool:
    """Pooling, add, concat, elementwise, and depthwise convolution: channel by channel."""
    op = graph.ops[position]
    if not op.mixes_channels:
        return True
    source = graph.tensors[op.reads[0].tensor] if op.reads else graph.tensors[op.writes]
    return op.groups > 1 and op.groups == _channels(source)


def _lcm(values: list[Fraction]) -> Fraction:
    """Least common multiple of positive rationals."""
    return Fraction(
        math.lcm(*(value.numerator for value in values)),
        math.gcd(*(value.denominator for value in values)),
    )
