"""The rows that the sinks of a BRR group ask of the operators above (docs/method.md, section 4).

A tile line of the sinks needs ``m`` rows of each operator at least, and each further line ``rate``
rows more: going up, ``m`` is ``(m - 1) * stride + kernel`` and ``rate`` is ``rate * stride``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from torch_getfuse.ir import OpGraph, Read, WindowKind
from torch_getfuse.partition.cost.scheme import remember
from torch_getfuse.partition.node_set import bits

Rate = int | Fraction  # a Fraction only where a resize makes one: ints are ten times faster

Held = tuple[int, int, int, int]
"""Of a convolution's output: bytes of the fewest rows with all channels and with ``kappa`` of
them, and both again for the rows of one further tile line."""


class Operand(NamedTuple):
    """One operand: its tensor, its rows' kernel and stride (``None``: it has no rate)."""

    read: Read
    kernel: int
    stride: Rate | None


class Rows(NamedTuple):
    """What the operators of a group hold.

    Attributes:
        rows, rates: per operator, its fewest rows and those of one further tile line.
        held: the same of convolutions in bytes.
        lines: tile lines of the sinks.
    """

    rows: dict[int, int]
    rates: Mapping[int, Rate]
    held: dict[int, Held]
    lines: int


class _Pace(NamedTuple):
    """How the sinks of a group go on together.

    Attributes:
        own: each, and its rows per tile line.
        lines: tile lines.
        rates: rows per tile line of every operator, as the strides above it say.
    """

    own: list[tuple[int, Rate]]
    lines: int
    rates: dict[int, Rate]


class _Table:
    """What one sink asks, worked out upwards as far as was asked.

    Attributes:
        rows, rates, held: as in :class:`Rows`.
        uneven: mask of the operators whose consumers disagree about the rate.
        common: rows of the graph's inputs per tile line, as the strides above the sink say.
        odd: mask of those whose rate is another than the strides above them and these say.
        next: the next operator to be worked out; those after it have been.
    """

    __slots__ = ("common", "held", "next", "odd", "rates", "rows", "uneven")

    def __init__(self, sink: int, rate: Rate, common: Rate) -> None:
        self.common = common
        self.rows: dict[int, int] = {sink: math.ceil(rate)}
        self.rates: dict[int, Rate] = {sink: rate}
        self.held: dict[int, Held] = {}
        self.uneven = self.odd = 0
        self.next = sink


