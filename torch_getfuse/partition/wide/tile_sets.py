"""Sets of blocks as columns of tables: the states of the automaton of BRR while it is built."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from torch_getfuse.partition.wide.automaton import distinct, packed, renumbered

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]

READ, SPILLED, ABOVE, PARTIAL, FULL, BARRED, INSIDE, MAYBE = (1 << k for k in range(8))
"""Flags of a tensor with respect to a set, by its readers so far: one is in; one is out; one is out
but feeds the set; the maker must not be full if it joins; it must be; it cannot join, for it has no
rate, or must not; it must join; nothing is known of the tensor but that one may be in."""

PAID = READ | MAYBE
"""Flags of a tensor that is not paid for again."""

ALIKE, TO_DIFFER, DIFFER = 0, 1, 2
"""Sinks of a set: all have one cumulative stride; or they will not, or do not."""


_FLAGS = {
    "inside": INSIDE,
    "full": PARTIAL | FULL,
    "spilled": SPILLED,
}
_TABLES = {"parts": ("part",), "rows": ("rows",), "paces": ("pace",), "held": ("holds", "held")}

IN_ROWS = "held", "inside", "rows", "full", "lines"
"""What says how many rows a set holds, and need not tell states apart, from what matters least on:
tables and flags above, and tile lines of sinks that are alike."""

FAR = "far"  # all that is known of streams that are touched again after many decisions only


class TileSets:
    """One set per state, as columns; the first are the empty set.

    Attributes:
        state: per open tensor, the flags above.
        rows: per open tensor, how many of its rows are asked for.
        pace: per open tensor, the number of its rate over what its cumulative stride says.
        holds: per block, bytes that it holds if it starts a group; apart of a tensor that others
            may hold.
        held: per such tensor, bytes that are held.
        hopes: per price of room, the least cost of the set so far, room and prices included.
        part: per open reading of a tensor, the number of the part that can grow through it, from 1
            up.
        parts: number of parts of the set.
        passes: the number of its passes.
        differ: whether its sinks are alike.
        common, lines, tall: if they are, the number of their stride, and tile lines at least and at
            most.
        cost: change of ``F_D`` by the last decision, in bytes.
        room: least bytes that are held.
        outline: state of the outline, if there is one, that knows more of how sets can go on.
    """

    TABLES = "state", "rows", "pace", "holds", "held", "part", "hopes"
    COLUMNS = "parts", "passes", "differ", "common", "lines", "tall", "cost", "room", "outline"

    state: Bytes
    rows: npt.NDArray[np.int32]
    pace: npt.NDArray[np.uint16]
    holds: Ints
    held: Ints
    part: Bytes
    hopes: Ints
    parts: Ints
    passes: Ints
    differ: Ints
    common: Ints
    lines: Ints
    tall: Ints
    cost: Ints
    room: Ints
    outline: Ints

    @classmethod
    def empty(cls, passes: int, differ: Sequence[int]) -> TileSets:
        """The empty set, of all ``passes``, whose sinks will be as each of ``differ`` says."""
        sets = cls()
        count = passes * len(differ)
        kinds = np.uint8, np.int32, np.uint16, np.int64, np.int64, np.uint8, np.int64
        for name, kind in zip(cls.TABLES, kinds, strict=True):
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

    def let_differ(self, some: Flags) -> None:
        """Some of the sets have sinks that are not alike; nothing is known of their lines."""
        self.differ[some] = DIFFER
        for column in self.common, self.lines, self.tall:
            column[some] = 0

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


class Far(NamedTuple):
    """Rows of tables that are about streams which no decision touches for long.

    Attributes:
        streams: of the tables by stream.
        readings: of the parts.
    """

    streams: Ints
    readings: Ints


class Merging:
    """What tells the states of each layer apart.

    Args:
        untold: what does not tell states apart: some of :data:`IN_ROWS`, "spilled", "parts" and
            "paces" (flags and tables), "sinks", whether they are alike, and :data:`FAR`.
        more: further ones, each of which does not either, in this order, while there are too many.
        outlined: whether what an outline knows does, if nothing else tells two sets apart.

    Attributes:
        merged: whether it came to that. Then sets of one state may differ in what an outline knows.
    """

    def __init__(self, untold: Sequence[str], more: Sequence[str], outlined: bool) -> None:
        self.untold, self.more, self.outlined = untold, more, outlined
        self.merged = False

    def told_apart(self, sets: TileSets, width: int, far: Far) -> tuple[Ints, Ints]:
        """Per distinct state, a set for all that are in it; and each set's state, -1 for none.

        A set that cannot grow has none. Of at most ``width`` states none are merged but those that
        differ in what is untold. What stands for several sets holds no more than any of them, and
        can go on as all of them.
        """
        kept = _growing(sets)
        for what in self.untold:
            _untell(sets, what, far)
        for count in range(len(self.more) + 1):
            untold = (*self.untold, *self.more[:count])
            if count:
                _untell(sets, self.more[count - 1], far)
                self.merged = True
            first, state = _distinct(sets, kept, untold, self.outlined or self.merged)
            if len(first) <= width:
                break
        if (untold or len(sets.hopes)) and len(first) < len(kept):
            _least(sets, kept, first, state, alike=not untold)
        return first, state


def _untell(sets: TileSets, what: str, far: Far) -> None:
    """Erase flags, or columns, that are not told apart."""
    if what in _FLAGS:
        sets.state &= ~np.uint8(_FLAGS[what])
    elif what == "sinks":
        sets.let_differ(sets.parts > 0)
    elif what == "parts":
        sets.part = np.minimum(sets.part, 1)
        sets.parts = np.minimum(sets.parts, 1)
    elif what == FAR and len(far.streams):
        _untell_far(sets, far)


def _untell_far(sets: TileSets, far: Far) -> None:
    """Erase what is known of streams that are touched again after long.

    Who reads or makes one then pays as if it were read and not written, and nothing is asked of it.
    The maker may be no sink, so sinks that are to differ need no other one to.
    """
    some = sets.parts > 0
    (columns,) = np.nonzero(some)
    for table, value in (sets.state, MAYBE), (sets.rows, 1), (sets.pace, 0):
        table[np.ix_(far.streams, columns)] = value
    sets.let_differ(some & (sets.differ == TO_DIFFER))
    (columns,) = np.nonzero((sets.part[far.readings] > 0).any(axis=0))
    sets.part[:, columns] = np.minimum(sets.part[:, columns], 1)
    sets.parts[columns] = 1
    (columns,) = np.nonzero(sets.parts == 1)
    sets.part[np.ix_(far.readings, columns)] = 1


def _distinct(
    sets: TileSets, kept: Ints, untold: Sequence[str], outlined: bool
) -> tuple[Ints, Ints]:
    """Per distinct state, the set with least room; and each set's state, or -1."""
    columns = [sets.passes, sets.differ, sets.common, sets.parts.clip(0, 1)]
    if "lines" not in untold:
        columns += [sets.lines, sets.tall]
    if outlined:
        columns.append(sets.outline)
    rows = [*sets.state.take(kept, 1)]
    for what, tables in _TABLES.items():
        if what not in untold:
            rows += [row for name in tables for row in getattr(sets, name).take(kept, 1)]
    keys = packed([*rows, *(column.take(kept) for column in columns)], len(kept))
    return distinct(keys, sets.room, kept)


def _least(sets: TileSets, kept: Ints, first: Ints, state: Ints, alike: bool) -> None:
    """Make one set per state what is true of all of them: columns of ``first``.

    ``alike``: whether those of one state differ in nothing but the cost of the way to them.
    """
    order = kept[np.argsort(state[kept], kind="stable")]
    starts = np.searchsorted(state[order], np.arange(len(first)))
    tables = (
        ("hopes", np.minimum),
        ("rows", np.minimum),
        ("holds", np.minimum),
        ("held", np.maximum),
        ("part", np.maximum),
    )
    for name, least in tables[:1] if alike else tables:
        table = getattr(sets, name)
        table[:, first] = least.reduceat(table.take(order, 1), starts, axis=1)
    if alike:
        return
    paces = sets.pace.take(order, 1)
    lowest = np.minimum.reduceat(paces, starts, axis=1)
    sets.pace[:, first] = np.where(lowest == np.maximum.reduceat(paces, starts, axis=1), lowest, 0)
    sets.lines[first] = np.minimum.reduceat(sets.lines[order], starts)
    sets.tall[first] = np.maximum.reduceat(sets.tall[order], starts)


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
