"""The search from the end against enumeration and against the search from the start."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from tests.brute import brute_force
from tests.graphs import Builder, random_graph, with_pools
from tests.legal import assert_legal, single
from tests.partition.test_exact import random_evaluator
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.exact import backward as module
from torch_getfuse.partition.exact.backward import FromTheEnd, backward
from torch_getfuse.partition.exact.chains import Chains
from torch_getfuse.partition.exact.down_set_table import DownSets, Window
from torch_getfuse.partition.exact.down_sets import Limits, TooWide, exact
from torch_getfuse.partition.pins import pins_of
from torch_getfuse.partition.problem import FusionProblem, SearchResult
from torch_getfuse.planner import plan_graph


def rereading(rng: Random, operators: int) -> Evaluator:
    """A random graph under BRR and a buffer that holds few weights, so that most groups re-read."""
    graph = random_graph(rng, operators, rng.choice((6, 10, 16)))
    graph = with_pools(rng, graph, rng.choice((0.0, 0.3)))
    model = make_scheme("brr", graph, "line", 1, 1)
    floor = max(model.buffer(1 << i, 1 << 30) or 0 for i in range(operators))
    return Evaluator(model, rng.randint(floor // 2 + 1, 4 * floor + 2))


def check(evaluator: Evaluator, optimum: int) -> SearchResult:
    problem = FusionProblem(evaluator)
    found = backward(problem, single(problem))
    assert (found.dram_bytes, found.lower_bound_bytes, found.stopped) == (optimum, optimum, "")
    assert problem.cost(found.groups) == optimum
    assert_legal(FusionProblem(evaluator, merge=False), found.groups)
    return found


@pytest.mark.parametrize("scheme", ["lbdf", "brr"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_enumeration(scheme: str, seed: int) -> None:
    rng = Random(2000 + seed)
    for _ in range(400):
        evaluator = random_evaluator(rng, rng.randint(1, 8), scheme)
        check(evaluator, brute_force(evaluator)[0])


def test_equals_enumeration_where_weights_are_read_again() -> None:
    rng = Random(2100)
    again = 0
    for _ in range(400):
        evaluator = rereading(rng, rng.randint(3, 9))
        found = check(evaluator, brute_force(evaluator)[0])
        again += any(evaluator.reread(group) for group in found.groups)
    assert again > 40


@pytest.mark.parametrize("seed", range(2))
def test_equals_the_search_from_the_start_on_larger_graphs(seed: int) -> None:
    rng = Random(2200 + seed)
    for _ in range(15):
        evaluator = rereading(rng, rng.randint(11, 16))
        optimum = exact(FusionProblem(evaluator)).dram_bytes
        check(Evaluator(evaluator.scheme, evaluator.buffer_bytes), optimum)


def test_no_group_goes_around_an_unfusable_operator() -> None:
    """Of two down-sets: what leads from one to the other, bit by bit against the arrays."""
    rng = Random(2250)
    barred = open_ = 0
    for _ in range(80):
        evaluator = rereading(rng, rng.randint(5, 10))
        smaller = Evaluator(evaluator.scheme, evaluator.buffer_bytes // 2)
        problem = FusionProblem(rng.choice((evaluator, smaller)))
        if not problem.blocks:
            continue
        chains = Chains(problem)
        sets = DownSets(problem, chains, Window(chains.start, chains.everything, 1 << 20))
        for at, done in enumerate(sets.masks):
            led_to = set(sets.led_to(at, at + 1, chains.barred(done)).tolist())
            for k in range(at + 1, len(sets.masks)):
                added = sets.masks[k] & ~done
                group = added & ~problem.unfusable
                around = bool(chains.after(added ^ group) & group)
                assert (k in led_to) == (not done & ~sets.masks[k] and not around)
                barred += around and not done & ~sets.masks[k]
            which = np.arange(len(sets.masks))
            part = done & rng.getrandbits(len(problem.graph))
            held = [not part & ~mask for mask in sets.masks]
            assert sets.contain(which, part).tolist() == held
            for k, tensor in enumerate(sets.tensors):
                there = not tensor.maker or bool(tensor.maker & done)
                assert sets.open[k, at] == (there and bool(tensor.readers & ~done))
                open_ += int(sets.open[k, at])
    assert barred > 100
    assert open_ > 1000


def test_pins_are_kept() -> None:
    rng = Random(2300)
    changed = 0
    for _ in range(150):
        free = rereading(rng, rng.randint(3, 8))
        inner = [op.name for op, makers in zip(free.graph.ops, free.graph.makers) if makers]
        if not inner:
            continue
        pins = pins_of(free.graph, (), (rng.choice(inner),))
        pinned = Evaluator(free.scheme, free.buffer_bytes, pins=pins)
        problem = FusionProblem(pinned)
        found = backward(problem, single(problem))
        assert found.dram_bytes == exact(FusionProblem(pinned)).dram_bytes
        assert problem.legal(found.groups)
        changed += found.dram_bytes > backward(FusionProblem(free), single(problem)).dram_bytes
    assert changed > 10


def test_at_a_limit_the_end_of_the_known_plan_is_replaced() -> None:
    rng = Random(2400)
    better = unsolved = bounded = 0
    for _ in range(90):
        problem = FusionProblem(rereading(rng, rng.randint(8, 14)))
        known = single(problem)
        optimum = exact(problem).dram_bytes
        found = backward(problem, known, Limits(seconds=rng.uniform(5, 60) * 1e-3))
        assert optimum <= found.dram_bytes <= known.dram_bytes
        assert found.dram_bytes == problem.cost(found.groups)
        assert_legal(FusionProblem(problem.evaluator, merge=False), found.groups)
        if found.stopped:
            unsolved += 1
            better += found.dram_bytes < known.dram_bytes
            assert found.lower_bound_bytes <= optimum
            bounded += problem.unavoidable < found.lower_bound_bytes
    assert unsolved > better > 5
    assert bounded > 5


def test_it_goes_on_where_it_was_left() -> None:
    rng = Random(2450)
    left = 0
    for _ in range(60):
        problem = FusionProblem(rereading(rng, rng.randint(8, 12)))
        search, known = FromTheEnd(problem), single(problem)
        found = search.run(known, Limits(seconds=rng.uniform(2, 20) * 1e-3))
        before = found.plans
        if found.stopped:
            left += 1
            found = search.run(found)
            assert found.plans >= before
        optimum = exact(problem).dram_bytes
        assert (found.dram_bytes, found.lower_bound_bytes) == (optimum, optimum)
    assert left > 15


def test_it_leaves_the_time_to_another_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its pace does not lead to the end; the bound that it has is one."""
    monkeypatch.setattr(module, "_LOOKS", (1 / 2, 3 / 4))
    rng = Random(2460)
    gave_up = ended = 0
    for _ in range(60):
        problem = FusionProblem(rereading(rng, rng.randint(8, 14)))
        limits = Limits(seconds=rng.uniform(5, 60) * 1e-3)
        found = FromTheEnd(problem).run(single(problem), limits, followed=True)
        gave_up += "of its down-sets in 50%" in found.stopped
        ended += not found.stopped
        assert found.lower_bound_bytes <= exact(problem).dram_bytes <= found.dram_bytes
    assert gave_up > 5
    assert ended > 5


