"""Fusion groups as bit masks: connectivity and convexity.

Groups are connected through tensors; the order that they run in obeys ``Op.after`` as well. A set
of operators is an ``int`` whose bit *i* stands for ``graph.ops[i]``; operators stand in topological
order, so a mask's lowest bit is its first operator.
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
    found: list[int] = []
    for mask in graph.predecessors:
        total = mask
        for i in bits(mask):
            total |= found[i]
        found.append(total)
    return tuple(found)


def descendants(graph: OpGraph, data: bool = False) -> tuple[int, ...]:
    """Per operator, the mask of all operators that must run after it (itself excluded).

    ``data``: only of those that what it writes goes into.
    """
    found = [0] * len(graph)
    after = graph.readers if data else graph.successors
    for position in reversed(range(len(graph))):
        total = after[position]
        for i in bits(total):
            total |= found[i]
        found[position] = total
    return tuple(found)


class Neighbours(tuple[int, ...]):
    """Per operator, the mask of its producers and consumers.

    Most operators read the one before them, so what is asked of connectivity goes by *runs*:
    operators of a mask with consecutive positions, each a neighbour of the one before. A long
    chain is one step of big-integer arithmetic, and only edges that are not such a step, those of
    skips and branches, are followed one by one.
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
        """The runs of a mask, each of which is connected, by their first operator."""
        inner = mask & mask >> 1 & self._next  # members of a run but its last
        starts = mask & ~(inner << 1)
        found = []
        while starts:
            low = starts & -starts
            starts ^= low
            # The sum carries through the run: it clears the inner members and sets the last.
            found.append(inner + low ^ inner)
        return found

    def component(self, runs: list[int]) -> tuple[int, list[int]]:
        """The component of the first of some runs, and the runs that it leaves over."""
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
    """The weakly connected components of a mask, by their first operator."""
    runs = near.runs(mask)
    found = []
    while runs:
        reached, runs = near.component(runs)
        found.append(reached)
    return found


def convex_hull(mask: int, above: Sequence[int], below: Sequence[int]) -> int:
    """A mask with everything on paths between its members: the least convex one.

    ``above`` and ``below`` are :func:`ancestors` and :func:`descendants`.
    """
    up = down = 0
    for i in bits(mask):
        up |= above[i]
        down |= below[i]
    return mask | up & down


def is_convex(mask: int, above: Sequence[int], below: Sequence[int]) -> bool:
    """Whether no path leaves the mask and comes back (through any operator, fusable or not)."""
    return convex_hull(mask, above, below) == mask


def topological_order(blocks: Sequence[int], graph: OpGraph) -> list[int] | None:
    """Order in which disjoint ``blocks`` can run, or ``None`` for a cycle.

    Operators of no block are taken to have run. Of several orders, the one that follows the
    operators' own order is taken.
    """
    home = {i: k for k, block in enumerate(blocks) for i in bits(block)}
    waits: list[set[int]] = [set() for _ in blocks]
    covered = mask_of(home)
    for i, block in home.items():
        waits[block].update(home[j] for j in bits(graph.predecessors[i] & covered))
    return ordering.topological_order(waits, lambda k: blocks[k] & -blocks[k])
