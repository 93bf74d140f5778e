"""LBDF against an independent execution of its schedule, and against arithmetic by hand."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.graphs import Builder, random_graph, random_group
from tests.simulator import Simulator
from torch_getfuse.errors import OptionError
from torch_getfuse.ir import OpGraph, Window
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.node_set import ancestors, bits, convex_hull, descendants, is_convex


def features(graph: OpGraph, granularity: str) -> int:
    """Feature part of the whole graph's buffer, one byte per element."""
    return Lbdf(graph, granularity, 1, 0).buffer((1 << len(graph)) - 1)


def lines(lbdf: Lbdf, mask: int) -> dict[str, int]:
    """Units held of each tensor of a group."""
    return {term.name: term.units for term in lbdf.terms(mask) if term.kind != "weights"}


def inverted_residual() -> OpGraph:
    build = Builder()
    x = build.input((1, 8, 16, 16))
    expanded = build.act(build.conv(x, 48))
    depthwise = build.act(build.conv(expanded, 48, kernel=3, depthwise=True))
    projected = build.conv(depthwise, 8)
    build.add(projected, x)
    return build.graph()


def two_convolutions(size: int, stride: int) -> OpGraph:
    build = Builder()
    x = build.input((1, 2, size, size))
    build.conv(build.conv(x, 4, kernel=3, stride=stride), 4, kernel=3, stride=stride)
    return build.graph()


@pytest.mark.parametrize(
    ("graph", "line", "pixel"),
    [
        # x 2 rows x 128 + expanded 3 x 768 + depthwise 768 + projected 128 + sum 128. In pixels:
        # expanded 2*16+3 x 48 + depthwise, projected, sum 48 + 8 + 8 + x 18 x 8 (the lag of add).
        (inverted_residual(), 2 * 128 + 3 * 768 + 768 + 128 + 128, 1888),
        # 3 rows x 16 + 3 rows x 32 + 1 row x 32; 19 = 2*8 + 3 pixels are held of each input.
        (two_convolutions(8, 1), 3 * 16 + 3 * 32 + 32, 19 * 2 + 19 * 4 + 4),
        # Stride 2 on 16x16: rows of 32 B, 32 B (8 wide), 16 B (4 wide).
        (two_convolutions(16, 2), 3 * 32 + 3 * 32 + 16, 150),
    ],
    ids=["inverted residual", "two 3x3", "two 3x3 stride 2"],
)
def test_worked_examples(graph: OpGraph, line: int, pixel: int) -> None:
    assert features(graph, "line") == line
    assert features(graph, "pixel") == pixel


def squeeze_excite() -> OpGraph:
    build = Builder()
    x = build.input((1, 4, 10, 6))
    body = build.conv(x, 4, kernel=3)
    pooled = build.op("pool", [(body, Window.reduce())], (1, 4, 1, 1))
    scale = build.act(build.conv(pooled, 4))
    build.op("mul", [(body, Window.identity()), (scale, Window.identity())], (1, 4, 10, 6))
    return build.graph()


def test_squeeze_excite_inside_one_group_holds_the_whole_map() -> None:
    graph = squeeze_excite()
    lbdf = Lbdf(graph, "line", 1, 0)
    held = lines(lbdf, 0b11111)
    # The scaling waits for the pool, so all ten rows of the convolution's map are held ...
    assert held == {"x0": 3, "conv0": 10, "pool1": 1, "act3": 1, "mul4": 1}
    # ... while convolution and pool alone keep one row, for a reduction holds nothing.
    assert lines(lbdf, 0b00011) == {"x0": 3, "conv0": 1, "pool1": 1}


def test_a_skip_costs_the_lag_between_its_ends() -> None:
    build = Builder()
    x = build.input((1, 1, 32, 4))
    inner = build.conv(build.conv(x, 1, kernel=3), 1, kernel=3)
    build.add(inner, x)
    held = lines(Lbdf(build.graph(), "line", 1, 0), 0b111)
    # add writes row r when the second convolution has; that needs x up to row r + 2.
    assert held["x0"] == 3
    assert held["conv0"] == 3


def test_in_place_saves_one_of_the_two_never_both() -> None:
    build = Builder()
    x = build.input((1, 2, 9, 5))
    conv = build.conv(x, 2, kernel=1)
    build.conv(build.act(conv), 2, kernel=3)
    held = lines(Lbdf(build.graph(), "line", 1, 0), 0b111)
    assert held == {"x0": 1, "act1": 3, "conv2": 1}


def test_in_place_is_refused_where_the_input_is_needed_elsewhere() -> None:
    build = Builder()
    conv = build.conv(build.input((1, 2, 9, 5)), 2)
    build.act(conv)
    graph = build.graph(outputs=[conv])
    assert graph.overwrites == (False, False)
    assert set(lines(Lbdf(graph, "line", 1, 0), 0b11)) == {"x0", "conv0", "act1"}


def test_terms_name_what_fills_the_buffer() -> None:
    graph = two_convolutions(8, 1)
    terms = Lbdf(graph, "line", 2, 1).terms(0b11)
    assert [(t.kind, t.name, t.units, t.unit_bytes) for t in terms] == [
        ("weights", "conv0", 4 * 2 * 9 + 4, 1),
        ("weights", "conv1", 4 * 4 * 9 + 4, 1),
        ("lines", "conv0", 3, 64),
        ("lines", "x0", 3, 32),
        ("lines", "conv1", 1, 64),
    ]


