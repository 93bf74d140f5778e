"""The automaton of BRR: all sets of blocks of which a way to run in tiles may fit the buffer.

The blocks are decided from the last to the first, each after its readers. So what a set asks of a
tensor is known when its maker is decided: how many rows, at what rate, and whether the maker must
be full, or must not.

A set is several paths. Its weights stay, or are read in so many passes at least and at most
(:class:`Passes`), which is decided first: it says what weights cost, and how many lines a tile has.
A convolution joins as full or as partial. And the sinks are alike, with so many lines, or of
several strides. A path says what one way to run the set holds at least, and what it moves.
``docs/exact-search.md`` section 5 has the proofs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from torch_getfuse.errors import OptionError
from torch_getfuse.partition.cost.brr.model import Brr
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.wide.automaton import (
    NO_BLOCK,
    Automaton,
    Join,
    Layer,
    fewer_states,
)
from torch_getfuse.partition.wide.tile_blocks import TileBlock, TileSkeleton
from torch_getfuse.partition.wide.tile_sets import (
    ABOVE,
    ALIKE,
    DIFFER,
    FULL,
    INSIDE,
    OUTSIDE,
    PARTIAL,
    READ,
    SPILLED,
    TO_DIFFER,
    UNEVEN,
    Bytes,
    Ints,
    OpenRows,
    TileSets,
    distinct_sets,
)
from torch_getfuse.partition.work import Work

Flags = npt.NDArray[np.bool_]

FIRST = -1  # in place of a tensor whose maker is full: the block starts a group

MOST_FULL = 4  # tensors that a block reads of which one is said to have a full maker

MOST_STATES = 1_500_000

_EARLY, _AHEAD = 1 / 8, 1.4
"""Shares of the states that may be made at first, and over that of the blocks that are decided."""

_BLOCK = 300  # steps counted per block
_CELLS = 20  # entries of the table of states per further step
_MOST_PACES = 200  # rates over what the cumulative stride says, which are told apart


class Passes(NamedTuple):
    """How often a group reads its weights.

    Attributes:
        least, most: passes; 0 for any number.
        stay: whether the weights stay in the buffer.
    """

    least: int
    most: int
    stay: bool = False


def some_passes(bounds: Sequence[int]) -> tuple[Passes, ...]:
    """Weights that stay, and passes from each of the bounds, ascending from 1, to the next."""
    ends = [bound - 1 for bound in bounds[1:]] + [0]
    return Passes(1, 0, True), *map(Passes, bounds, ends)


class _Sinks(NamedTuple):
    """Sinks of a set that are alike: their cumulative stride, and tile lines at most."""

    common: Fraction
    lines: int


class _Way(NamedTuple):
    """How a block joins.

    Attributes:
        full: whether it is a full convolution.
        sinks: if it is the first to join and sinks are alike.
        others: whether it may also join where it is not the first, or sinks are not alike.
        source: of several tensors that it reads, one whose maker is full, or :data:`FIRST`;
            ``None`` where that does not matter.
    """

    full: bool
    sinks: _Sinks
    others: bool
    source: int | None


def tile_automaton(
    problem: FusionProblem, passes: Sequence[Passes], most: int = MOST_STATES
) -> Automaton | None:
    """The automaton of a BRR problem; ``None`` for more than ``most`` states.

    Blocks alone, and those that may run in slices, are not among its sets.

    Raises:
        OptionError: for a scheme other than BRR.
        OutOfWork: if a limit on work is reached.
    """
    scheme, work = problem.evaluator.scheme, problem.evaluator.work
    if not isinstance(scheme, Brr):
        raise OptionError(f"no tiles in scheme {scheme.name!r}; there are in 'brr'")
    skeleton = TileSkeleton.of(problem, scheme)
    limit = problem.evaluator.buffer_bytes + 1  # a tile may fill the buffer to the last byte
    layers = _Builder(skeleton, passes, limit).layers(work, most)
    if layers is None:
        return None
    return Automaton(
        problem, skeleton, fewer_states(layers, limit, work), limit, _alone(problem, scheme)
    )


def _alone(problem: FusionProblem, scheme: Brr) -> tuple[int, ...]:
    """Single blocks, and blocks with those that work in place on what they write."""
    home = {i: block for block in problem.blocks for i in bits(block)}
    found = []
    for block in problem.blocks:
        group = after = block
        weighted = scheme.weights[(block & -block).bit_length() - 1]
        while after:
            found.append(group)
            readers = scheme.graph.readers[group.bit_length() - 1]
            after = home.get(readers.bit_length() - 1, 0) if weighted else 0
            if after & ~scheme.trailing:
                break
            group |= after
    return tuple(found)


class _Builder:
    """The forward pass: states that sets reach within the buffer, and the steps between them."""

    def __init__(self, skeleton: TileSkeleton, passes: Sequence[Passes], limit: int) -> None:
        self.skeleton = skeleton
        self.limit = limit
        self.least = np.array([one.least for one in passes])
        self.most = np.array([one.most for one in passes])
        self.stay = np.array([one.stay for one in passes])
        self.paces: dict[Fraction, int] = {Fraction(0): 0, Fraction(1): 1}
        self.sinks: dict[_Sinks, int] = {_Sinks(Fraction(1), 1): 0}
        # Undecided blocks by cumulative stride and height, which tell all that sinks have.
        self.undecided = Counter((block.cumulative, block.height) for block in skeleton.blocks)
        self.streams = OpenRows[int]("state", "rows", "pace")
        self.readings = OpenRows[tuple[int, int]]("part")  # stream and its reader
        # Per block what it holds if it starts a group, of a tensor if others may hold it; and what
        # is held of such a tensor.
        self.kept = OpenRows[tuple[int, str]]("holds")
        self.held = OpenRows[str]("held")
        self.waiting: dict[int, set[int]] = {}  # per block that may hold rows: makers undecided
        self.unsettled: dict[str, set[int]] = {}  # per shared tensor: blocks that may still hold it

    def layers(self, work: Work, most: int) -> list[Layer] | None:
        """All layers; ``None`` with more than ``most`` states."""
        skeleton = self.skeleton
        strides = {stride for stride, _ in self.undecided}
        differ = (ALIKE,) if len(strides) == 1 else (ALIKE, TO_DIFFER)
        sets = TileSets.empty(len(self.least), differ)
        left = [set(stream.blocks) for stream in skeleton.streams]
        states, layers = 0, []
        for decided, number in enumerate(skeleton.order):
            states += len(sets)
            if len(self.paces) > _MOST_PACES or states > most * max(
                _EARLY, min(1, (decided + 1) / len(skeleton.order) * _AHEAD)
            ):
                return None
            block = skeleton.blocks[number] if number < len(skeleton.blocks) else None
            self._open(sets, number, block, left)
            cells = sum(len(getattr(sets, table)) for table in sets.TABLES)
            after = [self._leave(sets, number)]
            if block is not None:
                after += [self._join(sets, number, block, way) for way in self._ways(block)]
            work.add(_BLOCK * len(after) + sum(cells * len(at) for _, at in after) // _CELLS)
            ended = [
                (some.room + self._pending(some), ~(some.state & INSIDE > 0).any(axis=0))
                for some, _ in after[1:]
            ]
            several = TileSets.joined([some for some, _ in after])
            self._close(several, number, left)
            kept, state = distinct_sets(several)
            steps = []
            end = 0
            for some, at in after:
                begin, end = end, end + len(at)
                to, room = np.full(len(sets), -1, np.int64), np.zeros(len(sets), np.int64)
                to[at], room[at] = state[begin:end], some.room - sets.room[at]
                steps.append((to, room))
            joins = []
            for (some, at), (last_room, complete), (to, room) in zip(
                after[1:], ended, steps[1:], strict=True
            ):
                cost, last, ends = np.zeros((3, len(sets)), np.int64)
                cost[at], last[at] = some.cost, last_room - sets.room[at]
                # A block alone is priced apart.
                ends[at] = (some.parts == 1) & (sets.parts[at] > 0) & (some.differ != TO_DIFFER)
                ends[at] &= complete
                joins.append(Join(to, ends > 0, cost, room, last))
            if block is not None:
                self.undecided[block.cumulative, block.height] -= 1
            layers.append(Layer(NO_BLOCK if block is None else number, *steps[0], tuple(joins)))
            sets = several.take(kept)
        return layers

    def _open(
        self, sets: TileSets, number: int, block: TileBlock | None, left: Sequence[set[int]]
    ) -> None:
        """Rows of the tables for what the block touches."""
        for stream in self.skeleton.touches[number]:
            left[stream].discard(number)
            self.streams.open(sets, stream)
        for waiting in self.waiting.values():
            waiting.discard(number)
        if block is None:
            return
        for stream in block.sources:
            self.readings.open(sets, (stream, number))
        if block.makers:
            self.waiting[number] = set(block.makers)
            for hold in block.holds:
                self.kept.open(sets, (number, hold.tensor if hold.shared else ""))
        for hold in block.holds:
            if hold.shared:
                self.held.open(sets, hold.tensor)
                self.unsettled.setdefault(hold.tensor, set(self.skeleton.holders[hold.tensor]))

    def _close(self, sets: TileSets, number: int, left: Sequence[set[int]]) -> None:
        """Erase what does not affect later blocks, so that more sets share a state."""
        streams = self.skeleton.streams
        for stream in self.skeleton.touches[number]:
            if streams[stream].maker == number or not left[stream]:
                self.streams.close(sets, stream)
            elif streams[stream].forced:
                sets.state[self.streams.at[stream]] &= ~np.uint8(SPILLED)
            elif not streams[stream].inside:
                sets.state[self.streams.at[stream]] &= np.uint8(READ | ABOVE)
        for key in [key for key in self.readings.at if streams[key[0]].maker == number]:
            self.readings.close(sets, key)
        settled = [block for block, waiting in self.waiting.items() if not waiting]
        if number not in self.waiting:
            settled.append(number)
        for block in settled:
            self.waiting.pop(block, None)
            for kept in [key for key in self.kept.at if key[0] == block]:
                self.kept.close(sets, kept)
            for unsettled in self.unsettled.values():
                unsettled.discard(block)
        for tensor in [tensor for tensor, some in self.unsettled.items() if not some]:
            del self.unsettled[tensor]
            self.held.close(sets, tensor)

    # -- what a set holds if it starts with a block ----------------------------------------

    def _kept_for(self, number: int) -> Iterator[tuple[int, int, str]]:
        """What waits for the decision on ``number``: row, block, and tensor if it is shared."""
        for (block, tensor), row in self.kept.at.items():
            if number in self.skeleton.blocks[block].makers:
                yield row, block, tensor

    def _hold(self, sets: TileSets, held: Ints, tensor: str) -> None:
        """Hold bytes of a tensor, of one that several blocks hold as much as most of them."""
        more = held
        if tensor:
            row = self.held.at[tensor]
            more = (held - sets.held[row]).clip(0)
            sets.held[row] += more
        sets.room = sets.room + more

    def _pending(self, sets: TileSets) -> Ints:
        """Bytes of tensors that blocks hold whose makers all stay out."""
        room = np.zeros(len(sets), np.int64)
        most: dict[str, Ints] = {}
        for (_, tensor), row in self.kept.at.items():
            if tensor:
                most[tensor] = np.maximum(most.get(tensor, 0), sets.holds[row])
            else:
                room += sets.holds[row]
        for tensor, bytes_ in most.items():
            room += (bytes_ - sets.held[self.held.at[tensor]]).clip(0)
        return room

    # -- decisions ---------------------------------------------------------------------------

    def _leave(self, sets: TileSets, number: int) -> tuple[TileSets, Ints]:
        """The sets that a block stays out of, and the states they come from."""
        streams = self.skeleton.streams
        feeds = np.zeros(len(sets), bool)
        can = np.ones(len(sets), bool)
        for stream in self.skeleton.touches[number]:
            if streams[stream].maker == number:
                flags = sets.state[self.streams.at[stream]]
                feeds |= flags & (READ | ABOVE) > 0
                can &= flags & INSIDE == 0
        (keep,) = np.nonzero(can)
        changed, feeds = sets.take(keep), feeds[keep]
        for stream in self.skeleton.touches[number]:
            if streams[stream].maker != number:
                added = np.where(feeds, SPILLED | ABOVE, SPILLED).astype(np.uint8)
                changed.state[self.streams.at[stream]] |= added
        for row, block, tensor in self._kept_for(number):
            if not self.waiting[block]:
                self._hold(changed, changed.holds[row], tensor)
        changed.cost = np.zeros(len(keep), np.int64)
        return _fitting(changed, keep, changed.room < self.limit)

    def _ways(self, block: TileBlock) -> Iterator[_Way]:
        """The ways in which a block may join."""
        several = _asked_together(block)
        for k, sinks in enumerate(self._sinks_with(block)):
            if block.stores:
                yield _Way(True, sinks, not k, None)
            if not (block.stores and several):
                yield _Way(False, sinks, not k, None)
            # A sink is asked for nothing.
            if several and (block.stores or not k):
                for source in (*several, FIRST):
                    yield _Way(False, sinks, not k, source)

    def _sinks_with(self, block: TileBlock) -> Iterator[_Sinks]:
        """The sinks of sets that a block is the first to join; first, if it is the only one."""
        heights = {
            height
            for (stride, height), count in self.undecided.items()
            if count and stride == block.cumulative and height >= block.height
        }
        for lines in sorted(heights):
            yield _Sinks(block.cumulative, lines)

    def _join(
        self, sets: TileSets, number: int, block: TileBlock, way: _Way
    ) -> tuple[TileSets, Ints]:
        """The sets that a block joins in a way, and the states they come from.

        Their cost assumes that no further block joins.
        """
        (keep,) = np.nonzero(self._can_join(sets, block, way))
        changed = sets.take(keep)
        flags = np.zeros(len(keep), np.uint8)
        rows, pace = np.ones(len(keep), np.int64), np.ones(len(keep), np.int64)
        cost = self.least[changed.passes] * block.weights + block.traffic
        if block.out >= 0:
            stream, at = self.skeleton.streams[block.out], self.streams.at[block.out]
            flags = changed.state[at].copy()
            changed.state[at] = 0
            rows, pace = np.maximum(rows, changed.rows[at]), np.maximum(pace, changed.pace[at])
            # No longer read from outside; and written if someone else reads it.
            spilled = flags & SPILLED > 0
            cost += stream.size * ((spilled | stream.forced).astype(np.int64) - (flags & READ > 0))
        fits = self._take_sinks(changed, block, flags & READ == 0, way)
        changed.room = changed.room + np.where(self.stay[changed.passes], block.weights, 0)
        tile = _Tile(self, changed, block, pace)
        if block.stores:
            row = block.full if way.full else block.partial
            changed.room += tile.held(row, rows, Fraction(1), block.needed, block.short)
        for row, _, _ in self._kept_for(number):
            changed.holds[row] = 0  # its readers do not start the group
        if not way.full:
            self._start(changed, number, block, tile, rows)
        self._ask(changed, block, way, flags, rows, pace, cost)
        self._connect(changed, number, block)
        return _fitting(changed, keep, fits & (changed.room < self.limit))

    def _can_join(self, sets: TileSets, block: TileBlock, way: _Way) -> Flags:
        """The sets whose readers of the block allow it to join so."""
        full, _, others, source = way
        can = np.full(len(sets), True)
        if not others:
            can = (sets.parts == 0) & (sets.differ == ALIKE)
        if block.out >= 0:
            flags = sets.state[self.streams.at[block.out]]
            can &= flags & (ABOVE | UNEVEN | OUTSIDE) == 0
            can &= flags & (PARTIAL | FULL) != (PARTIAL | FULL)
            if full:
                can &= flags & PARTIAL == 0
            elif block.stores:
                can &= flags & FULL == 0
            if not block.stores and _asked_together(block):
                can &= (flags & FULL > 0) == (source is not None)
        elif not block.stores and source is not None:
            can[:] = False
        return can

    def _take_sinks(self, sets: TileSets, block: TileBlock, sink: Flags, way: _Way) -> Flags:
        """Note the block as a sink of some sets; whether these may have it."""
        known = self.sinks.setdefault(way.sinks, len(self.sinks))
        sets.sinks = np.where(sets.parts == 0, known, sets.sinks)
        alike = np.array([one.common == block.cumulative for one in self.sinks])[sets.sinks]
        tall = np.array([one.lines >= block.height for one in self.sinks])[sets.sinks]
        sets.differ = np.where(sink & ~alike & (sets.differ == TO_DIFFER), DIFFER, sets.differ)
        sets.sinks = np.where(sets.differ == DIFFER, 0, sets.sinks)
        may: Flags = ~(sink & (sets.differ == ALIKE)) | alike & tall
        return may

    def _start(
        self, sets: TileSets, number: int, block: TileBlock, tile: _Tile, rows: Ints
    ) -> None:
        """What the block holds if its makers all stay out; it waits for them."""
        held: dict[str, Ints] = {}
        shared: dict[str, bool] = {}
        for hold in block.holds:
            least = hold.rows[rows]
            count = tile.held(hold.row, least, hold.stride, hold.needed, hold.short)
            held[hold.tensor] = np.maximum(count, held.get(hold.tensor, 0))
            shared[hold.tensor] = hold.shared
        for tensor, count in held.items():
            name = tensor if shared[tensor] else ""
            if block.makers:
                sets.holds[self.kept.at[number, name]] += count
            else:
                self._hold(sets, count, name)

    def _ask(
        self,
        sets: TileSets,
        block: TileBlock,
        way: _Way,
        flags: Bytes,
        rows: Ints,
        pace: Ints,
        cost: Ints,
    ) -> None:
        """What the block asks of the tensors that it reads; and the cost of reading them."""
        full, _, _, source = way
        together = _asked_together(block)
        streams = self.skeleton.streams
        alone = len(block.sources) == 1
        wanted = flags & np.uint8(PARTIAL | FULL if alone else PARTIAL)
        for read in block.reads:
            stream, at = streams[read.stream], self.streams.at[read.stream]
            cost += np.where(sets.state[at] & READ, 0, stream.size)
            asked = np.full(len(sets), READ, np.uint8)
            if stream.inside:
                if not block.stores:
                    asked |= wanted
                elif full or alone:
                    asked |= np.uint8(PARTIAL if full else FULL)
                if source == read.stream:
                    asked |= np.uint8(FULL | INSIDE)
                elif source == FIRST and read.stream in together:
                    asked |= np.uint8(OUTSIDE)
                through = self._through(read.rate, pace)
                before = sets.pace[at]
                clash = (before > 0) & (through > 0) & (before != through) | (through < 0)
                uneven = clash | (sets.state[at] & UNEVEN > 0)
                asked |= np.where(uneven, UNEVEN, 0).astype(np.uint8)
                sets.pace[at] = np.where(uneven, 0, np.where(before > 0, before, through))
                more = np.maximum(sets.rows[at], read.rows[rows])
                sets.rows[at] = np.where(uneven, 1, more)
            sets.state[at] |= asked
        sets.cost = cost

    def _through(self, rate: Fraction | None, pace: Ints) -> Ints:
        """The numbers of the rates that a reading asks for; -1: it has none."""
        if rate is None:
            return np.full(len(pace), -1, np.int64)
        paces = list(self.paces)
        found = np.zeros(len(paces), np.int64)
        for k in np.flatnonzero(np.bincount(pace, minlength=1)).tolist():
            found[k] = self.paces.setdefault(paces[k] * rate, len(self.paces))
        return found[pace]

    def _connect(self, sets: TileSets, number: int, block: TileBlock) -> None:
        """Merge the parts of each set that the block is connected to.

        A part is numbered at the readings through which it can still grow.
        """
        fresh = np.uint8(255)
        merged = np.zeros(len(sets), np.int64)
        for (stream, _), at in self.readings.at.items():
            if stream == block.out:
                parts = sets.part[at].copy()
                has = (parts > 0) & (parts != fresh)
                if has.any():
                    sets.part[(sets.part == parts) & has] = fresh
                    merged += has
        for stream in block.sources:
            sets.part[self.readings.at[stream, number]] = fresh
        sets.parts = sets.parts - merged + 1


def _fitting(sets: TileSets, came: Ints, fits: Flags) -> tuple[TileSets, Ints]:
    """Those sets that fit, and the states they come from."""
    if fits.all():
        return sets, came
    (keep,) = np.nonzero(fits)
    return sets.take(keep), came[keep]


def _asked_together(block: TileBlock) -> tuple[int, ...]:
    """Streams of which some maker must be full where a partial block, or a full one, is."""
    return block.sources if 1 < len(block.sources) <= MOST_FULL else ()


class _Tile:
    """Rows that a block holds in a tile, at least, per set.

    Where sinks are alike, a tile has a share of their lines; else, each tensor a share of the rows
    that sinks need in the end.
    """

    def __init__(self, builder: _Builder, sets: TileSets, block: TileBlock, pace: Ints) -> None:
        self.block, self.limit = block, builder.limit
        most = builder.most[sets.passes]
        self.parts = np.maximum(most, 1)
        self.shared = most > 0
        self.alike = sets.differ == ALIKE
        sinks, self.paces = list(builder.sinks), list(builder.paces)
        lines = np.array([one.lines for one in sinks])[sets.sinks]
        self.further = np.where(self.alike & self.shared, -(-lines // self.parts) - 1, 0)
        self.common = [one.common for one in sinks]
        codes = np.where(self.alike, sets.sinks * len(self.paces) + pace, 0)
        self.codes, self.at = np.unique(codes, return_inverse=True)

    def held(self, row: int, least: Ints, stride: Fraction, needed: int, short: int) -> Ints:
        """Bytes held of what ``least`` rows are asked of for one line, at a stride per line.

        ``row``: bytes of one; ``needed``, ``short``: see :class:`.TileBlock`. More than what fits
        may be less than it is, so that nothing overflows.
        """
        per_line = np.array(
            [
                self.block.rows_per_line(
                    self.common[code // len(self.paces)], self.paces[code % len(self.paces)], stride
                )
                for code in self.codes.tolist()
            ],
            np.int64,
        )[self.at]
        share = np.where(self.shared, -(-needed // self.parts) - short, 0)
        more = self.further * np.minimum(per_line, self.limit // np.maximum(self.further, 1) + 1)
        rows = np.where(self.alike, least + more, np.maximum(least, share))
        held: Ints = row * np.minimum(rows, self.limit // max(row, 1) + 1)
        return held
