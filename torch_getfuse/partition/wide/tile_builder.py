"""The forward pass of the automaton of BRR: the states that sets of blocks reach.

:mod:`.tile_automaton` says what they are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import ClassVar

import numpy as np

from torch_getfuse.partition.wide.automaton import NO_BLOCK, Join, Layer
from torch_getfuse.partition.wide.tile_blocks import TileBlock, TileSkeleton
from torch_getfuse.partition.wide.tile_guide import FIRST, Guide, Passes, Step, Way
from torch_getfuse.partition.wide.tile_rows import Rates, Tile
from torch_getfuse.partition.wide.tile_sets import (
    ABOVE,
    ALIKE,
    BARRED,
    FAR,
    FULL,
    IN_ROWS,
    INSIDE,
    MAYBE,
    PAID,
    PARTIAL,
    READ,
    SPILLED,
    TO_DIFFER,
    Bytes,
    Far,
    Flags,
    Ints,
    Merging,
    OpenRows,
    TileSets,
)
from torch_getfuse.partition.work import Work

MOST_FULL = 4  # tensors that a block reads of which one is said to have a full maker

AT_ONCE, LEAST = 1 / 4, 1 / 4
"""Shares of the states that one decision may use, and of an even share that each may."""

TOO_MANY = 1.1
"""Times the states that may be made: so many are, at most, where more cannot be merged."""

FAR_OFF = 40
"""Decisions before a stream is touched again, at least, if it is far."""

_BLOCK = 250  # steps counted per block
_CELLS = 30  # entries of the table of states per further step
_MOST_PACES = 200  # rates over what the cumulative stride says, which are told apart


class Builder:
    """The forward pass: states that sets reach within the buffer, and the steps between them.

    Args:
        skeleton: the problem's blocks.
        passes: those that are told apart.
        limit: a set that holds as much, in bytes, does not fit.
        guide: leaves out sets that cannot end.

    Attributes:
        starts: the first states: of each of the passes, with sinks that will be alike and that will
            not; -1 for none.
    """

    starts: Ints

    # What is said of the makers of the tensors that a block reads.
    ASKED: ClassVar[np.uint8] = np.uint8(255)
    # What does not tell states apart; and what does not either where they are too many.
    UNTOLD: ClassVar[Sequence[str]] = ()
    MERGED: ClassVar[Sequence[str]] = (*IN_ROWS, "sinks", "parts", "paces", "spilled", FAR)

    def __init__(
        self,
        skeleton: TileSkeleton,
        passes: Sequence[Passes],
        limit: int,
        guide: Guide | None = None,
    ) -> None:
        self.skeleton = skeleton
        self.passes = passes
        self.guide = guide
        self.limit = limit
        self.least = np.array([one.least for one in passes])
        self.most = np.array([one.most for one in passes])
        self.stay = np.array([one.stay for one in passes])
        self.rates = Rates(skeleton.strides)
        outlined = guide is not None and guide.tells_apart
        self.merging = Merging(self.UNTOLD, self.MERGED, outlined)
        self.place = {number: k for k, number in enumerate(skeleton.order)}
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
        """All layers, with about ``most`` states; ``None`` where they are still far too many."""
        skeleton = self.skeleton
        sets = self._nothing()
        left = [set(stream.blocks) for stream in skeleton.streams]
        states, layers = 0, []
        for decided, number in enumerate(skeleton.order):
            states += len(sets)
            allowed = TOO_MANY * most * (AT_ONCE + self._done(decided))
            if len(self.rates.paces) > _MOST_PACES or states > allowed:
                return None
            block = skeleton.blocks[number] if number < len(skeleton.blocks) else None
            self._open(sets, number, block, left)
            cells = sum(len(getattr(sets, table)) for table in sets.TABLES)
            ways = [] if block is None else [*self._ways(block)]
            taken = [Step(decided, ways, number) for number in range(-1, len(ways))]
            stay = self._leave(sets, number)
            joined = [self._join(sets, number, block, step) for step in taken[1:] if block]
            work.add(
                _BLOCK * (1 + len(ways))
                + sum(cells * len(at) for _, at in (stay, *joined)) // _CELLS
            )
            ended = [self._ended(sets, *some) for some in joined]
            after = [stay, *joined]
            if self.guide is not None:
                shared = self._still_shared(number)
                going = zip(taken, after, strict=True)
                after = [self.guide.going(step, sets, *some, shared) for step, some in going]
            several = TileSets.joined([some for some, _ in after])
            self._close(several, number, left)
            self._forget(several)
            width = self._width(decided, states, most)
            kept, state = self.merging.told_apart(several, width, self._far(decided, left))
            steps, end = [], 0
            for some, at in after:
                begin, end = end, end + len(at)
                to, room = np.full(len(sets), -1, np.int64), np.zeros(len(sets), np.int64)
                to[at], room[at] = state[begin:end], some.room - sets.room[at]
                steps.append((to, room))
            joins = [
                Join(to, ends, cost, room, last)
                for (to, room), (ends, cost, last) in zip(steps[1:], ended, strict=True)
            ]
            if block is not None:
                self.undecided[block.cumulative, block.height] -= 1
            layers.append(Layer(NO_BLOCK if block is None else number, *steps[0], tuple(joins)))
            sets = several.take(kept)
        return layers

    def _nothing(self) -> TileSets:
        """The empty set, for all passes, with sinks that will be alike, or not."""
        strides = {stride for stride, _ in self.undecided}
        sets = TileSets.empty(
            len(self.least), (ALIKE,) if len(strides) == 1 else (ALIKE, TO_DIFFER)
        )
        self.starts = np.arange(len(sets))
        if self.guide is not None:
            sets, self.starts = self.guide.start(sets, self.passes)
        return sets

    def _done(self, decided: int) -> float:
        """The share of all states that precedes a decision."""
        return self.guide.share(decided) if self.guide else decided / len(self.skeleton.order)

    def _width(self, decided: int, states: int, most: int) -> int:
        """States that may follow a decision, with as many so far, if ``most`` may in all."""
        even = 1 / len(self.skeleton.order)
        if self.guide is not None:
            here = self._done(decided + 1) - self._done(decided)
            return math.ceil(most * max(even, here))
        # What narrow layers leave is for wide ones.
        left = most * (AT_ONCE + (1 - AT_ONCE) * (decided + 1) * even) - states
        return math.ceil(max(left, LEAST * even * most))

    def _far(self, decided: int, left: Sequence[set[int]]) -> Far:
        """The streams that no decision touches for long, and their readings."""
        place, soon = self.place, decided + FAR_OFF
        far = {
            stream: row
            for stream, row in self.streams.at.items()
            if min(place[block] for block in left[stream]) > soon
        }
        readings = [row for (stream, _), row in self.readings.at.items() if stream in far]
        return Far(np.array([*far.values()], np.int64), np.array(readings, np.int64))

    def _ended(self, sets: TileSets, joined: TileSets, came: Ints) -> tuple[Flags, Ints, Ints]:
        """Of each set before a block joined: whether that may end it; cost and room if it does."""
        cost, last, ends = np.zeros((3, len(sets)), np.int64)
        cost[came] = joined.cost
        last[came] = joined.room + self._pending(joined) - sets.room[came]
        # A block alone is priced apart.
        may = (joined.parts == 1) & (sets.parts[came] > 0) & (joined.differ != TO_DIFFER)
        ends[came] = may & ~(joined.state & INSIDE > 0).any(axis=0)
        return ends > 0, cost, last

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
                above = ABOVE if streams[stream].maker >= 0 else 0
                sets.state[self.streams.at[stream]] &= np.uint8(PAID | above)
        for key in [key for key in self.readings.at if streams[key[0]].maker == number]:
            self.readings.close(sets, key)
        for block in self._settled(number):
            self.waiting.pop(block, None)
            for kept in [key for key in self.kept.at if key[0] == block]:
                self.kept.close(sets, kept)
            for unsettled in self.unsettled.values():
                unsettled.discard(block)
        for tensor in [tensor for tensor, some in self.unsettled.items() if not some]:
            del self.unsettled[tensor]
            self.held.close(sets, tensor)

    def _settled(self, number: int) -> list[int]:
        """The blocks of which a decision says whether they start a group."""
        settled = [block for block, waiting in self.waiting.items() if not waiting]
        return settled if number in self.waiting else [*settled, number]

    def _still_shared(self, number: int) -> list[int]:
        """Rows of the tensors of which more may be held after a decision."""
        settled = set(self._settled(number))
        return [self.held.at[tensor] for tensor, some in self.unsettled.items() if some - settled]

    def _forget(self, sets: TileSets) -> None:
        """Erase what is asked of makers that cannot join: those that feed the set may not either.

        Nor can a set grow through what they make.
        """
        state, both = sets.state, np.uint8(PARTIAL | FULL)
        never = (state & np.uint8(ABOVE | BARRED) > 0) | (state & both == both)
        sets.state = np.where(never, state & np.uint8(PAID | INSIDE) | np.uint8(ABOVE), state)
        sets.rows[never] = 0
        sets.pace[never] = 0
        for (stream, _), row in self.readings.at.items():
            sets.part[row, never[self.streams.at[stream]]] = 0

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

    def _ways(self, block: TileBlock) -> Iterator[Way]:
        """The ways in which a block may join."""
        several = _asked_together(block)
        heights = {
            height
            for (stride, height), count in self.undecided.items()
            if count and stride == block.cumulative and height >= block.height
        }
        for k, height in enumerate(sorted(heights)):  # first, if it is the only sink
            lines = height, height
            if block.stores:
                yield Way(True, lines, not k, None)
            if not (block.stores and several):
                yield Way(False, lines, not k, None)
            # A sink is asked for nothing.
            if several and (block.stores or not k):
                for source in (*several, FIRST):
                    yield Way(False, lines, not k, source)

    def _join(
        self, sets: TileSets, number: int, block: TileBlock, step: Step
    ) -> tuple[TileSets, Ints]:
        """The sets that a block joins in a way, and the states they come from.

        Their cost assumes that no further block joins.
        """
        way = step.ways[step.number]
        (keep,) = np.nonzero(self._can_join(sets, block, step))
        changed = sets.take(keep)
        flags = np.zeros(len(keep), np.uint8)
        rows, pace = np.ones(len(keep), np.int64), np.ones(len(keep), np.int64)
        cost = self.least[changed.passes] * block.weights + block.traffic
        if block.out >= 0:
            stream, at = self.skeleton.streams[block.out], self.streams.at[block.out]
            flags = changed.state[at].copy()
            changed.state[at] = 0
            # What is read at no pace is so at several.
            rows, pace = np.maximum(rows, changed.rows[at]), changed.pace[at].astype(np.int64)
            pace[flags & PAID == 0] = 1
            # No longer read from outside; and written if someone else reads it.
            spilled = flags & SPILLED > 0
            cost += stream.size * ((spilled | stream.forced).astype(np.int64) - (flags & PAID > 0))
        fits = self._take_sinks(changed, block, flags & PAID == 0, way)
        changed.room = changed.room + np.where(self.stay[changed.passes], block.weights, 0)
        tile = Tile(self.rates, block, changed, pace, self.most[changed.passes], self.limit)
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

    def _can_join(self, sets: TileSets, block: TileBlock, step: Step) -> Flags:
        """The sets whose readers of the block allow it to join so."""
        full, _, others, source = step.ways[step.number]
        can = np.full(len(sets), True)
        if not others:
            can = (sets.parts == 0) & (sets.differ == ALIKE)
        if block.out >= 0:
            flags = sets.state[self.streams.at[block.out]]
            can &= flags & (ABOVE | BARRED) == 0
            can &= flags & (PARTIAL | FULL) != (PARTIAL | FULL)
            if full:
                can &= flags & PARTIAL == 0
            elif block.stores:
                can &= flags & FULL == 0
            if not block.stores and _asked_together(block):
                sourced = flags & FULL > 0
                if self.guide is not None and step.plain >= 0:
                    sourced |= self.guide.sourced(step, sets)
                can &= sourced if source is not None else ~sourced
        elif not block.stores and source is not None:
            can[:] = False
        return can

    def _take_sinks(self, sets: TileSets, block: TileBlock, sink: Flags, way: Way) -> Flags:
        """Note the block as a sink of some sets; whether these may have it."""
        stride, first = self.rates.strides[block.cumulative], sets.parts == 0
        least, most = way.lines
        sets.common = np.where(first, stride, sets.common)
        sets.lines = np.where(first, least, sets.lines)
        sets.tall = np.where(first, most, sets.tall)
        alike = sets.common == stride
        sets.let_differ(sink & ~alike & (sets.differ == TO_DIFFER))
        may: Flags = ~(sink & (sets.differ == ALIKE)) | alike & (block.height <= sets.tall)
        return may

    def _start(self, sets: TileSets, number: int, block: TileBlock, tile: Tile, rows: Ints) -> None:
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
        way: Way,
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
            cost += np.where(sets.state[at] & PAID, 0, stream.size)
            asked = np.full(len(sets), READ, np.uint8)
            if stream.inside:
                if not block.stores:
                    asked |= wanted
                elif full or alone:
                    asked |= np.uint8(PARTIAL if full else FULL)
                if source == read.stream:
                    asked |= np.uint8(FULL | INSIDE)
                elif source == FIRST and read.stream in together:
                    asked |= np.uint8(BARRED)
                through = self.rates.through(read.rate, pace)
                before = sets.pace[at]
                clash = (before > 0) & (through > 0) & (before != through) | (through < 0)
                uneven = clash | (sets.state[at] & BARRED > 0)
                asked |= np.where(uneven, BARRED, 0).astype(np.uint8)
                sets.pace[at] = np.where(uneven, 0, np.where(before > 0, before, through))
                more = np.maximum(sets.rows[at], read.rows[rows])
                sets.rows[at] = np.where(uneven, 1, more)
            sets.state[at] = sets.state[at] & ~np.uint8(MAYBE) | asked & self.ASKED
        sets.cost = cost

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
