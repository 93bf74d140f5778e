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
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from torch_getfuse.partition.cost.scheme import TileRows
from torch_getfuse.partition.exact.chains import Chains
from torch_getfuse.partition.exact.down_sets import Limits, TooWide
from torch_getfuse.partition.node_set import bits, is_connected
from torch_getfuse.partition.problem import FusionProblem, SearchResult
from torch_getfuse.partition.work import OutOfWork

Ints = npt.NDArray[np.int64]

MOST_DOWN_SETS = 6_000

_NEVER = 1 << 60
"""More bytes than any plan moves."""

_SET, _RANKED, _LOOK = 300, 8, 150
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


def backward(
    problem: FusionProblem, known: SearchResult, limits: Limits | None = None
) -> SearchResult:
    """The legal plan with the least DRAM access, proved by construction.

    Args:
        problem: graph, cost model and buffer.
        known: a legal plan.
        limits: the seconds that it may take.

    Returns:
        The optimum; at a limit the known plan, its end replaced as far as the best is known, and
        a lower bound.

    Raises:
        TooWide: for more than :data:`MOST_DOWN_SETS` down-sets, or byte counts beyond 64 bits.
    """
    started = time.perf_counter()
    search, stopped = None, ""
    seconds = (limits or Limits()).seconds
    try:
        with problem.evaluator.work.within(seconds):
            search = _Backward(problem)
            search.run()
    except OutOfWork as reason:
        stopped = str(reason)
    found, bound, looked = known, 0, 0
    if search is not None:
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


