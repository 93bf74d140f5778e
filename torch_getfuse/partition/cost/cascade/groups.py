"""What a step's group holds, apart from which tensors are resident and which way it runs.

A :class:`Group` is worked out once per set of operators. It knows the group's storages (tensors
that share memory by docs/method.md, section 3), their bytes under each way, and the *links*:
pairs of tensors of which the later may be written over the earlier if both are resident
(section 12).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from torch_getfuse.ir import OpGraph, WindowKind
from torch_getfuse.partition.cost.lbdf.axis_maps import Edge
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.node_set import bits

Bytes = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Storage:
    """Tensors of a group that share memory, each written over the one before.

    Attributes:
        first, last: numbers of the first and the last of them.
        tensors: mask of all.
        line: bytes of its peak live units in the way ``line``.
        at_once: the same in one stripe: the tensor, or as much of it as is ever needed.
        whole: bytes of the tensor.
    """

    first: int
    last: int
    tensors: int
    line: int
    at_once: int
    whole: int


@dataclass(frozen=True, slots=True)
class Link:
    """A tensor that may be written over an operand where both are resident.

    Attributes:
        source, target: numbers of the operand and of the tensor written over it.
        below, above: positions in :attr:`Group.storages` of the storage that ends with the
            operand, and of the one that begins with the tensor.
        op: position of the operator.
        others: mask of the operators of the group that read the operand as well.
    """

    source: int
    target: int
    below: int
    above: int
    op: int
    others: int


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

    Attributes:
        size: bytes of each tensor.
        readers, maker: per tensor, mask of the operators that read it, and of the one that
            makes it (0 for an input of the graph).
        inputs, outputs: masks of tensors.
        may_overwrite: per operator, the operands that it may be written over if both are resident.
        channels: output channels of each operator.
        weighted: the weights of each operator that has some.
        least_at_once: per tensor, bytes that its storage takes at least in one stripe of any group;
            0 where that of another tensor counts for it.
    """

    def __init__(self, lines: Lbdf, slice_channels: int) -> None:
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
        self.channels = [_channels(graph, i) for i in range(len(graph))]
        self.weighted: dict[int, Weighted] = {}
        for i, size in enumerate(lines.weights):
            if size:
                some = min(slice_channels, self.channels[i])
                staging = min(size, 2 * -(-size * some // self.channels[i]))
                self.weighted[i] = Weighted(i, size, staging)
        self.may_overwrite = [self._may_overwrite(i) for i in range(len(graph))]
        self._shared = [self._in_place(i) for i in range(len(graph))]
        shared = {tensor for row in self._shared for tensor in row}
        self.least_at_once = [
            0 if k in shared or self._is_overwritten(k) else units * lines.unit_bytes[k]
            for k, units in enumerate(lines.least_written)
        ]
        self._ends: dict[Edge, list[int]] = {}
        self._keeps: dict[Edge, list[int]] = {}

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
        """An operator's tensor and those that are written over it, one after the other, by the
        plain rule; none of an operator that has no operand it may be written over."""
        found = []
        while self.may_overwrite[position] or found:
            found.append(self.lines.writes[position])
            after = self.readers[found[-1]]
            position = after.bit_length() - 1
            if not after or not self.graph.overwrites[position]:
                break
        return tuple(found)

    def ends(self, tensor: int, reader: int) -> list[int]:
        """Per output unit of a reader, the length of the prefix of ``tensor`` that it needs."""
        edge = self.lines.edges[tensor, reader]
        found = self._ends.get(edge)
        if found is None:
            found = edge.needed_all(np.arange(1, edge.units_out + 1)).tolist()
            self._ends[edge] = found
        return found

    def keeps(self, tensor: int, reader: int) -> list[int]:
        """By number of units that a reader has written, the first unit of ``tensor`` that it
        still needs."""
        edge = self.lines.edges[tensor, reader]
        found = self._keeps.get(edge)
        if found is None:
            found = edge.released_all(np.arange(edge.units_out + 1)).tolist()
            self._keeps[edge] = found
        return found


def _channels(graph: OpGraph, position: int) -> int:
    shape = graph.tensors[graph.ops[position].writes].shape
    return shape[1] if len(shape) == 4 else shape[-1] if shape else 1


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
        storages, links: see the classes.
        line, at_once: bytes of all storages in the way ``line``, and in one stripe.
    """

    def __init__(self, facts: Facts, mask: int) -> None:
        self.facts, self.mask = facts, mask
        lines = facts.lines
        touched = makes = weights = 0
        for i in bits(mask):
            touched |= facts.touched[i]
            makes |= 1 << lines.writes[i]
            weights += lines.weights[i]
        self.tensors, self.makes, self.weights = touched, makes, weights
        self.loads = touched & ~makes
        storages = []
        for last, units in lines.held(mask):
            first, members = last, 1 << last
            while (maker := lines.maker[first]) & mask:
                i = maker.bit_length() - 1
                if not facts.graph.overwrites[i]:
                    break
                first = lines.reads[i][0]
                members |= 1 << first
            size = facts.size[last]
            storages.append(
                Storage(first, last, members, units * lines.unit_bytes[last], size, size)
            )
        self.storages: Sequence[Storage] = storages
        if mask & lines.partial:
            peaks = self._peaks(np.array([1]))[0].tolist()
            self.storages = [
                replace(s, at_once=peak) for s, peak in zip(storages, peaks, strict=True)
            ]
        self.line = sum([storage.line for storage in self.storages])
        self.at_once = sum([storage.at_once for storage in self.storages])
        private = 0
        for tensor in bits(makes | self.loads & facts.inputs):
            if not facts.readers[tensor] & ~mask:
                private |= 1 << tensor
        self.private = private
        self.links = self._links()
        self._stripe_peaks: dict[int, Bytes] = {}
        self._line_links: int | None = None

    def _links(self) -> Sequence[Link]:
        facts = self.facts
        links: list[Link] = []
        starts: dict[int, int] | None = None
        for i in bits(self.mask):
            for source in facts.may_overwrite[i]:
                if starts is None:
                    starts = {storage.first: k for k, storage in enumerate(self.storages)}
                    ends = {storage.last: k for k, storage in enumerate(self.storages)}
                target = facts.lines.writes[i]
                if source in ends and target in starts:
                    others = facts.readers[source] & self.mask & ~(1 << i)
                    links.append(Link(source, target, ends[source], starts[target], i, others))
        return links

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

    @cached_property
    def steady(self) -> bool:
        """Whether no storage needs less in stripes than in lines.

        So it is where all sinks have one length, or the least: whenever a unit is written in the
        way ``line``, there is a stripe at whose end at least as much, and at whose start at most
        as much of every sink is made. And no other reader may decide about a link.
        """
        lines = self.facts.lines
        lengths = {
            lines.units[t]
            for t in (lines.writes[i] for i in bits(self.mask))
            if not lines.readers[t] & self.mask
        }
        return len(lengths - {1}) <= 1 and not any(link.others for link in self.links)

    @property
    def alone(self) -> int | None:
        """The position of the only operator; ``None`` of several."""
        return None if self.mask & (self.mask - 1) else self.mask.bit_length() - 1

    @cached_property
    def longest(self) -> int:
        """Units of the longest sink: the most stripes."""
        lines = self.facts.lines
        return max(
            lines.units[lines.writes[i]]
            for i in bits(self.mask)
            if not lines.readers[lines.writes[i]] & self.mask
        )

    # -- stripes --------------------------------------------------------------------------

    def stripe_bytes(self, first: int) -> Bytes:
        """Bytes of the peak of each storage in ``first`` stripes and in some more.

        Counts are worked out in batches, for most of the time goes into starting numpy.

        Args:
            first: 2, or the first count after another batch.

        Returns:
            One row per count, one column per storage.
        """
        found = self._stripe_peaks.get(first)
        if found is None:
            counts = np.arange(first, min(2 * first + 4, self.longest) + 1)
            found = self._stripe_peaks[first] = self._peaks(counts)
        return found

    def bytes_in(self, count: int) -> Sequence[int]:
        """Bytes of the peak of each storage in so many stripes."""
        if count == 1:
            return [storage.at_once for storage in self.storages]
        row: list[int] = self._peaks(np.array([count]))[0].tolist()
        return row

    def _peaks(self, stripes: Bytes) -> Bytes:
        made, released, starts = self.stripe_counts(stripes)
        table = np.empty((len(stripes), len(self.storages)), np.int64)
        for k, storage in enumerate(self.storages):
            held = made[storage.first].copy()
            held[1:] -= released[storage.last][:-1]
            held[starts] = 0
            peaks = np.maximum(np.maximum.reduceat(held, starts), 1)
            table[:, k] = peaks * self.facts.lines.unit_bytes[storage.last]
        return table

    def stripe_counts(self, stripes: Bytes) -> tuple[dict[int, Bytes], dict[int, Bytes], Bytes]:
        """Units made and no longer needed of each tensor, after 0, 1, ... stripes.

        Args:
            stripes: several counts of stripes, whose arrays follow each other.

        Returns:
            Made and released units by tensor, and where the arrays of each count start.
        """
        lines, mask = self.facts.lines, self.mask
        starts = np.concatenate([[0], np.cumsum(stripes + 1)[:-1]])
        total = np.repeat(stripes, stripes + 1)
        done = np.arange(len(total)) - np.repeat(starts, stripes + 1)
        made: dict[int, Bytes] = {}
        for i in reversed(list(bits(mask))):
            tensor = lines.writes[i]
            made[tensor] = self._demanded(tensor, made)
            if made[tensor] is _NOTHING:
                made[tensor] = -(-done * lines.units[tensor] // total)
        for tensor in bits(self.loads):
            made[tensor] = self._demanded(tensor, made)
        released: dict[int, Bytes] = {}
        for tensor, count in made.items():
            least = count
            for c in bits(lines.readers[tensor] & mask):
                edge = lines.edges[tensor, c]
                if edge.holds:
                    least = np.minimum(least, edge.released_all(made[lines.writes[c]]))
            released[tensor] = least
        return made, released, starts

    def _demanded(self, tensor: int, made: dict[int, Bytes]) -> Bytes:
        lines = self.facts.lines
        found = _NOTHING
        for c in bits(lines.readers[tensor] & self.mask):
            needed = lines.edges[tensor, c].needed_all(made[lines.writes[c]])
            found = needed if found is _NOTHING else np.maximum(found, needed)
        return found

    # -- which links hold -----------------------------------------------------------------

    def links_of_line(self) -> int:
        """Mask of the links whose other readers have let go in time, in the way ``line``."""
        if self._line_links is None:
            watched = {k: link for k, link in enumerate(self.links) if link.others}
            failing = _not_let_go(self, watched) if watched else 0
            self._line_links = (1 << len(self.links)) - 1 & ~failing
        return self._line_links

    def links_of_one_stripe(self) -> int:
        """The same in one stripe: the operator's turn is the last of all readers'."""
        return sum(1 << k for k, link in enumerate(self.links) if link.others < 1 << link.op)

    def links_of_stripes(self, count: int) -> int:
        """The same in ``count`` stripes, where an operator's turn comes once per stripe."""
        found = (1 << len(self.links)) - 1
        if not any(link.others for link in self.links):
            return found
        lines = self.facts.lines
        made, _, _ = self.stripe_counts(np.array([count]))
        for k, link in enumerate(self.links):
            written = made[link.target]
            busy = written[1:] > written[:-1]
            for c in bits(link.others):
                edge = lines.edges[link.source, c]
                gone = made[link.source]
                if edge.holds:
                    gone = np.minimum(gone, edge.released_all(made[lines.writes[c]]))
                gone = gone[1:] if c < link.op else gone[:-1]
                if (busy & (gone < written[1:])).any():
                    found &= ~(1 << k)
        return found


_NOTHING = np.zeros(0, np.int64)


def _not_let_go(group: Group, watched: dict[int, Link]) -> int:
    """Mask of the links of which another reader still needs a unit when it is written over.

    Carries out the schedule of docs/method.md, section 3, on counts alone.
    """
    facts, mask = group.facts, group.mask
    lines = facts.lines
    made = dict.fromkeys(bits(group.tensors), 0)
    maker = {lines.writes[i]: i for i in bits(mask)}
    operands = {
        lines.writes[i]: [(t, facts.ends(t, i)) for t in lines.reads[i]] for i in bits(mask)
    }
    holders: dict[int, list[tuple[int, list[tuple[int, list[int]]]]]] = {}
    for k, link in watched.items():
        needs = [
            (lines.writes[c], facts.keeps(link.source, c))
            for c in bits(link.others)
            if lines.edges[link.source, c].holds
        ]
        holders.setdefault(link.target, []).append((k, needs))
    failing = 0
    sinks = [t for t in maker if not lines.readers[t] & mask]
    longest = max(lines.units[t] for t in sinks)
    for step in range(1, longest + 1):
        for sink in sinks:
            stack = [(sink, -(-step * lines.units[sink] // longest))]
            while stack:
                tensor, count = stack[-1]
                unit = made[tensor]
                if unit >= count:
                    stack.pop()
                    continue
                for source, ends in operands.get(tensor, ()):
                    if made[source] < ends[unit]:
                        stack.append((source, ends[unit]))
                        break
                else:
                    for k, needs in holders.get(tensor, ()):
                        if any(keeps[made[reader]] <= unit for reader, keeps in needs):
                            failing |= 1 << k
                    made[tensor] = unit + 1
    return failing