def test_too_many_down_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = FusionProblem(rereading(Random(2500), 8))
    monkeypatch.setattr(module, "MOST_DOWN_SETS", 3)
    with pytest.raises(TooWide, match="more than 3 down-sets"):
        backward(problem, single(problem))


def _branches(count: int) -> OpGraph:
    """Convolutions beside each other, and what joins them."""
    build = Builder()
    source = build.conv(build.input((1, 32, 16, 16)), 64)
    build.add(*[build.conv(build.conv(source, 64, 3), 64, 3) for _ in range(count)])
    return build.graph()


def test_the_planner_proves_by_it_and_says_what_it_did_not_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = Options(scheme="brr", buffer=24 * 1024, explainer=None, cache=False)
    plan = plan_graph(_branches(6), options)
    assert (plan.method, plan.proof) == ("backward", "optimal")
    monkeypatch.setattr(module, "MOST_DOWN_SETS", 10)
    other = plan_graph(_branches(6), options)
    stage = next(stage for stage in other.stages if stage.method == "backward")
    assert stage.stopped == "not tried: more than 10 down-sets"
    assert other.dram_bytes == plan.dram_bytes
    assert (other.method, other.proof) == ("cover", "optimal")


def test_a_group_that_a_later_one_starts_with_is_no_group() -> None:
    """Merging that its limit stops leaves an operator in place alone."""
    chains = Chains(FusionProblem(rereading(Random(0), 8)))
    assert chains.without_shared([0b001, 0b010, 0b110]) == (0b001, 0b110)
