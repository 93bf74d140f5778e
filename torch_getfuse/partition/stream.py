"""Windows over streams of units: how far ahead a consumer reads, and what it lets go.

An :class:`Edge` answers three questions about one operand, in counts of units and in constant
time, whatever the size of the map: how many input units the first ``n`` output units need,
how many are no longer needed once ``n`` are written, and after how many output units an input
unit is first demanded. LBDF's schedule (method.md section 3) is built from these alone, so the
two granularities differ only here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

from torch_getfuse.ir import OpGraph, Read, Window, WindowKind


@dataclass(frozen=True, slots=True)
class AxisMap:
    """A window along one axis: output ``r`` needs ``floor((a*r + low)/c)`` to
    ``max(least, floor((a*r + high)/c))``, clipped to the input.

    Every window of the IR has this form: a sliding window has ``c = 1``, a transposed one
    ``a = 1``, a resize ``a/c`` = the inverse of its scale, a window that needs everything
    ``a = 0``. Output positions before ``start`` and after ``last`` see nothing but padding.
    """

    size_in: int
    size_out: int
    a: int
    c: int
    low: int
    high: int
    least: int = -1
    start: int = field(init=False, compare=False)
    last: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        start, last = 0, self.size_out - 1
        if self.a:
            if self.least < 0:
                start = max(0, -(self.high // self.a))
            last = min(last, (self.size_in * self.c - 1 - self.low) // self.a)
        # A transposed window narrower than its stride leaves positions that see nothing.
        while start <= last and self._empty(start):
            start += 1
        while start <= last and self._empty(last):
            last -= 1
        if start > last:
            start, last = self.size_out, -1
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "last", last)

    def _empty(self, position: int) -> bool:
        high = max((self.a * position + self.high) // self.c, self.least)
        return high < (self.a * position + self.low) // self.c

    def lowest(self, position: int) -> int:
        """First input position needed by ``position`` or any later one; ``size_in`` for none."""
        if position > self.last:
            return self.size_in
        found = (self.a * max(position, self.start) + self.low) // self.c
        return max(found, 0)

    def highest(self, position: int) -> int:
        """Last input position needed up to and including ``position``; -1 for none."""
        if position < self.start:
            return -1
        found = max((self.a * min(position, self.last) + self.high) // self.c, self.least)
        return min(found, self.size_in - 1)

    def first(self, wanted: int) -> int | None:
        """First output position that needs an input position >= ``wanted``; ``None``: never."""
        if wanted >= self.size_in:
            return None
        if not self.a or self.least >= wanted:
            return 0
        found = max(-((self.high - wanted * self.c) // self.a), self.start)
        return found if found <= self.last else None

    @property
    def period(self) -> int:
        """Output positions after which the window has moved by whole input positions."""
        return self.c // math.gcd(self.a, self.c) if self.a else 1

    @property
    def reach(self) -> float:
        """How far from ``a*r/c`` the window's ends lie, in input positions."""
        if self.a == self.c and not self.low and not self.high:
            return 0.0
        return (max(abs(self.low), abs(self.high)) + self.a) / self.c


def axis_map(window: Window, axis: int, size_in: int, size_out: int) -> AxisMap:
    """The :class:`AxisMap` of a window along rows (axis 0) or columns (axis 1)."""
    kind = window.kind
    if kind is WindowKind.IDENTITY:
        step = int(size_in > 1)
        return AxisMap(size_in, size_out, step, 1, 0, 0)
    if kind is WindowKind.SLIDING:
        pad, reach = window.padding[axis], window.dilation[axis] * (window.kernel[axis] - 1)
        return AxisMap(size_in, size_out, window.stride[axis], 1, -pad, reach - pad)
    if kind is WindowKind.TRANSPOSED:
        stride, pad = window.stride[axis], window.padding[axis]
        reach = window.dilation[axis] * (window.kernel[axis] - 1)
        return AxisMap(size_in, size_out, 1, stride, pad - reach + stride - 1, pad)
    if kind is WindowKind.RESIZE:
        # The neighbour after a position clipped at the top border is position 1.
        start = size_in - size_out
        high = start + 2 * size_out
        return AxisMap(size_in, size_out, 2 * size_in, 2 * size_out, start, high, least=1)
    return AxisMap(size_in, size_out, 0, 1, 0, size_in - 1)


