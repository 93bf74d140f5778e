"""BRR: buffer requirement reduction, after Optimus (docs/method.md, section 4).

Source: arXiv 2501.00636, section III.

Only feature maps bind the buffer. A group runs in tiles of whole rows; its convolutions
alternate between *full* (hold all output channels) and *partial* (hold ``kappa``), so that a
partial one streams channels from a full one; local operators (pooling, add, concat,
elementwise, depthwise convolution) keep nothing. Weights are read once if they fit beside the
maps, else once per tile: fewer rows held means more passes over the weights.

    F_min  = sum over convolutions of channels x m x W  + held outside inputs      (= F_b)
    F_line = the same with one more tile line of rows in place of m
    T      = 1 if F_min + W <= B, else ceil(H_s / h), h = min(H_s, (B - F_min) // F_line + 1)
    F_D    = W x T + outside inputs once + outside outputs once

where ``m`` is the fewest rows of an operator that one tile line of the sinks needs. Both starts
(the first convolution full, or partial) are tried; the one with the smaller
``F_line / (B - F_min)`` is kept.

Differences from Optimus, all decided by docs/method.md, section 4: depthwise weights count; local
operators alone cost their input and output; a group may start with a local operator, which then
streams its input and holds m rows of it; passes are rounded up; a one-row tensor that a taller
one reads (the scale of Squeeze-and-Excite) has no rate, so a group with that edge inside is
invalid; where predecessors of a convolution disagree it follows a full one; the windows of
dilated convolutions are as tall as they reach.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch_getfuse.ir import OpGraph, Tensor, WindowKind
from torch_getfuse.partition.cost.brr.rows import Demand, Rows
from torch_getfuse.partition.cost.scheme import (
    CostTerm,
    Dram,
    FusionScheme,
    Steps,
    boundary,
    remember,
    weights_of,
)
from torch_getfuse.partition.node_set import bits, mask_of

KAPPA = 32
_HOPELESS = 1 << 62


class _Start(NamedTuple):
    """What one start of the alternation holds: at least, and per further tile line, in bytes."""

    need: int
    line: int


class _Tiles(NamedTuple):
    """The two starts of a group, and the tile lines of its sinks."""

    full: _Start
    partial: _Start
    lines: int

    def better(self, buffer_bytes: int) -> _Start:
        """The start with the smaller F_line / (B - F_min); one that does not fit counts last."""
        full, partial = self.full, self.partial
        rooms = buffer_bytes - full.need, buffer_bytes - partial.need
        if min(rooms) > 0:
            return full if full.line * rooms[1] <= partial.line * rooms[0] else partial
        return full if rooms[0] >= rooms[1] else partial

    def passes(self, start: _Start, weights: int, buffer_bytes: int) -> int:
        """How often so many bytes of weights are read by a start that fits."""
        if start.need + weights <= buffer_bytes:
            return 1
        further = (buffer_bytes - start.need) // start.line if start.line else self.lines
        return -(-self.lines // min(self.lines, further + 1))


class _Course(NamedTuple):
    """What follows from how a group starts.

    Attributes:
        full: mask of the members that are full.
        maps: bytes of the convolutions' outputs that its tiles hold, all tiles together, if each
            held ``short`` bytes more (:attr:`Demand.short`).
        short: see there.
        whole: bytes of all rows of what is held, outside inputs included.
    """

    full: int
    maps: int
    short: int
    whole: int


class _Makeup(NamedTuple):
    """What stays as it is, or only grows, when operators join a group downstream.

    Attributes:
        first, sinks: members without producers, and without consumers, in the group.
        rateless: whether a one-row tensor is read by a taller one inside.
        full, partial: what becomes of the group if its first convolutions are full, or partial.
        weights: bytes.
    """

    first: int
    sinks: int
    rateless: bool
    full: _Course
    partial: _Course
    weights: int


_NOTHING = _Makeup(0, 0, False, _Course(0, 0, 0, 0), _Course(0, 0, 0, 0), 0)


class Brr(FusionScheme):
    """The BRR cost model of one graph.

    Args:
        graph: the operator graph.
        activation_bytes, weight_bytes: element widths in bytes; ``None``: weights as stored.
        kappa: output channels that a partial convolution holds.
    """

    name = "brr"
    additive = True
    # A group that starts with such an operator holds its rows whichever way it alternates, so the
    # rule that picks a start may pick another one, and the weights may be read less often.
    merges_in_place = False
    lends_in_place = True
    has_predictor = True
    steps = Steps(3, 4, 5, 3)  # the buffer is mostly known once ``hopeless`` was asked

    def __init__(
        self,
        graph: OpGraph,
        activation_bytes: int = 1,
        weight_bytes: int | None = 1,
        kappa: int = KAPPA,
    ) -> None:
        self.graph = graph
        self.activation_bytes = activation_bytes
        self.weight_bytes = weight_bytes
        self.weights = weights_of(graph, weight_bytes)
        self._out = [graph.tensors[op.writes] for op in graph.ops]
        self._local = mask_of(i for i in range(len(graph)) if _is_local(graph, i))
        # Bytes of one row of an operator's output: all channels, and kappa of them.
        self._row_full = [out.elements // out.rows * activation_bytes for out in self._out]
        self._row_some = [
            b * min(kappa, _channels(t)) // _channels(t)
            for b, t in zip(self._row_full, self._out, strict=True)
        ]
        stored = zip(self._row_full, self._row_some, strict=True)
        self._demand = Demand(
            graph, [None if self._local >> i & 1 else pair for i, pair in enumerate(stored)]
        )
        # Of all inputs together, if as many rows are held as there are, or as the output has.
        self._input_bytes = [
            sum(
                self._row_bytes(r.tensor) * max(graph.tensors[r.tensor].rows, out.rows)
                for r in op.reads
            )
            for op, out in zip(graph.ops, self._out, strict=True)
        ]
        self._makeups: dict[int, _Makeup] = {}
        self._known: dict[int, _Tiles | None] = {}

    # -- the two figures ------------------------------------------------------------------

    def buffer(self, mask: int, buffer_bytes: int) -> int | None:
        """``F_b`` in bytes; ``None`` for a group whose operators have no common rate."""
        tiles = self._tiles(mask)
        return None if tiles is None else tiles.better(buffer_bytes).need

    def hopeless(self, mask: int, buffer_bytes: int, part: int = 0) -> bool:
        """Whether the floor alone needs the buffer; it does not where the whole maps fit."""
        makeup = self._makeup(mask, part)
        if not makeup.rateless and min(makeup.full.whole, makeup.partial.whole) < buffer_bytes:
            return False
        return self.floor(mask) >= buffer_bytes

    def floor(self, mask: int) -> int:
        """``F_min`` if the sinks needed one row each: no group grown downstream needs less.

        Which convolutions are full depends on what stands above them alone, and the fewest rows
        of an operator only grow with further consumers.
        """
        makeup = self._makeup(mask)
        if makeup.rateless:
            return _HOPELESS
        tiles = None if makeup.sinks & (makeup.sinks - 1) else self._tiles(mask)
        if tiles is None:
            starts = self._hold(mask, self._demand.least(mask, makeup.sinks))
        else:
            starts = tiles.full, tiles.partial
        return min(start.need for start in starts)

    def passes(self, mask: int, buffer_bytes: int, least: bool = False) -> int:
        """``T`` of a valid group: its weights are read once per tile if they find no room.

        ``least``: that of the start with the fewest, whichever is kept.
        """
        tiles = self._tiles(mask)
        assert tiles is not None, "only valid groups are run"
        weights = self._makeup(mask).weights
        if not least:
            return tiles.passes(tiles.better(buffer_bytes), weights, buffer_bytes)
        starts = (start for start in (tiles.full, tiles.partial) if start.need < buffer_bytes)
        return min(tiles.passes(start, weights, buffer_bytes) for start in starts)

    def fewest_passes(self, mask: int, buffer_bytes: int, part: int = 0) -> int:
        """Weights beyond the buffer are read once per tile, and a tile holds one bufferful.

        All tiles together hold the rows that the sinks need in the end (docs/exact-search.md).
        """
        makeup = self._makeup(mask, part)
        if makeup.weights <= buffer_bytes:
            return 1
        return max(
            1,
            min(-(-c.maps // (buffer_bytes + c.short)) for c in (makeup.full, makeup.partial)),
        )

    def dram(self, mask: int, buffer_bytes: int) -> Dram:
        """``F_D`` of a valid group: the weights are read once per pass."""
        reads, writes = boundary(self.graph, mask)
        tensors = self.graph.tensors
        read = sum(tensors[name].elements for name in reads) * self.activation_bytes
        write = sum(tensors[name].elements for name in writes) * self.activation_bytes
        return Dram(read, write, self._makeup(mask).weights * self.passes(mask, buffer_bytes))

    def terms(self, mask: int, buffer_bytes: int) -> tuple[CostTerm, ...]:
        """What is held: rows of convolutions' outputs and of outside inputs; sums to ``F_b``."""
        tiles, makeup = self._tiles(mask), self._makeup(mask)
        found = self._demand.of(mask, makeup.sinks)
        if tiles is None or found is None:
            return ()
        is_full = tiles.better(buffer_bytes) is tiles.full
        full = (makeup.full if is_full else makeup.partial).full
        terms = []
        for i in bits(mask & ~self._local):
            kind, row = ("full", self._row_full) if full >> i & 1 else ("partial", self._row_some)
            terms.append(CostTerm(kind, self._out[i].name, found.rows[i], row[i]))
        inputs = self._inputs(makeup.first & (self._local if is_full else mask), found)
        terms += [
            CostTerm("input", name, count, self._row_bytes(name))
            for name, (count, _) in inputs.items()
        ]
        return tuple(terms)

    def _tiles(self, mask: int) -> _Tiles | None:
        """Both starts of a group and its tile lines, remembered; ``None`` without a rate."""
        if mask in self._known:
            return self._known[mask]
        makeup = self._makeup(mask)
        found = None if makeup.rateless else self._demand.of(mask, makeup.sinks)
        tiles = None if found is None else _Tiles(*self._hold(mask, found), found.lines)
        return remember(self._known, mask, tiles)

    def _makeup(self, mask: int, part: int = 0) -> _Makeup:
        """The makeup of a group; ``part`` of it depends on nothing else of it."""
        found = self._makeups.get(mask)
        if found is not None:
            return found
        base = self._makeups.get(part)
        if base is None:
            base, part = _NOTHING, 0
        first, sinks, rateless, full, partial, weights = base
        added = mask & ~part
        for i in bits(added):
            before = self.graph.makers[i] & mask
            if not before:
                first |= 1 << i
            sinks = sinks & ~before | 1 << i
            rateless = rateless or bool(self._demand.rateless[i] & mask)
            weights += self.weights[i]
        full = self._follow(full, mask, added, first_full=True)
        partial = self._follow(partial, mask, added, first_full=False)
        found = _Makeup(first, sinks, rateless, full, partial, weights)
        return remember(self._makeups, mask, found)

    def _follow(self, course: _Course, mask: int, added: int, first_full: bool) -> _Course:
        """How a course goes on when ``added`` has joined and made the group ``mask``."""
        full, maps, short, whole = course
        for i in bits(added):
            before = self.graph.makers[i] & mask
            local = bool(self._local >> i & 1)
            # A local operator is as full as what it follows; a convolution alternates.
            is_full = bool(full & before) == local if before else first_full
            if is_full:
                full |= 1 << i
            if not local:
                row = self._row_full[i] if is_full else self._row_some[i]
                maps += self._demand.in_all[i] * row
                short += self._demand.short[i] * row
                whole += self._out[i].rows * row
            if not before and (local or not first_full):
                whole += self._input_bytes[i]
        return _Course(full, maps, short, whole)

    # -- bytes ----------------------------------------------------------------------------

    def _hold(self, mask: int, found: Rows) -> tuple[_Start, _Start]:
        """What the two starts hold, full and partial."""
        makeup, held = self._makeup(mask), found.held
        full, partial = makeup.full.full, makeup.partial.full
        need_a = need_b = line_a = line_b = 0
        left = mask & ~self._local
        while left:
            low = left & -left
            left ^= low
            whole, some, further, further_some = held[low.bit_length() - 1]
            if full & low:
                need_a += whole
                line_a += further
            else:
                need_a += some
                line_a += further_some
            if partial & low:
                need_b += whole
                line_b += further
            else:
                need_b += some
                line_b += further_some
        # A local operator that is first streams its input, a partial convolution needs all of it.
        for name, (count, further) in self._inputs(makeup.first & self._local, found).items():
            need_a += count * self._row_bytes(name)
            line_a += further * self._row_bytes(name)
        for name, (count, further) in self._inputs(makeup.first, found).items():
            need_b += count * self._row_bytes(name)
            line_b += further * self._row_bytes(name)
        return _Start(need_a, line_a), _Start(need_b, line_b)

    def _row_bytes(self, name: str) -> int:
        source = self.graph.tensors[name]
        return source.elements // source.rows * self.activation_bytes

    def _inputs(self, holders: int, found: Rows) -> dict[str, tuple[int, int]]:
        """Rows held of the outside inputs of some first operators, and per further tile line."""
        inputs: dict[str, tuple[int, int]] = {}
        for i in bits(holders):
            count, rate = found.rows[i], found.rates[i]
            for operand in self._demand.operands[i]:
                name = operand.read.tensor
                further = math.ceil(rate)
                if operand.read.window.kind is WindowKind.REDUCE:
                    held = 1
                elif self._local >> i & 1:
                    held = count
                else:
                    held = self._demand.input_rows(operand, count)
                    further = math.ceil(rate * (operand.stride or 1))
                known = inputs.get(name, (0, 0))
                inputs[name] = max(known[0], held), max(known[1], further)
        return inputs


def _channels(tensor: Tensor) -> int:
    return tensor.elements // (tensor.rows * tensor.cols)


def _is_local(graph: OpGraph, position: int) -> bool:
    """Pooling, add, concat, elementwise, and depthwise convolution: channel by channel."""
    op = graph.ops[position]
    if not op.mixes_channels:
        return True
    source = graph.tensors[op.reads[0].tensor] if op.reads else graph.tensors[op.writes]
    return op.groups > 1 and op.groups == _channels(source)
