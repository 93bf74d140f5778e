"""All sets of blocks that may be groups, as paths through a layered automaton.

The blocks are decided one by one: each joins a set or stays out. A *state* is everything about a
set that affects later blocks; so it alone determines how joining or staying out changes ``F_D`` and
the floor of what the set holds, and every set that can become a legal group is a path from the
empty state to one of the *ends*, where the last block joins and the set is connected. The automaton
does not depend on prices, so it is built once per problem: in :mod:`.group_automaton` for LBDF, in
:mod:`.tile_automaton` for BRR. ``docs/exact-search.md`` section 5 has the proofs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.work import Work

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]

NO_BLOCK = -1  # in place of a block: an unfusable operator

NEVER = 1 << 60  # room of a state that cannot end

_LAYER = 250  # steps counted per layer
_STATES = 4  # states per further step


class Join(NamedTuple):
    """One way in which a block may join, per state before it; sizes in bytes.

    Attributes:
        to: state after it, -1 if nothing can follow.
        ends: whether the set with the block is connected, and may be a group.
        cost, room: increase of ``F_D`` and of the floor.
        last_room: increase of the floor if no further block joins.
    """

    to: Ints
    ends: Flags
    cost: Ints
    room: Ints
    last_room: Ints


class Layer(NamedTuple):
    """One block's decision, per state before it; sizes in bytes.

    Attributes:
        block: position in the problem's blocks; :data:`NO_BLOCK` for an unfusable operator.
        leave: state after the block stays out, -1 if it cannot.
        leave_room: increase of the floor if it stays out.
        joins: the ways in which it may join.
    """

    block: int
    leave: Ints
    leave_room: Ints
    joins: tuple[Join, ...]

    def steps(self) -> Iterator[tuple[Ints, Ints, Join | None]]:
        """To stay out, and each way to join: the state after it, and the increase of the floor."""
        yield self.leave, self.leave_room, None
        for join in self.joins:
            yield join.to, join.room, join


class Near(NamedTuple):
    """Which sets of an automaton a plan may have that is cheaper than a known one, by prices.

    Attributes:
        plan: the known one.
        prices: per block, in 1/:data:`.FINE` bytes.
        most: their reduced cost at most.
        rates: prices of a byte of room.
        before: per layer, price of room and state, the least cost from the empty set, room
            included.
    """

    plan: Sequence[int]
    prices: Ints
    most: int
    rates: Ints
    before: Sequence[Ints]


class Ordered(Protocol):
    """Blocks, then the unfusable operators, in the order of their decisions."""

    @property
    def order(self) -> Sequence[int]: ...

    def classes(self, radius: int) -> Ints:
        """Per fusable block its class: those with equal surroundings up to ``radius`` share one."""
        ...


@dataclass(frozen=True)
class Automaton:
    """The sets of one problem.

    Attributes:
        problem: the problem.
        skeleton: its blocks in the order of their decisions.
        layers: the decisions. The states of the first are the empty set.
        limit: floors of sets that may be legal are less, in bytes.
        besides: masks of the legal groups that it does not have, or at a higher cost.
        merged: whether many states stand for sets that are not alike.
        finer: makes an automaton that has all of its sets that are near, told apart better;
            ``None`` where there is none.
    """

    problem: FusionProblem
    skeleton: Ordered
    layers: tuple[Layer, ...]
    limit: int
    besides: tuple[int, ...] = ()
    merged: bool = False
    finer: Callable[[Near], Automaton | None] | None = None

    @property
    def states(self) -> int:
        """Number of states."""
        return sum(len(layer.leave) for layer in self.layers)

    @property
    def widest(self) -> int:
        """Bytes that no floor exceeds, nor any part of one."""
        return sum(
            max(int(np.abs(room).max(initial=0)) for _, room, _ in layer.steps())
            + max((int(np.abs(join.last_room).max(initial=0)) for join in layer.joins), default=0)
            for layer in self.layers
        )


def fewer_states(layers: Sequence[Layer], limit: int, work: Work) -> tuple[tuple[Layer, ...], Ints]:
    """The backward pass: removes states that cannot end, and merges states with the same future.

    Two states of one layer with the same steps (same changes, to the same states) have the same
    future; so each set keeps its cost, room and ends.

    Returns:
        The layers that are left; and per state of the first what it is now, -1 for none.
    """
    merged: list[Layer] = []
    state = np.zeros(0, np.int64)  # next layer: old state -> new, -1 for none
    after = np.zeros(0, np.int64)  # next layer, by old state: least room up to an end
    for layer, (before, need) in zip(reversed(layers), reversed(rooms(layers, limit)), strict=True):
        work.add(_LAYER + len(before) // _STATES)
        rows: list[npt.NDArray[np.generic]] = []
        for target, room, join in layer.steps():
            found = np.full(len(before), -1, np.int64)
            if len(state):
                (some,) = np.nonzero(target >= 0)
                some = some[before[some] + after[target[some]] + room[some] < limit]
                found[some] = state[target[some]]
            goes = found >= 0
            if join is None:
                rows += [found, np.where(goes, room, 0)]
                continue
            ends = join.ends & (before + join.last_room < limit)
            cost, last_room = np.where(goes | ends, join.cost, 0), np.where(ends, join.last_room, 0)
            rows += [found, ends, cost, np.where(goes, room, 0), last_room]
        table = np.stack(rows)
        (useful,) = np.nonzero(need < NEVER)
        order = useful[np.lexsort(table[:, useful])]
        starts = np.ones(len(order), bool)
        starts[1:] = (table[:, order[1:]] != table[:, order[:-1]]).any(axis=0)
        state = np.full(len(before), -1, np.int64)
        state[order] = np.cumsum(starts) - 1
        leave, leave_room, *rest = table[:, order[starts]]
        joins = [
            Join(to, ends > 0, cost, room, last_room)
            for to, ends, cost, room, last_room in zip(*[iter(rest)] * 5, strict=True)
        ]
        merged.append(Layer(layer.block, leave, leave_room, tuple(joins)))
        after = need
    return tuple(merged[::-1]), state


def rooms(layers: Sequence[Layer], limit: int) -> list[tuple[Ints, Ints]]:
    """Per layer and state, the least room of the sets that reach it, and from there to an end.

    The latter is :data:`NEVER` where none ends within the limit.
    """
    found: list[tuple[Ints, Ints]] = []
    after = np.zeros(0, np.int64)
    for layer, before in zip(reversed(layers), reversed(_least_rooms(layers)), strict=True):
        need = np.full(len(before), NEVER)
        for target, room, join in layer.steps():
            if len(after):
                (some,) = np.nonzero(target >= 0)
                need[some] = np.minimum(need[some], after[target[some]] + room[some])
            if join is not None:
                (some,) = np.nonzero(join.ends)
                need[some] = np.minimum(need[some], join.last_room[some])
        need[before + need >= limit] = NEVER
        found.append((before, need))
        after = need
    return found[::-1]


def _least_rooms(layers: Sequence[Layer]) -> list[Ints]:
    """Per layer and state, the least room of the sets that reach it."""
    least = [np.zeros(len(layer.leave), np.int64) for layer in layers[:1]]
    for layer, after in pairwise(layers):
        room = np.full(len(after.leave), NEVER)
        for target, added, _ in layer.steps():
            (some,) = np.nonzero(target >= 0)
            np.minimum.at(room, target[some], least[-1][some] + added[some])
        least.append(room)
    return least


def distinct(keys: Sequence[npt.NDArray[np.uint64]], room: Ints, some: Ints) -> tuple[Ints, Ints]:
    """Per distinct key of some sets, the set with least room; and each set's number or -1.

    ``keys``: words of the keys, the last of them the most significant; ``room``: of all sets.
    """
    order = np.lexsort((room[some], *keys))
    starts = np.zeros(len(order), bool)
    starts[:1] = True
    for key in keys:
        ordered = key[order]
        starts[1:] |= ordered[1:] != ordered[:-1]
    state = np.full(len(room), -1, np.int64)
    state[some[order]] = np.cumsum(starts) - 1
    return some[order[starts]], state


def packed(rows: Sequence[npt.NDArray[np.integer]], count: int) -> list[npt.NDArray[np.uint64]]:
    """``count`` columns of small numbers as few words each, the last one the most significant."""
    words = [np.zeros(count, np.uint64)]
    used = 0
    for row in rows:
        width = int(row.max(initial=0)).bit_length()
        if used + width > 64:
            words.append(np.zeros(count, np.uint64))
            used = 0
        if width:
            words[-1] |= row.astype(np.uint64) << np.uint64(used)
        used += width
    return words


def renumbered(part: Bytes) -> tuple[Bytes, Ints]:
    """The parts of each set numbered from 1 up by their first tensors, and how many there are."""
    fresh = np.zeros_like(part)
    count = np.zeros(part.shape[1], np.int64)
    for row, first in zip(part, fresh, strict=True):
        new = (row > 0) & (first == 0)
        if new.any():
            count += new
            same = (part == row) & new
            fresh[:] = np.where(same, count.astype(np.uint8), fresh)
    return fresh, count
