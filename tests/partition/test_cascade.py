"""The evaluator of cascade against its oracle, step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from random import Random

import pytest

from tests.cascade_both import (
    assert_layout,
    assert_step,
    beside_of,
    model_of,
    random_around,
    random_buffer,
    random_step,
    tensor_names,
)
from tests.cascade_simulator import ALONE, Around, subsets
from tests.cascade_simulator import Cascade as Oracle
from tests.graphs import IDENTITY, Builder, cascade_graph
from tests.networks import SIZES, operator_graph
from torch_getfuse.ir import Window
from torch_getfuse.partition.cost.cascade.groups import Weighted
from torch_getfuse.partition.cost.cascade.model import Cascade
from torch_getfuse.partition.cost.cascade.pricing import Beside
from torch_getfuse.partition.cost.cascade.weights import most_staying


def random_oracle(rng: Random) -> Oracle:
    graph = cascade_graph(rng, rng.randint(2, 8))
    if rng.random() < 0.5:  # twelve times the channels: so many slices, and streams worth it
        wide = {
            n: replace(t, shape=(1, 12 * t.shape[1], *t.shape[2:]))
            for n, t in graph.tensors.items()
        }
        ops = [
            replace(op, weight_elements=op.weight_elements * rng.choice((12, 144))) for op in graph
        ]
        graph = replace(graph, tensors=wide, ops=tuple(ops))
    return Oracle(graph, 1, rng.choice((1, 1, 2)), rng.choice((1, 2)), rng.choice((1, 2, 16)))


@pytest.mark.parametrize("chunk", range(5))
def test_random_steps(chunk: int) -> None:
    """2,000 steps in all, each beside four sets of residents."""
    seen: Counter[str] = Counter()
    for seed in range(400 * chunk, 400 * (chunk + 1)):
        rng = Random(seed)
        oracle = random_oracle(rng)
        model = model_of(oracle)
        mask = random_step(rng, oracle.graph, rng.choice((1, 3, 5)))
        for _ in range(4):
            around = random_around(rng, oracle, mask)
            oracle.buffer_bytes = random_buffer(rng, oracle, mask, around)
            way, run = assert_step(oracle, model, mask, around)
            seen[way.kind] += 1
            seen["several stripes"] += way.kind == "stripes" and way.count > 1
            seen["some stay"] += 0 < way.stays < oracle.weighty(mask)
            seen["beside"] += around.beside > 0
            if way.kind in ("line", "stripes"):
                apart = oracle.run_step(mask, way, around, {})
                seen["written over"] += run.features < apart.features
    wanted = ("line", "stripes", "slices", "none", "several stripes", "some stay", "beside")
    assert all(seen[what] >= 5 for what in (*wanted, "written over")), seen


@pytest.mark.parametrize("name", SIZES)
def test_steps_of_networks(name: str) -> None:
    """500 steps of each network, on images that leave enough rows for stripes."""
    oracle = Oracle(operator_graph(name, 64), 1)
    model = model_of(oracle)
    rng = Random(name)
    seen: Counter[str] = Counter()
    for _ in range(100):
        mask = random_step(rng, oracle.graph, rng.choice((1, 3, 5)))
        for _ in range(5):
            around = random_around(rng, oracle, mask)
            oracle.buffer_bytes = random_buffer(rng, oracle, mask, around)
            way, _ = assert_step(oracle, model, mask, around)
            seen[way.kind] += 1
            seen["several stripes"] += way.kind == "stripes" and way.count > 1
        oracle.runs.clear()
    assert all(seen[kind] >= 20 for kind in ("line", "stripes", "slices", "several stripes")), seen


def private(oracle: Oracle, mask: int) -> list[str]:
    """Tensors whose whole life is in a step."""
    return [
        name
        for name in oracle.touched(mask)
        if not (oracle.read_by(name) | oracle.made_by(name)) & ~mask
    ]


def assert_free(oracle: Oracle, model: Cascade, mask: int, around: Around) -> int:
    """A step is as good as with the best set of tensors that stay for it alone; returns it."""
    beside, known = beside_of(oracle, mask, around, free=True)
    step = model.step(mask, beside, known, oracle.buffer_bytes)
    more = [name for name in private(oracle, mask) if name not in around.resident]
    found = []
    for count in range(len(more) + 1):
        for kept in combinations(more, count):
            best = oracle.best_way(mask, stay_as_well(oracle, around, kept))
            if best is not None:
                found.append((best[1].total, best[1].buffer))
    if not found:
        assert step is None
        return 0
    assert step is not None
    assert step.priced is not None
    assert (step.dram.total, step.priced.buffer) == min(found)
    names = tensor_names(oracle.graph, step.priced.kept)
    assert names <= {*more}
    best = oracle.best_way(mask, stay_as_well(oracle, around, names))
    assert best is not None
    assert (best[1].total, best[1].buffer) == min(found)
    assert_layout(oracle, model, mask, beside, step.priced, best[1])
    return step.priced.kept


def test_tensors_that_stay_for_one_step_where_that_is_of_use() -> None:
    better = 0
    for seed in range(400):
        rng = Random(seed)
        oracle = random_oracle(rng)
        model = model_of(oracle)
        mask = random_step(rng, oracle.graph, 3)
        around = random_around(rng, oracle, mask)
        oracle.buffer_bytes = random_buffer(rng, oracle, mask, around)
        better += bool(assert_free(oracle, model, mask, around))
    assert better >= 10


def test_a_row_of_storages_below_two_sums_is_counted_once() -> None:
    """Both sums read the map that is written over x: only the later may be written over it."""
    build = Builder()
    shape = (1, 1, 3, 12)
    x = build.input(shape)
    first = build.op("neg", [(x, IDENTITY)], shape)
    middle = build.add(build.conv(first, 1, 3), first)
    build.conv(build.add(middle, first), 1, 3)
    oracle = Oracle(build.graph(), 1)
    model = model_of(oracle)
    kept = 0
    for oracle.buffer_bytes in range(90, 260, 3):
        kept += bool(assert_free(oracle, model, 0b11111, ALONE))
    assert kept >= 10


def test_of_two_maps_that_are_never_written_one_is_over_their_operand() -> None:
    """The convolution reads the padding alone, so no row of any map is ever needed."""
    build = Builder()
    shape = (1, 1, 4, 1)
    x = build.input(shape)
    maps = [build.op(kind, [(x, IDENTITY)], shape) for kind in ("neg", "abs")]
    corner = Window.sliding((1, 1), (6, 6), (1, 1), (1, 1))
    build.op("conv", [(name, corner) for name in maps], (1, 1, 1, 1), mixes=True)
    oracle = Oracle(build.graph(), 20)
    everything = frozenset((x, *maps))
    around = Around(everything, frozenset((x,)), everything)
    _, run = assert_step(oracle, model_of(oracle), 0b111, around)
    assert run.features == 4 + 4 + 1


def stay_as_well(oracle: Oracle, around: Around, names: Iterable[str]) -> Around:
    """The residents of a step, and tensors that are on chip for it alone."""
    inputs = [name for name in names if name in oracle.graph.inputs]
    return around._replace(
        resident=around.resident.union(names),
        first=around.first.union(inputs),
        last=around.last.union(names),
    )


def test_a_larger_buffer_never_costs_more() -> None:
    for seed in range(300):
        rng = Random(seed)
        oracle = random_oracle(rng)
        model = model_of(oracle)
        mask = random_step(rng, oracle.graph, 6)
        around = random_around(rng, oracle, mask)
        beside, known = beside_of(oracle, mask, around, free=rng.random() < 0.5)
        top = random_buffer(rng, oracle, mask, around)
        totals = []
        for buffer_bytes in range(1, 2 * top, max(1, top // 20)):
            step = model.step(mask, beside, known, buffer_bytes)
            totals.append(1 << 62 if step is None else step.dram.total)
            assert step is None or step.priced is None or step.priced.buffer < buffer_bytes
        assert totals == sorted(totals, reverse=True)


def test_which_weights_stay() -> None:
    for seed in range(1000):
        rng = Random(seed)
        most = rng.choice((4, 40, 4000))
        weighted = []
        for op in rng.sample(range(12), rng.randint(1, 7)):
            size = rng.randint(1, most)
            weighted.append(Weighted(op, size, rng.randint(1, size)))
        room = rng.randint(0, sum(own.size for own in weighted) + 1)
        choices = []
        for stays in subsets(sum(1 << own.op for own in weighted)):
            held = sum(own.size for own in weighted if stays >> own.op & 1)
            staging = max((own.staging for own in weighted if not stays >> own.op & 1), default=0)
            if held + staging <= room:
                choices.append((held, -staging))
        found = most_staying(weighted, room)
        if not choices:
            assert found is None
            continue
        assert found is not None
        assert (found.held, -found.staging) == max(choices)
        assert found.held == sum(own.size for own in weighted if found.ops >> own.op & 1)


def test_an_operator_that_fits_only_over_its_operand_is_unfusable() -> None:
    """One row: operand and output are 8 bytes each, 8 in all if both stay for the step."""
    build = Builder()
    build.op("neg", [(build.input((1, 1, 1, 8)), IDENTITY)], (1, 1, 1, 8))
    for buffer_bytes in (9, 16, 17):
        oracle = Oracle(build.graph(), buffer_bytes)
        model = model_of(oracle)
        fits = buffer_bytes == 17
        assert oracle.unfusable == (not fits)
        assert (model.buffer(1, buffer_bytes) < buffer_bytes) == fits
        assert model.step(1, Beside(), 0, buffer_bytes) is not None
        assert (oracle.best_way(1, ALONE) is not None) == fits
