"""Exact search: dynamic programming over down-sets (method.md section 9).

A down-set is a set of operators that contains all producers of its members. The groups of an
acyclic plan can be run one after another, and after each of them the operators that have run are
a down-set: so every legal plan is a chain of down-sets whose steps are connected valid groups,
and the cheapest chain from the empty set to the whole graph is the optimum.

Steps from a down-set ``D`` are grown by *ideals*: ``P(b) = {b and its ancestors} - D``. A set
``S`` with ``D | S`` a down-set is the union of the ideals of its members, and it is connected
exactly if it can be built from one ideal by adding, each time, the ideal of a consumer of what is
there already. So only connected sets are ever visited, each once per down-set. Validity is not
monotone, so a set is given up only where :meth:`FusionScheme.floor` shows that no larger one can
be valid.

What is left to do after ``D`` costs at least its weights, one read of every tensor that ``D``
hands on, and one write of every tensor that must reach DRAM: where that, added to the chain so
far, exceeds the cost of a plan that is known, the down-set is not followed.

Graphs with many parallel branches have too many down-sets; :mod:`.cover` plans those.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

from torch_getfuse.partition.group import bits, mask_of
from torch_getfuse.partition.problem import FusionProblem, SearchResult


@dataclass(frozen=True, slots=True)
class Limits:
    """When the dynamic program gives up; counts, so that the same graph always ends the same way.

    Attributes:
        steps: (down-set, group) pairs looked at.
        seconds: wall time, the one limit that depends on the machine.
    """

    steps: int = 200_000
    seconds: float = float("inf")


class TooWide(Exception):
    """The graph has more down-sets and groups than the limits allow."""


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
    """
    return _Search(problem, known, limits or Limits()).run()


class _State(NamedTuple):
    """A down-set as it was reached at least cost.

    Attributes:
        cost: of the groups so far, in bytes.
        rest: a lower bound of what is left, in bytes.
        open: members that have consumers outside the down-set.
        before, group: the down-set that it was reached from, and by which group.
    """

    cost: int
    rest: int
    open: int
    before: int
    group: int


class _Search:
    """One run of the dynamic program.

    Everything that is done per down-set or group looks at their neighbourhood only, so that the
    time grows with the depth of a graph and not with its square.
    """

    def __init__(self, problem: FusionProblem, known: int | None, limits: Limits) -> None:
        graph = problem.graph
        self.evaluator = problem.evaluator
        self.unfusable = problem.unfusable
        self.everything = (1 << len(graph)) - 1
        self.known = known
        self.limits = limits
        self.steps = 0
        self.started = time.perf_counter()
        self.successors = graph.successors
        self.predecessors = graph.predecessors
        self.sources = mask_of(i for i, before in enumerate(graph.predecessors) if not before)
        self.block = [1 << i for i in range(len(graph))]
        for block in problem.blocks:
            for i in bits(block):
                self.block[i] = block
        # The ideal of an operator: its block, all that the block depends on, and their blocks.
        self.ideal = [0] * len(graph)
        for i in range(len(graph)):
            before = 0
            for j in bits(self.block[i]):
                before |= graph.predecessors[j]
            ideal = self.block[i]
            for j in bits(before & ~self.block[i]):
                ideal |= self.ideal[j]
            self.ideal[i] = ideal
        # Per operator, what a plan cannot avoid moving because of it.
        self.duties: list[list[tuple[int, int, int]]] = [[] for _ in range(len(graph))]
        for duty in problem.duties:
            for i in bits(duty[0] | duty[1]):
                self.duties[i].append(duty)
        self.unavoidable = problem.unavoidable

    def run(self) -> SearchResult:
        start, open_ = self._absorb(0, 0)
        best = {start: _State(0, self.unavoidable, open_, 0, 0)}
        # Down-sets by size, so that each is complete before it is left.
        waiting: list[list[int]] = [[] for _ in range(len(self.block) + 1)]
        waiting[start.bit_count()].append(start)
        for level in waiting:
            for done in level:
                state = best[done]
                for group in self._steps(done, state.open):
                    cost = state.cost + self.evaluator.dram(group)
                    rest = state.rest + self._less(done, group)
                    if self.known is not None and cost + rest > self.known:
                        continue
                    reached, open_ = self._absorb(done | group, state.open | group)
                    if reached not in best:
                        waiting[reached.bit_count()].append(reached)
                    elif best[reached].cost <= cost:
                        continue
                    best[reached] = _State(cost, rest, open_, done, group)
        groups = []
        at = self.everything
        while best[at].group:
            groups.append(best[at].group)
            at = best[at].before
        cost = best[self.everything].cost
        return SearchResult(
            groups=tuple(groups[::-1]),
            dram_bytes=cost,
            plans=self.evaluator.evaluated,
            seconds=time.perf_counter() - self.started,
            lower_bound_bytes=cost,
        )

    def _less(self, done: int, group: int) -> int:
        """Change of the bound of what is left when ``group`` joins ``done``."""
        left, after = ~done, ~(done | group)
        change = 0
        for i in bits(group):
            for maker, readers, size in self.duties[i]:
                # A duty that touches several operators of the group counts at the first.
                if (maker | readers) & group & -((maker | readers) & group) != 1 << i:
                    continue
                for outside, sign in ((left, -1), (after, 1)):
                    owed = (
                        (readers & outside and not maker & outside) if readers else maker & outside
                    )
                    if owed:
                        change += sign * size
        return change

    def _absorb(self, done: int, open_: int) -> tuple[int, int]:
        """Add the unfusable operators that can run: they cost nothing and block nothing.

        Returns the down-set and its members that have consumers outside it.
        """
        while True:
            after = 0 if done else self.sources
            for i in bits(open_):
                after |= self.successors[i]
            ready = 0
            for i in bits(after & self.unfusable & ~done):
                if not self.predecessors[i] & ~done:
                    ready |= 1 << i
            done |= ready
            open_ = mask_of(i for i in bits(open_ | ready) if self.successors[i] & ~done)
            if not ready:
                return done, open_

    def _count(self) -> None:
        self.steps += 1
        if self.steps > self.limits.steps:
            raise TooWide(f"more than {self.limits.steps} groups on its down-sets")
        if not self.steps & 255 and time.perf_counter() - self.started > self.limits.seconds:
            raise TooWide(f"more than {self.limits.seconds:g} s")

    def _steps(self, done: int, open_: int) -> list[int]:
        """Every connected valid group that can run next."""
        evaluator, unfusable = self.evaluator, self.unfusable
        after = self.sources & ~done
        for i in bits(open_):
            after |= self.successors[i]
        found = []
        front = [
            self.ideal[i] & ~done
            for i in bits(after & ~done)
            if self.block[i] & -self.block[i] == 1 << i and not self.predecessors[i] & ~done
        ]
        seen = set(front)
        while front:
            group = front.pop()
            self._count()
            if group & unfusable or evaluator.hopeless(group):
                continue
            if evaluator.valid(group):
                found.append(group)
            after = 0
            for i in bits(group):
                after |= self.successors[i]
            for i in bits(after & ~group):
                grown = group | self.ideal[i] & ~done
                if grown not in seen:
                    seen.add(grown)
                    front.append(grown)
        return found
