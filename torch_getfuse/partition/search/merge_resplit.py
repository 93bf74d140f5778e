"""Neighbouring fusion groups put together and split anew, until no two of them gain.

A recursive split decides at each cut with what it knows then: a group that is peeled off early
keeps its borders, whatever becomes of the rest. So at the end every two groups joined by an edge
are looked at once more as the one group that they could have been, and get what Algorithm 1 gives
that group: the whole if it is valid, else the two valid sides of its best cut. The pair that saves
most is taken, until none saves anything. Nothing is drawn at random and no plan gets worse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem

Resplit = Callable[[int], Sequence[int] | None]
"""Valid connected parts of a connected set, split along the order; ``None`` for no such split."""


def regroup(
    problem: FusionProblem, plan: Sequence[int], resplit: Resplit
) -> Iterator[tuple[int, ...]]:
    """Ever cheaper legal plans, each from the one before by one pair of neighbours.

    Args:
        problem: prices the groups.
        plan: valid groups of a legal plan.
        resplit: what to make of the union of two groups; must answer the same whenever asked.
    """
    groups = tuple(plan)
    offers: dict[int, tuple[int, Sequence[int]]] = {}
    while True:
        found = []
        problem.evaluator.work.add(2 * len(problem.graph))
        for one, other in _neighbours(problem, groups):
            union = one | other
            if union not in offers:
                parts = resplit(union)
                offers[union] = (0, ()) if parts is None else (problem.cost(parts), parts)
            cost, parts = offers[union]
            if parts and (saved := problem.cost((one, other)) - cost) > 0:
                found.append((-saved, union, one, other))
        for _, union, one, other in sorted(found):
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
