"""NSGA-II: pymoo's algorithm on legal plans."""

from __future__ import annotations

import sys
from itertools import pairwise
from random import Random

import pytest

from tests.brute import brute_force
from tests.legal import assert_legal, assert_runs_in_order, random_problem
from torch_getfuse.errors import OptionError
from torch_getfuse.partition.cost.registry import SCHEMES
from torch_getfuse.partition.problem import SearchInterrupted
from torch_getfuse.partition.search.nsga2 import max_buffer, nsga2_search
from torch_getfuse.partition.search.recursive_split import RecursiveSplit, all_edges


@pytest.fixture
def pymoo() -> None:
    pytest.importorskip("pymoo")


@pytest.mark.usefixtures("pymoo")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_results_are_legal(scheme: str) -> None:
    rng = Random(4)
    for seed in range(25):
        problem = random_problem(rng, rng.randint(1, 30), scheme, rng.random() < 0.5)
        found = nsga2_search(problem, 60, seed)
        assert_legal(problem, found.groups)
        assert_runs_in_order(problem, found.groups)
        assert found.dram_bytes == problem.cost(found.groups)
        assert found.plans <= 60


@pytest.mark.usefixtures("pymoo")
def test_the_front() -> None:
    problem = random_problem(Random(2), 40)
    found = nsga2_search(problem, 300, 0)
    assert len(found.front) > 1
    assert found.front[0][0] == found.dram_bytes
    assert found.front[0][1] <= max_buffer(problem, found.groups)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(found.front))
    assert all(usage < problem.evaluator.buffer_bytes for _, usage in found.front)


@pytest.mark.usefixtures("pymoo")
@pytest.mark.parametrize("budget", [1, 10, 57])
def test_budget_is_spent_exactly(budget: int) -> None:
    calls: list[tuple[int, int]] = []
    problem = random_problem(Random(2), 40)
    found = nsga2_search(problem, budget, 0, progress=lambda *call: calls.append(call))
    assert found.plans == len(calls) == budget
    assert found.stopped == ""


@pytest.mark.usefixtures("pymoo")
def test_ends_where_no_plan_is_new() -> None:
    for operators in (1, 2):
        problem = random_problem(Random(2), operators)
        found = nsga2_search(problem, 500, 0)
        assert found.plans < 500
        assert found.dram_bytes == brute_force(problem.evaluator)[0]


@pytest.mark.usefixtures("pymoo")
def test_one_seed_gives_one_result_and_numpy_is_left_alone() -> None:
    import numpy as np

    np.random.seed(1)
    first = nsga2_search(random_problem(Random(2), 40), 150, 5)
    drawn = np.random.random()
    second = nsga2_search(random_problem(Random(2), 40), 150, 5)
    assert (first.groups, first.history, first.front) == (
        second.groups,
        second.history,
        second.front,
    )
    np.random.seed(1)
    assert drawn == np.random.random()


@pytest.mark.usefixtures("pymoo")
def test_interrupt_and_time_limit_keep_the_best_plan() -> None:
    def progress(plans: int, best: int) -> None:
        if plans == 17:
            raise KeyboardInterrupt

    problem = random_problem(Random(4), 30)
    with pytest.raises(SearchInterrupted) as caught:
        nsga2_search(problem, 1000, 0, progress=progress)
    found = caught.value.result
    assert (found.plans, found.stopped) == (17, "interrupted")
    assert_legal(problem, found.groups)
    found = nsga2_search(problem, 10**9, 0, time_limit=0.1)
    assert found.stopped == "work limit of 150,000 steps for time_limit=0.1 s"
    assert_legal(problem, found.groups)
    at_once = nsga2_search(problem, 100, 0, time_limit=0)
    assert at_once.plans == 1
    assert at_once.front == ((at_once.dram_bytes, max_buffer(problem, at_once.groups)),)


@pytest.mark.usefixtures("pymoo")
def test_against_enumeration() -> None:
    rng = Random(5)
    reached = 0
    for seed in range(20):
        problem = random_problem(rng, rng.randint(3, 8))
        optimum = brute_force(problem.evaluator)[0]
        found = nsga2_search(problem, 200, seed)
        assert found.dram_bytes >= optimum
        reached += found.dram_bytes == optimum
    assert reached >= 18


@pytest.mark.usefixtures("pymoo")
def test_repair_is_used() -> None:
    problem = random_problem(Random(31), 40)
    split = RecursiveSplit(problem, all_edges(problem.graph))
    assert_legal(problem, nsga2_search(problem, 60, 0, repair=split).groups)
    assert split.attempts


def test_without_pymoo(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "pymoo":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pymoo", None)
    with pytest.raises(OptionError, match=r"pip install torch-getfuse\[search\]"):
        nsga2_search(random_problem(Random(1), 4), 10, 0)
