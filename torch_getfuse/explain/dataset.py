"""Samples packed into a few flat arrays, their split by group, and batches of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from torch_getfuse.explain.features import BYTES, PLAIN, FeatureTable, Floats, Ints, assemble
from torch_getfuse.explain.sampling import BUFFERS, Sample
from torch_getfuse.ir import OpGraph

PARTS = ("train", "validation", "test")


class Batch(NamedTuple):
    """Several groups as one graph, their disjoint union.

    Attributes:
        x: ``(n, FEATURES)`` float32.
        edge_index: ``(2, 2 * E)``: all directed edges, then their reverses.
        batch: ``(n,)`` sample of each operator.
        y: ``(samples,)`` float32, 1 for valid.
    """

    x: torch.Tensor
    edge_index: torch.Tensor
    batch: torch.Tensor
    y: torch.Tensor

    def adjacency(self) -> torch.Tensor:
        """``(n, n)`` sparse: number of edges between two operators, in either direction."""
        count, edges = len(self.x), self.edge_index
        matrix = torch.sparse_coo_tensor(
            edges, torch.ones(edges.shape[1]), (count, count), check_invariants=False
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return matrix.to_sparse_csr()


def part_of(key: str) -> str:
    """``"train"``, ``"validation"`` or ``"test"``: 80/10/10, determined by the group alone.

    All samples of a group, with any buffer and widths, and those of its isomorphic copies, are in
    the same part, whatever the number of samples.
    """
    digit = int(key, 16) % 10
    return PARTS[0] if digit < 8 else PARTS[digit - 7]


class PackedGroups:
    """Groups x buffers as flat arrays; sample ``s`` is group ``s // 5`` under buffer ``s % 5``."""

    def __init__(self) -> None:
        self._plain: Floats = np.zeros((0, PLAIN), np.float32)
        self._sizes: Floats = np.zeros((0, BYTES), np.float32)
        self._edges: Ints = np.zeros((2, 0), np.int64)
        self._nodes_at: Ints = np.zeros(1, np.int64)
        self._edges_at: Ints = np.zeros(1, np.int64)
        self._valid: npt.NDArray[np.bool_] = np.zeros((0, len(BUFFERS)), bool)
        self._alone = np.zeros((0, 2))
        self.keys: list[str] = []

    @classmethod
    def of(
        cls, graphs: Iterable[tuple[OpGraph, Sequence[Sample]]], granularity: str
    ) -> PackedGroups:
        """Pack the samples of several graphs and compute their features."""
        plain, sizes, edges, valid, alone = [], [], [], [], []
        packed = cls()
        for graph, samples in graphs:
            tables: dict[tuple[int, int], FeatureTable] = {}
            for sample in samples:
                widths = sample.activation_bytes, sample.weight_bytes
                if widths not in tables:
                    tables[widths] = FeatureTable(graph, granularity, *widths)
                parts = tables[widths].parts(sample.mask)
                plain.append(parts[0])
                sizes.append(parts[1])
                edges.append(parts[2])
                valid.append(sample.valid)
                alone.append(tables[widths].alone[parts[3]].max(axis=0))
                packed.keys.append(sample.key)
        if not valid:
            return packed
        packed._plain = np.concatenate(plain)
        packed._sizes = np.concatenate(sizes)
        packed._edges = np.concatenate(edges, axis=1)
        packed._nodes_at = np.cumsum([0, *map(len, plain)])
        packed._edges_at = np.cumsum([0, *(part.shape[1] for part in edges)])
        packed._valid = np.array(valid)
        packed._alone = np.stack(alone)
        return packed

    def __len__(self) -> int:
        return self._valid.size

    @property
    def operators(self) -> int:
        """Number of operators of all groups together."""
        return len(self._plain)

    @property
    def labels(self) -> npt.NDArray[np.bool_]:
        """``(samples,)``: whether the group is valid under the buffer."""
        return self._valid.reshape(-1)

    def fits_alone(self, weights: bool) -> npt.NDArray[np.bool_]:
        """``(samples,)``: whether each operator of the group fits into the buffer alone.

        Searches evaluate only such groups: operators that do not fit alone are excluded before.

        Args:
            weights: whether weights are held on chip (LBDF) or not (BRR).
        """
        return (self._alone[:, int(weights), None] < np.array(BUFFERS)).reshape(-1)

    def group_sizes(self) -> Ints:
        """``(samples,)``: number of operators of each sample's group."""
        return np.repeat(np.diff(self._nodes_at), len(BUFFERS))

    def part(self, name: str) -> Ints:
        """The samples of one of :data:`PARTS`."""
        chosen = np.array([part_of(key) == name for key in self.keys], bool)
        groups = np.flatnonzero(chosen)
        return (groups[:, None] * len(BUFFERS) + np.arange(len(BUFFERS))).reshape(-1)

    def batch(self, samples: Ints) -> Batch:
        """The samples of the given numbers, in that order."""
        groups, sizes_of = np.divmod(samples, len(BUFFERS))
        nodes, lengths = _ranges(self._nodes_at, groups)
        links, link_lengths = _ranges(self._edges_at, groups)
        starts = np.cumsum(lengths) - lengths
        edges = self._edges[:, links] + np.repeat(starts, link_lengths)
        buffers = np.array(BUFFERS, np.float32)[sizes_of]
        return Batch(
            x=assemble(
                torch.from_numpy(self._plain[nodes]),
                torch.from_numpy(self._sizes[nodes]),
                torch.from_numpy(np.repeat(buffers, lengths)[:, None]),
            ),
            edge_index=torch.from_numpy(np.concatenate([edges, edges[::-1]], axis=1)),
            batch=torch.from_numpy(np.repeat(np.arange(len(samples)), lengths)),
            y=torch.from_numpy(self.labels[samples].astype(np.float32)),
        )

    def batches(
        self, samples: Ints, size: int, rng: np.random.Generator | None = None
    ) -> Iterator[Batch]:
        """The samples, ``size`` at a time, shuffled if ``rng`` is given."""
        order = samples if rng is None else rng.permutation(samples)
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])


def _ranges(starts: Ints, chosen: Ints) -> tuple[Ints, Ints]:
    """The concatenated ranges ``starts[c]:starts[c + 1]``, and their lengths."""
    lengths = starts[chosen + 1] - starts[chosen]
    offsets = np.cumsum(lengths) - lengths
    within = np.arange(lengths.sum()) - np.repeat(offsets, lengths)
    return np.repeat(starts[chosen], lengths) + within, lengths
