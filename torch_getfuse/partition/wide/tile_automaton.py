"""The automaton of BRR: all sets of blocks of which a way to run in tiles may fit the buffer.

The blocks are decided from the last to the first, each after its readers. So what a set asks of a
tensor is known when its maker is decided: how many rows, at what rate, and whether the maker must
be full, or must not.

A set is several paths. Its weights stay, or are read in so many passes at least and at most
(:class:`.Passes`), which is decided first: it says what weights cost, and how many lines a tile
has. A convolution joins as full or as partial. And the sinks are alike, with so many lines, or of
several strides. A path says what one way to run the set holds at least, and what it moves.
``docs/exact-search.md`` section 5 has the proofs.

An outline (:mod:`.tile_outline`) says of most sets that cannot end within the buffer that they
cannot. Where there are too many states still, those are merged that differ least
(:class:`.Merging`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from torch_getfuse.errors import OptionError
from torch_getfuse.partition.cost.brr.model import Brr
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.wide.automaton import Automaton, Near, fewer_states
from torch_getfuse.partition.wide.tile_blocks import TileSkeleton
from torch_getfuse.partition.wide.tile_builder import Builder
from torch_getfuse.partition.wide.tile_guide import Guide, Passes, Priced
from torch_getfuse.partition.wide.tile_outline import Outline

MOST_STATES, MOST_OUTLINED = 1_300_000, 280_000

MERGED_STATES, FINER_STATES = 350_000, 700_000
"""States where those of the outline had to be merged: then those of the automaton are in any case,
and more of them leave less time for prices; and of the finer automata after it."""

FEWER = 0.25
"""Share of the states that are near for which a finer automaton is made where few were merged."""

OUTLINED = 1, 2
PASSES, MORE_PASSES = (1, 2, 3, 4, 6, 12, 64), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Least passes of the ranges that are told apart: in an outline and a large automaton; in others;
and in those where a plan reads :data:`MUCH` in several."""

MUCH = 0.1  # share of a plan

MANY_PASSES = 10
"""Passes that finer automata tell apart as well where states of the outline had to be merged: of
what reads its weights twice or more, what is cheapest in the others reads them often."""

PLANNED, LEAST_PLANNED = (2, 6), 0.01
"""Passes of a plan that are told apart as well: in a large automaton, in others; and the share of
it that is read in so many."""


def some_passes(bounds: Sequence[int]) -> tuple[Passes, ...]:
    """Weights that stay, and passes from each of the bounds, ascending from 1, to the next."""
    ends = [bound - 1 for bound in bounds[1:]] + [0]
    return Passes(1, 0, True), *map(Passes, bounds, ends)


def tile_automaton(
    problem: FusionProblem, bounds: Sequence[int], most: int = MOST_STATES
) -> Automaton | None:
    """The automaton of a BRR problem; ``None`` for far more than ``most`` states.

    ``bounds``: least passes of the ranges that are told apart, ascending from 1.

    Blocks alone, and those that may run in slices, are not among its sets.

    Raises:
        OptionError: for a scheme other than BRR.
        OutOfWork: if a limit on work is reached.
    """
    outline = _outline(problem, _outlined(some_passes(bounds)), min(most, MOST_OUTLINED))
    return None if outline is None else _making(problem, outline).automaton(outline, bounds, most)


def automaton_near(problem: FusionProblem, plan: Sequence[int]) -> Automaton | None:
    """The automaton of a BRR problem that tells apart the passes of a plan.

    So its groups cost what they do. ``None`` and errors: as :func:`tile_automaton`.
    """
    outline = _outline(problem, some_passes(OUTLINED), MOST_OUTLINED)
    if outline is None:
        return None
    most = MERGED_STATES if outline.merged else MOST_STATES
    making = _making(problem, outline)
    return making.automaton(outline, _bounds(problem, plan, making.large), most)


def _making(problem: FusionProblem, outline: Outline) -> _Making:
    alone = _alone(problem, _brr(problem))
    return _Making(problem, outline.skeleton, outline.limit, alone, outline.merged)


def _outline(problem: FusionProblem, passes: Sequence[Passes], most: int) -> Outline | None:
    skeleton = TileSkeleton.of(problem, _brr(problem))
    limit = problem.evaluator.buffer_bytes + 1  # a tile may fill the buffer to the last byte
    return Outline.of(skeleton, passes, limit, problem.evaluator.work, most)


@dataclass(frozen=True)
class _Making:
    """Makes automata of one problem, each by what another knows.

    Attributes:
        problem: the problem.
        skeleton: its blocks.
        limit: a set that holds as much, in bytes, does not fit.
        alone: what is priced apart.
        large: whether states of the outline were merged. Then those of automata are, and few passes
            are told apart.
    """

    problem: FusionProblem
    skeleton: TileSkeleton
    limit: int
    alone: tuple[int, ...]
    large: bool = False

    def automaton(self, guide: Guide, bounds: Sequence[int], most: int) -> Automaton | None:
        """One of about ``most`` states; ``None`` where that is far too few.

        ``bounds``: least passes of the ranges that are told apart.
        """
        work, passes = self.problem.evaluator.work, some_passes(bounds)
        builder = Builder(self.skeleton, passes, self.limit, guide)
        layers = builder.layers(work, most)
        if layers is None:
            return None
        fewer, states = fewer_states(layers, self.limit, work)
        made = Automaton(self.problem, self.skeleton, fewer, self.limit, self.alone, self.large)
        starts = np.where(builder.starts < 0, -1, states[builder.starts])

        def finer(near: Near) -> Automaton | None:
            if not made.states:
                return None
            more = {*bounds, *_bounds(self.problem, near.plan, self.large)}
            if self.large:
                more.add(MANY_PASSES)
            guide = Priced(made, passes, starts, near)
            useful = self.large or len(more) > len(bounds) or guide.within < FEWER * made.states
            states = FINER_STATES if self.large else most
            return self.automaton(guide, sorted(more), states) if useful else None

        return replace(made, finer=finer)


def _outlined(passes: Sequence[Passes]) -> tuple[Passes, ...]:
    """The passes that an outline tells apart: the highest of them are one range."""
    few = [one for one in passes if one.stay or one.least < OUTLINED[-1]]
    many = [one for one in passes if one not in few]
    if not many:
        return tuple(few)
    most = 0 if any(not one.most for one in many) else max(one.most for one in many)
    return (*few, Passes(min(one.least for one in many), most))


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
