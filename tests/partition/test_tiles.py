"""The automaton of BRR against enumeration: no legal group costs less than it says."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest

from tests.brute import brute_force
from tests.graphs import Builder, random_graph, with_order, with_pools
from tests.legal import assert_brackets, assert_none_undercuts, least_reduced, random_prices, single
from torch_getfuse.errors import OptionError
from torch_getfuse.ir import Window
from torch_getfuse.partition.cost.brr.model import Brr
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.node_set import bits, is_connected, is_convex
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.wide import (
    group_cover,
    legal_pricing,
    tile_automaton,
    tile_builder,
    tile_outline,
    tile_sets,
)
from torch_getfuse.partition.wide.automaton import Automaton, Layer
from torch_getfuse.partition.wide.branching import Branching
from torch_getfuse.partition.wide.group_columns import Columns
from torch_getfuse.partition.wide.group_cover import cover
from torch_getfuse.partition.wide.legal_groups import list_groups
from torch_getfuse.partition.wide.legal_pricing import LegalPricing
from torch_getfuse.partition.wide.near_sets import near_sets
from torch_getfuse.partition.wide.relaxation import FINE, Pricing
from torch_getfuse.partition.wide.tile_automaton import some_passes
from torch_getfuse.partition.wide.tile_guide import Guide, Passes, Priced
from torch_getfuse.partition.wide.tile_sets import Far, TileSets
from torch_getfuse.partition.work import OutOfWork, Work

EACH = tuple(range(1, 15))


def tiled(
    rng: Random, operators: int, merge: bool = True, order: float = 0.0, weight_bytes: int = 1
) -> FusionProblem:
    """A random graph under a buffer that makes some groups, and mostly some operators, invalid.

    ``order``: how many operators, as a share, must run after one whose tensors they do not read.
    """
    graph = random_graph(rng, operators, rng.choice((3, 6, 10, 14)), crops=rng.random() < 0.3)
    graph = with_pools(rng, graph, rng.choice((0.0, 0.0, 0.5)))
    graph = with_order(rng, graph, order) if order else graph
    model = Brr(graph, rng.choice((1, 1, 2)), weight_bytes, kappa=rng.choice((1, 1, 2)))
    alone = sorted(model.buffer(1 << i, 1 << 30) or 0 for i in range(operators))
    whole = model.buffer((1 << operators) - 1, 1 << 30) or 3 * alone[-1]
    low = max(1, alone[operators // 3])
    return FusionProblem(Evaluator(model, rng.randint(low, max(low, whole) + 20)), merge)


def automaton_of(problem: FusionProblem, bounds: tuple[int, ...] = (1, 2, 4, 16)) -> Automaton:
    found = tile_automaton.tile_automaton(problem, bounds)
    assert found is not None
    return found


@pytest.mark.parametrize("bounds", [(1,), (1, 2), (1, 3, 5, 9), EACH], ids=len)
def test_no_legal_group_undercuts_its_first_block(bounds: tuple[int, ...]) -> None:
    """The claim that the bound's proof rests on; few labels, and rooms are rounded."""
    rng = Random(8100 + len(bounds))
    asked = attained = 0
    for _ in range(110):
        order = rng.choice((0.0, 0.0, 0.3))
        problem = tiled(rng, rng.randint(2, 9), rng.random() < 0.7, order, rng.choice((1, 3)))
        if not problem.blocks:
            continue
        pricing = Pricing(automaton_of(problem, bounds), rng.choice((8000, 8000, 1)))
        order = np.argsort(pricing.place).tolist()
        for _ in range(3):
            prices = random_prices(rng, problem)
            shortfall = pricing.run(prices)[0].tolist()
            least = least_reduced(problem, prices, order)
            assert_none_undercuts(shortfall, least)
            asked += sum(value < 0 for value in least.values())
            attained += sum(shortfall[k] == value < 0 for k, value in least.items())
    assert asked > 500
    assert attained > 0.75 * asked  # where passes are told apart, nine of ten


