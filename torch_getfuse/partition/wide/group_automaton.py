"""The automaton of LBDF: all sets of blocks whose floor of ``F_b`` fits the buffer.

The blocks are decided in an order that keeps few tensors open (:mod:`block_order`). A state says
which open tensors a set makes, reads or spills, and which of its parts can still be connected. A
forward pass builds the states and keeps the least room of each, so that states that no set reaches
within the buffer are omitted; the backward pass is :func:`.fewer_states`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.wide.automaton import (
    NO_BLOCK,
    Automaton,
    Join,
    Layer,
    distinct,
    fewer_states,
    packed,
    renumbered,
)
from torch_getfuse.partition.wide.block_order import Skeleton, Stream
from torch_getfuse.partition.work import Work

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

MAKER, SPILLED, BELOW, ABOVE, LEVEL = 1, 2, 4, 8, 4
"""Flags of a tensor with respect to a set: its maker is in; some reader is out; its maker is out
but depends on the set; a reader is out but feeds the set; from bit 4 up, the level of the readers
that are in (:mod:`hold_levels`)."""

FIRST_STATES = 400_000
"""States with which producers are decided first; more make the order free."""

EXACT_STATES, MOST_STATES = 400_000, 2_000_000
"""States with which nothing is forgotten; and where levels are."""

FORGET = 250  # states before a block with more of which levels are forgotten

_BLOCK = 250  # steps counted per block
_CELLS = 9  # entries of the table of states per further step


def line_automaton(problem: FusionProblem) -> Automaton | None:
    """The automaton of an LBDF problem; ``None`` for too many states (:data:`MOST_STATES`).

    Producers are decided first: then all its sets are convex. With more than
    :data:`FIRST_STATES` (many branches that meet in one block) it is built anew in an order
    that keeps fewer tensors open. With more than :data:`EXACT_STATES` then, it forgets how much
    of a tensor the readers hold: the floor of its sets is lower, and so is a bound.

    Raises:
        OptionError: for a scheme other than LBDF.
        OutOfWork: if a limit on work is reached.
    """
    evaluator = problem.evaluator
    skeleton = Skeleton.of(problem)
    builder = _Builder(skeleton, len(problem.blocks), evaluator.buffer_bytes)
    layers = builder.layers(evaluator.work, FIRST_STATES)
    if layers is None:
        skeleton = skeleton.in_any_order(evaluator.work)
        builder = _Builder(skeleton, len(problem.blocks), evaluator.buffer_bytes)
        layers = builder.layers(evaluator.work, EXACT_STATES)
    if layers is None:
        layers = builder.layers(evaluator.work, MOST_STATES, FORGET)
    if layers is None:
        return None
    limit = evaluator.buffer_bytes
    return Automaton(problem, skeleton, fewer_states(layers, limit, evaluator.work)[0], limit)


class _Sets:
    """One set per state, as columns; the first is the empty set.

    Attributes:
        state: per open tensor, the flags above.
        part: per open tensor, the number of the part that can grow through it, from 1 up.
        parts: number of parts of the set.
        cost: change of ``F_D`` by the last decision, in bytes.
        room: floor of ``F_b`` in bytes.
    """

    def __init__(self) -> None:
        self.state: Bytes = np.zeros((0, 1), np.uint8)
        self.part: Bytes = np.zeros((0, 1), np.uint8)
        self.parts: Ints = np.zeros(1, np.int64)
        self.cost: Ints = np.zeros(1, np.int64)
        self.room: Ints = np.zeros(1, np.int64)

    def take(self, at: Ints) -> _Sets:
        taken = _Sets()
        taken.state, taken.part = self.state[:, at], self.part[:, at]
        taken.parts, taken.cost, taken.room = self.parts[at], self.cost[at], self.room[at]
        return taken

    def __add__(self, other: _Sets) -> _Sets:
        joined = _Sets()
        joined.state = np.concatenate([self.state, other.state], axis=1)
        joined.part = np.concatenate([self.part, other.part], axis=1)
        joined.parts = np.concatenate([self.parts, other.parts])
        joined.cost = np.concatenate([self.cost, other.cost])
        joined.room = np.concatenate([self.room, other.room])
        return joined


Views = Sequence[tuple[Stream, int, set[int]]]  # stream, its row, its undecided blocks


class _Builder:
    """The forward pass: states that sets reach within the buffer, and the steps between them."""

    def __init__(self, skeleton: Skeleton, fusable: int, buffer_bytes: int) -> None:
        self.skeleton = skeleton
        self.fusable = fusable
        self.buffer_bytes = buffer_bytes

    def layers(self, work: Work, most: int, forget: float = math.inf) -> list[Layer] | None:
        """All layers; ``None`` with more than ``most`` states.

        ``forget``: states before a block with more of which levels are forgotten.
        """
        skeleton = self.skeleton
        slots: dict[int, int] = {}
        spare: list[int] = []
        left = [set(stream.blocks) for stream in skeleton.streams]
        sets = _Sets()
        states = 0
        layers = []
        for block in skeleton.order:
            states += len(sets.room)
            if states > most:
                return None
            work.add(_BLOCK + sets.state.size // _CELLS)
            touched = skeleton.touches[block]
            for number in touched:
                left[number].discard(block)
                if number not in slots:
                    if not spare:
                        spare.append(len(sets.state))
                        blank = np.zeros((1, len(sets.room)), np.uint8)
                        sets.state = np.concatenate([sets.state, blank])
                        sets.part = np.concatenate([sets.part, blank])
                    slots[number] = spare.pop()
            views = [(skeleton.streams[t], slots[t], left[t]) for t in touched]
            size = len(sets.room)
            without, out = self._leave(sets, block, views)
            leave_room, cost, room, last_room = (np.zeros(size, np.int64) for _ in range(4))
            ends = np.zeros(size, bool)
            if block < self.fusable:
                within, in_ = self._join(sets, block, views)
                cost[in_], last_room[in_] = within.cost, within.room - sets.room[in_]
                last_room[in_] += self._overwritten_outside(within, slots, left)
                ends[in_] = within.parts == 1
            else:
                within, in_ = sets.take(out[:0]), out[:0]
            after = without + within
            for stream, slot, open_ in views:
                _normalise(after, stream, slot, open_)
            for number in touched:
                if not left[number]:
                    spare.append(slots.pop(number))
            kept, state = _distinct(after, _alive(after))
            if len(kept) > forget:
                _forget_levels(after, skeleton.streams, slots)
                kept, state = _distinct(after, _alive(after))
            leave_room[out] = after.room[: len(out)] - sets.room[out]
            room[in_] = after.room[len(out) :] - sets.room[in_]
            leave, join = np.full((2, size), -1, np.int64)
            leave[out], join[in_] = state[: len(out)], state[len(out) :]
            sets = after.take(kept)
            joins = (Join(join, ends, cost, room, last_room),) if block < self.fusable else ()
            layers.append(Layer(block if joins else NO_BLOCK, leave, leave_room, joins))
        return layers

    def _overwritten_outside(
        self, sets: _Sets, slots: Mapping[int, int], left: Sequence[set[int]]
    ) -> Ints:
        """Room of tensors that an undecided reader would overwrite, if it stays out."""
        room = np.zeros(len(sets.room), np.int64)
        for number, slot in slots.items():
            stream = self.skeleton.streams[number]
            if stream.overwritten and stream.readers & left[number]:
                room += np.where(sets.state[slot] & MAKER, stream.unit_bytes, 0)
        return room

    def _leave(self, sets: _Sets, block: int, views: Views) -> tuple[_Sets, Ints]:
        """The sets that ``block`` stays out of, and the states they come from."""
        state = sets.state.copy()
        room = sets.room.copy()
        below = np.zeros(len(room), bool)
        above = np.zeros(len(room), bool)
        for stream, slot, _ in views:
            column = sets.state[slot]
            if stream.maker == block:
                above |= (column >> LEVEL > 0) | (column & ABOVE > 0)
            else:
                below |= column & (MAKER | BELOW) > 0
                if stream.overwritten and block in stream.readers:
                    room += np.where(column & MAKER, stream.unit_bytes, 0)
        for stream, slot, _ in views:
            if stream.maker == block:
                state[slot] |= np.where(below, BELOW, 0).astype(np.uint8)
            else:
                state[slot] |= np.where(above, ABOVE | SPILLED, SPILLED).astype(np.uint8)
        keep = np.flatnonzero(~(below & above) & (room < self.buffer_bytes))
        changed = _Sets()
        changed.state, changed.part, changed.parts = state, sets.part, sets.parts
        changed.cost, changed.room = sets.cost, room
        return changed.take(keep), keep

    def _join(self, sets: _Sets, block: int, views: Views) -> tuple[_Sets, Ints]:
        """The sets that ``block`` joins, and the states they come from.

        The cost of a set assumes that no further block joins.
        """
        skeleton = self.skeleton
        state = sets.state.copy()
        cost = np.full(len(sets.room), skeleton.traffic[block])
        room = sets.room + skeleton.room[block]
        hole = np.zeros(len(cost), bool)
        for stream, slot, left in views:
            column = sets.state[slot]
            before = (column >> LEVEL).astype(np.int64)
            maker_in = column & MAKER > 0
            after = stream.levels.joined(block)[before]
            units = stream.levels.units
            waiting = bool(left - {stream.maker})
            size, unit = stream.size, stream.unit_bytes
            if stream.maker == block:
                hole |= column & ABOVE > 0
                cost -= np.where(before > 0, size, 0)  # no longer read from outside
                if stream.forced or waiting:
                    cost += size
                else:
                    cost += np.where(column & SPILLED, size, 0)
                if not stream.overwritten:
                    room += unit * (np.maximum(units[after], 1) - units[before])
                elif not waiting:
                    room += np.where(before > 0, 0, unit)
                mark = MAKER
            else:
                hole |= column & BELOW > 0
                cost += np.where((before == 0) & ~maker_in, size, 0)
                if not stream.forced and not waiting:
                    cost -= np.where(maker_in & (column & SPILLED == 0), size, 0)
                if not stream.overwritten:
                    held = np.maximum(units[before], maker_in)
                    room += unit * (units[after] - held).clip(0)
                mark = 0
            state[slot] = (column & 15) | mark | (after << LEVEL).astype(np.uint8)
        keep = np.flatnonzero(~hole & (room < self.buffer_bytes))
        changed = _Sets()
        changed.state, changed.cost, changed.room = state, cost, room
        changed.part, changed.parts = sets.part, sets.parts
        changed = changed.take(keep)
        _connect(changed, block, views)
        return changed, keep


def _connect(sets: _Sets, block: int, views: Views) -> None:
    """Merge the parts of each set that ``block``, which has joined, is connected to.

    A part is numbered at the tensors through which it can still grow. Readers of a tensor whose
    maker is undecided count as connected: the maker may join.
    """
    part = sets.part
    fresh = np.uint8(255)
    merged = np.zeros(len(sets.cost), np.int64)
    for stream, slot, _ in views:
        if stream.maker >= 0:
            parts = part[slot].copy()
            has = (parts > 0) & (parts != fresh)
            if has.any():
                part[(part == parts) & has] = fresh
                merged += has
    for stream, slot, left in views:
        if left and (stream.maker == block or stream.maker in left):
            part[slot] = fresh
    sets.parts = sets.parts - merged + 1


def _normalise(sets: _Sets, stream: Stream, slot: int, left: set[int]) -> None:
    """Erase what does not affect later blocks, so that more sets share a state."""
    column = sets.state[slot]
    if not left:
        sets.state[slot] = 0
        sets.part[slot] = 0
        return
    maker_in = column & MAKER > 0
    level = stream.levels.seen(left & (stream.readers | {stream.maker}))[column >> LEVEL]
    flags = column & (MAKER | SPILLED | BELOW | ABOVE)
    if stream.maker not in left:
        # The maker is decided: readers that are out matter only if it is in.
        flags = np.where(maker_in, flags & (MAKER | SPILLED), flags & BELOW)
        sets.part[slot] = np.where(maker_in, sets.part[slot], 0)
    if stream.forced:
        flags = flags & ~np.uint8(SPILLED)
    sets.state[slot] = flags | (level << LEVEL).astype(np.uint8)


def _forget_levels(sets: _Sets, streams: Sequence[Stream], slots: Mapping[int, int]) -> None:
    """Take the readers of each open tensor for those that hold least of it; the room is given back.

    What later readers add to that is no less than what they would add to what is held.
    """
    for number, slot in slots.items():
        stream, column = streams[number], sets.state[slot]
        if stream.overwritten:
            continue  # its room does not depend on the level
        level, lowest = (column >> LEVEL).astype(np.int64), stream.levels.lowest
        units = stream.levels.units
        read, maker_in = level > 0, column & MAKER > 0
        held = np.maximum(units[level], maker_in) - np.maximum(units[lowest], maker_in)
        sets.room = sets.room - np.where(read, stream.unit_bytes * held, 0)
        sets.state[slot] = np.where(read, (column & 15) | np.uint8(lowest << LEVEL), column)


def _alive(sets: _Sets) -> Ints:
    """Sets whose parts can all still grow, the empty set first; renumbers the parts."""
    touched = sets.part.any(axis=0)
    single = sets.parts <= 1
    sets.part = np.where(single, np.minimum(sets.part, 1), sets.part)
    alive = touched & single
    several = np.flatnonzero(~single & touched)
    if len(several):
        many = sets.part[:, several]
        # Most are still numbered in order of their first tensors.
        highest = np.maximum.accumulate(many, axis=0)
        ordered = (many[1:] <= highest[:-1] + np.uint8(1)).all(axis=0) & (many[0] <= 1)
        count = highest[-1].astype(np.int64)
        others = np.flatnonzero(~ordered)
        many[:, others], count[others] = renumbered(many[:, others])
        sets.part[:, several] = many
        alive[several] = count == sets.parts[several]
    alive[0] = True
    return np.flatnonzero(alive)


def _distinct(sets: _Sets, alive: Ints) -> tuple[Ints, Ints]:
    """Per distinct state among the alive sets, the set with least room; and each set's state or -1.

    The empty set is state 0: it alone touches no tensor, so its key is the least.
    """
    rows = [*sets.state[:, alive], *sets.part[:, alive]]
    return distinct(packed(rows, len(alive)), sets.room, alive)
