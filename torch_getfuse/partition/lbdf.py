"""LBDF: line-buffer depth-first fusion (arXiv 2501.00636 section III; method.md section 3).

``F_b(group)`` = bytes of all weights + for each tensor, peak live units x unit bytes, under the
demand-driven schedule of method.md: sinks advance together; to produce a unit, first produce
what each operand's window needs, in operand order, then write it; a unit lives until no
consumer in the group needs it or any unit before it. ``F_D`` = tensors read from outside, once,
+ tensors needed outside, once, + weights, once.

The schedule is never run here. For a tensor ``t`` and one of its consumers ``c``, the peak is
reached when ``c`` writes some unit ``a``: until then ``c`` has let go ``released(a)`` units, and
``t`` has been produced up to whatever was demanded before that moment. With one consumer this is
``needed(a + 1) - released(a)``, a property of the window alone. With several, the moment is found
in closed form (:meth:`Lbdf._produced_when`), and only the operators between ``t`` and the first
operator that all paths from ``t`` meet again can matter, so the result is remembered per such
region and shared by all groups that contain it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

from torch_getfuse.errors import OptionError
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost import CostTerm, Dram
from torch_getfuse.partition.group import bits, closure
from torch_getfuse.partition.stream import Edge, make_edge, sample_positions

GRANULARITIES = ("line", "pixel")


class _Steps:
    """The sinks' common clock as an edge: after step ``q`` of ``n``, ``ceil(q*m/n)`` units."""

    __slots__ = ("length", "steps")

    def __init__(self, length: int, steps: int) -> None:
        self.length, self.steps = length, steps

    def needed(self, count: int) -> int:
        return -(-count * self.length // self.steps)

    def first(self, count: int) -> int | None:
        return (count - 1) * self.steps // self.length + 1


class _Region:
    """The operators between a tensor and where its consumers meet again, as a small DAG.

    Node 0 is the tensor, the last node is the root that drives the schedule: the operator that
    all paths meet, or the sinks' common clock. ``operands[k]`` are the edges of node ``k`` to
    earlier nodes, in operand order.
    """

    def __init__(self) -> None:
        self.operands: list[list[tuple[int, Edge | _Steps]]] = [[]]
        self.steps = 0


class Lbdf:
    """The LBDF cost model of one graph.

    Args:
        graph: the operator graph.
        granularity: ``"line"`` (a unit is a row) or ``"pixel"`` (a unit is a pixel).
        activation_bytes, weight_bytes: element widths in bytes.

    Raises:
        OptionError: for an unknown granularity.
    """

    name = "lbdf"

    def __init__(
        self,
        graph: OpGraph,
        granularity: str = "line",
        activation_bytes: int = 1,
        weight_bytes: int = 1,
    ) -> None:
        if granularity not in GRANULARITIES:
            raise OptionError(f"granularity={granularity!r} is not one of {GRANULARITIES}")
        self.graph = graph
        self.granularity = granularity
        pixel = granularity == "pixel"
        names = list(graph.tensors)
        number = {name: k for k, name in enumerate(names)}
        self._names = names
        self._units = [t.rows * t.cols if pixel else t.rows for t in graph.tensors.values()]
        self._bytes = [t.elements * activation_bytes for t in graph.tensors.values()]
        self._unit_bytes = [b // u for b, u in zip(self._bytes, self._units, strict=True)]
        self._weights = [op.weight_elements * weight_bytes for op in graph.ops]
        self._weight_bytes = weight_bytes
        self._writes = [number[op.writes] for op in graph.ops]
        self._readers = [sum(1 << c for c in graph.consumers[name]) for name in names]
        self._maker = [1 << graph.producer[n] if n in graph.producer else 0 for n in names]
        self._reads = [tuple(number[r.tensor] for r in op.reads) for op in graph.ops]
        self._output = [name in graph.outputs for name in names]
        self._overwrites = sum(1 << i for i, over in enumerate(graph.overwrites) if over)
        self._edges: dict[tuple[int, int], Edge] = {
            (number[read.tensor], i): make_edge(graph, read, op.writes, pixel)
            for i, op in enumerate(graph.ops)
            for read in op.reads
        }
        self._below = [closure(mask, graph.successors) for mask in self._readers]
        self._prepare()
        self._regions: dict[tuple[int, int], tuple[int, int]] = {}
        self._lags: dict[tuple[int, int, int], int] = {}

    def _prepare(self) -> None:
        """Per edge: the peak as the only consumer, and a bound of it whatever the group."""
        least = list(self._units)  # fewest units of a tensor that any group's schedule writes
        for i in reversed(range(len(self.graph))):
            t = self._writes[i]
            for c in bits(self._readers[t]):
                least[t] = min(least[t], self._edges[t, c].needed(least[self._writes[c]]))
        self._alone = {}
        self._alone_floor = {}
        self._partial = 0
        for (t, c), edge in self._edges.items():
            self._alone[t, c] = max(1, edge.widest(edge.units_out))
            self._alone_floor[t, c] = max(1, edge.widest(least[self._writes[c]]))
            if edge.needed(edge.units_out) < edge.units_in:
                self._partial |= 1 << c

    # -- the two figures ------------------------------------------------------------------

    def buffer(self, mask: int, buffer_bytes: int = 0) -> int:
        """``F_b`` in bytes; the buffer's size plays no part."""
        total = 0
        unit_bytes = self._unit_bytes
        for tensor, units in self._held(mask):
            total += units * unit_bytes[tensor]
        for i in bits(mask):
            total += self._weights[i]
        return total

    def floor(self, mask: int) -> int:
        """Weights and the widest single window of each storage: no larger group needs less.

        A tensor's peak is at least that of each of its consumers alone, a consumer only ever
        joins, and each storage keeps at least one unit.
        """
        total = 0
        for i in bits(mask):
            total += self._weights[i]
        for tensor, readers in self._storages(mask):
            units = 1
            for c in bits(readers):
                units = max(units, self._alone_floor[tensor, c])
            total += units * self._unit_bytes[tensor]
        return total

    def dram(self, mask: int, buffer_bytes: int = 0) -> Dram:
        """``F_D``; the buffer's size plays no part once a group is valid."""
        read = write = weight = 0
        for i in bits(mask):
            weight += self._weights[i]
            out = self._writes[i]
            if self._output[out] or self._readers[out] & ~mask:
                write += self._bytes[out]
            for tensor in self._reads[i]:
                readers = self._readers[tensor] & mask
                if not self._maker[tensor] & mask and readers & -readers == 1 << i:
                    read += self._bytes[tensor]
        return Dram(read, write, weight)

    def terms(self, mask: int, buffer_bytes: int = 0) -> tuple[CostTerm, ...]:
        """Weights by operator, then rows (or pixels) held by tensor; their sum is ``F_b``."""
        graph = self.graph
        kind = "lines" if self.granularity == "line" else "pixels"
        weights = [
            CostTerm("weights", op.name, op.weight_elements, self._weight_bytes)
            for op in (graph.ops[i] for i in bits(mask))
            if op.weight_elements
        ]
        held = [
            CostTerm(kind, self._names[tensor], units, self._unit_bytes[tensor])
            for tensor, units in self._held(mask)
        ]
        return (*weights, *held)

    # -- live units -----------------------------------------------------------------------

    def _storages(self, mask: int) -> Iterator[tuple[int, int]]:
        """Each storage of the group as (its last tensor, mask of that tensor's consumers)."""
        overwritten = self._overwrites & mask
        for i in bits(mask):
            out = self._writes[i]
            readers = self._readers[out] & mask
            if not readers & overwritten:
                yield out, readers
            for tensor in self._reads[i]:
                if not self._maker[tensor] & mask:
                    readers = self._readers[tensor] & mask
                    if readers & -readers == 1 << i and not readers & overwritten:
                        yield tensor, readers

    def _held(self, mask: int) -> Iterator[tuple[int, int]]:
        """Each storage's last tensor and its peak of live units."""
        finals = self._finals(mask) if mask & self._partial else None
        for tensor, readers in self._storages(mask):
            if not readers:
                yield tensor, 1
            elif readers & (readers - 1):
                yield tensor, self._lag(tensor, readers, mask, finals)
            else:
                c = readers.bit_length() - 1
                if finals is None or finals[c] == self._units[self._writes[c]]:
                    yield tensor, self._alone[tensor, c]
                else:
                    yield tensor, max(1, self._edges[tensor, c].widest(finals[c]))

    def _finals(self, mask: int) -> dict[int, int]:
        """Units that each operator has written when the schedule ends.

        Fewer than all where every consumer in the group skips the last ones, as a strided
        1x1 convolution does.
        """
        finals: dict[int, int] = {}
        for i in reversed(list(bits(mask))):
            out = self._writes[i]
            readers = self._readers[out] & mask
            finals[i] = (
                max(self._edges[out, c].needed(finals[c]) for c in bits(readers))
                if readers
                else self._units[out]
            )
        return finals

    def _lag(self, tensor: int, readers: int, mask: int, finals: dict[int, int] | None) -> int:
        """Peak live units of a tensor with several consumers in the group."""
        key = tensor, mask & self._below[tensor]
        if key not in self._regions:
            self._regions[key] = self._between(readers, mask & self._below[tensor])
        region, root = self._regions[key]
        if root < 0:
            # Sinks advance by the longest sink's clock, which may lie outside the region.
            steps = max(
                self._units[self._writes[i]]
                for i in bits(mask)
                if not self.graph.successors[i] & mask
            )
        else:
            steps = finals[root] if finals else self._units[self._writes[root]]
        found = self._lags.get((tensor, region, steps if root >= 0 else -steps))
        if found is None:
            found = self._lags[tensor, region, steps if root >= 0 else -steps] = self._peak(
                tensor, readers, region, root, steps
            )
        return found

    def _between(self, readers: int, below: int) -> tuple[int, int]:
        """The region from a tensor to the operator that all its paths meet, and that operator.

        Without such an operator the region is everything below, and the operator is -1.
        """
        region, front = 0, readers
        while True:
            low = front & -front
            region |= low
            i = low.bit_length() - 1
            if front == low:
                return region, i
            after = self.graph.successors[i] & below
            if not after:
                return below, -1
            front = (front ^ low) | after

    def _peak(self, tensor: int, readers: int, region: int, root: int, steps: int) -> int:
        shape = _Region()
        shape.steps = steps
        local = {tensor: 0}
        consumers = []
        for i in bits(region):
            node = len(shape.operands)
            shape.operands.append(
                [(local[t], self._edges[t, i]) for t in self._reads[i] if t in local]
            )
            local[self._writes[i]] = node
            if readers >> i & 1 and self._edges[tensor, i].holds:
                consumers.append((node, self._edges[tensor, i]))
        if root < 0:
            sinks = [i for i in bits(region) if not self.graph.successors[i] & region]
            shape.operands.append(
                [
                    (local[self._writes[i]], _Steps(self._units[self._writes[i]], steps))
                    for i in sinks
                ]
            )
        peak = 1
        for node, edge in consumers:
            for a in _samples(shape, node, edge):
                produced, written = _produced_when(shape, node, a)
                peak = max(peak, produced - edge.released(written))
        return peak


def _produced_when(shape: _Region, consumer: int, unit: int) -> tuple[int, int]:
    """Units of the region's tensor that exist when ``consumer`` writes ``unit``.

    Returns them with the number of units that the consumer has written by then: ``unit``, or
    fewer at the end of the schedule if that unit is never demanded.

    First upwards: after how many units does each operator first demand that unit, and through
    which operand (the first in operand order, for that one is served first)? That gives the
    chain of operators that are at work at this moment, each in the middle of one unit. Then
    downwards: operands that stand before the one at work have been served for the unit at work,
    those after it only for the units before; operators off the chain have done what their
    consumers demanded.
    """
    operands = shape.operands
    last = len(operands) - 1
    wanted: list[int] = [0] * len(operands)  # 0: does not lead to the consumer
    through: list[int] = [-1] * len(operands)
    wanted[consumer] = unit + 1
    for node in range(consumer + 1, last + 1):
        best = 0
        for slot, (source, edge) in enumerate(operands[node]):
            if wanted[source]:
                count = edge.first(wanted[source])
                if count is not None and (not best or count < best):
                    best, through[node] = count, slot
        wanted[node] = best
    counts = [0] * len(operands)
    active = [False] * len(operands)
    reached = bool(wanted[last]) and wanted[last] <= shape.steps
    if reached:
        node = last
        while node != consumer:
            active[node] = True
            counts[node] = wanted[node] - 1
            node = operands[node][through[node]][0]
        active[consumer] = True
        counts[consumer] = unit
    else:
        counts[last] = shape.steps
    for node in range(last, 0, -1):
        count = counts[node]
        if not active[node]:
            for source, edge in operands[node]:
                counts[source] = max(counts[source], edge.needed(count))
            continue
        at_work = through[node] if node != consumer else len(operands[node])
        for slot, (source, edge) in enumerate(operands[node]):
            if slot != at_work:
                done = edge.needed(count + 1 if slot < at_work else count)
                counts[source] = max(counts[source], done)
    return counts[0], counts[consumer]


def _samples(shape: _Region, consumer: int, edge: Edge) -> Iterator[int]:
    """Units of a consumer that stand for all of them when its peak is looked for.

    Between the borders no window of the region is clipped, and the schedule repeats with a
    period; where the rates of the region's operators do not agree there is no period, and every
    unit is looked at.
    """
    if not edge.rows.a and not (edge.cols and edge.cols.a):
        yield 0  # everything is demanded for the first unit and held until the last
        return
    rows = _axis_samples(shape, consumer, edge.rows.size_out, columns=False)
    if edge.cols is None:
        yield from rows
        return
    width = edge.cols.size_out
    cols = _axis_samples(shape, consumer, width, columns=True)
    for row in rows:
        for col in cols:
            yield row * width + col


def _axis_samples(shape: _Region, consumer: int, size: int, columns: bool) -> list[int]:
    steps = []  # (source, node, units of the node per unit of the source, reach of the window)
    for node, operands in enumerate(shape.operands):
        for source, edge in operands:
            if isinstance(edge, _Steps):
                if columns and edge.length != edge.steps:
                    return list(range(size))
                steps.append((source, node, Fraction(edge.steps, edge.length), 0.0))
            else:
                axis = edge.cols if columns else edge.rows
                assert axis is not None
                if axis.a:
                    steps.append((source, node, Fraction(axis.c, axis.a), axis.reach))
    # Units per unit of the consumer; operators that are joined to it only by a window that needs
    # everything have no rate: what lies behind such a window is demanded at one blow.
    rates = {consumer: Fraction(1)}
    known = 0
    while known < len(rates):
        known = len(rates)
        for source, node, ratio, _ in steps:
            if source in rates:
                rates.setdefault(node, rates[source] * ratio)
            if node in rates:
                rates.setdefault(source, rates[node] / ratio)
    reach = 0.0
    for source, node, ratio, window in steps:
        if source in rates:
            if rates[node] != rates[source] * ratio:
                return list(range(size))
            reach += window / float(rates[source])
    period = math.lcm(*(rate.denominator for rate in rates.values()))
    return sample_positions(size, math.ceil(reach) + 2, period)
