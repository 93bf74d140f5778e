"""What the schedules of a group depend on: its operators and windows, without names or bytes.

A network repeats its blocks, so many of the groups that a search looks at have the same *shape*:
the same operators over maps of the same height, through the same windows. What takes time is worked
out once per shape, in units: what a storage holds in stripes, and whether the readers of a tensor
let go of it before another is written over it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from torch_getfuse.partition.cost.lbdf.axis_maps import Edge

Units = NDArray[np.int64]


_TABLE, _OPERATOR, _ELEMENTS = 130, 12, 60
"""Steps counted for a table, for each operator, and one more for so many stripes."""

MOST_STRIPES = 512
"""Most stripes that are priced: what streams is read that often, and lines hold less."""


class Flow:
    """A window over a stream of units, as tables.

    Args:
        edge: the window.

    Attributes:
        needed: by number of output units, the length of the prefix of input units that they need.
        released: by number of output units, the length of the prefix that none after them needs.
        holds: ``False`` for a reduction, which takes in each unit as it arrives.
    """

    __slots__ = ("holds", "needed", "released")

    def __init__(self, edge: Edge) -> None:
        counts = np.arange(edge.units_out + 1)
        self.needed: Units = edge.needed_all(counts)
        self.released: Units = edge.released_all(counts)
        self.holds = edge.holds


class Operator(NamedTuple):
    """An operator of a shape; tensors are numbered as they appear in its operators.

    Attributes:
        writes: its tensor.
        units: that this has.
        reads: each operand, and the window over it.
        over: the operand that it writes over by docs/method.md, section 3; -1 for none.
        may: operands that it may be written over where both tensors are resident (section 12).
    """

    writes: int
    units: int
    reads: tuple[tuple[int, Flow], ...]
    over: int
    may: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Link:
    """A tensor that may be written over an operand where both are resident.

    Attributes:
        source, target: the operand, and the tensor written over it.
        below, above: the storage that ends with the operand, and the one that begins with the
            tensor.
        op: the operator, by its place in the shape.
        others: the other operators that read the operand.
    """

    source: int
    target: int
    below: int
    above: int
    op: int
    others: tuple[int, ...]


class Shape:
    """The schedules of all groups of one shape.

    Args:
        operators: in the order of the graph.
        lasts: the last tensor of each storage.
        count: counts steps of what is worked out.

    Attributes:
        storages: the tensors of each storage, as they are written over each other.
        links: see the class.
        longest: units of the longest sink.
        most_stripes: as many, but no more than :data:`MOST_STRIPES`.
    """

    def __init__(
        self, operators: tuple[Operator, ...], lasts: Sequence[int], count: Callable[[int], None]
    ) -> None:
        self.operators, self._count = operators, count
        self._readers: dict[int, list[tuple[int, Flow]]] = {}
        makers: dict[int, Operator] = {}
        for at, op in enumerate(operators):
            makers[op.writes] = op
            for tensor, flow in op.reads:
                self._readers.setdefault(tensor, []).append((at, flow))
        self.sinks = [op.writes for op in operators if op.writes not in self._readers]
        self._units = {op.writes: op.units for op in operators}
        self.longest = max(self._units[tensor] for tensor in self.sinks)
        self.most_stripes = min(self.longest, MOST_STRIPES)
        self.storages: list[tuple[int, ...]] = []
        for last in lasts:
            row = [last]
            while row[0] in makers and makers[row[0]].over >= 0:
                row.insert(0, makers[row[0]].over)
            self.storages.append(tuple(row))
        self.links = self._find_links()
        self._tables: dict[int, Units] = {}
        self._stripe_links: dict[int, int] = {}

    def _find_links(self) -> list[Link]:
        starts = {row[0]: k for k, row in enumerate(self.storages)}
        ends = {row[-1]: k for k, row in enumerate(self.storages)}
        links = []
        for at, op in enumerate(self.operators):
            for source in op.may:
                if source in ends and op.writes in starts:
                    others = tuple(k for k, _ in self._readers[source] if k != at)
                    links.append(
                        Link(source, op.writes, ends[source], starts[op.writes], at, others)
                    )
        return links

    @cached_property
    def steady(self) -> bool:
        """Whether no storage needs less in stripes than in lines.

        So it is where all sinks have one length, or the least: whenever a unit is written in the
        way ``line``, there is a stripe at whose end at least as much, and at whose start at most
        as much of every sink is made. And no other reader may decide about a link.
        """
        lengths = {self._units[tensor] for tensor in self.sinks}
        return len(lengths - {1}) <= 1 and not any(link.others for link in self.links)

    # -- units held -----------------------------------------------------------------------

    @cached_property
    def at_once(self) -> list[int]:
        """Units that each storage holds in one stripe: all that is ever made or loaded."""
        made: dict[int, int] = {}
        for op in reversed(self.operators):
            if op.writes not in made:
                made[op.writes] = op.units
            for tensor, flow in op.reads:
                made[tensor] = max(made.get(tensor, 0), int(flow.needed[made[op.writes]]))
        return [max(1, made[row[0]]) for row in self.storages]

    def table(self, first: int) -> Units:
        """Peak units of each storage in ``first`` stripes and in some more.

        Counts are worked out in batches, for most of the time goes into starting numpy.

        Args:
            first: 2, or the first count after another batch.

        Returns:
            One row per count, one column per storage.
        """
        found = self._tables.get(first)
        if found is None:
            counts = np.arange(first, min(2 * first + 4, self.most_stripes) + 1)
            found = self._tables[first] = self._peaks(counts)
        return found

    def units_in(self, count: int) -> list[int]:
        """Peak units of each storage in so many stripes."""
        if count == 1:
            return self.at_once
        row: list[int] = self._peaks(np.array([count]))[0].tolist()
        return row

    def _peaks(self, stripes: Units) -> Units:
        elements = int(stripes.sum()) + len(stripes)
        self._count(_TABLE + len(self.operators) * (_OPERATOR + elements // _ELEMENTS))
        made, released, starts = self._counts(stripes)
        table = np.empty((len(stripes), len(self.storages)), np.int64)
        for k, row in enumerate(self.storages):
            held = made[row[0]].copy()
            held[1:] -= released[row[-1]][:-1]
            held[starts] = 0
            table[:, k] = np.maximum(np.maximum.reduceat(held, starts), 1)
        return table

    def _counts(self, stripes: Units) -> tuple[dict[int, Units], dict[int, Units], Units]:
        """Units made and no longer needed of each tensor, after 0, 1, ... stripes.

        Args:
            stripes: several counts of stripes, whose arrays follow each other.

        Returns:
            Made and released units by tensor, and where the arrays of each count start.
        """
        starts = np.concatenate([[0], np.cumsum(stripes + 1)[:-1]])
        total = np.repeat(stripes, stripes + 1)
        done = np.arange(len(total)) - np.repeat(starts, stripes + 1)
        made: dict[int, Units] = {}
        for op in reversed(self.operators):
            if op.writes not in made:
                made[op.writes] = -(-done * op.units // total)
            for tensor, flow in op.reads:
                needed = flow.needed[made[op.writes]]
                known = made.get(tensor)
                made[tensor] = needed if known is None else np.maximum(known, needed)
        released: dict[int, Units] = {}
        for tensor, count in made.items():
            least = count
            for at, flow in self._readers.get(tensor, ()):
                if flow.holds:
                    least = np.minimum(least, flow.released[made[self.operators[at].writes]])
            released[tensor] = least
        return made, released, starts

    # -- which links hold -----------------------------------------------------------------

    @cached_property
    def line_links(self) -> int:
        """Mask of the links whose other readers have let go in time, in the way ``line``.

        Carries out the schedule of docs/method.md, section 3, on counts alone.
        """
        found = (1 << len(self.links)) - 1
        watched: dict[int, list[tuple[int, list[tuple[int, list[int]]]]]] = {}
        for k, link in enumerate(self.links):
            holding = [
                (self.operators[at].writes, flow.released.tolist())
                for at, flow in self._readers[link.source]
                if at in link.others and flow.holds
            ]
            if holding:
                watched.setdefault(link.target, []).append((k, holding))
        if not watched:
            return found
        operands = {
            op.writes: [(tensor, flow.needed[1:].tolist()) for tensor, flow in op.reads]
            for op in self.operators
        }
        made = dict.fromkeys((*operands, *self._readers), 0)
        for step in range(1, self.longest + 1):
            for sink in self.sinks:
                pending = [(sink, -(-step * self._units[sink] // self.longest))]
                while pending:
                    tensor, count = pending[-1]
                    unit = made[tensor]
                    if unit >= count:
                        pending.pop()
                        continue
                    for source, ends in operands.get(tensor, ()):
                        if made[source] < ends[unit]:
                            pending.append((source, ends[unit]))
                            break
                    else:
                        for k, holding in watched.get(tensor, ()):
                            if any(keeps[made[reader]] <= unit for reader, keeps in holding):
                                found &= ~(1 << k)
                        made[tensor] = unit + 1
        return found

    def stripe_links(self, count: int) -> int:
        """The same in ``count`` stripes, where an operator's turn comes once per stripe."""
        found = self._stripe_links.get(count)
        if found is None:
            found = self._stripe_links[count] = self._links_in(count)
        return found

    def _links_in(self, count: int) -> int:
        found = (1 << len(self.links)) - 1
        made, _, _ = self._counts(np.array([count]))
        for k, link in enumerate(self.links):
            written = made[link.target]
            busy = written[1:] > written[:-1]
            for at, flow in self._readers[link.source]:
                if at not in link.others:
                    continue
                gone = made[link.source]  # a reduction takes in what there is in its turn
                if flow.holds:
                    gone = flow.released[made[self.operators[at].writes]]
                gone = gone[1:] if at < link.op else gone[:-1]
                if (busy & (gone < written[1:])).any():
                    found &= ~(1 << k)
        return found
