"""Fusion groups as bit masks: connectivity and convexity.

Groups are connected through tensors; their execution order also respects ``Op.after``. A set of
operators is an ``int`` whose bit *i* stands for ``graph.ops[i]``; operators are in topological
order, so the lowest bit of a mask is its first operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch_getfuse import ordering
from torch_getfuse.ir import OpGraph


def bits(mask: int) -> Iterator[int]:
    """Positions of the operators of a mask, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def mask_of(positions: Iterable[int]) -> int:
    """The mask of the operators at ``positions``."""
    mask = 0
    for position in positions:
        mask |= 1 << position
    return mask


def ancestors(graph: OpGraph) -> tuple[int, ...]:
    """Per operator, the mask of all operators that must run before it (itself excluded)."""
    above: list[int] = []
    for mask in graph.predecessors:
        total = mask
        for i in bits(mask):
            total |= above[i]
        above.append(total)
    return tuple(above)


def descendants(graph: OpGraph, data: bool = False) -> tuple[int, ...]:
    """Per operator, the mask of all operators that must run after it (itself excluded).

    ``data``: only those that its output flows into, directly or through others.
    """
    below = [0] * len(graph)
    after = graph.readers if data else graph.successors
    for position in reversed(range(len(graph))):
        total = after[position]
        for i in bits(total):
            total |= below[i]
        below[position] = total
    return tuple(below)


class Neighbours(tuple[int, ...]):
    """Per operator, the mask of its producers and consumers.

    Most operators read the one before them, so connectivity is computed on *runs*: operators of a
    mask with consecutive positions, each a neighbour of the one before. A long chain is a single
    step of big-integer arithmetic; only the other edges, those of skips and branches, are followed
    one by one.
    """

    _next: int  # operators that are neighbours of the one after them
    _ends: int  # operators with an edge that is not to the one before or after
    _far: list[int]  # those edges

    def __new__(cls, masks: Iterable[int]) -> Neighbours:
        self = super().__new__(cls, masks)
        self._next = mask_of(i for i, near in enumerate(self) if near >> i & 2)
        self._far = [near & ~(1 << i + 1 | (1 << i) >> 1) for i, near in enumerate(self)]
        self._ends = mask_of(i for i, far in enumerate(self._far) if far)
        return self

    def runs(self, mask: int) -> list[int]:
        """The runs of a mask, each of them connected, in the order of their first operators."""
        inner = mask & mask >> 1 & self._next  # members of a run except its last
        starts = mask & ~(inner << 1)
        runs = []
        while starts:
            low = starts & -starts
            starts ^= low
            # The sum carries through the run: it clears the inner members and sets the last.
            runs.append(inner + low ^ inner)
        return runs

    def component(self, runs: list[int]) -> tuple[int, list[int]]:
        """The component that contains the first run, and the runs outside it."""
        reached = front = runs[0]
        left = runs[1:]
        while left:
            touched = 0
            for i in bits(front & self._ends):
                touched |= self._far[i]
            front, rest = 0, []
            for run in left:
                if run & touched:
                    front |= run
                else:
                    rest.append(run)
            if not front:
                break
            reached |= front
            left = rest
        return reached, left


def neighbours(graph: OpGraph) -> Neighbours:
    """Per operator, its producers and its consumers."""
    return Neighbours(m | r for m, r in zip(graph.makers, graph.readers, strict=True))


def is_connected(mask: int, near: Neighbours) -> bool:
    """Whether a non-empty mask is weakly connected through edges inside it."""
    return not near.component(near.runs(mask))[1]


def components(mask: int, near: Neighbours) -> list[int]:
    """The weakly connected components of a mask, in the order of their first operators."""
    runs = near.runs(mask)
    parts = []
    while runs:
        reached, runs = near.component(runs)
        parts.append(reached)
    return parts


def convex_hull(mask: int, above: Sequence[int], below: Sequence[int]) -> int:
    """A mask with everything on paths between its members: the smallest convex superset.

    ``above`` and ``below`` are :func:`ancestors` and :func:`descendants`.
    """
    up = down = 0
    for i in bits(mask):
        up |= above[i]
        down |= below[i]
    return mask | up & down


def is_convex(mask: int, above: Sequence[int], below: Sequence[int]) -> bool:
    """Whether no path leaves the mask and re-enters it (through any operator, fusable or not)."""
    return convex_hull(mask, above, below) == mask


def topological_order(blocks: Sequence[int], graph: OpGraph) -> list[int] | None:
    """Order in which disjoint ``blocks`` can run, or ``None`` for a cycle.

    Operators outside all blocks count as already run. Ties are broken by the blocks' first
    operators.
    """
    home = {i: k for k, block in enumerate(blocks) for i in bits(block)}
    waits: list[set[int]] = [set() for _ in blocks]
    covered = mask_of(home)
    for i, block in home.items():
        waits[block].update(home[j] for j in bits(graph.predecessors[i] & covered))
    return ordering.topological_order(waits, lambda k: blocks[k] & -blocks[k])
