"""Tensors of several widths, eighths of bytes and padded channels, against independent executions.

Each graph mixes widths (``tests/widths.py``): LBDF's buffer is that of the simulated schedule, the
steps of cascade those of its oracle, and the exact searches find what enumeration finds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from tests.brute import brute_force
from tests.cascade_both import assert_step, model_of, random_around, random_buffer, random_step
from tests.cascade_brute import cascade_graph, random_cascade
from tests.cascade_simulator import Cascade as Oracle
from tests.graphs import Builder, random_graph, random_group
from tests.legal import assert_legal, single
from tests.partition.test_cascade_exact import assert_optimum
from tests.simulator import Simulator
from tests.widths import bits_in, mixed_widths, unit_bytes, whole_bytes, written_over
from torch_getfuse.ir import OpGraph, Tensor
from torch_getfuse.partition.cost.brr.model import Brr
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator, boundary, once
from torch_getfuse.partition.exact.down_sets import exact
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.wide.group_cover import cover


def random_mixed(rng: Random, operators: int, size: int = 8) -> OpGraph:
    return mixed_widths(rng, random_graph(rng, operators, size))


# -- bytes of tensors ------------------------------------------------------------------------------


def test_bytes_of_tensors_are_counted_element_by_element() -> None:
    for seed in range(200):
        graph = random_mixed(Random(seed), 6)
        for name in graph.tensors:
            assert graph.row_bytes[name] == unit_bytes(graph, name)
            assert graph.pixel_bytes[name] == unit_bytes(graph, name, pixel=True)
            assert graph.tensor_bytes[name] == whole_bytes(graph, name)
            assert 8 * graph.width(name) == bits_in(graph, name)
        assert list(graph.overwrites) == written_over(graph)


@pytest.mark.parametrize(
    ("shape", "stream_axis", "axis", "row", "pixel"),
    [
        ((1, 3, 8, 5), 2, 1, 5 * 16, 16),  # N,C,H,W
        ((1, 8, 5, 3), 1, 3, 5 * 16, 16),  # N,H,W,C
        ((1, 3, 8), 2, 1, 16, 16),  # N,C,L
        ((1, 8, 3), 1, 2, 16, 16),  # N,T,C
        ((1, 3, 4, 8, 5), 2, 1, 16 * 40, 16 * 40),  # N,C,D,H,W
        ((1, 20), None, 1, 32, 32),
        ((1, 8, 3), None, 2, 8 * 16, 8 * 16),
        ((1, 8), 1, None, 1, 1),  # the only axis is that of the rows
        ((5,), None, None, 5, 5),
        ((), None, None, 1, 1),
    ],
)
def test_which_axis_has_the_channels(
    shape: tuple[int, ...], stream_axis: int | None, axis: int | None, row: int, pixel: int
) -> None:
    tensor = Tensor("t", shape, stream_axis)
    assert tensor.channel_axis == axis
    assert tensor.padded(tensor.rows, 16) == row
    assert tensor.padded(tensor.rows * tensor.cols, 16) == pixel
    assert tensor.padded(tensor.rows, 1) == tensor.elements // tensor.rows


def test_a_row_is_packed_and_filled_to_a_byte() -> None:
    """Three channels of five pixels at 4 bits: 60 bits are 8 bytes, a pixel alone takes 2."""
    build = Builder()
    build.act(build.input((1, 3, 4, 5)))
    graph = build.graph().stored_as(0.5)
    assert (graph.row_bytes["x0"], graph.pixel_bytes["x0"]) == (8, 2)
    assert graph.tensor_bytes["x0"] == 4 * 8
    line, pixel = (Lbdf(graph, unit, None, 0) for unit in ("line", "pixel"))
    assert (line.buffer(1), pixel.buffer(1)) == (8, 2)  # the activation writes over its input
    assert line.dram(1) == pixel.dram(1) == (32, 32, 0)


def test_stored_as_leaves_the_graph_and_its_identity() -> None:
    graph = random_mixed(Random(3), 6)
    before = graph.fingerprint, dict(graph.tensor_bytes), graph.overwrites
    other = graph.stored_as(1, 16)
    assert (other.activation_width, other.align_channels) == (1, 16)
    assert all(tensor.bits is None for tensor in other.tensors.values())
    assert other.stored_as() is other.stored_as(1) is other.stored_as(1, 16) is other
    assert other == graph
    assert other.fingerprint == graph.fingerprint
    assert (graph.fingerprint, dict(graph.tensor_bytes), graph.overwrites) == before
    other.verify()


def test_an_operator_that_widens_does_not_write_over_its_input() -> None:
    build = Builder()
    conv = build.conv(build.input((1, 2, 8, 4)), 2)
    act = build.act(conv)
    build.conv(act, 2, kernel=3)
    graph = build.graph()
    assert graph.overwrites == (False, True, False)
    for bits_ in (16, 64):
        wider = {**graph.tensors, act: replace(graph.tensors[act], bits=bits_)}
        mixed = replace(graph, tensors=wider)
        assert mixed.overwrites == (False, False, False)
        held = {t.name: t.bytes for t in Lbdf(mixed, "line", None, 0).terms(0b111)}
        assert held == {"x0": 32, conv: 32, act: 3 * 8 * bits_ // 8, "conv2": 32}
        # In one width for all it may.
        assert mixed.stored_as(2).overwrites == (False, True, False)


# -- LBDF ------------------------------------------------------------------------------------------


def test_lbdf_equals_the_schedule() -> None:
    padded = apart = 0
    for seed in range(150):
        rng = Random(seed)
        graph = random_mixed(rng, 9, rng.choice((8, 12)))
        for unit in ("line", "pixel"):
            lbdf = Lbdf(graph, unit, None, 1)
            assert lbdf.graph is graph
            mask = random_group(rng, graph)
            need = lbdf.buffer(mask)
            assert need == Simulator(graph, mask, unit == "pixel").buffer_bytes(None)
            assert need == sum(term.bytes for term in lbdf.terms(mask))
            assert lbdf.floor(mask) <= need
            reads, writes = boundary(graph, mask)
            read, write = (sum(whole_bytes(graph, n) for n in names) for names in (reads, writes))
            weights = sum(graph.ops[i].weight_elements for i in bits(mask))
            assert lbdf.dram(mask) == once(lbdf, mask) == (read, write, weights)
        padded += graph.align_channels > 1
        apart += sum(op.in_place for op in graph) > sum(graph.overwrites)
    assert padded > 30
    assert apart > 30


# -- BRR -------------------------------------------------------------------------------------------


def test_brr_holds_channels_as_they_are_stored() -> None:
    """A partial convolution holds as many channels as its kappa takes of an aligned row."""
    build = Builder()
    build.conv(build.conv(build.input((1, 3, 6, 5)), 20, kernel=3), 20)
    graph = build.graph()
    for width, align, full, some, given in (
        (1, 1, 100, 4 * 5, 15),
        (0.5, 1, 50, 10, 8),
        (1, 16, 160, 80, 80),
        (0.125, 8, 15, 5, 5),
        (2, 3, 210, 60, 30),
    ):
        brr = Brr(graph.stored_as(width, align), None, 0, kappa=4)
        assert (brr.row_full, brr.row_some) == ([full, full], [some, some])
        assert brr._row_bytes["x0"] == given
        # A row of each; starting partial, three rows of the input would be held as well.
        assert brr.buffer(0b11, 1 << 20) == full + some


# -- exact searches --------------------------------------------------------------------------------


def evaluator_of(rng: Random, scheme: str, graph: OpGraph) -> Evaluator:
    weight_bytes = rng.choice((0, 0.125, 0.5, 1, 1, 2))
    model = make_scheme(scheme, graph, rng.choice(("line", "pixel")), None, weight_bytes)
    alone = sorted(model.buffer(1 << i, 1 << 30) or 0 for i in range(len(graph)))
    whole = model.buffer((1 << len(graph)) - 1, 1 << 30) or 2 * alone[-1]
    low = max(1, alone[len(graph) // 3])
    return Evaluator(model, rng.randint(low, max(low, whole, alone[-1]) + 1))


@pytest.mark.parametrize("scheme", ["lbdf", "brr"])
def test_exact_equals_enumeration(scheme: str) -> None:
    several = 0
    for seed in range(120):
        rng = Random(7000 + seed)
        evaluator = evaluator_of(rng, scheme, random_mixed(rng, rng.randint(2, 8)))
        problem = FusionProblem(evaluator)
        found = exact(problem)
        assert found.dram_bytes == brute_force(evaluator)[0] == problem.cost(found.groups)
        assert_legal(FusionProblem(evaluator, merge=False), found.groups)
        problem.check_additive(found.groups)
        several += len(found.groups) > 1
    assert several > 40


# -- cascade ---------------------------------------------------------------------------------------


def stored(rng: Random, oracle: Oracle) -> Oracle:
    """The oracle with tensors as a graph of mixed widths stores them, and weights of no bytes."""
    graph = mixed_widths(rng, oracle.graph)
    weight_bytes = rng.choice((0, 1, 1))
    return Oracle(graph, oracle.buffer_bytes, None, weight_bytes, oracle.slice_channels)


def test_steps_of_cascade_equal_the_oracle() -> None:
    seen: Counter[str] = Counter()
    for seed in range(120):
        rng = Random(seed)
        oracle = stored(rng, Oracle(cascade_graph(rng, rng.randint(2, 8)), 1))
        model = model_of(oracle)
        mask = random_step(rng, oracle.graph, rng.choice((1, 3, 5)))
        for _ in range(3):
            around = random_around(rng, oracle, mask)
            oracle.buffer_bytes = random_buffer(rng, oracle, mask, around)
            way, run = assert_step(oracle, model, mask, around)
            seen[way.kind] += 1
            if way.kind in ("line", "stripes"):
                apart = oracle.run_step(mask, way, around, {})
                seen["written over"] += run.features < apart.features
            seen["in place"] += oracle.weight_bytes == 0
    assert all(seen[what] >= 5 for what in ("line", "stripes", "none", "written over")), seen


def test_the_optimum_of_cascade_equals_enumeration() -> None:
    for seed in range(15):
        rng = Random(seed)
        drawn = random_cascade(rng, rng.choice((4, 5, 6)))
        oracle = stored(rng, drawn)
        fits = [
            oracle.run_step(1 << i, way).buffer
            for i in range(len(drawn.graph))
            for way in oracle.ways(1 << i)
        ]
        oracle.buffer_bytes = max(1, rng.choice(fits) + rng.choice((0, 1, 7, 40)))
        assert_optimum(oracle)


# -- wide graphs -----------------------------------------------------------------------------------


def test_the_cover_finds_the_optimum() -> None:
    for seed in range(12):
        rng = Random(500 + seed)
        problem = FusionProblem(evaluator_of(rng, "lbdf", random_mixed(rng, rng.randint(3, 8))))
        if not problem.blocks:
            continue
        optimum = brute_force(problem.evaluator)[0]
        found = cover(problem, single(problem))
        assert found.lower_bound_bytes <= optimum == found.dram_bytes == problem.cost(found.groups)
