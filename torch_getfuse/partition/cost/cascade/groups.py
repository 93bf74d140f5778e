"""A set of operators as a step, apart from which tensors are resident and which way it runs.

A :class:`Group` is worked out once per set of operators: its storages (tensors that share memory by
docs/method.md, section 3), their bytes under each way, and the links by which a resident may be
written over another (section 12). :class:`Facts` is what all groups of a graph are made from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from torch_getfuse.ir import OpGraph, WindowKind
from torch_getfuse.partition.cost.cascade.shape import Flow, Operator, Shape
from torch_getfuse.partition.cost.lbdf.axis_maps import Edge
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.node_set import bits, mask_of

Bytes = NDArray[np.int64]

_MOST_SHAPES = 1 << 13

_GROUP, _MEMBER = 30, 16
"""Steps counted for a new group, and for each member."""

_NUMBERED = 20
"""Steps counted for each member of a group whose shape is asked for."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Tensors of a group that share memory, each written over the one before.

    Attributes:
        tensors: mask of them.
        line, at_once: bytes of its peak live units in the way ``line``, and in one stripe.
        whole: bytes of the tensor.
    """

    tensors: int
    line: int
    at_once: int
    whole: int


@dataclass(frozen=True, slots=True)
class Weighted:
    """An operator's weights.

    Attributes:
        op: its position.
        size: bytes.
        staging: bytes of chip that streaming them takes.
    """

    op: int
    size: int
    staging: int


class Facts:
    """What groups of one graph are made from.

    Args:
        lines: the cost model of the way ``line``.
        slice_channels: output channels of which streamed weights are staged at a time.
        count: counts steps of what is worked out.

    Attributes:
        count: see above.
        size: bytes of each tensor.
        readers, maker: per tensor, mask of the operators that read it, and of the one that
            makes it (0 for an input of the graph).
        inputs, outputs: masks of tensors.
        linking, overwriting: masks of the operators that may be written over an operand if both are
            resident, and of those that are in any case (docs/method.md, section 3).
        may_overwrite: per operator, the operands that it may be written over if both are resident.
        channels: output channels of each operator.
        weighted: the weights of each operator that has some.
        memos: what is known of groups by their kind, see :attr:`Group.memo`.
        least_at_once: per tensor, bytes that its storage takes at least in one stripe of any group;
            0 where that of another tensor counts for it.
    """

    def __init__(self, lines: Lbdf, slice_channels: int, count: Callable[[int], None]) -> None:
        self.count = count
        graph = lines.graph
        self.graph: OpGraph = graph
        self.lines = lines
        self.size = lines.tensor_bytes
        self.readers, self.maker = lines.readers, lines.maker
        number = {name: k for k, name in enumerate(graph.tensors)}
        self.number = number
        self.inputs = sum(1 << number[name] for name in graph.inputs)
        self.outputs = sum(1 << number[name] for name in set(graph.outputs))
        self.touched = [
            1 << number[op.writes] | sum(1 << number[read.tensor] for read in op.reads)
            for op in graph.ops
        ]
        # Weights are taken in slices of these; each step of a recurrent operator needs all of its.
        self.channels = [1 if op.recurrent else graph.channels(op) for op in graph.ops]
        self.weighted: dict[int, Weighted] = {}
        for i, size in enumerate(lines.weights):
            if size:
                some = min(slice_channels, self.channels[i])
                staging = min(size, 2 * -(-size * some // self.channels[i]))
                self.weighted[i] = Weighted(i, size, staging)
        self.may_overwrite = [self._may_overwrite(i) for i in range(len(graph))]
        self.linking = mask_of(i for i, may in enumerate(self.may_overwrite) if may)
        self.overwriting = mask_of(i for i, over in enumerate(graph.overwrites) if over)
        self._shared = [self._in_place(i) for i in range(len(graph))]
        shared = {tensor for row in self._shared for tensor in row}
        self.least_at_once = [
            0 if k in shared or self._is_overwritten(k) else units * lines.unit_bytes[k]
            for k, units in enumerate(lines.least_written)
        ]
        self.memos: dict[object, dict[object, tuple[int | None, int]]] = {}
        self._shapes: dict[tuple[Operator, ...], Shape] = {}
        self._flows: dict[Edge, Flow] = {}

    def touching(self, mask: int) -> int:
        """Mask of the tensors that a set of operators reads or makes."""
        touched = 0
        for i in bits(mask):
            touched |= self.touched[i]
        return touched

    def _may_overwrite(self, position: int) -> tuple[int, ...]:
        """The operands that an elementwise operator may be written over if they are resident."""
        graph, op = self.graph, self.graph.ops[position]
        if op.mixes_channels or graph.overwrites[position]:
            return ()
        if any(read.window.kind is not WindowKind.IDENTITY for read in op.reads):
            return ()
        out = graph.tensors[op.writes]
        return tuple(
            self.number[read.tensor]
            for read in op.reads
            if (source := graph.tensors[read.tensor]).shape == out.shape
            and source.stream_axis == out.stream_axis
            and graph.stored_alike(source.name, out.name)
        )

    def floor(self, mask: int, part: int = 0) -> int:
        """Bytes that the storages of a set take at least, in any way and beside any residents.

        No superset needs less. In every way a storage holds at some moment what the widest window
        over it needs; the tensor of an operator that may be written over a resident is not
        counted, for the two may be one storage.

        Args:
            part: a convex subset of which this was asked before, if any.
        """
        held = self.lines.floor(mask, part)
        rest = mask
        while rest:
            low = rest & -rest
            rest ^= low
            i = low.bit_length() - 1
            held -= self.lines.weights[i]
            for tensor in self._shared[i]:
                held -= self.lines.least(tensor, mask)
        return held

    def _is_overwritten(self, tensor: int) -> bool:
        readers = self.readers[tensor]
        return bool(readers) and self.graph.overwrites[readers.bit_length() - 1]

    def _in_place(self, position: int) -> tuple[int, ...]:
        """The tensor of an operator that may be written over a resident, and those that are
        written over it in turn by section 3; empty for other operators.
        """
        found: list[int] = []
        while self.may_overwrite[position] or found:
            found.append(self.lines.writes[position])
            after = self.readers[found[-1]]
            position = after.bit_length() - 1
            if not after or not self.graph.overwrites[position]:
                break
        return tuple(found)

    def flow(self, edge: Edge) -> Flow:
        found = self._flows.get(edge)
        if found is None:
            found = self._flows[edge] = Flow(edge)
        return found

    def shape(self, operators: tuple[Operator, ...], lasts: tuple[int, ...]) -> Shape:
        """The shape with certain operators and last tensors of its storages."""
        found = self._shapes.get(operators)
        if found is None:
            if len(self._shapes) >= _MOST_SHAPES:
                self._shapes.clear()
            found = self._shapes[operators] = Shape(operators, lasts, self.count)
        return found


class Group:
    """One set of operators as a step.

    Attributes:
        mask: its operators.
        tensors: mask of the tensors that it touches.
        loads: mask of the tensors that it reads from outside.
        makes: mask of those that it makes.
        private: mask of the tensors whose whole life is in it: made in it, or inputs of the
            graph, and read by nobody outside.
        weights: bytes of all weights.
        storages: in the order of the shape's.
        line, at_once: bytes of all storages in the way ``line``, and in one stripe.
    """

    def __init__(self, facts: Facts, mask: int) -> None:
        self.facts, self.mask = facts, mask
        facts.count(_GROUP + _MEMBER * mask.bit_count())
        lines = facts.lines
        touched = makes = weights = 0
        for i in bits(mask):
            touched |= facts.touched[i]
            makes |= 1 << lines.writes[i]
            weights += lines.weights[i]
        self.tensors, self.makes, self.weights = touched, makes, weights
        self.loads = touched & ~makes
        self.private = 0
        for tensor in bits(makes | self.loads & facts.inputs):
            if not facts.readers[tensor] & ~mask:
                self.private |= 1 << tensor
        before = lines.extra_steps
        self._held = lines.held(mask)
        facts.count(lines.extra_steps - before)
        made = lines.finals(mask) if mask & lines.partial else None
        self.storages: list[Storage] = []
        for last, rows in self._held:
            size, unit = facts.size[last], lines.unit_bytes[last]
            tensors, first = 1 << last, last
            while (maker := lines.maker[first]) & mask & facts.overwriting:
                first = lines.reads[maker.bit_length() - 1][0]
                tensors |= 1 << first
            at_once = size if made is None else unit * max(1, self._made(first, made))
            self.storages.append(Storage(tensors, rows * unit, at_once, size))
        self.line = sum([storage.line for storage in self.storages])
        self.at_once = sum([storage.at_once for storage in self.storages])

    def _made(self, tensor: int, made: dict[int, int]) -> int:
        """Units of a tensor that are ever made or loaded.

        Args:
            made: units of the tensor of each operator that makes fewer than all.
        """
        lines = self.facts.lines
        maker = lines.maker[tensor]
        if maker & self.mask:
            return made.get(maker.bit_length() - 1, lines.units[tensor])
        readers = bits(lines.readers[tensor] & self.mask)
        units = {c: made.get(c, lines.units[lines.writes[c]]) for c in readers}
        return max(lines.edges[tensor, c].needed(count) for c, count in units.items())

    @cached_property
    def _numbered(self) -> tuple[Shape, list[int]]:
        """The shape, and the tensor of each number in it."""
        facts, lines = self.facts, self.facts.lines
        facts.count(_NUMBERED * self.mask.bit_count())
        local: dict[int, int] = {}
        operators = []
        for i in bits(self.mask):
            for tensor in (*lines.reads[i], lines.writes[i]):
                local.setdefault(tensor, len(local))
            operators.append(
                Operator(
                    local[lines.writes[i]],
                    lines.units[lines.writes[i]],
                    tuple([(local[t], facts.flow(lines.edges[t, i])) for t in lines.reads[i]]),
                    local[lines.reads[i][0]] if facts.overwriting >> i & 1 else -1,
                    tuple([local[t] for t in facts.may_overwrite[i]]),
                )
            )
        lasts = tuple([local[last] for last, _ in self._held])
        return facts.shape(tuple(operators), lasts), list(local)

    @property
    def shape(self) -> Shape:
        """Its schedules, in numbers of their own."""
        return self._numbered[0]

    @property
    def numbers(self) -> list[int]:
        """The tensor of each number in the shape."""
        return self._numbered[1]

    @cached_property
    def memo(self) -> dict[object, tuple[int | None, int]]:
        """What has been worked out of groups that differ from this one in nothing but their names:
        same shape, same bytes. Each entry is an answer up to a limit, and that limit.
        """
        kind = (
            self.shape,
            tuple([(s.line, s.at_once, s.whole) for s in self.storages]),
            tuple([(own.size, own.staging) for own in self.weighted]),
            self.local(self.private),
            None if self.alone is None else self.facts.channels[self.alone],
        )
        memos = self.facts.memos
        if len(memos) >= _MOST_SHAPES:
            memos.clear()
        return memos.setdefault(kind, {})

    def local(self, tensors: int) -> int:
        """Tensors that the group touches, by their numbers in its shape."""
        local = self._local
        return sum([1 << local[t] for t in bits(tensors)])

    @cached_property
    def _local(self) -> dict[int, int]:
        return {t: k for k, t in enumerate(self.numbers)}

    @cached_property
    def unit_bytes(self) -> Bytes:
        """Bytes of a unit of each storage."""
        lines = self.facts.lines
        return np.array([lines.unit_bytes[self.numbers[r[-1]]] for r in self.shape.storages])

    @cached_property
    def wholes(self) -> Bytes:
        """Bytes of the tensor of each storage."""
        return np.array([storage.whole for storage in self.storages])

    @cached_property
    def links(self) -> list[tuple[int, int]]:
        """Source and target of the shape's links, as masks of one tensor each."""
        if not self.mask & self.facts.linking:
            return []
        return [
            (1 << self.numbers[link.source], 1 << self.numbers[link.target])
            for link in self.shape.links
        ]

    @cached_property
    def linked(self) -> int:
        """Mask of the tensors that may be written over a resident."""
        return sum(1 << self.facts.lines.writes[i] for i in bits(self.mask & self.facts.linking))

    @cached_property
    def weighted(self) -> tuple[Weighted, ...]:
        """The weights of each operator that has some."""
        known = self.facts.weighted
        return tuple(known[i] for i in bits(self.mask) if i in known)

    @cached_property
    def least_staging(self) -> int:
        """Bytes of chip that streaming all weights takes."""
        return max((own.staging for own in self.weighted), default=0)

    @cached_property
    def least(self) -> int:
        """A lower bound of the bytes of all storages, whatever the way and the residents."""
        return self.facts.floor(self.mask)

    @property
    def alone(self) -> int | None:
        """The position of the only operator; ``None`` of several."""
        return None if self.mask & (self.mask - 1) else self.mask.bit_length() - 1
