"""The cover by legal groups against enumeration, with the complete list and without."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from unittest.mock import ANY

import numpy as np
import pytest

from tests.brute import brute_force
from tests.graphs import Builder, random_graph
from tests.legal import (
    assert_brackets,
    assert_legal,
    assert_runs_in_order,
    least_reduced,
    random_problem,
    single,
    with_optima,
)
from torch_getfuse.ir import Window
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.exact.down_sets import exact
from torch_getfuse.partition.node_set import bits, is_connected, is_convex
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.wide import group_automaton, group_cover
from torch_getfuse.partition.wide.group_columns import Columns
from torch_getfuse.partition.wide.group_cover import cover
from torch_getfuse.partition.wide.legal_groups import list_groups
from torch_getfuse.partition.wide.relaxation import FINE, Pricing
from torch_getfuse.partition.work import STEPS_PER_SECOND


@pytest.mark.parametrize("most", [60_000, 3], ids=["listed", "priced"])
@pytest.mark.parametrize("seed", range(3))
def test_between_bound_and_enumeration(seed: int, most: int) -> None:
    rng = Random(5000 + seed)
    proved = 0
    for problem, optimum in with_optima(rng, 60, 1, 8):
        found = cover(problem, single(problem), most=most)
        assert_brackets(problem, found, optimum)
        assert found.dram_bytes == problem.cost(found.groups)
        assert_runs_in_order(problem, found.groups)
        proved += found.lower_bound_bytes == found.dram_bytes
        if most > 3:
            assert found.dram_bytes == optimum
    assert proved >= 40


def test_in_any_order_between_bound_and_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some sets are not convex then."""
    monkeypatch.setattr(group_automaton, "FIRST_STATES", 0)
    rng = Random(5070)
    proved = 0
    for problem, optimum in with_optima(rng, 80, 3, 8):
        found = cover(problem, single(problem), most=3)
        assert_brackets(problem, found, optimum)
        proved += found.lower_bound_bytes == optimum
    assert proved > 60


def test_many_branches_that_meet_are_decided_in_any_order() -> None:
    """Producers first, all of them stay open until they meet: more states than are allowed."""
    problem = branches(22)
    automaton = group_automaton.line_automaton(problem)
    assert automaton is not None
    skeleton = automaton.skeleton
    place = {block: k for k, block in enumerate(skeleton.order)}
    late = [
        s
        for s in skeleton.streams
        if s.maker >= 0 and place[s.maker] > min(place[b] for b in s.blocks)
    ]
    assert late
    assert automaton.states < 100_000


def test_prices_of_legal_groups_raise_the_bound_where_near_sets_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group_cover, "FEW", 3)
    monkeypatch.setattr(group_cover, "MANY", 3)
    rng = Random(5060)
    higher = proved = 0
    for problem, optimum in with_optima(rng, 60, 5, 8):
        found = cover(problem, single(problem), most=3)
        assert_brackets(problem, found, optimum)
        with monkeypatch.context() as without:
            without.setattr(group_cover._Cover, "_improve", lambda *_: None)
            before = cover(problem, single(problem), most=3)
        assert before.lower_bound_bytes <= found.lower_bound_bytes
        higher += before.lower_bound_bytes < found.lower_bound_bytes
        proved += found.lower_bound_bytes == optimum
    assert higher > 5
    assert proved > 50


