"""The exact search against enumeration of all legal plans."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from unittest.mock import ANY

import pytest

from tests.brute import brute_force
from tests.graphs import Builder, heavy_between, random_graph, wide_graph
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.exact.down_sets import Limits, TooWide, exact
from torch_getfuse.partition.node_set import is_connected, is_convex, neighbours, topological_order
from torch_getfuse.partition.problem import FusionProblem, merge_in_place
from torch_getfuse.partition.work import STEPS_PER_SECOND


def random_evaluator(rng: Random, operators: int, scheme: str) -> Evaluator:
    """A random graph under a buffer that makes some groups, and some operators, invalid."""
    graph = random_graph(rng, operators, rng.choice((3, 6, 10)))
    model = make_scheme(scheme, graph, rng.choice(("line", "pixel")), 1, 1)
    alone = sorted(model.buffer(1 << i, 1 << 30) or 0 for i in range(operators))
    whole = model.buffer((1 << operators) - 1, 1 << 30) or 2 * alone[-1]
    low = max(1, alone[operators // 3])
    return Evaluator(model, rng.randint(low, max(low, whole, alone[-1]) + 1))


def check(evaluator: Evaluator) -> None:
    found = exact(FusionProblem(evaluator))
    assert found.dram_bytes == brute_force(evaluator)[0]
    graph, near = evaluator.graph, neighbours(evaluator.graph)
    alone = [1 << i for i in range(len(graph)) if evaluator.unfusable() >> i & 1]
    assert sum(found.groups) + sum(alone) == (1 << len(graph)) - 1
    assert topological_order([*found.groups, *alone], graph) is not None
    assert all(is_connected(group, near) and evaluator.valid(group) for group in found.groups)
    assert sum(map(evaluator.dram, found.groups)) == found.dram_bytes
    # A known plan, even the optimum itself, only makes it faster.
    assert exact(FusionProblem(evaluator), known=found.dram_bytes) == replace(
        found, seconds=ANY, plans=ANY
    )
    if found.dram_bytes:
        with pytest.raises(ValueError, match="no legal plan has as little"):
            exact(FusionProblem(evaluator), known=found.dram_bytes - 1)


@pytest.mark.parametrize("scheme", ["lbdf", "brr"])
@pytest.mark.parametrize("seed", range(5))
def test_equals_enumeration(scheme: str, seed: int) -> None:
    rng = Random(1000 + seed)
    for _ in range(600):
        check(random_evaluator(rng, rng.randint(1, 8), scheme))


@pytest.mark.parametrize("scheme", ["lbdf", "brr"])
def test_equals_enumeration_on_ten_operators(scheme: str) -> None:
    rng = Random(5)
    for _ in range(50):
        check(random_evaluator(rng, 10, scheme))


def test_in_place_operator_that_connects_two_consumers_is_not_merged() -> None:
    """The tempting reduction of docs/method.md, section 9 that is not lossless."""
    build = Builder()
    act = build.act(build.conv(build.input((1, 2, 8, 8)), 2))
    build.conv(act, 2)
    build.conv(act, 2)
    assert merge_in_place(build.graph(), 0) == (0b0001, 0b0010, 0b0100, 0b1000)


def test_in_place_chain_is_one_block() -> None:
    build = Builder()
    conv = build.conv(build.input((1, 2, 8, 8)), 2)
    build.conv(build.act(build.act(conv)), 2)
    assert merge_in_place(build.graph(), 0) == (0b0111, 0b1000)


def test_in_place_operator_after_another_branch_is_not_merged() -> None:
    """Results are made in the order of the graph: the activation after the other convolution."""
    build = Builder()
    stem = build.conv(build.input((1, 3, 4, 5)), 3, padding=2)
    early = build.conv(stem, 1, kernel=3)
    build.conv(stem, 1, kernel=3, padding=0)
    build.act(early)
    graph = build.graph()
    assert merge_in_place(graph, 0) == (0b0001, 0b0010, 0b0100, 0b1000)
    assert merge_in_place(graph, 0b0100) == (0b0001, 0b1010)  # the other stands in no group
    evaluator = Evaluator(make_scheme("lbdf", graph, "line", 1, 1), 10**6)
    apart, together = (evaluator.buffer(mask) for mask in (0b0111, 0b1111))
    assert apart is not None
    assert together is not None
    assert apart < together
    for buffer_bytes in range(apart, together + 2):
        check(Evaluator(make_scheme("lbdf", graph, "line", 1, 1), buffer_bytes))


def test_what_is_merged_in_place_changes_no_group() -> None:
    """Buffer demand and traffic of each group stay when such an operator joins it."""
    rng = Random(7400)
    joined = 0
    for _ in range(500):
        graph = random_graph(rng, rng.randint(3, 7), rng.choice((3, 6)))
        scheme = make_scheme("lbdf", graph, "line", 1, 1)
        problem = FusionProblem(Evaluator(scheme, 1 << 30))
        last = [mask for mask in problem.blocks if mask & (mask - 1)]
        for block in last:
            late = 1 << (block.bit_length() - 1)
            for group in range(1, 1 << len(graph)):
                if group & block != block & ~late:
                    continue
                both = group, group | late
                if (
                    all(
                        is_connected(mask, problem.near)
                        and is_convex(mask, problem.above, problem.below)
                        for mask in both
                    )
                    and not group & graph.readers[late.bit_length() - 1]
                ):
                    alone, with_it = (scheme.buffer(mask, 1 << 30) for mask in both)
                    assert alone == with_it
                    assert len({scheme.dram(mask, 1 << 30).total for mask in both}) == 1
                    joined += 1
    assert joined > 100


def test_a_path_through_an_unfusable_operator_keeps_its_ends_apart() -> None:
    evaluator = Evaluator(make_scheme("lbdf", heavy_between(), "line", 1, 1), 100)
    assert evaluator.unfusable() == 0b010
    assert exact(FusionProblem(evaluator)).groups == (0b001, 0b100)


@pytest.mark.parametrize("scheme", ["lbdf", "brr"])
def test_where_it_gives_up_it_knows_a_bound(scheme: str) -> None:
    rng = Random(6)
    given_up = raised = 0
    for _ in range(300):
        problem = FusionProblem(random_evaluator(rng, rng.randint(3, 8), scheme))
        optimum = brute_force(problem.evaluator)[0]
        bound = optimum
        try:
            found = exact(problem, limits=Limits(steps=rng.choice((3, 10, 30, 100))))
            assert found.dram_bytes == optimum
        except TooWide as reason:
            bound, given_up = reason.bound, given_up + 1
        assert problem.unavoidable <= bound <= optimum
        raised += problem.unavoidable < bound < optimum
    assert given_up > 30
    assert (raised > 10) == (scheme == "brr")


@pytest.mark.parametrize("seed", range(4))
def test_each_set_is_grown_once_from_each_down_set(seed: int) -> None:
    rng = Random(300 + seed)
    for _ in range(40):
        graph = random_graph(rng, rng.randint(2, 8), 6)
        evaluator = Evaluator(make_scheme("lbdf", graph, "line", 1, 1), 1 << 40)
        near, everything = neighbours(graph), (1 << len(graph)) - 1
        down_sets = [
            done
            for done in range(everything + 1)
            if not any(done >> i & 1 and p & ~done for i, p in enumerate(graph.predecessors))
        ]
        steps = sum(
            not done & ~larger and done != larger and is_connected(larger ^ done, near)
            for done in down_sets
            for larger in down_sets
        )
        problem = FusionProblem(evaluator, merge=False)
        exact(problem, limits=Limits(steps=steps))
        with pytest.raises(TooWide, match=f"more than {steps - 1} groups"):
            exact(problem, limits=Limits(steps=steps - 1))


def test_it_gives_up_early_only_where_little_is_done() -> None:
    wide = FusionProblem(Evaluator(make_scheme("lbdf", wide_graph(), "line", 1, 1), 4096))
    with pytest.raises(TooWide, match="of the operators in 6% of its limits"):
        exact(wide, limits=Limits(seconds=1.0, pace=1.2))
    assert wide.evaluator.work.steps < STEPS_PER_SECOND / 4
    build = Builder()
    end = build.input((1, 4, 24, 24))
    for _ in range(60):
        end = build.conv(end, 4, 3)
    deep = FusionProblem(Evaluator(make_scheme("lbdf", build.graph(), "line", 1, 1), 4096))
    whole = exact(deep)
    seconds = 3 * deep.evaluator.work.steps / STEPS_PER_SECOND
    again = FusionProblem(Evaluator(make_scheme("lbdf", deep.graph, "line", 1, 1), 4096))
    assert exact(again, limits=Limits(seconds=seconds, pace=1.2)).groups == whole.groups
