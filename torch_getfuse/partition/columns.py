"""Groups as the columns of a linear program: which blocks they have, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_matrix, csr_matrix

from torch_getfuse.partition.bound import FINE
from torch_getfuse.partition.group import bits
from torch_getfuse.partition.lbdf import Lbdf
from torch_getfuse.partition.problem import FusionProblem

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Columns:
    """Turns masks of many groups into columns at once.

    Args:
        problem: whose blocks are the rows.
    """

    def __init__(self, problem: FusionProblem) -> None:
        self.problem = problem
        self._bytes = -(-len(problem.graph) // 8)
        self._leaders = np.array([(b & -b).bit_length() - 1 for b in problem.blocks], np.int64)
        self._lbdf = isinstance(problem.evaluator.scheme, Lbdf)
        graph, scheme = problem.graph, problem.evaluator.scheme
        number = {name: k for k, name in enumerate(graph.tensors)}
        sizes = [tensor.elements * scheme.activation_bytes for tensor in graph.tensors.values()]
        self._sizes = np.array(sizes, np.int64)
        self._weights = np.array([op.weight_elements * scheme.weight_bytes for op in graph.ops])
        self._kept = np.array([name in graph.outputs for name in graph.tensors])
        pairs = {(i, number[read.tensor]) for i, op in enumerate(graph.ops) for read in op.reads}
        shape = (len(graph), len(number))
        readers, read = np.array(sorted(pairs)).reshape(-1, 2).T
        self._reads = csr_matrix((np.ones(len(read), np.int64), (readers, read)), shape)
        written = [number[op.writes] for op in graph.ops]
        ones = np.ones(len(written), np.int64)
        self._writes = csr_matrix((ones, (np.arange(len(written)), written)), shape)
        self._readers = np.asarray(self._reads.sum(axis=0)).ravel()

    def _members(self, groups: Sequence[int]) -> npt.NDArray[np.bool_]:
        raw = b"".join(group.to_bytes(self._bytes, "little") for group in groups)
        rows = np.frombuffer(raw, np.uint8).reshape(len(groups), self._bytes)
        return np.unpackbits(rows, axis=1, bitorder="little").astype(bool)

    def matrix(self, groups: Sequence[int]) -> csc_matrix:
        """Which group (column) has which block (row)."""
        members = self._members(groups)[:, self._leaders]
        row = np.nonzero(members)[1]
        starts = np.concatenate([[0], np.cumsum(members.sum(axis=1))])
        shape = (len(self._leaders), len(groups))
        return csc_matrix((np.ones(len(row)), row, starts), shape=shape)

    def costs(self, groups: Sequence[int]) -> Ints:
        """``F_D`` of each group in bytes."""
        if not self._lbdf or not groups:
            return np.array([self.problem.evaluator.dram(group) for group in groups], np.int64)
        members = csr_matrix(self._members(groups)[:, : len(self._weights)].astype(np.int64))
        used = (members @ self._reads).toarray()
        made = (members @ self._writes).toarray() > 0
        moved = (used > 0) & ~made | made & (self._kept | (used < self._readers))
        return np.asarray(moved @ self._sizes + members @ self._weights, np.int64)

    def reduced(self, groups: Sequence[int], prices: npt.NDArray[np.number]) -> Floats:
        """``F_D`` less the prices (in 1/FINE bytes) of each group, in 1/FINE bytes."""
        found: Floats = self.costs(groups) * FINE - self.matrix(groups).T @ prices
        return found

    def weights(self) -> int:
        """Bytes of the weights of everything fusable, which every plan moves once."""
        return int(self._weights[list(bits(self.problem.fusable))].sum())
