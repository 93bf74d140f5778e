"""What is known of a set of blocks before its rows are: an outline of BRR's automaton.

Most states that sets reach can never end within the buffer. An outline has the same decisions, but
its states do not tell rows, lines of sinks, or which convolutions are full; so they are fewer, and
each holds no more than any of those that it stands for. What it needs up to an end is found from
the end backwards, and says of many sets that they cannot end, before they are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from torch_getfuse.partition.wide.automaton import NEVER, Layer, rooms
from torch_getfuse.partition.wide.tile_blocks import TileBlock, TileSkeleton
from torch_getfuse.partition.wide.tile_builder import Builder, Passes, Way
from torch_getfuse.partition.wide.tile_sets import IN_ROWS, READ, UNEVEN, Ints, TileSets
from torch_getfuse.partition.work import Work

ANY = 1 << 30  # tile lines: more than there are


class Outline:
    """An outline, and what it knows of sets: the least room up to an end.

    Args:
        skeleton: the problem's blocks.
        passes: those that it tells apart.
        limit: a set that holds as much, in bytes, does not fit.
        layers: its decisions.
        merged: whether states were merged that differ in more than it leaves out.
    """

    def __init__(
        self,
        skeleton: TileSkeleton,
        passes: Sequence[Passes],
        limit: int,
        layers: Sequence[Layer],
        merged: bool,
    ) -> None:
        self.skeleton, self.limit = skeleton, limit
        self._passes, self._layers = passes, layers
        self._to_end = [need for _, need in rooms(layers, limit)]
        self.merged = merged
        ending = [int((need < NEVER).sum()) for need in self._to_end]
        shares = np.cumsum([0, *ending]) / max(1, sum(ending))
        self._share: list[float] = shares.tolist()

    @classmethod
    def of(
        cls, skeleton: TileSkeleton, passes: Sequence[Passes], limit: int, work: Work, most: int
    ) -> Outline | None:
        """The outline of a problem; ``None`` for far more than ``most`` states.

        Raises:
            OutOfWork: at a limit.
        """
        builder = _Outlining(skeleton, passes, limit)
        layers = builder.layers(work, most)
        if layers is None:
            return None
        return cls(skeleton, passes, limit, layers, builder.merging.merged)

    def start(self, nothing: TileSets, passes: Sequence[Passes]) -> Ints:
        """States of the empty sets, of passes each of which one range of the outline has."""
        among = np.array([self._among(one) for one in passes])
        before = np.cumsum(np.diff(nothing.differ, prepend=nothing.differ[:1]) != 0)
        started: Ints = before * len(self._passes) + among[nothing.passes]
        return started

    def share(self, decided: int) -> float:
        """The share of all states from which sets end that precedes a decision."""
        return self._share[decided]

    def going(
        self, decided: int, way: Way | None, sets: TileSets, came: Ints
    ) -> tuple[TileSets, Ints]:
        """Those of some sets that may end later, and the states they come from.

        Args:
            decided: number of decisions before the last.
            way: in which a block joined then; ``None`` if it stayed out.
            sets, came: the sets after it, and the states before it.
        """
        if decided + 1 == len(self._layers):
            return sets, came
        layer = self._layers[decided]
        to = layer.leave if way is None else layer.joins[0 if way.full else -1].to
        sets.outline = to[sets.outline]
        (go,) = np.nonzero(sets.outline >= 0)
        need = self._to_end[decided + 1][sets.outline[go]]
        go = go[sets.room[go] + need < self.limit]
        return sets.take(go), came[go]

    def _among(self, one: Passes) -> int:
        """The number of the range that has all passes of one."""
        return next(
            k
            for k, other in enumerate(self._passes)
            if other.stay == one.stay
            and other.least <= one.least
            and (not other.most or 0 < one.most <= other.most)
        )


class _Outlining(Builder):
    """Makes the layers of an outline."""

    ASKED: ClassVar[np.uint8] = np.uint8(READ | UNEVEN)
    UNTOLD: ClassVar[Sequence[str]] = (*IN_ROWS, "spilled")
    MERGED: ClassVar[Sequence[str]] = ("sinks", "parts", "paces")

    def _ways(self, block: TileBlock) -> Iterator[Way]:
        lines = 1, ANY
        if block.stores:
            yield Way(True, lines, True, None)
        yield Way(False, lines, True, None)
