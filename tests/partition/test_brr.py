"""BRR against arithmetic by hand (docs/method.md, section 4). One byte per element throughout."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.brute import brute_force
from tests.graphs import IDENTITY, Builder, grown_group, random_graph, with_pools
from tests.legal import assert_legal, single
from tests.networks import operator_graph
from tests.widths import mixed_widths, unit_bytes
from torch_getfuse.ir import OpGraph, Window, WindowKind
from torch_getfuse.partition.cost.brr.model import Brr
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Dram, Evaluator
from torch_getfuse.partition.exact.backward import backward
from torch_getfuse.partition.exact.down_sets import exact
from torch_getfuse.partition.merging import merge_greedily
from torch_getfuse.partition.node_set import (
    ancestors,
    bits,
    descendants,
    is_connected,
    is_convex,
    neighbours,
)
from torch_getfuse.partition.problem import FusionProblem

AMPLE = 1 << 20


def two_convolutions() -> OpGraph:
    build = Builder()
    x = build.input((1, 4, 16, 10))
    build.conv(build.conv(x, 64, kernel=3), 16, kernel=3)
    return build.graph()


def test_two_convolutions() -> None:
    """x 4x16x10 -> 64 channels -> 16 channels, both 3x3 with padding 1.

    The sink makes m = 1 row, so the first convolution keeps (1 - 1)*1 + 3 = 3 rows.
    Start full:    64 channels x 3 rows x 10 + partial min(16, 32) x 1 x 10 = 1920 + 160 = 2080;
                   one more line costs 64*10 + 16*10 = 800.
    Start partial: the input with all 4 channels, (3 - 1)*1 + 3 = 5 rows: 4*5*10 = 200;
                   32 x 3 x 10 + full 16 x 1 x 10 = 960 + 160; in all 1320; a line costs
                   4*10 + 32*10 + 160 = 520.
    In an ample buffer 520 / (B - 1320) is the smaller.
    """
    brr = Brr(two_convolutions())
    assert brr.buffer(0b11, AMPLE) == 1320
    assert [(t.kind, t.name, t.units, t.unit_bytes) for t in brr.terms(0b11, AMPLE)] == [
        ("partial", "conv0", 3, 320),
        ("full", "conv1", 1, 160),
        ("input", "x0", 5, 40),
    ]
    # Weights: 64*4*9 + 64 = 2368 and 16*64*9 + 16 = 9232. In the ample buffer they are resident:
    # one pass. In 4000 B they are not: h = (4000 - 1320) // 520 + 1 = 6 lines per tile, so
    # ceil(16 / 6) = 3 passes.
    features = Dram(read=4 * 16 * 10, write=16 * 16 * 10, weight=0)
    assert brr.dram(0b11, AMPLE) == features._replace(weight=2368 + 9232)
    assert brr.dram(0b11, 4000) == features._replace(weight=3 * (2368 + 9232))


def test_the_start_is_chosen_by_what_is_left_of_the_buffer() -> None:
    """A first convolution with few channels and a wide input is cheaper full.

    x 40x16x10 -> 4 -> 4 channels, 3x3. Full: 4*3*10 + 4*1*10 = 160. Partial: input 40*5*10 =
    2000 and the same 160.
    """
    build = Builder()
    build.conv(build.conv(build.input((1, 40, 16, 10)), 4, kernel=3), 4, kernel=3)
    brr = Brr(build.graph())
    assert brr.buffer(0b11, AMPLE) == 160


def test_residual_block() -> None:
    """x 64x14x14; 1x1 to 16, 3x3 to 16, 1x1 to 64, add x: a local operator stores nothing.

    Rows, from the sink: add 1, last 1x1 1, 3x3 1, first 1x1 (1 - 1) + 3 = 3.
    Start full:    16*3*14 full + 16*1*14 partial (kappa 32 > 16) + 64*1*14 full = 672 + 224 +
                   896 = 1792.
    Start partial: input 64 channels x 3 rows x 14 = 2688, + 672 + 224 + 32*14 = 448: 4032.
    x is read by add from outside as well, once.
    """
    build = Builder()
    x = build.input((1, 64, 14, 14))
    body = build.conv(build.conv(build.conv(x, 16), 16, kernel=3), 64)
    build.add(body, x)
    brr = Brr(build.graph())
    assert brr.buffer(0b1111, AMPLE) == 1792
    assert brr.dram(0b1111, AMPLE).read == 64 * 14 * 14


def test_strided_block() -> None:
    """x 8x32x32; 3x3 stride 2 to 40, then 3x3 to 40 on 16x16.

    Rows: sink 1; the strided one (1 - 1)*1 + 3 = 3; its input (3 - 1)*2 + 3 = 7.
    Start full:    40*3*16 + 32*1*16 = 1920 + 512 = 2432; a line costs 640 + 512 = 1152.
    Start partial: input 8*7*32 = 1792; 32*3*16 = 1536; 40*1*16 = 640: 3968; a line costs
                   2 input rows 8*2*32 = 512, + 512 + 640 = 1664.
    """
    build = Builder()
    build.conv(build.conv(build.input((1, 8, 32, 32)), 40, kernel=3, stride=2), 40, kernel=3)
    brr = Brr(build.graph())
    assert brr.buffer(0b11, AMPLE) == 2432
    # 3968 - 2432 bytes nearer to the buffer: 2432 + 1152 x 3 lines and no fourth.
    weights = (40 * 8 * 9 + 40) + (40 * 40 * 9 + 40)
    assert brr.dram(0b11, 2432 + 3 * 1152).weight == weights * 4  # h = 4, 16 rows


def test_sinks_of_two_strides_advance_at_their_own_rates() -> None:
    """Two consumers of x, stride 1 and stride 2: cumulative strides 1 and 2, lcm 2.

    The first makes 2 rows while the second makes 1. Weights of both count once per pass.
    """
    build = Builder()
    stem = build.conv(build.input((1, 4, 8, 8)), 4)
    build.conv(stem, 4)
    build.conv(stem, 4, stride=2)
    brr = Brr(build.graph())
    held = {t.name: t.units for t in brr.terms(0b111, AMPLE)}
    # Stem: max((2 - 1)*1 + 1, (1 - 1)*2 + 1) = 2 rows.
    assert (held["conv0"], held["conv1"], held["conv2"]) == (2, 2, 1)


def test_paths_of_different_stride_make_a_group_invalid() -> None:
    build = Builder()
    stem = build.conv(build.input((1, 4, 8, 8)), 4)
    fine = build.conv(stem, 4)
    coarse = build.conv(stem, 4, stride=2)
    up = build.op("resize", [(coarse, Window.resize((2.0, 2.0)))], (1, 4, 8, 8))
    build.conv(build.add(fine, up), 4)
    brr = Brr(build.graph())
    assert brr.buffer(0b111111, AMPLE) is not None  # stride 2 and scale 2 agree
    skewed = Builder()
    x = skewed.input((1, 4, 8, 8))
    stem = skewed.conv(x, 4)
    pooled = skewed.conv(stem, 4, kernel=8, padding=0)
    wide = skewed.op("resize", [(pooled, Window.resize((8.0, 8.0)))], (1, 4, 8, 8))
    skewed.add(stem, wide)
    assert Brr(skewed.graph()).buffer(0b1111, AMPLE) is None


def test_squeeze_excite_loop_is_invalid() -> None:
    build = Builder()
    body = build.conv(build.input((1, 8, 8, 8)), 8, kernel=3)
    pooled = build.op("pool", [(body, Window.reduce())], (1, 8, 1, 1))
    scale = build.conv(pooled, 8)
    build.op("mul", [(body, Window.identity()), (scale, Window.identity())], (1, 8, 8, 8))
    brr = Brr(build.graph())
    assert brr.buffer(0b1111, AMPLE) is None
    assert brr.floor(0b1111) > AMPLE
    assert brr.buffer(0b0111, AMPLE) is not None


def test_depthwise_weights_count_and_it_stores_nothing() -> None:
    build = Builder()
    first = build.conv(build.input((1, 8, 8, 8)), 48)
    build.conv(build.conv(first, 48, kernel=3, depthwise=True), 8)
    brr = Brr(build.graph())
    assert {t.name for t in brr.terms(0b111, AMPLE)} == {"x0", "conv0", "conv2"}
    assert brr.dram(0b111, AMPLE).weight == (48 * 8 + 48) + (48 * 9 + 48) + (8 * 48 + 8)


def test_group_that_starts_with_a_local_operator_holds_its_rows_of_the_input() -> None:
    build = Builder()
    x = build.input((1, 6, 8, 8))
    build.act(x)
    brr = Brr(build.graph())
    assert [(t.kind, t.name, t.bytes) for t in brr.terms(0b1, AMPLE)] == [("input", "x0", 48)]


def test_a_first_local_operator_holds_the_rows_of_its_window() -> None:
    """A 3x3 pool needs 3 of x's rows for one of its own, 5 below another 3x3; at most all 8."""
    build = Builder()
    x = build.input((1, 6, 8, 8))
    pool = build.op("pool", [(x, Window.sliding((3, 3), padding=(1, 1)))], (1, 6, 8, 8))
    build.conv(pool, 4, kernel=3)
    tall = build.op("pool", [(x, Window.sliding((9, 1), padding=(4, 0)))], (1, 6, 8, 8))
    build.op("pool", [(tall, Window.reduce())], (1, 6, 1, 1))
    build.op("mean", [(x, Window.reduce())], (1, 6, 1, 1))
    brr = Brr(build.graph())
    rows = {mask: brr.terms(mask, AMPLE) for mask in (0b1, 0b11, 0b100, 0b10000)}
    held = {mask: next(t.units for t in terms if t.kind == "input") for mask, terms in rows.items()}
    assert held == {0b1: 3, 0b11: 5, 0b100: 8, 0b10000: 1}


