"""The automaton of BRR: all sets of blocks of which a way to run in tiles may fit the buffer.

The blocks are decided from the last to the first, each after its readers. So what a set asks of a
tensor is known when its maker is decided: how many rows, at what rate, and whether the maker must
be full, or must not.

A set is several paths. Its weights stay, or are read in so many passes at least and at most
(:class:`.Passes`), which is decided first: it says what weights cost, and how many lines a tile
has. A convolution joins as full or as partial. And the sinks are alike, with so many lines, or of
several strides. A path says what one way to run the set holds at least, and what it moves.
``docs/exact-search.md`` section 5 has the proofs.

Most states that sets reach cannot end within the buffer. An :class:`Outline`, where rows are not
told apart, is built first and says of many of them that they cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from torch_getfuse.errors import OptionError
from torch_getfuse.partition.cost.brr.model import Brr
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.wide.automaton import Automaton, Layer, fewer_states, rooms_to_end
from torch_getfuse.partition.wide.tile_blocks import TileBlock, TileSkeleton
from torch_getfuse.partition.wide.tile_builder import Builder, Passes, Sinks, Way
from torch_getfuse.partition.wide.tile_sets import (
    READ,
    UNEVEN,
    Ints,
    TileSets,
    merged_sets,
)

MOST_STATES = 1_500_000

OUTLINED = 4  # an outline does not tell apart so many passes, or more of them


def some_passes(bounds: Sequence[int]) -> tuple[Passes, ...]:
    """Weights that stay, and passes from each of the bounds, ascending from 1, to the next."""
    ends = [bound - 1 for bound in bounds[1:]] + [0]
    return Passes(1, 0, True), *map(Passes, bounds, ends)


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
    apart, same = _outlined(passes)
    outline = Outline(skeleton, apart, limit).layers(work, most)
    if outline is None:
        return None
    layers = Builder(skeleton, passes, limit, Outlined(outline, limit, same)).layers(work, most)
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


def _outlined(passes: Sequence[Passes]) -> tuple[tuple[Passes, ...], Ints]:
    """The passes that an outline tells apart, and for each of all, which of them has it."""
    few = [one for one in passes if one.stay or one.least < OUTLINED]
    many = [one for one in passes if one not in few]
    if not many:
        return tuple(few), np.arange(len(few))
    same = [few.index(one) if one in few else len(few) for one in passes]
    least = min(one.least for one in many)
    most = 0 if any(not one.most for one in many) else max(one.most for one in many)
    return (*few, Passes(least, most)), np.array(same)


class Outline(Builder):
    """States without rows, lines of sinks, or which convolutions are full.

    Each holds no more than any that it stands for, along each path.
    """

    ASKED = np.uint8(READ | UNEVEN)
    LINES = False

    def _ways(self, block: TileBlock) -> Iterator[Way]:
        sinks = Sinks(block.cumulative, 1)
        if block.stores:
            yield Way(True, sinks, True, None)
        yield Way(False, sinks, True, None)

    def _distinct(self, sets: TileSets) -> tuple[Ints, Ints]:
        return merged_sets(sets)


class Outlined:
    """What an outline knows of sets: the least room up to an end.

    Args:
        layers: of the outline.
        limit: a set that holds as much, in bytes, does not fit.
        same: which passes of the outline each of those that are told apart is among.
    """

    def __init__(self, layers: Sequence[Layer], limit: int, same: Ints) -> None:
        self._layers, self._limit, self._same = layers, limit, same
        self._to_end = rooms_to_end(layers, limit)

    def start(self, nothing: TileSets) -> Ints:
        count = int(self._same.max()) + 1
        before = np.cumsum(np.diff(nothing.differ, prepend=nothing.differ[:1]) != 0)
        started: Ints = before * count + self._same[nothing.passes]
        return started

    def going(
        self, decided: int, way: Way | None, sets: TileSets, came: Ints
    ) -> tuple[TileSets, Ints]:
        if decided + 1 == len(self._layers):
            return sets, came
        layer = self._layers[decided]
        to = layer.leave if way is None else layer.joins[0 if way.full else -1].to
        sets.outline = to[sets.outline]
        (go,) = np.nonzero(sets.outline >= 0)
        need = self._to_end[decided + 1][sets.outline[go]]
        go = go[sets.room[go] + need < self._limit]
        return sets.take(go), came[go]