def test_the_sets_that_undercut_most_cost_what_is_said_or_more() -> None:
    rng = Random(8200)
    seen = 0
    for _ in range(150):
        problem = tiled(rng, rng.randint(2, 9))
        if not problem.blocks:
            continue
        pricing = Pricing(automaton_of(problem, EACH))
        prices = random_prices(rng, problem)
        shortfall, found = pricing.run(prices)
        for home, reduced, mask, cost in found:
            members = [k for k, block in enumerate(problem.blocks) if block & mask]
            assert min(members, key=pricing.place.__getitem__) == home
            assert reduced == FINE * cost - int(prices[members].sum())
            assert is_connected(mask, problem.near)
            assert is_convex(mask, problem.above, problem.below)
            assert reduced >= shortfall[home]
            if reduced == shortfall[home] and problem.evaluator.valid(mask):
                assert problem.evaluator.dram(mask) >= cost
                seen += 1
    assert seen > 200


def test_sets_are_found_once() -> None:
    """Whatever of their operators are full."""
    rng = Random(8250)
    for _ in range(60):
        problem = tiled(rng, 8)
        if problem.blocks:
            found = Pricing(automaton_of(problem, EACH)).run(random_prices(rng, problem))[1]
            several = [each.mask for each in found if each.mask not in problem.blocks]
            besides = automaton_of(problem).besides
            assert len(several) - len(set(several)) <= sum(mask in besides for mask in several)


@pytest.mark.parametrize("labels", [legal_pricing.LABELS, 0], ids=["listed", "too many"])
def test_prices_of_legal_groups(monkeypatch: pytest.MonkeyPatch, labels: int) -> None:
    """No legal group undercuts, at what it costs as a group; where all are listed, one attains."""
    monkeypatch.setattr(legal_pricing, "LABELS", labels)
    rng = Random(8300)
    tighter = loose = 0
    for _ in range(120):
        problem = tiled(rng, rng.randint(3, 8))
        if not problem.blocks:
            continue
        pricing = Pricing(automaton_of(problem))
        legal = LegalPricing(Columns(problem), pricing)
        prices = random_prices(rng, problem)
        shortfall, undercut = legal.run(prices)
        least = least_reduced(problem, prices, np.argsort(pricing.place).tolist())
        for each in undercut if labels else ():
            assert problem.evaluator.valid(each.mask)
            assert problem.evaluator.dram(each.mask) == each.cost
        loose += assert_none_undercuts(shortfall, least) > 0
        tighter += bool((shortfall > pricing.run(prices)[0]).any())
    if labels:
        assert not loose
        assert tighter > 10
    else:
        assert loose


@pytest.mark.parametrize("seed", range(3))
def test_the_cover_brackets_the_optimum(seed: int) -> None:
    rng = Random(8400 + seed)
    proved = several = 0
    for _ in range(40):
        problem = tiled(rng, rng.randint(3, 8))
        if not problem.blocks:
            continue
        optimum = brute_force(problem.evaluator)[0]
        found = cover(problem, single(problem), most=2)
        assert_brackets(problem, found, optimum)
        proved += found.dram_bytes == found.lower_bound_bytes == optimum
        several += 1
    assert several > 25
    assert proved > 0.9 * several


def test_what_runs_in_slices_is_priced_apart() -> None:
    """A block alone, or with those that work on its result in place: as tiles it may cost more."""
    rng = Random(8500)
    chains = sliced = 0
    for _ in range(400):
        problem = tiled(rng, rng.randint(3, 9), weight_bytes=8)
        if not problem.blocks:
            continue
        scheme, size = problem.evaluator.scheme, problem.evaluator.buffer_bytes
        assert isinstance(scheme, Brr)
        besides = automaton_of(problem).besides
        assert set(problem.blocks) <= set(besides)
        chains += len(besides) > len(problem.blocks)
        for group in list_groups(problem).groups:
            if scheme._kept_slices(group, scheme._valid_passes(group, size), size) is not None:
                assert group in besides
                sliced += 1
    assert chains > 5
    assert sliced > 20


