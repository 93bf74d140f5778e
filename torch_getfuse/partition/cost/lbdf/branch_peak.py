"""The peak of a region whose branches all meet in one node, computed from tables per branch.

A module of parallel branches is such a *fan*: the tensor at the fork, its consumers, and one last
node (a concatenation, or the clock of the sinks) that all of them lead to. :meth:`Region.peak`
computes for every consumer what all the others have demanded, so its time is quadratic in the
number of branches; here it is linear, and the demand of each branch is cached.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TypeVar

import numpy as np

from torch_getfuse.partition.cost.lbdf.axis_maps import Counts, Edge
from torch_getfuse.partition.cost.lbdf.branch_lag import Path, Region, first_along, needed_along

MOST_UNITS = 4096  # of the last node and of each consumer, as the tables contain all units
MOST_REMEMBERED = 1 << 23  # 8-byte integers in the tables of one cost model: 64 MiB

Operands = tuple[tuple[int, Path], ...]
Tables = tuple[Counts, ...]
Key = TypeVar("Key")


class FanTables:
    """Cached demand of the branches of all fans of one cost model.

    Branches consist of the cost model's own edges, so other models cannot share them. When the
    tables reach ``MOST_REMEMBERED`` integers, all are dropped.
    """

    def __init__(self) -> None:
        self._needs: dict[tuple[Operands | None, Path, int], Tables] = {}
        self._branches: dict[tuple[Operands, Edge, tuple[Path, ...], int], Tables] = {}
        self._size = 0

    @property
    def size(self) -> int:
        """Number of cached integers."""
        return self._size

    def peak(self, region: Region) -> int | None:
        """Peak live units of the tensor, equal to ``region.peak()``; ``None`` if it is not a fan.

        When a consumer writes a unit, only it and the last node are in the middle of a unit. So
        the operands of the last node before the consumer's have been served for its unit in
        progress, those after it for the unit before, and tables over the last node's units give
        the demand of each on the tensor.
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
                unit, work, through, own_demand, released = self._branch(
                    nodes[node], edge, paths, steps
                )
                if len(slots) == 1:
                    (slot,) = slots
                    others = np.maximum(before[slot, unit], after[slot + 1, unit - 1])
                else:
                    others = np.zeros_like(unit)
                    chosen = np.array(slots)[through]
                    for slot, needs in enumerate(table):
                        if slot not in slots:
                            others = np.maximum(others, needs[unit - (slot > chosen)])
                held = np.where(work, np.maximum(others, own_demand), before[-1, -1]) - released
            peak = max(peak, int(held.max()))
        return peak

    def _demanded(self, operands: Operands | None, path: Path, steps: int) -> Counts:
        """Units of the tensor needed through one operand, by number of units of the last node."""
        key = operands, path, steps
        (demand,) = self._cached(self._needs, key, lambda: (_demanded(*key),))
        return demand

    def _branch(
        self, operands: Operands, edge: Edge, paths: tuple[Path, ...], steps: int
    ) -> Tables:
        key = operands, edge, paths, steps
        return self._cached(self._branches, key, lambda: _branch(*key))

    def _cached(self, tables: dict[Key, Tables], key: Key, compute: Callable[[], Tables]) -> Tables:
        entry = tables.get(key)
        if entry is None:
            entry = compute()
            if self._size >= MOST_REMEMBERED:
                self._needs.clear()
                self._branches.clear()
                self._size = 0
            tables[key] = entry
            self._size += sum(table.size for table in entry)
        return entry


def _own_demand(operands: Operands, counts: Counts) -> Counts:
    """Units of the tensor that ``counts`` units of a consumer need."""
    needs = (needed_along(path, counts) for _, path in operands)
    return reduce(np.maximum, needs, np.zeros_like(counts))


def _demanded(operands: Operands | None, path: Path, steps: int) -> Counts:
    """Units of the tensor needed through one operand, by number of units of the last node."""
    counts = needed_along(path, np.arange(steps + 1))
    return counts if operands is None else _own_demand(operands, counts)


def _branch(operands: Operands, edge: Edge, paths: tuple[Path, ...], steps: int) -> Tables:
    """When a single consumer writes each of its units, and what it holds then.

    Returns, per unit: the last node's unit in progress (from 1); whether the unit is demanded at
    all; the path that demands it first; units of the tensor that the consumer has demanded, and
    released.
    """
    units = np.arange(edge.units_out)
    firsts = np.stack([first_along(path, units + 1) for path in paths])
    wanted = firsts.min(axis=0)
    work = wanted <= steps
    final = max(int(needed_along(path, np.array([steps]))[0]) for path in paths)
    released = edge.released_all(np.where(work, units, final))
    at = np.where(work, wanted, 1)
    return at, work, firsts.argmin(axis=0), _own_demand(operands, units + 1), released
