"""Merges neighbouring fusion groups and splits them again, until no pair gains.

A recursive split decides each cut with what it knows at that point: a group that is split off
early keeps its borders, however the rest is split later. So at the end every two groups joined by
an edge are reconsidered as one merged group, and replaced by what Algorithm 1 makes of that group:
the whole if it is valid, else the two valid sides of its best cut. The pair that saves most is
taken, until no pair saves anything. Nothing is random, and the plan never gets worse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem

Resplit = Callable[[int], Sequence[int] | None]
"""Valid connected parts of a connected set, split along the order; ``None`` if there are none."""


def regroup(
    problem: FusionProblem, plan: Sequence[int], resplit: Resplit
) -> Iterator[tuple[int, ...]]:
    """Yield cheaper and cheaper legal plans; each changes one pair of neighbours of the last.

    Args:
        problem: gives the cost of the groups.
        plan: valid groups of a legal plan.
        resplit: splits the union of two groups; must be deterministic, as its results are cached.
    """
    groups = tuple(plan)
    offers: dict[int, tuple[int, Sequence[int]]] = {}
    while True:
        gains = []
        problem.evaluator.work.add(2 * len(problem.graph))
        for one, other in _neighbours(problem, groups):
            union = one | other
            if union not in offers:
                parts = resplit(union)
                offers[union] = (0, ()) if parts is None else (problem.cost(parts), parts)
            cost, parts = offers[union]
            if parts and (saved := problem.cost((one, other)) - cost) > 0:
                gains.append((-saved, union, one, other))
        for _, union, one, other in sorted(gains):
            rest = [group for group in groups if group not in (one, other)]
            problem.evaluator.work.add(4 * len(problem.graph))
            if problem.order([*rest, union]) is not None:
                groups = (*rest, *offers[union][1])
                yield groups
                break
        else:
            return


def _neighbours(problem: FusionProblem, groups: Sequence[int]) -> list[tuple[int, int]]:
    """The pairs of groups with an edge from the first to the second, each once."""
    home = {i: group for group in groups for i in bits(group)}
    readers = problem.graph.readers
    return list(
        dict.fromkeys(
            (group, home[j])
            for group in groups
            for i in bits(group)
            for j in bits(readers[i] & ~group)
            if j in home
        )
    )
