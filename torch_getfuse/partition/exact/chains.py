"""How plans are chains of down-sets: what the exact searches of one problem have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy

from torch_getfuse.partition.node_set import bits, mask_of
from torch_getfuse.partition.problem import FusionProblem, blocks_and_ideals


class Chains:
    """The steps from one down-set of a problem to another.

    Args:
        problem: graph, cost model and buffer.

    Attributes:
        everything: the last down-set.
        start: the first: the unfusable operators that need nothing.
        unfusable, leading: as in the problem.
        led: mask of what reads from a leading operator.
        successors, predecessors, makers: as in the graph.
        sources: mask of the operators that run after none.
        block, ideal: per operator, see :func:`blocks_and_ideals`.
    """

    def __init__(self, problem: FusionProblem) -> None:
        graph = problem.graph
        self.everything = (1 << len(graph)) - 1
        self.unfusable, self.leading = problem.unfusable, problem.leading
        self.successors, self.predecessors = graph.successors, graph.predecessors
        self.makers = graph.makers
        self.sources = mask_of(i for i, before in enumerate(graph.predecessors) if not before)
        self.block, self.ideal = blocks_and_ideals(graph, problem.tight)
        self.start = self.absorb(0, self.sources)
        self.led = self.after(self.leading)
        self._problem = problem

    def absorb(self, done: int, after: int) -> int:
        """The down-set ``done`` with the unfusable operators that can run then.

        They cost nothing and block nothing. ``after``: what the last members of it feed.
        """
        ready = after & self.unfusable & ~done
        while ready:
            low = ready & -ready
            ready ^= low
            i = low.bit_length() - 1
            if not self.predecessors[i] & ~done:
                done |= low
                ready |= self.successors[i] & self.unfusable
        return done

    def barred(self, done: int) -> int:
        """What no group that leads on from a down-set has: it runs after an unfusable operator that
        has not run, for which something else in that group would have to run first.
        """
        found, waiting = 0, self.unfusable & ~done
        while waiting:
            low = waiting & -waiting
            found |= self._problem.below[low.bit_length() - 1]
            waiting &= ~(low | found)
        return found & ~self.unfusable

    def after(self, mask: int) -> int:
        """What must run after a member of a set, members among them."""
        found = 0
        for i in bits(mask):
            found |= self.successors[i]
        return found

    def coarser(self, units: Iterable[int]) -> Chains:
        """The same where each of some sets of whole blocks is one block.

        Args:
            units: masks, disjoint and convex; no cycle of them.
        """
        found = copy(self)
        found.block, found.ideal = [*self.block], [*self.ideal]
        for unit in units:
            ideal = 0
            for i in bits(unit):
                ideal |= self.ideal[i]
            for i in bits(unit):
                found.block[i], found.ideal[i] = unit, ideal
        return found

    def rows(self, mask: int) -> list[int]:
        """Whole blocks in rows, each of which runs after the one before alone, and it alone."""
        rows: list[int] = []
        row_of: dict[int, int] = {}  # by the last block of a row
        for i in bits(mask):
            block = self.block[i]
            if block & -block != 1 << i:
                continue
            before = 0
            for k in bits(block):
                for j in bits(self.predecessors[k] & ~block):
                    before |= self.block[j]
            row = row_of.get(before)
            if row is not None and not self.after(before) & ~block & ~before:
                rows[row] |= block
            else:
                row = len(rows)
                rows.append(block)
            row_of[block] = row
        return rows

    def ways(self, group: int, before: int) -> list[int]:
        """A group as it is, and with operators in place that it may start with.

        One for each reader: further ones would hold more and change nothing.

        Args:
            group: its mask.
            before: what it reads from; members may be among them.
        """
        ways = [group]
        offered = before & self.leading & ~group
        while offered:
            reader = self.successors[(offered & -offered).bit_length() - 1]
            some = offered & self.makers[reader.bit_length() - 1]
            offered ^= some
            ways += [way | 1 << i for way in ways for i in bits(some)]
        return ways

    def without_shared(self, groups: Sequence[int]) -> tuple[int, ...]:
        """The groups of a plan in order, as they were chosen; what one starts with is no other's.

        Its producer's group, which comes before, had it as well and costs the same without.
        """
        found = []
        taken = 0
        for group in reversed(groups):
            if group & ~taken:  # all of it may be what a later group starts with
                found.append(group & ~taken)
            taken |= group
        return tuple(found[::-1])
