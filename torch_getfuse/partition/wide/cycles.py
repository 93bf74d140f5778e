"""Covers whose groups wait for each other in a cycle: found, and made legal by splitting."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from torch_getfuse import ordering
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.search.random_split import RandomSplit

Cycle = list[tuple[int, int, int]]
"""Groups as (mask, operator entered, operator left)."""


def find_cycles(problem: FusionProblem, groups: Sequence[int]) -> list[Cycle]:
    """A shortest cycle through each group that is on one, without the unfusable operators."""
    nodes = [*groups, *(1 << i for i in bits(problem.unfusable))]
    home = {i: k for k, mask in enumerate(nodes) for i in bits(mask)}
    after: list[dict[int, tuple[int, int]]] = [{} for _ in nodes]
    for i, before in enumerate(problem.graph.predecessors):
        for j in bits(before):
            if home[i] != home[j]:
                after[home[j]].setdefault(home[i], (j, i))
    cycles: dict[tuple[int, ...], Cycle] = {}
    for start in sorted(k for component in ordering.cycles(after) for k in component):
        predecessor: dict[int, int] = {}
        front = [start]
        while front and start not in predecessor:
            following = []
            for k in front:
                for other in after[k]:
                    if other not in predecessor:
                        predecessor[other] = k
                        following.append(other)
            front = following
        path = [start]
        while predecessor[path[-1]] != start:
            path.append(predecessor[path[-1]])
        path = [start, *path[:0:-1]]
        cycle = []
        for k, node in enumerate(path):
            entered = after[path[k - 1]][node][1]
            left = after[node][path[(k + 1) % len(path)]][0]
            if node < len(groups):
                cycle.append((groups[node], entered, left))
        cycles.setdefault(tuple(sorted(group for group, _, _ in cycle)), cycle)
    return list(cycles.values())


def split_cycles(problem: FusionProblem, groups: Sequence[int]) -> tuple[int, ...]:
    """A legal plan from a cover by legal groups: splits a group of each cycle until none is left.

    Some group of a cycle is left at an operator that does not depend on the one at which it is
    entered; otherwise the operators themselves would form a cycle. Splitting off everything that
    depends on the latter breaks the cycle.
    """
    plan = list(groups)
    split = RandomSplit(problem)
    rng = Random(0)
    while cycles := find_cycles(problem, plan):
        for cycle in cycles:
            if any(group not in plan for group, _, _ in cycle):
                continue  # split already
            options = []
            for group, entered, left in cycle:
                late = group & (problem.below[entered] | 1 << entered)
                if not late >> left & 1:
                    sides = problem.parts(late) + problem.parts(group & ~late)
                    parts = [part for side in sides for part in split(side, rng)]
                    options.append((problem.cost(parts) - problem.cost([group]), group, parts))
            _, group, parts = min(options)
            plan.remove(group)
            plan += parts
    return tuple(plan)
