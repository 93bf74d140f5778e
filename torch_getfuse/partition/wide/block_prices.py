"""Prices of blocks that prove a lower bound: cutting planes in a box, from coarse to fine prices.

Every legal plan covers each block of operators by exactly one connected, convex, valid group, so

    min sum F_D(S) x_S   with   sum over S containing b of x_S = 1 for every block b,   x >= 0

is a relaxation of the planning problem: it drops integrality and the rule that the groups must not
depend on each other in a cycle. The duals of its rows are prices of blocks. An *oracle* finds the
sets that undercut them (negative reduced cost); these become columns, until there are none.

The prices of such a program oscillate, because it has too few columns. So prices are kept in a box
around the best so far; the box grows where they prove what the program predicted, and shrinks
where they prove less than the best. At first blocks with equal surroundings share one price; the
classes are then refined, down to single blocks. The solver is never trusted: the prices that it
returns are rounded to integers, and the bound that they prove is computed here
(``docs/exact-search.md`` section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix, hstack, identity

from torch_getfuse.partition.problem import SearchResult
from torch_getfuse.partition.wide.group_columns import Columns, minimum
from torch_getfuse.partition.wide.relaxation import FINE, MOST, Undercutting, proved_by
from torch_getfuse.partition.work import OutOfWork

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BOX, FINER, WIDEST = 0.1, 0.03, 1.0  # half width: initial, with finer classes, maximum
NARROWEST = 1e-4  # half width below which the box is given up
PROMISE = 0.3  # share of the predicted gain that must be proved for the box to grow
CLOSE = 0.0005  # if the predicted gain is a smaller share of the value, finer classes take over
CLOSER = 0.0001  # the same with single blocks: then the box grows
STALLED = 1 / 3, 1 / 50  # a share of the work, and what share of the gap it must close at least
FEWEST = 8  # prices to try before that is asked
NO_BETTER = "no better prices found"
COLUMNS = 1_500, 3  # columns of a program: a constant, plus so many per row


class Oracle(Protocol):
    """Finds groups that undercut prices."""

    @property
    def place(self) -> Ints:
        """A number per block; each group is assigned to its block with the least number."""
        ...

    def run(self, prices: Ints) -> tuple[Ints, list[Undercutting]]:
        """Per block ``m <= 0``, in 1/:data:`FINE` bytes, and sets that undercut the prices.

        ``F_D - prices`` of each legal group is at least ``m`` of the block it is assigned to.

        Raises:
            OutOfWork: if a limit on work is reached.
        """
        ...


@dataclass(frozen=True)
class Proof:
    """Result of the ascent.

    Attributes:
        bound: lower bound of the DRAM access of any legal plan, in bytes.
        sets: masks seen; some of them are legal groups.
        prices: per block, in 1/:data:`FINE` bytes; those that prove the bound.
        lowered: the same, lowered until no legal group undercuts them; they prove as much.
        stopped: why the ascent ended early; ``""`` if no better prices exist for this oracle, to
            about a byte.
    """

    bound: int
    sets: tuple[int, ...]
    prices: Ints
    lowered: Ints
    stopped: str


def prove(
    columns: Columns,
    oracle: Oracle,
    known: SearchResult,
    classes: Sequence[Ints] = (),
    start: Proof | None = None,
    box: float = BOX,
    enough: Callable[[int], bool] = lambda bound: False,
) -> Proof:
    """Raise the lower bound up to the linear program, the known plan, or a limit on work.

    Args:
        columns: columns of the problem whose blocks are priced.
        oracle: finds sets that undercut the prices.
        known: a legal plan; its groups join the program.
        classes: per block its class, from coarse to fine; single blocks follow them.
        start: initial bound, prices and sets; what is added to the prices is shared within each
            class. By default each block's price is the size of its weights, and is itself shared.
        box: initial half width of the box, as a share of what each block would cost alone.
        enough: whether to end at a bound, in bytes.
    """
    singles = np.arange(len(columns.problem.blocks))
    return _Ascent(columns, oracle, known, start, enough).run([*classes, singles], box)


class _Ascent:
    """The state of one proof: sets seen, best prices, the bound that they prove."""

    def __init__(
        self,
        columns: Columns,
        oracle: Oracle,
        known: SearchResult,
        start: Proof | None,
        enough: Callable[[int], bool],
    ) -> None:
        problem = columns.problem
        self.columns = columns
        self.oracle = oracle
        self.known = known
        self.enough = enough
        self.work = problem.evaluator.work
        self.single = frozenset(problem.blocks)
        self.alone = columns.costs(problem.blocks)
        sets = (*known.groups, *(start.sets if start else ()))
        self.seen = dict.fromkeys(group for group in sets if group not in self.single)
        self.active: list[int] = []  # columns of the program; single blocks are in it as bounds
        self.bound = start.bound if start else problem.unavoidable
        self.prices = start.prices if start else FINE * columns.weights
        self.lowered = start.lowered if start else self.prices
        # Bytes to which what a class shares is added: blocks that are alike need not cost the same.
        self.base = start.prices / FINE if start else np.zeros(len(problem.blocks))
        self.level = -(1 << 62)  # what the prices prove, in 1/FINE bytes
        self.tried: list[tuple[int, int]] = []  # per prices tried, the work done and the bound

    def run(self, classes: Sequence[Ints], box: float) -> Proof:
        stopped = NO_BETTER
        try:
            self._try(self.prices)
            for number, home in enumerate(classes):
                if self._climb(home, box, number == len(classes) - 1):
                    stopped = ""
                    break
                box = min(box, FINER)
        except OutOfWork as limit:
            stopped = str(limit)
        return Proof(self.bound, tuple(self.seen), self.prices, self.lowered, stopped)

    def _climb(self, home: Ints, box: float, last: bool) -> bool:
        """Improve prices shared within each class; whether the ascent is finished after that."""
        rows = csr_matrix((np.ones(len(home)), (home, np.arange(len(home)))))
        sizes = np.asarray(rows.sum(axis=1)).ravel()
        alone = rows @ self.alone / sizes
        best = rows @ (self.prices / FINE - self.base) / sizes
        # No price above a block's own F_D proves more: the block itself would undercut it.
        highest = np.full(len(sizes), np.inf)
        np.minimum.at(highest, home, self.alone - self.base)
        self._choose(rows)
        if self.columns.problem.rereads:  # then prices move little while classes are coarse
            del self.tried[:-1]
        widest = WIDEST
        while self.bound < self.known.dram_bytes:
            if self._stalled() or self.enough(self.bound):
                return False
            low = best - box * alone
            high = np.maximum(low, np.minimum(best + box * alone, highest))
            solution = self._program(rows, sizes, low, high)
            if solution is None:
                return False
            value, trial, reduced = solution
            before = self.level
            promised = value - before / FINE
            if promised < (CLOSER if last else CLOSE) * value:
                if not last:
                    return False
                slack = 1e-6 * alone
                at_end = (trial < low + slack) | (trial > high - slack) & (high < highest)
                if box < widest and at_end.any():
                    box = min(widest, 2 * box)
                    continue
                if promised < 0.5:
                    return True
            undercut, cheaper = self._try(
                np.floor((self.base + trial[home]) * FINE).astype(np.int64)
            )
            gained = (self.level - before) / FINE
            if gained > 0:
                best, widest = trial, WIDEST
                if gained > PROMISE * promised:
                    box = min(widest, 1.5 * box)
            else:
                box = widest = box / 2
            if not self._renew(reduced, undercut, len(sizes)) and not cheaper and gained <= 0:
                # The oracle's m only bounds the cost of sets; the bound is tighter near its prices.
                box = widest = box / 4
                if box < NARROWEST:
                    return last
        return True

    def _program(
        self, rows: csr_matrix, sizes: Floats, low: Floats, high: Floats
    ) -> tuple[float, Floats, Floats] | None:
        """The best prices in a box with respect to the active sets alone, in bytes.

        Returns:
            The bound that they would prove, the price of each class, and the reduced cost of each
            active set; ``None`` without a solution.
        """
        count = len(sizes)
        matrix = self.columns.matrix(self.active)
        costs = self.columns.costs(self.active) - matrix.T @ self.base
        covers = (rows @ matrix).tocsc()
        # Slack columns for the box: a class may be under- or overcovered at the price of an end.
        within = hstack([covers, identity(count), -identity(count)], "csc")
        homes = None
        if self.active:
            # The m of a block counts once, however many sets are assigned to the block.
            places = np.minimum.reduceat(self.oracle.place[matrix.indices], matrix.indptr[:-1])
            used_places, number = np.unique(places, return_inverse=True)
            entries = np.ones(len(number)), (number, np.arange(len(number)))
            homes = csr_matrix(entries, shape=(len(used_places), within.shape[1]))
        solution = minimum(np.concatenate([costs, high, -low]), within, sizes, self.work, homes)
        if solution is None:
            return None
        # The solver keeps the box only up to its tolerance: no price may be far outside.
        margin = np.maximum(high - low, 1.0)
        trial = np.clip(solution.eqlin.marginals, low - margin, high + margin)
        if not FINE * float(np.abs(trial * sizes).sum()) < MOST / 2:
            return None
        value = float(solution.fun) + float(self.base.sum())
        return value, trial, costs - covers.T @ trial

    def _try(self, prices: Ints) -> tuple[list[int], bool]:
        """The sets that undercut ``prices``, and whether one is cheaper than it was.

        Keeps the prices if they prove more than the best.
        """
        shortfall, found = self.oracle.run(prices)
        found = [each for each in found if each.mask not in self.single]
        cheaper = self.columns.learn(found)
        undercut = [each.mask for each in found]
        self.seen.update(dict.fromkeys(undercut))
        proved = proved_by(prices, shortfall)
        if proved > self.level:
            self.level, self.prices, self.lowered = proved, prices, prices + shortfall
            self.bound = max(self.bound, self.columns.bound(proved))
        self.tried.append((self.work.steps, self.bound))
        return undercut, cheaper

    def _stalled(self) -> bool:
        """Whether the last share of the work has closed next to nothing of the gap."""
        if len(self.tried) <= FEWEST:
            return False
        share, least = STALLED
        begun, now = self.tried[0][0], self.tried[-1][0]
        since = now - share * (now - begun)
        before = max(bound for work, bound in self.tried if work <= since)
        return self.bound - before < least * (self.known.dram_bytes - self.bound)

    def _choose(self, rows: csr_matrix) -> None:
        """Choose the seen sets that a new program starts with: those of least reduced cost."""
        sets = tuple(self.seen)
        most = COLUMNS[0] + COLUMNS[1] * rows.shape[0]
        if len(sets) > most:
            reduced = self.columns.reduced(sets, self.prices)
            best = np.sort(np.argsort(reduced, kind="stable")[:most])
            sets = tuple(sets[k] for k in best)
        self.active = list(sets)

    def _renew(self, reduced: Floats, new: list[int], count: int) -> bool:
        """Add new sets, dropping those of highest reduced cost if too many; whether any is new."""
        active = set(self.active)
        added = [group for group in dict.fromkeys(new) if group not in active]
        most = COLUMNS[0] + COLUMNS[1] * count
        if len(self.active) + len(added) > 2 * most:
            best = np.sort(np.argsort(reduced, kind="stable")[:most])
            self.active = [self.active[k] for k in best]
        self.active += added
        return bool(added)
