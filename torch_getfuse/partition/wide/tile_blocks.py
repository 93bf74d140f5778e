"""A BRR problem as blocks and the tensors between them: what each holds in a group's tiles.

The rules are those of the cost model (docs/method.md, section 4); here they are tables by the rows
that a block makes, so that many groups are priced at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from torch_getfuse.ir import WindowKind
from torch_getfuse.partition.cost.brr.model import Brr
from torch_getfuse.partition.cost.brr.rows import Operand
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.wide.block_order import classes_of, narrow_order

Ints = npt.NDArray[np.int64]

_STREAM = 60  # steps counted per stream
MOST_RATE = 1 << 40  # rows per tile line; more of them fit nowhere


@dataclass(frozen=True)
class Stream:
    """A tensor between blocks, or an input of the graph.

    Attributes:
        size: bytes.
        maker: the block that writes it; -1 for an input of the graph.
        inside: whether its maker can be in a group.
        blocks: all blocks that read or write it.
        forced: whether it must be written to DRAM whichever blocks are in the group.
    """

    size: int
    maker: int
    inside: bool
    blocks: frozenset[int]
    forced: bool


@dataclass(frozen=True)
class Read:
    """A stream that a block reads.

    Attributes:
        stream: its number.
        rows: its rows that are needed, by the rows that the block makes.
        rate: its rate over that of the block, both times the cumulative stride; ``None``: none, or
            several.
    """

    stream: int
    rows: Ints
    rate: Fraction | None


@dataclass(frozen=True)
class Hold:
    """Rows of a tensor that a block holds if it starts a group, one of a buffer's terms.

    Attributes:
        tensor: its name.
        shared: whether other blocks may hold rows of it.
        row: bytes of a row.
        rows: how many, by the rows that the block makes.
        stride: of the rows of a further tile line; 1 where there is one row per line.
        needed, short: rows that sinks need in the end, and those by which a tile may hold less than
            its share of them.
    """

    tensor: str
    shared: bool
    row: int
    rows: Ints
    stride: Fraction
    needed: int
    short: int


@dataclass(frozen=True)
class TileBlock:
    """A block: an operator, and others that work on its result in place.

    Attributes:
        out: the stream that it writes, -1 if no other block reads it.
        reads: the streams that it reads.
        weights, traffic: bytes; the latter of what it writes in any group, if no stream says so.
        stores: whether its first operator is a convolution, that holds rows of its result.
        full, partial: bytes of such a row, with all channels and with ``kappa`` of them.
        height: rows of its result.
        cumulative: stride.
        needed, short: rows of the result that sinks need in the end, and those by which a tile may
            hold less than its share.
        holds: what it holds if it starts a group, and a convolution is partial.
        sources: the streams that it reads whose makers can be in a group.
        makers: these, which keep it from starting one.
    """

    out: int
    reads: tuple[Read, ...]
    weights: int
    traffic: int
    stores: bool
    full: int
    partial: int
    height: int
    cumulative: Fraction
    needed: int
    short: int
    holds: tuple[Hold, ...]
    sources: tuple[int, ...]
    makers: frozenset[int]


@dataclass(frozen=True)
class TileSkeleton:
    """Blocks, then the unfusable operators as blocks that join no group, and their streams.

    Attributes:
        blocks: of the problem.
        streams: tensors between them.
        touches: per block and unfusable operator, the numbers of its streams.
        order: all of them, each after those that read what it makes, ordered so that few streams
            are open (some of their blocks come before, some after) at a time.
        holders: of each tensor that several blocks may hold, these.
    """

    blocks: tuple[TileBlock, ...]
    streams: tuple[Stream, ...]
    touches: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    holders: dict[str, frozenset[int]]

    @classmethod
    def of(cls, problem: FusionProblem, scheme: Brr) -> TileSkeleton:
        """The skeleton of a problem."""
        return _Maker(problem, scheme).skeleton()

    @property
    def strides(self) -> Iterator[Fraction]:
        """The cumulative stride of each block."""
        return (block.cumulative for block in self.blocks)

    def classes(self, radius: int) -> Ints:
        """Per fusable block its class: blocks with equal surroundings up to ``radius`` share one.

        Equal at radius 0: weights, rows, and the sizes of what they read; at each larger radius,
        the neighbours are also equal at the radius before.
        """
        features = [
            (
                (block.weights, block.stores, block.full, block.height),
                tuple(sorted((self.streams[r.stream].size, int(r.rows[-1])) for r in block.reads)),
            )
            for block in self.blocks
        ]
        return np.array(classes_of(features, self.streams, self.touches, radius))


class _Maker:
    """Makes the skeleton of one problem."""

    def __init__(self, problem: FusionProblem, scheme: Brr) -> None:
        self.problem, self.scheme = problem, scheme
        self.graph = graph = scheme.graph
        self.fusable = len(problem.blocks)
        self.masks = [*problem.blocks, *(1 << i for i in bits(problem.unfusable))]
        self.home = {i: k for k, mask in enumerate(self.masks) for i in bits(mask)}
        self.streams: list[Stream] = []
        self.number: dict[str, int] = {}
        for name, size in graph.tensor_bytes.items():
            maker = self.home[graph.producer[name]] if name in graph.producer else -1
            readers = {self.home[i] for i in graph.consumers[name]}
            if not readers or readers == {maker}:
                continue
            inside = 0 <= maker < self.fusable
            outer = any(reader >= self.fusable for reader in readers)
            forced = inside and (name in graph.outputs or outer)
            blocks = frozenset(readers | {maker} - {-1})
            self.number[name] = len(self.streams)
            self.streams.append(Stream(size, maker, inside, blocks, forced))

    def skeleton(self) -> TileSkeleton:
        work = self.problem.evaluator.work
        work.add(_STREAM * len(self.streams))
        operands = self.scheme.demand.operands
        # Those of the first operators; the others of a block read what is made in it alone.
        read = [operands[(mask & -mask).bit_length() - 1] for mask in self.problem.blocks]
        holders: dict[str, set[int]] = {}
        for k, some in enumerate(read):
            for operand in some:
                holders.setdefault(operand.read.tensor, set()).add(k)
        shared = {name for name, several in holders.items() if len(several) > 1}
        blocks = [self._block(k, some, shared) for k, some in enumerate(read)]
        touches: list[list[int]] = [[] for _ in self.masks]
        for number, stream in enumerate(self.streams):
            for block in stream.blocks:
                touches[block].append(number)
        # From the last to the first: of equals the last comes first.
        last = len(self.masks) - 1
        order = narrow_order(
            [[last - block for block in stream.blocks] for stream in self.streams],
            touches[::-1],
            [
                (last - reader, last - stream.maker)
                for stream in self.streams
                for reader in stream.blocks
                if 0 <= stream.maker != reader
            ],
            work,
        )
        return TileSkeleton(
            tuple(blocks),
            tuple(self.streams),
            tuple(map(tuple, touches)),
            tuple(last - block for block in order),
            {name: frozenset(holders[name]) for name in sorted(shared)},
        )

    def _block(self, k: int, operands: Sequence[Operand], shared: set[str]) -> TileBlock:
        graph, scheme, mask = self.graph, self.scheme, self.problem.blocks[k]
        demand = scheme.demand
        first, last = (mask & -mask).bit_length() - 1, mask.bit_length() - 1
        out = graph.ops[last].writes
        height = graph.tensors[out].rows
        reads = self._reads(first, operands, height)
        sources = tuple(read.stream for read in reads if self.streams[read.stream].inside)
        return TileBlock(
            out=self.number.get(out, -1),
            reads=reads,
            weights=sum(scheme.weights[i] for i in bits(mask)),
            traffic=graph.tensor_bytes[out]
            if out in graph.outputs and out not in self.number
            else 0,
            stores=not scheme.local >> first & 1,
            full=scheme.row_full[first],
            partial=scheme.row_some[first],
            height=height,
            cumulative=Fraction(demand.cumulative[first]),
            needed=demand.in_all[first],
            short=demand.short[first],
            holds=tuple(self._hold(first, operand, height, shared) for operand in operands),
            sources=sources,
            makers=frozenset(self.streams[number].maker for number in sources),
        )

    def _rows(self, operand: Operand, height: int) -> Ints:
        """Rows of an operand by the rows that are made, 0 for none (:meth:`Demand.input_rows`)."""
        most = self.graph.tensors[operand.read.tensor].rows
        if operand.stride is None:
            rows = np.full(height + 1, most, np.int64)
        else:
            stride = Fraction(operand.stride)
            made = np.arange(-1, height, dtype=np.int64) * stride.numerator
            rows = np.minimum(most, -(-made // stride.denominator) + operand.kernel)
        rows[0] = 0
        return rows

    def _hold(self, i: int, operand: Operand, height: int, shared: set[str]) -> Hold:
        demand = self.scheme.demand
        name, stride = operand.read.tensor, operand.stride
        row = self.graph.row_bytes[name]
        if operand.read.window.kind is WindowKind.REDUCE:
            one = np.array([0] + [1] * height, np.int64)
            return Hold(name, name in shared, row, one, Fraction(1), 0, 0)
        rows = self._rows(operand, height)
        needed = short = 0
        if stride is not None:
            needed = math.floor((demand.in_all[i] - 1) * stride) + operand.kernel
            needed = min(needed, self.graph.tensors[name].rows)
            short = math.ceil(demand.short[i] * stride) + max(0, math.ceil(stride - operand.kernel))
        return Hold(name, name in shared, row, rows, Fraction(stride or 1), needed, short)

    def _reads(self, i: int, operands: Sequence[Operand], height: int) -> tuple[Read, ...]:
        """What the first operator of a block reads, each tensor once."""
        cumulative = self.scheme.demand.cumulative
        found: dict[int, Read] = {}
        for operand in operands:
            name = operand.read.tensor
            rate = None
            if operand.stride is not None:
                producer = self.graph.producer.get(name)
                above = 1 if producer is None else cumulative[producer]
                rate = Fraction(operand.stride) * above / Fraction(cumulative[i])
            read = Read(self.number[name], self._rows(operand, height), rate)
            other = found.setdefault(read.stream, read)
            if other is not read:
                rows = np.maximum(read.rows, other.rows)
                found[read.stream] = Read(read.stream, rows, rate if rate == other.rate else None)
        return tuple(found.values())
