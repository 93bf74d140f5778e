"""BRR against arithmetic by hand (docs/method.md, section 4). One byte per element throughout."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.graphs import Builder, random_graph
from tests.networks import operator_graph
from torch_getfuse.ir import OpGraph, Window
from torch_getfuse.partition.cost.brr.model import Brr
from torch_getfuse.partition.cost.scheme import Dram, Evaluator
from torch_getfuse.partition.exact.down_sets import exact
from torch_getfuse.partition.node_set import ancestors, bits, is_connected, neighbours
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
        assert brr.fewest_passes(grown, size, part) == fresh.fewest_passes(grown, size)
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
                    assert brr.fewest_passes(part, size) <= brr.passes(grown, size)


def test_fewest_passes_of_maps_that_fill_the_buffer_thrice() -> None:
    """Two convolutions of 16 channels on 16x10, 2560 bytes each; full and partial are the same.

    Their 5120 bytes pass through a buffer of 1800 in three tiles at least; with the halo it is
    h = (1800 - 640) // 320 + 1 = 4 lines per tile and four tiles.
    """
    build = Builder()
    build.conv(build.conv(build.input((1, 64, 16, 10)), 16, kernel=3), 16, kernel=3)
    brr = Brr(build.graph())
    assert brr.buffer(0b11, 1800) == 3 * 160 + 160
    assert (brr.fewest_passes(0b11, 1800), brr.passes(0b11, 1800)) == (3, 4)
    assert brr.fewest_passes(0b01, 1800) == 2  # 2560 bytes, 9 KB of weights


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


def test_operators_in_place_are_not_merged() -> None:
    """A group that starts with a ReLU may alternate in another way, and so be cheaper."""
    problem = FusionProblem(Evaluator(Brr(operator_graph("resnet50")), 128 * 1024))
    graph, cost = problem.graph, problem.evaluator.dram
    assert problem.blocks == tuple(1 << i for i in bits(problem.fusable))
    plan = exact(problem).groups
    saved = []
    for group in plan:
        first = group & -group
        before = graph.predecessors[first.bit_length() - 1]
        home = next((other for other in plan if other & before), 0)
        if home and graph.overwrites[first.bit_length() - 1] and group != first:
            merged = cost(home | first) + cost(group & ~first)
            saved.append(merged - cost(home) - cost(group))
    assert max(saved) > 0
