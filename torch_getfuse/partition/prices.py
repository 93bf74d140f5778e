"""Prices of blocks that prove a lower bound: column generation, coarse prices before fine ones.

Every legal plan covers each block of operators by exactly one connected, convex, valid group, so

    min sum F_D(S) x_S   with   sum over S containing b of x_S = 1 for every block b,   x >= 0

is a relaxation of the planning problem: it drops the rule that the groups must not depend on each
other in a cycle, and wholeness. The duals of its rows are prices of blocks. An *oracle* finds the
sets that undercut them; these join the program, until none does.

A program with one row for each block needs many rounds, for its prices jump. So blocks that look
alike first share one price: the rows of a class of blocks are added up to one. The classes are then
refined, down to single blocks. The solver is never trusted: whatever prices it returns are rounded
to integers, and the bound that they prove is computed here (``docs/exact-search.md`` section 3).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import csc_matrix, csr_matrix

from torch_getfuse.partition.bound import FINE
from torch_getfuse.partition.columns import Columns
from torch_getfuse.partition.problem import FusionProblem, SearchResult

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

STEADY, STEADIEST = 0.5, 0.95  # weight of the best prices so far against the linear program's
CLOSE = 0.002  # share of the program's value at which finer classes take over
COLUMNS = 1_500, 3  # of a program beside those it always has: so many, and so many per row


class Oracle(Protocol):
    """Finds groups that undercut prices."""

    def run(
        self, prices: Ints, expired: Callable[[], bool] = ..., quick: bool = ...
    ) -> tuple[Ints, list[int]] | None:
        """Per block ``m <= 0`` and sets, or ``None`` if time is up; 1/:data:`FINE` bytes.

        Every legal group can be assigned to one of its blocks, the same for all prices, so that
        ``F_D - prices`` of the group is at least that block's ``m``. With ``quick`` the sets
        matter alone, and ``m`` may be anything.
        """
        ...


@dataclass(frozen=True)
class Proof:
    """What column generation reached.

    Attributes:
        bound: no legal plan has less, in bytes.
        sets: masks met; legal groups among them.
        prices: per block, in 1/:data:`FINE` bytes; those that prove the bound.
        finished: whether no better prices exist for this oracle, to a whole byte or so.
    """

    bound: int
    sets: tuple[int, ...]
    prices: Ints
    finished: bool


def prove(
    columns: Columns,
    oracle: Oracle,
    known: SearchResult,
    ended: float = math.inf,
    classes: Sequence[Ints] = (),
) -> Proof:
    """Raise the lower bound until it meets the linear program, the known plan, or the clock.

    Args:
        columns: of the problem whose blocks are priced.
        oracle: finds sets that undercut the prices.
        known: a legal plan; the first prices share its cost out to its blocks.
        ended: moment of ``time.perf_counter`` to stop at.
        classes: per block its class, from coarse to fine; single blocks come after them.
    """
    singles = np.arange(len(columns.problem.blocks))
    return _Ascent(columns, oracle, known, ended).run([*classes, singles])


class _Ascent:
    """The state of one proof: sets met, best prices, bound."""

    def __init__(
        self,
        columns: Columns,
        oracle: Oracle,
        known: SearchResult,
        ended: float,
    ) -> None:
        problem = columns.problem
        self.oracle = oracle
        self.known = known
        self.ended = ended
        self.columns = columns
        self.met = dict.fromkeys((*problem.blocks, *known.groups))
        self.always = frozenset(self.met)
        self.active = list(self.met)
        self.base, self.step = self.columns.weights(), _granularity(problem)
        self.bound = problem.unavoidable
        self.prices = np.zeros(len(problem.blocks), np.int64)
        self.centre = _shares(problem, known) * FINE
        self.level = -(1 << 62)

    def expired(self) -> bool:
        return time.perf_counter() >= self.ended

    def run(self, classes: Sequence[Ints]) -> Proof:
        finished = False
        quick = len(classes) > 1
        for number, home in enumerate(classes):
            rows = _sums(home)
            self._choose(rows)
            last = number == len(classes) - 1
            finished = self._climb(home, rows, last, quick)
            quick = False
            if finished or self.expired():
                break
        return Proof(self.bound, tuple(self.met), self.prices, finished)

    def _climb(self, home: Ints, rows: csr_matrix, last: bool, quick: bool) -> bool:
        """Better prices, the same for each class, until the program's value is near; or proved."""
        sizes = np.asarray(rows.sum(axis=1)).ravel()
        steady = 0.0 if quick else STEADY
        while not self.expired():
            matrix, values = self.columns.matrix(self.active), self.columns.costs(self.active)
            found = minimum(values, (rows @ matrix).tocsc(), sizes, self.ended)
            if found is None:
                return False
            value, marginals = found
            duals = marginals[home]
            trial = steady * self.centre + (1 - steady) * duals * FINE
            prices = np.floor(trial).astype(np.int64)
            answer = self.oracle.run(prices, self.expired, quick)
            if answer is None:
                return False
            shortfall, undercut = answer
            fresh = [group for group in undercut if group not in self.met]
            self.met.update(dict.fromkeys(fresh))
            wanted = [group for group in undercut if group not in self.always]
            proved = int(prices.sum() + shortfall.sum())
            if quick:
                # The sets are wanted, and prices that are not far off.
                self.centre = trial
                quick = bool(fresh) and proved < value * FINE / 2
                steady = 0.0 if quick else STEADY
            elif self._raise(prices, trial, proved):
                steady = max(STEADY, steady - 0.1)
            elif steady and not fresh:
                # Steadied prices may miss the sets that undercut the program's own.
                steady = 0.0
            else:
                steady = min(STEADIEST, (1 + steady) / 2)
            near = self.bound >= value - (0.5 if last else CLOSE * value)
            if self.bound >= self.known.dram_bytes or (last and near):
                return True
            if near or not (quick or fresh or steady):
                return last
            self._renew(matrix, values, duals, wanted, rows)
        return False

    def _raise(self, prices: Ints, trial: Floats, proved: int) -> bool:
        if proved <= self.level:
            return False
        self.level, self.centre, self.prices = proved, trial, prices
        # Every plan costs the weights and whole multiples of the step.
        whole = self.base - (self.base * FINE - proved) // (FINE * self.step) * self.step
        self.bound = max(self.bound, whole)
        return True

    def _choose(self, rows: csr_matrix) -> None:
        """The sets met that a new program starts with: those cheapest beside the prices."""
        most = len(self.always) + COLUMNS[0] + COLUMNS[1] * rows.shape[0]
        if len(self.met) > most:
            sets = tuple(self.met)
            reduced = self.columns.reduced(sets, self.centre)
            best = np.sort(np.argsort(reduced, kind="stable")[:most])
            kept = {sets[k] for k in best} | self.always
            self.active = [group for group in sets if group in kept]
        else:
            self.active = list(self.met)

    def _renew(
        self, matrix: csc_matrix, values: Ints, duals: Floats, new: list[int], rows: csr_matrix
    ) -> None:
        """Take in new sets; where they have become too many, drop those that cost most."""
        most = len(self.always) + COLUMNS[0] + COLUMNS[1] * rows.shape[0]
        if len(self.active) + len(new) > most + COLUMNS[0] + COLUMNS[1] * rows.shape[0]:
            reduced = values - matrix.T @ duals
            best = np.sort(np.argsort(reduced, kind="stable")[:most])
            kept = {self.active[k] for k in best} | self.always
            self.active = [group for group in self.active if group in kept]
        here = set(self.active)
        self.active += [group for group in dict.fromkeys(new) if group not in here]


