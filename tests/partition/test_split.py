"""The recursive tree split: legal, bounded, remembered, and Algorithm 1's choices by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest

from tests.brute import brute_force
from tests.graphs import Builder, heavy_between
from tests.legal import assert_legal, assert_runs_in_order, random_problem
from torch_getfuse.errors import OptionError
from torch_getfuse.ir import Window
from torch_getfuse.partition.cost.registry import SCHEMES, make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.node_set import bits, is_connected
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.search.edge_cuts import Edge
from torch_getfuse.partition.search.local import local_search
from torch_getfuse.partition.search.moves import PlanSpace
from torch_getfuse.partition.search.random import random_search
from torch_getfuse.partition.search.recursive_split import (
    RULES,
    EdgeRanker,
    RecursiveSplit,
    all_edges,
    convex_parts,
    direct,
    group_edges,
    random_edges,
)


def weighty(weights: Sequence[int], buffer_bytes: int) -> FusionProblem:
    """A chain over one pixel: a group needs its weights and a byte per tensor."""
    build = Builder()
    at = build.input((1, 1, 1, 1))
    for count in weights:
        at = build.op("conv", [(at, Window.identity())], (1, 1, 1, 1), count)
    return FusionProblem(
        Evaluator(make_scheme("lbdf", build.graph(), "line", 1, 1), buffer_bytes), merge=False
    )


def fixed(edges: Sequence[Edge]) -> EdgeRanker:
    def rank(group: int) -> list[tuple[Edge, float]]:
        return [((i, j), 1.0) for i, j in edges if group >> i & group >> j & 1]

    return rank


# -- legality ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rule", RULES)
def test_direct_is_legal_and_not_below_the_optimum(scheme: str, rule: str) -> None:
    rng = Random(f"{scheme} {rule}")
    for n in range(80):
        problem = random_problem(rng, rng.randint(1, 24), scheme, rng.random() < 0.5)
        graph = problem.graph
        ranker = rng.choice((all_edges(graph), random_edges(graph, 0.3, n), fixed([])))
        found = direct(problem, ranker, rule)
        assert_legal(problem, found.groups)
        assert_runs_in_order(problem, found.groups)
        assert found.dram_bytes == problem.cost(found.groups)
        if len(graph) <= 7:
            assert found.dram_bytes >= brute_force(problem.evaluator)[0]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "single"])
def test_repairs_are_legal(scheme: str, merge: bool) -> None:
    rng = Random(f"{scheme} {merge}")
    answers = 0
    for n in range(80):
        problem = random_problem(rng, rng.randint(2, 24), scheme, merge)
        split = RecursiveSplit(problem, random_edges(problem.graph, 0.3, n), rng.choice(RULES))

        class Checked:
            name = "checked"

            def __call__(
                self,
                group: int,
                rng: Random,
                problem: FusionProblem = problem,
                split: RecursiveSplit = split,
            ) -> list[int] | None:
                nonlocal answers
                found = split(group, rng)
                assert found is not None  # an invalid group has two blocks and an edge between
                assert sum(found) == group
                assert all(is_connected(part, problem.near) for part in found)
                assert all(map(problem.evaluator.valid, found))
                answers += 1
                return found

        space = PlanSpace(problem, Checked())
        plan = space.random_plan(rng)
        assert_legal(problem, plan)
        for _ in range(5):
            plan = space.edited(plan, rng)
            assert_legal(problem, plan)
        assert split.rectified <= split.attempts
    assert answers > 50


@pytest.mark.parametrize("search", [random_search, local_search])
def test_as_repair_of_a_search(search: type) -> None:
    problem = random_problem(Random(31), 40)
    split = RecursiveSplit(problem, random_edges(problem.graph, 0.2))
    found = search(problem, 100, 0, repair=split)
    assert_legal(problem, found.groups)
    assert 0 < split.rectified <= split.attempts
    assert split.rectify_rate == split.rectified / split.attempts


def test_all_edges_rectify_everything() -> None:
    problem = random_problem(Random(31), 40)
    split = RecursiveSplit(problem, all_edges(problem.graph))
    local_search(problem, 60, 0, repair=split)
    assert split.attempts
    assert split.rectify_rate == 1.0


# -- unfusable operators ----------------------------------------------------------------------


def test_a_group_around_an_unfusable_operator_is_cut_there() -> None:
    problem = FusionProblem(Evaluator(make_scheme("lbdf", heavy_between(), "line", 1, 1), 100))
    split = RecursiveSplit(problem, all_edges(problem.graph))
    assert problem.evaluator.valid(0b101)
    assert split(0b101, Random(0)) == [0b001, 0b100]
    assert split.direct().groups == (0b001, 0b100)


def test_branches_that_wait_for_each_other_through_unfusable_operators() -> None:
    """Each branch alone is convex; together, with two unfusable operators, they are a cycle."""
    build = Builder()
    x, y = build.input((1, 1, 4, 4)), build.input((1, 1, 4, 4))

    def heavy(source: str) -> str:
        return build.op("conv", [(source, Window.identity())], (1, 1, 4, 4), weights=1000)

    a, c = build.conv(x, 1), build.conv(y, 1)
    u, v = heavy(a), heavy(c)
    b, d = build.conv(u, 1), build.conv(v, 1)
    build.add(a, d)
    build.add(c, b)
    problem = FusionProblem(Evaluator(make_scheme("lbdf", build.graph(), "line", 1, 1), 100))
    assert len(list(bits(problem.unfusable))) == 2
    parts = convex_parts(problem, problem.fusable)
    assert_legal(problem, parts, valid=False)
    assert_legal(problem, direct(problem, all_edges(problem.graph)).groups)


def test_blocks_are_not_torn_at_unfusable_operators() -> None:
    """An activation stands after the unfusable operator that its producer stands before."""
    build = Builder()
    x = build.input((1, 1, 4, 4))
    a = build.conv(x, 1)
    first = build.conv(a, 1)
    heavy = build.op("conv", [(a, Window.identity())], (1, 1, 4, 4), weights=1000)
    build.add(build.act(first), heavy)
    problem = FusionProblem(Evaluator(make_scheme("lbdf", build.graph(), "line", 1, 1), 100))
    assert (problem.unfusable, problem.blocks[1]) == (0b00100, 0b01010)
    assert convex_parts(problem, problem.fusable) == [0b01011, 0b10000]
    for seconds in (0, None):
        found = RecursiveSplit(problem, all_edges(problem.graph)).direct(seconds)
        assert_legal(problem, found.groups)


# -- Algorithm 1 ------------------------------------------------------------------------------


def test_category_1_takes_the_least_traffic() -> None:
    build = Builder()
    wide = build.op("conv", [(build.input((1, 1, 1, 1)), Window.identity())], (1, 9, 1, 1), 10)
    narrow = build.op("conv", [(wide, Window.identity())], (1, 1, 1, 1), 10)
    build.op("conv", [(narrow, Window.identity())], (1, 1, 1, 1), 10)
    problem = FusionProblem(Evaluator(make_scheme("lbdf", build.graph(), "line", 1, 1), 40))
    # Cutting behind 0 leaves groups of 20 and 31 bytes, behind 1 of 31 and 12: both valid.
    split = RecursiveSplit(problem, all_edges(problem.graph))
    assert split(0b111, Random(0)) == [0b011, 0b100]


@pytest.mark.parametrize(
    ("rule", "first"), [("most_operators", 0b00111), ("least_traffic", 0b00001)]
)
def test_category_2_goes_by_the_rule(rule: str, first: int) -> None:
    build = Builder()
    at = build.input((1, 1, 1, 1))
    for channels, weights in ((1, 5), (9, 5), (9, 5), (9, 60), (1, 60)):
        at = build.op("conv", [(at, Window.identity())], (1, channels, 1, 1), weights)
    problem = FusionProblem(Evaluator(make_scheme("lbdf", build.graph(), "line", 1, 1), 90))
    # Valid sides: {0}, {0, 1, 2} and {4}; added traffic per operator 2, 18 / 3 and 18 bytes.
    split = RecursiveSplit(problem, fixed([(0, 1), (2, 3), (3, 4)]), rule)
    found = split(0b11111, Random(0))
    assert found is not None
    assert found[0] == first


def test_category_3_recurses_on_both_sides() -> None:
    problem = weighty([10] * 8, 34)  # three at most: 3 * 10 + 4 tensors is one too many
    split = RecursiveSplit(problem, all_edges(problem.graph))
    found = split(0b11111111, Random(0))
    assert found == [0b11, 0b1100, 0b110000, 0b11000000]


def test_rectified_means_by_its_own_edges() -> None:
    problem = weighty([10] * 4, 34)
    one_edge = {0b1111: [((0, 1), 1.0)], 0b1110: [((1, 2), 1.0)]}
    split = RecursiveSplit(problem, lambda group: one_edge[group])
    assert split(0b1111, Random(0)) == [0b0001, 0b0010, 0b1100]
    assert (split.attempts, split.rectified, split.queries) == (1, 0, 2)
    own = RecursiveSplit(problem, fixed([(0, 1), (1, 2)]))
    assert own(0b1111, Random(0)) == [0b0011, 0b1100]
    assert (own.attempts, own.rectified, own.queries) == (1, 1, 1)


def test_no_cut_no_answer() -> None:
    problem = weighty([10] * 4, 34)
    split = RecursiveSplit(problem, fixed([]))
    assert split(0b1111, Random(0)) is None
    assert split(0b0011, Random(0)) == [0b0011]
    assert (split.attempts, split.rectified) == (1, 0)
    assert_legal(problem, split.direct().groups)


def test_a_cut_through_a_block_moves_to_its_end() -> None:
    build = Builder()
    first = build.act(build.conv(build.input((1, 1, 1, 1)), 1))
    build.act(build.conv(first, 1))
    model = make_scheme("lbdf", build.graph(), "line", 1, 1)
    problem = FusionProblem(Evaluator(model, 6))
    assert problem.blocks == (0b0011, 0b1100)
    for edge in ((0, 1), (1, 2), (2, 3)):
        split = RecursiveSplit(problem, fixed([edge]))
        assert split(0b1111, Random(0)) == [0b0011, 0b1100]


# -- bounds and memory ------------------------------------------------------------------------


@pytest.mark.parametrize("ranked", ["all", "random"])
def test_ends_on_sixty_operators(ranked: str) -> None:
    rng = Random(6)
    for seed in range(6):
        problem = random_problem(rng, 60)
        graph = problem.graph
        asked: Counter[int] = Counter()
        inner = all_edges(graph) if ranked == "all" else random_edges(graph, 0.4, seed)

        def ranker(
            group: int, asked: Counter[int] = asked, inner: EdgeRanker = inner
        ) -> list[tuple[Edge, float]]:
            asked[group] += 1
            return inner(group)

        split = RecursiveSplit(problem, ranker, branch=4)
        assert_legal(problem, split.direct().groups)
        assert max(asked.values(), default=1) == 1
        assert split.queries == sum(asked.values()) <= 4 * 4 * 60


def test_a_long_chain_that_loses_one_operator_at_a_time() -> None:
    problem = weighty([10] * 1200, 14)  # singles only: twelve bytes each

    def last_edge(group: int) -> list[tuple[Edge, float]]:
        return [(group_edges(problem.graph, group)[0], 1.0)]

    assert len(direct(problem, last_edge).groups) == 1200


def test_answers_are_remembered() -> None:
    problem = weighty([10] * 20, 34)
    split = RecursiveSplit(problem, random_edges(problem.graph, 0.2))
    first = split(problem.fusable, Random(0))
    assert first is not None
    queries = split.queries
    first.clear()  # the caller's list is its own
    again = split(problem.fusable, Random(1))
    assert again
    assert (split.queries, split.attempts) == (queries, 1)


def test_random_edges_do_not_depend_on_what_was_asked_before() -> None:
    problem = weighty([10] * 30, 34)
    one, other = (random_edges(problem.graph, 0.3, seed=4) for _ in range(2))
    groups = [(1 << n) - 1 for n in range(2, 30)]
    forwards = [one(group) for group in groups]
    assert forwards == [other(group) for group in reversed(groups)][::-1]
    assert all(len(edges) == max(1, round(0.3 * n)) for n, edges in enumerate(forwards, 1))
    scores = [score for _, score in forwards[-1]]
    assert scores == sorted(scores, reverse=True)


def test_options_are_checked() -> None:
    problem = weighty([1, 1], 34)
    with pytest.raises(OptionError, match="did you mean 'least_traffic'"):
        RecursiveSplit(problem, fixed([]), rule="least-traffic")
    with pytest.raises(OptionError, match="branch=0"):
        RecursiveSplit(problem, fixed([]), branch=0)
