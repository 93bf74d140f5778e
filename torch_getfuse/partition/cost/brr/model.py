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

where ``m`` is the fewest rows of an operator that one tile line of the sinks needs. Each first
operator of a group is full or partial on its own (:mod:`.starts`); of the choices with
``F_min < B`` the one with the fewest passes is kept, then the one with the least ``F_min``.

An operator alone may instead be run with its weights in ``S`` slices that stay in turn, and its
input read ``S`` times; the order of loops that moves less is kept.

How this differs from Optimus: docs/method.md, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch_getfuse.ir import Op, OpGraph, WindowKind
from torch_getfuse.partition.cost.brr.rows import Demand, Held, Rows
from torch_getfuse.partition.cost.brr.starts import (
    NO_OPERATORS,
    Choice,
    Condition,
    Price,
    Starts,
    Sums,
    fewest_rows,
    met_members,
    pareto_front,
    whole_maps,
)
from torch_getfuse.partition.cost.scheme import (
    CostTerm,
    Dram,
    FusionScheme,
    Steps,
    TileRows,
    boundary,
    remember,
)
from torch_getfuse.partition.node_set import bits, mask_of
from torch_getfuse.widths import Width, packed

KAPPA = 32
_HOPELESS = 1 << 62
_JOINED, _HELD = 14, 8  # steps counted per operator that joins a known part, and per condition held
_SUNK, _LOWERED = 5, 8  # operators of which one sink of several counts a step; of a floor's
_ALIKE = 8
"""Of a group whose makeup is worked out, that of every so many members is kept, for others."""


