"""Branching over sets: the best plan of them, proved, without cycles; and all near sets listed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pytest

from tests.brute import brute_force
from tests.graphs import Builder
from tests.legal import (
    assert_legal,
    assert_runs_in_order,
    legal_plans,
    random_prices,
    random_problem,
    single,
    with_optima,
)
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.node_set import bits, is_convex
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.wide import branching
from torch_getfuse.partition.wide.block_prices import prove
from torch_getfuse.partition.wide.branching import Branching
from torch_getfuse.partition.wide.cycles import find_cycles, split_cycles
from torch_getfuse.partition.wide.group_automaton import line_automaton
from torch_getfuse.partition.wide.group_columns import Columns, minimum, solved
from torch_getfuse.partition.wide.legal_groups import Listed, list_groups
from torch_getfuse.partition.wide.near_sets import NONE, NearSets, near_sets
from torch_getfuse.partition.wide.plan_cuts import of_cycles, of_three_blocks
from torch_getfuse.partition.wide.relaxation import FINE, Pricing
from torch_getfuse.partition.work import OutOfWork, Work


def crossing(rng: Random, width: int) -> FusionProblem:
    """``width`` convolutions, then as many additions, each of two of them."""
    build = Builder()
    maps = [build.conv(build.input((1, 2, 8, 8)), 2) for _ in range(width)]
    for _ in range(width):
        build.add(*rng.sample(maps, 2))
    return FusionProblem(Evaluator(make_scheme("lbdf", build.graph(), "line", 1, 1), 1 << 20))


def every_set(problem: FusionProblem) -> list[int]:
    """All sets of blocks, but the empty one."""
    blocks = problem.blocks
    return [sum(blocks[k] for k in bits(choice)) for choice in range(1, 1 << len(blocks))]


def branched(problem: FusionProblem, groups: Sequence[int]) -> Branching:
    """The whole search over some sets, from single blocks."""
    search = Branching(NearSets.of(Columns(problem), groups), problem.blocks)
    search.run()
    assert search.level >= FINE * search.cost  # proved
    assert search.cost == problem.cost(search.plan)
    assert_legal(problem, search.plan)
    assert_runs_in_order(problem, search.plan)
    return search


def test_a_cycle_of_two_groups() -> None:
    """Two additions of the same two maps, each fused with one of the convolutions."""
    problem = crossing(Random(0), 2)
    tangled = (0b0101, 0b1010)
    assert find_cycles(problem, tangled) == [[(0b0101, 2, 0), (0b1010, 3, 1)]]
    assert_legal(problem, split_cycles(problem, tangled))
    search = branched(problem, (*problem.blocks, *tangled))
    assert len(search.plan) == 3  # one of the two can stay


def test_a_solver_that_fails_leaves_the_known_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = crossing(Random(0), 3)
    monkeypatch.setattr(branching, "minimum", lambda *args: None)
    listed = list_groups(problem).groups
    search = Branching(NearSets.of(Columns(problem), listed), problem.blocks)
    with pytest.raises(OutOfWork, match="the solver found no prices"):
        search.run()
    assert search.plan == problem.blocks
    assert search.level <= 0  # nothing is proved


class Answer:
    """What the solver returns, as far as it is looked at."""

    def __init__(self, shares: Sequence[float], duals: Sequence[float]) -> None:
        self.x = np.array(shares)
        self.eqlin = self
        self.marginals = np.array(duals)


def test_shares_that_cover_an_operator_twice_are_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver's tolerance, or a fault of it: nothing is concluded from its shares."""
    problem = crossing(Random(0), 2)
    groups = (*problem.blocks, 0b0101, 0b1001)
    answer = Answer([0, 1, 0, 0, 1, 1, 0, 0, 0, 0], [0.0] * 4)
    monkeypatch.setattr(branching, "minimum", lambda *args: answer)
    search = Branching(NearSets.of(Columns(problem), groups), problem.blocks)
    monkeypatch.setattr(search, "_undercutting", lambda alive, *_: ([], alive == alive))
    monkeypatch.setattr(search.near, "numbers", lambda _: np.arange(6))
    with pytest.raises(OutOfWork, match="no cover"):
        search.run()
    assert search.plan == problem.blocks


def test_a_whole_solution_counts_only_where_prices_prove_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = crossing(Random(0), 2)
    answer = Answer([1, 1, 1, 1, 0, 0, 0, 0], [0.0] * 4)
    monkeypatch.setattr(branching, "minimum", lambda *args: answer)
    search = Branching(NearSets.of(Columns(problem), problem.blocks), problem.blocks)
    with pytest.raises(OutOfWork, match="no prices that prove the solution"):
        search.run()
    assert search.level < FINE * search.cost


def test_prices_that_overflow_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = crossing(Random(0), 2)
    answer = Answer([1, 1, 1, 1, 0, 0, 0, 0], [1e15] * 4)
    monkeypatch.setattr(branching, "minimum", lambda *args: answer)
    search = Branching(NearSets.of(Columns(problem), problem.blocks), problem.blocks)
    with pytest.raises(OutOfWork, match="prices too large"):
        search.run()


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
        branched(problem, groups)
        assert branched(problem, listed.groups).cost == brute_force(problem.evaluator)[0]
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
    for problem, optimum in with_optima(Random(7000), 80, 2, 8):
        assert branched(problem, list_groups(problem).groups).cost == optimum


def test_illegal_sets_in_the_list_are_not_used() -> None:
    rng = Random(7050)
    for _ in range(40):
        problem = random_problem(rng, rng.randint(2, 7))
        if every := every_set(problem):
            assert branched(problem, every).cost == brute_force(problem.evaluator)[0]


