"""Random splitting: the repair of an invalid group that needs no explanation.

Every cut separates a *down-set* of the group (a set with all members that its members depend on)
from the rest. Nothing in the down-set depends on the rest, so if the group belongs to an acyclic
plan, replacing it with the two sides, or with their connected parts
(:meth:`~.FusionProblem.parts`), keeps the plan acyclic.
"""

from __future__ import annotations

from random import Random

from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem

_CUT = 20  # steps counted for a cut, in addition to those by size


class Closures:
    """Down-sets and up-sets of a problem's blocks.

    Args:
        problem: the problem; its blocks are never split.

    Attributes:
        block: per operator, the mask of its block; an unfusable operator is a block by itself.
    """

    def __init__(self, problem: FusionProblem) -> None:
        self.block = [1 << i for i in range(len(problem.graph))]
        for block in problem.blocks:
            for i in bits(block):
                self.block[i] = block
        self._leads = sum(block & -block for block in problem.blocks)
        order = problem.in_order
        self._rank = {block: k for k, block in enumerate(order)}
        self._up = list(self.block)
        self._down = list(self.block)
        graph = problem.graph
        for sets, along, beside in (
            (self._up, order, graph.predecessors),
            (self._down, order[::-1], graph.successors),
        ):
            for block in along:
                total = block
                for i in bits(block):
                    for j in bits(beside[i] & ~block):
                        total |= sets[j]
                for i in bits(block):
                    sets[i] = total

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
        """The blocks of ``group`` up to that of operator ``i`` in topological order: a down-set."""
        down_set, last = 0, self._rank[self.block[i]]
        for leader in bits(group & self._leads):
            if self._rank[self.block[leader]] <= last:
                down_set |= self.block[leader]
        return down_set

    def random_cut(self, group: int, rng: Random) -> int:
        """A random non-empty proper down-set of a group of at least two blocks.

        One of three sides of a random block: the blocks up to it in the operators' order, the
        blocks that it depends on, or the blocks that do not depend on it. Unlike the first, the
        other two keep parallel branches apart.
        """
        leaders = self.leaders(group)
        while True:
            pivot = rng.choice(leaders)
            side = rng.randrange(3)
            if side == 0:
                cut = self.prefix(group, pivot)
            elif side == 1:
                cut = self._up[pivot] & group
            else:
                cut = group & ~self._down[pivot]
            if cut and cut != group:
                return cut


class RandomSplit:
    """Cuts a group at random until every part is valid (docs/method.md, section 9).

    A single block is always valid (each block of a problem fits by itself), so this never fails.
    Implements :class:`~torch_getfuse.partition.problem.Repair`.
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
        valid_parts = []
        waiting = [group]
        while waiting:
            part = waiting.pop()
            if part == self._block[(part & -part).bit_length() - 1] or self._valid(part):
                valid_parts.append(part)
                continue
            self._count(_CUT + part.bit_count())
            cut = self._closures.random_cut(part, rng)
            waiting += self._parts(cut)
            waiting += self._parts(part & ~cut)
        return valid_parts
