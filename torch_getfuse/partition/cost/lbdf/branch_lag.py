"""How far the schedule of docs/method.md, section 3 runs ahead of a tensor's consumers.

A :class:`Region` is the subgraph between a tensor with several consumers and the operator where
their paths meet again, reduced to what the peak depends on: a small DAG of windows without names.
Regions of the same structure are equal, so repeated blocks of a network are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np

from torch_getfuse.partition.cost.lbdf.axis_maps import NEVER, Counts, Edge, sample_positions

Rank = tuple[Any, ...]
"""Nested numbers, the first of which says what follows, so that any two can be compared."""


@dataclass(frozen=True, slots=True)
class Clock:
    """The sinks' common clock as an edge: ``ceil(q*length/steps)`` units after step ``q``.

    Attributes:
        length, rows: units and rows of the sink.
        steps, step_rows: units and rows of the longest sink.
    """

    length: int
    rows: int
    steps: int
    step_rows: int

    @property
    def rank(self) -> Rank:
        return 1, self.length, self.rows, self.steps, self.step_rows

    def needed_all(self, counts: Counts) -> Counts:
        return -(-counts * self.length // self.steps)

    def first_all(self, counts: Counts) -> Counts:
        first = (np.minimum(counts, self.length + 1) - 1) * self.steps // self.length + 1
        return np.where(counts > self.length, NEVER, first)


@dataclass(frozen=True, slots=True)
class Join:
    """Parallel paths between the same two nodes as one edge.

    The operators on them demand units of the lower node only to produce the next unit of the upper
    node; so the demand on the lower node is the maximum over the paths.
    """

    paths: tuple[Path, ...]
    rank: Rank = field(compare=False, repr=False)

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Join:
        """Equal whatever the order of the paths, and in any process."""
        ranks = sorted(((_rank(path), path) for path in paths), key=lambda ranked: ranked[0])
        return cls(tuple(path for _, path in ranks), (2, *(rank for rank, _ in ranks)))

    def needed_all(self, counts: Counts) -> Counts:
        return reduce(np.maximum, (needed_along(path, counts) for path in self.paths))

    def first_all(self, counts: Counts) -> Counts:
        return reduce(np.minimum, (first_along(path, counts) for path in self.paths))


Step = Edge | Clock | Join
Path = tuple[Step, ...]


def needed_along(path: Path, counts: Counts) -> Counts:
    """Units at the lower end of a path that ``counts`` units at its upper end need."""
    for edge in path:
        counts = edge.needed_all(counts)
    return counts


def first_along(path: Path, counts: Counts) -> Counts:
    """Fewest units at the upper end of a path that need ``counts`` units at its lower end."""
    for edge in reversed(path):
        counts = edge.first_all(counts)
    return counts


def join(paths: Iterable[Path]) -> Path:
    """Parallel paths between the same two nodes as one path: the one that covers all, if any."""
    kept = list(dict.fromkeys(paths))
    for path in kept:
        if all(covers(path, other) for other in kept):
            return path
    found = kept[0]
    # What all have in common is asked once; else the paths of a chain of branches double at each.
    head = _alike(kept)
    kept = [path[head:] for path in kept]
    if head:
        return (*found[:head], *join(kept))
    tail = _alike([path[::-1] for path in kept])
    if tail:
        return (*join([path[:-tail] for path in kept]), *found[len(found) - tail :])
    return (Join.of(kept),)


def _rank(path: Path) -> Rank:
    return tuple(step.rank for step in path)


def _alike(paths: Sequence[Path]) -> int:
    """Number of edges with which all paths begin."""
    count = 0
    for edges in zip(*paths, strict=False):
        if any(edge is not edges[0] and edge != edges[0] for edge in edges):
            break
        count += 1
    return count


def covers(path: Path, other: Path) -> bool:
    """Whether ``path`` provably never needs less than ``other``; ``False`` if that is unclear."""
    if path == other:
        return True
    if path and isinstance(path[-1], Edge) and path[-1].takes_all:
        return all(isinstance(edge, Edge) and edge.needed(1) > 0 for edge in path)
    return not other and all(_expands(edge) for edge in path)


def _edges(path: Path) -> int:
    """Number of edges on a path, those of parallel paths added up."""
    return sum(sum(map(_edges, e.paths)) if isinstance(e, Join) else 1 for e in path)


def _expands(edge: Step) -> bool:
    """Whether ``n`` units always need at least ``n``."""
    if isinstance(edge, Join):
        return any(all(map(_expands, path)) for path in edge.paths)
    return isinstance(edge, Edge) and edge.expands


@dataclass(frozen=True, slots=True)
class Region:
    """The operators between a tensor and the point where its consumers meet again.

    Node 0 is the tensor; the last node drives the schedule: the operator where all paths meet, or
    the sinks' common clock. An operator in between that reads only one node, by any number of
    paths, is not a node: units of that node are made exactly when, and in the order in which, the
    operator's units are demanded, so its edges become part of its consumers' paths.

    Attributes:
        operands: per node its operands in order, each an earlier node and the edges on the path to
            it, from the consumer down.
        consumers: the tensor's consumers that hold it, as (node, edge).
        steps: units that the last node writes.
    """

    operands: tuple[tuple[tuple[int, Path], ...], ...]
    consumers: tuple[tuple[int, Edge], ...]
    steps: int

    @property
    def questions(self) -> int:
        """How many edges are asked for the peak, roughly; what its time is proportional to."""
        edges = sum(_edges(path) for operands in self.operands for _, path in operands)
        return 2 * edges * len(self.consumers)

    def peak(self) -> int:
        """Peak live units of the tensor."""
        peak = 1
        for node, edge in self.consumers:
            units = self._samples(node, edge)
            produced, written = self._produced_when(node, units)
            peak = max(peak, int((produced - edge.released_all(written)).max()))
            final = int(written.max())
            if final <= units[-1]:
                # The schedule ends before the consumer does, possibly in the middle of a row.
                units = np.arange(max(0, final - len(units)), final)
                if len(units):
                    produced, written = self._produced_when(node, units)
                    peak = max(peak, int((produced - edge.released_all(written)).max()))
        return peak

    def _produced_when(self, consumer: int, units: Counts) -> tuple[Counts, Counts]:
        """Units of the tensor that exist when ``consumer`` writes each of ``units``.

        Returns them with the number of units that the consumer has written by then: the unit's
        index, or fewer at the end of the schedule if that unit is never demanded.

        An upward pass determines after how many units each node first demands that unit, and
        through which operand (the first in operand order, which is served first). This gives the
        chain of active nodes, each in the middle of one unit. A downward pass then counts:
        operands before the active one have been served for the unit in progress, those after it
        only for the units before; nodes off the chain have produced what their consumers demanded.
        """
        operands = self.operands
        last = len(operands) - 1
        demanded: dict[int, Counts] = {consumer: units + 1}
        through: dict[int, Counts] = {}
        for node in range(consumer + 1, last + 1):
            for slot, (source, path) in enumerate(operands[node]):
                if source in demanded:
                    counts = first_along(path, demanded[source])
                    if node not in demanded:
                        demanded[node], through[node] = counts, np.full_like(units, slot)
                    else:
                        earlier = counts < demanded[node]
                        demanded[node] = np.where(earlier, counts, demanded[node])
                        through[node] = np.where(earlier, slot, through[node])
        working = {last: demanded[last] <= self.steps}  # every consumer leads to the last node
        for node in range(last, consumer, -1):
            if node in working and node in through:
                for slot, (source, _) in enumerate(operands[node]):
                    if source in demanded:
                        here = working[node] & (through[node] == slot)
                        working[source] = working[source] | here if source in working else here
        counts_of: dict[int, Counts] = {last: np.full_like(units, self.steps)}
        for node in range(last, 0, -1):
            work = working.get(node)
            if work is not None:
                counts_of[node] = np.where(work, demanded[node] - 1, counts_of.get(node, 0))
            counts = counts_of[node]
            for slot, (source, path) in enumerate(operands[node]):
                done = counts
                if work is not None:
                    # Served for the unit in progress, if this operand is before the active one.
                    before = work if node == consumer else work & (slot < through[node])
                    done = done + before
                done = needed_along(path, done)
                if work is not None and node != consumer and source in demanded:
                    # The active operand's node is on the chain, which has its own count.
                    done = np.where(work & (slot == through[node]), 0, done)
                known = counts_of.get(source)
                counts_of[source] = done if known is None else np.maximum(known, done)
        return counts_of[0], counts_of[consumer]

    def _samples(self, consumer: int, edge: Edge) -> Counts:
        """Units of a consumer among which its peak is reached.

        Between the borders no window of the region is clipped, and the schedule is periodic; if
        the rates of the region's nodes are inconsistent there is no period, and all units are
        returned.
        """
        if not edge.rows.a and not (edge.cols and edge.cols.a):
            return np.zeros(1, np.int64)  # all is demanded for the first unit, held to the last
        rows = np.array(self._axis_samples(consumer, edge.rows.size_out, columns=False))
        if edge.cols is None:
            return rows
        cols = np.array(self._axis_samples(consumer, edge.cols.size_out, columns=True))
        units: Counts = rows[:, None] * edge.cols.size_out + cols
        return units.ravel()

    def _axis_samples(self, consumer: int, size: int, columns: bool) -> list[int]:
        # Units per unit of the consumer, as fractions. A node connected to it only by a window that
        # needs everything has no rate: its units are all demanded at once.
        links: dict[object, list[tuple[object, int, int, float]]] = {}
        for lower, upper, up, down, reach in self._ratios(columns):
            if not up:
                return list(range(size))
            links.setdefault(lower, []).append((upper, up, down, reach))
            links.setdefault(upper, []).append((lower, down, up, -1.0))
        rates: dict[object, tuple[int, int]] = {consumer: (1, 1)}
        waiting: list[object] = [consumer]
        total, period = 0.0, 1
        while waiting:
            node = waiting.pop()
            numerator, denominator = rates[node]
            period = math.lcm(period, denominator)
            for other, up, down, reach in links.get(node, ()):
                common = math.gcd(numerator * up, denominator * down)
                rate = numerator * up // common, denominator * down // common
                if reach > 0:
                    total += reach * denominator / numerator
                if other not in rates:
                    rates[other] = rate
                    waiting.append(other)
                elif rates[other] != rate:
                    return list(range(size))
        return sample_positions(size, math.ceil(total) + 2, period)

    def _ratios(self, columns: bool) -> Iterator[tuple[object, object, int, int, float]]:
        """Each edge as (lower, upper, units of upper, per units of lower, reach).

        0 units of upper: there is no fixed ratio along this axis.
        """
        for node, operands in enumerate(self.operands):
            for source, path in operands:
                yield from _path_ratios(source, node, path, columns)


def _path_ratios(
    lower: object, upper: object, path: Path, columns: bool
) -> Iterator[tuple[object, object, int, int, float]]:
    if not path:
        yield lower, upper, 1, 1, 0.0
    for k, edge in enumerate(path):
        below = lower if k == len(path) - 1 else object()  # whatever is on the way
        if isinstance(edge, Join):
            for alternative in edge.paths:
                yield from _path_ratios(below, upper, alternative, columns)
        elif isinstance(edge, Clock):
            if edge.length > 1:  # a single unit is demanded at the first step
                same_clock = (edge.length, edge.rows) == (edge.steps, edge.step_rows)
                if columns:
                    yield below, upper, int(same_clock), 1, 0.0
                else:
                    # After so many rows both are at the start of a row again; in between, one
                    # may be anywhere in a row.
                    yield below, upper, edge.step_rows, edge.rows, 0.0 if same_clock else 1.0
        else:
            axis = edge.cols if columns else edge.rows
            assert axis is not None
            if axis.a:
                yield below, upper, axis.c, axis.a, axis.reach
        upper = below
