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


class _Tiles(NamedTuple):
    """The two starts of a group, and the tile lines of its sinks."""

    full: _Start
    partial: _Start
    lines: int

    def better(self, buffer_bytes: int) -> _Start:
        """The start with the smaller F_line / (B - F_min); one that does not fit counts last."""
        full, partial = self.full, self.partial
        rooms = buffer_bytes - full.need, buffer_bytes - partial.need
        if min(rooms) > 0:
            return full if full.line * rooms[1] <= partial.line * rooms[0] else partial
        return full if rooms[0] >= rooms[1] else partial


class _Table(NamedTuple):
    """What a sink asks of the operators above it.

    Attributes:
        rows, rates: per operator.
        uneven: mask of the operators whose consumers disagree about the rate.
    """

    rows: dict[int, int]
    rates: dict[int, Rate]
    uneven: int


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
        self._rateless_readers = sum(1 << i for i, makers in enumerate(self._rateless) if makers)
        self._tables: dict[tuple[int, Rate], _Table] = {}
        self._known: dict[int, _Tiles | None] = {}

    # -- the two figures ------------------------------------------------------------------

    def buffer(self, mask: int, buffer_bytes: int) -> int | None:
        """``F_b`` in bytes; ``None`` for a group whose operators have no common rate."""
        tiles = self._tiles(mask)
        return None if tiles is None else tiles.better(buffer_bytes).need

    def floor(self, mask: int) -> int:
        """``F_min`` if the sinks needed one row each: no group grown downstream needs less.

        Which convolutions are full depends on what stands above them alone, and the fewest rows
        of an operator only grow with further consumers.
        """
        if self._has_rateless(mask):
            return _HOPELESS
        sinks = self._sinks(mask)
        if len(sinks) == 1:
            tiles = self._tiles(mask)
            if tiles is not None:
                return min(tiles.full.need, tiles.partial.need)
        rows: dict[int, int] = {}
        for sink in sinks:
            _raise_to(rows, self._table(sink, 1).rows, mask)
        full, partial = self._hold(mask, rows, None)
        return min(full.need, partial.need)

    def dram(self, mask: int, buffer_bytes: int) -> Dram:
        """``F_D`` of a valid group: the weights are read once per pass."""
        reads, writes = boundary(self.graph, mask)
        tensors = self.graph.tensors
        read = sum(tensors[name].elements for name in reads) * self.activation_bytes
        write = sum(tensors[name].elements for name in writes) * self.activation_bytes
        weight = sum(self._weights[i] for i in bits(mask))
        tiles = self._tiles(mask)
        assert tiles is not None, "only valid groups have a traffic"
        start = tiles.better(buffer_bytes)
        passes = 1
        if start.need + weight > buffer_bytes:
            room = buffer_bytes - start.need
            further = room // start.line if start.line else tiles.lines
            passes = -(-tiles.lines // min(tiles.lines, further + 1))
        return Dram(read, write, weight * passes)

    def terms(self, mask: int, buffer_bytes: int) -> tuple[CostTerm, ...]:
        """What is held: rows of convolutions' outputs and of outside inputs; sums to ``F_b``."""
        tiles = self._tiles(mask)
        if tiles is None:
            return ()
        rows, rates, _ = self._rows(mask) or ({}, {}, 0)
        named: tuple[list[CostTerm], list[CostTerm]] = ([], [])
        self._hold(mask, rows, rates, named)
        return tuple(named[0] if tiles.better(buffer_bytes) is tiles.full else named[1])

    def _tiles(self, mask: int) -> _Tiles | None:
        """Both starts of a group and its tile lines, remembered; ``None`` without a rate."""
        if mask not in self._known:
            found = None if self._has_rateless(mask) else self._rows(mask)
            self._known[mask] = (
                None if found is None else _Tiles(*self._hold(mask, *found[:2]), found[2])
            )
        return self._known[mask]

    # -- rows -----------------------------------------------------------------------------

    def _has_rateless(self, mask: int) -> bool:
        """Whether a one-row tensor is read by a taller one inside the group."""
        return any(self._rateless[i] & mask for i in bits(mask & self._rateless_readers))

    def _sinks(self, mask: int) -> list[int]:
        successors = self.graph.successors
        return [i for i in bits(mask) if not successors[i] & mask]

    def _rows(self, mask: int) -> tuple[dict[int, int], dict[int, Rate], int] | None:
        """Fewest rows and rate per operator, and tile lines of the sinks; ``None``: no rate."""
        sinks = self._sinks(mask)
        if len(sinks) == 1:
            table = self._table(sinks[0], 1)
            if table.uneven & mask:
                return None
            return table.rows, table.rates, self._out[sinks[0]].rows
        common = Fraction(_lcm([self._cumulative[i] for i in sinks]))
        rows: dict[int, int] = {}
        rates: dict[int, Rate] = {}
        lines = 0
        for sink in sinks:
            own = _plain(common / self._cumulative[sink])
            table = self._table(sink, own)
            if table.uneven & mask:
                return None
            for i, rate in table.rates.items():
                if mask >> i & 1 and rates.setdefault(i, rate) != rate:
                    return None
            _raise_to(rows, table.rows, mask)
            lines = max(lines, math.ceil(self._out[sink].rows / Fraction(own)))
        return rows, rates, lines

    def _table(self, sink: int, rate: Rate) -> _Table:
        """Rows and rates of all operators above ``sink`` when it makes ``rate`` rows at a time.

        A group is convex, so all paths from a member to a sink lie inside it, and what the sink
        asks of that member is the same in every group that has both.
        """
        found = self._tables.get((sink, rate))
        if found is not None:
            return found
        rows: dict[int, int] = {sink: math.ceil(rate)}
        rates: dict[int, Rate] = {sink: rate}
        uneven = 0
        for i in range(sink, -1, -1):
            if i not in rows:
                continue
            for operand in self._operands[i]:
                above = self._producer.get(operand.read.tensor)
                if above is None:
                    continue
                rows[above] = max(rows.get(above, 0), self._input_rows(operand, rows[i]))
                if uneven >> i & 1 or operand.stride is None:
                    uneven |= 1 << above
                else:
                    wanted = _plain(operand.stride * rates[i])
                    if rates.setdefault(above, wanted) != wanted:
                        uneven |= 1 << above
        self._tables[sink, rate] = _Table(rows, rates, uneven)
        return self._tables[sink, rate]

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
        named: tuple[list[CostTerm], list[CostTerm]] | None = None,
    ) -> tuple[_Start, _Start]:
        """What the two starts hold, full and partial, in one pass over the group.

        ``rates`` are needed for the further lines; ``named`` collects the terms of each.
        """
        predecessors, is_local = self.graph.predecessors, self._local
        # Bit set of the operators that are full, per start.
        full_a = full_b = need_a = need_b = line_a = line_b = 0
        inputs: tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]] = ({}, {})
        left = mask
        while left:
            low = left & -left
            left ^= low
            i = low.bit_length() - 1
            before = predecessors[i] & mask
            local = is_local[i]
            # A local operator is as full as what it follows; a convolution alternates.
            if before:
                a, b = bool(full_a & before) == local, bool(full_b & before) == local
            else:
                a, b = True, False
            if a:
                full_a |= low
            if b:
                full_b |= low
            if not local:
                count = rows[i]
                all_, some = self._row_full[i], self._row_partial[i]
                row_a, row_b = all_ if a else some, all_ if b else some
                need_a += count * row_a
                need_b += count * row_b
                if rates is not None:
                    further = math.ceil(rates[i])
                    line_a += further * row_a
                    line_b += further * row_b
                if named is not None:
                    name = self._out[i].name
                    for terms, full, row in ((named[0], a, row_a), (named[1], b, row_b)):
                        terms.append(CostTerm("full" if full else "partial", name, count, row))
            if not before:
                rate = None if rates is None else rates[i]
                for full, held in ((a, inputs[0]), (b, inputs[1])):
                    if local or not full:
                        self._hold_inputs(i, rows[i], rate, mask, held)
        extra_a = self._add_inputs(inputs[0], named[0] if named else None)
        extra_b = self._add_inputs(inputs[1], named[1] if named else None)
        return (
            _Start(need_a + extra_a.need, line_a + extra_a.line),
            _Start(need_b + extra_b.need, line_b + extra_b.line),
        )

    def _add_inputs(
        self, inputs: dict[str, tuple[int, int]], terms: list[CostTerm] | None
    ) -> _Start:
        need = line = 0
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
