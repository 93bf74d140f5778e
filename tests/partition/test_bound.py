"""The lower bound by prices against enumeration: whatever the prices, no group undercuts it."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from tests.brute import brute_force
from tests.graphs import Builder
from tests.legal import (
    assert_none_undercuts,
    least_reduced,
    random_prices,
    random_problem,
    single,
    with_optima,
)
from torch_getfuse.errors import OptionError
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.node_set import bits, is_connected, is_convex
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.wide import block_prices, legal_pricing
from torch_getfuse.partition.wide import group_automaton as automaton
from torch_getfuse.partition.wide.automaton import NO_BLOCK, Automaton, packed, renumbered
from torch_getfuse.partition.wide.block_prices import prove
from torch_getfuse.partition.wide.group_automaton import line_automaton
from torch_getfuse.partition.wide.group_columns import Columns
from torch_getfuse.partition.wide.legal_pricing import LegalPricing
from torch_getfuse.partition.wide.relaxation import FINE, Pricing
from torch_getfuse.partition.work import OutOfWork


def pricing_of(problem: FusionProblem, most: int = 8000) -> Pricing:
    automaton = line_automaton(problem)
    assert automaton is not None
    return Pricing(automaton, most)


@pytest.mark.parametrize("seed", range(4))
def test_any_prices_bound_the_optimum(seed: int) -> None:
    rng = Random(4000 + seed)
    for _ in range(75):
        problem = random_problem(rng, rng.randint(1, 8), merge=rng.random() < 0.5)
        optimum = brute_force(problem.evaluator)[0]
        # Few labels: rooms are rounded, and the bound must still be one.
        pricing = pricing_of(problem, rng.choice((8000, 5, 1)))
        for _ in range(3):
            prices = random_prices(rng, problem)
            found = pricing.run(prices)
            assert found is not None
            assert int(prices.sum() + found[0].sum()) <= optimum * FINE


@pytest.mark.parametrize("seed", range(3))
def test_no_legal_group_undercuts_its_first_block(seed: int) -> None:
    """The claim that the bound's proof rests on, for every legal group one by one."""
    rng = Random(4100 + seed)
    for _ in range(60):
        problem = random_problem(rng, rng.randint(2, 7), merge=rng.random() < 0.5)
        blocks = problem.blocks
        pricing = pricing_of(problem)
        order = pricing.automaton.skeleton.order
        place = {block: k for k, block in enumerate(order)}
        prices = random_prices(rng, problem)
        found = pricing.run(prices)
        assert found is not None
        for choice in range(1, 1 << len(blocks)):
            members = list(bits(choice))
            group = sum(blocks[k] for k in members)
            if (
                is_connected(group, problem.near)
                and is_convex(group, problem.above, problem.below)
                and problem.evaluator.valid(group)
            ):
                reduced = problem.evaluator.dram(group) * FINE - int(prices[members].sum())
                assert reduced >= found[0][min(members, key=place.__getitem__)]


def room_of(automaton: Automaton, group: int) -> int | None:
    """What the automaton counts for a set in all; ``None`` if it knows no such set."""
    blocks = automaton.problem.blocks
    joins = [
        layer.block != NO_BLOCK and bool(blocks[layer.block] & group) for layer in automaton.layers
    ]
    last = max(k for k, in_ in enumerate(joins) if in_)
    state = room = 0
    for layer, in_ in zip(automaton.layers[:last], joins[:last], strict=True):
        to, added, _ = list(layer.steps())[in_]
        room += int(added[state])
        state = int(to[state])
        if state < 0:
            return None
    (join,) = automaton.layers[last].joins
    return room + int(join.last_room[state]) if join.ends[state] else None


