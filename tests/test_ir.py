"""The operator graph's rules, each with a graph that breaks it, and its JSON form."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.graphs import Builder, random_graph
from torch_getfuse.errors import GraphError
from torch_getfuse.ir import Op, OpGraph, Read, Tensor, Window
from torch_getfuse.ir.window import positions_added, positions_needed


def chain() -> OpGraph:
    build = Builder()
    build.act(build.conv(build.input((1, 3, 8, 8)), 4, kernel=3))
    return build.graph()


def test_a_graph_knows_its_neighbours() -> None:
    build = Builder()
    x = build.input((1, 2, 4, 4))
    first = build.conv(x, 2)
    build.add(build.conv(first, 2), first)
    graph = build.graph()
    assert graph.consumers == {"x0": (0,), "conv0": (1, 2), "conv1": (2,), "add2": ()}
    assert graph.predecessors == (0b000, 0b001, 0b011)
    assert graph.successors == (0b110, 0b100, 0b000)
    assert graph.outputs == ("add2",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: replace(g, ops=g.ops[::-1]), "before it is written"),
        (lambda g: replace(g, ops=(g.ops[0], g.ops[0])), "two operators are named 'conv0'"),
        (lambda g: replace(g, outputs=("y",)), "output 'y' is never written"),
        (lambda g: replace(g, inputs=("z",)), "input 'z' is not among"),
        (
            lambda g: replace(g, tensors={**g.tensors, "w": Tensor.of("w", (1, 2))}),
            "'w' belongs to no operator",
        ),
        (
            lambda g: replace(g, tensors={**g.tensors, "act1": Tensor.of("act1", (1, 4, 7, 8))}),
            "rows 8 != 7",
        ),
        (
            lambda g: replace(g, tensors={**g.tensors, "conv0": Tensor.of("conv0", (1, 4, 9, 8))}),
            r"conv0 \(conv\): window 3x3 over 'x0' \(1, 3, 8, 8\)",
        ),
        (
            lambda g: replace(g, tensors={**g.tensors, "x0": Tensor.of("x0", (1, 0, 8, 8))}),
            "empty shape",
        ),
        (
            lambda g: replace(g, ops=(replace(g.ops[0], weight_elements=-1), g.ops[1])),
            "-1 weight elements",
        ),
        (
            lambda g: replace(
                g, ops=(g.ops[0], replace(g.ops[1], reads=g.ops[1].reads * 2, in_place=False))
            ),
            "reads a tensor twice",
        ),
    ],
)
def test_each_rule_names_what_breaks_it(change: object, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        change(chain())  # type: ignore[operator]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_json_form_gives_the_same_graph(seed: int) -> None:
    graph = random_graph(Random(seed), 7)
    again = OpGraph.from_dict(json.loads(json.dumps(graph.to_dict())))
    assert again == graph
    assert again.fingerprint == graph.fingerprint


def test_fingerprint_sees_every_change() -> None:
    graph = chain()
    other = replace(graph, ops=(replace(graph.ops[0], weight_elements=1), graph.ops[1]))
    assert other.fingerprint != graph.fingerprint


@pytest.mark.parametrize("form", ["sideways", 3, {"kernel": [3]}, {"scale": 2}, {"stride": "ab"}])
def test_damaged_windows_are_refused(form: object) -> None:
    with pytest.raises(GraphError, match="window"):
        Window.from_json(form)


def test_a_pointwise_window_is_the_identity() -> None:
    assert Window.sliding((1, 1)) is Window.identity()
    assert Window.sliding((1, 1), (2, 2)) is not Window.identity()


def test_sizes_of_a_channels_last_map() -> None:
    tensor = Tensor("t", (1, 7, 5, 96), stream_axis=1)
    assert (tensor.rows, tensor.cols, tensor.elements) == (7, 5, 7 * 5 * 96)


def test_two_operators_may_not_write_one_tensor() -> None:
    graph = chain()
    twice = Op("again", "act", (Read("conv0", Window.identity()),), "act1")
    with pytest.raises(GraphError, match="a second time"):
        replace(graph, ops=(*graph.ops, twice))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_block_needs_what_its_positions_need(transposed: bool) -> None:
    """By taps: output o of a sliding window reads o*stride - padding + dilation*k, of a transposed
    one whatever i has o = i*stride - padding + dilation*k.
    """
    needed = positions_added if transposed else positions_needed
    make = Window.transposed if transposed else Window.sliding
    for kernel, stride, dilation, padding in itertools.product((1, 2, 4), (1, 3), (1, 2), (0, 2)):
        window = make((kernel, 2), (stride, 1), (dilation, 1), (padding, 0))
        size_out = window.output_size(0, 20)
        assert size_out is not None
        offsets = [dilation * k - padding for k in range(kernel)]
        for low, high in ((0, 1), (0, 4), (3, 4), (3, min(9, size_out)), (0, size_out)):
            if transposed:
                reads = {i for i in range(-9, 99) for k in offsets if low <= i * stride + k < high}
            else:
                reads = {o * stride + k for o in range(low, high) for k in offsets}
            start, end = needed(kernel, stride, dilation, padding, low, high)
            assert reads.issubset(range(start, end))
            if not transposed:
                assert (start, end) == (min(reads), max(reads) + 1)
            spans = [window.span(0, o, 20, size_out) for o in range(low, high)]
            assert {i for i in reads if 0 <= i < 20}.issubset(
                i for first, last in spans for i in range(first, last + 1)
            )
            assert all(start <= first and last < end for first, last in spans if first <= last)
