"""A fusion group as tensors: the input of the validity predictor (docs/method.md, section 5).

One :class:`FeatureTable` per graph holds a row per operator, computed once; a group is a slice
of it plus the few columns that depend on the rest of the group. Every size in bytes is divided by
the buffer size, so buffer size and element widths are inputs, and one model serves all.

Only this module defines the edge order: ``edge_index`` holds the group's directed edges, producer
to consumer, and then the same edges reversed in the same order, so that :func:`directed_scores`
maps a mask over both back to the directed edges.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from torch_getfuse.ir import Op, OpGraph, WindowKind
from torch_getfuse.partition.cost.lbdf.axis_maps import make_edge
from torch_getfuse.partition.cost.scheme import weights_of
from torch_getfuse.widths import Width, packed

FEATURE_VERSION = 2

CATEGORIES = (
    "conv",
    "depthwise",
    "linear",
    "pool",
    "unary",
    "combine",
    "cat",
    "global_reduce",
    "whole",
    "other",
)
WINDOWS = tuple(kind.value for kind in WindowKind)

_SHAPE = ("rows_out", "cols_out", "channels_out", "rows_in", "cols_in", "channels_in")
_WINDOW = ("kernel_rows", "kernel_cols", "stride", "dilation", "broadcasts", "overwrites")
_GROUP = ("outside_inputs", "inside_inputs", "inside_consumers", "leaves", "sink")
_BYTES = ("weights", "unit", "held", "held_outside", "map", "partial_unit")

FEATURE_NAMES: tuple[str, ...] = (
    *(f"is_{name}" for name in CATEGORIES),
    *(f"reads_{name}" for name in WINDOWS),
    *_SHAPE,
    *_WINDOW,
    *_GROUP,
    *(f"log_{name}" for name in _BYTES),
    *(f"{name}_per_buffer" for name in _BYTES),
)
STATIC = len(CATEGORIES) + len(WINDOWS) + len(_SHAPE) + len(_WINDOW)
PLAIN = STATIC + len(_GROUP)
BYTES = len(_BYTES)
FEATURES = len(FEATURE_NAMES)

FEATURES_ID = hashlib.sha256(f"{FEATURE_VERSION}:{','.join(FEATURE_NAMES)}".encode()).hexdigest()[
    :16
]
"""Changes with the features; a model trained on other features is rejected."""

_PARTIAL_CHANNELS = 32  # held by BRR's partial convolutions; see partition/cost/brr/model.py
_LOG_FLOOR = 2.0**-16  # sizes below this share of the buffer are not distinguished
_RATIO_CEILING = 4.0  # an operator that needs four buffers is as invalid as one that needs ten

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GroupTensors:
    """One fusion group as the input of the validity predictor.

    Attributes:
        x: ``(operators, FEATURES)`` float32, operators in topological order.
        edge_index: ``(2, 2 * E)`` int64: E edges producer to consumer, then their reverses.
        operators: position in the graph of each row of ``x``.
        edges: the E directed edges as (producer position, consumer position).
    """

    x: torch.Tensor
    edge_index: torch.Tensor
    operators: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]


def directed_scores(mask: torch.Tensor) -> torch.Tensor:
    """``(2 * E,)`` scores of both directions to ``(E,)``: the sum of the two entries of an edge."""
    half = mask.shape[0] // 2
    return mask[:half] + mask[half:]


def assemble(plain: torch.Tensor, sizes: torch.Tensor, buffer_bytes: torch.Tensor) -> torch.Tensor:
    """The features of operators from their parts.

    Args:
        plain: ``(n, PLAIN)`` columns that do not depend on the buffer.
        sizes: ``(n, BYTES)`` sizes in bytes.
        buffer_bytes: ``(n, 1)`` or ``()`` buffer in bytes.

    Returns:
        ``(n, FEATURES)``.
    """
    ratio = sizes / buffer_bytes
    logs = torch.log2(ratio + _LOG_FLOOR) / 8.0
    return torch.cat([plain, logs, ratio.clamp(max=_RATIO_CEILING)], dim=1)


class FeatureTable:
    """The operators of one graph as rows of features, and groups as slices of them.

    Args:
        graph: the operator graph.
        granularity: ``"line"`` or ``"pixel"``: the unit whose bytes and windows count.
        activation_bytes, weight_bytes: element widths in bytes; ``None``: as stored.

    Attributes:
        alone: ``(operators, 2)`` bytes that each needs as a single-operator group: the units held
            of its operands and its output, without and with its weights.
    """

    def __init__(
        self,
        graph: OpGraph,
        granularity: str = "line",
        activation_bytes: Width | None = 1,
        weight_bytes: Width | None = 1,
    ) -> None:
        self.graph = graph = graph.stored_as(activation_bytes)
        count = len(graph)
        static = np.zeros((count, STATIC), np.float32)
        sizes = np.zeros((count, BYTES), np.float64)
        number = {name: k for k, name in enumerate(graph.tensors)}
        tensors, readers, held = [], [], []
        pixel = granularity == "pixel"
        weights = weights_of(graph, weight_bytes)
        unit_bytes = graph.pixel_bytes if pixel else graph.row_bytes
        for i, op in enumerate(graph.ops):
            static[i] = _describe(graph, i)
            out = graph.tensors[op.writes]
            rows, cols = out.rows, out.cols
            sizes[i, 0] = weights[i]
            sizes[i, 1] = unit_bytes[out.name]
            sizes[i, 4] = graph.tensor_bytes[out.name]
            channels = min(out.elements // (rows * cols), _PARTIAL_CHANNELS)
            sizes[i, 5] = packed(channels * (1 if pixel else cols), graph.width(out.name))
            for read in op.reads:
                edge = make_edge(graph, read, op.writes, pixel)
                units = max(1, edge.widest(edge.units_out))
                tensors.append(number[read.tensor])
                readers.append(i)
                held.append(0.0 if graph.overwrites[i] else units * unit_bytes[read.tensor])
        self._static = static
        self._sizes = sizes.astype(np.float32)
        # One entry per operand, ordered by reader: the first reader of a tensor comes first.
        self._tensors: Ints = np.array(tensors, np.int64)
        self._readers: Ints = np.array(readers, np.int64)
        self._held = np.array(held, np.float64)
        makers = [graph.producer.get(name, -1) for name in graph.tensors]
        self._makers: Ints = np.array(makers, np.int64)[self._tensors]
        self._reads = np.bincount(self._readers, minlength=count)
        self._fans = np.bincount(self._makers[self._makers >= 0], minlength=count)
        lines = sizes[:, 1] + np.bincount(self._readers, weights=self._held, minlength=count)
        self.alone = np.stack([lines, lines + sizes[:, 0]], axis=1)
        self._returned = np.array([op.writes in graph.outputs for op in graph.ops])

    def parts(self, mask: int) -> tuple[Floats, Floats, Ints, Ints]:
        """The inputs of :func:`assemble`, and the edges, of a group given as a bit mask.

        Returns:
            ``(n, PLAIN)`` columns, ``(n, BYTES)`` sizes in bytes, ``(2, E)`` directed edges
            between rows, and the ``(n,)`` positions of the rows in the graph.
        """
        inside = _members(mask, len(self.graph))
        positions = np.flatnonzero(inside)
        count = len(positions)
        row = np.cumsum(inside) - 1
        operands = np.flatnonzero(inside[self._readers])
        makers, readers = self._makers[operands], row[self._readers[operands]]
        inner = (makers >= 0) & inside[makers]
        edges = np.stack([row[makers[inner]], readers[inner]])
        fed = np.bincount(edges[1], minlength=count)
        feeds = np.bincount(edges[0], minlength=count)
        # A tensor is held once, for its widest reader, and attributed to its first reader.
        _, first, which = np.unique(self._tensors[operands], return_index=True, return_inverse=True)
        widest = np.zeros(len(first))
        np.maximum.at(widest, which, self._held[operands])
        charged, outside = readers[first], ~inner[first]
        leaves = self._returned[positions] | (feeds < self._fans[positions])
        counts = np.log2(1 + np.stack([self._reads[positions] - fed, fed, feeds], axis=1)) / 2
        plain = np.concatenate(
            [self._static[positions], counts, leaves[:, None], feeds[:, None] == 0], axis=1
        ).astype(np.float32)
        sizes = self._sizes[positions]
        sizes[:, 2] = np.bincount(charged, weights=widest, minlength=count)
        sizes[:, 3] = np.bincount(charged, weights=widest * outside, minlength=count)
        return plain, sizes, edges, positions

    def group(self, mask: int, buffer_bytes: int) -> GroupTensors:
        """The tensors of a group under a buffer in bytes."""
        plain, sizes, edges, positions = self.parts(mask)
        x = assemble(
            torch.from_numpy(plain), torch.from_numpy(sizes), torch.tensor(float(buffer_bytes))
        )
        both = np.concatenate([edges, edges[::-1]], axis=1)
        ends = positions[edges]
        return GroupTensors(
            x=x,
            edge_index=torch.from_numpy(both),
            operators=tuple(positions.tolist()),
            edges=tuple(zip(ends[0].tolist(), ends[1].tolist(), strict=True)),
        )


def category(graph: OpGraph, position: int) -> str:
    """The entry of :data:`CATEGORIES` for an operator, from its windows and its properties."""
    op = graph.ops[position]
    kinds = {read.window.kind for read in op.reads}
    if WindowKind.WHOLE in kinds:
        return "whole"
    if op.mixes_channels:
        return _mixing(graph, op)
    if WindowKind.REDUCE in kinds:
        return "global_reduce"
    if kinds & {WindowKind.SLIDING, WindowKind.TRANSPOSED}:
        return "pool"
    if op.in_place:
        return "unary"
    if len(op.reads) > 1 and kinds == {WindowKind.IDENTITY}:
        channels = sum(_channels(graph, read.tensor) for read in op.reads)
        return "cat" if channels == _channels(graph, op.writes) else "combine"
    return "other"


def _mixing(graph: OpGraph, op: Op) -> str:
    if op.groups > 1 and op.reads and op.groups == _channels(graph, op.reads[0].tensor):
        return "depthwise"
    if len(graph.tensors[op.writes].shape) < 4:
        return "linear"
    return "conv"


def _channels(graph: OpGraph, name: str) -> int:
    tensor = graph.tensors[name]
    return tensor.elements // (tensor.rows * tensor.cols)


def _describe(graph: OpGraph, position: int) -> Floats:
    """The columns of an operator that depend neither on the group nor on element widths."""
    op = graph.ops[position]
    out = graph.tensors[op.writes]
    sources = [graph.tensors[read.tensor] for read in op.reads]
    windows = [read.window for read in op.reads]
    kinds = [float(op_kind == category(graph, position)) for op_kind in CATEGORIES]
    # Counts on a log scale, so that a concatenation of twenty maps is not an outlier.
    reads = [np.log2(1 + sum(w.kind.value == kind for w in windows)) / 2 for kind in WINDOWS]
    rows_in = max((source.rows for source in sources), default=1)
    cols_in = max((source.cols for source in sources), default=1)
    channels_in = sum(_channels(graph, source.name) for source in sources) or 1
    shape = np.log2([out.rows, out.cols, _channels(graph, out.name), rows_in, cols_in, channels_in])
    window: list[Any] = [
        max((w.kernel[0] for w in windows), default=1) / 4,
        max((w.kernel[1] for w in windows), default=1) / 4,
        max((w.stride[0] for w in windows), default=1) / 4,
        max((w.dilation[0] for w in windows), default=1) / 4,
        any(
            source.rows < out.rows and w.kind is WindowKind.IDENTITY
            for source, w in zip(sources, windows, strict=True)
        ),
        graph.overwrites[position],
    ]
    return np.array([*kinds, *reads, *(shape / 8), *window], np.float32)


def _members(mask: int, count: int) -> npt.NDArray[np.bool_]:
    """A bit mask as ``count`` booleans."""
    raw = np.frombuffer(mask.to_bytes((count + 7) // 8, "little"), np.uint8)
    return np.unpackbits(raw, count=count, bitorder="little").astype(bool)
