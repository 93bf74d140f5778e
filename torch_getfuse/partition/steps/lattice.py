"""The down-sets of a graph and the steps between them, with lower bounds of what is left.

After each step of a legal plan the operators that have run are a down-set. The groups of the next
step are grown as in :mod:`..exact.down_sets`: by the ideals of consumers, so that only connected
sets are visited, each once per down-set. A set is given up where its storages alone do not fit, or
where it can only run with weights read again (it fits neither as lines with all weights held nor in
one stripe, and no larger set will) and that is more than a plan up to the ceiling has left.

Each step has two *relaxed* prices, which no plan goes below whatever is resident. Each lets the
step choose which of the tensors on its border are resident, as if no other step had to agree and
nothing else were on chip. In the first, a tensor is paid for where it is written and where it is
read; in the second, the first read of a tensor that was written is paid for with the write. The
cheapest chain of relaxed prices to the end bounds what is left after a down-set.
docs/exact-search.md has the proofs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch_getfuse.partition.cost.cascade.groups import Group
from torch_getfuse.partition.cost.cascade.pricing import ANY, Beside, least_in_stripes, slices
from torch_getfuse.partition.cost.scheme import counted
from torch_getfuse.partition.node_set import bits, is_connected
from torch_getfuse.partition.steps.problem import StepProblem
from torch_getfuse.partition.work import OutOfWork

_GROUP, _PRICED, _SUBSETS, _AGAIN = 40, 25, 120, 8
"""Steps counted for each group that is grown, for its relaxed prices, where sets of residents
beside it are tried, and for each of these."""

_EARLY, _GROWN_BY_THEN = 1 / 3, 1 / 4
"""When so much of the steps that are allowed are counted, down-sets of so many of the operators are
to be grown."""

_MOST_CHOICES = 8  # tensors on the border of a step of which all subsets are tried


class TooWide(Exception):
    """The graph has more down-sets and groups than the limit allows."""


class Edge(NamedTuple):
    """A step from one down-set to another.

    Attributes:
        mask: its operators.
        next: the down-set that it leads to.
        moved: the relaxed price by which each tensor is paid for where it crosses, in bytes.
        owing: that by which the first read is paid for with the write.
    """

    mask: int
    next: int
    moved: int
    owing: int


class Left(NamedTuple):
    """Lower bounds of what is left after a down-set, or of what went before it, in bytes.

    Attributes:
        moved: of all that the steps move, each tensor paid for where it crosses.
        owing: the same, the first read of what is written paid for with the write.
    """

    moved: int
    owing: int


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


class Lattice:
    """The down-sets that plans up to a ceiling can go through.

    Args:
        problem: graph, cost model, buffer.
        ceiling: bytes; steps that only dearer plans take are left out.
        most: groups to grow at most.
        fixed: by down-set, the only step from it; between two of them, all steps are grown.
        inside: mask of the operators of which steps are grown.

    Attributes:
        edges: by down-set, the steps from it.
        left: by down-set, what is left.
        groups: that were grown.
    """

    def __init__(
        self,
        problem: StepProblem,
        ceiling: int = ANY,
        most: int = ANY,
        fixed: Mapping[int, int] | None = None,
        inside: int = -1,
    ) -> None:
        self.problem, self.ceiling = problem, ceiling
        self.inside, self._fixed, self._most = inside, fixed or {}, most
        self.groups = 0
        self.edges: dict[int, list[Edge]] = {}
        self.left: dict[int, Left] = {}
        self._ahead: dict[int, Left] = {0: Left(0, 0)}
        self._levels: list[set[int]] = [set() for _ in range(len(problem.graph) + 1)]
        self._levels[0].add(0)
        self._grown: set[int] = set()  # down-sets of which the steps are known

    def build(self, ceiling: int | None = None, early: bool = False) -> Lattice:
        """Grow the steps of all down-sets; where a limit has ended that, go on.

        Args:
            ceiling: a lower one than before. Steps that are grown already stay until all are.
            early: whether to end as soon as it is plain that the limit will strike.

        Raises:
            TooWide: where the most groups are reached.
            OutOfWork: where a limit of the problem's work strikes first.
        """
        self.ceiling = self.ceiling if ceiling is None else ceiling
        work = self.problem.work
        self._grow_all(work.steps + work.steps_left * _EARLY if early else math.inf)
        self._bound()
        return self

    @property
    def bound(self) -> int:
        """No plan moves fewer bytes; above the ceiling where none keeps to it."""
        start = self.left.get(0)
        return self.ceiling + 1 if start is None else max(start)

    def _grow_all(self, look_at: float) -> None:
        problem = self.problem
        for operators, level in enumerate(self._levels[:-1]):
            if problem.work.steps > look_at:
                look_at = math.inf
                share = operators / len(problem.graph)
                if share < _GROWN_BY_THEN:
                    raise OutOfWork(
                        f"{share:.0%} of its operators in {_EARLY:.0%} of its work limit"
                    )
            for done in sorted(level - self._grown):
                ahead = self._ahead[done]
                slack = self.ceiling - max(ahead) - problem.rest(done)
                edges: list[Edge] = []
                only = self._fixed.get(done)
                grown = self._grow(done, slack) if only is None else [only]
                for mask in grown if slack >= 0 else ():
                    edge = counted(problem.scheme, problem.work, self._priced, done, mask)
                    if edge is None:
                        continue
                    edges.append(edge)
                    self._levels[edge.next.bit_count()].add(edge.next)
                    reached = Left(ahead.moved + edge.moved, ahead.owing + edge.owing)
                    known = self._ahead.get(edge.next, reached)
                    self._ahead[edge.next] = Left(*map(min, zip(known, reached, strict=True)))
                self.edges[done] = edges
                self._grown.add(done)

    def _bound(self) -> None:
        """Bounds from the end, and only the steps that a plan up to the ceiling can take."""
        self.left = {self.problem.everything: Left(0, 0)}
        for done in sorted(self.edges, key=int.bit_count, reverse=True):
            kept, ahead = [], self._ahead[done]
            moved = owing = ANY
            for edge in self.edges[done]:
                after = self.left.get(edge.next)
                if after is None:
                    continue
                if ahead.moved + edge.moved + after.moved > self.ceiling:
                    continue
                if ahead.owing + edge.owing + after.owing > self.ceiling:
                    continue
                kept.append(edge)
                moved = min(moved, edge.moved + after.moved)
                owing = min(owing, edge.owing + after.owing)
            if kept:
                self.edges[done] = kept
                self.left[done] = Left(moved, owing)
            else:
                del self.edges[done]

    # -- growing groups -------------------------------------------------------------------

    def _grow(self, done: int, slack: int) -> Iterator[int]:
        """Connected sets of fusable operators that can run next, each once; each unfusable one."""
        problem, graph = self.problem, self.problem.graph
        front: list[tuple[int, _Grown]] = []
        nothing = _Grown(0, 0, 0, 0, 0)
        left = problem.everything & ~done & self.inside
        pins = problem.pins
        for i in bits(left):
            if graph.predecessors[i] & left:
                continue
            unit = problem.blocks[i] & left
            if unit & -unit == 1 << i:
                if unit != 1 << i and pins.allow(1 << i):
                    yield 1 << i  # without what writes over its output it may run in slices
                front.append((problem.ideals[i] & left, nothing))
        seen = {mask for mask, _ in front}
        while front:
            mask, part = front.pop()
            problem.work.add(_GROUP)
            self.groups += 1
            if self.groups > self._most:
                raise TooWide(f"more than {self._most} groups on its down-sets")
            alone = not mask & (mask - 1)
            if mask & problem.unfusable:
                if alone:
                    yield mask
                continue
            if pins.torn(mask):
                continue
            grown = self._joined(part, mask)
            least = problem.facts.floor(mask, part.mask)
            if least >= problem.buffer_bytes:
                continue
            if self._reads_again(grown, least) > slack:
                if alone and pins.allow(mask):
                    yield mask  # in slices
                continue
            if pins.allow(mask) and (not graph.ordered or is_connected(mask, problem.near)):
                yield mask
            for i in bits(grown.after & left & ~mask):
                if graph.makers[i] & mask:
                    larger = mask | problem.ideals[i] & left
                    if larger not in seen:
                        seen.add(larger)
                        front.append((larger, grown))

    def _joined(self, part: _Grown, mask: int) -> _Grown:
        facts = self.problem.facts
        after, at_once, weights, staging = part.after, part.at_once, part.weights, part.staging
        touched = facts.touching(part.mask)
        for i in bits(mask & ~part.mask):
            after |= self.problem.graph.successors[i]
            own = facts.weighted.get(i)
            if own is not None:
                weights += own.size
                staging = max(staging, own.staging)
            for tensor in bits(facts.touched[i] & ~touched):
                at_once += facts.least_at_once[tensor]
            touched |= facts.touched[i]
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

    # -- relaxed prices -------------------------------------------------------------------

    def _priced(self, done: int, mask: int) -> Edge | None:
        """The step with its relaxed prices.

        ``None`` where it does not fit, or leads above the ceiling, whatever is resident.
        """
        problem, facts = self.problem, self.problem.facts
        next_ = done | mask
        problem.work.add(_PRICED)
        if mask & problem.unfusable:
            step = problem.scheme.unfusable_step(mask).dram
            after = problem.handed(done, mask).to_read & ~problem.handed(done).to_read
            owed = sum([facts.size[t] for t in bits(after)])
            return Edge(mask, next_, step.total, step.total + owed)
        room = self.ceiling - problem.rest(done, mask)
        group = problem.scheme.group(mask)
        handed, to_read = problem.handed(done, mask)
        if handed & problem.kept & ~problem.may_stay:
            return None
        before = problem.handed(done).tensors
        size, outputs = facts.size, facts.outputs
        moved = owing = group.weights
        # (tensor, bytes saved if it is resident) by the one and the other price.
        moves: list[tuple[int, int]] = []
        owes: list[tuple[int, int]] = []
        for t in bits(group.makes & (handed | outputs)):
            later = size[t] if to_read >> t & 1 else 0
            moved += size[t]
            owing += size[t] + later
            if (problem.may_stay & handed) >> t & 1:
                written = 0 if outputs >> t & 1 else size[t]
                moves.append((t, written))
                owes.append((t, written + later))
        for t in bits(group.loads):
            later = size[t] if to_read >> t & 1 else 0
            moved += size[t]
            owing += later
            fresh = not before >> t & 1  # nothing has read this input of the graph yet
            if fresh:
                owing += size[t]
            if problem.may_stay >> t & 1:
                moves.append((t, 0 if fresh else size[t]))
                owes.append((t, later))
        ahead = self._ahead[done]
        saved = self._most_saved(group, moves, room - ahead.moved - moved)
        if saved is None:
            return None
        spared = self._most_saved(group, owes, room - ahead.owing - owing)
        return None if spared is None else Edge(mask, next_, moved - saved, owing - spared)

    def _most_saved(self, group: Group, choices: list[tuple[int, int]], room: int) -> int | None:
        """The most that residents on the border of a step save, less what it then reads again.

        All that is not exact errs on the side of saving more.

        Args:
            choices: tensors that may be resident, and bytes that each then saves.
            room: bytes that the step may move more than if all is moved once.

        Returns:
            ``None`` where the step does not fit whatever is resident, or needs more room.
        """
        if group.alone is None:  # else a resident need not be read again for each slice
            choices = [choice for choice in choices if choice[1]]
        choices.sort(key=lambda choice: -choice[1])
        everything = sum([saved for _, saved in choices])
        if room + everything < 0:
            return None
        if self._least_again(group, sum([1 << tensor for tensor, _ in choices]), -1) == 0:
            return everything
        limit = self.problem.buffer_bytes
        key = limit, *[(group.local(1 << tensor), saved) for tensor, saved in choices]
        known = group.memo.get(key)
        if known is None or (known[0] is None and known[1] < room):
            self.problem.work.add(_SUBSETS)
            known = group.memo[key] = self._try_subsets(group, choices, room), room
        found = known[0]
        return None if found is None or room + found < 0 else found

    def _try_subsets(self, group: Group, choices: list[tuple[int, int]], room: int) -> int | None:
        """The same, where not all of them can be resident at no cost."""
        free = sum(saved for _, saved in choices[_MOST_CHOICES:])
        subsets = [(0, free)]
        for tensor, saved in choices[:_MOST_CHOICES]:
            subsets += [(mask | 1 << tensor, total + saved) for mask, total in subsets]
        best: int | None = None
        anyway = 0  # read again whatever is resident
        if group.alone is None and self._least_again(group, 0, -1) is None:
            found = least_in_stripes(group, None, self.problem.buffer_bytes, room + subsets[-1][1])
            if found is None:
                return None
            anyway = found
        for mask, saved in sorted(subsets, key=lambda subset: (-subset[1], subset[0])):
            if room + saved < 0 or (best is not None and saved <= best):
                break
            most = room + saved if best is None else min(room + saved, saved - best - 1)
            if anyway > most:
                continue
            again = self._least_again(group, mask, most)
            if again is not None:
                best = saved - again
        return best

    def _least_again(self, group: Group, resident: int, most: int) -> int | None:
        """A lower bound of what a step reads again with some tensors resident; ``None`` where it
        does not fit, or that is above ``most``.
        """
        group.facts.count(_AGAIN)
        limit, linking = self.problem.buffer_bytes, group.linked
        line = once = whole = 0
        for storage in group.storages:
            if storage.tensors & linking:
                continue  # it may be written over another
            if storage.tensors & resident:
                whole += storage.whole
            else:
                line += storage.line
                once += storage.at_once
        if whole + line + group.weights < limit or whole + once + group.least_staging < limit:
            return 0
        beside = Beside(resident, free=self.problem.residency)
        again: int | None = None
        if group.weights + whole - (limit - 1) <= most:
            again = least_in_stripes(group, beside, limit, most)
        for sliced in slices(group, beside, limit, most):
            again = sliced.reread if again is None else min(again, sliced.reread)
        return again
