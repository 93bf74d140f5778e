"""Random and local search: every plan legal, the protocol kept, the optimum within reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from random import Random

import pytest

from tests.brute import brute_force
from tests.determinism import outputs_of_hash_seeds
from tests.graphs import Builder
from tests.legal import assert_legal, assert_runs_in_order, random_problem
from torch_getfuse.errors import OptionError
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.registry import SCHEMES, make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.node_set import is_connected, topological_order
from torch_getfuse.partition.problem import FusionProblem, SearchInterrupted, SearchResult
from torch_getfuse.partition.search.local import local_search
from torch_getfuse.partition.search.moves import Plan, PlanSpace
from torch_getfuse.partition.search.random import random_search
from torch_getfuse.partition.search.random_split import RandomSplit

SEARCHES = (random_search, local_search)
Search = Callable[..., SearchResult]


def fused(graph: OpGraph, buffer_bytes: int = 1 << 20, merge: bool = True) -> FusionProblem:
    return FusionProblem(Evaluator(make_scheme("lbdf", graph, "line", 1, 1), buffer_bytes), merge)


def chain(operators: int) -> OpGraph:
    """Convolutions of two weights each over one pixel."""
    build = Builder()
    at = build.input((1, 1, 1, 1))
    for _ in range(operators):
        at = build.conv(at, 1)
    return build.graph()


# -- legality ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "single"])
def test_every_plan_is_legal(scheme: str, merge: bool) -> None:
    rng = Random(f"{scheme} {merge}")
    for _ in range(150):
        problem = random_problem(rng, rng.randint(1, 24), scheme, merge)
        space = PlanSpace(problem)
        plan = space.random_plan(rng)
        assert_legal(problem, plan)
        for _ in range(6):
            other = space.random_plan(rng)
            crossed = space.crossed(plan, other, rng)
            assert_legal(problem, crossed, valid=False)
            assert_legal(problem, space.repaired(crossed, rng))
            plan = space.edited(plan, rng)
            assert_legal(problem, plan)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_block_fits_alone(scheme: str) -> None:
    """What lets random splitting end at single blocks."""
    rng = Random(3)
    for _ in range(300):
        problem = random_problem(rng, rng.randint(1, 16), scheme)
        assert all(map(problem.evaluator.valid, problem.blocks))


@pytest.mark.parametrize("search", SEARCHES)
def test_results_are_legal_and_run_in_order(search: Search) -> None:
    rng = Random(8)
    for seed in range(60):
        problem = random_problem(rng, rng.randint(1, 40), rng.choice(SCHEMES), rng.random() < 0.5)
        found = search(problem, 25, seed)
        assert_legal(problem, found.groups)
        assert_runs_in_order(problem, found.groups)
        assert found.dram_bytes == problem.cost(found.groups)


def every_plan(graph: OpGraph) -> Iterator[Plan]:
    """All legal plans of a graph in which any group is valid."""
    near = fused(graph).near

    def extend(left: int, groups: list[int]) -> Iterator[Plan]:
        if not left:
            if topological_order(groups, graph) is not None:
                yield tuple(sorted(groups))
            return
        first, rest = left & -left, left & (left - 1)
        more = rest
        while True:
            if is_connected(first | more, near):
                yield from extend(rest & ~more, [*groups, first | more])
            if not more:
                return
            more = (more - 1) & rest

    yield from extend((1 << len(graph)) - 1, [])


def residual() -> OpGraph:
    build = Builder()
    x = build.conv(build.input((1, 2, 4, 4)), 2)
    left, right = build.conv(build.conv(x, 2), 2), build.conv(x, 2)
    build.add(left, right, x)
    return build.graph()


def test_random_plans_reach_every_legal_plan() -> None:
    graph = residual()
    wanted = set(every_plan(graph))
    assert len(wanted) > 10
    space, rng = PlanSpace(fused(graph)), Random(0)
    assert {space.random_plan(rng) for _ in range(3000)} == wanted


def test_edits_reach_every_legal_plan() -> None:
    graph = residual()
    space, rng = PlanSpace(fused(graph)), Random(0)
    plan = space.random_plan(rng)
    met = {plan}
    for _ in range(3000):
        plan = space.edited(plan, rng)
        met.add(plan)
    assert met == set(every_plan(graph))


def test_two_convex_groups_that_wait_for_each_other() -> None:
    build = Builder()
    x, y = build.input((1, 1, 4, 4)), build.input((1, 1, 4, 4))
    a, b = build.conv(x, 1), build.conv(y, 1)
    c, d = build.conv(a, 1), build.conv(b, 1)
    build.add(a, d)
    build.add(b, c)
    space = PlanSpace(fused(build.graph()))
    # {a, d, a + d} reads b, and {b, c, b + c} reads a.
    assert space.order((0b011001, 0b100110)) is None
    assert space.order((0b000101, 0b001010, 0b010000, 0b100000)) is not None


# -- protocol ---------------------------------------------------------------------------------


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("budget", [1, 9, 10, 11, 57])
def test_budget_is_spent_exactly(search: Search, budget: int) -> None:
    calls: list[tuple[int, int]] = []
    problem = random_problem(Random(4), 20)
    found = search(problem, budget, 0, progress=lambda *call: calls.append(call))
    assert found.plans == budget
    assert [plans for plans, _ in calls] == list(range(1, budget + 1))
    assert calls[-1][1] == found.dram_bytes
    assert found.stopped == ""


@pytest.mark.parametrize("search", SEARCHES)
def test_budget_is_spent_where_there_is_one_plan(search: Search) -> None:
    found = search(fused(chain(1)), 30, 0)
    assert (found.plans, found.groups) == (30, (1,))


@pytest.mark.parametrize("search", SEARCHES)
def test_history_falls_to_the_best(search: Search) -> None:
    found = search(random_problem(Random(6), 30), 200, 1)
    assert found.history[0][0] == 1
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(found.history))
    assert found.history[-1][1] == found.dram_bytes


@pytest.mark.parametrize("search", SEARCHES)
def test_one_seed_gives_one_result(search: Search) -> None:
    problems = [random_problem(Random(2), 40) for _ in range(2)]
    first, second = (search(problem, 150, 5) for problem in problems)
    again = search(problems[0], 150, 5)  # with a memo that knows the groups already
    for other in (second, again):
        assert other.groups == first.groups
        assert other.history == first.history


def test_no_dependence_on_hashes() -> None:
    code = (
        "from random import Random; from tests.legal import random_problem;"
        "from torch_getfuse.partition.search.local import local_search;"
        "from torch_getfuse.partition.search.random import random_search;"
        "p = random_problem(Random(2), 30);"
        "print([(r.groups, r.history) for r in (f(p, 80, 3) for f in"
        " (local_search, random_search))])"
    )
    outputs = outputs_of_hash_seeds(code)
    assert len(outputs) == 1


@pytest.mark.parametrize("search", SEARCHES)
def test_time_limit(search: Search) -> None:
    problem = random_problem(Random(4), 30)
    found = search(problem, 10**9, 0, time_limit=0.1)
    assert found.stopped == "work limit of 150,000 steps for time_limit=0.1 s"
    assert found.plans > 1
    assert_legal(problem, found.groups)
    assert search(problem, 10, 0, time_limit=0).plans == 1


@pytest.mark.parametrize("search", SEARCHES)
def test_interrupt_keeps_the_best_plan(search: Search) -> None:
    def progress(plans: int, best: int) -> None:
        if plans == 17:
            raise KeyboardInterrupt

    problem = random_problem(Random(4), 30)
    with pytest.raises(SearchInterrupted) as caught:
        search(problem, 1000, 0, progress=progress)
    found = caught.value.result
    assert (found.plans, found.stopped) == (17, "interrupted")
    assert_legal(problem, found.groups)
    assert found.dram_bytes == problem.cost(found.groups)


@pytest.mark.parametrize("search", SEARCHES)
def test_other_errors_and_an_interrupt_before_the_first_plan_pass(search: Search) -> None:
    class Raises:
        name = "raises"

        def __init__(self, error: type[BaseException]) -> None:
            self.error = error

        def __call__(self, group: int, rng: Random) -> list[int] | None:
            raise self.error

    # Groups of two do not fit: each convolution has 2 weights and reads and writes a byte.
    for error in (KeyboardInterrupt, ZeroDivisionError):
        with pytest.raises(error):
            search(fused(chain(30), 6), 100, 0, repair=Raises(error))


@pytest.mark.parametrize("search", SEARCHES)
def test_budget_below_one_is_refused(search: Search) -> None:
    with pytest.raises(OptionError, match="budget=0"):
        search(fused(chain(2)), 0, 0)


@pytest.mark.parametrize("search", SEARCHES)
def test_nothing_fusable(search: Search) -> None:
    found = search(fused(chain(1500), 1), 20, 0)
    assert (found.groups, found.dram_bytes, found.plans) == ((), 0, 20)


# -- repair -----------------------------------------------------------------------------------


@pytest.mark.parametrize("search", SEARCHES)
def test_repair_is_given_every_invalid_group_and_its_answer_is_taken(search: Search) -> None:
    problem = fused(chain(20), 12)  # groups of two or three
    given: list[int] = []

    class Singles:
        """Single operators where a group has at most four; declines larger ones."""

        name = "singles"

        def __call__(self, group: int, rng: Random) -> list[int] | None:
            assert not problem.evaluator.valid(group)
            given.append(group)
            blocks = [block for block in problem.blocks if block & group]
            return blocks if len(blocks) <= 4 else None

    found = search(problem, 200, 0, repair=Singles())
    assert given
    assert_legal(problem, found.groups)
    assert {group.bit_count() for group in given} > {4, 5}
    assert found.history != search(problem, 200, 0).history


def test_random_split_gives_valid_parts_and_varies() -> None:
    rng = Random(1)
    problem = fused(chain(40), 40)
    split = RandomSplit(problem)
    answers = {tuple(sorted(split(problem.fusable, rng))) for _ in range(20)}
    assert len(answers) > 10
    for parts in answers:
        assert_legal(problem, parts)
    assert split(1, rng) == [1]


# -- quality ----------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "single"])
def test_local_search_against_enumeration(merge: bool) -> None:
    rng = Random(77)
    reached = 0
    for seed in range(60):
        problem = random_problem(rng, rng.randint(2, 8), rng.choice(SCHEMES), merge)
        optimum = brute_force(problem.evaluator)[0]
        found = local_search(problem, 200, seed)
        assert found.dram_bytes >= optimum
        assert random_search(problem, 30, seed).dram_bytes >= optimum
        reached += found.dram_bytes == optimum
    assert reached >= 57
