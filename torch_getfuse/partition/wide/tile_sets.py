"""Sets of blocks as columns of tables: the states of the automaton of BRR while it is built."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from torch_getfuse.partition.wide.automaton import distinct, packed, renumbered

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

READ, SPILLED, ABOVE, PARTIAL, FULL, UNEVEN, INSIDE, OUTSIDE = (1 << k for k in range(8))
"""Flags of a tensor with respect to a set, by its readers so far: one is in; one is out; one is out
but feeds the set; the maker must not be full if it joins; it must be; it cannot join, for it has no
rate; it must join; it must not."""

ALIKE, TO_DIFFER, DIFFER = 0, 1, 2
"""Sinks of a set: all have one cumulative stride; or they will not, or do not."""


class TileSets:
    """One set per state, as columns; the first are the empty set.

    Attributes:
        state: per open tensor, the flags above.
        rows: per open tensor, how many of its rows are asked for.
        pace: per open tensor, the number of its rate over what its cumulative stride says.
        holds: per block, bytes that it holds if it starts a group; apart of a tensor that others
            may hold.
        held: per such tensor, bytes that are held.
        part: per open reading of a tensor, the number of the part that can grow through it, from 1
            up.
        parts: number of parts of the set.
        passes, sinks, differ: its passes, its sinks if they are alike, and whether they are.
        cost: change of ``F_D`` by the last decision, in bytes.
        room: least bytes that are held.
        outline: state of the outline, if there is one, that knows more of how sets can go on.
    """

    TABLES = "state", "rows", "pace", "holds", "held", "part"
    COLUMNS = "parts", "passes", "sinks", "differ", "cost", "room", "outline"

    state: Bytes
    rows: npt.NDArray[np.int32]
    pace: npt.NDArray[np.uint16]
    holds: Ints
    held: Ints
    part: Bytes
    parts: Ints
    passes: Ints
    sinks: Ints
    differ: Ints
    cost: Ints
    room: Ints
    outline: Ints

    @classmethod
    def empty(cls, passes: int, differ: Sequence[int]) -> TileSets:
        """The empty set, of all ``passes``, whose sinks will be as each of ``differ`` says."""
        sets = cls()
        count = passes * len(differ)
        for name, kind in zip(
            cls.TABLES, (np.uint8, np.int32, np.uint16, np.int64, np.int64, np.uint8), strict=True
        ):
            setattr(sets, name, np.zeros((0, count), kind))
        for name in cls.COLUMNS:
            setattr(sets, name, np.zeros(count, np.int64))
        sets.passes = np.tile(np.arange(passes), len(differ))
        sets.differ = np.repeat(np.array(differ, np.int64), passes)
        return sets

    def __len__(self) -> int:
        return len(self.room)

    def take(self, at: Ints) -> TileSets:
        """Some of the sets."""
        taken = TileSets()
        for name in self.TABLES:
            setattr(taken, name, getattr(self, name).take(at, 1))
        for name in self.COLUMNS:
            setattr(taken, name, getattr(self, name).take(at))
        return taken

    def add_row(self, *tables: str) -> None:
        """Add an empty row to tables."""
        for name in tables:
            table = getattr(self, name)
            setattr(self, name, np.concatenate([table, np.zeros_like(table, shape=(1, len(self)))]))

    @classmethod
    def joined(cls, several: Sequence[TileSets]) -> TileSets:
        """All sets of several lists, one after the other."""
        sets = cls()
        for name in cls.TABLES:
            setattr(sets, name, np.concatenate([getattr(one, name) for one in several], axis=1))
        for name in cls.COLUMNS:
            setattr(sets, name, np.concatenate([getattr(one, name) for one in several]))
        return sets


Key = TypeVar("Key", bound=Hashable)


class OpenRows(Generic[Key]):
    """Rows of tables that are in use, by what they stand for."""

    def __init__(self, *tables: str) -> None:
        self.tables = tables
        self.at: dict[Key, int] = {}
        self._spare: list[int] = []
        self._count = 0

    def open(self, sets: TileSets, key: Key) -> None:
        """Use a row of each table for something, if none is used for it."""
        if key in self.at:
            return
        if not self._spare:
            self._spare.append(self._count)
            self._count += 1
            sets.add_row(*self.tables)
        self.at[key] = self._spare.pop()

    def close(self, sets: TileSets, key: Key) -> None:
        """Empty the rows that are used for something; they are free again."""
        row = self.at.pop(key)
        for table in self.tables:
            getattr(sets, table)[row] = 0
        self._spare.append(row)


def distinct_sets(sets: TileSets) -> tuple[Ints, Ints]:
    """Per distinct state, the set with least room; and each set's state, -1 for none.

    A set that cannot grow has none.
    """
    kept = _growing(sets)
    tables = (sets.state, sets.rows, sets.pace, sets.holds, sets.held, sets.part)
    return distinct(_keys(sets, kept, tables), sets.room, kept)


def merged_sets(sets: TileSets) -> tuple[Ints, Ints]:
    """As :func:`distinct_sets`, of states that differ in rows or in what is held only the least.

    That it holds no more than any of them: each column and row is the least of theirs, but for what
    is held already, to which less is added the more it is.
    """
    kept = _growing(sets)
    tables = sets.state, sets.pace, sets.part
    first, state = distinct(_keys(sets, kept, tables), sets.room, kept)
    if len(first) < len(kept):
        order = kept[np.argsort(state[kept], kind="stable")]
        starts = np.searchsorted(state[order], np.arange(len(first)))
        for name, least in ("rows", np.minimum), ("holds", np.minimum), ("held", np.maximum):
            table = getattr(sets, name)
            table[:, first] = least.reduceat(table.take(order, 1), starts, axis=1)
    return first, state


def _keys(
    sets: TileSets, some: Ints, tables: Iterable[npt.NDArray[np.integer]]
) -> list[npt.NDArray[np.uint64]]:
    """Keys of some sets that tell their states apart, by some of their tables."""
    columns = (sets.passes, sets.sinks, sets.differ, sets.parts.clip(0, 1))
    rows = [row for table in tables for row in table.take(some, 1)]
    return packed([*rows, *(column.take(some) for column in columns)], len(some))


def _growing(sets: TileSets) -> Ints:
    """The sets that can grow; their parts are numbered anew.

    Not those none of whose parts can, or one of whose parts cannot; nor those that a block must
    join which cannot.
    """
    single = sets.parts <= 1
    sets.part = np.where(single, np.minimum(sets.part, 1), sets.part)
    touched = sets.part.any(axis=0)
    alive = touched & single | (sets.parts == 0)
    several = np.flatnonzero(~single & touched)
    if len(several):
        sets.part[:, several], count = renumbered(sets.part[:, several])
        alive[several] = count == sets.parts[several]
    stuck = np.uint8(INSIDE | ABOVE)
    alive &= ~(sets.state & stuck == stuck).any(axis=0)
    return np.flatnonzero(alive)
