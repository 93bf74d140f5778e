"""Operators that must run one after the other although no tensor joins them (``Op.after``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.brute import brute_force
from tests.graphs import Builder, with_order
from tests.legal import assert_legal, assert_runs_in_order, random_problem, single
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.exact.down_sets import exact
from torch_getfuse.partition.node_set import is_connected, is_convex
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.search.moves import PlanSpace
from torch_getfuse.partition.search.recursive_split import all_edges, direct, random_edges
from torch_getfuse.partition.wide.group_cover import cover
from torch_getfuse.partition.wide.legal_groups import list_groups

SHARES = (0.3, 0.7)


def crossed_chains() -> FusionProblem:
    """Two chains of two; the second operator of each must run after the first of the other."""
    build = Builder()
    first = [build.conv(build.input((1, 2, 4, 4)), 2) for _ in range(2)]
    last = [build.conv(source, 2) for source in first]
    build.add(*last)
    graph = with_after(build.graph(), {last[0]: (first[1],), last[1]: (first[0],)})
    return FusionProblem(Evaluator(make_scheme("lbdf", graph, "line", 1, 1), 1 << 20))


def with_after(graph: OpGraph, after: Mapping[str, tuple[str, ...]]) -> OpGraph:
    ops = tuple(replace(op, after=after.get(op.name, ())) for op in graph.ops)
    return replace(graph, ops=ops)


def test_parts_of_a_set_can_run_one_after_another() -> None:
    problem = crossed_chains()
    both = 0b1111  # two components, each of which waits for the other
    assert problem.parts(both) == [0b0001, 0b0010, 0b0100, 0b1000]
    assert problem.parts(0b0101) == [0b0101]
    assert_legal(problem, [*problem.parts(both), 0b10000])


@settings(deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(2, 8),
    st.sampled_from(SHARES),
    st.sampled_from(("lbdf", "brr")),
)
def test_exact_is_the_optimum_by_enumeration(
    seed: int, size: int, share: float, scheme: str
) -> None:
    problem = random_problem(Random(seed), size, scheme, order=share)
    found = exact(problem)
    cost, _ = brute_force(problem.evaluator)
    assert found.dram_bytes == found.lower_bound_bytes == cost
    assert_legal(FusionProblem(problem.evaluator, merge=False), found.groups)
    assert_runs_in_order(problem, found.groups)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 8), st.sampled_from(SHARES))
def test_bounds_stay_below_the_optimum(seed: int, size: int, share: float) -> None:
    problem = random_problem(Random(seed), size, order=share)
    cost, _ = brute_force(problem.evaluator)
    for most in (1 << 20, 1):  # by the list of all groups; by the automaton
        found = cover(problem, single(problem), most=most)
        assert found.lower_bound_bytes <= cost <= found.dram_bytes
        assert_legal(problem, found.groups)
        assert_runs_in_order(problem, found.groups)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 7), st.sampled_from(SHARES))
def test_list_has_every_legal_group(seed: int, size: int, share: float) -> None:
    problem = random_problem(Random(seed), size, order=share)
    blocks = problem.blocks
    every = set()
    for choice in range(1, 1 << len(blocks)):
        mask = sum(block for k, block in enumerate(blocks) if choice >> k & 1)
        legal = is_connected(mask, problem.near) and is_convex(mask, problem.above, problem.below)
        if legal and problem.evaluator.valid(mask):
            every.add(mask)
    assert set(list_groups(problem).groups) == every


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 9), st.sampled_from(SHARES), st.booleans())
def test_searches_stay_among_legal_plans(seed: int, size: int, share: float, merge: bool) -> None:
    rng = Random(seed)
    problem = random_problem(rng, size, merge=merge, order=share)
    space = PlanSpace(problem)
    plans = [space.random_plan(rng) for _ in range(3)]
    for plan in list(plans):
        plans.append(space.edited(plan, rng))
        plans.append(space.repaired(space.crossed(plan, plans[0], rng), rng))
    for ranker in (all_edges(problem.graph), random_edges(problem.graph, seed=seed)):
        plans.append(direct(problem, ranker).groups)
    for plan in plans:
        assert_legal(problem, plan)


@pytest.mark.parametrize("share", SHARES)
def test_orders_are_part_of_the_graph_and_its_file(share: float) -> None:
    problem = random_problem(Random(5), 8, order=share)
    graph = problem.graph
    assert graph.ordered
    again = type(graph).from_dict(graph.to_dict())
    assert again == graph
    assert again.fingerprint == graph.fingerprint
    assert with_after(graph, {}).fingerprint != graph.fingerprint
    assert with_order(Random(0), graph, 0.0) is graph