@pytest.mark.parametrize("seed", range(3))
def test_the_automaton_counts_between_floor_and_buffer(seed: int) -> None:
    """For every connected convex set: all that the floor knows, and no more than ``F_b``."""
    rng = Random(4120 + seed)
    counted = 0
    for _ in range(120):
        problem = random_problem(rng, rng.randint(2, 8), merge=rng.random() < 0.5)
        automaton = line_automaton(problem)
        assert automaton is not None
        scheme = problem.evaluator.scheme
        for choice in range(1, 1 << len(problem.blocks)):
            group = sum(problem.blocks[k] for k in bits(choice))
            if is_connected(group, problem.near) and is_convex(group, problem.above, problem.below):
                room, buffer = room_of(automaton, group), scheme.buffer(group)
                floor = scheme.floor(group)
                if buffer < problem.evaluator.buffer_bytes:
                    assert room is not None
                if room is not None:
                    assert floor <= room <= buffer
                    counted += 1
    assert counted > 800


def test_sets_have_the_shortfall_that_is_claimed() -> None:
    """Where no room was rounded, each set costs exactly what the program says."""
    rng = Random(4200)
    for _ in range(100):
        problem = random_problem(rng, rng.randint(2, 9))
        prices = random_prices(rng, problem)
        pricing = pricing_of(problem)
        found = pricing.run(prices)
        assert found is not None
        shortfall, sets = found
        place = {b: k for k, b in enumerate(pricing.automaton.skeleton.order)}
        least: dict[int, int] = {}
        for group in (each.mask for each in sets):
            inside = [k for k, block in enumerate(problem.blocks) if block & group]
            cost = problem.evaluator.scheme.dram(group, 0).total * FINE
            first = min(inside, key=place.__getitem__)
            least[first] = min(least.get(first, 0), cost - int(prices[inside].sum()))
        assert least == {k: m for k, m in enumerate(shortfall) if m < 0}


def test_what_was_priced_before_does_not_matter() -> None:
    """The prices of room that a run tries come from the one before; they only save labels."""
    rng = Random(4250)
    for _ in range(40):
        problem = random_problem(rng, rng.randint(2, 9))
        used = pricing_of(problem)
        for _ in range(4):
            prices = random_prices(rng, problem)
            again, fresh = used.run(prices), pricing_of(problem).run(prices)
            assert again is not None
            assert fresh is not None
            assert again[0].tolist() == fresh[0].tolist()


def test_sets_fit_where_rooms_are_rounded() -> None:
    """What rounding lets in counts for the bound, but is no set that the program may use."""
    rng = Random(4270)
    seen = 0
    for _ in range(100):
        problem = random_problem(rng, rng.randint(3, 9))
        prices = random_prices(rng, problem)
        found = pricing_of(problem, most=1).run(prices)
        assert found is not None
        for group in (each.mask for each in found[1]):
            # Prices by which this set is the cheapest of all that there are.
            inside = np.array([bool(block & group) for block in problem.blocks])
            exact = pricing_of(problem).run(np.where(inside, 1, -1) * (FINE << 24))
            assert exact is not None
            assert group in {each.mask for each in exact[1]}
            seen += 1
    assert seen > 100


def test_expired() -> None:
    problem = random_problem(Random(1), 6)
    work, pricing = problem.evaluator.work, pricing_of(problem)
    with work.within(0), pytest.raises(OutOfWork):
        line_automaton(problem)
    with work.within(0), pytest.raises(OutOfWork):
        pricing.run(random_prices(Random(1), problem))


def test_lbdf_only() -> None:
    build = Builder()
    build.conv(build.input((1, 1, 4, 4)), 1)
    problem = FusionProblem(Evaluator(make_scheme("brr", build.graph(), "line", 1, 1), 1 << 20))
    with pytest.raises(OptionError, match="lbdf"):
        line_automaton(problem)