@pytest.mark.parametrize("kappa", [1, 8, 64])
def test_kappa_bounds_partial_channels(kappa: int) -> None:
    brr = Brr(two_convolutions(), kappa=kappa)
    partial = [t for t in brr.terms(0b11, AMPLE) if t.kind == "partial"]
    channels = {"conv0": 64, "conv1": 16}
    assert partial
    assert all(t.unit_bytes == min(kappa, channels[t.name]) * 10 for t in partial)


def growth(seed: int) -> tuple[OpGraph, list[int]]:
    """A random graph and sets of it, each grown downstream from the one before."""
    rng = Random(seed)
    graph = random_graph(rng, 9, 12)
    above = ancestors(graph)
    first = rng.randrange(len(graph))
    done = above[first] if rng.random() < 0.5 else 0
    sets = [(above[first] | 1 << first) & ~done]
    for i in rng.sample(range(len(graph)), 4):
        grown = sets[-1] | (above[i] | 1 << i) & ~done
        if grown != sets[-1] and is_connected(grown, neighbours(graph)):
            sets.append(grown)
    return graph, sets


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_what_grew_is_judged_as_if_from_nothing(seed: int) -> None:
    graph, sets = growth(seed)
    brr, part = Brr(graph), 0
    size = Random(seed).randint(1, 300)
    for grown in sets:
        fresh = Brr(graph)
        assert brr.hopeless(grown, size, part) == (fresh.floor(grown) >= size)
        assert brr.least_reread(grown, size, part) == fresh.least_reread(grown, size)
        part = grown


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_bounds_hold_for_all_that_grows(seed: int) -> None:
    graph, sets = growth(seed)
    brr = Brr(graph)
    for k, grown in enumerate(sets):
        need = brr.buffer(grown, AMPLE)
        for size in [] if need is None else [need + 1, need + 7, 2 * need + 1, 4 * need + 1]:
            if (brr.buffer(grown, size) or size) < size:
                for part in sets[: k + 1]:
                    assert not brr.hopeless(part, size)
                    assert brr.least_reread(part, size) <= brr.reread(grown, size)