def test_rooms_are_rounded_as_little_as_will_do() -> None:
    """Whatever is tried first."""
    automaton = group_automaton.line_automaton(branches(4))
    assert automaton is not None
    pricing = Pricing(automaton, most=40)
    rng = np.random.default_rng(0)
    state, rooms = np.repeat(np.arange(4), 150), rng.integers(0, pricing.limit, 600)
    found = []
    for guess in (0, 1, 2, 7):
        room, left, doublings = pricing._rounded(state, -rooms, rooms, np.arange(600), guess)
        step = max(1, pricing.limit // 256) << doublings
        assert (room == rooms // step * step).all()
        assert len(left) <= 40
        found.append((doublings, left.tolist()))
    assert found == 4 * found[:1]


def test_an_automaton_that_forgets_levels_still_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_automaton, "FIRST_STATES", 0)
    monkeypatch.setattr(group_automaton, "EXACT_STATES", 0)
    monkeypatch.setattr(group_automaton, "FORGET", 1)
    rng = Random(5050)
    proved = lower = 0
    for problem, optimum in with_optima(rng, 80, 4, 8):
        found = cover(problem, single(problem), most=3)
        assert_brackets(problem, found, optimum)
        proved += found.lower_bound_bytes == found.dram_bytes
        automaton = group_automaton.line_automaton(problem)
        assert automaton is not None
        prices = FINE * Columns(problem).costs(problem.blocks)
        shortfall, _ = Pricing(automaton).run(prices)
        least = least_reduced(problem, prices, automaton.skeleton.order)
        assert all(shortfall[k] <= value for k, value in least.items())
        lower += any(shortfall[k] < value for k, value in least.items())
    assert proved > 50
    assert lower


@pytest.mark.parametrize("scheme", ["lbdf", "brr"])
def test_the_list_has_every_legal_group(scheme: str) -> None:
    rng = Random(5100)
    for _ in range(150):
        problem = random_problem(rng, rng.randint(1, 8), scheme, merge=rng.random() < 0.5)
        listed = list_groups(problem)
        assert listed.complete
        legal = set()
        for choice in range(1, 1 << len(problem.blocks)):
            group = sum(problem.blocks[k] for k in bits(choice))
            if (
                is_connected(group, problem.near)
                and is_convex(group, problem.above, problem.below)
                and problem.evaluator.valid(group)
            ):
                legal.add(group)
        assert legal == set(listed.groups)


def test_a_hopeless_set_grows_by_what_it_depends_on() -> None:
    """Two branches hold less with their first operators than from their second ones on."""
    build = Builder()
    image = build.input((1, 1, 6, 6))
    ends = []
    for window in Window.whole(), Window.identity():
        at = image
        for _ in range(2):
            at = build.op("softmax", [(at, window)], (1, 1, 6, 6))
        ends.append(at)
    build.add(*ends)
    problem = FusionProblem(Evaluator(make_scheme("brr", build.graph(), "line", 1, 1), 42))
    later = 0b11010  # holds the whole map that it reads, and a row of the other one
    assert problem.evaluator.hopeless(later)
    assert 0b11111 in list_groups(problem).groups
    found = cover(problem, single(problem))
    optimum, groups = brute_force(problem.evaluator)
    assert list(found.groups) == groups == [0b11111]
    assert found.lower_bound_bytes == found.dram_bytes == optimum


def branches(width: int) -> FusionProblem:
    """``width`` chains of three convolutions between a fork and an addition."""
    build = Builder()
    fork = build.conv(build.input((1, 4, 24, 24)), 4)
    ends = []
    for _ in range(width):
        at = fork
        for _ in range(3):
            at = build.act(build.conv(at, 4, 3))
        ends.append(at)
    build.conv(build.add(*ends), 4)
    return FusionProblem(Evaluator(make_scheme("lbdf", build.graph(), "line", 1, 1), 4096))


def test_parallel_branches_too_many_to_list() -> None:
    problem = branches(8)
    assert not list_groups(problem, most=20_000).complete
    known = single(problem)
    found = cover(problem, known, most=2_000)
    assert_legal(problem, found.groups)
    assert found.dram_bytes <= known.dram_bytes
    assert found.dram_bytes <= 1.06 * found.lower_bound_bytes
    again = cover(problem, known, most=2_000)
    assert again == replace(found, seconds=ANY)


def test_agrees_with_the_dynamic_program() -> None:
    problem = branches(2)
    best = exact(problem)
    found = cover(problem, single(problem), most=10)
    assert found.lower_bound_bytes <= best.dram_bytes <= found.dram_bytes
    # The optimum as the known plan comes back, whatever the bound.
    assert cover(problem, best, most=10).dram_bytes == best.dram_bytes


def test_keeps_to_its_time() -> None:
    problem = branches(12)
    known = single(problem)
    found = cover(problem, known, seconds=1.0)
    assert problem.evaluator.work.steps < 2 * STEPS_PER_SECOND
    assert found.lower_bound_bytes <= found.dram_bytes <= known.dram_bytes


def test_no_time_at_all() -> None:
    problem = branches(3)
    known = single(problem)
    found = cover(problem, known, seconds=0.0)
    assert found.groups == known.groups
    assert problem.unavoidable <= found.lower_bound_bytes <= found.dram_bytes
    assert found.stopped == "work limit of 0 steps for time_limit=0 s"
    assert math.isfinite(found.seconds)


def scaled(problem: FusionProblem, factor: int) -> FusionProblem:
    """The same problem with every byte as ``factor`` bytes: the same plans, at as many times."""
    evaluator = problem.evaluator
    scheme = evaluator.scheme
    assert isinstance(scheme, Lbdf)
    larger = Lbdf(problem.graph, scheme.granularity, factor, factor)
    return FusionProblem(Evaluator(larger, factor * evaluator.buffer_bytes))


@pytest.mark.parametrize("factor", [10**6, 10**10])
@pytest.mark.parametrize("most", [60_000, 3], ids=["listed", "priced"])
def test_huge_byte_counts_are_bounded_as_truly(most: int, factor: int) -> None:
    """Sizes of up to 10**13 bytes."""
    rng = Random(5300)
    for problem, optimum in with_optima(rng, 12, 2, 7):
        huge = scaled(problem, factor)
        found = cover(huge, single(huge), most=most)
        assert_brackets(huge, found, factor * optimum)
        if most > 3:
            assert found.dram_bytes == factor * optimum


def test_huge_beside_tiny_byte_counts() -> None:
    rng = Random(5400)
    for _ in range(12):
        graph = random_graph(rng, rng.randint(2, 7), 6)
        scheme = Lbdf(graph, "line", rng.choice((1, 10**12)), rng.choice((1, 10**12)))
        alone = [scheme.buffer(1 << i) for i in range(len(graph))]
        problem = FusionProblem(Evaluator(scheme, rng.choice(alone) + rng.randint(1, 10**12)))
        if not problem.blocks:
            continue
        optimum = brute_force(problem.evaluator)[0]
        for most in (60_000, 3):
            found = cover(problem, single(problem), most=most)
            assert_brackets(problem, found, optimum)


def test_sums_beyond_64_bits_claim_nothing() -> None:
    problem = scaled(random_problem(Random(5), 6), 10**15)
    found = cover(problem, single(problem), most=3)
    assert found.stopped == "byte counts too large for prices"
    assert found.lower_bound_bytes == problem.unavoidable
    assert found.groups == single(problem).groups


@pytest.mark.parametrize("cost", [1 << 40, 1 << 58])
def test_labels_are_compared_alike_whatever_their_costs(cost: int) -> None:
    rng = np.random.default_rng(0)
    pricing = Pricing.__new__(Pricing)
    for size in (1, 2, 40, 300):
        state, value = np.sort(rng.integers(0, 9, size)), rng.integers(-9, 9, size)
        room = rng.integers(0, 20, size)
        pricing.limit = 20
        few = pricing._undominated(state, value, room)
        pricing.limit = 1 << 60
        assert pricing._undominated(state, value * (cost // 9), room).tolist() == few.tolist()
