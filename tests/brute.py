"""The optimum by enumeration: every partition of the fusable operators into legal groups."""

from __future__ import annotations

from collections.abc import Callable

from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.node_set import is_connected, neighbours, topological_order


def brute_force(
    evaluator: Evaluator, allowed: Callable[[int], bool] = lambda group: True
) -> tuple[int, list[int]]:
    """Least ``F_D`` sum over all legal plans, and one plan that has it. At most ~10 operators.

    Args:
        evaluator: without pins.
        allowed: whether a group keeps to what is pinned; where no plan does, the sum is 2^62.
    """
    graph = evaluator.graph
    near = neighbours(graph)
    unfusable = [1 << i for i in range(len(graph)) if not evaluator.valid(1 << i)]
    everything = (1 << len(graph)) - 1 - sum(unfusable)
    legal: dict[int, list[int]] = {}
    mask = everything
    while mask:
        if is_connected(mask, near) and evaluator.valid(mask) and allowed(mask):
            legal.setdefault(mask & -mask, []).append(mask)
        mask = (mask - 1) & everything
    best: tuple[int, list[int]] = (1 << 62, [])

    def extend(left: int, groups: list[int], cost: int) -> None:
        nonlocal best
        if cost >= best[0]:
            return
        if not left:
            if topological_order([*groups, *unfusable], graph) is not None:
                best = (cost, groups)
            return
        for group in legal.get(left & -left, ()):
            if group & ~left == 0:
                extend(left & ~group, [*groups, group], cost + evaluator.dram(group))

    extend(everything, [], 0)
    return best