class Demand:
    """The rows and rates of one graph's operators, by the sinks of their group.

    Args:
        graph: the operator graph.
        row_bytes: per operator, bytes of one row of its output with all channels and with
            ``kappa`` of them; ``None`` where it stores nothing.

    Attributes:
        operands: per operator.
        rateless: per operator, mask of the producers that it reads without a rate.
        in_all, short: see :meth:`_count_rows`.
        cumulative: stride per operator.
    """

    def __init__(self, graph: OpGraph, row_bytes: Sequence[tuple[int, int] | None]) -> None:
        self.operands = [[_operand(graph, r, op.writes) for r in op.reads] for op in graph.ops]
        self._graph = graph
        self._producer = graph.producer
        self._row_bytes = row_bytes
        self._heights = [graph.tensors[op.writes].rows for op in graph.ops]
        cumulative: dict[str, Rate] = dict.fromkeys(graph.inputs, 1)
        for op, operands in zip(graph.ops, self.operands, strict=True):
            strides = [cumulative[o.read.tensor] * (o.stride or 1) for o in operands]
            cumulative[op.writes] = max(strides, default=1)
        self.cumulative = [cumulative[op.writes] for op in graph.ops]
        self.rateless = [
            sum(
                1 << graph.producer[o.read.tensor]
                for o in operands
                if o.stride is None and o.read.tensor in graph.producer
            )
            for operands in self.operands
        ]
        self.in_all, self.short = self._count_rows()
        self._tables: dict[tuple[int, Rate], _Table] = {}
        self._paces: dict[int, _Pace] = {}
        self._rates: dict[Fraction, dict[int, Rate]] = {}

    def of(self, mask: int, sinks: int) -> Rows | None:
        """What the sinks of a group ask of its members; ``None``: it has no common rate."""
        if not sinks & (sinks - 1):
            sink = sinks.bit_length() - 1
            table = self._table(sink, 1, mask)
            if table.uneven & mask:
                return None
            return Rows(table.rows, table.rates, table.held, self._heights[sink])
        members = list(bits(mask))
        rows = dict.fromkeys(members, 0)
        pace = self._pace(sinks)
        even = True
        for sink, own in pace.own:
            table = self._table(sink, own, mask)
            if table.uneven & mask:
                return None
            even = even and not table.odd & mask
            _raise_to(rows, table.rows)
        if even:
            return self._priced(rows, pace.rates, pace.lines)
        rates: dict[int, Rate] = {}
        for sink, own in pace.own:
            known = self._table(sink, own, mask).rates
            for i in members:
                rate = known.get(i)
                if rate is not None and rates.setdefault(i, rate) != rate:
                    return None
        return self._priced(rows, rates, pace.lines)

    def _pace(self, sinks: int) -> _Pace:
        """How several sinks go on together, remembered."""
        found = self._paces.get(sinks)
        if found is None:
            common = Fraction(_lcm([self.cumulative[i] for i in bits(sinks)]))
            own = [(sink, _plain(common / self.cumulative[sink])) for sink in bits(sinks)]
            lines = max(math.ceil(self._heights[sink] / Fraction(rate)) for sink, rate in own)
            if common not in self._rates:
                usual = [_plain(common / cumulative) for cumulative in self.cumulative]
                self._rates[common] = dict(enumerate(usual))
            found = _Pace(own, lines, self._rates[common])
            remember(self._paces, sinks, found)
        return found

    def least(self, mask: int, sinks: int) -> Rows:
        """The same if each sink made one row, whatever the rates; no further lines."""
        rows = dict.fromkeys(bits(mask), 0)
        for sink in bits(sinks):
            _raise_to(rows, self._table(sink, 1, mask).rows)
        return self._priced(rows, dict.fromkeys(rows, 0), 0)

    def input_rows(self, operand: Operand, count: int) -> int:
        """``min(H, (count - 1) * t + k)``: rows of an operand that ``count`` rows need."""
        height = self._graph.tensors[operand.read.tensor].rows
        if operand.stride is None:
            return height
        return min(height, math.ceil((count - 1) * operand.stride) + operand.kernel)

    def _priced(self, rows: dict[int, int], rates: Mapping[int, Rate], lines: int) -> Rows:
        held = {}
        row_bytes = self._row_bytes
        for i, count in rows.items():
            both = row_bytes[i]
            if both is not None:
                whole, some = both
                further = math.ceil(rates[i])
                held[i] = count * whole, count * some, further * whole, further * some
        return Rows(rows, rates, held, lines)

    def _price(self, i: int, count: int, rate: Rate) -> Held | None:
        """Bytes of ``count`` rows of an output and of one further tile line."""
        row_bytes = self._row_bytes[i]
        if row_bytes is None:
            return None
        whole, some = row_bytes
        further = math.ceil(rate)
        return count * whole, count * some, further * whole, further * some

    def _table(self, sink: int, rate: Rate, mask: int) -> _Table:
        """What ``sink`` asks when it makes ``rate`` rows at a time, of the members of ``mask``.

        A group is convex, so all paths from a member to a sink lie inside it, and what the sink
        asks of that member is the same in every group that has both.
        """
        table = self._tables.get((sink, rate))
        if table is None:
            common = rate * self.cumulative[sink]
            table = self._tables[sink, rate] = _Table(sink, rate, common)
        lowest = (mask & -mask).bit_length() - 1
        while table.next >= lowest:
            self._climb(table)
        return table

    def _climb(self, table: _Table) -> None:
        """Work out the next operator of a table: it asks of its producers what it needs."""
        i, rows, rates = table.next, table.rows, table.rates
        table.next -= 1
        if i not in rows:
            return
        even = not table.uneven >> i & 1
        price = self._price(i, rows[i], rates[i]) if even else None
        if price is not None:
            table.held[i] = price
        for operand in self.operands[i]:
            above = self._producer.get(operand.read.tensor)
            if above is None:
                continue
            rows[above] = max(rows.get(above, 0), self.input_rows(operand, rows[i]))
            if even and operand.stride is not None:
                wanted = _plain(operand.stride * rates[i])
                if wanted * self.cumulative[above] != table.common:
                    table.odd |= 1 << above
                if rates.setdefault(above, wanted) == wanted:
                    continue
            table.uneven |= 1 << above

    def _count_rows(self) -> tuple[list[int], list[int]]:
        """Two figures per operator that hold whatever group it is in.

        Rows of its output that the sinks need in the end, at least. And by how many rows a tile
        may hold less than its share, at most: a stride beyond the kernel skips rows. All tiles
        of a group, had each so many rows more, hold together at least the former
        (docs/exact-search.md).
        """
        needed = list(self._heights)
        short = [0] * len(needed)
        for c in reversed(range(len(needed))):
            for operand in self.operands[c]:
                above, stride = self._producer.get(operand.read.tensor), operand.stride
                if above is not None and stride is not None:
                    reach = math.floor((needed[c] - 1) * stride) + operand.kernel
                    needed[above] = min(needed[above], reach)
                    skipped = max(0, math.ceil(stride - operand.kernel))
                    short[above] = max(short[above], math.ceil(short[c] * stride) + skipped)
        return needed, list(map(min, short, needed))


def _raise_to(rows: dict[int, int], needed: dict[int, int]) -> None:
    """Raise the rows of members to what one sink needs of them."""
    for i, count in rows.items():
        wanted = needed.get(i, 0)
        if wanted > count:
            rows[i] = wanted


def _operand(graph: OpGraph, read: Read, writes: str) -> Operand:
    window = read.window
    height, tall = graph.tensors[read.tensor].rows, graph.tensors[writes].rows
    reach = window.dilation[0] * (window.kernel[0] - 1)
    if window.everything:
        return Operand(read, height, height)
    if window.kind is WindowKind.RESIZE:
        return Operand(read, 2, _plain(Fraction(height, tall)))
    if window.kind is WindowKind.TRANSPOSED:
        stride = window.stride[0]
        return Operand(read, reach // stride + 1, _plain(Fraction(1, stride)))
    if window.kind is WindowKind.IDENTITY and height == 1 and tall > 1:
        return Operand(read, 1, None)
    return Operand(read, reach + 1, window.stride[0])


def _plain(value: Rate) -> Rate:
    """A whole Fraction as an int."""
    return value if isinstance(value, int) or value.denominator > 1 else value.numerator


def _lcm(values: list[Rate]) -> Rate:
    """Least common multiple of positive rationals."""
    fractions = [Fraction(value) for value in values]
    return _plain(
        Fraction(
            math.lcm(*(value.numerator for value in fractions)),
            math.gcd(*(value.denominator for value in fractions)),
        )
    )