def test_a_set_holds_already_what_an_outline_holds_later() -> None:
    """Rows of an image that two operators read, of which the outline knows one row at first."""
    build = Builder()
    image = build.input((1, 2, 4, 3))
    whole = build.op("softmax", [(image, Window.whole())], (1, 2, 4, 3))
    scaled = build.op("mul", [(image, Window.identity())], (1, 2, 4, 3))
    window = Window.sliding((3, 3), (1, 1), (2, 2), (2, 2))
    build.op("pool", [(build.add(scaled, whole), window)], (1, 2, 4, 3))
    problem = FusionProblem(Evaluator(Brr(build.graph()), 26))
    group = 0b1111  # holds the image once, whole
    assert problem.evaluator.buffer(group) == 24
    prices = np.array([FINE * problem.evaluator.dram(block) for block in problem.blocks])
    pricing = Pricing(automaton_of(problem))
    home = min(range(4), key=pricing.place.__getitem__)
    reduced = FINE * problem.evaluator.dram(group) - int(prices.sum())
    assert pricing.run(prices)[0][home] == reduced < 0


def test_an_outline_leaves_out_only_what_cannot_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """With it and without, the automaton has the same sets at the same costs, in as many states."""
    rng = Random(8600)
    layers = tile_builder.Builder.layers
    made: list[int] = []

    def counted(self: tile_builder.Builder, work: Work, most: int) -> list[Layer] | None:
        found = layers(self, work, most)
        made.append(sum(len(layer.leave) for layer in found or ()))
        return found

    monkeypatch.setattr(tile_builder.Builder, "layers", counted)
    fewer = 0
    for _ in range(60):
        problem = tiled(rng, rng.randint(4, 10))
        if not problem.blocks:
            continue
        made.clear()
        guided = automaton_of(problem)
        with monkeypatch.context() as patch:
            patch.setattr(tile_outline.Outline, "going", lambda self, step, before, *sets: sets[:2])
            free = automaton_of(problem)
        assert guided.states == free.states
        prices = random_prices(rng, problem)
        with_it, without = Pricing(guided).run(prices)[0], Pricing(free).run(prices)[0]
        assert (with_it == without).all()
        fewer += made[1] < made[3]
    assert fewer > 20


def test_merged_states_hold_no_more_than_their_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few states there may be, no legal group undercuts what the automaton says."""
    monkeypatch.setattr(tile_builder, "TOO_MANY", 1e9)
    erase, erased = tile_sets._untell_far, []

    def counted(sets: TileSets, far: Far) -> None:
        erased.append(int((sets.parts > 0).sum()))
        erase(sets, far)

    monkeypatch.setattr(tile_sets, "_untell_far", counted)
    rng = Random(8700)
    asked = attained = merged = 0
    for _ in range(300):
        problem = tiled(rng, rng.randint(3, 9), rng.random() < 0.7)
        if not problem.blocks:
            continue
        monkeypatch.setattr(tile_automaton, "MOST_OUTLINED", rng.choice((1, 10, 100, 100_000)))
        monkeypatch.setattr(tile_builder, "FAR_OFF", rng.choice((0, 1, 2, 40)))
        most = rng.choice((1, 10, 30, 100))
        automaton = tile_automaton.tile_automaton(problem, (1, 2, 4), most)
        assert automaton is not None
        merged += automaton.merged
        pricing = Pricing(automaton)
        prices = random_prices(rng, problem)
        shortfall = pricing.run(prices)[0].tolist()
        least = least_reduced(problem, prices, np.argsort(pricing.place).tolist())
        assert_none_undercuts(shortfall, least)
        asked += sum(value < 0 for value in least.values())
        attained += sum(shortfall[k] == value < 0 for k, value in least.items())
    assert merged > 50
    assert sum(erased) > 500
    assert 0.2 * asked < attained < 0.9 * asked  # some are merged, not all


def test_updates_that_read_the_same_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them a set has read does not matter in the next update; RAFT is such a network."""
    build = Builder()
    image = build.input((1, 4, 12, 12))
    shared = [build.conv(image, 4) for _ in range(4)]
    state = build.conv(image, 4)
    for _ in range(8):
        asked = [build.conv(each, 4, 3) for each in shared]
        state = build.act(build.add(build.conv(state, 4, 3), *asked))
    problem = FusionProblem(Evaluator(Brr(build.graph()), 1500))
    monkeypatch.setattr(tile_builder, "FAR_OFF", 4)
    monkeypatch.setattr(tile_automaton, "MOST_OUTLINED", 5_000)
    automaton = tile_automaton.automaton_near(problem, problem.blocks)
    assert automaton is not None
    assert automaton.merged
    monkeypatch.setattr(tile_builder, "FAR_OFF", 1000)
    assert tile_automaton.automaton_near(problem, problem.blocks) is None


