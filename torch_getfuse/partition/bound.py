"""A proved lower bound for graphs with more legal groups than can be listed.

Prices. Give each block ``b`` a price ``p(b)`` in bytes. With ``m(b)`` the least of ``F_D(S) -
p(S)`` over the groups ``S`` whose last block is ``b`` (and 0 if that is positive), every plan
costs at least ``sum p(b) + sum m(b)``: its groups are disjoint, cover all blocks, and each has one
last block. So *any* prices prove a bound, and all that is needed is ``m``.

``m`` is found without listing groups, by dynamic programming over the blocks in an order that
keeps few tensors open (:mod:`.frontier`): a label stands for all sets that look alike from the
blocks still to come, and of two such sets one is dropped if the other is both no dearer and no
larger. The sets are a superset of the legal groups: their floor fits the buffer, they are
connected and convex as far as the order shows. More sets can only lower ``m``. All of this is
integer arithmetic.

Good prices come from the linear program that chooses among the sets met so far; the sets that
undercut its prices join it, until none does. ``docs/exact-search.md`` has the proofs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from torch_getfuse.partition.frontier import Skeleton, Stream
from torch_getfuse.partition.problem import FusionProblem

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]

MAKER, SPILLED, BELOW, ABOVE, LEVEL = 1, 2, 4, 8, 4
"""A tensor seen from a set: its maker is in; some reader is out; its maker is out but depends on
the set; a reader is out but feeds the set; and, from bit 4 up, the widest reader that is in."""

MOST_LABELS = 8_000

FINE = 1024
"""Prices are in 1/FINE bytes, so that rounding them costs a bound less than a byte."""


class _Labels:
    """Sets that look different from the blocks to come, one column each; the first is empty."""

    def __init__(self) -> None:
        self.state: Bytes = np.zeros((0, 1), np.uint8)
        self.part: Bytes = np.zeros((0, 1), np.uint8)
        self.parts: Ints = np.zeros(1, np.int64)
        self.cost: Ints = np.zeros(1, np.int64)
        self.room: Ints = np.zeros(1, np.int64)


class Pricing:
    """The dynamic program over one problem.

    Args:
        problem: whose scheme is LBDF.
        share: of the buffer that sets must fit; below 1, what is found bounds nothing.
        most: labels per block; beyond, rooms are rounded down until they fit, which keeps the
            result a bound.
    """

    def __init__(
        self,
        problem: FusionProblem,
        share: float = 1.0,
        most: int = MOST_LABELS,
    ) -> None:
        self.problem = problem
        self.skeleton = Skeleton.of(problem)
        self.buffer_bytes = int(share * problem.evaluator.buffer_bytes)
        self.most = most

    def run(
        self, prices: Ints, expired: Callable[[], bool] = lambda: False
    ) -> tuple[Ints, list[int]] | None:
        """Shortfall per block (0 or less, in 1/FINE bytes) and the sets that have it.

        ``None`` where ``expired`` says so before the end.
        """
        skeleton = self.skeleton
        slots: dict[int, int] = {}
        spare: list[int] = []
        left = [set(stream.blocks) for stream in skeleton.streams]
        labels = _Labels()
        parents: list[npt.NDArray[np.int32]] = []
        joined: list[Flags] = []
        shortfall = np.zeros(len(self.problem.blocks), np.int64)
        ends: list[tuple[int, int]] = []
        for step, block in enumerate(skeleton.order):
            if expired():
                return None
            for number in skeleton.touches[block]:
                left[number].discard(block)
                if number not in slots:
                    if not spare:
                        spare.append(len(labels.state))
                        blank = np.zeros((1, len(labels.cost)), np.uint8)
                        labels.state = np.concatenate([labels.state, blank])
                        labels.part = np.concatenate([labels.part, blank])
                    slots[number] = spare.pop()
            views = [(skeleton.streams[t], slots[t], left[t]) for t in skeleton.touches[block]]
            without, out = self._leave(labels, block, views)
            if block < len(shortfall):
                within, in_ = self._join(labels, block, views, int(prices[block]))
                whole = np.flatnonzero((within.parts == 1) & (within.cost < 0))
                if len(whole):
                    at = whole[np.argmin(within.cost[whole])]
                    shortfall[block] = within.cost[at]
                    ends.append((step, int(in_[at])))
            else:
                within, in_ = _take(labels, out[:0]), out[:0]
            labels = _join_labels(without, within)
            origin = np.concatenate([out, in_])
            member = np.arange(len(origin)) >= len(out)
            for stream, slot, open_ in views:
                _normalise(labels, stream, slot, open_)
            for number in skeleton.touches[block]:
                if not left[number]:
                    spare.append(slots.pop(number))
            keep = self._undominated(labels, _alive(labels))
            labels = _take(labels, keep)
            parents.append(origin[keep].astype(np.int32))
            joined.append(member[keep])
        return shortfall, [self._trace(parents, joined, *end) for end in ends]

    def _leave(
        self, labels: _Labels, block: int, views: Sequence[tuple[Stream, int, set[int]]]
    ) -> tuple[_Labels, Ints]:
        """The labels whose sets go on without ``block``, and where they came from."""
        state = labels.state.copy()
        room = labels.room.copy()
        below = np.zeros(len(room), bool)
        above = np.zeros(len(room), bool)
        for stream, slot, _ in views:
            column = labels.state[slot]
            if stream.maker == block:
                above |= (column >> LEVEL > 0) | (column & ABOVE > 0)
            else:
                below |= column & (MAKER | BELOW) > 0
                if stream.overwritten and block in stream.level:
                    room += np.where(column & MAKER, stream.unit_bytes, 0)
        for stream, slot, _ in views:
            if stream.maker == block:
                state[slot] |= np.where(below, BELOW, 0).astype(np.uint8)
            else:
                state[slot] |= np.where(above, ABOVE | SPILLED, SPILLED).astype(np.uint8)
        keep = np.flatnonzero(~(below & above) & (room < self.buffer_bytes))
        changed = _Labels()
        changed.state, changed.part, changed.parts = state, labels.part, labels.parts
        changed.cost, changed.room = labels.cost, room
        return _take(changed, keep), keep

    def _join(
        self, labels: _Labels, block: int, views: Sequence[tuple[Stream, int, set[int]]], price: int
    ) -> tuple[_Labels, Ints]:
        """The labels whose sets ``block`` joins, and where they came from.

        A set's cost is what it would be if no further block joined.
        """
        skeleton = self.skeleton
        state = labels.state.copy()
        part = labels.part.copy()
        cost = labels.cost + (skeleton.traffic[block] * FINE - price)
        room = labels.room + skeleton.room[block]
        hole = np.zeros(len(cost), bool)
        for stream, slot, left in views:
            column = labels.state[slot]
            before = (column >> LEVEL).astype(np.int64)
            made = column & MAKER > 0
            after = np.maximum(before, stream.level.get(block, 0))
            waiting = bool(left - {stream.maker})
            size, unit = stream.size * FINE, stream.unit_bytes
            if stream.maker == block:
                hole |= column & ABOVE > 0
                cost -= np.where(before > 0, size, 0)  # no longer read from outside
                if stream.forced or waiting:
                    cost += size
                else:
                    cost += np.where(column & SPILLED, size, 0)
                if not stream.overwritten:
                    room += unit * (np.maximum(stream.units[after], 1) - stream.units[before])
                elif not waiting:
                    room += np.where(before > 0, 0, unit)
                mark = MAKER
            else:
                hole |= column & BELOW > 0
                cost += np.where((before == 0) & ~made, size, 0)
                if not stream.forced and not waiting:
                    cost -= np.where(made & (column & SPILLED == 0), size, 0)
                if not stream.overwritten:
                    held = np.maximum(stream.units[before], made)
                    room += unit * (stream.units[after] - held).clip(0)
                mark = 0
            state[slot] = (column & 15) | mark | (after << LEVEL).astype(np.uint8)
        keep = np.flatnonzero(~hole & (room < self.buffer_bytes))
        changed = _Labels()
        changed.state, changed.cost, changed.room = state, cost, room
        changed.part, changed.parts = part, labels.parts
        changed = _take(changed, keep)
        _connect(changed, block, views)
        return changed, keep

    def _undominated(self, labels: _Labels, alive: Ints) -> Ints:
        """Of the labels that look alike those that are cheaper or smaller; the empty one first."""
        rows = np.concatenate([labels.state[:, alive], labels.part[:, alive]])
        rows = rows[rows.any(axis=1)]
        words = -(-len(rows) // 8) or 1
        packed = np.zeros((len(alive), 8 * words), np.uint8)
        packed[:, : len(rows)] = rows.T
        keys = packed.view(np.uint64)
        cost, room = labels.cost[alive], labels.room[alive]
        kept = _pareto(keys, cost, room)
        step = max(1, self.buffer_bytes // 256)
        while len(kept) > self.most and step <= self.buffer_bytes:
            room = room // step * step
            kept = _pareto(keys, cost, room)
            step *= 2
        labels.room[alive] = room
        return np.concatenate([alive[:1], alive[kept[kept > 0]]])

    def _trace(
        self, parents: list[npt.NDArray[np.int32]], joined: list[Flags], step: int, label: int
    ) -> int:
        """The mask of the set that ``step``'s block makes of a label from before it."""
        blocks, order = self.problem.blocks, self.skeleton.order
        mask = blocks[order[step]]
        while label:
            step -= 1
            if joined[step][label]:
                mask |= blocks[order[step]]
            label = int(parents[step][label])
        return mask


