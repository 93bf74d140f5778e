"""Exact search over sequences of steps: dynamic programming over down-sets and residents.

After each step of a legal plan the operators that have run are a down-set, and some of the tensors
that it hands on are on chip. What the rest of the plan can cost depends on these two alone. So
the cheapest way to each pair, in the order of the down-sets' sizes, leads to the optimum.

The groups of the next step are grown as in :mod:`..exact.down_sets`: by the ideals of consumers, so
that only connected sets are visited, each once per down-set. A set is given up where its storages
alone do not fit, or where it can only run with weights read again (it fits neither as lines with
all weights held nor in one stripe, and no larger set will) and that is more than a plan up to the
ceiling has left. docs/exact-search.md has the proofs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch_getfuse.partition.cost.cascade.pricing import Beside, least_reread
from torch_getfuse.partition.node_set import bits, is_connected
from torch_getfuse.partition.steps.problem import StepProblem

_GROUP, _PRICE = 60, 25
"""Counted as work for each group that is grown, and for each time that one is priced."""


class Reached(NamedTuple):
    """The cheapest way to a down-set with certain tensors on chip.

    Attributes:
        cost: bytes moved so far.
        steps: their number; of plans with equal traffic the shortest is kept.
        rest: a lower bound of what is left, in bytes.
        before, resident: down-set and residents before the last step.
        mask: the last step.
    """

    cost: int
    steps: int
    rest: int
    before: int
    resident: int
    mask: int


class Found(NamedTuple):
    """A sequence: its steps, the residents between them (mask of tensors), its DRAM bytes."""

    masks: tuple[int, ...]
    residents: int
    dram_bytes: int


class _Grown(NamedTuple):
    """A connected set on its way to a group.

    Attributes:
        mask: its operators.
        after: operators that must run after some of it, members among them.
        at_once: a lower bound of the storages of it and all larger ones in one stripe, in bytes.
        weights: bytes.
        staging: bytes that streaming all of them takes.
    """

    mask: int
    after: int
    at_once: int
    weights: int
    staging: int


class StepSearch:
    """One run of the dynamic program.

    Args:
        problem: graph, cost model, buffer.
        ceiling: bytes; dearer plans are not looked for. ``None``: there is none.
        width: how many pairs of each size of down-set are followed, the most promising;
            ``None``: all, which makes the result the optimum.
    """

    def __init__(
        self, problem: StepProblem, ceiling: int | None = None, width: int | None = None
    ) -> None:
        self.problem = problem
        self.ceiling = math.inf if ceiling is None else ceiling
        self.width = width
        self.groups = 0
        graph = problem.graph
        self.levels: list[dict[int, dict[int, Reached]]] = [{} for _ in range(len(graph) + 1)]
        self.levels[0][0] = {0: Reached(0, 0, problem.unavoidable, 0, 0, 0)}
        self._rest: dict[int, tuple[int, int, int]] = {}

    def run(self) -> Found | None:
        """The cheapest plan up to the ceiling; ``None`` where there is none.

        Raises:
            OutOfWork: where a limit of the problem's work strikes first.
        """
        problem = self.problem
        for level in self.levels[:-1]:
            if self.width is not None:
                level = self._best(level)
            for done in sorted(level):
                self._leave(done, level[done])
        ends = self.levels[-1].get(problem.everything)
        return None if ends is None else self._found(ends[0])

    def _best(self, level: dict[int, dict[int, Reached]]) -> dict[int, dict[int, Reached]]:
        """The most promising pairs of one size."""
        pairs = sorted(
            (
                (reached.cost + reached.rest, reached.steps, done, alive)
                for done, at in level.items()
                for alive, reached in at.items()
            ),
        )[: self.width]
        kept: dict[int, dict[int, Reached]] = {}
        for _, _, done, alive in pairs:
            kept.setdefault(done, {})[alive] = level[done][alive]
        return kept

    def _found(self, last: Reached) -> Found:
        masks, residents = [], 0
        at = last
        while at.mask:
            masks.append(at.mask)
            residents |= at.resident
            at = self.levels[at.before.bit_count()][at.before][at.resident]
        return Found(tuple(reversed(masks)), residents, last.cost)

    def _leave(self, done: int, states: dict[int, Reached]) -> None:
        """Every step that can be next, from a down-set with any residents."""
        slack = self.ceiling - min(r.cost + r.rest for r in states.values())
        for group, next_ in self._grow(done, slack):
            self._reach(done, states, group, next_)

    # -- growing groups -------------------------------------------------------------------

    def _grow(self, done: int, slack: float) -> Iterator[tuple[int, int]]:
        """Connected sets of fusable operators that can run next, each once; and each unfusable one.

        Yields them with the down-set that they lead to.
        """
        problem, graph = self.problem, self.problem.graph
        front: list[tuple[int, _Grown]] = []
        nothing = _Grown(0, 0, 0, 0, 0)
        left = problem.everything & ~done
        for i in bits(left):
            if graph.predecessors[i] & left:
                continue
            unit = problem.blocks[i] & left
            if unit & -unit == 1 << i:
                if unit != 1 << i:
                    # Alone, without what writes over its output, it may run in slices.
                    yield 1 << i, done | 1 << i
                front.append((problem.ideals[i] & left, nothing))
        seen = {mask for mask, _ in front}
        while front:
            mask, part = front.pop()
            problem.work.add(_GROUP)
            self.groups += 1
            if mask & problem.unfusable:
                if not mask & (mask - 1):
                    yield mask, done | mask
                continue
            grown = self._joined(part, mask)
            least = problem.facts.floor(mask, part.mask)
            if least >= problem.buffer_bytes:
                continue
            if self._reads_again(grown, least) > slack:
                if not mask & (mask - 1):
                    yield mask, done | mask  # in slices
                continue
            if not graph.ordered or is_connected(mask, problem.near):
                yield mask, done | mask
            for i in bits(grown.after & ~mask):
                if graph.makers[i] & mask:
                    larger = mask | problem.ideals[i] & left
                    if larger not in seen:
                        seen.add(larger)
                        front.append((larger, grown))

    def _joined(self, part: _Grown, mask: int) -> _Grown:
        problem = self.problem
        after, at_once, weights, staging = part.after, part.at_once, part.weights, part.staging
        touched = 0
        for i in bits(part.mask):
            touched |= problem.facts.touched[i]
        for i in bits(mask & ~part.mask):
            after |= problem.graph.successors[i]
            own = problem.facts.weighted.get(i)
            if own is not None:
                weights += own.size
                staging = max(staging, own.staging)
            for tensor in bits(problem.facts.touched[i] & ~touched):
                at_once += problem.facts.least_at_once[tensor]
            touched |= problem.facts.touched[i]
        return _Grown(mask, after, at_once, weights, staging)

    def _reads_again(self, grown: _Grown, least: int) -> int:
        """Bytes of weights that a set and all larger ones read again at least, in line or stripes.

        Args:
            least: a lower bound of its storages.
        """
        limit = self.problem.buffer_bytes
        if grown.at_once + grown.staging < limit:
            return 0
        return max(0, grown.weights + least - (limit - 1))

    # -- reaching down-sets ---------------------------------------------------------------

    def _reach(self, done: int, states: dict[int, Reached], mask: int, next_: int) -> None:
        """The pairs to which a step leads."""
        problem = self.problem
        facts, size, limit = problem.facts, problem.facts.size, problem.buffer_bytes
        rest, crossing, read_again = self._left(next_)
        if mask & problem.unfusable:
            if 0 in states:
                moved = sum(problem.scheme.unfusable_step(mask).dram)
                owed = rest + sum([size[t] for t in bits(read_again)])
                self._enter(next_, 0, states[0], moved, owed, done, 0, mask)
            return
        group = problem.scheme.group(mask)
        made = group.makes & ~facts.outputs
        written = sum([size[t] for t in bits(group.makes & (facts.outputs | crossing))])
        starting = crossing & problem.may_stay & (group.makes | group.loads & facts.inputs)
        choices = [
            (chosen, sum([size[t] for t in bits(chosen & made)]))
            for chosen in _subsets(
                [t for t in bits(starting) if facts.maker[t] or not facts.readers[t] & done]
            )
        ]
        for alive, reached in states.items():
            moved = written + group.weights
            moved += sum([size[t] for t in bits(group.loads & ~alive)])
            staying = alive & crossing
            others = sum([size[t] for t in bits(alive & ~group.tensors)])
            for chosen, saved in choices:
                now = staying | chosen
                owed = rest + sum([size[t] for t in bits(read_again & ~now)])
                most = self.ceiling - (reached.cost + moved - saved + owed)
                if most < 0:
                    continue
                problem.work.add(_PRICE)
                beside = Beside((alive | chosen) & group.tensors, now & group.tensors, others)
                reread = least_reread(group, beside, limit, most)
                if reread is not None:
                    cost = moved - saved + reread
                    self._enter(next_, now, reached, cost, owed, done, alive, mask)

    def _enter(
        self,
        done: int,
        alive: int,
        reached: Reached,
        moved: int,
        rest: int,
        before: int,
        resident: int,
        mask: int,
    ) -> None:
        """Keep a way to a pair if it is the cheapest, or as cheap with fewer steps."""
        states = self.levels[done.bit_count()].setdefault(done, {})
        known = states.get(alive)
        cost, steps = reached.cost + moved, reached.steps + 1
        if known is None or (cost, steps) < (known.cost, known.steps):
            states[alive] = Reached(cost, steps, rest, before, resident, mask)

    def _left(self, done: int) -> tuple[int, int, int]:
        """What is known of a down-set: a bound of what is left, the tensors that it hands on, and
        those of them that a fusable operator is still to read."""
        found = self._rest.get(done)
        if found is None:
            problem = self.problem
            crossing = problem.crossing(done)
            left = problem.everything & ~done & ~problem.unfusable
            again = sum(1 << t for t in bits(crossing) if problem.facts.readers[t] & left)
            found = self._rest[done] = problem.rest(done), crossing, again
        return found


def _subsets(tensors: Sequence[int]) -> list[int]:
    """Masks of all subsets, the empty one first."""
    found = [0]
    for tensor in tensors:
        found += [mask | 1 << tensor for mask in found]
    return found
