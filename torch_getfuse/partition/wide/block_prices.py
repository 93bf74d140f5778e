"""Prices of blocks that prove a lower bound: cutting planes in a box, coarse prices before fine.

Every legal plan covers each block of operators by exactly one connected, convex, valid group, so

    min sum F_D(S) x_S   with   sum over S containing b of x_S = 1 for every block b,   x >= 0

is a relaxation of the planning problem: it drops the rule that the groups must not depend on each
other in a cycle, and wholeness. The duals of its rows are prices of blocks. An *oracle* finds the
sets that undercut them; these join the program, until none does.

Left to itself, such a program's prices jump, for it knows too few sets. So prices are sought in a
box around those that proved most so far; it grows where they hold what the program promised, and
shrinks where they prove less than the best. Blocks that look alike first share one price; the
classes are then refined, down to single blocks. The solver is never trusted: whatever prices it
returns are rounded to integers, and the bound that they prove is computed here
(``docs/exact-search.md`` section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix, hstack, identity

from torch_getfuse.partition.problem import FusionProblem, SearchResult
from torch_getfuse.partition.wide.group_columns import Columns, minimum
from torch_getfuse.partition.wide.relaxation import FINE, MOST
from torch_getfuse.partition.work import OutOfWork

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BOX, FINER, WIDEST = 0.1, 0.03, 1.0  # half its width at first, with finer classes, at most
NARROWEST = 1e-4  # half width of a box in which no more is looked for
PROMISE = 0.3  # share of the program's promise that must hold for the box to grow
CLOSE = 0.0005  # share of what is proved; if less is promised, finer classes take over
CLOSER = 0.0001  # and at last the box grows
NO_BETTER = "no better prices found"  # by the solver, or in so many rounds
COLUMNS = 1_500, 3  # of a program: so many, and so many per row


class Oracle(Protocol):
    """Finds groups that undercut prices."""

    @property
    def place(self) -> Ints:
        """Per block a number; each group is assigned to the one of its blocks with the least."""
        ...

    def run(self, prices: Ints) -> tuple[Ints, list[int]]:
        """Per block ``m <= 0``, in 1/:data:`FINE` bytes, and sets.

        ``F_D - prices`` of each legal group is at least ``m`` of the block it is assigned to.

        Raises:
            OutOfWork: where a limit on work is reached.
        """
        ...


@dataclass(frozen=True)
class Proof:
    """What the ascent reached.

    Attributes:
        bound: no legal plan has less, in bytes.
        sets: masks met; legal groups among them.
        prices: per block, in 1/:data:`FINE` bytes; those that prove the bound.
        stopped: why the ascent ended early, ``""`` where no better prices exist for this oracle, to
            a whole byte or so.
    """

    bound: int
    sets: tuple[int, ...]
    prices: Ints
    stopped: str


def prove(
    columns: Columns,
    oracle: Oracle,
    known: SearchResult,
    classes: Sequence[Ints] = (),
    start: Proof | None = None,
    rounds: float = math.inf,
    box: float = BOX,
) -> Proof:
    """Raise the lower bound until it meets the linear program, the known plan, or a limit on work.

    Args:
        columns: of the problem whose blocks are priced.
        oracle: finds sets that undercut the prices.
        known: a legal plan; its groups join the program.
        classes: per block its class, from coarse to fine; single blocks come after them.
        start: prices and sets to begin with; without, each block's price is its weights.
        rounds: prices to try for each kind of classes.
        box: half the first box's width, as a share of what each block would cost alone.
    """
    singles = np.arange(len(columns.problem.blocks))
    return _Ascent(columns, oracle, known, start).run([*classes, singles], rounds, box)


class _Ascent:
    """The state of one proof: sets met, best prices, what they prove."""

    def __init__(
        self,
        columns: Columns,
        oracle: Oracle,
        known: SearchResult,
        start: Proof | None,
    ) -> None:
        problem = columns.problem
        self.columns = columns
        self.oracle = oracle
        self.known = known
        self.work = problem.evaluator.work
        self.single = frozenset(problem.blocks)
        self.alone = columns.costs(problem.blocks)
        sets = (*known.groups, *(start.sets if start else ()))
        self.met = dict.fromkeys(group for group in sets if group not in self.single)
        self.active: list[int] = []  # sets of the program; single blocks are in it as a limit
        self.base, self.step = int(columns.weights.sum()), _granularity(problem)
        self.bound = problem.unavoidable
        self.prices = start.prices if start else FINE * columns.weights
        self.level = -(1 << 62)  # what the prices prove, in 1/FINE bytes

    def run(self, classes: Sequence[Ints], rounds: float, box: float) -> Proof:
        stopped = NO_BETTER
        try:
            self._try(self.prices)
            for number, home in enumerate(classes):
                if self._climb(home, box, number == len(classes) - 1, rounds):
                    stopped = ""
                    break
                box = FINER
        except OutOfWork as limit:
            stopped = str(limit)
        return Proof(self.bound, tuple(self.met), self.prices, stopped)

    def _climb(self, home: Ints, box: float, last: bool, rounds: float) -> bool:
        """Better prices, the same for each class, until no more is to be gained; or proved."""
        rows = csr_matrix((np.ones(len(home)), (home, np.arange(len(home)))))
        sizes = np.asarray(rows.sum(axis=1)).ravel()
        alone = rows @ self.alone / sizes
        best = rows @ self.prices / sizes / FINE
        self._choose(rows)
        widest = WIDEST
        while self.bound < self.known.dram_bytes:
            if rounds <= 0:
                return False
            low = best - box * alone
            # No price above F_D alone proves more: the block itself would undercut it.
            high = np.maximum(low, np.minimum(best + box * alone, alone))
            found = self._program(rows, sizes, low, high)
            if found is None:
                return False
            value, trial, reduced = found
            before = self.level
            promised = value - before / FINE
            if promised < (CLOSER if last else CLOSE) * value:
                if not last:
                    return False
                slack = 1e-6 * alone
                held = (trial < low + slack) | (trial > high - slack) & (high < alone)
                if box < widest and held.any():
                    box = min(widest, 2 * box)
                    continue
                if promised < 0.5:
                    return True
            undercut = self._try(np.floor(trial[home] * FINE).astype(np.int64))
            rounds -= 1
            gained = (self.level - before) / FINE
            if gained > 0:
                best, widest = trial, WIDEST
                if gained > PROMISE * promised:
                    box = min(widest, 1.5 * box)
            else:
                box /= 2
            if not self._renew(reduced, undercut, len(sizes)) and gained <= 0:
                # The oracle's m is a bound of what sets cost; nearer prices make it a better one.
                box = widest = box / 4
                if box < NARROWEST:
                    return last
        return True

    def _program(
        self, rows: csr_matrix, sizes: Floats, low: Floats, high: Floats
    ) -> tuple[float, Floats, Floats] | None:
        """The prices in a box that prove most by the active sets alone, in bytes.

        Returns:
            What they would prove, the price of each class, and what each active set costs beside
            them. ``None`` without a solution.
        """
        count = len(sizes)
        matrix, costs = self.columns.matrix(self.active), self.columns.costs(self.active)
        covers = (rows @ matrix).tocsc()
        # At the ends of the box, a class can be covered, or covered once too often, at its price.
        within = hstack([covers, identity(count), -identity(count)], "csc")
        homes = None
        if self.active:
            # The m of a block is paid once, however many sets are assigned to the block.
            places = np.minimum.reduceat(self.oracle.place[matrix.indices], matrix.indptr[:-1])
            some, number = np.unique(places, return_inverse=True)
            entries = np.ones(len(number)), (number, np.arange(len(number)))
            homes = csr_matrix(entries, shape=(len(some), within.shape[1]))
        found = minimum(np.concatenate([costs, high, -low]), within, sizes, self.work, homes)
        if found is None:
            return None
        # Whatever the solver's tolerances make of the box, no price is far out of it.
        margin = np.maximum(high - low, 1.0)
        trial = np.clip(found.eqlin.marginals, low - margin, high + margin)
        if not FINE * float(np.abs(trial * sizes).sum()) < MOST / 2:
            return None
        return float(found.fun), trial, costs - covers.T @ trial

    def _try(self, prices: Ints) -> list[int]:
        """The sets that undercut prices; they are kept if they prove more than the best so far."""
        shortfall, undercut = self.oracle.run(prices)
        undercut = [group for group in undercut if group not in self.single]
        self.met.update(dict.fromkeys(undercut))
        proved = int(prices.sum() + shortfall.sum())
        if proved > self.level:
            self.level, self.prices = proved, prices
            # Every plan costs the weights and whole multiples of the step.
            whole = self.base - (self.base * FINE - proved) // (FINE * self.step) * self.step
            self.bound = max(self.bound, whole)
        return undercut

    def _choose(self, rows: csr_matrix) -> None:
        """The sets met that a new program starts with: those cheapest beside the prices."""
        sets = tuple(self.met)
        most = COLUMNS[0] + COLUMNS[1] * rows.shape[0]
        if len(sets) > most:
            reduced = self.columns.reduced(sets, self.prices)
            best = np.sort(np.argsort(reduced, kind="stable")[:most])
            sets = tuple(sets[k] for k in best)
        self.active = list(sets)

    def _renew(self, reduced: Floats, new: list[int], count: int) -> bool:
        """Take in new sets, if any; where they become too many, drop those that cost most."""
        here = set(self.active)
        fresh = [group for group in dict.fromkeys(new) if group not in here]
        most = COLUMNS[0] + COLUMNS[1] * count
        if len(self.active) + len(fresh) > 2 * most:
            best = np.sort(np.argsort(reduced, kind="stable")[:most])
            self.active = [self.active[k] for k in best]
        self.active += fresh
        return bool(fresh)


def _granularity(problem: FusionProblem) -> int:
    """The largest step, in bytes, that all tensors' sizes are multiples of."""
    width = problem.evaluator.scheme.activation_bytes
    return math.gcd(*(tensor.elements * width for tensor in problem.graph.tensors.values()))
