"""Groups as tensors: rows, edges and their order, what enters and how."""

from __future__ import annotations

from random import Random

import pytest
import torch

from tests.graphs import Builder, random_graph, random_group
from torch_getfuse.explain.features import (
    BYTES,
    CATEGORIES,
    FEATURE_NAMES,
    FEATURES,
    FeatureTable,
    category,
    directed_scores,
)
from torch_getfuse.ir import OpGraph, Window
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.search.recursive_split import group_edges


def column(name: str) -> int:
    return FEATURE_NAMES.index(name)


def residual() -> OpGraph:
    build = Builder()
    x = build.input((1, 8, 16, 16))
    a = build.act(build.conv(x, 48))
    b = build.act(build.conv(a, 48, kernel=3, depthwise=True))
    build.add(build.conv(b, 8), x)
    return build.graph()


@pytest.mark.parametrize("seed", range(30))
def test_one_row_per_operator_and_edges_map_back(seed: int) -> None:
    rng = Random(seed)
    graph = random_graph(rng, 10)
    table = FeatureTable(graph)
    for _ in range(5):
        group = random_group(rng, graph)
        tensors = table.group(group, 1024)
        assert tensors.operators == tuple(bits(group))
        assert tensors.x.shape == (group.bit_count(), FEATURES)
        assert tensors.x.dtype == torch.float32
        assert tensors.x.isfinite().all()
        assert set(tensors.edges) == set(group_edges(graph, group))
        assert len(set(tensors.edges)) == len(tensors.edges)
        half = len(tensors.edges)
        assert tensors.edge_index.shape == (2, 2 * half)
        named = [(tensors.operators[a], tensors.operators[b]) for a, b in tensors.edge_index.T]
        assert named[:half] == list(tensors.edges)
        assert named[half:] == [(b, a) for a, b in tensors.edges]


def test_scores_of_both_directions_add_up() -> None:
    found = directed_scores(torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 30.0]))
    assert found.tolist() == [11.0, 22.0, 33.0]


@pytest.mark.parametrize("seed", range(10))
def test_a_slice_equals_a_fresh_table(seed: int) -> None:
    """Nothing that was asked before shows in an answer."""
    rng = Random(seed)
    graph = random_graph(rng, 10)
    table = FeatureTable(graph, "pixel", 2, 1)
    for _ in range(10):
        group = random_group(rng, graph)
        old = table.group(group, 4096)
        new = FeatureTable(graph, "pixel", 2, 1).group(group, 4096)
        assert torch.equal(old.x, new.x)
        assert torch.equal(old.edge_index, new.edge_index)


def test_only_shares_of_the_buffer_count() -> None:
    """Twice the bytes under twice the buffer is the same question."""
    graph, group = residual(), 0b111111
    x = FeatureTable(graph, "line", 1, 1).group(group, 4096).x
    assert torch.equal(FeatureTable(graph, "line", 2, 2).group(group, 8192).x, x)
    sized = [k for k, name in enumerate(FEATURE_NAMES) if name.startswith("log_")]
    other = FeatureTable(graph, "line", 1, 1).group(group, 8192).x
    assert (other[:, sized] < x[:, sized]).any(dim=0).sum() == BYTES
    weights, unit = column("weights_per_buffer"), column("unit_per_buffer")
    wide = FeatureTable(graph, "line", 1, 4).group(group, 4096).x
    assert torch.equal(wide[:, unit], x[:, unit])
    # Sizes of more than four buffers look alike, but none here is.
    assert torch.allclose(wide[:, weights], 4 * x[:, weights])


