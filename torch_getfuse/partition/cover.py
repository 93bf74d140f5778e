"""Exact search for wide graphs: the cheapest cover by legal groups, as a linear program.

A lower bound is proved by prices (:mod:`.prices`). The groups that undercut them come from a list
of all groups where that is short (:mod:`.listing`), otherwise from the automaton of all sets that
fit by their floor (:mod:`.automaton`, :mod:`.bound`). The plan is then chosen among legal groups
that good prices ask for, by an integer program.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from torch_getfuse.partition.automaton import Automaton
from torch_getfuse.partition.bound import FINE, Pricing
from torch_getfuse.partition.choice import choose
from torch_getfuse.partition.columns import Columns
from torch_getfuse.partition.group import is_connected, is_convex
from torch_getfuse.partition.listing import MAX_SETS, Listed, list_groups
from torch_getfuse.partition.prices import Proof, minimum, prove
from torch_getfuse.partition.problem import FusionProblem, SearchResult

Floats = npt.NDArray[np.float64]

MOST_COLUMNS = 2_000  # that the integer program is given, beside single blocks
# Shares of the time after which each stage ends: list, bound, groups, plan.
LISTED, PRICED, PLANNED, ENDED = 0.04, 0.42, 0.78, 0.95
RADII = (0, 1, 2, 3)  # of the surroundings in which blocks of one price look alike
PER_START = 3  # sets per first block, for a plan
TIGHTER = (1.0, 0.99, 0.97, 0.94, 0.9, 0.85)  # shares of the buffer that groups aim at


def cover(
    problem: FusionProblem, known: SearchResult, seconds: float = math.inf, most: int = MAX_SETS
) -> SearchResult:
    """The best plan made of groups that good prices ask for, and a proved lower bound.

    Args:
        problem: graph, cost model (LBDF) and buffer.
        known: a legal plan; its groups join the others, so that the result is never worse.
        seconds: wall time.
        most: sets to look at before the list of all groups is given up as too long.

    Returns:
        The plan and its bound, equal where it is proved optimal. ``stopped`` says whether the
        clock ended the proof.

    Raises:
        OptionError: for a scheme other than LBDF whose groups are too many to list.
    """
    started = time.perf_counter()
    if not problem.blocks:
        return SearchResult((), 0, 0, time.perf_counter() - started)

    def until(share: float) -> float:
        return started + share * seconds

    listed = list_groups(problem, LISTED * seconds, most)
    columns = Columns(problem)
    pool = _Pool(columns, (*problem.blocks, *known.groups))
    if listed.complete:
        proof = prove(columns, Listed(columns, listed.groups), known, until(PRICED))
        pool.add(pool.sorted(listed.groups, proof), until(PLANNED))
    else:
        automaton = Automaton.of(problem, lambda: time.perf_counter() >= until(PRICED))
        if automaton is None:  # nothing is proved but what no plan avoids
            nothing = np.zeros(len(problem.blocks), np.int64)
            proof = Proof(problem.unavoidable, listed.groups, nothing, False)
            pool.add(listed.groups, until(PLANNED))
        else:
            classes = [automaton.skeleton.classes(radius) for radius in RADII]
            pricing = Pricing(automaton)
            proof = prove(columns, pricing, known, until(PRICED), classes)
            _enrich(pool, pricing, proof, until(PLANNED))
    plan = choose(columns, pool.best(MOST_COLUMNS), known, until(ENDED))
    cost = problem.cost(plan)
    return SearchResult(
        groups=plan,
        dram_bytes=cost,
        plans=len(proof.sets),
        seconds=time.perf_counter() - started,
        lower_bound_bytes=proof.bound,
        stopped="" if proof.finished else "time limit",
    )


class _Pool:
    """Legal groups for a plan."""

    def __init__(self, columns: Columns, always: Iterable[int]) -> None:
        self.always = tuple(dict.fromkeys(always))
        self.groups = list(self.always)
        self._seen = set(self.always)
        self._columns = columns

    def add(self, sets: Iterable[int], ended: float) -> list[int]:
        """Take in the legal groups among ``sets``, as far as time allows; the new ones."""
        new = []
        for mask in sets:
            if time.perf_counter() >= ended:
                break
            if mask not in self._seen:
                self._seen.add(mask)
                if _legal(self._columns.problem, mask):
                    new.append(mask)
        self.groups += new
        return new

    def sorted(self, sets: Sequence[int], proof: Proof) -> list[int]:
        """Sets, those first that are cheapest beside the prices of a proof."""
        reduced = self._columns.reduced(sets, proof.prices)
        return [sets[k] for k in np.argsort(reduced, kind="stable")]

    def minimum(self, groups: Sequence[int], ended: float = math.inf) -> Floats | None:
        """Duals of the linear program over some groups."""
        matrix = self._columns.matrix(groups)
        found = minimum(self._columns.costs(groups), matrix, np.ones(matrix.shape[0]), ended)
        return found[1] if found else None

    def best(self, most: int) -> tuple[int, ...]:
        """The first ones, and as many more that are cheapest by the prices of all together."""
        most += len(self.always)
        if len(self.groups) <= most:
            return tuple(self.groups)
        found = self.minimum(self.groups)
        if found is None:
            return self.always
        reduced = self._columns.reduced(self.groups, found * FINE)
        reduced[: len(self.always)] = -math.inf
        return tuple(self.groups[k] for k in np.sort(np.argsort(reduced, kind="stable")[:most]))


def _legal(problem: FusionProblem, mask: int) -> bool:
    return (
        is_connected(mask, problem.near)
        and is_convex(mask, problem.above, problem.below)
        and problem.evaluator.valid(mask)
    )


def _enrich(pool: _Pool, pricing: Pricing, proof: Proof, ended: float) -> None:
    """Legal groups for a plan: column generation once more, with legal groups only.

    The sets that proved the bound need not be legal, mostly because their true buffer exceeds
    their floor. Sets that are made to fit a somewhat smaller buffer mostly are.
    """

    def expired() -> bool:
        return time.perf_counter() >= ended

    pool.add(pool.sorted(proof.sets, proof)[:MOST_COLUMNS], (time.perf_counter() + ended) / 2)
    tries = [
        (pricing.within(share, PER_START), steady) for steady in (0.5, 0.0) for share in TIGHTER
    ]
    idle = turn = 0
    while idle < len(tries) and not expired():
        groups = pool.best(MOST_COLUMNS)
        duals = pool.minimum(groups, ended)
        if duals is None:
            break
        tight, steady = tries[turn % len(tries)]
        prices = steady * proof.prices + (1 - steady) * FINE * duals
        answer = tight.run(np.floor(prices).astype(np.int64), expired, quick=True)
        if answer is None:
            break
        idle = 0 if pool.add(answer[1], ended) else idle + 1
        turn += 1
