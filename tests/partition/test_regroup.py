"""Neighbouring groups split anew: legal, ever cheaper, at an end only where no pair gains."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from tests.graphs import Builder
from tests.legal import assert_legal, random_problem
from torch_getfuse.ir import Window
from torch_getfuse.partition.cost.registry import SCHEMES, make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.node_set import bits, topological_order
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.search.merge_resplit import regroup
from torch_getfuse.partition.search.moves import PlanSpace
from torch_getfuse.partition.search.recursive_split import (
    RULES,
    RecursiveSplit,
    all_edges,
    random_edges,
)


def chain(weights: list[int], rows: list[int], buffer_bytes: int) -> FusionProblem:
    """A chain of one-column maps: what a group holds is its weights and a row per tensor."""
    build = Builder()
    at = build.input((1, 1, 8, 1))
    for count, width in zip(weights, rows, strict=True):
        at = build.op("conv", [(at, Window.identity())], (1, width, 8, 1), count)
    return FusionProblem(
        Evaluator(make_scheme("lbdf", build.graph(), "line", 1, 1), buffer_bytes), merge=False
    )


def whole_or_first_fit(problem: FusionProblem, group: int) -> list[int] | None:
    """The whole if it is valid, else the best two valid intervals: what halving a chain gives."""
    if problem.evaluator.valid(group):
        return [group]
    found = []
    for i in list(bits(group))[:-1]:
        parts = [group & ((2 << i) - 1), group & ~((2 << i) - 1)]
        if all(map(problem.evaluator.valid, parts)):
            found.append((problem.cost(parts), parts))
    return min(found)[1] if found else None


def test_a_border_moves_to_where_less_crosses() -> None:
    # Three groups of weights 20 each; the border of 9 channels is cheaper one operator later.
    problem = chain([20, 20, 20, 20], [9, 1, 9, 1], 62)
    plans = list(regroup(problem, [0b0001, 0b1110], lambda u: whole_or_first_fit(problem, u)))
    assert plans == [(0b0011, 0b1100)]
    assert list(regroup(problem, plans[-1], lambda u: whole_or_first_fit(problem, u))) == []


def test_groups_that_fit_together_are_merged() -> None:
    problem = chain([1, 1, 1, 1], [1, 1, 1, 1], 1000)
    plans = list(regroup(problem, [1, 2, 4, 8], lambda u: whole_or_first_fit(problem, u)))
    assert len(plans) == 3
    assert plans[-1] == (0b1111,)


def test_a_union_that_would_make_a_cycle_is_left_alone() -> None:
    """0 and 2 are joined by an edge, and by a path through 1, which is a group of its own."""
    build = Builder()
    x = build.input((1, 1, 4, 4))
    first = build.conv(x, 1)
    middle = build.conv(first, 1)
    build.add(first, middle)
    problem = FusionProblem(
        Evaluator(make_scheme("lbdf", build.graph(), "line", 1, 1), 10_000), merge=False
    )
    asked = []

    def never_three(union: int) -> list[int] | None:
        asked.append(union)
        return [union] if union == 0b101 else None

    assert list(regroup(problem, [1, 2, 4], never_three)) == []
    assert 0b101 in asked


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "single"])
def test_every_plan_on_the_way_is_legal_and_cheaper(scheme: str, merge: bool) -> None:
    rng = Random(f"{scheme} {merge}")
    better = 0
    for n in range(40):
        problem = random_problem(rng, rng.randint(2, 24), scheme, merge)
        plan = PlanSpace(problem).random_plan(rng)
        split = RecursiveSplit(problem, random_edges(problem.graph, 0.6, n))
        plans = [plan, *regroup(problem, plan, split._tree.halve)]
        for before, after in pairwise(plans):
            assert_legal(problem, after)
            assert problem.cost(after) < problem.cost(before)
        better += len(plans) > 1
        last = plans[-1]
        alone = [1 << i for i in bits(problem.unfusable)]
        for one in last:
            for other in last:
                if other <= one or not any(problem.near[i] & other for i in bits(one)):
                    continue
                parts = split._tree.halve(one | other)
                rest = [group for group in last if group not in (one, other)]
                order = topological_order([*rest, *alone, one | other], problem.graph)
                if parts is not None and order is not None:
                    assert problem.cost(parts) >= problem.cost((one, other))
    assert better > 10


@pytest.mark.parametrize("rule", RULES)
def test_direct_with_and_without(rule: str) -> None:
    rng = Random(rule)
    gained = 0
    for _ in range(30):
        problem = random_problem(rng, rng.randint(4, 24))
        split = RecursiveSplit(problem, all_edges(problem.graph), rule)
        plain = split.direct(polish=False)
        polished = split.direct()
        assert plain.dram_bytes == polished.history[0][1]
        costs = [cost for _, cost in polished.history]
        assert costs == sorted(set(costs), reverse=True)
        assert polished.dram_bytes == costs[-1] == problem.cost(polished.groups)
        assert_legal(problem, polished.groups)
        gained += polished.dram_bytes < plain.dram_bytes
    assert gained
