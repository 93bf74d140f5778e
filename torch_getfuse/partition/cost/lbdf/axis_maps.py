"""Windows over streams of units: how far ahead a consumer reads, and what it releases.

An :class:`Edge` answers three questions about one operand, in counts of units and in time that
does not depend on the size of the map: how many input units the first ``n`` output units need, how
many are no longer needed once ``n`` are written, and after how many output units an input unit is
first demanded. LBDF's schedule (docs/method.md, section 3) uses nothing else, so the two
granularities differ only here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from torch_getfuse.ir import OpGraph, Read, Window, WindowKind

Counts = NDArray[np.int64]
NEVER = 1 << 60  # more units than any stream has


@dataclass(frozen=True, slots=True)
class AxisMap:
    """A window along one axis: output ``r`` needs ``floor((a*r + low)/c)`` to
    ``max(least, floor((a*r + high)/c))``, clipped to the input.

    Every window of the IR has this form: a sliding window has ``c = 1``, a transposed one
    ``a = 1``, a resize ``a/c`` = the inverse of its scale, a window that needs everything
    ``a = 0``. Output positions before ``start`` and after ``last`` read only padding.
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
        # A transposed window narrower than its stride leaves positions that read no input.
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
        """First input position needed by ``position`` or a later one; ``size_in`` if none is."""
        if position > self.last:
            return self.size_in
        low = (self.a * max(position, self.start) + self.low) // self.c
        return max(low, 0)

    def highest(self, position: int) -> int:
        """Last input position needed up to and including ``position``; -1 if none is."""
        if position < self.start:
            return -1
        high = max((self.a * min(position, self.last) + self.high) // self.c, self.least)
        return min(high, self.size_in - 1)

    def lowest_all(self, positions: Counts) -> Counts:
        """:meth:`lowest` of many positions."""
        low = np.maximum(positions, self.start) * self.a + self.low
        low = np.maximum(low if self.c == 1 else low // self.c, 0)
        return np.where(positions > self.last, self.size_in, low)

    def highest_all(self, positions: Counts) -> Counts:
        """:meth:`highest` of many positions."""
        high = np.minimum(positions, self.last) * self.a + self.high
        high = np.maximum(high if self.c == 1 else high // self.c, self.least)
        return np.where(positions < self.start, -1, np.minimum(high, self.size_in - 1))

    def first_all(self, inputs: Counts) -> Counts:
        """Per input, the first output position that needs it or a later one, or ``NEVER``."""
        if not self.a:
            return np.where(inputs >= self.size_in, NEVER, 0)
        inputs = np.minimum(inputs, self.size_in)
        first = np.maximum(-((self.high - inputs * self.c) // self.a), self.start)
        first = np.where(self.least >= inputs, 0, first)
        return np.where((first > self.last) | (inputs >= self.size_in), NEVER, first)

    @property
    def period(self) -> int:
        """Output positions after which the window has moved by whole input positions."""
        return self.c // math.gcd(self.a, self.c) if self.a else 1

    @property
    def reach(self) -> float:
        """Largest distance of a window's end from ``a*r/c``, with rounding, in input positions."""
        exact = self.a == self.c == 1 or (self.a == self.c and not self.low | self.high)
        rounding = 0 if exact else self.a
        return (max(abs(self.low), abs(self.high)) + rounding) / self.c


def _numbers(axis: AxisMap | None) -> tuple[int, ...]:
    """What makes an axis map."""
    if axis is None:
        return ()
    return axis.size_in, axis.size_out, axis.a, axis.c, axis.low, axis.high, axis.least


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
    """Positions that represent all: both borders, and one period in the middle.

    Between the margins nothing is clipped and everything repeats with the period, so the maximum
    over the middle is the maximum over one period.
    """
    if 2 * margin + period >= size:
        return list(range(size))
    return [*range(margin + period), *range(size - margin, size)]


class Edge:
    """One operand of one operator as a map between unit counts, at one granularity.

    Attributes:
        units_in, units_out: lengths of the two streams.
        holds: ``False`` for a reduction, which consumes each unit as it arrives.
        rows, cols: the axis maps; ``cols`` is ``None`` if a unit is a row.
        transparent: unit ``r`` needs exactly unit ``r`` (demand passes through unchanged; the
            units held may differ).
        expands: ``n`` units need at least ``n``.
        takes_all: the first unit needs every input unit.
        rank: numbers that tell it from other edges and :class:`Step`, for an order of them.
    """

    __slots__ = (
        "_cols_in",
        "_cols_out",
        "_widest",
        "cols",
        "expands",
        "holds",
        "rank",
        "rows",
        "takes_all",
        "transparent",
        "units_in",
        "units_out",
    )

    def __init__(self, rows: AxisMap, cols: AxisMap | None, holds: bool) -> None:
        self.rows = rows
        self.cols = cols
        self.holds = holds
        self.rank = 0, holds, _numbers(rows), _numbers(cols)
        self._cols_in = cols.size_in if cols else 1
        self._cols_out = cols.size_out if cols else 1
        self._widest: dict[int, int] = {}
        self.units_in = rows.size_in * self._cols_in
        self.units_out = rows.size_out * self._cols_out
        axes = [axis for axis in (rows, cols) if axis is not None]
        same = self.units_in == self.units_out and all(a.size_in == a.size_out for a in axes)
        self.transparent = same and all(
            (a.a == a.c and not a.low | a.high) or (a.size_in == 1 and a.highest(0) == 0)
            for a in axes
        )
        self.expands = same and all(a.a == a.c and a.high >= 0 and not a.start for a in axes)
        self.takes_all = not any(a.a for a in axes)

    def needed(self, count: int) -> int:
        """Length of the prefix of input units that the first ``count`` output units need."""
        if count <= 0:
            return 0
        if self.cols is None:
            return self.rows.highest(count - 1) + 1
        row, col = divmod(count - 1, self._cols_out)
        units = self._raster(row, col)
        # The last window of a row can reach further than the first ones of the next row.
        return max(units, self._raster(row - 1, self._cols_out - 1)) if row else units

    def _raster(self, row: int, col: int) -> int:
        assert self.cols is not None
        high, right = self.rows.highest(row), self.cols.highest(col)
        return 0 if high < 0 or right < 0 else high * self._cols_in + right + 1

    def released(self, count: int) -> int:
        """Length of the prefix of input units that no output unit from ``count`` on needs."""
        if count >= self.units_out:
            return self.units_in
        if self.cols is None:
            return self.rows.lowest(count)
        row, col = divmod(count, self._cols_out)
        units = self.units_in
        if self.rows.start <= row <= self.rows.last and col <= self.cols.last:
            units = self.rows.lowest(row) * self._cols_in + self.cols.lowest(col)
        below = max(row + 1, self.rows.start)
        if below <= self.rows.last and self.cols.last >= 0:
            # The next row starts again at column 0: at the top border that is further back.
            left = self.rows.lowest(below) * self._cols_in + self.cols.lowest(0)
            units = min(units, left)
        return units

    # Vectorised forms: a region evaluates all its sampled positions at once.

    def needed_all(self, counts: Counts) -> Counts:
        """:meth:`needed` of many counts."""
        if self.cols is None:
            units = self.rows.highest_all(counts - 1) + 1
        else:
            row, col = np.divmod(counts - 1, self._cols_out)
            units = self._raster_all(row, col)
            wide = self.cols.highest(self._cols_out - 1)
            if wide >= 0:
                above = self.rows.highest_all(row - 1)
                above = np.where(above < 0, 0, above * self._cols_in + wide + 1)
                units = np.maximum(units, np.where(row > 0, above, 0))
        return np.where(counts <= 0, 0, units)

    def _raster_all(self, row: Counts, col: Counts) -> Counts:
        assert self.cols is not None
        high, right = self.rows.highest_all(row), self.cols.highest_all(col)
        return np.where((high < 0) | (right < 0), 0, high * self._cols_in + right + 1)

    def released_all(self, counts: Counts) -> Counts:
        """:meth:`released` of many counts."""
        if self.cols is None:
            units = self.rows.lowest_all(counts)
        else:
            rows, cols = self.rows, self.cols
            row, col = np.divmod(counts, self._cols_out)
            here = (rows.start <= row) & (row <= rows.last) & (col <= cols.last)
            units = rows.lowest_all(row) * self._cols_in + cols.lowest_all(col)
            units = np.where(here, units, self.units_in)
            below = np.maximum(row + 1, rows.start)
            if cols.last >= 0:
                # As in :meth:`released`: the next row starts again at column 0.
                left = rows.lowest_all(below) * self._cols_in + cols.lowest(0)
                units = np.where(below <= rows.last, np.minimum(units, left), units)
        return np.where(counts >= self.units_out, self.units_in, units)

    def first_all(self, counts: Counts) -> Counts:
        """Fewest output units that need ``counts`` (>= 1) input units; ``NEVER`` if none do."""
        if self.cols is None:
            first = self.rows.first_all(counts - 1)
            return np.where(first == NEVER, NEVER, first + 1)
        high, right = np.divmod(np.minimum(counts, self.units_in + 1) - 1, self._cols_in)
        start = int(self.cols.first_all(np.zeros(1, np.int64))[0])
        if start == NEVER:
            return np.full_like(counts, NEVER)
        row = self.rows.first_all(high)
        col = self.cols.first_all(right)
        exact = (row != NEVER) & (self.rows.highest_all(np.minimum(row, self.rows.last)) == high)
        # If the first row that needs this input row never needs the column, a later one does.
        later = exact & (col == NEVER)
        row = np.where(later, self.rows.first_all(high + 1), row)
        col = np.where(exact & ~later, col, start)
        return np.where(row == NEVER, NEVER, row * self._cols_out + col + 1)

    def widest(self, final: int) -> int:
        """Peak of live input units if this were the only consumer and wrote ``final`` units."""
        if not self.holds:
            return 1
        units = self._widest.get(final)
        if units is None:
            units = self._widest[final] = self._compute_widest(final)
        return units

    def _compute_widest(self, final: int) -> int:
        rows, cols = self.rows, self.cols
        counts = np.array(sample_positions(rows.size_out, _margin(rows), rows.period))
        if cols is not None:
            columns = np.array(sample_positions(cols.size_out, _margin(cols), cols.period))
            grid = (counts[:, None] * cols.size_out + columns).ravel()
            # If the last unit is inside a row, the number held may grow up to it.
            counts = np.concatenate([grid, np.arange(max(0, final - len(columns)), final)])
        counts = counts[counts < final]
        held = self.needed_all(counts + 1) - self.released_all(counts)
        return int(held.max()) if held.size else 0


def _margin(axis: AxisMap) -> int:
    """Output positions at a border whose windows may be clipped."""
    return 1 if not axis.a else int(axis.reach * axis.c / axis.a) + 2


def make_edge(graph: OpGraph, read: Read, writes: str, pixel: bool) -> Edge:
    """The edge of one operand at ``line`` or ``pixel`` granularity."""
    source, target = graph.tensors[read.tensor], graph.tensors[writes]
    rows = axis_map(read.window, 0, source.rows, target.rows)
    cols = axis_map(read.window, 1, source.cols, target.cols) if pixel else None
    return Edge(rows, cols, read.window.kind is not WindowKind.REDUCE)