@pytest.mark.parametrize("seed", range(2))
def test_finer_automata_have_all_near_sets(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """However coarse the one is that says which sets are near, and however few states they have."""
    monkeypatch.setattr(tile_builder, "TOO_MANY", 1e9)
    monkeypatch.setattr(tile_automaton, "FEWER", 2.0)
    rng = Random(8900 + seed)
    finer = fewer = closer = 0
    for _ in range(250):
        problem = tiled(rng, rng.randint(3, 9), rng.random() < 0.7, rng.choice((0.0, 0.3)))
        if not problem.blocks:
            continue
        monkeypatch.setattr(tile_automaton, "MOST_OUTLINED", rng.choice((1, 10, 100_000)))
        monkeypatch.setattr(tile_automaton, "MANY_PASSES", rng.choice((2, 3, 10)))
        monkeypatch.setattr(tile_builder, "FAR_OFF", rng.choice((0, 1, 2, 40)))
        automaton = tile_automaton.tile_automaton(problem, (1, 2), rng.choice((1, 30, 1000)))
        assert automaton is not None
        near = list_groups(problem).groups
        columns = Columns(problem)
        first = Pricing(automaton)
        order = np.argsort(first.place).tolist()
        for _ in range(3):
            pricing = Pricing(automaton)
            prices = random_prices(rng, problem)
            prices += pricing.run(prices)[0]
            most = int(rng.choice((0, 0.1, 0.3)) * FINE * problem.cost(problem.blocks))
            assert automaton.finer is not None
            made = automaton.finer(pricing.near_by(near[:3], prices, most))
            if made is None:
                assert not automaton.states  # none are near already
                break
            fewer += made.states < automaton.states
            automaton = made
            reduced = columns.reduced(near, prices)
            near = tuple(group for group, its in zip(near, reduced, strict=True) if its <= most)
            other = random_prices(rng, problem)
            shortfall = Pricing(automaton).run(other)[0]
            assert_none_undercuts(shortfall.tolist(), least_reduced(problem, other, order, near))
            closer += bool((shortfall > first.run(other)[0]).any())
            finer += len(near) > len(problem.blocks)
    assert min(finer, fewer, closer) > 100


def test_the_cover_by_finer_automata_brackets_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few states, few labels and little time."""
    made: list[Automaton | None] = []
    automaton = tile_automaton._Making.automaton

    def noted(self: tile_automaton._Making, guide: Guide, *how: Any) -> Automaton | None:
        found = automaton(self, guide, *how)
        if isinstance(guide, Priced):
            made.append(found)
        return found

    monkeypatch.setattr(tile_automaton._Making, "automaton", noted)
    monkeypatch.setattr(tile_builder, "TOO_MANY", 1e9)
    monkeypatch.setattr(tile_automaton, "FEWER", 2.0)
    monkeypatch.setattr(group_cover, "FAR", (1.0, 1.0))
    rng = Random(9000)
    for _ in range(80):
        problem = tiled(rng, rng.randint(5, 9), rng.random() < 0.7, rng.choice((0.0, 0.3)))
        if not problem.blocks:
            continue
        monkeypatch.setattr(tile_automaton, "MOST_OUTLINED", rng.choice((1, 10, 100_000)))
        monkeypatch.setattr(tile_builder, "FAR_OFF", rng.choice((0, 1, 2, 40)))
        for limit in "MERGED_STATES", "FINER_STATES", "MOST_STATES":
            monkeypatch.setattr(tile_automaton, limit, rng.choice((1, 30, 1000)))
        monkeypatch.setattr(group_cover, "FEW", rng.choice((0, 0, 3, 1000)))
        monkeypatch.setattr(group_cover, "MANY", rng.choice((0, 10, 100_000)))
        monkeypatch.setattr(group_cover, "PRICED", (0.4, rng.choice((0.02, 0.1, 0.3))))
        found = cover(problem, single(problem), rng.choice((0.03, 0.1, 0.3, 2.0)), most=2)
        assert_brackets(problem, found, brute_force(problem.evaluator)[0])
    assert len(made) > 20


def test_an_automaton_without_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no set but what is priced apart is near."""
    monkeypatch.setattr(tile_automaton, "FEWER", 2.0)
    rng = Random(9100)
    empty = 0
    for _ in range(20):
        problem = tiled(rng, 7)
        if not problem.blocks:
            continue
        pricing = Pricing(automaton_of(problem))
        prices = random_prices(rng, problem)
        prices += pricing.run(prices)[0]
        finer = pricing.automaton.finer
        made = finer and finer(pricing.near_by(problem.blocks, prices, -1))
        if not made:
            continue
        assert not made.states
        reach = np.full(len(prices), 1 << 40)
        near = near_sets(Columns(problem), Pricing(made), prices, reach, 1000)
        assert near is not None
        assert sorted(map(near.mask, range(len(near)))) == sorted(made.besides)
        below = near_sets(Columns(problem), Pricing(made), prices, reach - (1 << 41), 1000)
        assert below is not None
        assert not len(below)
        search = Branching(below, problem.blocks)
        search.run()
        assert search.cost == problem.cost(problem.blocks)
        empty += 1
    assert empty > 10


def test_the_passes_of_a_plan_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in which it reads much; further ones where that is a large part of it."""
    told: list[int] = []
    monkeypatch.setattr(
        tile_automaton._Making, "automaton", lambda _, guide, bounds, most: told.extend(bounds)
    )
    rng = Random(8800)
    read_again = 0
    for _ in range(200):
        problem = tiled(rng, 8, weight_bytes=3)
        groups = [group for group in list_groups(problem).groups if group not in problem.blocks]
        size = problem.evaluator.buffer_bytes
        scheme = problem.evaluator.scheme
        for group in groups[:3]:
            weights = sum(scheme.weights[i] for i in bits(group))
            passes = 1 + scheme.reread(group, size) // weights if weights else 1
            plan = (group, *(block for block in problem.blocks if not block & group))
            told.clear()
            tile_automaton.automaton_near(problem, plan)
            if passes > 4 and scheme.reread(group, size) > 0.1 * problem.cost(plan):
                assert set(told) >= {passes, *tile_automaton.MORE_PASSES}
                read_again += 1
    assert read_again > 5


def test_passes() -> None:
    stay = Passes(1, 0, True)
    assert some_passes((1, 2, 4)) == (stay, Passes(1, 1), Passes(2, 3), Passes(4, 0))
    assert some_passes((1,)) == (stay, Passes(1, 0))


def test_limits() -> None:
    problem = tiled(Random(3), 8)
    assert tile_automaton.tile_automaton(problem, (1, 2), most=1) is None
    with problem.evaluator.work.within(0), pytest.raises(OutOfWork):
        automaton_of(problem)
    lbdf = FusionProblem(Evaluator(make_scheme("lbdf", problem.graph, "line", 1, 1), 1 << 20))
    with pytest.raises(OptionError, match="'lbdf'"):
        tile_automaton.tile_automaton(lbdf, (1,))
