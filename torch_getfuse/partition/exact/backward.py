"""Exact search from the end: what it costs to finish from each down-set.

A legal plan is a chain of down-sets (:mod:`.down_sets`). Here the chains are followed backwards:
the least that the rest of a plan moves, ``h(D)``, is worked out for every down-set ``D``, the
largest first. From ``D`` a group leads to each larger down-set ``E``, and with ``h(E)`` known,
``moved(E - D) + h(E)`` is what finishing over ``E`` costs, but for what the group reads again. So
all groups of ``D`` are ranked at once, by array operations over all down-sets, and only those are
looked at, in order, that may be cheaper than the best so far. A ceiling on a whole plan, which a
search from the start must do with, allows for all its slack in a single group.

A group that is too large or reads too much again says so of every group that contains some part of
it: that part is kept as a *conflict* and sorts out the others, from other down-sets too.
docs/exact-search.md, section 2, has the proofs.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from torch_getfuse.partition.exact.chains import Chains
from torch_getfuse.partition.exact.down_set_table import DownSets, Ints, Window
from torch_getfuse.partition.exact.down_sets import Limits, TooWide
from torch_getfuse.partition.node_set import bits, is_connected
from torch_getfuse.partition.problem import FusionProblem, SearchResult
from torch_getfuse.partition.work import OutOfWork

MOST_DOWN_SETS = 6_000
"""Of a graph that is searched whole."""

_NEVER = 1 << 60
"""More bytes than any plan moves."""

_EARLY, _SOLVED_BY_THEN = 1 / 3, 1 / 4
"""When so much of the steps that are allowed are counted, so much of the down-sets is to be solved:
smaller ones take longer, so the rest would never be."""

_LOOKS = 1 / 8, 1 / 4, 3 / 8, 5 / 8
"""Where another search follows: shares of the steps at which it is to go on at a pace that leads to
the end, that of the second half of what is done."""

_SET, _RANKED, _LOOK = 230, 20, 40
"""Steps counted: for each down-set, and one for so many groups that are ranked; for each group
that is looked at."""


class _Conflict(NamedTuple):
    """A set that no group of use contains with nothing else before it.

    Attributes:
        core: the set.
        before: what its members run after, outside it: a group that contains the core, and of
            which this has run before, is grown from it.
        again: bytes that every such group reads again; :data:`_NEVER`: none is valid.
    """

    core: int
    before: int
    again: int


Conflicts = defaultdict[int, list[_Conflict]]


def backward(
    problem: FusionProblem, known: SearchResult, limits: Limits | None = None
) -> SearchResult:
    """The legal plan with the least DRAM access, proved by construction (:class:`FromTheEnd`)."""
    return FromTheEnd(problem).run(known, limits)


class FromTheEnd:
    """The search of a problem, which goes on where it was left.

    Args:
        problem: graph, cost model and buffer.
    """

    def __init__(self, problem: FusionProblem) -> None:
        self.problem = problem
        self._search: Backward | None = None

    def run(
        self, known: SearchResult, limits: Limits | None = None, followed: bool = False
    ) -> SearchResult:
        """The legal plan with the least DRAM access, proved by construction.

        Args:
            known: a legal plan.
            limits: the seconds that it may take.
            followed: whether another search follows: at a pace that does not lead to the end, it
                leaves the time for that.

        Returns:
            The optimum; at a limit the known plan, its end replaced as far as the best is known,
            and a lower bound.

        Raises:
            TooWide: for more than :data:`MOST_DOWN_SETS` down-sets, or byte counts beyond 64 bits.
        """
        started, problem = time.perf_counter(), self.problem
        stopped = ""
        seconds = (limits or Limits()).seconds
        try:
            with problem.evaluator.work.within(seconds):
                if self._search is None:
                    chains = Chains(problem)
                    whole = Window(chains.start, chains.everything, MOST_DOWN_SETS)
                    self._search = Backward(problem, chains, whole, known.dram_bytes)
                self._search.run(followed)
        except OutOfWork as reason:
            stopped = str(reason)
        found, bound, looked = known, 0, 0
        if (search := self._search) is not None:
            with problem.evaluator.work.finishing():
                found, bound, looked = search.plan(known), search.bound(), search.looked
        return replace(
            found,
            plans=looked,
            seconds=time.perf_counter() - started,
            lower_bound_bytes=min(bound, found.dram_bytes),
            history=(),
            stopped=stopped,
        )


class Backward:
    """One run of the search, over the down-sets of a window.

    Args:
        problem: graph, cost model and buffer.
        chains: of the problem.
        window: which down-sets.
        ceiling: bytes; only what moves less from the start of the window to its end is looked for.
        conflicts: by their first operators, those that other windows have found; added to.

    Attributes:
        looked: groups that were looked at.
        rest: of each down-set ``h``, from index ``solved`` on; :data:`_NEVER` where no end from it
            is part of anything cheaper than the ceiling.
        reached: to each, what no way from the start moves less than.

    Raises:
        TooWide: for more down-sets than the window may have, or byte counts beyond 64 bits.
    """

    def __init__(
        self,
        problem: FusionProblem,
        chains: Chains,
        window: Window,
        ceiling: int,
        conflicts: Conflicts | None = None,
    ) -> None:
        self.problem, self.chains, self.ceiling = problem, chains, ceiling
        self.evaluator = problem.evaluator
        self.count = self.evaluator.work.add
        self.looked = 0
        self.sets = sets = DownSets(problem, chains, window)
        buffer_bytes = self.evaluator.buffer_bytes
        most = int(sets.weights[-1]) * (int(sets.rows[-1]) // buffer_bytes + 2)
        if most + 4 * sum(tensor.size for tensor in sets.tensors) >= _NEVER >> 1:
            raise TooWide("byte counts too large")
        # The group and the down-set that lead to h(D); both are filled from the end.
        self.step: dict[int, tuple[int, int]] = {}
        self.rest = np.zeros(len(sets.masks), np.int64)
        self.solved = len(sets.masks) - 1
        self.reached = self._moved(0, np.arange(len(sets.masks)))
        if problem.rereads:
            self._reach()
        # By their first operator, which can run next wherever a conflict matters.
        self.conflicts: Conflicts = defaultdict(list) if conflicts is None else conflicts

    def _reach(self) -> None:
        """What no way to each down-set moves less than, if groups need not fit nor be connected.

        In one group it would be each tensor and weight once; but that reads its weights again.
        """
        reached = np.full(len(self.reached), _NEVER)
        reached[0] = 0
        for at in range(self.solved):
            if reached[at] < self.ceiling:
                larger, _, least = self._ranked(at, at + 1)
                self.count(_SET + len(larger) // _RANKED)
                reached[larger] = np.minimum(reached[larger], reached[at] + least)
        self.reached = reached

    def run(self, followed: bool = False) -> None:
        """Work out ``h`` for every down-set that something cheaper than the ceiling can go through.

        Raises:
            OutOfWork: at a limit, or where it is plain that one will strike; what was worked out
                remains.
        """
        work = self.evaluator.work
        begun, allowed = work.steps, work.steps_left
        looks = [*_LOOKS] if followed else [_EARLY]
        done: list[tuple[int, float]] = [(begun, 0.0)]  # steps, and what share is solved then
        while self.solved:
            self._solve(self.solved - 1)
            self.solved -= 1
            done.append((work.steps, 1 - self.solved / len(self.sets.masks)))
            while looks and work.steps > begun + looks[0] * allowed:
                by, share = looks.pop(0), done[-1][1]
                half = done[bisect_right(done, ((begun + work.steps) / 2, 1.0)) - 1][1]
                left = 2 * (1 / by - 1)  # over the time that the second half took
                least = (1 + half * left) / (1 + left)
                if share < (least if followed else _SOLVED_BY_THEN):
                    raise OutOfWork(f"{share:.0%} of its down-sets in {by:.0%} of its work limit")

    def plan(self, known: SearchResult) -> SearchResult:
        """The known plan up to the first of its down-sets whose ``h`` is known, and the best end.

        That is the optimum once ``h`` of the first down-set is known, or known to be of no use.
        """
        groups, done = [], self.chains.start
        for group in (*known.groups, 0):
            at = self.sets.index.get(done)
            if at is not None and at >= self.solved and self.rest[at] < _NEVER:
                break
            groups.append(group)
            done = self.chains.absorb(done | group, self.chains.after(group))
        else:
            return known
        whole = self.chains.without_shared([*groups, *self.groups_from(at)])
        found = replace(known, groups=whole, dram_bytes=self.problem.cost(whole))
        return found if found.dram_bytes < known.dram_bytes else known

    def groups_from(self, at: int) -> list[int]:
        """The best groups from a down-set on whose ``h`` is known."""
        groups = []
        while at in self.step:
            group, at = self.step[at]
            groups.append(group)
        return groups

    def bound(self) -> int:
        """No legal plan moves less, in bytes.

        Or no fewer than the ceiling: otherwise the last down-set of a plan whose ``h`` is not known
        was reached at what no plan avoids.
        """
        least = self.ceiling
        if not self.solved:
            return min(least, int(self.rest[0]))
        for at in range(self.solved):
            larger, _, bounds = self._ranked(at, self.solved)
            if len(larger):
                least = min(least, int(self.reached[at] + bounds.min()))
        return least

    def _solve(self, at: int) -> None:
        """``h`` of one down-set, all larger ones of which are solved.

        More than the ceiling allows after what it takes to get there is never part of the best.
        """
        sets, evaluator = self.sets, self.evaluator
        done = sets.masks[at]
        larger, moved, least = self._ranked(at, at + 1)
        cheapest = least.copy()
        self.count(_SET + len(larger) // _RANKED)
        best = most = self.ceiling - int(self.reached[at])
        for conflict in self._conflicts_at(at):
            self._heed(conflict, larger, moved, cheapest)
        some = np.flatnonzero(cheapest < best)
        for k in some[np.lexsort((-some, least[some]))].tolist():  # of equals the largest
            cost = int(moved[k])
            if least[k] >= best:
                break
            if cheapest[k] >= best:
                continue
            group = sets.masks[larger[k]] & ~done & ~self.chains.unfusable
            if not self._connected(group):
                continue
            self._look()
            if cost + self._least_reread(group) >= best:
                self._heed(self._too_dear(group, best - cost), larger, moved, cheapest)
                continue
            valid = False
            for way in self._ways(group):
                # Most fit: the floor, which `valid` asks first otherwise, would tell nothing.
                evaluator.buffer(way)
                if evaluator.valid(way):
                    valid = True
                    whole = cost + evaluator.reread(way)
                    if whole < best:
                        best = whole
                        self.step[at] = way, int(larger[k])
                    if whole == cost:
                        break  # other starts change only what is read again
            if not valid and self._hopeless(group):
                self._heed(self._too_large(group), larger, moved, cheapest)
        self.rest[at] = best if best < most else _NEVER

    def _ranked(self, at: int, first: int) -> tuple[Ints, Ints, Ints]:
        """The larger down-sets from index ``first`` on, and what finishing over each costs.

        Returns:
            Their indices; the bytes if the group that leads there reads nothing again, and a lower
            bound with what it must read again.
        """
        sets, buffer_bytes = self.sets, self.evaluator.buffer_bytes
        done = sets.masks[at]
        larger = sets.led_to(at, first, self.chains.barred(done))
        larger = larger[self.rest[larger] < _NEVER]
        weights = sets.weights[larger] - sets.weights[at]
        moved = self._moved(at, larger) + self.rest[larger]
        rows = sets.rows[larger] - sets.rows[at]
        for first, last, more, there in sets.pairs:
            if done >> first & 1 and not done >> last & 1:
                rows -= more * there[larger]
        room = buffer_bytes + sets.short[larger] - sets.short[at]
        passes = np.maximum(-(-rows // room), 1)
        # An operator alone can run in slices; and weights that stay are read once.
        tiled = (weights > buffer_bytes) & (sets.weighted[larger] - sets.weighted[at] > 1)
        return larger, moved, moved + np.where(tiled, (passes - 1) * weights, 0)

    def _moved(self, at: int, larger: Ints) -> Ints:
        """Bytes that a group from one down-set to each of some others moves, nothing twice."""
        sets = self.sets
        # A tensor is paid for by who writes it as long as it is live, and by each group that reads
        # it: what is live at the end of the group but was not before, it has written.
        moved: Ints = sets.weights[larger] - sets.weights[at] + sets.live[larger] - sets.live[at]
        for k in np.flatnonzero(sets.open[:, at]).tolist():
            tensor, now = sets.tensors[k], sets.read[k, larger]
            moved += tensor.size * (now > sets.read[k, at])
            if tensor.maker and not tensor.forced:
                moved += tensor.size * (now == tensor.readers.bit_count())
        return moved

    # -- conflicts ------------------------------------------------------------------------

    def _heed(self, conflict: _Conflict, larger: Ints, moved: Ints, cheapest: Ints) -> None:
        """Raise what finishing over each down-set costs at least, where its group has a conflict.

        Args:
            larger, moved: as :meth:`_ranked` gives them.
            cheapest: raised.
        """
        hit = np.flatnonzero(self.sets.contain(larger, conflict.core))
        cheapest[hit] = np.maximum(cheapest[hit], moved[hit] + conflict.again)

    def _conflicts_at(self, at: int) -> list[_Conflict]:
        """Those that groups from a down-set can run into."""
        done = self.sets.masks[at]
        return [
            conflict
            for block in self.sets.ready[at]
            for conflict in self.conflicts[block & -block]
            if not conflict.core & done and not conflict.before & ~done
        ]

    def _too_large(self, group: int) -> _Conflict:
        """The part of a hopeless group that is hopeless already."""
        return self._conflict(self._smallest(group, self._hopeless), _NEVER)

    def _too_dear(self, group: int, most: int) -> _Conflict:
        """The part of a group that reads ``most`` bytes again, which the group does."""
        core = self._smallest(group, lambda part: self._least_reread(part) >= most)
        return self._conflict(core, self._least_reread(core))

    def _smallest(self, group: int, test: Callable[[int], bool]) -> int:
        """The first part of a group, in the order of its blocks, of which a test holds.

        The test holds of the group, and of all parts after the first.
        """
        parts, part = [], 0
        for i in bits(group):
            if not part >> i & 1:
                part |= self.chains.block[i] & group
                parts.append(part)
        low, high = 0, len(parts) - 1
        while low < high:
            middle = (low + high) // 2
            self._look()
            if test(parts[middle]):
                high = middle
            else:
                low = middle + 1
        return parts[high]

    def _conflict(self, core: int, again: int) -> _Conflict:
        before = 0
        for i in bits(core):
            before |= self.chains.predecessors[i]
        conflict = _Conflict(core, before & ~core, again)
        self.conflicts[core & -core].append(conflict)
        return conflict

    # -- groups ---------------------------------------------------------------------------

    def _look(self) -> None:
        self.looked += 1
        self.count(_LOOK)

    def _ways(self, group: int) -> list[int]:
        before = 0
        for i in bits(group & self.chains.led):
            before |= self.chains.makers[i]
        return self.chains.ways(group, before)

    def _least_reread(self, group: int) -> int:
        """What every group grown from it reads again at least, whatever it starts with."""
        reread = self.evaluator.least_reread
        return reread(group) and min(map(reread, self._ways(group)))

    def _hopeless(self, group: int) -> bool:
        """Whether no group grown from it is valid, whatever it starts with."""
        return all(map(self.evaluator.hopeless, self._ways(group)))

    def _connected(self, group: int) -> bool:
        return is_connected(group, self.problem.near)
