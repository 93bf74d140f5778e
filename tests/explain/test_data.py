"""Sampling, labels, the split by group, batches, shards that survive an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from tests.graphs import random_graph
from torch_getfuse.explain.dataset import PARTS, PackedGroups, part_of
from torch_getfuse.explain.features import FeatureTable
from torch_getfuse.explain.sampling import BUFFERS, GroupSampler, Sample, group_key, sample_groups
from torch_getfuse.explain.training import data
from torch_getfuse.explain.validity import ValidityModel
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.node_set import (
    ancestors,
    descendants,
    is_connected,
    is_convex,
    neighbours,
)


def samples_of(graph: OpGraph, count: int, seed: int = 0) -> list[Sample]:
    return list(sample_groups(graph, lambda a, w: Lbdf(graph, "line", a, w), "line", count, seed))


@pytest.mark.parametrize("seed", range(5))
def test_drawn_groups_are_legal(seed: int) -> None:
    graph = random_graph(Random(seed), 14)
    sampler = GroupSampler(graph, Random(seed))
    near, above, below = neighbours(graph), ancestors(graph), descendants(graph)
    sizes = set()
    for _ in range(60):
        mask = sampler.draw(Lbdf(graph))
        assert is_connected(mask, near)
        assert is_convex(mask, above, below)
        sizes.add(mask.bit_count())
    assert 1 in sizes
    assert max(sizes) > 4


def test_samples_are_distinct_labelled_and_repeatable() -> None:
    graph = random_graph(Random(3), 12, size=200)
    found = samples_of(graph, 80)
    assert found == samples_of(graph, 80)
    assert found != samples_of(graph, 80, seed=1)
    assert len({sample.mask for sample in found}) == len(found)
    for sample in found:
        need = Lbdf(graph, "line", sample.activation_bytes, sample.weight_bytes).buffer(sample.mask)
        assert sample.valid == tuple(need < size for size in BUFFERS)


def test_a_small_graph_runs_dry() -> None:
    assert len(samples_of(random_graph(Random(0), 3), 1000)) <= 7


def test_no_group_stands_in_two_parts() -> None:
    """Nor does a copy of it in another place, under other widths or another buffer."""
    graphs = [random_graph(Random(seed), 12) for seed in (1, 1, 2)]
    loaded = [(graph, samples_of(graph, 60, seed)) for seed, graph in enumerate(graphs)]
    packed = PackedGroups.of(loaded, "line")
    parts = {name: packed.part(name) for name in PARTS}
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(packed)))
    keys = {name: {packed.keys[s // len(BUFFERS)] for s in found} for name, found in parts.items()}
    for name in PARTS:
        for other in PARTS:
            assert name == other or not keys[name] & keys[other]
    shared = {s.key for s in loaded[0][1]} & {s.key for s in loaded[1][1]}
    assert shared, "two copies of one graph have groups in common"


def test_parts_have_their_shares() -> None:
    rng = Random(0)
    counts = dict.fromkeys(PARTS, 0)
    for _ in range(5000):
        counts[part_of(f"{rng.getrandbits(64):016x}")] += 1
    assert [round(counts[name] / 500) for name in PARTS] == [8, 1, 1]


def test_a_batch_is_its_groups_side_by_side() -> None:
    graph = random_graph(Random(5), 12)
    found = samples_of(graph, 30)
    packed = PackedGroups.of([(graph, found)], "line")
    samples = np.array([7, 3, 149, 40])
    batch = packed.batch(samples)
    start = 0
    edges = []
    for k, s in enumerate(samples):
        sample, buffer = found[s // 5], BUFFERS[s % 5]
        widths = sample.activation_bytes, sample.weight_bytes
        alone = FeatureTable(graph, "line", *widths).group(sample.mask, buffer)
        rows = batch.batch == k
        assert torch.equal(batch.x[rows], alone.x)
        inside = rows[batch.edge_index].all(dim=0)
        edges.append(batch.edge_index[:, inside] - start)
        assert torch.equal(edges[-1], alone.edge_index)
        assert bool(batch.y[k]) == sample.valid[s % 5]
        start += len(alone.x)
    assert batch.edge_index.shape[1] == sum(part.shape[1] for part in edges)


def test_adjacency_counts_the_edges_of_both_directions() -> None:
    packed = PackedGroups.of(
        [(graph := random_graph(Random(5), 12), samples_of(graph, 30))], "line"
    )
    batch = packed.batch(packed.part("train")[:40])
    wanted = torch.zeros(len(batch.x), len(batch.x))
    for a, b in batch.edge_index.t().tolist():
        wanted[a, b] += 1
    found = batch.adjacency().to_dense()
    assert torch.equal(found, wanted)
    assert torch.equal(found, found.t())
    torch.manual_seed(0)
    model = ValidityModel()
    logits = [model(batch.x, edges, batch.batch) for edges in (batch.edge_index, batch.adjacency())]
    torch.testing.assert_close(*logits)
    gradients = [
        torch.autograd.grad(found.sum(), list(model.parameters()), retain_graph=True)
        for found in logits
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_batches_cover_every_sample_once() -> None:
    packed = PackedGroups.of(
        [(graph := random_graph(Random(5), 12), samples_of(graph, 30))], "line"
    )
    wanted = packed.part("train")
    batches = list(packed.batches(wanted, 16, np.random.default_rng(0)))
    assert sum(len(batch.y) for batch in batches) == len(wanted)
    assert sum(len(batch.x) for batch in batches) == packed.group_sizes()[wanted].sum()


def test_keys_know_structure_not_place() -> None:
    graph = random_graph(Random(8), 10)
    table = FeatureTable(graph)
    masks = [sample.mask for sample in samples_of(graph, 40)]
    assert len({group_key(table, mask) for mask in masks}) > len(masks) // 2
    assert group_key(table, masks[0]) == group_key(FeatureTable(graph), masks[0])


def test_a_shard_is_read_as_it_was_drawn(tmp_path: Path) -> None:
    request = data.ShardRequest("lbdf", "line", "squeezenet1_0", 64, 12, seed=0)
    data._make_shard(request, tmp_path)
    found = data.load_samples(request, tmp_path)
    assert len({sample.mask for sample in found}) == 12
    graph = data.load_graph("squeezenet1_0", 64, tmp_path)
    for sample in found:
        scheme = Lbdf(graph, "line", sample.activation_bytes, sample.weight_bytes)
        needs = [scheme.buffer(sample.mask, size) for size in BUFFERS]
        assert sample.valid == tuple(
            n is not None and n < b for n, b in zip(needs, BUFFERS, strict=True)
        )


def test_table_1_proportions() -> None:
    wanted = data.requests("lbdf", "line", 12_000, seed=0)
    total = {name: sum(r.groups for r in wanted if r.network == name) for name in data.TABLE_1}
    assert abs(sum(total.values()) - 12_000) < 30
    assert abs(sum(request.groups for request in wanted) - 18_000) < 60
    share = 12_000 / sum(data.TABLE_1.values())
    for name, count in data.TABLE_1.items():
        assert abs(total[name] - count * share) <= 2
    brr = {r.network for r in data.requests("brr", "line", 12_000, seed=0, synthetic=0)}
    assert brr == set(data.TABLE_1) - set(data.LEFT_OUT["brr"])


def test_an_interrupted_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "TABLE_1", {"squeezenet1_0": 1})
    given = "lbdf", "line", tmp_path
    first, fingerprint = data.build(*given, 24, jobs=1, progress=False, synthetic=1)
    shards = sorted((tmp_path / "lbdf-line").glob("*.json"))
    assert len(shards) == 4
    lost, kept = shards[0], shards[1]
    wanted, before = lost.read_text(), kept.stat().st_mtime_ns
    lost.unlink()
    again, same = data.build(*given, 24, jobs=1, progress=False, synthetic=1)
    assert same == fingerprint
    assert again.keys == first.keys
    assert lost.read_text() == wanted
    assert kept.stat().st_mtime_ns == before, "a finished shard is not made twice"
    _, other = data.build(*given, 30, jobs=1, progress=False, synthetic=1)
    assert other != fingerprint
    assert (
        json.loads(kept.read_text())["recipe"]["groups"] != json.loads(wanted)["recipe"]["groups"]
    )


def test_without_random_networks_each_group_keeps_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "TABLE_1", {"squeezenet1_0": 1})
    given = "lbdf", "line", tmp_path
    both, _ = data.build(*given, 24, jobs=1, progress=False, synthetic=1)
    alone, _ = data.build(*given, 24, jobs=1, progress=False, synthetic=0)
    assert alone.keys == both.keys[: len(alone.keys)]
    assert len(both.keys) == len(alone.keys) + 12
