"""Rows that blocks hold in a tile, at least, of many sets at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from torch_getfuse.partition.wide.tile_blocks import MOST_RATE, TileBlock
from torch_getfuse.partition.wide.tile_sets import ALIKE, Ints, TileSets


class Rates:
    """Rates of blocks as numbers, and the rows that they mean.

    Args:
        strides: the cumulative strides of all blocks.

    Attributes:
        strides: their numbers.
        paces: rates over what the cumulative stride says, and their numbers. 0 stands for none.
    """

    def __init__(self, strides: Iterable[Fraction]) -> None:
        self.strides = {stride: k for k, stride in enumerate(dict.fromkeys(strides))}
        self.paces: dict[Fraction, int] = {Fraction(0): 0, Fraction(1): 1}
        self._per_line: dict[tuple[int, Fraction], Ints] = {}

    def through(self, rate: Fraction | None, pace: Ints) -> Ints:
        """The numbers of the paces that a reading asks for; -1: it has no rate."""
        if rate is None:
            return np.full(len(pace), -1, np.int64)
        paces = list(self.paces)
        found = np.zeros(len(paces), np.int64)
        for k in np.flatnonzero(np.bincount(pace, minlength=1)).tolist():
            found[k] = self.paces.setdefault(paces[k] * rate, len(self.paces))
        return found[pace]

    def per_line(self, block: TileBlock, stride: Fraction, common: Ints, pace: Ints) -> Ints:
        """Rows of one further tile line, at a stride, in sets whose sinks are alike.

        ``common``: numbers of the sinks' strides; ``pace``: of the block's paces.
        """
        key = self.strides[block.cumulative], stride
        shape = len(self.strides), len(self.paces)
        known = self._per_line.get(key, np.zeros((shape[0], 0), np.int64))
        if known.shape != shape:
            more = ((0, 0), (0, shape[1] - known.shape[1]))
            known = self._per_line[key] = np.pad(known, more, constant_values=-1)
        rows: npt.NDArray[np.int64] = known[common, pace]
        if (rows < 0).any():
            strides, paces = list(self.strides), list(self.paces)
            wanted = np.zeros(shape, bool)
            wanted[common, pace] = True
            for k, at in zip(*np.nonzero(wanted & (known < 0)), strict=True):
                rate = strides[k] / block.cumulative * paces[at] * stride
                known[k, at] = min(MOST_RATE, math.ceil(rate))
            rows = known[common, pace]
        return rows


class Tile:
    """Rows that a block holds in a tile, at least, per set.

    Each tensor has a share of the rows that sinks need in the end; and where sinks are alike, a
    tile has a share of their lines.

    Args:
        rates: of the problem.
        block: the block, which joins.
        sets: the sets with it.
        pace: numbers of its paces in them.
        most: passes at most; 0 for any number.
        limit: a set that holds as much, in bytes, does not fit.
    """

    def __init__(
        self, rates: Rates, block: TileBlock, sets: TileSets, pace: Ints, most: Ints, limit: int
    ) -> None:
        self.rates, self.block, self.pace, self.limit = rates, block, pace, limit
        self.parts = np.maximum(most, 1)
        self.shared = most > 0
        alike = (sets.differ == ALIKE) & self.shared
        self.further = np.where(alike, -(-sets.lines // self.parts) - 1, 0)
        self.common = sets.common

    def held(self, row: int, least: Ints, stride: Fraction, needed: int, short: int) -> Ints:
        """Bytes held of what ``least`` rows are asked of for one line, at a stride per line.

        ``row``: bytes of one; ``needed``, ``short``: see :class:`.TileBlock`. More than what fits
        may be less than it is, so that nothing overflows.
        """
        rows = np.maximum(least, np.where(self.shared, -(-needed // self.parts) - short, 0))
        if self.further.any():
            per_line = self.rates.per_line(self.block, stride, self.common, self.pace)
            most = self.limit // np.maximum(self.further, 1) + 1
            rows = np.maximum(rows, least + self.further * np.minimum(per_line, most))
        held: Ints = row * np.minimum(rows, self.limit // max(row, 1) + 1)
        return held