class _Tiles(NamedTuple):
    """The ways to run a group in tiles.

    Attributes:
        choices: of its starts, as :func:`pareto_front` gives them.
        lines: tile lines of the sinks.
        weights: bytes.
        by_line: whether weights that do not stay are read for each line: with a recurrent operator,
            each step of which needs all of them.
    """

    choices: list[Choice]
    lines: int
    weights: int
    by_line: bool

    def best(self, buffer_bytes: int) -> tuple[Choice, int]:
        """The choice that is kept and its passes; the one with the least need where none fits."""
        found, fewest = self.choices[0], 0
        for choice in self.choices:
            if choice[0] < buffer_bytes:
                passes = self._passes(choice, buffer_bytes)
                if not fewest or passes < fewest:
                    found, fewest = choice, passes
        return found, fewest

    def _passes(self, choice: Choice, buffer_bytes: int) -> int:
        """How often the weights are read by a choice that fits."""
        need, line, _ = choice
        room = buffer_bytes - need
        if self.weights <= room:
            return 1
        if self.by_line:
            return self.lines
        further = room // line if line else self.lines
        return -(-self.lines // min(self.lines, further + 1))


class _Slices(NamedTuple):
    """An operator alone whose weights stay in slices, each while the whole input is read.

    Attributes:
        number: of slices.
        held: bytes beside a slice: the input rows of one output row, and that.
        weights: bytes of a slice.
        input: bytes of the input, read once.
    """

    number: int
    held: int
    weights: int
    input: int

    @property
    def reread(self) -> int:
        """Bytes of the input that are read again."""
        return (self.number - 1) * self.input


class _Makeup(NamedTuple):
    """What stays as it is, or only grows, when operators join a group downstream.

    Attributes:
        first, sinks: members without producers, and without consumers, in the group.
        rateless: whether a one-row tensor is read by a taller one inside.
        conditions: which members are full.
        weights: bytes.
    """

    first: int
    sinks: int
    rateless: bool
    conditions: tuple[Condition, ...]
    weights: int


_NO_MAKEUP = _Makeup(0, 0, False, NO_OPERATORS, 0)


class Brr(FusionScheme):
    """The BRR cost model of one graph.

    Args:
        graph: the operator graph.
        activation_bytes, weight_bytes: element widths in bytes; ``None``: as stored.
        kappa: output channels that a partial convolution holds.
    """

    name = "brr"
    additive = True
    merges_in_place = True
    # It can be full for the sake of what reads it, and lets that stream its other inputs.
    starts_in_place = True
    has_predictor = True
    has_cover = True
    steps = Steps(0, 0, 0, 0)  # for most of a group is known: see _JOINED

    def __init__(
        self,
        graph: OpGraph,
        activation_bytes: Width | None = 1,
        weight_bytes: Width | None = 1,
        kappa: int = KAPPA,
    ) -> None:
        super().__init__(graph, activation_bytes, weight_bytes)
        graph = self.graph
        self._row_bytes = graph.row_bytes
        self._out = [graph.tensors[op.writes] for op in graph.ops]
        self.local = mask_of(i for i in range(len(graph)) if _is_local(graph, i))
        # Bytes of one row of an operator's output: all channels, and kappa of them.
        self.row_full = [self._row_bytes[op.writes] for op in graph.ops]
        self.row_some = [self._some_channels(op, kappa) for op in graph.ops]
        stored = zip(self.row_full, self.row_some, strict=True)
        self.demand = demand = Demand(
            graph, [None if self.local >> i & 1 else pair for i, pair in enumerate(stored)]
        )
        heights = [out.rows for out in self._out]
        full, some = (
            [
                (needed * row, short * row, height * row)
                for needed, short, height, row in zip(
                    demand.in_all, demand.short, heights, rows, strict=True
                )
            ]
            for rows in (self.row_full, self.row_some)
        )
        self.tile_rows = self._tile_rows(full, some)
        inputs = [sum(graph.tensor_bytes[r.tensor] for r in op.reads) for op in graph.ops]
        self._starts = Starts(graph, self.local, full, some, inputs)
        # What follows an operator alone and leaves it one: it works on the output row in place.
        self.trailing = mask_of(
            i for i, over in enumerate(graph.overwrites) if over and not self.weights[i]
        )
        self._recurrent = mask_of(i for i, op in enumerate(graph.ops) if op.recurrent)
        self._makeups: dict[int, _Makeup] = {}
        self._known: dict[int, _Tiles | None] = {}

    def _some_channels(self, op: Op, kappa: int) -> int:
        """Bytes of a row of which a convolution holds ``kappa`` channels, as aligned as all."""
        out, channels = self.graph.tensors[op.writes], self.graph.channels(op)
        if kappa >= channels:
            return self._row_bytes[out.name]
        align = 1 if out.channel_axis is None else self.graph.align_channels
        held = out.elements // (out.rows * channels) * (-(-kappa // align) * align)
        return min(self._row_bytes[out.name], packed(held, self.graph.width(out.name)))

    def _tile_rows(self, full: Sequence[Sums], some: Sequence[Sums]) -> TileRows:
        """What tiles hold if every convolution is partial, and more for those that cannot both be.

        Of two convolutions of which one reads nothing but the other, if through local operators,
        one is full.
        """
        local, count = self.local, len(self.graph)
        least = [0 if local >> i & 1 else min(full[i][0], some[i][0]) for i in range(count)]
        short = [0 if local >> i & 1 else max(full[i][1], some[i][1]) for i in range(count)]
        pairs = []
        fed: list[int | None] = []  # the convolution that an operator reads, and nothing else
        for i, op in enumerate(self.graph.ops):
            before = self.graph.makers[i]
            above = before.bit_length() - 1 if len(op.reads) == 1 and before else None
            if above is not None and local >> above & 1:
                above = fed[above]
            fed.append(above)
            if above is not None and not local >> i & 1:
                more = min(full[above][0] - least[above], full[i][0] - least[i])
                pairs.append((above, i, more))
        chosen: list[tuple[int, int, int]] = []
        taken: set[int] = set()
        for above, i, more in sorted(pairs, key=lambda pair: -pair[2]):
            if more > 0 and not taken & {above, i}:
                taken |= {above, i}
                chosen.append((above, i, more))
        return TileRows(least, short, chosen)

    # -- the two figures ------------------------------------------------------------------

    def buffer(self, mask: int, buffer_bytes: int) -> int | None:
        """``F_b`` in bytes; ``None`` for a group whose operators have no common rate."""
        tiles = self._tiles(mask)
        if tiles is None:
            return None
        (need, _, _), passes = tiles.best(buffer_bytes)
        slices = self._kept_slices(mask, passes, buffer_bytes)
        return need if slices is None else slices.held + slices.weights

    def hopeless(self, mask: int, buffer_bytes: int, part: int = 0) -> bool:
        """Whether the floor alone needs the buffer; it does not where the whole maps fit."""
        makeup = self._makeup(mask, part)
        if not makeup.rateless:
            conditions = makeup.conditions
            for full in (True, False):
                if whole_maps(conditions, full) < buffer_bytes:
                    return False
        return self.floor(mask) >= buffer_bytes

    def floor(self, mask: int) -> int:
        """``F_min`` if the sinks needed one row each: no group grown downstream needs less.

        Which convolutions are full depends on the starts above them alone, these can still be
        chosen as they could, and the fewest rows of an operator only grow with further consumers.
        """
        makeup = self._makeup(mask)
        if makeup.rateless:
            return _HOPELESS
        tiles = None if makeup.sinks & (makeup.sinks - 1) else self._tiles(mask)
        if tiles is not None:
            return tiles.choices[0][0]
        self.extra_steps += mask.bit_count() * (makeup.sinks.bit_count() + 2) // _LOWERED
        return self._hold(makeup, self.demand.least(mask, makeup.sinks))[0][0]

    def reread(self, mask: int, buffer_bytes: int) -> int:
        """Bytes that a valid group reads again: its weights per tile, or its input per slice."""
        passes = self._valid_passes(mask, buffer_bytes)
        slices = self._kept_slices(mask, passes, buffer_bytes)
        return self._makeup(mask).weights * (passes - 1) if slices is None else slices.reread

    def least_reread(self, mask: int, buffer_bytes: int, part: int = 0) -> int:
        """Weights beyond the buffer are read once per tile, and a tile holds one bufferful.

        All tiles together hold the rows that the sinks need in the end (docs/exact-search.md).
        """
        makeup = self._makeup(mask, part)
        if makeup.weights <= buffer_bytes:
            return 0
        needed, short = fewest_rows(makeup.conditions)
        passes = -(-needed // (buffer_bytes + short))
        if passes <= 1:
            return 0
        found = (passes - 1) * makeup.weights
        slices = self._slices(mask, buffer_bytes)
        return found if slices is None else min(found, slices.reread)

    def dram(self, mask: int, buffer_bytes: int) -> Dram:
        """``F_D`` of a valid group: the weights are read once per pass."""
        reads, writes = boundary(self.graph, mask)
        size = self.graph.tensor_bytes
        read, write = sum(size[name] for name in reads), sum(size[name] for name in writes)
        weights = self._makeup(mask).weights
        passes = self._valid_passes(mask, buffer_bytes)
        slices = self._kept_slices(mask, passes, buffer_bytes)
        if slices is None:
            return Dram(read, write, weights * passes)
        return Dram(read * slices.number, write, weights)

    def terms(self, mask: int, buffer_bytes: int) -> tuple[CostTerm, ...]:
        """What is held: rows of convolutions' outputs and of outside inputs; sums to ``F_b``.

        An operator alone in slices: rows of its input, one of its output, and a slice.
        """
        tiles, makeup = self._tiles(mask), self._makeup(mask)
        found = self.demand.of(mask, makeup.sinks)
        if tiles is None or found is None:
            return ()
        (_, _, starts), passes = tiles.best(buffer_bytes)
        slices = self._kept_slices(mask, passes, buffer_bytes)
        if slices is not None:
            op = self.graph.ops[makeup.first.bit_length() - 1]
            return (
                CostTerm("weights", op.name, slices.weights, 1),
                CostTerm("full", op.name, 1, self.row_full[makeup.first.bit_length() - 1]),
                *self._input_terms(self._input_rows(makeup.first)),
            )
        terms = []
        full = met_members(makeup.conditions, starts)
        for i in bits(mask & ~self.local):
            kind, row = ("full", self.row_full) if full >> i & 1 else ("partial", self.row_some)
            terms.append(CostTerm(kind, self._out[i].name, found.rows[i], row[i]))
        inputs: dict[str, int] = {}
        for i in bits(makeup.first & (self.local | ~starts)):
            for name, count, _ in self._inputs(i, found):
                inputs[name] = max(inputs.get(name, 0), count)
        return (*terms, *self._input_terms(inputs))

    def _input_terms(self, rows: Mapping[str, int]) -> list[CostTerm]:
        return [CostTerm("input", name, n, self._row_bytes[name]) for name, n in rows.items()]

    # -- tiles ----------------------------------------------------------------------------

    def _tiles(self, mask: int) -> _Tiles | None:
        """The ways to run a group in tiles, remembered; ``None`` without a common rate."""
        if mask in self._known:
            return self._known[mask]
        makeup = self._makeup(mask)
        found = None if makeup.rateless else self.demand.of(mask, makeup.sinks)
        if found is not None and makeup.sinks & (makeup.sinks - 1):
            self.extra_steps += mask.bit_count() * (makeup.sinks.bit_count() + 2) // _SUNK
        tiles = (
            None
            if found is None
            else _Tiles(
                self._hold(makeup, found),
                found.lines,
                makeup.weights,
                bool(mask & self._recurrent),
            )
        )
        return remember(self._known, mask, tiles)

    def _valid_passes(self, mask: int, buffer_bytes: int) -> int:
        tiles = self._tiles(mask)
        assert tiles is not None, "only valid groups are run"
        return tiles.best(buffer_bytes)[1]

    def _makeup(self, mask: int, part: int = 0) -> _Makeup:
        """The makeup of a group; ``part`` of it depends on nothing else of it.

        Without a part, the longest known one of its first operators is taken: groups that begin
        alike are asked for together.
        """
        found = self._makeups.get(mask)
        if found is not None:
            return found
        base = self._makeups.get(part)
        if base is None:
            base, part = self._first_members(mask)
        while True:
            added = _lowest(mask & ~part, _ALIKE)
            base = self._join(base, part | added, added)
            part |= added
            remember(self._makeups, part, base)
            if part == mask:
                return base

    def _first_members(self, mask: int) -> tuple[_Makeup, int]:
        """The longest part that is known of those which end before some member."""
        part = mask
        while part:
            part ^= 1 << part.bit_length() - 1
            found = self._makeups.get(part)
            if found is not None:
                return found, part
        return _NO_MAKEUP, 0

    def _join(self, base: _Makeup, mask: int, added: int) -> _Makeup:
        """The makeup of the group ``mask``, which ``added`` made of one that has this makeup."""
        first, sinks, rateless, conditions, weights = base
        self.extra_steps += _JOINED * added.bit_count()
        for i in bits(added):
            before = self.graph.makers[i] & mask
            if not before:
                first |= 1 << i
            sinks = sinks & ~before | 1 << i
            rateless = rateless or bool(self.demand.rateless[i] & mask)
            weights += self.weights[i]
        conditions = self._starts.join(conditions, mask, added)
        return _Makeup(first, sinks, rateless, conditions, weights)

    # -- bytes ----------------------------------------------------------------------------

    def _hold(self, makeup: _Makeup, found: Rows) -> list[Choice]:
        """What the choices of starts hold."""
        self.extra_steps += _HELD * len(makeup.conditions)
        stored = ~self.local
        sources, firsts, prices = [], [], []
        for condition in makeup.conditions:
            whole, some, further, further_some = _sums(found.held, condition.same & stored)
            other, other_some, beyond, beyond_some = _sums(found.held, condition.other & stored)
            sources.append(condition.sources)
            firsts.append(condition.first)
            prices.append(
                [whole + other_some, further + beyond_some, some + other, further_some + beyond]
            )
        for shared, price in self._add_inputs(firsts, prices, found).items():
            sources.append(shared)
            firsts.append(0)
            prices.append(price)
        return pareto_front(sources, firsts, prices)

    def _add_inputs(
        self, firsts: Sequence[int], prices: list[Price], found: Rows
    ) -> dict[tuple[int, ...], Price]:
        """Add what first operators hold of tensors from outside, of one that several read once.

        A local operator streams its input and holds its window's rows, a convolution that is
        partial needs all of its channels too.

        Returns:
            Further conditions, by their sources, with their prices: that one of several
            convolutions is partial.
        """
        holders: dict[str, list[tuple[int, int, int]]] = {}  # condition, rows, further rows
        for k, first in enumerate(firsts):
            if first:
                for name, rows, further in self._inputs(first.bit_length() - 1, found):
                    holders.setdefault(name, []).append((k, rows, further))
        shared: dict[tuple[int, ...], Price] = {}
        for name, some in holders.items():
            row = self._row_bytes[name]
            if len(some) == 1:
                k, rows, further = some[0]
                # What is held in any case counts with condition 0.
                price, at = (prices[0], 0) if firsts[k] & self.local else (prices[k], 2)
                price[at] += rows * row
                price[at + 1] += further * row
                continue
            local = [pair for k, *pair in some if firsts[k] & self.local]
            partial = [(2 * k + 1, pair) for k, *pair in some if not firsts[k] & self.local]
            for side in (0, 1):
                always = max((pair[side] for pair in local), default=0)
                prices[0][side] += always * row
                partial.sort(key=lambda holder: -holder[1][side])
                steps = [max(pair[side], always) for _, pair in partial] + [always]
                # Each row that some of them need is held if one of these is partial.
                for n in range(len(partial)):
                    more = (steps[n] - steps[n + 1]) * row
                    sources = tuple(sorted(literal for literal, _ in partial[: n + 1]))
                    if more and n:
                        shared.setdefault(sources, [0, 0, 0, 0])[side] += more
                    elif more:
                        prices[sources[0] >> 1][2 + side] += more
        return shared

    def _inputs(self, i: int, found: Rows) -> list[tuple[str, int, int]]:
        """Rows held of each tensor that a first operator reads, and per further tile line."""
        count, rate = found.rows[i], found.rates[i]
        inputs = []
        for operand in self.demand.operands[i]:
            if operand.read.window.kind is WindowKind.REDUCE:
                held, further = 1, math.ceil(rate)
            else:
                held = self.demand.input_rows(operand, count)
                further = math.ceil(rate * (operand.stride or 1))
            inputs.append((operand.read.tensor, held, further))
        if len(inputs) > 1 and len({name for name, _, _ in inputs}) < len(inputs):
            return [
                (
                    name,
                    max(rows for other, rows, _ in inputs if other == name),
                    max(further for other, _, further in inputs if other == name),
                )
                for name in dict.fromkeys(name for name, _, _ in inputs)
            ]
        return inputs

    # -- an operator alone ----------------------------------------------------------------

    def _kept_slices(self, mask: int, passes: int, buffer_bytes: int) -> _Slices | None:
        """The slices of an operator alone, if they move less than so many passes."""
        if passes <= 1:
            return None
        slices = self._slices(mask, buffer_bytes)
        if slices is None or slices.reread >= self._makeup(mask).weights * (passes - 1):
            return None
        return slices

    def _slices(self, mask: int, buffer_bytes: int) -> _Slices | None:
        """The fewest slices that fit; ``None`` for several operators, or if none is of use."""
        first = mask & -mask
        if mask & ~first & ~self.trailing or self._makeup(mask).first != first:
            return None
        i = first.bit_length() - 1
        if self.graph.ops[i].recurrent:
            return None  # each of its steps needs all of its weights
        inputs = self._input_rows(first)
        held = self.row_full[i] + sum(n * self._row_bytes[name] for name, n in inputs.items())
        room = buffer_bytes - held - 1
        if room < 1 or not self.weights[i]:
            return None
        count = -(-self.weights[i] // room)
        read = sum(self.graph.tensor_bytes[name] for name in inputs)
        return _Slices(count, held, -(-self.weights[i] // count), read)

    def _input_rows(self, first: int) -> dict[str, int]:
        """Rows of what an operator reads that one row of its output needs."""
        i = first.bit_length() - 1
        alone = Rows({i: 1}, {i: 0}, {}, 0)
        return {name: rows for name, rows, _ in self._inputs(i, alone)}


def _lowest(mask: int, count: int) -> int:
    """The first ``count`` members of a set."""
    found = 0
    while mask and count:
        low = mask & -mask
        mask ^= low
        found |= low
        count -= 1
    return found


def _sums(held: Mapping[int, Held], mask: int) -> Held:
    """What operators hold together (:attr:`Rows.held`)."""
    whole = some = further = further_some = 0
    while mask:
        low = mask & -mask
        mask ^= low
        one = held[low.bit_length() - 1]
        whole += one[0]
        some += one[1]
        further += one[2]
        further_some += one[3]
    return whole, some, further, further_some


def _is_local(graph: OpGraph, position: int) -> bool:
    """Pooling, add, concat, elementwise, and depthwise convolution: channel by channel."""
    op = graph.ops[position]
    if not op.mixes_channels:
        return True
    source = graph.tensors[op.reads[0].tensor] if op.reads else graph.tensors[op.writes]
    axis, rank = graph.channel_axis(op), len(graph.tensors[op.writes].shape)
    if axis is None or len(source.shape) != rank:
        return op.groups > 1 and op.groups == source.elements // (source.rows * source.cols)
    return op.groups > 1 and op.groups == source.shape[axis]