def sample_positions(size: int, margin: int, period: int) -> list[int]:
    """Positions that stand for all: both borders, and one period in the middle.

    Between the margins nothing is clipped and everything repeats with the period, so the
    middle's maximum is the maximum over one period of it.
    """
    if 2 * margin + period >= size:
        return list(range(size))
    return [*range(margin + period), *range(size - margin, size)]


class Edge:
    """One operand of one operator as a map between unit counts, at one granularity.

    Attributes:
        units_in, units_out: lengths of the two streams.
        holds: ``False`` for a reduction, which takes in each unit as it arrives.
        rows, cols: the axis maps; ``cols`` is ``None`` where a unit is a row.
    """

    __slots__ = ("_cols_in", "_cols_out", "cols", "holds", "rows", "units_in", "units_out")

    def __init__(self, rows: AxisMap, cols: AxisMap | None, holds: bool) -> None:
        self.rows = rows
        self.cols = cols
        self.holds = holds
        self._cols_in = cols.size_in if cols else 1
        self._cols_out = cols.size_out if cols else 1
        self.units_in = rows.size_in * self._cols_in
        self.units_out = rows.size_out * self._cols_out

    def needed(self, count: int) -> int:
        """Input units that the first ``count`` output units need, from the first one on."""
        if count <= 0:
            return 0
        if self.cols is None:
            return self.rows.highest(count - 1) + 1
        row, col = divmod(count - 1, self._cols_out)
        found = self._raster(row, col)
        # A row's last window can reach further than the first ones of the row below.
        return max(found, self._raster(row - 1, self._cols_out - 1)) if row else found

    def _raster(self, row: int, col: int) -> int:
        assert self.cols is not None
        high, right = self.rows.highest(row), self.cols.highest(col)
        return 0 if high < 0 or right < 0 else high * self._cols_in + right + 1

    def released(self, count: int) -> int:
        """Input units that no output unit from ``count`` on needs, nor any before them."""
        if count >= self.units_out:
            return self.units_in
        if self.cols is None:
            return self.rows.lowest(count)
        row, col = divmod(count, self._cols_out)
        found = self.units_in
        if self.rows.start <= row <= self.rows.last and col <= self.cols.last:
            found = self.rows.lowest(row) * self._cols_in + self.cols.lowest(col)
        below = max(row + 1, self.rows.start)
        if below <= self.rows.last and self.cols.last >= 0:
            # The next row starts again at the left: at the top border that is further back.
            left = self.rows.lowest(below) * self._cols_in + self.cols.lowest(0)
            found = min(found, left)
        return found

    def first(self, count: int) -> int | None:
        """Fewest output units that need ``count`` (>= 1) input units; ``None`` for never."""
        if self.cols is None:
            row = self.rows.first(count - 1)
            return None if row is None else row + 1
        high, right = divmod(count - 1, self._cols_in)
        row, start = self.rows.first(high), self.cols.first(0)
        if row is None or start is None:
            return None
        if self.rows.highest(row) == high:
            col = self.cols.first(right)
            if col is not None:
                return row * self._cols_out + col + 1
            row = self.rows.first(high + 1)
            if row is None:
                return None
        return row * self._cols_out + start + 1

    def widest(self, final: int) -> int:
        """Peak of live input units if this were the only consumer and wrote ``final`` units."""
        if not self.holds:
            return 1
        return _widest(self.rows, self.cols, final)


@lru_cache(maxsize=65536)
def _widest(rows: AxisMap, cols: AxisMap | None, final: int) -> int:
    edge = Edge(rows, cols, True)
    margin = _margin(rows)
    row_set = sample_positions(rows.size_out, margin, rows.period)
    if cols is None:
        counts = row_set
    else:
        col_set = sample_positions(cols.size_out, _margin(cols), cols.period)
        counts = [row * cols.size_out + col for row in row_set for col in col_set]
    return max((edge.needed(n + 1) - edge.released(n) for n in counts if n < final), default=0)


def _margin(axis: AxisMap) -> int:
    """Output positions at a border whose windows may be clipped."""
    return 1 if not axis.a else int(axis.reach * axis.c / axis.a) + 2


def make_edge(graph: OpGraph, read: Read, writes: str, pixel: bool) -> Edge:
    """The edge of one operand at ``line`` or ``pixel`` granularity."""
    source, target = graph.tensors[read.tensor], graph.tensors[writes]
    rows = axis_map(read.window, 0, source.rows, target.rows)
    cols = axis_map(read.window, 1, source.cols, target.cols) if pixel else None
    return Edge(rows, cols, read.window.kind is not WindowKind.REDUCE)
