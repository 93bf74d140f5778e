"""Orders and cycles of small graphs whose nodes are numbers. No torch."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence
from typing import Any


def topological_order(
    waits: Sequence[Collection[int]], key: Callable[[int], Any]
) -> list[int] | None:
    """Nodes so that each comes after those it waits for; ``None`` if there is a cycle.

    Args:
        waits: of node ``k`` at position ``k``; a node may name itself, which says nothing.
        key: of the nodes that are ready, the one with the least comes next. Distinct.
    """
    left = [len({*earlier} - {k}) for k, earlier in enumerate(waits)]
    unlocks: list[list[int]] = [[] for _ in waits]
    for k, earlier in enumerate(waits):
        for other in {*earlier} - {k}:
            unlocks[other].append(k)
    ready = [(key(k), k) for k, count in enumerate(left) if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        _, node = heapq.heappop(ready)
        order.append(node)
        for later in unlocks[node]:
            left[later] -= 1
            if not left[later]:
                heapq.heappush(ready, (key(later), later))
    return order if len(order) == len(waits) else None


def cycles(follows: Sequence[Collection[int]]) -> list[list[int]]:
    """The strongly connected components of more than one node, each in ascending order.

    Args:
        follows: the nodes that come after node ``k`` at position ``k``.
    """
    if topological_order(follows, lambda k: k) is not None:
        return []
    # Here, for it takes half a second to import, and hardly any plan has a cycle.
    import numpy as np
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = len(follows)
    edges = [(k, other) for k in range(count) for other in follows[k]]
    rows, columns = np.array(edges).T
    graph = coo_matrix((np.ones(len(edges), np.int8), (rows, columns)), (count, count))
    number, labels = connected_components(graph, directed=True, connection="strong")
    found: list[list[int]] = [[] for _ in range(number)]
    for node, label in enumerate(labels.tolist()):
        found[label].append(node)
    return sorted(component for component in found if len(component) > 1)
