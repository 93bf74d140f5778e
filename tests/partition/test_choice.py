"""The choice of groups: cycles among legal groups are cut off, and broken where time ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest

from tests.brute import brute_force
from tests.graphs import Builder
from tests.legal import assert_legal, assert_runs_in_order, random_problem, single
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.wide import integer_program as choice
from torch_getfuse.partition.wide.group_columns import Columns, minimum, solved
from torch_getfuse.partition.wide.integer_program import choose, find_cycles, split_cycles
from torch_getfuse.partition.wide.legal_groups import list_groups
from torch_getfuse.partition.work import Work


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


class Answer:
    """What a solver returns, as far as it is looked at."""

    def __init__(self, shares: Sequence[float]) -> None:
        self.x = np.array(shares)
        self.status, self.mip_node_count = 0, 1


def test_shares_a_little_above_a_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both groups with a convolution get more than half of it, within the solver's tolerance."""
    problem = crossing(Random(0), 2)
    groups = (*problem.blocks, 0b0101, 0b1001)
    half = 0.5 + 4e-8
    answers = [Answer([0.5, 0.5, 0.5, 0.5, half, half]), Answer([1, 1])]
    seen = []

    def minimum(costs: object, *args: object) -> Answer:
        seen.append(costs)
        return answers[min(len(seen), 2) - 1]

    monkeypatch.setattr(choice, "minimum", minimum)
    # The integer program's answer is of no use either: it covers an operator twice.
    monkeypatch.setattr(choice, "solved", lambda *args, **named: Answer([0, 1, 0, 0, 1, 1]))
    plan = chosen(problem, groups)
    assert_legal(problem, plan)
    assert sum(group in plan for group in groups[4:]) == 1
    assert len(seen) >= 2


def test_a_solver_that_fails_leaves_the_known_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = crossing(Random(0), 3)
    monkeypatch.setattr(choice, "minimum", lambda *args: None)
    answer = Answer([])
    answer.x, answer.status = None, 4  # type: ignore[assignment]
    monkeypatch.setattr(choice, "solved", lambda *args, **named: answer)
    assert chosen(problem, problem.blocks) == problem.blocks


def test_relaxations_with_halves_agree_with_enumeration() -> None:
    """Pairs of convolutions under sums of two: covers by odd cycles have shares of a half."""
    rng = Random(7200)
    halves = 0
    for _ in range(25):
        problem = crossing(rng, rng.randint(3, 4))
        listed = list_groups(problem)
        some = tuple(g for g in listed.groups if g.bit_count() <= rng.choice((2, 3)))
        groups = tuple(dict.fromkeys([*problem.blocks, *some]))
        columns = Columns(problem)
        work = problem.evaluator.work
        matrix, costs = columns.matrix(groups), columns.costs(groups)
        relaxed = minimum(costs, matrix, np.ones(len(problem.blocks)), work)
        assert relaxed is not None
        halves += bool((np.abs(relaxed.x - 0.5) < 1e-6).any())
        assert_legal(problem, chosen(problem, groups))
        whole = tuple(dict.fromkeys([*problem.blocks, *listed.groups]))
        assert problem.cost(chosen(problem, whole)) == brute_force(problem.evaluator)[0]
    assert halves


def test_ctrl_c_does_not_wait_for_the_solver() -> None:
    released = threading.Event()

    def solver() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        released.wait(60)

    # What runs in the background of a shell is started with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            solved(Work(), solver)  # type: ignore[arg-type]
        assert not released.is_set()
    finally:
        released.set()
        signal.signal(signal.SIGINT, before)


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
