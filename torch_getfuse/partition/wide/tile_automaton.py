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

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from torch_getfuse.errors import OptionError
from torch_getfuse.partition.cost.brr.model import Brr
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.wide.automaton import NEVER, Automaton, Layer, fewer_states, rooms_to_end
from torch_getfuse.partition.wide.tile_blocks import TileBlock, TileSkeleton
from torch_getfuse.partition.wide.tile_builder import Builder, Passes, Way
from torch_getfuse.partition.wide.tile_sets import (
    READ,
    UNEVEN,
    Ints,
    TileSets,
)

MOST_STATES, MOST_OUTLINED = 1_200_000, 300_000

LARGE, MERGED_STATES = 200_000, 300_000
"""States of an outline where the automaton would be far too large, and how many it has then: they
are merged in any case, and more of them leave less time for prices."""

ANY = 1 << 30  # tile lines: more than there are

OUTLINED = 1, 2
PASSES, MORE_PASSES = (1, 2, 3, 4, 6, 12, 64), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Least passes of the ranges that are told apart: in an outline and a large automaton; in others;
and in those where a plan reads :data:`MUCH` in several."""

MUCH = 0.1  # share of a plan

PLANNED, LEAST_PLANNED = (2, 6), 0.01
"""Passes of a plan that are told apart as well: in a large automaton, in others; and the share of
it that is read in so many."""


def some_passes(bounds: Sequence[int]) -> tuple[Passes, ...]:
    """Weights that stay, and passes from each of the bounds, ascending from 1, to the next."""
    ends = [bound - 1 for bound in bounds[1:]] + [0]
    return Passes(1, 0, True), *map(Passes, bounds, ends)


def tile_automaton(
    problem: FusionProblem, passes: Sequence[Passes], most: int = MOST_STATES
) -> Automaton | None:
    """The automaton of a BRR problem; ``None`` for far more than ``most`` states.

    Blocks alone, and those that may run in slices, are not among its sets.

    Raises:
        OptionError: for a scheme other than BRR.
        OutOfWork: if a limit on work is reached.
    """
    outline = _Outlined.of(problem, _outlined(passes), min(most, MOST_OUTLINED))
    return None if outline is None else outline.automaton(passes, most)


def automaton_near(problem: FusionProblem, plan: Sequence[int]) -> Automaton | None:
    """The automaton of a BRR problem that tells apart the passes of a plan.

    So its groups cost what they do. ``None`` and errors: as :func:`tile_automaton`.
    """
    outline = _Outlined.of(problem, some_passes(OUTLINED), MOST_OUTLINED)
    if outline is None:
        return None
    large = outline.states > LARGE
    passes = some_passes(_bounds(problem, plan, large))
    return outline.automaton(passes, MERGED_STATES if large else MOST_STATES)


def _bounds(problem: FusionProblem, plan: Sequence[int], large: bool) -> list[int]:
    """Least passes of the ranges to tell apart; those in which groups of a plan read much."""
    scheme, buffer_bytes = _brr(problem), problem.evaluator.buffer_bytes
    read: Counter[int] = Counter()
    for group in set(plan).difference(problem.blocks):
        again = scheme.reread(group, buffer_bytes)
        weights = sum(scheme.weights[i] for i in bits(group))
        if again:
            read[1 + again // weights] += again + weights
    cost = problem.cost(tuple(plan))
    most = read.most_common(PLANNED[not large])
    planned = [passes for passes, bytes_ in most if bytes_ >= LEAST_PLANNED * cost]
    bounds = MORE_PASSES if read.total() >= MUCH * cost else PASSES
    return sorted({*(OUTLINED if large else bounds), *planned})


def _brr(problem: FusionProblem) -> Brr:
    scheme = problem.evaluator.scheme
    if not isinstance(scheme, Brr):
        raise OptionError(f"no tiles in scheme {scheme.name!r}; there are in 'brr'")
    return scheme


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


def _outlined(passes: Sequence[Passes]) -> tuple[Passes, ...]:
    """The passes that an outline tells apart: the highest of them are one range."""
    few = [one for one in passes if one.stay or one.least < OUTLINED[-1]]
    many = [one for one in passes if one not in few]
    if not many:
        return tuple(few)
    most = 0 if any(not one.most for one in many) else max(one.most for one in many)
    return (*few, Passes(min(one.least for one in many), most))


def _among(one: Passes, several: Sequence[Passes]) -> int:
    """The number of the range that has all passes of one."""
    return next(
        k
        for k, other in enumerate(several)
        if other.stay == one.stay
        and other.least <= one.least
        and (not other.most or 0 < one.most <= other.most)
    )


class Outline(Builder):
    """States without rows, lines of sinks, or which convolutions are full.

    Each holds no more than any that it stands for, along each path.
    """

    ASKED = np.uint8(READ | UNEVEN)
    UNTOLD = "held", "inside", "outside", "rows", "full", "lines", "spilled"
    MERGED = "sinks", "parts", "paces", "read"

    def _ways(self, block: TileBlock) -> Iterator[Way]:
        lines = 1, ANY
        if block.stores:
            yield Way(True, lines, True, None)
        yield Way(False, lines, True, None)


class _Outlined:
    """An outline, and what it knows of sets: the least room up to an end.

    Args:
        problem, skeleton: the problem.
        passes: those that the outline tells apart.
        layers: of the outline.
    """

    def __init__(
        self,
        problem: FusionProblem,
        skeleton: TileSkeleton,
        passes: Sequence[Passes],
        layers: Sequence[Layer],
    ) -> None:
        self.problem, self.skeleton = problem, skeleton
        self._passes, self._layers = passes, layers
        self._same = np.zeros(0, np.int64)  # of each of the passes that are told apart now
        self._limit = _limit(problem)
        self._to_end = rooms_to_end(layers, self._limit)
        ending = np.array([(need < NEVER).sum() for need in self._to_end])
        self._share = np.cumsum([0, *ending]) / ending.sum()

    @classmethod
    def of(cls, problem: FusionProblem, passes: Sequence[Passes], most: int) -> _Outlined | None:
        """The outline of a problem, if it has not far more than ``most`` states."""
        skeleton = TileSkeleton.of(problem, _brr(problem))
        outline = Outline(skeleton, passes, _limit(problem))
        layers = outline.layers(problem.evaluator.work, most)
        return None if layers is None else cls(problem, skeleton, passes, layers)

    @property
    def states(self) -> int:
        """Number of states."""
        return sum(len(layer.leave) for layer in self._layers)

    def automaton(self, passes: Sequence[Passes], most: int) -> Automaton | None:
        """The automaton that tells apart passes, each in those of one range of the outline."""
        problem, limit = self.problem, self._limit
        work = problem.evaluator.work
        self._same = np.array([_among(one, self._passes) for one in passes])
        layers = Builder(self.skeleton, passes, limit, self).layers(work, most)
        if layers is None:
            return None
        fewer = fewer_states(layers, limit, work)
        return Automaton(problem, self.skeleton, fewer, limit, _alone(problem, _brr(problem)))

    # -- as a guide -----------------------------------------------------------------------

    def start(self, nothing: TileSets) -> Ints:
        before = np.cumsum(np.diff(nothing.differ, prepend=nothing.differ[:1]) != 0)
        started: Ints = before * len(self._passes) + self._same[nothing.passes]
        return started

    def share(self, decided: int) -> float:
        found: float = self._share[decided]
        return found

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


def _limit(problem: FusionProblem) -> int:
    """A tile may fill the buffer to the last byte."""
    return problem.evaluator.buffer_bytes + 1
