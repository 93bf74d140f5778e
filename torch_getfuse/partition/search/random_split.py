"""Random splitting: the repair of an invalid group that needs no explanation.

Every cut is a *down-set* of the group (a set with all members that its members depend on) and
the rest. Nothing in the down-set depends on the rest, so if the group was a group of an acyclic
plan, the plan with the two sides, or with their connected parts
(:meth:`~.FusionProblem.parts`), in its place is acyclic as well.
"""

from __future__ import annotations

from random import Random

from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem

_CUT = 20  # steps that a cut counts, beside those by size


class Closures:
    """Down-sets and up-sets of a problem's blocks.

    Args:
        problem: whose blocks are never taken apart.

    Attributes:
        block: per operator, the mask of its block; an unfusable operator is one of its own.
    """

    def __init__(self, problem: FusionProblem) -> None:
        self.block = [1 << i for i in range(len(problem.graph))]
        for block in problem.blocks:
            for i in bits(block):
                self.block[i] = block
        self._leads = sum(block & -block for block in problem.blocks)
        # A block is a chain, so what its first operator depends on, all of it depends on.
        before, after = problem.graph.predecessors, problem.graph.successors
        self._up = list(self.block)
        for i in range(len(self.block)):
            for j in bits(before[i]):
                self._up[i] |= self._up[j]
        self._down = list(self.block)
        for i in reversed(range(len(self.block))):
            for j in bits(after[i]):
                self._down[i] |= self._down[j]

    def leaders(self, mask: int) -> list[int]:
        """The first operator of every block of a mask of whole blocks, ascending."""
        return list(bits(mask & self._leads))

    def upstream(self, i: int) -> int:
        """The block of operator ``i`` and every block that it depends on: a down-set."""
        return self._up[i]

    def downstream(self, i: int) -> int:
        """The block of operator ``i`` and every block that depends on it: an up-set."""
        return self._down[i]

    def prefix(self, group: int, i: int) -> int:
        """The blocks of ``group`` that start at or before operator ``i``: a down-set.

        A block is a chain in which each operator reads its predecessor alone, so all that it
        depends on starts before it does.
        """
        found = 0
        for leader in bits(group & self._leads & ((2 << i) - 1)):
            found |= self.block[leader]
        return found

    def random_cut(self, group: int, rng: Random) -> int:
        """A random down-set of a group of at least two blocks; neither empty nor everything.

        One of the three natural sides of a random block: all that comes before it in the
        operators' order, all that it depends on, or all that does not depend on it. Unlike the
        first, the other two keep parallel branches apart.
        """
        leaders = self.leaders(group)
        while True:
            pivot = rng.choice(leaders)
            way = rng.randrange(3)
            if way == 0:
                cut = self.prefix(group, pivot)
            elif way == 1:
                cut = self._up[pivot] & group
            else:
                cut = group & ~self._down[pivot]
            if cut and cut != group:
                return cut


class RandomSplit:
    """Cuts a group at random until every part is valid (docs/method.md, section 9).

    A part of one block is always valid, for the blocks of a problem fit alone; so this never
    fails. Implements :class:`~torch_getfuse.partition.problem.Repair`.
    """

    name = "random"

    def __init__(self, problem: FusionProblem, closures: Closures | None = None) -> None:
        self._valid = problem.evaluator.valid
        self._parts = problem.parts
        self._count = problem.evaluator.work.add
        self._closures = closures or Closures(problem)
        self._block = self._closures.block

    def __call__(self, group: int, rng: Random) -> list[int]:
        """Valid connected parts of a connected convex group; the group itself if it is valid."""
        found = []
        waiting = [group]
        while waiting:
            part = waiting.pop()
            if part == self._block[(part & -part).bit_length() - 1] or self._valid(part):
                found.append(part)
                continue
            self._count(_CUT + part.bit_count())
            cut = self._closures.random_cut(part, rng)
            waiting += self._parts(cut)
            waiting += self._parts(part & ~cut)
        return found
