"""How many units of a tensor its readers hold in the buffer, as a few numbered levels.

While a set is decided block by block (:mod:`group_automaton`), its state need not record which
readers of a tensor it contains, only what later ones can change: the units held so far, and the
readers that hold more together with later ones. Each such pair is a *level*; level 0 is no reader.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
State = tuple[int, frozenset[int]]  # units held, readers that may hold more with later ones

MOST = 15
"""Number of levels in addition to level 0."""

NO_READER: State = (0, frozenset())


class Levels:
    """The levels of one tensor.

    If there are more than :data:`MOST`, the largest widths and the pairs of readers that add least
    are dropped: the result then underestimates the units held, and never overestimates them.

    Args:
        widths: per block that reads the tensor and can be in a group, the units held if it is the
            only reader, at least 1.
        together: units held if all of these blocks are in.

    Attributes:
        units: units held, per level.
        lowest: the level with the fewest units, none of which grow with later readers.
    """

    def __init__(self, widths: Mapping[int, int], together: Mapping[frozenset[int], int]) -> None:
        values = sorted(set(widths.values()))[:MOST] or [1]
        self._widths = {b: max(v for v in values if v <= width) for b, width in widths.items()}
        gains = {
            blocks: units - max(self._widths[b] for b in blocks)
            for blocks, units in together.items()
        }
        self._together: dict[frozenset[int], int] = {}
        self._states = self._possible()
        for blocks in sorted(gains, key=lambda blocks: (-gains[blocks], sorted(blocks))):
            if gains[blocks] > 0:
                self._together[blocks] = together[blocks]
                states = self._possible()
                if len(states) <= MOST + 1:
                    self._states = states
                else:
                    del self._together[blocks]
        self._number = {state: k for k, state in enumerate(self._states)}
        self.units: Ints = np.array([units for units, _ in self._states], np.int64)
        self.lowest = min(
            (k for k, (_, blocks) in enumerate(self._states) if k and not blocks),
            key=lambda k: self._states[k][0],
        )

    def _possible(self) -> list[State]:
        values = sorted({*self._widths.values(), *self._together.values()}) or [1]
        subsets = {frozenset[int]()}
        for block in sorted(frozenset[int]().union(*self._together)):
            subsets |= {blocks | {block} for blocks in subsets}
        possible = [NO_READER]
        for blocks in sorted(subsets, key=sorted):
            least = self._held(0, blocks)
            states = ((units, blocks) for units in values if units >= least)
            possible += [state for state in states if self._waiting(*state) == blocks]
        return possible

    def _held(self, units: int, blocks: frozenset[int]) -> int:
        """Units held by these blocks and others that hold ``units``."""
        alone = (self._widths[block] for block in blocks)
        joint = (more for all_, more in self._together.items() if all_ <= blocks)
        return max((units, *alone, *joint))

    def _waiting(
        self, units: int, blocks: frozenset[int], left: Collection[int] | None = None
    ) -> frozenset[int]:
        """The blocks that hold more than ``units`` with some of ``left`` (default: any others)."""
        return frozenset[int]().union(
            *(
                all_ & blocks
                for all_, more in self._together.items()
                if more > units and all_ - blocks and (left is None or all_ - blocks <= set(left))
            )
        )

    def joined(self, block: int) -> Ints:
        """Per level, the level after ``block`` joins; the same level if it is not a reader."""
        if block not in self._widths:
            return np.arange(len(self._states))
        levels = []
        for before, blocks in self._states:
            blocks |= {block}
            units = self._held(before, blocks)
            levels.append(self._number[units, self._waiting(units, blocks)])
        return np.array(levels)

    def seen(self, left: Collection[int]) -> Ints:
        """Per level, the representative of the levels that are equivalent for blocks of ``left``.

        Whether there is a reader at all makes a difference unless ``left`` is empty.
        """
        values = sorted({units for units, _ in self._states if units})
        alone = max((self._widths.get(block, 0) for block in left), default=0)
        levels = []
        for units, blocks in self._states:
            waiting = self._waiting(units, blocks, left)
            joint = (
                more
                for all_, more in self._together.items()
                if all_ & set(left) and all_ - blocks <= set(left)
            )
            most = max(alone, *joint, 1)
            if units > most:
                units = min(value for value in values if value >= most)
            levels.append(self._number[units, waiting] if left else 0)
        return np.array(levels)
