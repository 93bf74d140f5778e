"""From an edge to the cuts that separate its ends (docs/method.md, section 7).

Removing one edge seldom separates a group: skip connections bypass it. A cut is therefore a
bipartition of the group, represented by its *upper side*: a set of members that contains the
edge's producer ``i`` but not its consumer ``j``, and that is closed under the order (it contains
every member that one of its members depends on). It cuts every edge between the two sides,
including the skips that span ``(i, j)``.

Why the plan stays acyclic: no member of the upper side depends on the rest of the group, so the
two sides can run one after the other. A cycle through both would have to leave the group and
re-enter it, and then the group itself was already on a cycle. The same holds for the connected
parts of each side (:meth:`~.FusionProblem.parts`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch_getfuse.partition.node_set import bits

Edge = tuple[int, int]
"""Producer and consumer, as positions in the graph."""


def edge_cuts(group: int, edge: Edge, above: Sequence[int], below: Sequence[int]) -> list[int]:
    """Upper sides of the cuts that cross ``edge`` inside a group, without duplicates.

    - by topological number: the members up to some member from ``i`` to just before ``j``, the
      cut right after ``i`` first. Closed, because every operator that a member depends on has a
      lower number. Parallel branches are cut at the same height.
    - ``i`` and its ancestors: closed by definition; parallel branches stay whole on the lower
      side.
    - everything but ``j`` and its descendants: closed, because a member that is not a descendant
      of ``j`` depends on none either; parallel branches stay whole on the upper side.

    Args:
        group: mask of the members.
        edge: producer and consumer, both members.
        above, below: :func:`~torch_getfuse.partition.node_set.ancestors` and
            :func:`~torch_getfuse.partition.node_set.descendants` of the graph.

    Raises:
        ValueError: if an end is not a member, or the consumer does not depend on the producer.
    """
    i, j = edge
    if not (group >> i & group >> j & 1 and above[j] >> i & 1):
        raise ValueError(
            f"({i}, {j}) is not an edge of the group: both must be members, "
            f"and {j} must depend on {i}"
        )
    between = group & ((1 << j) - 1) & ~((1 << i) - 1)
    by_number = [group & ((2 << k) - 1) for k in bits(between)]
    upstream = group & (above[i] | 1 << i)
    not_downstream = group & ~(below[j] | 1 << j)
    return list(dict.fromkeys([*by_number, upstream, not_downstream]))
