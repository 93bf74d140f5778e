"""Operators in place that a group may borrow: nothing is lost; without it something would be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest

from tests.graphs import Builder, grown_group
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.brr.model import Brr
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.exact.down_sets import exact
from torch_getfuse.partition.exact.lending import NOTHING, Lending
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem


def residual(rng: Random) -> OpGraph:
    """One or two residual blocks, mostly with a convolution beside them, and heavy weights."""
    build = Builder()
    base = rng.randint(1, 5)
    wide = base * rng.randint(1, 5)
    at = build.input((1, rng.choice((base, wide)), rng.randint(5, 20), rng.choice((1, 3, 7))))
    for _ in range(rng.randint(1, 2)):
        inner = at
        for channels, kernel in rng.choice(
            (((base, 1), (base, 3), (wide, 1)), ((base, 3), (wide, 3)), ((wide, 1), (base, 3)))
        ):
            inner = build.conv(inner, channels, kernel, depthwise=rng.random() < 0.15)
            if rng.random() < 0.8:
                inner = build.act(inner)
        if rng.random() < 0.8:
            shape = build.tensors[inner].shape
            same = shape == build.tensors[at].shape and rng.random() < 0.5
            inner = build.add(inner, at if same else build.conv(at, shape[1]))
        at = build.act(inner) if rng.random() < 0.5 else inner
    graph = build.graph()
    heavy = rng.choice((1, 5, 30))
    ops = (replace(op, weight_elements=op.weight_elements * heavy) for op in graph.ops)
    return replace(graph, ops=tuple(ops))


def buffers(rng: Random, graph: OpGraph, brr: Brr) -> Iterator[int]:
    """Sizes for which a group reads its weights less often with the operator that it starts with.

    These are about as large as what it holds, its weights included.
    """
    group = grown_group(rng, graph, rng.randint(2, 8))
    first = group & -group
    i = first.bit_length() - 1
    rest = group & ~first
    if not rest or not graph.overwrites[i] or graph.predecessors[i] & group:
        return
    weights = sum(graph.ops[k].weight_elements for k in bits(group))
    for mask in (group, rest):
        for size in (1, 1 << 30):  # too small for either start, and large: one need each
            need = brr.buffer(mask, size)
            if need is not None:
                at = Evaluator(brr, need + weights + rng.choice((0, 1, 5)))
                if at.valid(group) and at.valid(rest) and at.passes(group) < at.passes(rest):
                    yield at.buffer_bytes


def test_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimum is that over single operators, where merging alone would miss it."""
    rng = Random(1)
    looked = missed = 0
    for _ in range(2000):
        graph = residual(rng)
        brr = Brr(graph, kappa=rng.choice((1, 1, 2, 3)))
        sizes = {size for _ in range(6) for size in buffers(rng, graph, brr)}
        for size in sorted(sizes)[:2]:
            problem = FusionProblem(Evaluator(brr, size))
            found = exact(problem)
            single = exact(FusionProblem(problem.evaluator, merge=False))
            assert found.dram_bytes == single.dram_bytes == problem.cost(found.groups)
            assert all(problem.evaluator.valid(group) for group in found.groups)
            assert sum(found.groups) == problem.fusable
            with monkeypatch.context() as patch:
                patch.setattr(Lending, "entry", lambda *_: NOTHING)
                missed += exact(problem).dram_bytes > found.dram_bytes
            looked += 1
    assert looked > 100
    assert missed > 5


def test_lbdf_merges_for_good() -> None:
    build = Builder()
    build.conv(build.act(build.conv(build.input((1, 2, 8, 8)), 2)), 2)
    lending = Lending(FusionProblem(Evaluator(Lbdf(build.graph()), 1 << 20)))
    assert lending.blocks == (0b011, 0b100)
    assert not lending.lent
    assert lending.entry(NOTHING, 0b100, 0b100) == NOTHING


def test_what_a_group_is_offered() -> None:
    build = Builder()
    left = build.act(build.conv(build.input((1, 2, 8, 8)), 2))
    right = build.act(build.conv(left, 2))
    build.conv(build.add(left, right), 2)
    lending = Lending(FusionProblem(Evaluator(Brr(build.graph()), 1 << 20)))
    # left's activation has two consumers; right's has one.
    assert lending.blocks == (0b000001, 0b000010, 0b001100, 0b010000, 0b100000)
    assert lending.lent == 0b001000
    alone = lending.entry(NOTHING, 0b010000, 0b010000)
    assert alone == (0b010000, 0b001000, False)  # the addition reads two tensors
    larger = lending.entry(alone, 0b100000, 0b110000)
    assert larger == alone
    assert list(lending.ways(0b110000, larger.offered)) == [0b110000, 0b111000]
    assert lending.give_back([0b000001, 0b000110 | 0b001000, 0b111000]) == (1, 0b000110, 0b111000)


def test_ways_are_all_subsets() -> None:
    lending = Lending(FusionProblem(Evaluator(Brr(residual(Random(2))), 1 << 20)))
    assert list(lending.ways(0b1, 0b1010)) == [0b0001, 0b0011, 0b1001, 0b1011]
    assert list(lending.ways(0b1, 0)) == [0b1]