def test_near_sets_are_all_within_reach_of_prices() -> None:
    """Against the list of all legal groups; prices as they are after a few rounds."""
    rng = Random(7060)
    some = fewer = 0
    for _ in range(60):
        problem = random_problem(rng, rng.randint(2, 8))
        automaton = line_automaton(problem) if problem.blocks else None
        if automaton is None:
            continue
        columns, pricing = Columns(problem), Pricing(automaton)
        order = automaton.skeleton.order
        known = single(problem)
        with problem.evaluator.work.steps_within(rng.choice((500, 5_000, 20_000, 1_000_000))):
            prices = prove(columns, pricing, known).lowered
        within_all = rng.choice((0, 100, 2000)) * FINE
        reach = np.array([rng.choice((within_all, NONE)) for _ in problem.blocks])
        near = near_sets(columns, pricing, prices, reach, 1_000_000)
        assert near is not None
        masks = [near.mask(k) for k in range(len(near))]
        assert len(set(masks)) == len(masks)
        assert list(near.costs) == [problem.evaluator.dram(mask) for mask in masks]
        reduced = near.reduced(np.arange(len(near)), prices)
        assert ((reduced >= 0) & (reduced <= within_all)).all()
        assert all(is_convex(mask, problem.above, problem.below) for mask in masks)
        listed = list_groups(problem).groups
        home = [
            min((k for k, block in enumerate(problem.blocks) if block & group), key=order.index)
            for group in listed
        ]
        within = columns.reduced(listed, prices) <= reach[home]
        assert {group for group, w in zip(listed, within, strict=True) if w} == {
            mask for k, mask in enumerate(masks) if near.legal(k)
        }
        some += bool(masks)
        fewer += not within.all()
        assert near_sets(columns, pricing, prices, reach, 0) is None or not masks
    assert min(some, fewer) > 20


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


def test_all_legal_plans_satisfy_the_inequalities() -> None:
    """Those of the cycles of covers, and of three blocks that shares have by halves."""
    rng = Random(7300)
    cyclic = odd = violated = 0
    for _ in range(150):
        problem = crossing(rng, rng.randint(2, 4))
        groups = list_groups(problem).groups
        near = NearSets.of(Columns(problem), groups)
        number = {group: k for k, group in enumerate(groups)}
        cover, left = [], problem.fusable
        while left:  # some groups, whether or not they can run one after another
            cover.append(rng.choice([g for g in groups if g & left & -left and not g & ~left]))
            left &= ~cover[-1]
        cycles = [*of_cycles(problem, near.rows, cover)]
        some = np.array(sorted(rng.sample(range(len(groups)), min(12, len(groups)))))
        three = [*of_three_blocks(near.rows, some, np.full(len(some), 0.5), Work())]
        for cut in cycles:
            assert cut.weights[[number[group] for group in cover]].sum() > cut.most
        for cut in three:
            violated += cut.weights[some].sum() * 0.5 > cut.most
        for plan in legal_plans(problem):
            chosen = [number[group] for group in plan]
            assert all(cut.weights[chosen].sum() <= cut.most for cut in (*cycles, *three))
        cyclic += len(cycles) > 0
        odd += len(three) > 0
    assert min(cyclic, odd) > 20
    assert violated > 20


def test_inequalities_spare_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same optima with them and without, and fewer nodes: pairs cover by odd cycles."""
    rng = Random(7400)
    nodes = [0, 0]
    for _ in range(30):
        problem = crossing(rng, rng.randint(4, 7))
        listed = [group for group in list_groups(problem).groups if group.bit_count() <= 2]
        costs = set()
        for k, rounds in enumerate(((40, 3), (0, 0))):
            monkeypatch.setattr(branching, "ROUNDS", rounds)
            search = branched(problem, listed)
            costs.add(search.cost)
            nodes[k] += search.nodes
        assert len(costs) == 1
    assert nodes[0] < 0.5 * nodes[1]


@pytest.mark.parametrize("smoothed", [branching.SMOOTHED, 0])
def test_prices_to_begin_with_change_no_result(
    smoothed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branching, "SMOOTHED", smoothed)
    rng = Random(7500)
    for problem, optimum in with_optima(rng, 20, 4, 8):
        near = NearSets.of(Columns(problem), list_groups(problem).groups)
        search = Branching(near, problem.blocks, (), random_prices(rng, problem))
        search.run()
        assert search.cost == optimum
        assert search.level >= FINE * search.cost


def test_what_undercuts_the_first_prices_is_asked_whether_it_is_legal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prices that no legal group undercuts prove what they do though others undercut them."""
    problem = random_problem(Random(7060), 6)
    columns, legal = Columns(problem), list_groups(problem).groups
    proof = prove(columns, Listed(columns, legal), single(problem))
    near = NearSets.of(columns, every_set(problem))
    illegal = [k for k in range(len(near)) if near.mask(k) not in set(legal)]
    assert (near.reduced(np.array(illegal), proof.lowered) < 0).any()
    lowered = []
    lower = Branching._lowered

    def spy(self: Branching, *args: Any) -> Any:
        lowered.append(lower(self, *args))
        return lowered[-1]

    monkeypatch.setattr(Branching, "_lowered", spy)
    search = Branching(near, problem.blocks, (), proof.lowered)
    search.run()
    assert (lowered[0].blocks == proof.lowered).all()
    assert search.cost == brute_force(problem.evaluator)[0]


def test_no_time() -> None:
    problem = crossing(Random(0), 3)
    search = Branching(NearSets.of(Columns(problem), problem.blocks), problem.blocks)
    with pytest.raises(OutOfWork), problem.evaluator.work.within(0.0):
        search.run()
    assert search.plan == problem.blocks
