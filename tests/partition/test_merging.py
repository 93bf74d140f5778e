"""Greedy merging: legal, never worse than single blocks, and what each merge must be."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest

from tests.brute import brute_force
from tests.graphs import Builder
from tests.legal import assert_legal, single
from tests.partition.test_backward import rereading
from tests.partition.test_exact import random_evaluator
from torch_getfuse.options import Options
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.merging import merge_greedily
from torch_getfuse.partition.node_set import is_connected
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.planner import plan_graph


@pytest.mark.parametrize("scheme", ["lbdf", "brr"])
def test_no_two_neighbours_are_left_that_would_save_anything(scheme: str) -> None:
    rng = Random(4000)
    merged = reached = 0
    for _ in range(300):
        problem = FusionProblem(random_evaluator(rng, rng.randint(1, 10), scheme))
        found = merge_greedily(problem)
        assert found.dram_bytes == problem.cost(found.groups) <= single(problem).dram_bytes
        assert (found.lower_bound_bytes, found.stopped) == (0, "")
        assert_legal(FusionProblem(problem.evaluator, merge=False), found.groups)
        for one, other in combinations(found.groups, 2):
            union = one | other
            if not is_connected(union, problem.near) or not problem.evaluator.valid(union):
                continue
            rest = [group for group in found.groups if group not in (one, other)]
            saved = problem.cost((one, other)) - problem.cost((union,))
            assert saved <= 0 or problem.order([*rest, union]) is None
        merged += len(found.groups) < len(problem.blocks)
        reached += found.dram_bytes == brute_force(problem.evaluator)[0]
    assert merged > 100
    assert reached > 100


def test_a_merge_around_another_group_waits_for_it() -> None:
    """The branches save most with the fork, but not before the pool between them has joined."""
    build = Builder()
    fork = build.conv(build.input((1, 64, 8, 8)), 64)
    side = build.conv(build.conv(fork, 4), 64)
    build.add(fork, side)
    problem = FusionProblem(Evaluator(make_scheme("lbdf", build.graph(), "line", 1, 1), 1 << 20))
    found = merge_greedily(problem)
    assert found.groups == (0b1111,)
    assert found.dram_bytes == problem.unavoidable


def test_at_a_limit_the_plan_by_then() -> None:
    rng = Random(4100)
    sizes = set()
    for seconds in (1e-6, 1e-3, 3e-3, 1.0):
        problem = FusionProblem(rereading(rng, 40))
        found = merge_greedily(problem, seconds)
        assert problem.legal(found.groups)
        assert bool(found.stopped) == (seconds < 1)
        sizes.add(len(found.groups) == len(problem.blocks))
    assert sizes == {True, False}


def test_the_planner_starts_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_getfuse.group_planner._FEW_STEPS", 1)
    build = Builder()
    at = build.input((1, 8, 16, 16))
    for _ in range(4):
        at = build.add(build.conv(build.conv(at, 8, 3), 8, 3), build.conv(at, 8))
    plan = plan_graph(build.graph(), Options(buffer=4096, explainer=None, cache=False))
    methods = [stage.method for stage in plan.stages]
    assert methods == ["merging", "windows", "exact"]
    bytes_then = [stage.dram_bytes for stage in plan.stages]
    assert bytes_then == sorted(bytes_then, reverse=True)
    assert plan.proof == "optimal"
