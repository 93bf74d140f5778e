"""Prices that only legal groups must not undercut.

The sets of the automaton include some that are too large for the buffer, for their floor is less
than what they hold; and the best prices that none of them undercuts prove up to some per cent less
than the best that no legal group does. From the former to the latter few sets undercut the prices
on the way: they are listed (:mod:`near_sets`), and those that are not legal do not count.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from torch_getfuse.partition.wide.group_columns import Columns
from torch_getfuse.partition.wide.near_sets import NONE, NearSets, is_legal, near_sets
from torch_getfuse.partition.wide.relaxation import MOST, Pricing, Undercutting, proved_by

Ints = npt.NDArray[np.int64]

LABELS = 100_000  # for the sets that undercut prices by more than what is known to be legal
PARTS = 1, 2, 4  # of the distance that they are sought in, if they are too many
KEPT = 3  # legal groups per first block, of those


class LegalPricing:
    """An oracle that asks of each set that undercuts the prices whether it is legal.

    Args:
        columns: columns of the problem.
        pricing: the oracle of its automaton.

    Attributes:
        place: see :class:`.Oracle`.
    """

    def __init__(self, columns: Columns, pricing: Pricing) -> None:
        self.columns = columns
        self.pricing = pricing
        self.place = pricing.place
        self._block = np.argsort(pricing.place)
        self._proved = -MOST  # by the best prices, in 1/FINE bytes

    def run(self, prices: Ints) -> tuple[Ints, list[Undercutting]]:
        """The least ``F_D - prices`` of legal groups per first block, and some that undercut.

        Where too many sets undercut the prices by more than any group that is known to be legal, or
        the prices can prove no more than others before, what is known of these: the result is a
        bound, if not the least. In the former case the sets that it comes from are found as well,
        legal or not.

        Raises:
            OutOfWork: at a limit.
        """
        lowest, found = self.pricing.run(prices)
        undercut: dict[int, Undercutting] = {}
        others: dict[int, Undercutting] = {}
        least = np.zeros(len(prices), np.int64)  # of what is known to be legal
        for each in found:
            if not is_legal(self.columns.problem, each.mask):
                others[each.mask] = each
            elif (group := self._as_group(each)).reduced < 0:
                undercut[each.mask] = group
                least[each.home] = min(least[each.home], group.reduced)
        asked = lowest < least
        # Prices that prove no more than others, even if no other set is legal, are asked nothing.
        if asked.any() and proved_by(prices, least) >= self._proved:
            for parts in PARTS:
                # What lies nearer to the lowest is more often too large.
                reach = np.where(asked, lowest + (least - lowest) // parts - 1, NONE)
                near = near_sets(self.columns, self.pricing, prices, reach, LABELS)
                if near is not None:
                    for each in self._cheapest(near, prices):
                        if each.reduced < 0:
                            undercut[each.mask] = each
                            least[each.home] = min(least[each.home], each.reduced)
                    lowest = np.where(asked, np.minimum(least, reach + 1), least)
                    break
            else:
                undercut |= others
        self._proved = max(self._proved, proved_by(prices, lowest))
        return lowest, [*undercut.values()]

    def _as_group(self, each: Undercutting) -> Undercutting:
        """A legal set at what it costs as a group."""
        problem = self.columns.problem
        return each.priced(problem.evaluator.dram(each.mask)) if problem.rereads else each

    def _cheapest(self, near: NearSets, prices: Ints) -> Iterator[Undercutting]:
        """Of each first block the legal groups of least reduced cost."""
        if not len(near):
            return
        reduced = near.reduced(np.arange(len(near)), prices)
        starts = near.rows.indptr[:-1]
        homes = self._block[np.minimum.reduceat(self.place[near.rows.indices], starts)].tolist()
        found: dict[int, list[int]] = {}  # per first block, reduced costs, the least first
        for k in np.argsort(reduced, kind="stable").tolist():
            home = homes[k]
            known = found.setdefault(home, [])
            if len(known) < KEPT or int(reduced[k]) < known[KEPT - 1]:
                each = Undercutting(home, int(reduced[k]), near.mask(k), int(near.costs[k]))
                if is_legal(self.columns.problem, each.mask):
                    group = self._as_group(each)
                    insort(known, group.reduced)
                    yield group
