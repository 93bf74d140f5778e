"""Exact search: dynamic programming over down-sets (method.md section 9).

A down-set is a set of operators that contains all producers of its members. The groups of an
acyclic plan can be run one after another, and after each of them the operators that have run are
a down-set: so every legal plan is a chain of down-sets whose steps are connected valid groups,
and the cheapest chain from the empty set to the whole graph is the optimum.

Steps from a down-set ``D`` are grown by *ideals*: ``P(b) = {b and its ancestors} - D``. A set
``S`` with ``D | S`` a down-set is the union of the ideals of its members, and it is connected
exactly if it can be built from one ideal by adding, each time, the ideal of a consumer of what is
there already. So only connected sets are ever visited. Validity is not monotone, so a set is
given up only where :meth:`FusionScheme.floor` shows that no larger one can be valid.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch_getfuse.partition.cost import Evaluator
from torch_getfuse.partition.group import ancestors, bits
from torch_getfuse.partition.problem import merge_in_place


@dataclass(frozen=True)
class ExactResult:
    """What the exact search found.

    Attributes:
        groups: masks of the groups, in an order in which they can run.
        dram_bytes: their ``F_D`` sum: no legal plan has less.
        evaluated: distinct groups whose cost was computed.
        down_sets: size of the dynamic program.
        seconds: wall time.
    """

    groups: tuple[int, ...]
    dram_bytes: int
    evaluated: int
    down_sets: int
    seconds: float


def exact(evaluator: Evaluator) -> ExactResult:
    """The legal plan with the least DRAM access, proved by construction."""
    started = time.perf_counter()
    unfusable = evaluator.unfusable()
    search = _Search(evaluator, unfusable, merge_in_place(evaluator.graph, unfusable))
    groups, cost, down_sets = search.run()
    return ExactResult(
        tuple(groups), cost, evaluator.evaluated, down_sets, time.perf_counter() - started
    )


class _Search:
    """One run of the dynamic program."""

    def __init__(self, evaluator: Evaluator, unfusable: int, blocks: Sequence[int]) -> None:
        graph = evaluator.graph
        self.evaluator = evaluator
        self.unfusable = unfusable
        self.everything = (1 << len(graph)) - 1
        self.block = [0] * len(graph)
        for block in blocks:
            for i in bits(block):
                self.block[i] = block
        for i in bits(unfusable):
            self.block[i] = 1 << i
        above = ancestors(graph)
        # The ideal of an operator: its block, all that the block depends on, and their blocks.
        self.ideal = [0] * len(graph)
        for i in range(len(graph)):
            for j in bits(above[i] | self.block[i]):
                self.ideal[i] |= self.block[j]
        self.successors = graph.successors
        self.predecessors = graph.predecessors

    def run(self) -> tuple[list[int], int, int]:
        """Groups of the optimum in order, their cost, and the number of down-sets met."""
        start = self._absorb(0)
        best: dict[int, tuple[int, int, int]] = {start: (0, 0, 0)}
        # Down-sets by size, so that each is complete before it is left.
        waiting: list[list[int]] = [[] for _ in range(len(self.block) + 1)]
        waiting[start.bit_count()].append(start)
        for level in waiting:
            for done in level:
                cost = best[done][0]
                for group in self._steps(done):
                    reached = self._absorb(done | group)
                    total = cost + self.evaluator.dram(group)
                    if reached not in best:
                        waiting[reached.bit_count()].append(reached)
                    elif best[reached][0] <= total:
                        continue
                    best[reached] = (total, done, group)
        groups = []
        at = self.everything
        while best[at][2]:
            _, before, group = best[at]
            groups.append(group)
            at = before
        return groups[::-1], best[self.everything][0], len(best)

    def _absorb(self, done: int) -> int:
        """Add the unfusable operators that can run: they cost nothing and block nothing."""
        for i in bits(self.unfusable & ~done):
            if not self.predecessors[i] & ~done:
                done |= 1 << i
        return done

    def _steps(self, done: int) -> list[int]:
        """Every connected valid group that can run next."""
        evaluator, unfusable = self.evaluator, self.unfusable
        found = []
        front = [
            self.ideal[i] & ~done
            for i in bits(~done & self.everything)
            if self.block[i] & -self.block[i] == 1 << i and not self.predecessors[i] & ~done
        ]
        seen = set(front)
        while front:
            group = front.pop()
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