def test_columns_cost_what_groups_cost() -> None:
    rng = Random(4300)
    for _ in range(60):
        problem = random_problem(rng, rng.randint(1, 9), merge=rng.random() < 0.5)
        columns = Columns(problem)
        groups = [sum(block for block in problem.blocks if rng.random() < 0.5) for _ in range(20)]
        scheme = problem.evaluator.scheme
        assert columns.costs(groups).tolist() == [scheme.dram(g, 0).total for g in groups]
        matrix = columns.matrix(groups).toarray()
        for k, group in enumerate(groups):
            assert [bool(x) for x in matrix[:, k]] == [bool(b & group) for b in problem.blocks]
        assert columns.weights.sum() == sum(
            problem.graph.ops[i].weight_elements for i in bits(problem.fusable)
        )


@pytest.mark.parametrize("seed", range(2))
def test_coarse_prices_bound_the_optimum(seed: int) -> None:
    """Blocks that share a price: the program is weaker, its bound still one."""
    rng = Random(4400 + seed)
    met = 0
    for problem, optimum in with_optima(rng, 40, 2, 8):
        pricing = pricing_of(problem)
        classes = [pricing.automaton.skeleton.classes(radius) for radius in (0, 1)]
        columns, known = Columns(problem), single(problem)
        bounds = [prove(columns, pricing, known, classes=chosen).bound for chosen in (classes, [])]
        assert max(bounds) <= optimum
        assert bounds[0] == bounds[1]  # the last rows are single blocks in any case
        met += bounds[0] == optimum
    assert met >= 25


def test_the_ascent_goes_on_from_where_it_was() -> None:
    rng = Random(4450)
    parts = 0
    for _ in range(20):
        problem = random_problem(rng, rng.randint(3, 8))
        columns = Columns(problem)
        known = single(problem)
        whole = prove(columns, pricing_of(problem), known)
        pricing = pricing_of(problem)
        with problem.evaluator.work.steps_within(rng.choice((500, 1_000, 5_000))):
            part = prove(columns, pricing, known)
        assert part.bound <= whole.bound
        parts += part.bound < whole.bound
        rest = prove(columns, pricing_of(problem), known, start=part)
        assert part.bound <= rest.bound == whole.bound
    assert parts > 5


def test_the_ascent_ends_where_it_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each step has to close all of the gap, at the first time of asking."""
    rng = Random(4460)
    ended = 0
    for problem, optimum in with_optima(rng, 30, 4, 8):
        columns, known = Columns(problem), single(problem)
        whole = prove(columns, pricing_of(problem), known)
        with monkeypatch.context() as soon:
            soon.setattr(block_prices, "STALLED", (0.5, 2.0))
            soon.setattr(block_prices, "FEWEST", 1)
            part = prove(columns, pricing_of(problem), known)
        assert part.bound <= whole.bound <= optimum
        ended += part.bound < whole.bound
        if part.bound < whole.bound:
            assert part.stopped == block_prices.NO_BETTER
    assert ended > 5


@pytest.mark.parametrize("labels", [100_000, 0], ids=["listed", "too many"])
def test_no_legal_group_undercuts_the_prices_of_legal_groups(
    labels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim of the proof for every legal group, and it is the least where all are listed."""
    monkeypatch.setattr(legal_pricing, "LABELS", labels)
    rng = Random(4470)
    tighter = loose = 0
    for _ in range(400):
        problem = random_problem(rng, rng.randint(3, 8), merge=rng.random() < 0.5)
        if not problem.blocks:
            continue
        columns, pricing = Columns(problem), pricing_of(problem)
        legal = LegalPricing(columns, pricing)
        prices = random_prices(rng, problem)
        shortfall, undercut = legal.run(prices)
        least = least_reduced(problem, prices, pricing.automaton.skeleton.order)
        if labels:
            for group in (each.mask for each in undercut):
                assert problem.evaluator.valid(group)
                assert is_connected(group, problem.near)
        loose += assert_none_undercuts(shortfall, least) > 0
        tighter += bool((shortfall > pricing.run(prices)[0]).any())
    if labels:
        assert not loose
        assert tighter > 10
    else:
        assert loose


