"""Plans made better in windows, against enumeration and against the exact search."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from tests.brute import brute_force
from tests.graphs import Builder
from tests.legal import assert_legal, single
from tests.partition.test_backward import rereading
from tests.partition.test_exact import random_evaluator
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.exact import windows as module
from torch_getfuse.partition.exact.chains import Chains
from torch_getfuse.partition.exact.down_set_table import DownSets, Window
from torch_getfuse.partition.exact.down_sets import Limits, TooWide, exact
from torch_getfuse.partition.exact.windows import windows
from torch_getfuse.partition.problem import FusionProblem, SearchResult


def check(problem: FusionProblem, known: SearchResult) -> SearchResult:
    found = windows(problem, known)
    assert found.dram_bytes == problem.cost(found.groups) <= known.dram_bytes
    assert (found.lower_bound_bytes, found.stopped) == (0, "")
    assert problem.legal(found.groups)
    assert_legal(FusionProblem(problem.evaluator, merge=False), found.groups)
    assert windows(problem, found).dram_bytes == found.dram_bytes
    return found


@pytest.mark.parametrize("scheme", ["lbdf", "brr"])
def test_one_window_over_everything_finds_the_optimum(scheme: str) -> None:
    rng = Random(3000)
    for _ in range(200):
        problem = FusionProblem(random_evaluator(rng, rng.randint(1, 8), scheme))
        found = check(problem, single(problem))
        assert found.dram_bytes == brute_force(problem.evaluator)[0]


@pytest.mark.parametrize("moves", ["each", "rows", "borders"])
def test_small_windows_are_legal_and_seldom_far_from_the_optimum(
    moves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SIZES", ((4, 40, moves),))
    monkeypatch.setattr(module, "_BORDER", 2)
    rng = Random(3100)
    better = reached = 0
    for _ in range(80):
        problem = FusionProblem(rereading(rng, rng.randint(6, 14)))
        known, optimum = single(problem), exact(problem).dram_bytes
        found = check(problem, known)
        assert optimum <= found.dram_bytes
        better += found.dram_bytes < known.dram_bytes
        reached += found.dram_bytes == optimum
    assert better > 40
    assert reached > 20


def test_what_a_group_starts_with_is_its_producers_again_once_that_is_gone() -> None:
    build = Builder()
    x = build.input((1, 5, 7, 3))
    left = build.act(build.conv(build.conv(x, 1, kernel=3), 1, kernel=3))
    build.conv(build.add(left, build.conv(build.conv(x, 1), 1)), 4)
    graph = build.graph()
    problem = FusionProblem(Evaluator(make_scheme("brr", graph, "line", 1, 1), 1 << 20))
    assert Chains(problem).leading == 0b100
    groups = (0b11, 0b1111100)
    known = SearchResult(groups, problem.cost(groups), 1, 0.0)
    run = module._Windows(problem, known)
    assert [step.own for step in run._steps] == [0b111, 0b1111000]
    assert run._steps[0].group == 0b111
    assert run.plan() == groups
    run._steps[1:] = run._as_steps(0b111, [0b11000, 0b100000, 0b1000000])
    assert problem.legal(run.plan())
    check(problem, known)


def _wide(branches: int, depth: int) -> OpGraph:
    """Rows of convolutions beside each other, joined and forked twice."""
    build = Builder()
    source = build.conv(build.input((1, 16, 16, 16)), 32)
    for _ in range(3):
        ends = []
        for _ in range(branches):
            end = source
            for _ in range(depth):
                end = build.conv(end, 32, 3)
            ends.append(end)
        source = build.add(*ends)
    return build.graph()


@pytest.mark.parametrize("scheme", ["lbdf", "brr"])
def test_a_graph_that_is_too_wide_to_be_proved(scheme: str) -> None:
    graph = _wide(4, 4)
    problem, again = (
        FusionProblem(Evaluator(make_scheme(scheme, graph, "line", 1, 1), 48 * 1024))
        for _ in range(2)
    )
    known = single(problem)
    found = check(problem, known)
    assert found.dram_bytes < known.dram_bytes
    assert replace(windows(again, known), seconds=found.seconds) == found


def test_at_a_limit_it_keeps_what_it_found() -> None:
    problem = FusionProblem(Evaluator(make_scheme("brr", _wide(4, 4), "line", 1, 1), 48 * 1024))
    known = single(problem)
    whole = windows(problem, known)
    reached = set()
    for seconds in (1e-4, 0.1, 0.3, 0.6):
        found = windows(problem, known, Limits(seconds=seconds))
        assert found.stopped.startswith("work limit")
        assert whole.dram_bytes <= found.dram_bytes <= known.dram_bytes
        assert problem.legal(found.groups)
        reached.add(found.dram_bytes)
    assert len(reached) > 1


def test_rows_of_a_branch_are_one_block() -> None:
    problem = FusionProblem(Evaluator(make_scheme("brr", _wide(2, 3), "line", 1, 1), 1 << 20))
    chains = Chains(problem)
    rows = chains.rows(chains.everything)
    assert sorted(row.bit_count() for row in rows) == [1, 1, 1, 1, *6 * [3]]
    whole = Window(chains.start, chains.everything, 100)
    fine = DownSets(problem, chains, whole).masks
    coarse = DownSets(problem, chains.coarser(rows), whole).masks
    assert set(coarse) < set(fine)
    # Nothing, a convolution, and after it 4 sets of 2 rows; thrice, each with its addition.
    assert len(coarse) == 2 + 3 * 4


def test_blocks_that_wait_for_each_other_are_refused() -> None:
    build = Builder()
    first = build.conv(build.input((1, 8, 8, 8)), 8)
    build.conv(build.conv(first, 8), 8)
    graph = build.graph()
    problem = FusionProblem(Evaluator(make_scheme("brr", graph, "line", 1, 1), 1 << 20))
    chains = Chains(problem).coarser([0b101])
    with pytest.raises(TooWide, match="wait for each other"):
        DownSets(problem, chains, Window(chains.start, chains.everything, 100))
