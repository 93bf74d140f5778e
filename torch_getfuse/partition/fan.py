"""The peak of a region whose branches meet again at once, from tables instead of one by one.

A module of parallel branches is such a *fan*: the fork's tensor, its consumers, and one last node
(a concatenation, or the clock of the sinks) that all of them lead to. :meth:`Region.peak` works out
for every consumer what all the others have demanded, so its time grows with the square of the
branches; here it grows with their number.
"""

from __future__ import annotations

from functools import reduce

import numpy as np

from torch_getfuse.partition.region import Region, first_along, needed_along
from torch_getfuse.partition.stream import Counts

MOST_UNITS = 4096  # of the last node and of each consumer, for all of them are looked at


def fan_peak(region: Region) -> int | None:
    """Peak live units of the tensor, equal to ``region.peak()``; ``None`` if it is no fan.

    When a consumer writes a unit, it and the last node are in the middle of one, and no other node
    is. So the operands of the last node that stand before the consumer's have been served for its
    unit at work, those after it for the unit before, and tables over the last node's units tell
    what each has demanded of the tensor.
    """
    *middle, ends = region.operands[1:]
    sources = [source for source, _ in ends]
    if (
        not 0 < region.steps <= MOST_UNITS
        or any(source for operands in middle for source, _ in operands)
        or any(edge.units_out > MOST_UNITS for _, edge in region.consumers)
    ):
        return None

    def demanded(node: int, counts: Counts) -> Counts:
        """Units of the tensor that so many units of a node need."""
        if not node:
            return counts
        needs = (needed_along(path, counts) for _, path in middle[node - 1])
        return reduce(np.maximum, needs, np.zeros_like(counts))

    steps = np.arange(region.steps + 1)
    nothing = np.zeros((1, len(steps)), np.int64)
    table = [demanded(source, needed_along(path, steps)) for source, path in ends]
    # Units demanded through the operands before each one, and from each one on.
    before = np.maximum.accumulate(np.concatenate([nothing, table]))
    after = np.maximum.accumulate(np.concatenate([table, nothing])[::-1])[::-1]
    peak = 1
    for node, edge in region.consumers:
        if node > len(middle):  # the last node itself: all its operands have been served
            produced, written = before[-1, 1:], steps[:-1]
        else:
            slots = [slot for slot, source in enumerate(sources) if source == node]
            units = np.arange(edge.units_out)
            firsts = np.stack([first_along(ends[slot][1], units + 1) for slot in slots])
            wanted = firsts.min(axis=0)
            work = wanted <= region.steps  # the others are never demanded
            at = np.where(work, wanted, 1)
            if len(slots) == 1:
                (slot,) = slots
                produced = np.maximum(before[slot, at], after[slot + 1, at - 1])
            else:
                through = np.array(slots)[firsts.argmin(axis=0)]
                produced = np.zeros_like(units)
                for slot, needs in enumerate(table):
                    if slot not in slots:
                        produced = np.maximum(produced, needs[at - (slot > through)])
            produced = np.maximum(produced, demanded(node, units + 1))
            produced = np.where(work, produced, before[-1, -1])
            final = max(int(needed_along(ends[slot][1], steps[-1:])[0]) for slot in slots)
            written = np.where(work, units, final)
        peak = max(peak, int((produced - edge.released_all(written)).max()))
    return peak