def _take(labels: _Labels, at: Ints) -> _Labels:
    taken = _Labels()
    taken.state, taken.part = labels.state[:, at], labels.part[:, at]
    taken.parts, taken.cost, taken.room = labels.parts[at], labels.cost[at], labels.room[at]
    return taken


def _join_labels(first: _Labels, second: _Labels) -> _Labels:
    joined = _Labels()
    joined.state = np.concatenate([first.state, second.state], axis=1)
    joined.part = np.concatenate([first.part, second.part], axis=1)
    joined.parts = np.concatenate([first.parts, second.parts])
    joined.cost = np.concatenate([first.cost, second.cost])
    joined.room = np.concatenate([first.room, second.room])
    return joined


def _connect(labels: _Labels, block: int, views: Sequence[tuple[Stream, int, set[int]]]) -> None:
    """Merge the parts of each set that ``block``, which has joined, is connected to.

    A part is numbered at the tensors through which it can still grow. Readers of a tensor whose
    maker is still to come count as connected: the maker may join.
    """
    part = labels.part
    fresh = np.uint8(255)
    merged = np.zeros(len(labels.cost), np.int64)
    for stream, slot, _ in views:
        if stream.maker >= 0:
            own = part[slot].copy()
            has = (own > 0) & (own != fresh)
            if has.any():
                part[(part == own) & has] = fresh
                merged += has
    for stream, slot, left in views:
        if left and (stream.maker == block or stream.maker in left):
            part[slot] = fresh
    labels.parts = labels.parts - merged + 1


