"""The choice of groups: cycles among legal groups are cut off, and broken where time ends."""

from __future__ import annotations

from random import Random

from tests.brute import brute_force
from tests.graphs import Builder
from tests.legal import assert_legal, assert_runs_in_order, random_problem, single
from torch_getfuse.partition.choice import choose, find_cycles, split_cycles
from torch_getfuse.partition.columns import Columns
from torch_getfuse.partition.cost import Evaluator
from torch_getfuse.partition.listing import list_groups
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.schemes import make_scheme


def crossing(rng: Random, width: int) -> FusionProblem:
    """``width`` convolutions, then as many additions, each of two of them."""
    build = Builder()
    maps = [build.conv(build.input((1, 2, 8, 8)), 2) for _ in range(width)]
    for _ in range(width):
        build.add(*rng.sample(maps, 2))
    return FusionProblem(Evaluator(make_scheme("lbdf", build.graph(), "line", 1, 1), 1 << 20))


def chosen(problem: FusionProblem, groups: tuple[int, ...]) -> tuple[int, ...]:
    """The cheapest choice, or the plan of single blocks."""
    found = [problem.blocks, *choose(Columns(problem), groups, single(problem))]
    costs = [problem.cost(plan) for plan in found]
    assert costs == sorted(set(costs), reverse=True)
    return found[-1]


def test_a_cycle_of_two_groups() -> None:
    """Two additions of the same two maps, each fused with one of the convolutions."""
    problem = crossing(Random(0), 2)
    tangled = (0b0101, 0b1010)
    assert find_cycles(problem, tangled) == [[(0b0101, 2, 0), (0b1010, 3, 1)]]
    assert_legal(problem, split_cycles(problem, tangled))
    groups = (*problem.blocks, *tangled)
    plan = chosen(problem, groups)
    assert_legal(problem, plan)
    assert len(plan) == 3  # one of the two can stay


def test_agrees_with_enumeration() -> None:
    rng = Random(7000)
    for _ in range(80):
        problem = random_problem(rng, rng.randint(2, 8))
        if not problem.blocks:
            continue
        listed = list_groups(problem)
        groups = tuple(dict.fromkeys([*problem.blocks, *listed.groups]))
        plan = chosen(problem, groups)
        assert_legal(problem, plan)
        assert_runs_in_order(problem, plan)
        assert problem.cost(plan) == brute_force(problem.evaluator)[0]


def test_covers_with_cycles_are_split() -> None:
    rng = Random(7100)
    tangled = 0
    for _ in range(100):
        problem = crossing(rng, rng.randint(2, 6))
        graph = problem.graph
        cover, covered = [], 0
        for i in rng.sample(range(len(graph)), len(graph)):
            makers = graph.predecessors[i] & ~covered
            group = 1 << i | (makers & -makers)
            if not group & covered:
                cover.append(group)
                covered |= group
        tangled += bool(find_cycles(problem, cover))
        assert_legal(problem, split_cycles(problem, cover))
    assert tangled > 10


def test_no_time() -> None:
    problem = crossing(Random(0), 3)
    known = single(problem)
    assert list(choose(Columns(problem), problem.blocks, known, 0.0)) == []