def test_what_all_tiles_hold() -> None:
    """With weights beyond the buffer, as often as :class:`TileRows` say at least."""
    rng = Random(61)
    asked = tight = paired = 0
    for _ in range(1500):
        graph, sets = growth(rng.randrange(1 << 32))
        brr = Brr(graph, kappa=1)
        rows = brr.tile_rows
        for group in sets:
            need, weighted = brr.buffer(group, AMPLE), [i for i in bits(group) if brr.weights[i]]
            if need is None or len(weighted) < 2:
                continue
            pairs = sum(more for i, c, more in rows.pairs if group >> i & group >> c & 1)
            held = sum(rows.least[i] for i in bits(group)) + pairs
            short = sum(rows.short[i] for i in bits(group))
            weights = sum(brr.weights[i] for i in bits(group))
            for size in {need + 1, need + rng.randint(1, need + 1)}:
                if (brr.buffer(group, size) or size) < size < weights:
                    passes = brr.reread(group, size) // weights + 1
                    least = -(-held // (size + short))
                    assert least <= passes
                    asked += 1
                    tight += least == passes > 1
                    paired += least > -(-(held - pairs) // (size + short))
    assert asked > 300
    assert tight > 20
    assert paired > 10


def test_least_passes_of_maps_that_fill_the_buffer_thrice() -> None:
    """Two convolutions of 16 channels on 16x10, 2560 bytes each; full and partial are the same.

    Their 5120 bytes pass through a buffer of 1800 in three tiles at least; with the halo it is
    h = (1800 - 640) // 320 + 1 = 4 lines per tile and four tiles.
    """
    build = Builder()
    build.conv(build.conv(build.input((1, 64, 16, 10)), 16, kernel=3), 16, kernel=3)
    brr = Brr(build.graph())
    assert brr.buffer(0b11, 1800) == 3 * 160 + 160
    weights = sum(brr.weights)
    assert (brr.least_reread(0b11, 1800), brr.reread(0b11, 1800)) == (2 * weights, 3 * weights)
    assert brr.least_reread(0b01, 1800) == brr.weights[0]  # 2560 bytes in two, 9 KB of weights


# (network, buffer KB) -> bytes of the optimum with 2 bytes per element: 7.689, 7.444, 7.085 and
# 30.232 MiB, which an independent implementation of docs/method.md, section 4 reaches as well.
OPTIMA = {
    ("mobilenet_v2", 128): 8_062_688,
    ("mobilenet_v2", 256): 7_805_536,
    ("mobilenet_v2", 512): 7_429_216,
    ("resnet18", 128): 31_700_384,
}


@pytest.mark.parametrize(("name", "kilobytes"), OPTIMA)
def test_optimum_of_networks(name: str, kilobytes: int) -> None:
    evaluator = Evaluator(Brr(operator_graph(name), 2, 2), kilobytes * 1024)
    assert exact(FusionProblem(evaluator)).dram_bytes == OPTIMA[name, kilobytes]


@pytest.mark.parametrize(
    ("name", "kilobytes", "optimum"),
    [
        ("resnet50", 128, 42_390_608),
        ("resnet50", 256, 36_809_296),
        pytest.param("resnet101", 128, 69_886_544, marks=pytest.mark.slow),
    ],
)
def test_merging_in_place_loses_nothing_on_resnets(name: str, kilobytes: int, optimum: int) -> None:
    """ResNet-50's figures are those of an independent implementation without slices.

    No operator runs in slices in these optima, so they hold with slices as well.
    """
    evaluator = Evaluator(Brr(operator_graph(name)), kilobytes * 1024)
    merged, single = FusionProblem(evaluator), FusionProblem(evaluator, merge=False)
    assert len(merged.blocks) < len(single.blocks)
    assert exact(merged).dram_bytes == exact(single).dram_bytes == optimum


def beside(rng: Random) -> OpGraph:
    """Two branches that are added, one of them ending in place, and convolutions below."""
    build = Builder()
    x = build.input((1, rng.randint(1, 8), rng.randint(4, 16), rng.choice((1, 3, 5))))
    wide = rng.randint(1, 8)
    left = build.conv(x, wide, rng.choice((1, 3)))
    if rng.random() < 0.3:
        left = build.act(left)
    left = build.act(build.conv(left, wide, rng.choice((1, 3))))
    right = build.conv(x, wide, rng.choice((1, 3)))
    if rng.random() < 0.5:
        right = build.conv(right, wide, rng.choice((1, 3)))
    at = build.add(*rng.choice(((left, right), (right, left))))
    for _ in range(rng.randint(1, 2)):
        at = build.conv(at, rng.randint(1, 12), rng.choice((1, 3)))
    return heavier(rng, build.graph())


def heavier(rng: Random, graph: OpGraph) -> OpGraph:
    """The graph with some weights many times as large, so that they are read several times."""
    ops = (
        replace(op, weight_elements=op.weight_elements * rng.choice((1, 5, 30))) for op in graph.ops
    )
    return replace(graph, ops=tuple(ops))


def test_merging_in_place_loses_nothing() -> None:
    rng = Random(1)
    several = 0
    for number in range(400):
        if number % 2:
            graph = beside(rng)
        else:
            graph = with_pools(rng, random_graph(rng, rng.randint(2, 8)), rng.choice((0.0, 0.4)))
            graph = heavier(rng, graph)
        brr = Brr(graph, kappa=rng.choice((1, 1, 2)))
        need = brr.buffer((1 << len(graph)) - 1, AMPLE) or 500
        evaluator = Evaluator(brr, rng.randint(need // 3 + 1, need + sum(brr.weights) // 2))
        problem = FusionProblem(evaluator)
        found = exact(problem)
        assert found.dram_bytes == problem.cost(found.groups)
        assert found.dram_bytes == exact(FusionProblem(evaluator, merge=False)).dram_bytes
        assert found.dram_bytes == backward(problem, single(problem)).dram_bytes
        assert_legal(FusionProblem(evaluator, merge=False), found.groups)
        if number % 10 < 2:
            assert found.dram_bytes == brute_force(evaluator)[0]
        several += found.dram_bytes > problem.unavoidable
    assert several > 100


def test_a_group_may_start_in_place_beside_another_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The addition is full for the sake of the ReLU; without it the last convolution would be.

    The group of ReLU, conv3, conv4, add5 and conv6 then reads its weights once instead of twice.
    """
    build = Builder()
    x = build.input((1, 5, 7, 3))
    left = build.act(build.conv(build.conv(x, 1, kernel=3), 1, kernel=3))
    right = build.conv(build.conv(x, 1), 1)
    build.conv(build.add(left, right), 4)
    heavy = {"conv1": 5, "conv3": 5, "conv4": 5}
    graph = build.graph()
    ops = (replace(o, weight_elements=o.weight_elements * heavy.get(o.name, 1)) for o in graph.ops)
    evaluator = Evaluator(Brr(replace(graph, ops=tuple(ops)), kappa=2), 64)
    found = exact(FusionProblem(evaluator))
    assert found.groups == (0b11, 0b1111100)
    assert found.dram_bytes == brute_force(evaluator)[0] == 480
    problem = FusionProblem(evaluator)
    assert backward(problem, single(problem)).groups == found.groups
    monkeypatch.setattr(Brr, "starts_in_place", False)
    assert exact(FusionProblem(evaluator)).dram_bytes == 511


def test_a_group_that_starts_in_place_beside_another_tensor() -> None:
    """The counterexample in the smallest: addition of a ReLU and a tensor that must be streamed.

    x 6x8x1; a: 1x1 to 6 with heavy weights, ReLU; b: 1x1 to 6; a + b. The addition alone holds a
    row of both, 12 bytes; with the ReLU before it, a row of the ReLU's input, 6 bytes.
    """
    build = Builder()
    x = build.input((1, 6, 8, 1))
    build.add(build.act(build.conv(x, 6)), build.conv(x, 6))
    brr = Brr(build.graph())
    assert (brr.buffer(0b1000, AMPLE), brr.buffer(0b1010, AMPLE)) == (12, 6)
    problem = FusionProblem(Evaluator(brr, 12))
    assert problem.blocks == (0b0001, 0b0010, 0b0100)  # the addition alone does not fit
    problem = FusionProblem(Evaluator(brr, 13))
    assert problem.blocks == (0b0001, 0b0010, 0b0100, 0b1000)
    assert problem.tight == (0b0011, 0b0100, 0b1000)
    assert problem.leading == 0b0010


# -- the choice of starts ----------------------------------------------------------------------


def chosen(brr: Brr, mask: int, size: int) -> tuple[int, int] | None:
    """Passes and ``F_min`` of the best of all choices of starts, one by one; method.md as written.

    ``None`` where the group has no common rate, or no choice fits.
    """
    graph, demand = brr.graph, brr.demand
    sinks = sum(1 << i for i in bits(mask) if not graph.readers[i] & mask)
    found = demand.of(mask, sinks)
    if found is None or any(demand.rateless[i] & mask for i in bits(mask)):
        return None
    first = [i for i in bits(mask) if not graph.makers[i] & mask]
    weights = sum(brr.weights[i] for i in bits(mask))
    best = None
    for starts in product((False, True), repeat=len(first)):
        full = dict(zip(first, starts, strict=True))
        need = line = 0
        held: dict[str, tuple[int, int]] = {}
        for i in bits(mask):
            local = bool(brr.local >> i & 1)
            if i not in full:
                some = any(full[k] for k in bits(graph.makers[i] & mask))
                full[i] = some if local else not some
            if not local:
                row = (brr.row_full if full[i] else brr.row_some)[i]
                need += found.rows[i] * row
                line += math.ceil(found.rates[i]) * row
            if i in first and (local or not full[i]):
                for operand in demand.operands[i]:
                    rows = demand.input_rows(operand, found.rows[i])
                    further = math.ceil(found.rates[i] * (operand.stride or 1))
                    if operand.read.window.kind is WindowKind.REDUCE:
                        rows, further = 1, math.ceil(found.rates[i])
                    known = held.get(operand.read.tensor, (0, 0))
                    held[operand.read.tensor] = max(known[0], rows), max(known[1], further)
        for name, (rows, further) in held.items():
            need += rows * unit_bytes(graph, name)
            line += further * unit_bytes(graph, name)
        if need >= size:
            continue
        passes = 1
        if need + weights > size:
            lines = min(found.lines, (size - need) // line + 1 if line else found.lines)
            passes = -(-found.lines // lines)
        best = min(best or (passes, need), (passes, need))
    return best


@pytest.mark.parametrize("seed", range(3))
def test_starts_are_chosen_as_by_enumeration(seed: int) -> None:
    rng = Random(9000 + seed)
    several = compared = 0
    for _ in range(1000):
        graph = with_pools(rng, random_graph(rng, rng.randint(2, 10), rng.choice((6, 12))), 0.2)
        graph = heavier(rng, graph)
        graph = mixed_widths(rng, graph) if rng.random() < 0.5 else graph.stored_as(1)
        brr = Brr(graph, None, kappa=rng.choice((1, 2)))
        mask = grown_group(rng, graph, rng.randint(1, 10))
        if not is_convex(mask, ancestors(graph), descendants(graph)) or mask.bit_count() < 2:
            continue
        need = brr.buffer(mask, AMPLE)
        if need is None:
            assert chosen(brr, mask, AMPLE) is None
            continue
        for size in (need, need + 1, need + rng.randint(2, 60), 3 * need, AMPLE):
            wanted = chosen(brr, mask, size)
            held = brr.buffer(mask, size)
            assert held is not None
            assert held == sum(term.bytes for term in brr.terms(mask, size))
            if wanted is None:
                assert held == need >= size
                continue
            if brr._slices(mask, size) is None:
                assert held == wanted[1]
                weights = sum(brr.weights[i] for i in bits(mask))
                assert brr.reread(mask, size) == weights * (wanted[0] - 1)
                compared += 1
                several += sum(not graph.makers[i] & mask for i in bits(mask)) > 1
    assert several > 40
    assert compared > 400


def test_many_starts_take_no_time() -> None:
    """60 branches of three convolutions each under one sum, 2^60 choices.

    Of each branch the ends hold 2 and 40 bytes or 1 and 40: all are alike, so each is chosen by
    itself, and what the sum is does not matter but for the convolution below it.
    """
    build = Builder()
    ends = []
    for _ in range(60):
        x = build.input((1, 40, 4, 1))
        ends.append(build.conv(build.conv(build.conv(x, 2), 3), 2))
    build.conv(build.add(*ends), 5)
    brr = Brr(build.graph(), kappa=1)
    mask = (1 << 182) - 1
    # Full, partial, full: 2 + 1 + 2; partial needs 40 bytes of input. The sum is full, so the
    # last convolution is partial: 1.
    assert brr.buffer(mask, AMPLE) == 60 * (2 + 1 + 2) + 1
    assert brr.floor(mask) == 301


# -- an operator alone -------------------------------------------------------------------------


def alone(local_after: bool = False) -> OpGraph:
    build = Builder()
    at = build.conv(build.input((1, 2, 40, 10)), 16, kernel=3)
    if local_after:
        build.act(at)
    return build.graph()


@pytest.mark.parametrize("mask", [0b1, 0b11])
def test_an_operator_alone_in_slices(mask: int) -> None:
    """x 2x40x10, 3x3 to 16: an output row of 160 bytes, 16*2*9 + 16 = 304 weights.

    In 400 bytes, tiles of full rows: (400 - 160) // 160 + 1 = 2 lines, 20 passes: 19 * 304 bytes
    again. In slices: 3 input rows of 20 bytes and an output row, 220; 179 are left below 400, so
    two slices of 152 bytes: the input's 800 bytes again. What works in place changes nothing.
    """
    brr = Brr(alone(mask == 0b11), kappa=16)
    assert brr.reread(mask, 400) == 800
    assert brr.dram(mask, 400) == Dram(read=2 * 800, write=6400, weight=304)
    assert brr.buffer(mask, 400) == 60 + 160 + 152
    terms = [(t.kind, t.name, t.units, t.unit_bytes) for t in brr.terms(mask, 400)]
    assert terms == [
        ("weights", "conv0", 152, 1),
        ("full", "conv0", 1, 160),
        ("input", "x0", 3, 20),
    ]
    # One byte of room: 304 slices, 303 * 800 bytes again. Tiles of one line: 39 * 304.
    assert brr.reread(mask, 222) == 39 * 304
    assert brr.least_reread(mask, 303) <= brr.reread(mask, 303)
    assert brr.reread(mask, 465) == 0  # tiles with all weights beside one row


def test_two_convolutions_are_not_run_in_slices() -> None:
    brr = Brr(two_convolutions())
    assert brr._slices(0b11, AMPLE) is None
    assert brr._slices(0b01, AMPLE) is not None


def test_vgg16() -> None:
    """With 2 bytes at 128 KB; 235.8 MiB of it are the classifier's weights, read once."""
    evaluator = Evaluator(Brr(operator_graph("vgg16"), 2, 2), 128 * 1024)
    found = exact(FusionProblem(evaluator))
    assert found.dram_bytes == 437_188_768


@pytest.mark.parametrize("buffer_bytes", [185, 191, 200])
def test_an_output_that_a_group_could_start_with_in_place(buffer_bytes: int) -> None:
    """Its producer's group would have to write both: what the exact search states is the cost."""
    build = Builder()
    source = build.input((1, 4, 8, 8))
    result = build.act(build.conv(source, 4, 3))
    joined = build.op("concat", [(result, IDENTITY), (source, IDENTITY)], (1, 8, 8, 8))
    build.conv(joined, 8)
    scheme = make_scheme("brr", build.graph([result]), "line", 1, 1)
    problem = FusionProblem(Evaluator(scheme, buffer_bytes))
    optimum = brute_force(problem.evaluator)[0]
    found = exact(problem)
    assert found.dram_bytes == problem.cost(found.groups) == optimum
    backwards = backward(problem, merge_greedily(problem))
    assert backwards.lower_bound_bytes == backwards.dram_bytes == optimum
    assert problem.cost(backwards.groups) == optimum
