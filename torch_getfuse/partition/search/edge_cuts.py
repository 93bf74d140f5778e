"""From an edge to the cuts that separate its ends (docs/method.md, section 7).

Taking one edge out of a group seldom separates anything: skip connections run beside it. A cut
is therefore a bipartition of the group, named by its *upper side*: a set of members that contains
the edge's producer ``i`` and not its consumer ``j``, and that is closed under the order (it
contains every member that one of its members depends on). All edges that cross it, the skips that
span ``(i, j)`` among them, go with it.

Why the plan stays acyclic: inside the group nothing on the upper side depends on the rest, so the
two sides can run one after the other. A cycle through both would have to leave the group and come
back, and then the group was on a cycle already. The same holds for the parts of each side
(:meth:`~.FusionProblem.parts`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch_getfuse.partition.node_set import bits

Edge = tuple[int, int]
"""Producer and consumer, as positions in the graph."""


def edge_cuts(group: int, edge: Edge, above: Sequence[int], below: Sequence[int]) -> list[int]:
    """Upper sides of the cuts that take ``edge`` out of a group; each once.

    - by topological number: the members numbered up to some member from ``i`` to just before
      ``j``, the one up to ``i`` first. Closed, for everything that an operator depends on has a
      lower number. Parallel branches are cut at the same height.
    - ``i`` and its ancestors: closed by definition; parallel branches stay below whole.
    - everything but ``j`` and its descendants: closed, for what a member depends on is no
      descendant of ``j`` unless the member is one itself; parallel branches stay above whole.

    Args:
        group: mask of the members.
        edge: producer and consumer, both members.
        above, below: :func:`~torch_getfuse.partition.node_set.ancestors` and
            :func:`~torch_getfuse.partition.node_set.descendants` of the graph.

    Raises:
        ValueError: where an end is no member, or the consumer does not depend on the producer.
    """
    i, j = edge
    if not (group >> i & group >> j & 1 and above[j] >> i & 1):
        raise ValueError(
            f"({i}, {j}) is no edge of the group: both must be members, and {j} must depend on {i}"
        )
    between = group & ((1 << j) - 1) & ~((1 << i) - 1)
    by_number = [group & ((2 << k) - 1) for k in bits(between)]
    upstream = group & (above[i] | 1 << i)
    not_downstream = group & ~(below[j] | 1 << j)
    return list(dict.fromkeys([*by_number, upstream, not_downstream]))
