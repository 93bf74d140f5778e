"""Cuts: both sides closed under the order, the ends of the edge apart."""

from __future__ import annotations

from random import Random

import pytest

from tests.graphs import Builder, random_graph
from tests.legal import random_problem
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.node_set import ancestors, bits, descendants, is_convex
from torch_getfuse.partition.search.edge_cuts import edge_cuts
from torch_getfuse.partition.search.moves import PlanSpace


def cuts(graph: OpGraph, group: int, edge: tuple[int, int]) -> list[int]:
    return edge_cuts(group, edge, ancestors(graph), descendants(graph))


@pytest.mark.parametrize("seed", range(4))
def test_cuts_separate_and_are_closed(seed: int) -> None:
    rng = Random(seed)
    for _ in range(40):
        problem = random_problem(rng, rng.randint(2, 20))
        graph, above, below = problem.graph, problem.above, problem.below
        for group in PlanSpace(problem).random_plan(rng):
            edges = [(i, j) for i in bits(group) for j in bits(graph.successors[i] & group)]
            for i, j in edges:
                found = edge_cuts(group, (i, j), above, below)
                assert len(set(found)) == len(found)
                assert found[0] == group & ((2 << i) - 1)
                for upper in found:
                    assert upper & ~group == 0
                    assert upper >> i & 1
                    assert not upper >> j & 1
                    # Both sides: nothing above depends on what is below.
                    assert all(not above[m] & group & ~upper for m in bits(upper))
                    assert is_convex(upper, above, below)
                    assert is_convex(group & ~upper, above, below)


def test_a_skip_goes_with_the_edge_that_it_spans() -> None:
    build = Builder()
    first = build.conv(build.input((1, 1, 4, 4)), 1)
    second = build.conv(first, 1)
    build.add(second, first)
    graph = build.graph()
    assert cuts(graph, 0b111, (0, 1)) == [0b001]
    # The skip itself: above or below the convolution that stands beside it.
    assert cuts(graph, 0b111, (0, 2)) == [0b001, 0b011]


def test_parallel_branches_stay_whole_on_either_side() -> None:
    build = Builder()
    stem = build.conv(build.input((1, 1, 4, 4)), 1)
    left, right = build.conv(stem, 1), build.conv(stem, 1)
    left, right = build.conv(left, 1), build.conv(right, 1)
    build.add(left, right)
    # stem 0, left 1 and 3, right 2 and 4, sum 5; the edge inside the left branch
    found = cuts(build.graph(), 0b111111, (1, 3))
    assert found == [
        0b000011,  # numbered up to 1
        0b000111,  # numbered up to 2: both branches half-way
        # 1 and its ancestors: as the first
        0b010111,  # all but 3 and its descendants: the right branch whole
    ]


def test_what_is_no_edge_of_the_group_is_refused() -> None:
    graph = random_graph(Random(1), 6)
    with pytest.raises(ValueError, match="not an edge of the group"):
        cuts(graph, 0b111, (0, 4))
    with pytest.raises(ValueError, match="not an edge of the group"):
        cuts(graph, 0b111, (1, 0))
