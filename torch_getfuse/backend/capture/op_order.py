"""The order between operators that their tensors do not give: from FX nodes to ``Op.after``.

A plan is made of operators and split into nodes. So that every legal plan can be split, whatever
orders two nodes (:mod:`effects`), along whatever nodes that belong to no operator, must order
their operators as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from torch_getfuse.backend.capture.graph_values import Draft
from torch_getfuse.backend.fx_nodes.autocast import is_switch
from torch_getfuse.backend.fx_nodes.effects import order_edges
from torch_getfuse.partition.node_set import bits


class OperatorOrder:
    """Which operators must run before each node of a graph.

    Args:
        gm: the graph that the operators were found in.
        drafts: its operators in the order of the program; the first node of each computes it.
    """

    def __init__(self, gm: fx.GraphModule, drafts: Sequence[Draft]) -> None:
        self._own = {id(draft): 1 << k for k, draft in enumerate(drafts)}
        own = {draft.nodes[0]: 1 << k for k, draft in enumerate(drafts)}
        nodes = [
            node
            for node in gm.graph.nodes
            if node.op not in ("placeholder", "output", "get_attr") and not is_switch(node)
        ]
        self._before: dict[fx.Node, int] = {}
        for node, earlier in zip(nodes, order_edges(gm, nodes), strict=True):
            mask = 0
            for j in earlier:
                mask |= self._before[nodes[j]] | own.get(nodes[j], 0)
            self._before[node] = mask

    def joins(self, node: fx.Node, draft: Draft) -> bool:
        """Whether all operators that must run before a node must run before an operator anyway.

        Then the operator can have the node as its own: nothing else comes to wait for anything.
        """
        core = draft.nodes[0]
        return not self._before[node] & ~(self._before[core] | self._own[id(draft)])

    def fold(self, draft: Draft, into: Draft) -> None:
        """Take what computes an operator for a part of another, which it joins."""
        self._own[id(into)] |= self._own[id(draft)]

    def after(self, drafts: Sequence[Draft]) -> list[list[int]]:
        """Per operator, the fewest others that complete the order which their tensors give.

        Args:
            drafts: those of the graph that are left, others being folded into them, in order.

        Returns:
            Positions among ``drafts``, ascending.
        """
        place = {i: k for k, draft in enumerate(drafts) for i in bits(self._own[id(draft)])}
        writer = {draft.writes: k for k, draft in enumerate(drafts)}
        above: list[int] = []  # by position among the drafts
        found = []
        for k, draft in enumerate(drafts):
            known = _closed((writer[base] for base, _ in draft.reads if base in writer), above)
            needed = 0
            for number in bits(self._before[draft.nodes[0]]):
                needed |= 1 << place[number]
            needed &= ~(1 << k)  # parts of its own may come before its core
            added = []
            while missing := needed & ~known:
                last = missing.bit_length() - 1
                added.append(last)
                known |= _closed((last,), above)
            above.append(known)
            found.append(added[::-1])
        return found


def _closed(positions: Iterable[int], above: Sequence[int]) -> int:
    """The mask of some operators and all that must run before them."""
    mask = 0
    for k in positions:
        mask |= above[k] | 1 << k
    return mask
