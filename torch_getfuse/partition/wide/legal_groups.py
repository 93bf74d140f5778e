"""All legal groups of a problem, if they are not too many, and those of least reduced cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torch_getfuse.partition.node_set import bits, is_connected
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.wide.group_columns import Columns
from torch_getfuse.partition.wide.near_sets import NearSets
from torch_getfuse.partition.wide.relaxation import Undercutting
from torch_getfuse.partition.work import OutOfWork

Ints = npt.NDArray[np.int64]

MAX_SETS = 200_000


@dataclass(frozen=True)
class Candidates:
    """Groups that a plan may use.

    Attributes:
        groups: masks of valid groups.
        complete: whether these are all; otherwise they prove no bound.
        seen: number of sets examined.
    """

    groups: tuple[int, ...]
    complete: bool
    seen: int


_SET = 15  # steps counted per set


def list_groups(problem: FusionProblem, most: int = MAX_SETS) -> Candidates:
    """All connected, convex, valid groups of a problem, smallest first, up to ``most`` sets.

    At a limit on work, those found so far.

    The list is complete: a convex connected group is reached from any of its blocks through convex
    connected subsets, each by adding a neighbour inside the group and what lies between. Of one
    that is hopeless the group has something more that it depends on (docs/exact-search.md).
    """
    evaluator, unfusable = problem.evaluator, problem.unfusable
    above, below, near = problem.above, problem.below, problem.near
    block = [0] * len(problem.graph)
    for mask in problem.blocks:
        for i in bits(mask):
            block[i] = mask

    def reach(mask: int) -> tuple[int, int, int]:
        up = down = adjacent = 0
        for i in bits(mask):
            up |= above[i]
            down |= below[i]
            adjacent |= near[i]
        return up, down, adjacent

    surroundings = {mask: reach(mask) for mask in problem.blocks}
    layer = [(mask, *surroundings[mask]) for mask in problem.blocks]
    seen = set(problem.blocks)
    groups = []
    try:
        while layer:
            following = []
            for mask, up, down, adjacent in layer:
                if evaluator.hopeless(mask):
                    if evaluator.scheme.floor_only_grows:
                        continue
                    if not problem.graph.ordered:
                        adjacent &= up
                elif is_connected(mask, near) and evaluator.valid(mask):
                    groups.append(mask)
                tried = mask | unfusable
                while fresh := adjacent & ~tried:
                    other = block[(fresh & -fresh).bit_length() - 1]
                    tried |= other
                    grown, up2, down2, adjacent2 = mask, up, down, adjacent
                    extra = other
                    while extra & ~unfusable:
                        grown |= extra
                        while extra:
                            part = block[(extra & -extra).bit_length() - 1]
                            extra &= ~part
                            around = surroundings[part]
                            grown |= part
                            up2, down2, adjacent2 = (
                                up2 | around[0],
                                down2 | around[1],
                                adjacent2 | around[2],
                            )
                        extra = up2 & down2 & ~grown
                        if extra & unfusable:
                            break
                    evaluator.work.add(_SET)
                    if extra or grown in seen:
                        continue
                    seen.add(grown)
                    following.append((grown, up2, down2, adjacent2))
                if len(seen) > most:
                    return Candidates(tuple(groups), False, len(seen))
            layer = following
    except OutOfWork:
        return Candidates(tuple(groups), False, len(seen))
    return Candidates(tuple(groups), True, len(seen))


class Listed:
    """An oracle that scans a complete list; a group is assigned to its first block.

    Attributes:
        near: the groups.
        place: see :class:`.Oracle`.
    """

    def __init__(self, columns: Columns, groups: tuple[int, ...]) -> None:
        self._count = columns.problem.evaluator.work.add
        self._groups = groups
        self._every = np.arange(len(groups))
        self.near = NearSets.of(columns, groups)
        self.place = np.arange(self.near.rows.shape[1])

    def run(self, prices: Ints) -> tuple[Ints, list[Undercutting]]:
        """The least ``F_D - prices`` per first block, and a group that attains it."""
        self._count(len(self._groups) // 4)
        reduced, first = self.near.reduced(self._every, prices), self.near.first
        order = np.lexsort((reduced, first))
        least = order[np.unique(first[order], return_index=True)[1]]
        undercut = [
            Undercutting(int(first[k]), int(reduced[k]), self._groups[k], int(self.near.costs[k]))
            for k in least.tolist()
            if reduced[k] < 0
        ]
        return self.near.shortfall(self._every, reduced), undercut
