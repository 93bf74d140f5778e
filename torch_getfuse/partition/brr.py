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
from fractions import Fraction
from typing import NamedTuple

from torch_getfuse.ir import OpGraph, Read, Tensor, WindowKind
from torch_getfuse.partition.cost import CostTerm, Dram, boundary
from torch_getfuse.partition.group import bits

KAPPA = 32
_HOPELESS = 1 << 62

Rate = int | Fraction  # a Fraction only where a resize makes one: ints are ten times faster


class _Operand(NamedTuple):
    """One operand: its tensor, its rows' kernel and stride (``None``: it has no rate)."""

    read: Read
    kernel: int
    stride: Rate | None


class _Start(NamedTuple):
    """What one start of the alternation holds: at least, and per further tile line, in bytes."""

    need: int
    line: int


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
        self.activation_bytes = activation_bytes
        self.weight_bytes = weight_bytes
        self._weights = [op.weight_elements * weight_bytes for op in graph.ops]
        self._producer = graph.producer
        self._out = [graph.tensors[op.writes] for op in graph.ops]
        self._operands = [[_operand(graph, r, op.writes) for r in op.reads] for op in graph.ops]
        self._local = [_is_local(graph, i) for i in range(len(graph))]
        # Bytes of one row of an operator's output: all channels, and kappa of them.
        row = [out.elements // out.rows * activation_bytes for out in self._out]
        self._row_full = row
        self._row_partial = [
            b * min(kappa, _channels(t)) // _channels(t)
            for b, t in zip(row, self._out, strict=True)
        ]
        cumulative: dict[str, Rate] = dict.fromkeys(graph.inputs, 1)
        for op, operands in zip(graph.ops, self._operands, strict=True):
            strides = [cumulative[o.read.tensor] * (o.stride or 1) for o in operands]
            cumulative[op.writes] = max(strides, default=1)
        self._cumulative = [cumulative[op.writes] for op in graph.ops]
        # Producers whose tensor an operator reads without a rate.
        self._rateless = [
            sum(
                1 << graph.producer[o.read.tensor]
                for o in operands
                if o.stride is None and o.read.tensor in graph.producer
            )
            for operands in self._operands
        ]
        self._tables: dict[tuple[int, Rate], tuple[dict[int, int], dict[int, Rate | None]]] = {}

    # -- the two figures ------------------------------------------------------------------

    def buffer(self, mask: int, buffer_bytes: int) -> int | None:
        """``F_b`` in bytes; ``None`` for a group whose operators have no common rate."""
        tiling = self._tile(mask)
        if tiling is None:
            return None
        rows, rate, _ = tiling
        starts = (self._hold(mask, rows, rate, True), self._hold(mask, rows, rate, False))
        return _better(*starts, buffer_bytes).need

    def floor(self, mask: int) -> int:
        """``F_min`` if the sinks needed one row each: no group grown downstream needs less.

        Which convolutions are full depends on what stands above them alone, and the fewest rows
        of an operator only grow with further consumers.
        """
        rows: dict[int, int] = {}
        for i in bits(mask):
            if self._rateless[i] & mask:
                return _HOPELESS
            if not self.graph.successors[i] & mask:
                _raise_to(rows, self._table(i, 1)[0], mask)
        return min(self._hold(mask, rows, None, full).need for full in (True, False))

    def dram(self, mask: int, buffer_bytes: int) -> Dram:
        """``F_D`` of a valid group: the weights are read once per pass."""
        reads, writes = boundary(self.graph, mask)
        tensors = self.graph.tensors
        read = sum(tensors[name].elements for name in reads) * self.activation_bytes
        write = sum(tensors[name].elements for name in writes) * self.activation_bytes
        weight = sum(self._weights[i] for i in bits(mask))
        tiling = self._tile(mask)
        assert tiling is not None, "only valid groups have a traffic"
        rows, rate, lines = tiling
        start = _better(
            self._hold(mask, rows, rate, True), self._hold(mask, rows, rate, False), buffer_bytes
        )
        passes = 1
        if start.need + weight > buffer_bytes:
            further = (buffer_bytes - start.need) // start.line if start.line else lines
            passes = -(-lines // min(lines, further + 1))
        return Dram(read, write, weight * passes)

    def terms(self, mask: int, buffer_bytes: int) -> tuple[CostTerm, ...]:
        """What is held: rows of convolutions' outputs and of outside inputs; sums to ``F_b``."""
        tiling = self._tile(mask)
        if tiling is None:
            return ()
        rows, rate, _ = tiling
        found: list[list[CostTerm]] = [[], []]
        full = self._hold(mask, rows, rate, True, found[0])
        partial = self._hold(mask, rows, rate, False, found[1])
        return tuple(found[0] if _better(full, partial, buffer_bytes) is full else found[1])

    # -- rows -----------------------------------------------------------------------------

    def _tile(self, mask: int) -> tuple[dict[int, int], dict[int, Rate], int] | None:
        """Fewest rows and rate per operator, and tile lines of the sinks; ``None``: no rate."""
        sinks = []
        for i in bits(mask):
            if self._rateless[i] & mask:
                return None
            if not self.graph.successors[i] & mask:
                sinks.append(i)
        common = _lcm([self._cumulative[i] for i in sinks]) if len(sinks) > 1 else None
        rows: dict[int, int] = {}
        rates: dict[int, Rate] = {}
        lines = 0
        for sink in sinks:
            own = 1 if common is None else _plain(Fraction(common) / self._cumulative[sink])
            needed, rate = self._table(sink, own)
            for i, value in rate.items():
                if mask >> i & 1 and (value is None or rates.setdefault(i, value) != value):
                    return None
            _raise_to(rows, needed, mask)
            lines = max(lines, math.ceil(self._out[sink].rows / Fraction(own)))
        return rows, rates, lines

    def _table(self, sink: int, rate: Rate) -> tuple[dict[int, int], dict[int, Rate | None]]:
        """Rows and rates of all operators above ``sink`` when it makes ``rate`` rows at a time.

        A group is convex, so all paths from a member to a sink lie inside it, and what the sink
        asks of that member is the same in every group that has both.
        """
        found = self._tables.get((sink, rate))
        if found is not None:
            return found
        rows: dict[int, int] = {sink: math.ceil(rate)}
        rates: dict[int, Rate | None] = {sink: rate}
        for i in range(sink, -1, -1):
            if i not in rows:
                continue
            for operand in self._operands[i]:
                above = self._producer.get(operand.read.tensor)
                if above is None:
                    continue
                rows[above] = max(rows.get(above, 0), self._input_rows(operand, rows[i]))
                own = rates[i]
                if own is None or operand.stride is None:
                    rates[above] = None
                    continue
                wanted = _plain(operand.stride * own)
                if rates.setdefault(above, wanted) != wanted:
                    rates[above] = None
        self._tables[sink, rate] = rows, rates
        return rows, rates

    def _input_rows(self, operand: _Operand, count: int) -> int:
        """``min(H, (count - 1) * t + k)`` rows of an operand."""
        height = self.graph.tensors[operand.read.tensor].rows
        if operand.stride is None:
            return height
        return min(height, math.ceil((count - 1) * operand.stride) + operand.kernel)

    # -- channels -------------------------------------------------------------------------

    def _hold(
        self,
        mask: int,
        rows: dict[int, int],
        rates: dict[int, Rate] | None,
        start: bool,
        terms: list[CostTerm] | None = None,
    ) -> _Start:
        """What a start holds; ``rates`` are needed for the line, ``terms`` collects the names."""
        predecessors = self.graph.predecessors
        full = need = line = 0
        inputs: dict[str, tuple[int, int]] = {}
        left = mask
        while left:
            low = left & -left
            left ^= low
            i = low.bit_length() - 1
            before = predecessors[i] & mask
            local = self._local[i]
            # A local operator is as full as what it follows; a convolution alternates.
            is_full = (bool(full & before) == local) if before else start
            if is_full:
                full |= low
            if not local:
                row = self._row_full[i] if is_full else self._row_partial[i]
                need += rows[i] * row
                if rates is not None:
                    line += math.ceil(rates[i]) * row
                if terms is not None:
                    kind = "full" if is_full else "partial"
                    terms.append(CostTerm(kind, self._out[i].name, rows[i], row))
            if not before and (local or not is_full):
                self._hold_inputs(i, rows[i], None if rates is None else rates[i], mask, inputs)
        for name, (count, further) in inputs.items():
            source = self.graph.tensors[name]
            row = source.elements // source.rows * self.activation_bytes
            need += count * row
            line += further * row
            if terms is not None:
                terms.append(CostTerm("input", name, count, row))
        return _Start(need, line)

    def _hold_inputs(
        self, i: int, count: int, rate: Rate | None, mask: int, inputs: dict[str, tuple[int, int]]
    ) -> None:
        """Rows of the outside inputs of an operator that is first in its group."""
        for operand in self._operands[i]:
            name = operand.read.tensor
            if mask >> self._producer.get(name, len(self.graph)) & 1:
                continue
            further = 0 if rate is None else math.ceil(rate)
            if operand.read.window.kind is WindowKind.REDUCE:
                held = 1
            elif self._local[i]:
                held = count
            else:
                held = self._input_rows(operand, count)
                if rate is not None:
                    further = math.ceil(rate * (operand.stride or 1))
            known = inputs.get(name, (0, 0))
            inputs[name] = max(known[0], held), max(known[1], further)


def _better(full: _Start, partial: _Start, buffer_bytes: int) -> _Start:
    """The start with the smaller F_line / (B - F_min); one that does not fit counts last."""
    rooms = buffer_bytes - full.need, buffer_bytes - partial.need
    if min(rooms) > 0:
        return full if full.line * rooms[1] <= partial.line * rooms[0] else partial
    return full if rooms[0] >= rooms[1] else partial


def _raise_to(rows: dict[int, int], needed: dict[int, int], mask: int) -> None:
    """Raise the rows of the members of ``mask`` to what one sink needs of them."""
    for i, count in needed.items():
        if mask >> i & 1 and rows.get(i, 0) < count:
            rows[i] = count


def _operand(graph: OpGraph, read: Read, writes: str) -> _Operand:
    window = read.window
    height, tall = graph.tensors[read.tensor].rows, graph.tensors[writes].rows
    reach = window.dilation[0] * (window.kernel[0] - 1)
    if window.everything:
        return _Operand(read, height, height)
    if window.kind is WindowKind.RESIZE:
        return _Operand(read, 2, _plain(Fraction(height, tall)))
    if window.kind is WindowKind.TRANSPOSED:
        stride = window.stride[0]
        return _Operand(read, reach // stride + 1, _plain(Fraction(1, stride)))
    if window.kind is WindowKind.IDENTITY and height == 1 and tall > 1:
        return _Operand(read, 1, None)
    return _Operand(read, reach + 1, window.stride[0])


def _plain(value: Rate) -> Rate:
    """A whole Fraction as an int."""
    return value if isinstance(value, int) or value.denominator > 1 else value.numerator


def _channels(tensor: Tensor) -> int:
    return tensor.elements // (tensor.rows * tensor.cols)


def _is_local(graph: OpGraph, position: int) -> bool:
    """Pooling, add, concat, elementwise, and depthwise convolution: channel by channel."""
    op = graph.ops[position]
    if not op.mixes_channels:
        return True
    source = graph.tensors[op.reads[0].tensor] if op.reads else graph.tensors[op.writes]
    return op.groups > 1 and op.groups == _channels(source)


def _lcm(values: list[Rate]) -> Rate:
    """Least common multiple of positive rationals."""
    fractions = [Fraction(value) for value in values]
    return _plain(
        Fraction(
            math.lcm(*(value.numerator for value in fractions)),
            math.gcd(*(value.denominator for value in fractions)),
        )
    )
