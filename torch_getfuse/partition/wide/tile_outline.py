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

from torch_getfuse.partition.wide.automaton import Layer
from torch_getfuse.partition.wide.tile_blocks import TileBlock, TileSkeleton
from torch_getfuse.partition.wide.tile_builder import Builder
from torch_getfuse.partition.wide.tile_guide import Guide, Passes, Step, Way
from torch_getfuse.partition.wide.tile_sets import (
    BARRED,
    FAR,
    IN_ROWS,
    READ,
    Flags,
    Ints,
    TileSets,
)
from torch_getfuse.partition.work import Work

ANY = 1 << 30  # tile lines: more than there are


class Outline(Guide):
    """An outline, and what it knows of sets.

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
        super().__init__(layers, limit, passes, np.arange(len(layers[0].leave)))
        self.skeleton, self.merged = skeleton, merged

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

    def _following(self, step: Step) -> Ints:
        layer, way = self.layers[step.decided], step.way
        return layer.leave if way is None else layer.joins[0 if way.full else -1].to

    def sourced(self, step: Step, sets: TileSets) -> Flags:
        return np.zeros(len(sets), bool)  # it does not tell


class _Outlining(Builder):
    """Makes the layers of an outline."""

    ASKED: ClassVar[np.uint8] = np.uint8(READ | BARRED)
    UNTOLD: ClassVar[Sequence[str]] = (*IN_ROWS, "spilled")
    MERGED: ClassVar[Sequence[str]] = ("sinks", "parts", "paces", FAR)

    def _ways(self, block: TileBlock) -> Iterator[Way]:
        lines = 1, ANY
        if block.stores:
            yield Way(True, lines, True, None)
        yield Way(False, lines, True, None)