def test_held_bytes_of_a_chain_are_the_cost_models() -> None:
    """Without skips, weights + held + one unit of the sink is exactly ``F_b``."""
    build = Builder()
    x = build.input((1, 3, 20, 20))
    a = build.act(build.conv(x, 16, kernel=3, stride=2))
    b = build.act(build.conv(a, 16, kernel=5, depthwise=True))
    build.conv(b, 8, kernel=3, padding=0)
    graph = build.graph()
    for granularity in ("line", "pixel"):
        scheme = Lbdf(graph, granularity, 2, 1)
        table = FeatureTable(graph, granularity, 2, 1)
        for group in (0b11111, 0b01100, 0b10, 0b11100):
            x = table.group(group, 2**14).x.double()
            held = x[:, column("weights_per_buffer")] + x[:, column("held_per_buffer")]
            sink = x[-1, column("unit_per_buffer")]
            # An operator that writes over the group's own input still needs room for it.
            first = group & -group
            loaded = first.bit_length() - 1
            if graph.overwrites[loaded]:
                continue
            assert float(held.sum() + sink) * 2**14 == scheme.buffer(group)


def test_a_tensor_is_held_once_for_its_widest_reader() -> None:
    build = Builder()
    x = build.input((1, 4, 16, 16))
    a = build.conv(x, 8)
    narrow, wide = build.conv(a, 8), build.conv(a, 8, kernel=5)
    build.add(narrow, wide, a)
    graph = build.graph()
    held = column("held_per_buffer")
    row = 8 * 16 / 1024
    whole = FeatureTable(graph).group(0b1111, 1024).x[:, held]
    # x by the first; five rows of a, charged to its first reader; narrow and wide by the sum.
    assert whole.tolist() == [4 * 16 / 1024, 5 * row, 0, 2 * row]
    assert FeatureTable(graph).group(0b1010, 1024).x[:, held].tolist() == [row, 2 * row]


def test_operators_alone() -> None:
    graph = residual()
    table = FeatureTable(graph, "line", 2, 3)
    scheme = Lbdf(graph, "line", 2, 3)
    for i, (lines, total) in enumerate(table.alone.tolist()):
        # One that writes over its operand needs no room for both.
        assert total == scheme.buffer(1 << i)
        assert total - lines == 3 * graph.ops[i].weight_elements


def test_border_of_the_group_enters() -> None:
    graph = residual()
    table = FeatureTable(graph)
    whole = table.group(0b111111, 4096).x
    part = table.group(0b000111, 4096).x
    leaves, sink, outside = column("leaves"), column("sink"), column("outside_inputs")
    assert whole[:, leaves].tolist() == [0, 0, 0, 0, 0, 1]
    assert whole[:, sink].tolist() == [0, 0, 0, 0, 0, 1]
    assert (2 ** (2 * whole[:, outside]) - 1).tolist() == [1, 0, 0, 0, 0, 1]
    assert part[:, leaves].tolist() == [0, 0, 1]
    assert part[:, sink].tolist() == [0, 0, 1]
    held = column("held_outside_per_buffer")
    assert whole[0, held] > 0
    assert whole[1:5, held].tolist() == [0] * 4


def test_categories_need_no_names() -> None:
    build = Builder()
    x = build.input((1, 4, 8, 8))
    identity = Window.identity()
    a = build.conv(x, 4, kernel=3)
    b = build.conv(a, 4, kernel=3, depthwise=True)
    c = build.act(b)
    d = build.add(c, a)
    e = build.op("x", [(d, identity), (a, identity)], (1, 8, 8, 8))
    f = build.op("x", [(e, Window.sliding((2, 2), (2, 2)))], (1, 8, 4, 4))
    g = build.op("x", [(f, Window.resize((2.0, 2.0)))], (1, 8, 8, 8))
    h = build.op("x", [(g, Window.reduce())], (1, 8, 1, 1))
    i = build.op("x", [(h, Window.reduce())], (1, 10), 80, mixes=True)
    build.op("x", [(i, Window.whole())], (1, 10))
    graph = build.graph()
    found = [category(graph, k) for k in range(len(graph))]
    wanted = ["conv", "depthwise", "unary", "combine", "cat", "pool", "other", "global_reduce"]
    assert found == [*wanted, "linear", "whole"]
    assert set(found) == set(CATEGORIES)
    rows = FeatureTable(graph).group((1 << len(graph)) - 1, 1024).x[:, : len(CATEGORIES)]
    assert [CATEGORIES[int(row.argmax())] for row in rows] == found
    assert rows.sum(dim=1).tolist() == [1.0] * len(graph)
