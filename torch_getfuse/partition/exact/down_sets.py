"""Exact search: dynamic programming over down-sets (docs/method.md, section 9).

A down-set is a set of operators that contains all that must run before its members. The groups of
an acyclic plan can be run one after another, and after each of them the operators that have run
are a down-set: so every legal plan is a chain of down-sets whose steps are connected valid groups,
and the cheapest chain from the empty set to the whole graph is the optimum.

Steps from a down-set ``D`` are grown by *ideals*: ``P(b) = {b and its ancestors} - D``. A set
``S`` with ``D | S`` a down-set is the union of the ideals of its members, and it is connected
exactly if it can be built from one ideal by adding, each time, the ideal of a consumer of what is
there already. So only connected sets are ever visited, each once per down-set: what
comes earlier in the list of what may join it is in no set that grows by what comes later. (Where
operators are ordered by more than tensors, an ideal need not be connected; then a set may be
visited on the way to a group, but is none.) Validity is not monotone, so a set is given up only
where :meth:`FusionScheme.hopeless` shows that no larger one can be valid. A set is priced by what
joined it last, and whether it is valid is asked only if it would reach a down-set at less than the
best chain so far.

What is left to do after ``D`` costs at least its weights, one read of every tensor that ``D``
hands on, and one write of every tensor that must reach DRAM: where that, added to the chain so
far, exceeds a ceiling, the down-set is not followed. The ceiling is the cost of a plan that is
known, or a guess, refuted where no plan is found. docs/exact-search.md has the proofs.

Graphs with many parallel branches have too many down-sets; :mod:`group_cover` plans those.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch_getfuse.errors import OptionError
from torch_getfuse.partition.cost.scheme import remember
from torch_getfuse.partition.exact.chains import Chains
from torch_getfuse.partition.node_set import bits, is_connected, mask_of
from torch_getfuse.partition.problem import FusionProblem, SearchResult
from torch_getfuse.partition.work import OutOfWork


@dataclass(frozen=True, slots=True)
class Limits:
    """When the dynamic program gives up; counts, so that the same graph always ends the same way.

    Attributes:
        steps: (down-set, group) pairs looked at, per thousand operators or part of it.
        seconds: counted as work first (:mod:`.work`).
        pace: give up sooner, for something else can have the time: where the share of the operators
            that is passed is less than so many times the share of the steps, or of the work, that
            is done.
    """

    steps: int = 200_000
    seconds: float = float("inf")
    pace: float = 0.0


_GUESSES = (1 / 32, 1 / 8, 1 / 2, 2)
"""Shares of the unavoidable traffic by which the optimum is guessed to exceed it."""

_LOOKS, _SOON = 18, 1 / 54
"""How often the pace is looked at, and after which share of the sets for the first time."""

_STEP, _WORDS = 10, 80
"""Counted as work for each step: so much, and one for each so many operators of the graph."""


class TooWide(Exception):
    """The graph has more down-sets and groups than the limits allow.

    Attributes:
        bound: no legal plan has less DRAM access, in bytes.
        passed: share of the operators in the down-set that was looked at when the pace was too
            slow; 1 where it was not.
    """

    bound: int = 0
    passed: float = 1.0


def exact(
    problem: FusionProblem, known: int | None = None, limits: Limits | None = None
) -> SearchResult:
    """The legal plan with the least DRAM access, proved by construction.

    Args:
        problem: graph, cost model and buffer.
        known: DRAM access in bytes of a legal plan, if one is known; only makes it faster.
        limits: when to give up; by default never for time.

    Raises:
        TooWide: where a limit strikes before the proof.
        NoPlan: where no plan keeps to the pins.
        OptionError: where the cost model is not additive.
    """
    if not problem.evaluator.scheme.additive:
        raise OptionError(
            f"the exact search adds up DRAM access by tensor; scheme "
            f"{problem.evaluator.scheme.name!r} does not (additive = False); use method='local'"
        )
    limits = limits or Limits()
    started = time.perf_counter()
    steps, bound = 0, problem.unavoidable
    try:
        with problem.evaluator.work.within(limits.seconds):
            for ceiling in _ceilings(problem, known):
                search = _Search(problem, ceiling, limits, steps, started)
                if search.run():
                    return search.result()
                if ceiling is not None:
                    bound = max(bound, ceiling + 1)
                steps = search.steps
    except (OutOfWork, TooWide) as reason:
        given_up = TooWide(str(reason))
        given_up.bound = bound
        if isinstance(reason, TooWide):
            given_up.passed = reason.passed
        raise given_up from None
    if known is None:
        raise NoPlan("no legal plan keeps to the pins")
    raise ValueError(f"no legal plan has as little as known={known} bytes of DRAM access")


def _ceilings(problem: FusionProblem, known: int | None) -> Iterator[int | None]:
    """What the optimum is taken to cost at most, in turn; the last is sure.

    Where weights are read more than once, a set that grows can become too dear for ever, so that a
    low ceiling saves most of the work; and one that is too low is soon refuted. Where they are
    not, it saves little.
    """
    if problem.rereads:
        for share in _GUESSES:
            guess = problem.unavoidable + int(share * problem.unavoidable)
            if known is None or guess < known:
                yield guess
    yield known


class NoPlan(ValueError):
    """No legal plan keeps to the pins: proved, for every plan was looked at."""


class _State(NamedTuple):
    """A down-set as it was reached at least cost.

    Attributes:
        cost: of the groups so far, in bytes.
        rest: a lower bound of what is left, in bytes.
        starts: first operators of blocks that can run next.
        before, group: the down-set that it was reached from, and by which group.
    """

    cost: int
    rest: int
    starts: int
    before: int
    group: int


class _Grown(NamedTuple):
    """A set on its way to a group: what is true of it after whichever down-set it runs.

    Attributes:
        before: operators that it reads from, where it may start with one of them; members too.
        after: operators that must run after some of it, members among them.
        joining: those of ``after`` that read from it, without members.
        moved: bytes that it would move as a group, if it read everything once.
        ways: the set as it is, and with what it may start with: those that may become a group.
    """

    before: int
    after: int
    joining: int
    moved: int
    ways: tuple[int, ...]


_NOTHING = _Grown(0, 0, 0, 0, ())


class _Search:
    """One run of the dynamic program.

    Everything that is done per down-set or group looks at their neighbourhood only, so that the
    time grows with the depth of a graph and not with its square; and a set that grows by an
    operator is priced by that operator and the tensors that it touches. Most sets run after many
    down-sets, and what is true of them is found once.
    """

    def __init__(
        self,
        problem: FusionProblem,
        ceiling: int | None,
        limits: Limits,
        steps: int = 0,
        started: float = 0.0,
    ) -> None:
        graph = problem.graph
        self.evaluator = problem.evaluator
        self.chains = chains = Chains(problem)
        self.unfusable, self.everything = chains.unfusable, chains.everything
        self.ceiling = ceiling
        self.count = self.evaluator.work.add
        self.count(10 * len(graph))
        self.weight_of_step = _STEP + len(graph) // _WORDS
        self.most_steps = limits.steps * -(-len(graph) // 1000)
        self.steps = steps
        self.started = started
        self.size = 0  # of the down-set that is left
        self.work, self.pace = self.evaluator.work, limits.pace
        self.begun, self.left = self.work.steps, max(1, self.work.steps_left)
        self.first = steps
        self.looks = 0
        self._look_after(1 / _LOOKS if limits.pace else math.inf)
        if limits.pace:  # of the work, much may go into the first groups of a search that ends
            self.look_at_step = self.first + _SOON * (self.most_steps - self.first)
        self.successors, self.makers = chains.successors, chains.makers
        self.readers = graph.readers
        self.block, self.ideal = chains.block, chains.ideal
        # An ideal is connected, unless more than tensors orders its operators.
        self.near = problem.near if graph.ordered else None
        scheme = self.evaluator.scheme
        self.weights = scheme.weights
        self.crossings = problem.crossings_of
        self.rereads = problem.rereads
        self.grown: dict[int, _Grown] = {}
        # By down-set and what runs after it: a lower bound of what is left, in bytes.
        self.rests: dict[int, int] = {}
        start = chains.start
        self.firsts = mask_of(i for i, block in enumerate(self.block) if block & -block == 1 << i)
        starts = self._starts(start, chains.sources | chains.after(start))
        self.best = {start: _State(0, problem.unavoidable, starts, 0, 0)}
        # Down-sets by size, so that each is complete before it is left.
        self.waiting: list[list[int]] = [[] for _ in range(len(graph) + 1)]
        self.waiting[start.bit_count()].append(start)

    def run(self) -> bool:
        """Whether there is a legal plan up to the ceiling.

        Raises:
            TooWide: where a limit strikes first.
        """
        for level in self.waiting:
            for done in sorted(level):
                self.size = done.bit_count()
                self._leave(done)
        return self.everything in self.best

    def result(self) -> SearchResult:
        """The cheapest plan that was found."""
        best = self.best
        groups = []
        at = self.everything
        while best[at].group:
            groups.append(best[at].group)
            at = best[at].before
        cost = best[self.everything].cost
        return SearchResult(
            groups=self.chains.without_shared(groups[::-1]),
            dram_bytes=cost,
            plans=self.evaluator.evaluated,
            seconds=time.perf_counter() - self.started,
            lower_bound_bytes=cost,
        )

    def _leave(self, done: int) -> None:
        """Every connected valid group that can run next, and the down-sets that they lead to."""
        state = self.best[done]
        # Each set is grown once: of what may join it, what stands earlier in the list is in all
        # sets that grow from it and in none that grow from what stands later.
        growing = [(0, state.starts, 0, _NOTHING)]
        while growing:
            group, joining, without, grown = growing.pop()
            earlier = 0
            larger = []
            joining &= ~without
            while joining:
                i = (joining & -joining).bit_length() - 1
                block = self.block[i]
                joining &= ~block
                joined = group | self.ideal[i] & ~done
                if joined & earlier:
                    continue  # grows from that
                found = None if joined & without else self._join(joined, group, grown, state)
                if found is None:
                    without |= block  # as is every set that holds both
                    continue
                self._reach(done, state, joined, group, found)
                larger.append((joined, block, found))
                earlier |= block
            for joined, block, found in larger:
                growing.append((joined, found.joining, without, found))
                without |= block

    def _join(self, group: int, part: int, grown: _Grown, state: _State) -> _Grown | None:
        """What is true of a set; ``None`` where neither it nor a larger one is of use.

        Args:
            group: has grown from ``part``, on none of the rest of which that depends.
            part, grown: of which this is true.
            state: of the down-set that it would run after.
        """
        self._count()
        if group & self.unfusable:
            return None
        found = self.grown.get(group) or self._grow(group, part, grown)
        if self.rereads and self.ceiling is not None:
            # However it goes on, what it holds already is read so often.
            ways = tuple(w for w in found.ways if not self._reads_too_often(state, w, part))
            found = _Grown(*found[:-1], ways)
        return found if found.ways else None

    def _grow(self, group: int, part: int, grown: _Grown) -> _Grown:
        """What is true of a set, whatever it runs after."""
        added = group & ~part
        before, after, joining, moved, _ = grown
        hopeless = self.evaluator.hopeless
        if self.chains.leading:
            known = part | before
            for i in bits(added):
                before |= self.makers[i]
            offered = self.chains.ways(group, before)
            ways = tuple(way for way in offered if not hopeless(way, way & known))
        else:
            ways = () if hopeless(group, part) else (group,)
        if ways:
            for i in bits(added):
                after |= self.successors[i]
                joining |= self.readers[i]
                moved += self.weights[i]
                for crossing in self.crossings[i]:
                    touching = crossing.touched & added
                    if touching & -touching == 1 << i:  # else counted at the first that touches it
                        moved += crossing.moved(group) - crossing.moved(part)
        found = _Grown(before, after, joining & ~group, moved, ways)
        return remember(self.grown, group, found)

    def _reads_too_often(self, state: _State, group: int, part: int) -> bool:
        """Whether the reads again that are certain of a set make it too dear."""
        again = self.evaluator.least_reread(group, part)
        return bool(again) and self._too_dear(state.cost + again, state.rest)

    def _reach(self, done: int, state: _State, group: int, part: int, grown: _Grown) -> None:
        """Take a set for a step from ``done``, if it is valid and better than what is known.

        Whether it is valid is the dearest question, so it comes last.
        """
        least = state.cost + grown.moved
        reached = self.chains.absorb(done | group, grown.after)
        old = self.best.get(reached)
        if old is not None and old.cost <= least:
            return
        rest = self._rest(done, state, group, part) if old is None else old.rest
        if self._too_dear(least, rest):
            return
        for way in grown.ways:
            old = self.best.get(reached)
            if old is not None and old.cost <= least:
                return
            if self.near is not None and not is_connected(way, self.near):
                return
            if not self.evaluator.valid(way):
                continue
            cost = least + self.evaluator.reread(way)
            if self._too_dear(cost, rest):
                continue
            if old is None:
                after = grown.after | self.chains.after(reached & ~(done | group))
                starts = state.starts & ~reached | self._starts(reached, after)
                self.waiting[reached.bit_count()].append(reached)
            elif cost < old.cost:
                starts = old.starts
            else:
                continue
            self.best[reached] = _State(cost, rest, starts, done, way)

    def _rest(self, done: int, state: _State, group: int, part: int) -> int:
        """A lower bound of what is left after a group that runs after ``done``, in bytes.

        Args:
            done, state: the down-set.
            group, part: the group, and what it has grown from: of a large one more is known.
        """
        key = done | group
        known = self.rests.get(key)
        if known is not None:
            return known
        rest = self._rest(done, state, part, 0) if part else state.rest
        left = self.everything & ~(done | part)
        still_left = left & ~group
        added = group & ~part
        for i in bits(added):
            rest -= self.weights[i]
            for crossing in self.crossings[i]:
                touching = crossing.touched & added
                if touching & -touching == 1 << i:  # else counted at the first that touches it
                    rest += crossing.owed(still_left) - crossing.owed(left)
        return remember(self.rests, key, rest)

    def _too_dear(self, cost: int, rest: int) -> bool:
        return self.ceiling is not None and cost + rest > self.ceiling

    def _starts(self, done: int, among: int) -> int:
        """The first operators of blocks, among others, that can run after a down-set."""
        predecessors, left = self.chains.predecessors, ~done
        return mask_of(i for i in bits(among & left & self.firsts) if not predecessors[i] & left)

    def _count(self) -> None:
        self.steps += 1
        if self.steps > self.most_steps:
            raise TooWide(f"more than {self.most_steps} groups on its down-sets")
        self.count(self.weight_of_step)
        if self.steps > self.look_at_step or self.work.steps > self.look_at_work:
            self._look()

    def _look(self) -> None:
        sets = (self.steps - self.first) / (self.most_steps - self.first)
        spent = max(sets, (self.work.steps - self.begun) / self.left)
        share = self.size / len(self.evaluator.scheme.graph)
        if share < self.pace * spent:
            slow = TooWide(f"{share:.0%} of the operators in {spent:.0%} of its limits")
            slow.passed = share
            raise slow
        self.looks += 1
        self._look_after(self.looks / _LOOKS)

    def _look_after(self, share: float) -> None:
        """Look at the pace once more than a share of the sets or of the work is spent."""
        self.look_at_step = self.first + share * (self.most_steps - self.first)
        self.look_at_work = self.begun + share * self.left
