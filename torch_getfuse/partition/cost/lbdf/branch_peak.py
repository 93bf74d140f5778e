"""The peak of a region whose branches meet again at once, from tables instead of one by one.

A module of parallel branches is such a *fan*: the fork's tensor, its consumers, and one last node
(a concatenation, or the clock of the sinks) that all of them lead to. :meth:`Region.peak` works out
for every consumer what all the others have demanded, so its time grows with the square of the
branches; here it grows with their number, and what a branch demands is remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TypeVar

import numpy as np

from torch_getfuse.partition.cost.lbdf.axis_maps import Counts, Edge
from torch_getfuse.partition.cost.lbdf.branch_lag import Path, Region, first_along, needed_along

MOST_UNITS = 4096  # of the last node and of each consumer, for all of them are looked at
MOST_REMEMBERED = 1 << 23  # numbers of 8 bytes in the tables of one cost model: 64 MiB

Operands = tuple[tuple[int, Path], ...]
Tables = tuple[Counts, ...]
Key = TypeVar("Key")


class FanTables:
    """What the branches of the fans of one cost model demand, each worked out once.

    Branches are made of the cost model's own edges, so no other model meets them again. When the
    tables reach ``MOST_REMEMBERED`` numbers, all are forgotten.
    """

    def __init__(self) -> None:
        self._needs: dict[tuple[Operands | None, Path, int], Tables] = {}
        self._branches: dict[tuple[Operands, Edge, tuple[Path, ...], int], Tables] = {}
        self._size = 0

    @property
    def size(self) -> int:
        """Numbers that are remembered."""
        return self._size

    def peak(self, region: Region) -> int | None:
        """Peak live units of the tensor, equal to ``region.peak()``; ``None`` if it is no fan.

        When a consumer writes a unit, it and the last node are in the middle of one, and no other
        node is. So the operands of the last node that stand before the consumer's have been served
        for its unit at work, those after it for the unit before, and tables over the last node's
        units tell what each has demanded of the tensor.
        """
        nodes, steps = region.operands, region.steps
        sources = [source for source, _ in nodes[-1]]
        if (
            not 0 < steps <= MOST_UNITS
            or any(source for operands in nodes[1:-1] for source, _ in operands)
            or any(edge.units_out > MOST_UNITS for _, edge in region.consumers)
        ):
            return None
        nothing = np.zeros((1, steps + 1), np.int64)
        table = [
            self._demanded(nodes[source] if source else None, path, steps)
            for source, path in nodes[-1]
        ]
        # Units demanded through the operands before each one, and from each one on.
        before = np.maximum.accumulate(np.concatenate([nothing, table]))
        after = np.maximum.accumulate(np.concatenate([table, nothing])[::-1])[::-1]
        peak = 1
        for node, edge in region.consumers:
            if node == len(nodes) - 1:  # the last node itself: all its operands have been served
                held = before[-1, 1:] - edge.released_all(np.arange(steps))
            else:
                slots = [slot for slot, source in enumerate(sources) if source == node]
                paths = tuple(nodes[-1][slot][1] for slot in slots)
                at, work, through, own, released = self._branch(nodes[node], edge, paths, steps)
                if len(slots) == 1:
                    (slot,) = slots
                    others = np.maximum(before[slot, at], after[slot + 1, at - 1])
                else:
                    others = np.zeros_like(at)
                    chosen = np.array(slots)[through]
                    for slot, needs in enumerate(table):
                        if slot not in slots:
                            others = np.maximum(others, needs[at - (slot > chosen)])
                held = np.where(work, np.maximum(others, own), before[-1, -1]) - released
            peak = max(peak, int(held.max()))
        return peak

    def _demanded(self, operands: Operands | None, path: Path, steps: int) -> Counts:
        """Units of the tensor that so many units of the last node need through one operand."""
        key = operands, path, steps
        (found,) = self._known(self._needs, key, lambda: (_demanded(*key),))
        return found

    def _branch(
        self, operands: Operands, edge: Edge, paths: tuple[Path, ...], steps: int
    ) -> Tables:
        key = operands, edge, paths, steps
        return self._known(self._branches, key, lambda: _branch(*key))

    def _known(self, tables: dict[Key, Tables], key: Key, work_out: Callable[[], Tables]) -> Tables:
        found = tables.get(key)
        if found is None:
            found = work_out()
            if self._size >= MOST_REMEMBERED:
                self._needs.clear()
                self._branches.clear()
                self._size = 0
            tables[key] = found
            self._size += sum(table.size for table in found)
        return found


def _own(operands: Operands, counts: Counts) -> Counts:
    """Units of the tensor that so many units of a consumer need."""
    needs = (needed_along(path, counts) for _, path in operands)
    return reduce(np.maximum, needs, np.zeros_like(counts))


def _demanded(operands: Operands | None, path: Path, steps: int) -> Counts:
    """Units of the tensor that each number of the last node's units needs through one operand."""
    counts = needed_along(path, np.arange(steps + 1))
    return counts if operands is None else _own(operands, counts)


def _branch(operands: Operands, edge: Edge, paths: tuple[Path, ...], steps: int) -> Tables:
    """A consumer on its own: when it writes each of its units, and what it then holds.

    Returns, per unit: the last node's unit at work (from 1); whether it is demanded at all, through
    which of the paths first; units of the tensor that the consumer has demanded, and let go.
    """
    units = np.arange(edge.units_out)
    firsts = np.stack([first_along(path, units + 1) for path in paths])
    wanted = firsts.min(axis=0)
    work = wanted <= steps
    final = max(int(needed_along(path, np.array([steps]))[0]) for path in paths)
    released = edge.released_all(np.where(work, units, final))
    at = np.where(work, wanted, 1)
    return at, work, firsts.argmin(axis=0), _own(operands, units + 1), released