class _DownSets:
    """All down-sets of a problem, by size, as arrays.

    Attributes:
        masks: of each.
        index: of each mask.
        packed: the masks as rows of 64-bit words.
        live: bytes of the tensors that each hands on or has written for good.
        weights, weighted, rows, short: sums over its fusable operators: bytes of weights, how many
            have any, and what their :class:`TileRows` say.
        pairs: of these, (first, last, bytes), and in which down-sets the last is.
        tensors: the problem's crossings.
        made: per tensor, in which down-sets it is there: as an input, or what a member wrote.
        read: per tensor, how many of its readers each has.

    Raises:
        TooWide: for more than :data:`MOST_DOWN_SETS`.
    """

    def __init__(self, problem: FusionProblem, chains: Chains) -> None:
        scheme = problem.evaluator.scheme
        self.masks = sorted(_down_sets(chains), key=lambda mask: (mask.bit_count(), mask))
        self.index = {mask: k for k, mask in enumerate(self.masks)}
        count, wide = len(problem.graph), -(-len(problem.graph) // 64)
        data = b"".join(mask.to_bytes(8 * wide, "little") for mask in self.masks)
        self.packed = np.frombuffer(data, np.dtype("<u8")).reshape(len(self.masks), wide)
        member = np.unpackbits(self.packed.view(np.uint8), axis=1, bitorder="little")[:, :count]
        nothing = [0] * count
        tiles = scheme.tile_rows or TileRows(nothing, nothing, ())
        more = list(tiles.least)
        self.pairs = []
        for first, last, size in tiles.pairs:
            if problem.fusable >> first & problem.fusable >> last & 1:
                more[last] += size
                self.pairs.append((first, last, size, member[:, last].astype(bool)))
        per_operator = np.zeros((count, 4), np.int64)
        for i in bits(problem.fusable):
            weights = scheme.weights[i]
            per_operator[i] = weights, bool(weights), more[i], tiles.short[i]
        self.weights, self.weighted, self.rows, self.short = (
            member.astype(np.int64) @ per_operator
        ).T.copy()
        self.tensors = problem.crossings
        self.made = np.ones((len(self.tensors), len(self.masks)), bool)
        self.read = np.zeros((len(self.tensors), len(self.masks)), np.int16)
        self.live = np.zeros(len(self.masks), np.int64)
        for k, tensor in enumerate(self.tensors):
            self.read[k] = member[:, list(bits(tensor.readers))].sum(axis=1, dtype=np.int16)
            if tensor.maker:
                self.made[k] = member[:, tensor.maker.bit_length() - 1]
                wanted = tensor.forced | (self.read[k] < tensor.readers.bit_count())
                self.live += tensor.size * (self.made[k] & wanted)


def _down_sets(chains: Chains) -> list[int]:
    """Every down-set of whole blocks that has all unfusable operators that can run."""
    found = {chains.start}
    waiting = [chains.start]
    while waiting:
        done = waiting.pop()
        for ideal in _ready(chains, done):
            if not ideal & chains.unfusable:
                larger = chains.absorb(done | ideal, chains.after(ideal))
                if larger not in found:
                    found.add(larger)
                    waiting.append(larger)
        if len(found) > MOST_DOWN_SETS:
            raise TooWide(f"more than {MOST_DOWN_SETS} down-sets")
    return list(found)


def _ready(chains: Chains, done: int) -> Iterator[int]:
    """The blocks that can run after a down-set."""
    for i in bits((chains.sources | chains.after(done)) & ~done):
        block = chains.block[i]
        if block & -block == 1 << i and not chains.ideal[i] & ~done & ~block:
            yield block


class _Backward:
    """One run of the search.

    Attributes:
        looked: groups that were looked at.
    """

    def __init__(self, problem: FusionProblem) -> None:
        self.problem = problem
        self.evaluator = problem.evaluator
        self.count = self.evaluator.work.add
        self.chains = Chains(problem)
        self.looked = 0
        self.sets = sets = _DownSets(problem, self.chains)
        buffer_bytes = self.evaluator.buffer_bytes
        most = int(sets.weights[-1]) * (int(sets.rows[-1]) // buffer_bytes + 2)
        if most + 4 * sum(tensor.size for tensor in sets.tensors) >= _NEVER >> 1:
            raise TooWide("byte counts too large")
        # h(D), and the group and the down-set that lead there; filled from the end.
        self.rest = np.zeros(len(sets.masks), np.int64)
        self.solved = len(sets.masks) - 1
        self.step: dict[int, tuple[int, int]] = {}
        # By their first operator, which can run next wherever a conflict matters.
        self.conflicts: defaultdict[int, list[_Conflict]] = defaultdict(list)

    def run(self) -> None:
        """Work out ``h`` for every down-set.

        Raises:
            OutOfWork: at a limit; what was worked out remains.
        """
        while self.solved:
            self._solve(self.solved - 1)
            self.solved -= 1

    def plan(self, known: SearchResult) -> SearchResult:
        """The known plan up to the first of its down-sets whose ``h`` is known, and the best end.

        That is the optimum once ``h`` of the first down-set is known.
        """
        groups, done = [], self.chains.start
        for group in (*known.groups, 0):
            at = self.sets.index.get(done)
            if at is not None and at >= self.solved:
                break
            groups.append(group)
            done = self.chains.absorb(done | group, self.chains.after(group))
        else:
            return known
        while at in self.step:
            group, at = self.step[at]
            groups.append(group)
        whole = self.chains.without_shared(groups)
        found = replace(known, groups=whole, dram_bytes=self.problem.cost(whole))
        return found if found.dram_bytes < known.dram_bytes or not self.solved else known

    def bound(self) -> int:
        """No legal plan moves less, in bytes.

        The last down-set of a plan whose ``h`` is not known was reached at what no plan avoids.
        """
        sets = self.sets
        if not self.solved:
            return int(self.rest[0])
        reached = sets.weights + sets.live
        for k, tensor in enumerate(sets.tensors):
            if not tensor.maker:
                reached += tensor.size * (sets.read[k] > 0)
        least = _NEVER
        for at in range(self.solved):
            larger, _, bounds = self._ranked(at, self.solved)
            if len(larger):
                least = min(least, int(reached[at] + bounds.min()))
        return least

    def _solve(self, at: int) -> None:
        """``h`` of one down-set, all larger ones of which are solved."""
        sets, evaluator = self.sets, self.evaluator
        done = sets.masks[at]
        larger, moved, least = self._ranked(at, at + 1)
        self.count(_SET + len(larger) // _RANKED)
        conflicts = self._conflicts_at(done)
        best = _NEVER
        for k in np.lexsort((-larger, least)).tolist():  # of equals the largest
            cost, bound = int(moved[k]), int(least[k])
            if bound >= best:
                break
            added = sets.masks[larger[k]] & ~done
            if any(cost + c.again >= best and not c.core & ~added for c in conflicts):
                continue
            group = added & ~self.chains.unfusable
            if self.chains.after(added ^ group) & group or not self._connected(group):
                continue
            self._look()
            if cost + self._least_reread(group) >= best:
                conflicts.append(self._too_dear(group, best - cost))
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
                conflicts.append(self._too_large(group))
        self.rest[at] = best

    def _ranked(self, at: int, first: int) -> tuple[Ints, Ints, Ints]:
        """The larger down-sets from index ``first`` on, and what finishing over each costs.

        Returns:
            Their indices; the bytes if the group that leads there reads nothing again, and a lower
            bound with what it must read again.
        """
        sets, buffer_bytes = self.sets, self.evaluator.buffer_bytes
        mask = sets.packed[at]
        larger = first + np.flatnonzero(((sets.packed[first:] & mask) == mask).all(axis=1))
        larger = larger[self.rest[larger] < _NEVER]
        weights = sets.weights[larger] - sets.weights[at]
        # A tensor is paid for by who writes it as long as it is live, and by each group that reads
        # it: what is live at the end of the group but was not before, it has written.
        moved = weights + self.rest[larger] + sets.live[larger] - sets.live[at]
        for k, tensor in enumerate(sets.tensors):
            before, readers = sets.read[k, at], tensor.readers.bit_count()
            if sets.made[k, at] and before < readers:
                now = sets.read[k, larger]
                moved += tensor.size * (now > before)
                if tensor.maker and not tensor.forced:
                    moved += tensor.size * (now == readers)
        rows = sets.rows[larger] - sets.rows[at]
        done = sets.masks[at]
        for first, last, more, there in sets.pairs:
            if done >> first & 1 and not done >> last & 1:
                rows -= more * there[larger]
        room = buffer_bytes + sets.short[larger] - sets.short[at]
        passes = np.maximum(-(-rows // room), 1)
        # An operator alone can run in slices; and weights that stay are read once.
        tiled = (weights > buffer_bytes) & (sets.weighted[larger] - sets.weighted[at] > 1)
        return larger, moved, moved + np.where(tiled, (passes - 1) * weights, 0)

    # -- conflicts ------------------------------------------------------------------------

    def _conflicts_at(self, done: int) -> list[_Conflict]:
        """Those that groups from a down-set can run into."""
        return [
            conflict
            for block in _ready(self.chains, done)
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
        if not self.chains.leading:
            return [group]
        before = 0
        for i in bits(group):
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
