"""Exact search for wide graphs: the cheapest cover by legal groups, as a linear program.

A lower bound is proved by prices (:mod:`block_prices`). The groups that undercut them come from a
list of all groups where that is short (:mod:`legal_groups`), otherwise from the automaton of all
sets that fit by their floor (:mod:`group_automaton`, :mod:`relaxation`). The plan is then chosen
among legal groups that good prices ask for, by an integer program.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.node_set import is_connected, is_convex
from torch_getfuse.partition.problem import FusionProblem, SearchInterrupted, SearchResult
from torch_getfuse.partition.wide.block_prices import Oracle, Proof, prove
from torch_getfuse.partition.wide.group_automaton import Automaton
from torch_getfuse.partition.wide.group_columns import Columns, minimum
from torch_getfuse.partition.wide.integer_program import choose
from torch_getfuse.partition.wide.legal_groups import MAX_SETS, Candidates, Listed, list_groups
from torch_getfuse.partition.wide.relaxation import FINE, MOST, Pricing
from torch_getfuse.partition.work import INTERRUPTED, STEPS_PER_SECOND, OutOfWork

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

UNPRICED = "nothing priced"
MOST_COLUMNS = 2_000  # that the integer program is given, beside single blocks
# Shares of the time after which each stage ends: list, bound, groups, plan.
LISTED, PRICED, PLANNED, ENDED = 0.02, 0.45, 0.85, 0.97
RADII = (0, 1, 2)  # of the surroundings in which blocks of one price look alike
PER_START = 20  # sets per first block, for a plan
CHECKED, LATER = 4_000, 500  # sets whose legality is looked at, and less likely ones, each time
BOX = 0.06  # of the prices that sets for a plan are sought with: other ones than for the bound
SAMPLE = 100  # sets whose F_b tells how far it exceeds the floor
POWERS = 1, 2, 0.5, 0.25, 0  # of the share of the buffer that half of the sets should fit
_LEGAL = 20  # steps that a look at one counts
ROUNDS = 4  # of prices, for one share of the buffer after the other


def cover(
    problem: FusionProblem, known: SearchResult, seconds: float = math.inf, most: int = MAX_SETS
) -> SearchResult:
    """The best plan made of groups that good prices ask for, and a proved lower bound.

    Args:
        problem: graph, cost model (LBDF) and buffer.
        known: a legal plan; its groups join the others, so that the result is never worse.
        seconds: for all of it, counted as work first.
        most: sets to look at before the list of all groups is given up as too long.

    Returns:
        The plan and its bound, equal where it is proved optimal. ``stopped`` says what ended the
        proof early.

    Raises:
        OptionError: for a scheme other than LBDF whose groups are too many to list.
        SearchInterrupted: for a ``KeyboardInterrupt``, with the best plan by then.
    """
    return _Cover(problem, known, seconds).run(most)


class _Cover:
    """One run: what is known at any time, and how the time is shared out."""

    def __init__(self, problem: FusionProblem, known: SearchResult, seconds: float) -> None:
        self.problem = problem
        self.known = known
        self.seconds = seconds
        self.work = problem.evaluator.work
        self.begun = self.work.steps
        self.started = time.perf_counter()
        self.plan = known.groups
        nothing = np.zeros(len(problem.blocks), np.int64)
        self.proof = Proof(problem.unavoidable, (), nothing, UNPRICED)

    def run(self, most: int) -> SearchResult:
        if not self.problem.blocks:
            return self.result()
        try:
            with self.work.within(self.seconds):
                self._search(most)
        except OutOfWork as limit:
            if self.proof.stopped == UNPRICED:
                self.proof = replace(self.proof, stopped=str(limit))
        except KeyboardInterrupt as error:
            self.proof = replace(self.proof, stopped=INTERRUPTED)
            raise SearchInterrupted(self.result()) from error
        return self.result()

    def result(self) -> SearchResult:
        with self.work.finishing():
            cost = self.problem.cost(self.plan)
        return SearchResult(
            groups=self.plan,
            dram_bytes=cost,
            plans=len(self.proof.sets),
            seconds=time.perf_counter() - self.started,
            lower_bound_bytes=self.proof.bound,
            stopped=self.proof.stopped,
        )

    def _until(self, share: float) -> float:
        """Seconds, as they are counted, up to a share of all."""
        return max(0.0, share * self.seconds - (self.work.steps - self.begun) / STEPS_PER_SECOND)

    def _search(self, most: int) -> None:
        problem, known = self.problem, self.known
        # More than that, and prices and rooms do not add up in 64 bits: nothing is proved by them.
        if 8 * FINE * problem.cost(problem.blocks) >= MOST:
            self.proof = replace(self.proof, stopped="byte counts too large for prices")
            return
        with self.work.within(self._until(LISTED)):
            listed = list_groups(problem, most)
        columns = Columns(problem)
        pool = _Pool(columns, (*problem.blocks, *known.groups))
        self.proof = replace(self.proof, sets=listed.groups)
        oracle: Oracle | None = None
        try:
            with self.work.within(self._until(PRICED)):
                oracle, classes = self._oracle(columns, listed)
                if oracle is not None:
                    self.proof = prove(columns, oracle, known, classes)
                else:
                    self.proof = replace(self.proof, stopped="too many states")
        except OutOfWork as limit:
            self.proof = replace(self.proof, stopped=str(limit))
        with self._limited(PLANNED):
            if isinstance(oracle, Pricing):
                _enrich(pool, oracle, self.proof, known)
            else:
                pool.add(pool.sorted(listed.groups, self.proof), most)
        best = pool.always
        with self._limited(ENDED):
            best = pool.best(MOST_COLUMNS)
        with closing(choose(columns, best, known, self._until(ENDED))) as plans:
            for plan in plans:
                self.plan = plan

    def _oracle(self, columns: Columns, listed: Candidates) -> tuple[Oracle | None, list[Ints]]:
        """Who finds sets that undercut prices, and classes of blocks; nobody for want of room."""
        if listed.complete:
            return Listed(columns, listed.groups), []
        automaton = Automaton.of(self.problem)
        if automaton is None:
            return None, []
        return Pricing(automaton), [automaton.skeleton.classes(radius) for radius in RADII]

    @contextmanager
    def _limited(self, share: float) -> Iterator[None]:
        """Do what can be done up to a share of the time; the rest goes on with what there is."""
        with suppress(OutOfWork), self.work.within(self._until(share)):
            yield


class _Pool:
    """Legal groups for a plan."""

    def __init__(self, columns: Columns, always: Iterable[int]) -> None:
        self.always = tuple(dict.fromkeys(always))
        self.groups = list(self.always)
        self._seen = set(self.always)
        self.columns = columns

    def add(self, sets: Sequence[int], most: int) -> bool:
        """Take in the legal groups among the first new ``sets``; whether there are any."""
        size = len(self.groups)
        fresh = [mask for mask in sets if mask not in self._seen]
        for mask in fresh[:most]:
            self._seen.add(mask)
            self.columns.problem.evaluator.work.add(_LEGAL + mask.bit_count())
            if _legal(self.columns.problem, mask):
                self.groups.append(mask)
        return len(self.groups) > size

    def sorted(self, sets: Sequence[int], proof: Proof) -> list[int]:
        """Sets, those first that are cheapest beside the prices of a proof."""
        reduced = self.columns.reduced(sets, proof.prices)
        return [sets[k] for k in np.argsort(reduced, kind="stable")]

    def duals(self, groups: Sequence[int]) -> Floats | None:
        """Prices of the linear program that covers each block once by some groups."""
        columns = self.columns
        sizes = np.ones(len(columns.problem.blocks))
        work = columns.problem.evaluator.work
        found = minimum(columns.costs(groups), columns.matrix(groups), sizes, work)
        return None if found is None else np.asarray(found.eqlin.marginals)

    def best(self, most: int) -> tuple[int, ...]:
        """The first ones, and as many more that are cheapest by the prices of all together."""
        most += len(self.always)
        if len(self.groups) <= most:
            return tuple(self.groups)
        duals = self.duals(self.groups)
        if duals is None:
            return self.always
        reduced = self.columns.reduced(self.groups, duals * FINE)
        reduced[: len(self.always)] = -math.inf
        return tuple(self.groups[k] for k in np.sort(np.argsort(reduced, kind="stable")[:most]))


def _legal(problem: FusionProblem, mask: int) -> bool:
    return (
        is_connected(mask, problem.near)
        and is_convex(mask, problem.above, problem.below)
        and problem.evaluator.valid(mask)
    )


def _enrich(pool: _Pool, pricing: Pricing, proof: Proof, known: SearchResult) -> None:
    """Legal groups for a plan: the ascent goes on for somewhat smaller buffers.

    The sets that proved the bound need not be legal, mostly because their true buffer exceeds
    their floor. Sets that are made to fit a smaller buffer mostly are.
    """
    evaluator = pool.columns.problem.evaluator
    share = _share(pool, proof)
    tighter = [pricing.within(share**power, PER_START) for power in POWERS]
    tries = [(oracle, steady) for steady in (0.5, 0.0) for oracle in tighter]
    # F_b takes long to work out, and sets whose floor is as large as that are less often legal.
    limit = Evaluator(evaluator.scheme, int(share * evaluator.buffer_bytes), evaluator.work)
    met = pool.sorted(proof.sets, proof)
    pool.add([mask for mask in met if not limit.hopeless(mask)], CHECKED)
    idle = turn = 0
    while idle < len(tries):
        oracle, steady = tries[turn % len(tries)]
        duals = pool.duals(pool.groups)
        if duals is None:
            break
        # Legal groups alone have prices of their own, which jump as long as they are few.
        prices = np.floor(steady * proof.prices + (1 - steady) * FINE * duals).astype(np.int64)
        # Sets that are too large for a smaller buffer would mislead.
        start = replace(proof, sets=tuple(pool.groups), prices=prices)
        found = prove(pool.columns, oracle, known, start=start, rounds=ROUNDS, box=BOX)
        new = pool.add(pool.sorted(found.sets, found), CHECKED)
        idle = 0 if pool.add(met, LATER) or new else idle + 1
        turn += 1


def _share(pool: _Pool, proof: Proof) -> float:
    """Share of the buffer that sets should fit by their floor, so that every other one is legal.

    Measured on the sets that are cheapest beside the prices.
    """
    evaluator = pool.columns.problem.evaluator
    needs = [evaluator.buffer(group) for group in pool.sorted(proof.sets, proof)[:SAMPLE]]
    over = [need for need in needs if need is not None and need >= evaluator.buffer_bytes]
    return evaluator.buffer_bytes / float(np.median(over)) if over else 1.0