def test_unknown_granularity_is_refused() -> None:
    with pytest.raises(OptionError, match="granularity='tile'"):
        Lbdf(two_convolutions(8, 1), "tile")


def check(seed: int, operators: int, size: int) -> None:
    rng = Random(seed)
    graph = random_graph(rng, operators, size, crops=seed % 2 == 1)
    for granularity in ("line", "pixel"):
        lbdf = Lbdf(graph, granularity, 1, 1)
        for _ in range(2):
            mask = random_group(rng, graph)
            expected = Simulator(graph, mask, granularity == "pixel").buffer_bytes()
            assert lbdf.buffer(mask) == expected
            assert sum(term.bytes for term in lbdf.terms(mask)) == expected
            assert lbdf.floor(mask) <= expected


@settings(max_examples=1200, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_equals_the_schedule_on_small_maps(seed: int) -> None:
    check(seed, 9, 12)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_equals_the_schedule_where_positions_are_sampled(seed: int) -> None:
    check(seed, 6, 40)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_floor_is_monotone_and_a_bound(seed: int) -> None:
    rng = Random(seed)
    graph = random_graph(rng, 8, 8)
    lbdf = Lbdf(graph, rng.choice(("line", "pixel")), 1, 1)
    large = random_group(rng, graph)
    # What the search grows downstream: nothing that a member depends on joins later.
    left_out = large & rng.getrandbits(len(graph)) & rng.getrandbits(len(graph))
    below = descendants(graph)
    small = large & ~left_out
    for i in bits(left_out):
        small &= ~below[i]
    if small:
        assert lbdf.floor(small) <= lbdf.buffer(large)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_floor_bounds_what_grows_in_any_direction(seed: int) -> None:
    """``floor_only_grows``: operators that a convex set depends on may join as well."""
    rng = Random(seed)
    graph = random_graph(rng, 8, 8, crops=rng.random() < 0.3)
    lbdf = Lbdf(graph, rng.choice(("line", "pixel")), 1, 1)
    above, below = ancestors(graph), descendants(graph)
    large = convex_hull(random_group(rng, graph), above, below)
    small = large & rng.getrandbits(len(graph))
    if is_convex(small, above, below) and (need := lbdf.buffer(large)) is not None:
        assert lbdf.floor(small) <= need


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_floor_of_what_grew_is_the_floor(seed: int) -> None:
    """A floor found from a part's is that found from nothing, at every step downstream."""
    rng = Random(seed)
    graph = random_graph(rng, 9, 8)
    granularity = rng.choice(("line", "pixel"))
    lbdf, above = Lbdf(graph, granularity, 1, 1), ancestors(graph)
    done = 0
    for _ in range(rng.randint(0, 3)):
        i = rng.randrange(len(graph))
        done |= above[i] | 1 << i
    part = 0
    for _ in range(4):
        i = rng.randrange(len(graph))
        grown = part | (above[i] | 1 << i) & ~done
        assert lbdf.floor(grown, part) == Lbdf(graph, granularity, 1, 1).floor(grown)
        part = grown


@given(seed=st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_what_does_not_fit_need_not_be_known_exactly(seed: int) -> None:
    """Nor does it matter in which order groups are asked for, or whether."""
    rng = Random(seed)
    graph = random_graph(rng, rng.randint(3, 9), size=14, crops=rng.random() < 0.5)
    granularity = rng.choice(("line", "pixel"))
    masks = [random_group(rng, graph) for _ in range(6)]
    exact = {mask: Lbdf(graph, granularity).buffer(mask) for mask in masks}
    lbdf, size = Lbdf(graph, granularity), rng.choice([*exact.values()]) + rng.randint(0, 1)
    evaluator = Evaluator(lbdf, size)
    for mask in masks:
        below = lbdf.buffer_below(mask, size)
        assert min(below, size) == min(exact[mask], size)
        assert below <= exact[mask]
        assert evaluator.fits(mask) == (exact[mask] < size)
    assert evaluator.evaluated <= len(exact)
    assert [evaluator.buffer(mask) for mask in masks] == [exact[mask] for mask in masks]
    assert evaluator.evaluated == len(exact)


def test_floor_knows_that_a_squeeze_and_excite_block_holds_its_map() -> None:
    """The scale waits for the global pool, so the product's first row finds all 8 rows held."""
    build = Builder()
    body = build.conv(build.input((1, 4, 8, 8)), 4)
    pooled = build.op("pool", [(body, Window.reduce())], (1, 4, 1, 1))
    scale = build.conv(pooled, 4)
    product = [(body, Window.identity()), (scale, Window.identity())]
    build.conv(build.op("mul", product, (1, 4, 8, 8)), 4)
    lbdf = Lbdf(build.graph(), "line", 1, 0)
    # x 1 row, body 8 rows, pool and scale 4 bytes each, mul and the last convolution 1 row each.
    assert lbdf.floor(0b11111) == lbdf.buffer(0b11111) == 32 + 8 * 32 + 4 + 4 + 32 + 32
    assert lbdf.floor(0b01011) == 32 + 32 + 4 + 4 + 32  # without the pool nothing waits