def _sums(home: Ints) -> csr_matrix:
    """The matrix that adds up the rows of each class."""
    return csr_matrix((np.ones(len(home)), (home, np.arange(len(home)))))


def minimum(
    values: Ints, matrix: csc_matrix, sizes: Floats, ended: float = math.inf
) -> tuple[float, Floats] | None:
    """Value and duals of the linear program; ``None`` without a solution in time."""
    left = ended - time.perf_counter()
    found = linprog(
        values,
        A_eq=matrix,
        b_eq=sizes,
        bounds=(0, None),
        method="highs-ds",
        # Looking for simplifications takes longer than the program.
        options={"presolve": False} | ({"time_limit": max(0.0, left)} if left < math.inf else {}),
    )
    return (float(found.fun), np.asarray(found.eqlin.marginals)) if found.status == 0 else None


def _granularity(problem: FusionProblem) -> int:
    """The largest step, in bytes, that all tensors' sizes are multiples of."""
    width = problem.evaluator.scheme.activation_bytes
    return math.gcd(*(tensor.elements * width for tensor in problem.graph.tensors.values()))


def _shares(problem: FusionProblem, known: SearchResult) -> Floats:
    """The known plan's cost, each group's shared out by what its blocks would cost alone."""
    dram = problem.evaluator.dram
    shares = np.zeros(len(problem.blocks))
    for group in known.groups:
        inside = [k for k, block in enumerate(problem.blocks) if block & group]
        alone = np.array([max(1, dram(problem.blocks[k])) for k in inside], dtype=float)
        shares[inside] = dram(group) * alone / alone.sum()
    return shares
