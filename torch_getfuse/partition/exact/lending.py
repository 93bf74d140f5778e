"""Operators in place, merged with their producers but lent to the group that follows.

Where a scheme may run a group better if it starts with an operator that writes over its input (BRR:
the alternation then starts elsewhere), merging such operators with their producers loses plans. The
exact search merges them all the same, and gives each group the choice to *borrow* those that it
reads from: the group that lends one keeps its cost (``docs/exact-search.md`` section 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch_getfuse.ir import WindowKind
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem, merge_in_place


class Entry(NamedTuple):
    """Where a group begins.

    Attributes:
        first: members that read nothing from inside.
        offered: operators that it can borrow.
        alike: whether these are all that its one first member reads. Then it is given up no sooner
            than with them; and if each way to run it reads its weights as often as the one that
            the scheme chooses, borrowing is of no use.
    """

    first: int
    offered: int
    alike: bool


NOTHING = Entry(0, 0, False)


class Lending:
    """What the groups of a problem are made of, and what they can borrow.

    Args:
        problem: the graph and cost model.

    Attributes:
        blocks: operators that are moved as one.
        lent: mask of the operators that a group may have without the rest of their block.
    """

    def __init__(self, problem: FusionProblem) -> None:
        graph = problem.graph
        self.makers = graph.makers
        self.lent = 0
        self.blocks = problem.blocks
        self._plain = 0  # operators that read one tensor, at least as many rows as they write
        if not problem.lends:
            return
        self.blocks = merge_in_place(graph, problem.unfusable)
        for block in self.blocks:
            self.lent |= block & block - 1
        for i, op in enumerate(graph.ops):
            tensors = {read.tensor for read in op.reads}
            grows = {WindowKind.TRANSPOSED, WindowKind.RESIZE} & {r.window.kind for r in op.reads}
            tall = graph.tensors[op.writes].rows
            if not grows and len(tensors) == 1 and tall <= graph.tensors[tensors.pop()].rows:
                self._plain |= 1 << i

    def entry(self, part: Entry, added: int, group: int) -> Entry:
        """Where a group begins that ``added`` made of a part."""
        if not self.lent:
            return NOTHING
        first, before = part.first, 0
        for i in bits(added):
            above = self.makers[i]
            before |= above
            if not above & group:
                first |= 1 << i
        offered = part.offered | before & self.lent & ~group
        alike = (
            not first & (first - 1)
            and bool(first & self._plain)
            and offered == self.makers[first.bit_length() - 1]
        )
        return Entry(first, offered, alike)

    def ways(self, group: int, offered: int) -> Iterator[int]:
        """The group with nothing borrowed, then with each choice of what is offered."""
        chosen = 0
        while True:
            yield group | chosen
            chosen = (chosen - offered) & offered  # the next subset in binary order
            if not chosen:
                return

    def give_back(self, groups: list[int]) -> tuple[int, ...]:
        """Groups in an order in which they can run, without what later ones have borrowed."""
        found = []
        taken = 0
        for group in reversed(groups):
            found.append(group & ~taken)
            taken |= group
        return tuple(found[::-1])
