"""Exact search for wide graphs: the cheapest cover by legal groups, as a linear program.

Prices prove a lower bound (:mod:`block_prices`). The groups that undercut them come from a list of
all groups if that is short (:mod:`legal_groups`), otherwise from the automaton of all sets whose
floor fits into the buffer (:mod:`group_automaton`, :mod:`relaxation`). Branching finds the best
plan of these. Where plan and bound are close, the sets that a cheaper plan may use are few, and
branching over all of them is the proof (:mod:`near_sets`, :mod:`branching`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.exact.down_sets import Limits
from torch_getfuse.partition.exact.windows import windows
from torch_getfuse.partition.problem import FusionProblem, SearchInterrupted, SearchResult
from torch_getfuse.partition.wide.block_prices import Proof, prove
from torch_getfuse.partition.wide.branching import Branching
from torch_getfuse.partition.wide.group_automaton import Automaton
from torch_getfuse.partition.wide.group_columns import Columns, minimum
from torch_getfuse.partition.wide.legal_groups import MAX_SETS, Candidates, Listed, list_groups
from torch_getfuse.partition.wide.near_sets import NearSets, is_legal, near_sets
from torch_getfuse.partition.wide.relaxation import FINE, MOST, Pricing
from torch_getfuse.partition.work import INTERRUPTED, STEPS_PER_SECOND, OutOfWork

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

UNPRICED = "nothing priced"
# Shares of the time after which each stage ends: list, bound, plan; more groups and a better plan.
LISTED, PRICED, CHOSEN, PLANNED, IMPROVED = 0.02, 0.4, 0.65, 0.73, 0.77
ENRICHED = 0.12  # the share of the time for more groups, at most
WINDOWS = 0.04  # the share of the time for windows of each plan
# Labels for the sets that a plan cheaper than the first may use, and than the second.
FEW_LABELS, MOST_LABELS = 1_000_000, 3_000_000
PARTS = 24  # where there are more, sets are sought that may first cost this part of it more
RADII = (0, 1, 2)  # radius of the surroundings that blocks of one price have in common
PER_START = 20  # sets per first block, for a plan
CHECKED, LATER = 4_000, 500  # sets checked for legality per round, and less likely ones
BOX = 0.06  # box of the prices for finding a plan; other than for the bound
SAMPLE = 100  # sets that show by how much F_b exceeds the floor
POWERS = 1, 2, 0.5, 0.25, 0  # exponents of the share of the buffer into which half of the sets fit
ROUNDS = 4  # rounds of prices for one share of the buffer before the next


def cover(
    problem: FusionProblem, known: SearchResult, seconds: float = math.inf, most: int = MAX_SETS
) -> SearchResult:
    """The best plan of groups with low reduced cost, and a proved lower bound.

    Args:
        problem: graph, cost model (LBDF) and buffer.
        known: a legal plan; its groups are candidates, so that the result is never worse.
        seconds: time limit of the whole search, converted to counted work (``partition/work.py``).
        most: sets to examine before listing all groups is given up.

    Returns:
        The plan and its bound, equal if it is proved optimal. ``stopped`` says what ended the
        proof early.

    Raises:
        OptionError: for a scheme other than LBDF with too many groups to list.
        SearchInterrupted: for a ``KeyboardInterrupt``, with the best plan so far.
    """
    return _Cover(problem, known, seconds).run(most)


class _Cover:
    """One run: the best results so far, and how the time is divided."""

    def __init__(self, problem: FusionProblem, known: SearchResult, seconds: float) -> None:
        self.problem = problem
        self.known = known
        self.seconds = seconds
        self.work = problem.evaluator.work
        self.begun = self.work.steps
        self.started = time.perf_counter()
        self.plan = known.groups
        self.used: dict[int, None] = {}  # legal groups that linear programs had
        self.prices: Ints | None = None  # of the proof, lowered until no set undercuts them
        self.too_many: dict[int, int] = {}  # per limit on labels, the reach with more than these
        self.searched = 0  # a cheaper plan costs at least so much, in 1/FINE bytes
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
        """Seconds of counted work left up to ``share`` of the time limit."""
        return max(0.0, share * self.seconds - (self.work.steps - self.begun) / STEPS_PER_SECOND)

    def _restart(self) -> None:
        """Share out what is left as if it were all: to the widest graphs it is half of that."""
        self.seconds = self._until(1.0)
        self.begun = self.work.steps

    def _search(self, most: int) -> None:
        problem, known = self.problem, self.known
        # Beyond this, sums of prices and rooms overflow 64 bits and prove nothing.
        if 8 * FINE * problem.cost(problem.blocks) >= MOST:
            self.proof = replace(self.proof, stopped="byte counts too large for prices")
            return
        with self.work.within(self._until(LISTED)):
            listed = list_groups(problem, most)
        columns = Columns(problem)
        self.proof = replace(self.proof, sets=listed.groups)
        oracle: Listed | Pricing | None = None
        try:
            with self.work.within(self._until(PRICED)):
                oracle, classes = self._oracle(columns, listed)
            self._restart()
            if oracle is None:
                self.proof = replace(self.proof, stopped="too many states")
            else:
                with self.work.within(self._until(PRICED)):
                    self.proof = prove(columns, oracle, known, classes)
        except OutOfWork as limit:
            self.proof = replace(self.proof, stopped=str(limit))
        if not listed.complete:
            self._choose(columns, self.proof.sets, CHOSEN)
        if oracle is None or self._finish(columns, oracle, FEW_LABELS):
            return
        if isinstance(oracle, Pricing):  # the sets are too many: a better plan makes them fewer
            self._improve(columns, oracle)

    def _improve(self, columns: Columns, pricing: Pricing) -> None:
        """More groups, the best plan of them and the sets that a cheaper one may use, in turn."""
        pool = _Pool(columns, (*self.problem.blocks, *self.plan))
        enriching = _Enriching(pool, pricing, self.proof, self.known)
        planned, improved = PLANNED, IMPROVED
        more = True
        while more:
            size = len(pool.groups)
            with self._limited(planned), self.work.within(ENRICHED * self.seconds):
                enriching.run()
            if more := len(pool.groups) > size:
                self._choose(columns, pool.groups, improved)
            if self._finish(columns, pricing, MOST_LABELS):
                return
            planned = improved = 1.0

    def _choose(self, columns: Columns, sets: Sequence[int], share: float) -> None:
        """The best plan of some sets, by branching; and that with windows."""
        several = dict.fromkeys((*self.problem.blocks, *self.plan, *sets))
        self._branch(NearSets.of(columns, [*several]), share)
        best = replace(self.known, groups=self.plan, dram_bytes=self.problem.cost(self.plan))
        limits = Limits(seconds=WINDOWS * self.seconds)
        self.plan = windows(self.problem, best, limits).groups

    def _finish(self, columns: Columns, oracle: Listed | Pricing, most: int) -> bool:
        """Search all sets that a plan cheaper than the best may use, if they are few.

        At last, if they are not, those of them with the least reduced cost, and then more: a plan
        that uses any other costs more by that.

        Args:
            columns: columns of the problem.
            oracle: of the proof.
            most: labels for finding the sets, where not all groups are listed.

        Returns:
            Whether nothing more can be done: the best plan is proved, or the time is over.
        """
        while self.proof.bound < (cost := self.problem.cost(self.plan)):
            near: NearSets | None = None
            beyond = cost * FINE
            if isinstance(oracle, Listed):
                near = oracle.near
            else:
                with self._limited(1.0):
                    near, beyond = self._near(columns, oracle, cost, most)
            if near is None:
                return False
            level = min(self._branch(near, 1.0), beyond)
            cost = self.problem.cost(self.plan)
            bound = max(self.proof.bound, min(cost, columns.bound(level)))
            self.proof = replace(self.proof, bound=bound)
            if level < min(beyond, cost * FINE):
                break
            self.searched = beyond
        if self.proof.bound == self.problem.cost(self.plan):
            self.proof = replace(self.proof, stopped="")
        return True

    def _branch(self, near: NearSets, share: float) -> int:
        """Keep the best plan of some sets; what the search proves of them, 1/FINE bytes."""
        search = Branching(near, self.plan, tuple(self.used))
        try:
            with self._limited(share):
                search.run()
        finally:  # an interrupt loses nothing
            self.plan = search.plan
            self.used.update(dict.fromkeys(search.used))
        return search.level

    def _near(
        self, columns: Columns, pricing: Pricing, cost: int, most: int
    ) -> tuple[NearSets | None, int]:
        """The sets that a plan cheaper than ``cost`` may use; if they are too many, at last, as
        many of those of least reduced cost as are not, and more than were searched before.

        Returns:
            The sets, ``None`` if these are too many as well; and what plans that use others cost
            at least, in 1/FINE bytes.
        """
        if self.prices is None:
            self.prices = self.proof.prices + pricing.run(self.proof.prices)[0]
        level = int(self.prices.sum())
        whole = (cost - columns.step) * FINE - level
        near = self._within(columns, pricing, whole, most)
        if near is not None:
            return near, cost * FINE
        found: tuple[NearSets | None, int] = None, level
        reach = max(whole // PARTS, (self.searched - level) // 2 * 3)
        while most == MOST_LABELS and reach < whole:
            near = self._within(columns, pricing, reach, FEW_LABELS)
            if near is None:
                break
            found = near, level + reach + 1
            reach += reach // 2 + 1
        return found

    def _within(
        self, columns: Columns, pricing: Pricing, reach: int, most: int
    ) -> NearSets | None:
        """The sets of reduced cost up to ``reach``; no second search where these are too many."""
        if reach >= self.too_many.get(most, MOST):
            return None
        assert self.prices is not None
        near = near_sets(columns, pricing, self.prices, reach, most)
        if near is None:
            self.too_many[most] = reach
        return near

    def _oracle(
        self, columns: Columns, listed: Candidates
    ) -> tuple[Listed | Pricing | None, list[Ints]]:
        """The oracle and the classes of blocks; no oracle if the automaton has too many states."""
        if listed.complete:
            return Listed(columns, listed.groups), []
        automaton = Automaton.of(self.problem)
        if automaton is None:
            return None, []
        return Pricing(automaton), [automaton.skeleton.classes(radius) for radius in RADII]

    @contextmanager
    def _limited(self, share: float) -> Iterator[None]:
        """Run a stage up to a share of the time; the next stages continue with its results."""
        with suppress(OutOfWork), self.work.within(self._until(share)):
            yield


class _Pool:
    """Candidate groups for a plan, all of them legal."""

    def __init__(self, columns: Columns, always: Iterable[int]) -> None:
        self.groups = list(dict.fromkeys(always))
        self._seen = set(self.groups)
        self.columns = columns

    def add(self, sets: Sequence[int], most: int) -> bool:
        """Add the legal groups among the first ``most`` new ``sets``; whether there are any."""
        size = len(self.groups)
        fresh = [mask for mask in sets if mask not in self._seen]
        for mask in fresh[:most]:
            self._seen.add(mask)
            if is_legal(self.columns.problem, mask):
                self.groups.append(mask)
        return len(self.groups) > size

    def sorted(self, sets: Sequence[int], proof: Proof) -> list[int]:
        """The sets by rising reduced cost at the prices of a proof."""
        reduced = self.columns.reduced(sets, proof.prices)
        return [sets[k] for k in np.argsort(reduced, kind="stable")]

    def duals(self, groups: Sequence[int]) -> Floats | None:
        """Duals of the linear program that covers each block exactly once by ``groups``."""
        columns = self.columns
        sizes = np.ones(len(columns.problem.blocks))
        work = columns.problem.evaluator.work
        solution = minimum(columns.costs(groups), columns.matrix(groups), sizes, work)
        return None if solution is None else np.asarray(solution.eqlin.marginals)


class _Enriching:
    """Adds legal groups for a plan to a pool by continuing the ascent with smaller buffers.

    The sets that proved the bound need not be legal, mostly because their buffer demand exceeds
    its floor. Sets whose floor fits into a smaller buffer mostly are legal.
    """

    def __init__(self, pool: _Pool, pricing: Pricing, proof: Proof, known: SearchResult) -> None:
        self.pool, self.pricing, self.proof, self.known = pool, pricing, proof, known
        self._tries: list[tuple[Pricing, float]] = []
        self._idle = self._turn = 0

    def run(self) -> None:
        """Add groups until there are no more; again, to go on after a limit.

        Raises:
            OutOfWork: at a limit.
        """
        pool, proof = self.pool, self.proof
        proof_sets = pool.sorted(proof.sets, proof)
        if not self._tries:
            self._prepare(proof_sets)
        while self._idle < len(self._tries):
            oracle, steady = self._tries[self._turn % len(self._tries)]
            duals = pool.duals(pool.groups)
            if duals is None:
                break
            # Duals of legal groups alone differ from the proof's, and oscillate while groups are
            # few.
            mixed = steady * proof.prices + (1 - steady) * FINE * duals
            prices = np.floor(mixed).astype(np.int64)
            # Without the proof's sets: some are too large for the smaller buffer.
            start = replace(proof, sets=tuple(pool.groups), prices=prices)
            ascent = prove(pool.columns, oracle, self.known, start=start, rounds=ROUNDS, box=BOX)
            new = pool.add(pool.sorted(ascent.sets, ascent), CHECKED)
            self._idle = 0 if pool.add(proof_sets, LATER) or new else self._idle + 1
            self._turn += 1

    def _prepare(self, proof_sets: Sequence[int]) -> None:
        evaluator = self.pool.columns.problem.evaluator
        share = _share(evaluator, proof_sets)
        # F_b takes long to compute, and sets with a floor above this limit are less often legal.
        limit = Evaluator(evaluator.scheme, int(share * evaluator.buffer_bytes), evaluator.work)
        self.pool.add([mask for mask in proof_sets if not limit.hopeless(mask)], CHECKED)
        tighter = [self.pricing.within(share**power, PER_START) for power in POWERS]
        self._tries = [(oracle, steady) for steady in (0.5, 0.0) for oracle in tighter]


def _share(evaluator: Evaluator, sets: Sequence[int]) -> float:
    """Share of the buffer into which the floor of a set should fit, so that half are legal.

    Measured on the first sets, those of least reduced cost.
    """
    needs = [evaluator.buffer(group) for group in sets[:SAMPLE]]
    over = [need for need in needs if need is not None and need >= evaluator.buffer_bytes]
    return evaluator.buffer_bytes / float(np.median(over)) if over else 1.0