def test_producers_are_decided_first() -> None:
    rng = Random(4480)
    for _ in range(60):
        problem = random_problem(rng, rng.randint(1, 9), merge=rng.random() < 0.5)
        if problem.blocks:
            skeleton = pricing_of(problem).automaton.skeleton
            place = {block: k for k, block in enumerate(skeleton.order)}
            for stream in skeleton.streams:
                if stream.maker >= 0:
                    assert place[stream.maker] == min(place[block] for block in stream.blocks)


def test_classes_know_what_is_alike() -> None:
    build = Builder()
    fork = build.conv(build.input((1, 2, 8, 8)), 2)
    ends = [build.conv(build.conv(fork, 2, 3), 2, kernel) for kernel in (3, 3, 1)]
    build.add(*ends)
    problem = FusionProblem(Evaluator(make_scheme("lbdf", build.graph(), "line", 1, 1), 1 << 20))
    near, far = (pricing_of(problem).automaton.skeleton.classes(radius) for radius in (0, 2))
    # fork, three chains of two, the addition
    assert near[1] == near[3] == near[5]
    assert near[2] == near[4] != near[6]
    assert far[1] == far[3] != far[5]
    assert len(set(far.tolist())) == 6


def test_too_many_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automaton, "FIRST_STATES", 3)
    monkeypatch.setattr(automaton, "EXACT_STATES", 3)
    monkeypatch.setattr(automaton, "MOST_STATES", 3)
    assert line_automaton(random_problem(Random(2), 8)) is None


def test_states_are_told_apart_however_many_words_they_take() -> None:
    rng = np.random.default_rng(7)
    for rows, highest in ((0, 1), (3, 0), (5, 1), (20, 15), (40, 255)):
        states = rng.integers(0, highest + 1, (rows, 60), np.uint8)[:, rng.integers(0, 60, 200)]
        words = packed(states, 200)
        as_bytes = [bytes(column[::-1]) for column in states.T]
        assert np.lexsort(words).tolist() == sorted(range(200), key=as_bytes.__getitem__)
        keys = {tuple(int(word[k]) for word in words) for k in range(200)}
        assert len(keys) == len(set(as_bytes))


def test_parts_are_numbered_by_their_first_tensors() -> None:
    rng = np.random.default_rng(8)
    part = rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), (6, 300))
    numbered, count = renumbered(part)
    for before, after, most in zip(part.T, numbered.T, count, strict=True):
        first = dict.fromkeys(before[before > 0].tolist())
        number = {old: k + 1 for k, old in enumerate(first)}
        assert after.tolist() == [number.get(old, 0) for old in before.tolist()]
        assert most == len(first)
    sets = automaton._Sets().take(np.zeros(300, np.int64))
    sets.state, sets.part, sets.parts = part.copy(), part.copy(), count + rng.integers(0, 2, 300)
    alive = automaton._alive(sets)
    several = (sets.parts > 1) & part.any(axis=0)
    assert (sets.part[:, several] == numbered[:, several]).all()
    fits = np.where(sets.parts > 1, sets.parts == count, part.any(axis=0))
    fits[0] = True  # the empty set
    assert alive.tolist() == np.flatnonzero(fits).tolist()


def test_sums_beyond_64_bits_prove_nothing() -> None:
    """Eight shortfalls of which the sum is a multiple of 2**64: none, as 64 bits count."""

    class Deep:
        place = np.arange(8)

        def run(self, prices: np.ndarray) -> tuple[np.ndarray, list[int]]:
            return np.full(8, -(1 << 61)), []

    build = Builder()
    last = build.input((1, 2, 8, 8))
    for _ in range(8):
        last = build.conv(last, 2)
    problem = FusionProblem(Evaluator(make_scheme("lbdf", build.graph(), "line", 1, 1), 1 << 20))
    proof = prove(Columns(problem), Deep(), single(problem))
    assert proof.bound == problem.unavoidable < single(problem).dram_bytes