def _normalise(labels: _Labels, stream: Stream, slot: int, left: set[int]) -> None:
    """Forget what no later block can notice, so that more sets look alike."""
    column = labels.state[slot]
    if not left:
        labels.state[slot] = 0
        labels.part[slot] = 0
        return
    made = column & MAKER > 0
    level = column >> LEVEL
    widest = max((stream.level[b] for b in left if b in stream.level), default=0)
    flags = column & (MAKER | SPILLED | BELOW | ABOVE)
    if stream.maker in left:
        widest = max(widest, 1)
    else:
        # The maker is decided: only if it is in does it matter who is out.
        flags = np.where(made, flags & (MAKER | SPILLED), flags & BELOW)
        labels.part[slot] = np.where(made, labels.part[slot], 0)
    if stream.forced:
        flags = flags & ~np.uint8(SPILLED)
    labels.state[slot] = flags | (np.minimum(level, widest) << LEVEL).astype(np.uint8)


def _alive(labels: _Labels) -> Ints:
    """Labels whose every part can still grow, the empty one first; parts are numbered anew."""
    part = labels.part
    touched = part.any(axis=0)
    single = labels.parts <= 1
    part[:, single] = part[:, single] > 0
    alive = touched & single
    several = np.flatnonzero(~single & touched)
    if len(several):
        many = part[:, several]
        fresh = np.zeros_like(many)
        count = np.zeros(len(several), np.int64)
        for row in range(len(many)):
            new = (many[row] > 0) & (fresh[row] == 0)
            if new.any():
                count += new
                same = (many == many[row]) & new
                fresh = np.where(same, count.astype(np.uint8), fresh)
        part[:, several] = fresh
        alive[several] = count == labels.parts[several]
    alive[0] = True
    return np.flatnonzero(alive)


def _pareto(keys: npt.NDArray[np.uint64], cost: Ints, room: Ints) -> Ints:
    """Positions, ascending, of labels that no label of the same key matches in cost and room."""
    order = np.lexsort((room, cost, *keys.T))
    sorted_keys = keys[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (sorted_keys[1:] != sorted_keys[:-1]).any(axis=1)
    # Each key on a range of its own, below that of the key before.
    value = room[order] - np.cumsum(starts) * (int(room.max()) + 1)
    least = np.minimum.accumulate(value)
    kept = np.ones(len(order), bool)
    kept[1:] = value[1:] < least[:-1]
    return np.sort(order[kept])
