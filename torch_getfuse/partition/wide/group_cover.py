"""Exact search for wide graphs: the cheapest cover by legal groups, as a linear program.

Prices prove a lower bound (:mod:`block_prices`). The groups that undercut them come from a list of
all groups if that is short (:mod:`legal_groups`), otherwise from the automaton of all sets whose
floor fits into the buffer (:mod:`group_automaton`, under BRR :mod:`tile_automaton`; and
:mod:`relaxation`). Branching finds the best plan of these. Where plan and bound are close, the sets
that a cheaper plan may use are few, and branching over all of them is the proof (:mod:`near_sets`,
:mod:`branching`). Where they are not, prices that only legal groups must not undercut prove more
(:mod:`legal_pricing`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib import import_module

import numpy as np
import numpy.typing as npt

from torch_getfuse.partition.exact.down_sets import Limits
from torch_getfuse.partition.exact.windows import windows
from torch_getfuse.partition.problem import FusionProblem, SearchInterrupted, SearchResult
from torch_getfuse.partition.wide.block_prices import BOX, Oracle, Proof, prove
from torch_getfuse.partition.wide.branching import Branching
from torch_getfuse.partition.wide.group_automaton import line_automaton
from torch_getfuse.partition.wide.group_columns import Columns, FoundColumns
from torch_getfuse.partition.wide.legal_groups import MAX_SETS, Candidates, Listed, list_groups
from torch_getfuse.partition.wide.legal_pricing import LegalPricing
from torch_getfuse.partition.wide.near_sets import NearSets, is_legal, near_sets
from torch_getfuse.partition.wide.relaxation import FINE, MOST, ROOM_PRICES, Pricing
from torch_getfuse.partition.work import INTERRUPTED, STEPS_PER_SECOND, OutOfWork

Ints = npt.NDArray[np.int64]

UNPRICED = "nothing priced"
# Shares of the time after which each stage ends: list, automaton; and of what is left, plan, bound.
LISTED, BUILT, CHOSEN = 0.02, 0.6, 0.65
PRICED = 0.4, 0.3  # LBDF, BRR
MERGED = 0.15  # where states were merged, unless bound and plan are far apart
LAST_PRICED = 0.75  # and where there is no time for finer automata
IMPROVED = 0.5, 0.4  # shares of the time for prices of legal groups, each time: LBDF, BRR
REFINED, PRICED_AGAIN = 0.95, 0.2  # shares for near sets and for each of their prices
WINDOWS = 0.04  # the share of the time for windows of each plan
FEW, MANY = 1_000_000, 4_000_000  # labels for near sets: at first; where no finer ones are made
CLOSE = 0.01  # distance of bound and plan, as a share
FAR = 0.1, 0.2  # the same beyond which other searches follow; before finer automata
FINER = 2.0  # times what the automaton took, which must be left for finer ones
CLOSER = 0.8  # share of it below which near sets that were too many are looked for again
RADII = (0, 1, 2)  # radius of the surroundings that blocks of one price have in common
_TILES = "torch_getfuse.partition.wide.tile_automaton"
"""By name, as cost models are: what is planned under LBDF does not hang on the code of BRR."""

ASKED = 2  # sets per block of which it is asked whether they are legal, for a plan
CLOSE_BOX = 0.003  # initial box of the prices of legal groups
FINER_BOX = 0.3  # and of those of near sets, as a share of what bound and plan are apart


def cover(
    problem: FusionProblem, known: SearchResult, seconds: float = math.inf, most: int = MAX_SETS
) -> SearchResult:
    """The best plan of groups with low reduced cost, and a proved lower bound.

    Args:
        problem: graph, cost model (LBDF or BRR) and buffer.
        known: a legal plan; its groups are candidates, so that the result is never worse.
        seconds: time limit of the whole search, converted to counted work (``partition/work.py``).
        most: sets to examine before listing all groups is given up.

    Returns:
        The plan and its bound, equal if it is proved optimal. ``stopped`` says what ended the
        proof early.

    Raises:
        OptionError: for a scheme other than LBDF and BRR with too many groups to list.
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
        self.improved: tuple[int, ...] = ()  # the last plan that windows have improved
        self.used: dict[int, None] = {}  # legal groups that linear programs had
        # Columns of sets that need not be legal; where groups read nothing again, none cost less.
        self.found = FoundColumns(problem) if problem.rereads else Columns(problem)
        nothing = np.zeros(len(problem.blocks), np.int64)
        self.hurried = False  # whether the automaton took too long for finer ones
        # Labels that were too few for near sets, and how close bound and plan must be then.
        self.tried = 0, math.inf
        self.proof = Proof(problem.unavoidable, (), nothing, nothing, UNPRICED)

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
        """Share out what is left as if it were all."""
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
        columns = Columns(problem) if problem.rereads else self.found
        self.proof = replace(self.proof, sets=listed.groups)
        oracle: Listed | Pricing | None = None
        try:
            with self.work.within(self._until(BUILT)):
                begun = self.work.steps
                oracle, classes = self._oracle(columns, listed)
                made = (self.work.steps - begun) / STEPS_PER_SECOND
            self._restart()
            self.hurried = FINER * made > self.seconds
            if oracle is None:
                self.proof = replace(self.proof, stopped="too many states")
            else:
                with self.work.within(self._until(self._priced(oracle))):
                    self._prove(oracle, known, classes)
        except OutOfWork as limit:
            self.proof = replace(self.proof, stopped=str(limit))
        if not listed.complete:
            self._choose(columns, CHOSEN)
        if isinstance(oracle, Listed):
            self._finish(lambda: oracle.near)
        elif oracle is not None:
            self._close_in(columns, oracle, classes[-1:])

    def _close_in(self, columns: Columns, pricing: Pricing, classes: Sequence[Ints]) -> None:
        """Search the near sets if they are few; otherwise make them fewer, and ask what is legal.

        In turn: prices of an automaton of near sets, and the best plan of what undercuts them. Not
        where many states stand for sets that are not alike, and bound and plan are far apart, or
        such an automaton would take what is left: other searches find better plans in the time.
        """
        first, reached = pricing, (-1, 0)
        while not self._finish(partial(self._near, columns, pricing, FEW)):
            again = reached == (reached := (self.proof.bound, self.problem.cost(self.plan)))
            if pricing.automaton.merged and (self.hurried or self._gap() > FAR[pricing is first]):
                return
            finer = None if again else self._finer(columns, pricing)
            if finer is None:
                break
            pricing = finer
            self.found = FoundColumns(self.problem)  # the coarser one said less
            known = replace(self.known, groups=self.plan, dram_bytes=reached[1])
            start = replace(self.proof, sets=tuple(self.used), prices=self.proof.lowered)
            with self.work.within(min(PRICED_AGAIN * self.seconds, self._until(REFINED))):
                self._prove(pricing, known, classes, start, self._gap() * FINER_BOX)
            self._choose(columns, 1.0)
        else:
            return
        # Of finer automata it takes little to ask what is legal.
        few = pricing is first and self._gap() < CLOSE and not pricing.automaton.merged
        if not (few and self._finish(partial(self._near, columns, pricing, MANY))):
            self._improve(columns, pricing, classes)

    def _finer(self, columns: Columns, pricing: Pricing) -> Pricing | None:
        """The oracle of an automaton of near sets; ``None`` where it would not be much finer."""
        automaton = None
        if pricing.automaton.finer is not None:
            with self._limited(REFINED):
                near = pricing.near_by(self.plan, self.proof.lowered, self._reach(columns))
                automaton = pricing.automaton.finer(near)
        return None if automaton is None else Pricing(automaton, rates=pricing.rates)

    def _improve(self, columns: Columns, pricing: Pricing, classes: Sequence[Ints]) -> None:
        """Prices that only legal groups must not undercut, and the best plan of these, in turn."""
        if self.problem.rereads:  # what was found is less than what groups cost
            self.found = FoundColumns(self.problem)
        reached = -1, 0
        legal = LegalPricing(columns, pricing)
        share = IMPROVED[self.problem.rereads]
        while reached != (reached := (self.proof.bound, self.problem.cost(self.plan))):
            known = replace(self.known, groups=self.plan, dram_bytes=reached[1])
            start = replace(self.proof, sets=tuple(self.used), prices=self.proof.lowered)
            with self.work.within(min(share * self.seconds, self._until(1.0))):
                self._prove(legal, known, classes, start, CLOSE_BOX)
            self._choose(columns, 1.0)
            if self._finish(partial(self._near, columns, pricing, MANY)):
                return

    def _prove(
        self,
        oracle: Oracle,
        known: SearchResult,
        classes: Sequence[Ints],
        start: Proof | None = None,
        box: float = BOX,
    ) -> None:
        """Raise the bound by the prices of an oracle that has all sets of a cheaper plan."""
        merged = start is None and _merged(oracle)

        def enough(bound: int) -> bool:
            """Whether finer automata can have the time, or what searches for plans."""
            share = PRICED[True] if self.hurried else MERGED
            spent = self._until(1.0) < (1 - share) * self.seconds
            near = bound > (1 - FAR[True]) * known.dram_bytes
            return merged and spent and near != self.hurried

        proof = prove(self.found, oracle, known, classes, start, box, enough)
        self.proof = replace(proof, bound=min(proof.bound, known.dram_bytes))

    def _priced(self, oracle: Oracle) -> float:
        """The share of the time for the first prices."""
        alone = self.hurried and _merged(oracle)
        return LAST_PRICED if alone else PRICED[self.problem.rereads]

    def _choose(self, columns: Columns, share: float) -> None:
        """The best plan of the proof's sets, by branching; and that with windows."""
        proof, problem = self.proof, self.problem
        sets: Sequence[int] = proof.sets
        if problem.rereads and sets:
            # Only what is legal has a cost, and to ask that takes time.
            reduced = self.found.reduced(sets, proof.lowered)
            first = np.argsort(reduced, kind="stable")[: ASKED * len(problem.blocks)].tolist()
            sets = [sets[k] for k in first if is_legal(problem, sets[k])]
        several = dict.fromkeys((*problem.blocks, *self.plan, *sets))
        self._branch(NearSets.of(columns, [*several]), share)
        if self.plan != self.improved:
            best = replace(self.known, groups=self.plan, dram_bytes=problem.cost(self.plan))
            limits = Limits(seconds=WINDOWS * self.seconds)
            self.plan = self.improved = windows(problem, best, limits).groups

    def _finish(self, find: Callable[[], NearSets | None]) -> bool:
        """Search the sets that a plan cheaper than the best may use, if they are few.

        Args:
            find: finds them; ``None`` where they are too many.

        Returns:
            Whether nothing more can be done: the best plan is proved, or the time is over.
        """
        cost = self.problem.cost(self.plan)
        if self.proof.bound < cost:
            near = find()
            if near is None:
                return False
            level = self._branch(near, 1.0)
            cost = self.problem.cost(self.plan)
            bound = max(self.proof.bound, min(cost, near.columns.bound(level)))
            self.proof = replace(self.proof, bound=bound)
        if self.proof.bound == cost:
            self.proof = replace(self.proof, stopped="")
        return True

    def _branch(self, near: NearSets, share: float) -> int:
        """Keep the best plan of some sets; what the search proves of them, 1/FINE bytes."""
        search = Branching(near, self.plan, tuple(self.used), self.proof.lowered)
        try:
            with self._limited(share):
                search.run()
        finally:  # an interrupt loses nothing
            self.plan = search.plan
            self.used.update(dict.fromkeys(search.used))
        return search.level

    def _near(self, columns: Columns, pricing: Pricing, most: int) -> NearSets | None:
        """The sets that a plan cheaper than the best may use, if they are few.

        Where they were too many, they are looked for again when bound and plan are closer.

        Args:
            columns: of the problem.
            pricing: the oracle.
            most: labels.
        """
        tried, gap = self.tried, self._gap()
        if (gap > CLOSE and pricing.automaton.merged) or (most <= tried[0] and gap > tried[1]):
            return None
        prices, near = self.proof.lowered, None
        reach = np.full(len(prices), self._reach(columns))
        with self._limited(1.0):
            near = near_sets(columns, pricing, prices, reach, most)
        if near is None:
            self.tried = most, CLOSER * gap
        return near

    def _gap(self) -> float:
        """The distance of bound and plan, as a share."""
        return 1 - self.proof.bound / self.problem.cost(self.plan)

    def _reach(self, columns: Columns) -> int:
        """Reduced cost of sets that a plan cheaper than the best may use, at most."""
        cost = self.problem.cost(self.plan)
        return (cost - columns.step) * FINE - int(self.proof.lowered.sum())

    def _oracle(
        self, columns: Columns, listed: Candidates
    ) -> tuple[Listed | Pricing | None, list[Ints]]:
        """The oracle and the classes of blocks; no oracle if the automaton has too many states."""
        if listed.complete:
            return Listed(columns, listed.groups), []
        if self.problem.rereads:
            automaton = import_module(_TILES).automaton_near(self.problem, self.plan)
        else:
            automaton = line_automaton(self.problem)
        if automaton is None:
            return None, []
        rates = ROOM_PRICES[::2] if self.problem.rereads else ROOM_PRICES
        return Pricing(automaton, rates=rates), [
            automaton.skeleton.classes(radius) for radius in RADII
        ]

    @contextmanager
    def _limited(self, share: float) -> Iterator[None]:
        """Run a stage up to a share of the time; the next stages continue with its results."""
        with suppress(OutOfWork), self.work.within(self._until(share)):
            yield


def _merged(oracle: Oracle) -> bool:
    """Whether many states of its automaton stand for sets that are not alike."""
    return isinstance(oracle, Pricing) and oracle.automaton.merged
