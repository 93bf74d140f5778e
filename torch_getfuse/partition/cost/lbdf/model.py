"""LBDF: line-buffer depth-first fusion (arXiv 2501.00636 section III; docs/method.md, section 3).

``F_b(group)`` = bytes of all weights + for each tensor, peak live units x unit bytes, under the
demand-driven schedule of docs/method.md: sinks advance together; to produce a unit, first produce
what each operand's window needs, in operand order, then write it; a unit lives until no
consumer in the group needs it or any unit before it. ``F_D`` = tensors read from outside, once,
+ tensors needed outside, once, + weights, once.

The schedule is not run here. For a tensor ``t`` and one of its consumers ``c``, the peak is
reached when ``c`` writes some unit ``a``: by then ``c`` has released ``released(a)`` units, and
``t`` has been produced as far as it was demanded before. With one consumer this is ``needed(a + 1)
- released(a)``, a property of the window alone. With several, it has a closed form
(:meth:`.Region.peak`) that depends only on the operators between ``t`` and the first operator
where all paths from ``t`` meet again, so the result is cached per such region and shared by all
groups that contain it.
"""

from __future__ import annotations

import math

from torch_getfuse.errors import OptionError
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.lbdf.axis_maps import Edge, make_edge
from torch_getfuse.partition.cost.lbdf.branch_lag import Clock, Path, Region, join
from torch_getfuse.partition.cost.lbdf.branch_peak import FanTables
from torch_getfuse.partition.cost.scheme import (
    CostTerm,
    Dram,
    FusionScheme,
    Steps,
    remember,
)
from torch_getfuse.partition.node_set import bits, descendants
from torch_getfuse.widths import Width

GRANULARITIES = ("line", "pixel")

_QUESTION = 40
"""Steps that each question of an edge of a region counts (:attr:`Region.questions`)."""


class Lbdf(FusionScheme):
    """The LBDF cost model of one graph.

    Args:
        graph: the operator graph.
        granularity: ``"line"`` (a unit is a row) or ``"pixel"`` (a unit is a pixel).
        activation_bytes, weight_bytes: element widths in bytes; ``None``: as stored.

    Attributes:
        unit_bytes: bytes of one unit, per tensor in the order of ``graph.tensors``.
        alone_floor: by (number of a tensor, position of a consumer), the units that the tensor
            holds at least in every group with that consumer.
        least_written: per tensor, the fewest units that the schedule of any group writes.
        partial: mask of the operators that leave some unit of an operand unread.

    Raises:
        OptionError: for an unknown granularity.
    """

    name = "lbdf"
    granularities = GRANULARITIES
    additive = True
    floor_only_grows = True
    merges_in_place = True
    holds_weights = True
    has_predictor = True
    has_cover = True
    row_granularity = "line"
    steps = Steps(6, 3, 0, 0)

    def __init__(
        self,
        graph: OpGraph,
        granularity: str = "line",
        activation_bytes: Width | None = 1,
        weight_bytes: Width | None = 1,
    ) -> None:
        if granularity not in GRANULARITIES:
            raise OptionError(f"granularity={granularity!r} is not one of {GRANULARITIES}")
        super().__init__(graph, activation_bytes, weight_bytes)
        graph = self.graph
        self.granularity = granularity
        pixel = granularity == "pixel"
        names = list(graph.tensors)
        number = {name: k for k, name in enumerate(names)}
        self.names = names
        self.units = [t.rows * t.cols if pixel else t.rows for t in graph.tensors.values()]
        self._rows = [t.rows for t in graph.tensors.values()]
        self.tensor_bytes = list(graph.tensor_bytes.values())
        self.unit_bytes = list((graph.pixel_bytes if pixel else graph.row_bytes).values())
        self.writes = [number[op.writes] for op in graph.ops]
        self.readers = [sum(1 << c for c in graph.consumers[name]) for name in names]
        self._first_reader = [min(graph.consumers[name], default=0) for name in names]
        self.maker = [1 << graph.producer[n] if n in graph.producer else 0 for n in names]
        self.reads = [tuple(number[r.tensor] for r in op.reads) for op in graph.ops]
        self._touches = [(w, *r) for w, r in zip(self.writes, self.reads, strict=True)]
        self._touched = [m | r for m, r in zip(self.maker, self.readers, strict=True)]
        self._output = [name in graph.outputs for name in names]
        self._overwrites = sum(1 << i for i, over in enumerate(graph.overwrites) if over)
        # Edges with equal windows are one object, so that regions of equal structure are equal.
        alike: dict[object, Edge] = {}
        self.edges: dict[tuple[int, int], Edge] = {}
        for i, op in enumerate(graph.ops):
            target = graph.tensors[op.writes]
            for read in op.reads:
                source = graph.tensors[read.tensor]
                key = read.window, source.rows, source.cols, target.rows, target.cols
                if key not in alike:
                    alike[key] = make_edge(graph, read, op.writes, pixel)
                self.edges[number[read.tensor], i] = alike[key]
        below = descendants(graph, data=True)
        self._below = list(self.readers)
        for tensor, readers in enumerate(self.readers):
            for c in bits(readers):
                self._below[tensor] |= below[c]
        self._prepare()
        self._floors: dict[int, int] = {}
        self._ahead: dict[tuple[int, int, int], tuple[int, int]] = {}
        self._demands: dict[int, _Demand] = {}
        self._least_units: list[dict[int, int]] = [{} for _ in self.units]
        self._lags: dict[tuple[int, int, int, int], int] = {}
        self._peaks: dict[Region, int] = {}
        self._regions: dict[tuple[int, int, int, int], Region] = {}  # of which no peak is known
        # By tensor, all that lies between its readers and where they meet, and its peak with that.
        self._wholes: dict[int, tuple[int, int, int]] = {}
        self._fans = FanTables()

    def _prepare(self) -> None:
        """Per edge: the peak as the only consumer, and a lower bound of it in any group."""
        least = list(self.units)  # fewest units of a tensor that any group's schedule writes
        for i in reversed(range(len(self.graph))):
            t = self.writes[i]
            for c in bits(self.readers[t]):
                least[t] = min(least[t], self.edges[t, c].needed(least[self.writes[c]]))
        self.least_written = least
        # Per tensor: mask of its consumers in the group -> units held; none, or one of them.
        self._single: list[dict[int, int]] = [{0: 1} for _ in self.units]
        self.alone_floor: dict[tuple[int, int], int] = {}
        self.partial = 0
        for (t, c), edge in self.edges.items():
            self._single[t][1 << c] = max(1, edge.widest(edge.units_out))
            self.alone_floor[t, c] = max(1, edge.widest(least[self.writes[c]]))
            if edge.needed(edge.units_out) < edge.units_in:
                self.partial |= 1 << c
        # Per operator, the tensors among its reads that may hold more than their floor, and a mask
        # of the operators that have any: those with other readers and those of windows that do.
        self._more: list[tuple[int, ...]] = [
            tuple(t for t in reads if self._may_hold_more(t)) for reads in self.reads
        ]
        self._with_more = sum(1 << i for i, tensors in enumerate(self._more) if tensors)

    def _may_hold_more(self, tensor: int) -> bool:
        readers, single = self.readers[tensor], self._single[tensor]
        return bool(readers & (readers - 1)) or any(
            single[1 << c] != self.alone_floor[tensor, c] for c in bits(readers)
        )

    # -- the two figures ------------------------------------------------------------------

    def buffer(self, mask: int, buffer_bytes: int = 0) -> int:
        """``F_b`` in bytes; independent of the buffer size."""
        return self._needed(mask, math.inf)

    def buffer_below(self, mask: int, buffer_bytes: int) -> int:
        """``F_b`` in bytes; at least the buffer size where that is plain before all is known."""
        if type(self).buffer is not Lbdf.buffer:
            return self.buffer(mask, buffer_bytes)
        return self._needed(mask, buffer_bytes)

    def _needed(self, mask: int, enough: float) -> int:
        """The floor, which is mostly known, and what some tensors hold beyond theirs.

        Those of which the peak must be worked out come last. Ends where ``enough`` is reached.
        """
        unit_bytes = self.unit_bytes
        total = self._least_held(mask, 0)
        finals = self.finals(mask)
        overwritten = self._overwrites & mask
        asked = mask & self._with_more
        dear = []
        while asked:
            low = asked & -asked
            asked ^= low
            for tensor in self._more[low.bit_length() - 1]:
                readers = self.readers[tensor] & mask
                if readers & -readers != low or readers & overwritten:
                    continue
                units = self._units(tensor, readers, mask, finals, quick=True)
                if units < 0:
                    dear.append((tensor, readers))
                else:
                    total += units * unit_bytes[tensor] - self.least(tensor, mask)
        for tensor, readers in dear:
            if total >= enough:
                break
            units = self._units(tensor, readers, mask, finals)
            total += units * unit_bytes[tensor] - self.least(tensor, mask)
        return total

    def hopeless(self, mask: int, buffer_bytes: int, part: int = 0) -> bool:
        """Whether the floor alone reaches the buffer size."""
        return self.floor(mask, part) >= buffer_bytes

    def floor(self, mask: int, part: int = 0) -> int:
        """Weights and the units that each storage holds at least: no superset needs less.

        A tensor's peak is at least that of each of its consumers alone, a superset only adds
        consumers, and each storage holds at least one unit. If one consumer depends on another,
        the peak is at least what the one has demanded and the other not released.

        ``part``: a convex subset; if its floor is cached, only what was added to it is computed.
        """
        return self._least_held(mask, part)

    def _least_held(self, mask: int, part: int) -> int:
        """The floor, also where a subclass has a higher one: :meth:`buffer` adds to it."""
        known = self._floors.get(mask)
        if known is not None:
            return known
        total = self._floors.get(part)
        if total is None:
            total = part = 0
        added = mask & ~part
        if added.bit_count() != 1:
            tensors = set[int]()
            for i in bits(added):
                total += self.weights[i]
                tensors.update(self._touches[i])
            touched = tuple(tensors)
        else:
            i = added.bit_length() - 1
            total += self.weights[i]
            touched = self._touches[i]
        for tensor in touched:
            total += self.least(tensor, mask)
            if self._touched[tensor] & part:
                total -= self.least(tensor, part)
        return remember(self._floors, mask, total)

    def least(self, tensor: int, mask: int) -> int:
        """Bytes that the storage of a tensor takes at least; 0 if the tensor is overwritten."""
        readers = self.readers[tensor] & mask
        if not readers:
            return self.unit_bytes[tensor] if self.maker[tensor] & mask else 0
        if readers & self._overwrites:
            return 0
        which = readers >> self._first_reader[tensor]  # short, however deep the graph
        units = self._least_units[tensor].get(which)
        if units is None:
            units = max(self.alone_floor[tensor, c] for c in bits(readers))
            self._least_units[tensor][which] = units
        if readers & (readers - 1):
            first, last = (readers & -readers).bit_length() - 1, readers.bit_length() - 1
            key = tensor, first, last
            if key not in self._ahead:
                self._ahead[key] = self.demanded_ahead(*key)
            between, ahead = self._ahead[key]
            if ahead > units and not between & ~mask:
                units = ahead
        return units * self.unit_bytes[tensor]

    def demanded_ahead(self, tensor: int, first: int, last: int) -> tuple[int, int]:
        """The operators between two consumers of a tensor, and units it holds because of them.

        When ``last`` writes a unit, everything upstream of it has demanded its share, including
        the paths through ``first``, and ``last`` still holds what the unit needs. This is true of
        every unit; it is evaluated for the first one and one in the middle.
        """
        edge = self.edges[tensor, last]
        if not self._below[self.writes[first]] >> last & 1 or not edge.holds:
            return 0, 0
        demand = self._demands.get(last)
        if demand is None:
            demand = self._demands[last] = _Demand(self, last)
        demand.look_back_to(first)
        ahead = 0
        for unit, counts in demand.counts:
            demanded = self.edges[tensor, first].needed(counts[first])
            ahead = max(ahead, demanded - edge.released(unit))
        between = demand.cone >> first << first & self._below[self.writes[first]]
        return between & ~(1 << last), ahead

    def reread(self, mask: int, buffer_bytes: int = 0) -> int:
        """0: everything is read once."""
        return 0

    def least_reread(self, mask: int, buffer_bytes: int = 0, part: int = 0) -> int:
        """0."""
        return 0

    def dram(self, mask: int, buffer_bytes: int = 0) -> Dram:
        """``F_D``; independent of the buffer size for a valid group."""
        read = write = weight = 0
        for i in bits(mask):
            weight += self.weights[i]
            out = self.writes[i]
            if self._output[out] or self.readers[out] & ~mask:
                write += self.tensor_bytes[out]
            for tensor in self.reads[i]:
                readers = self.readers[tensor] & mask
                if not self.maker[tensor] & mask and readers & -readers == 1 << i:
                    read += self.tensor_bytes[tensor]
        return Dram(read, write, weight)

    def terms(self, mask: int, buffer_bytes: int = 0) -> tuple[CostTerm, ...]:
        """Weights by operator, then rows (or pixels) held by tensor; their sum is ``F_b``."""
        graph = self.graph
        kind = "lines" if self.granularity == "line" else "pixels"
        weights = []
        for i in bits(mask):
            op, size = graph.ops[i], self.weights[i]
            if size:
                width, left = divmod(size, op.weight_elements)
                units = (size, 1) if left else (op.weight_elements, width)  # widths may differ
                weights.append(CostTerm("weights", op.name, *units))
        held = [
            CostTerm(kind, self.names[tensor], units, self.unit_bytes[tensor])
            for tensor, units in self.held(mask)
        ]
        return (*weights, *held)

    # -- live units -----------------------------------------------------------------------

    def held(self, mask: int) -> list[tuple[int, int]]:
        """Last tensor of each storage, and the peak of its live units."""
        held = []
        finals = self.finals(mask)
        overwritten = self._overwrites & mask
        maker, all_readers = self.maker, self.readers
        rest = mask
        while rest:
            low = rest & -rest
            rest ^= low
            for tensor in self._touches[low.bit_length() - 1]:
                readers = all_readers[tensor] & mask
                producer = maker[tensor]
                if readers & overwritten or (
                    producer != low and (producer & mask or readers & -readers != low)
                ):
                    continue
                held.append((tensor, self._units(tensor, readers, mask, finals)))
        return held

    def _units(
        self,
        tensor: int,
        readers: int,
        mask: int,
        finals: dict[int, int],
        quick: bool = False,
    ) -> int:
        """Peak live units of a tensor with certain consumers in the group.

        ``quick``: -1 where it must be worked out.
        """
        units = self._single[tensor].get(readers)
        if units is None:
            return self._lag(tensor, readers, mask, finals, quick)
        if finals and readers and (c := readers.bit_length() - 1) in finals:
            return max(1, self.edges[tensor, c].widest(finals[c]))
        return units

    def finals(self, mask: int) -> dict[int, int]:
        """Units that operators have written when the schedule ends, of those that have not all.

        That is so where every consumer in the group skips the last ones, as a strided 1x1
        convolution does.
        """
        finals: dict[int, int] = {}
        maker, edges, units = self.maker, self.edges, self.units
        asked = 0
        for c in bits(mask & self.partial):
            for tensor in self.reads[c]:
                asked |= maker[tensor]
        asked &= mask
        while asked:  # the last first, so that what reads from an operator comes before it
            i = asked.bit_length() - 1
            asked ^= 1 << i
            out = self.writes[i]
            last = 0
            for c in bits(self.readers[out] & mask):
                last = max(last, edges[out, c].needed(finals.get(c, units[self.writes[c]])))
            if last < units[out]:
                finals[i] = last
                for tensor in self.reads[i]:
                    asked |= maker[tensor] & mask
        return finals

    def _lag(
        self, tensor: int, readers: int, mask: int, finals: dict[int, int], quick: bool
    ) -> int:
        """The same of a tensor with several consumers in the group."""
        whole, root, known = self._wholes.get(tensor, (0, 0, 0))
        if whole and mask & whole == whole and root not in finals:
            return known
        between, root = self._between(readers, mask & self._below[tensor])
        longest = root
        if root < 0:
            # Sinks advance by the clock of the longest one, which may be outside the region.
            sinks = (i for i in bits(mask) if not self.graph.readers[i] & mask)
            longest = max(sinks, key=lambda i: self.units[self.writes[i]])
        steps = finals.get(root, self.units[self.writes[longest]])
        key = tensor, between, root, steps
        lag = self._lags.get(key)
        if lag is None:
            region = self._regions.pop(key, None)
            if region is None:
                region = self._region(tensor, readers, between, root, steps, longest)
            if region not in self._peaks:
                peak = self._fans.peak(region)
                if peak is None:
                    if quick:
                        remember(self._regions, key, region)
                        return -1
                    self.extra_steps += _QUESTION * region.questions
                    peak = region.peak()
                self._peaks[region] = peak
            lag = self._lags[key] = self._peaks[region]
            if root >= 0 and root not in finals and readers == self.readers[tensor]:
                everywhere, _ = self._between(readers, self._below[tensor])
                if between == everywhere:
                    self._wholes[tensor] = between, root, lag
        return lag

    def _between(self, readers: int, below: int) -> tuple[int, int]:
        """The region from a tensor to the operator where all its paths meet, and that operator.

        Without such an operator the region is everything below, and the operator is -1.
        """
        region, front = 0, readers
        while True:
            low = front & -front
            region |= low
            i = low.bit_length() - 1
            if front == low:
                return region, i
            after = self.graph.readers[i] & below
            if not after:
                return below, -1
            front = (front ^ low) | after

    def _region(
        self, tensor: int, readers: int, between: int, root: int, steps: int, longest: int
    ) -> Region:
        """The region from a tensor to ``root`` (-1: the clock of ``longest``), without names."""
        operands: list[tuple[tuple[int, Path], ...]] = [()]
        consumers = []
        at: dict[int, tuple[int, Path]] = {tensor: (0, ())}  # tensor -> its node, or a path to one
        for i in bits(between):
            slots: dict[tuple[int, Path], None] = {}
            for t in self.reads[i]:
                if t in at:
                    node, path = at[t]
                    edge = self.edges[t, i]
                    slots[node, path if edge.transparent else (edge, *path)] = None
            holds = readers >> i & 1 and self.edges[tensor, i].holds
            if not holds and i != root and len({node for node, _ in slots}) == 1:
                at[self.writes[i]] = node, join(path for _, path in slots)
                continue
            if holds:
                consumers.append((len(operands), self.edges[tensor, i]))
            at[self.writes[i]] = len(operands), ()
            operands.append(tuple(slots))
        if root < 0:
            slots, last = {}, self.writes[longest]
            for i in bits(between):
                if not self.graph.readers[i] & between:
                    node, path = at[self.writes[i]]
                    out = self.writes[i]
                    clock = Clock(self.units[out], self._rows[out], steps, self._rows[last])
                    slots[node, (clock, *path)] = None
            operands.append(tuple(slots))
        return Region(tuple(operands), tuple(consumers), steps)


class _Demand:
    """What writing the first unit of an operator, and one in its middle, demands upstream.

    An operator's share does not depend on how far back one looks, so operators are visited once,
    last first, and only as far as somebody asks.

    Args:
        model: of the graph.
        last: the operator that writes.

    Attributes:
        cone: the operator and what is upstream of it, as far as it was looked.
        counts: per unit that every schedule writes, units demanded of the operators in ``cone``.
    """

    def __init__(self, model: Lbdf, last: int) -> None:
        self._model = model
        self.cone = self._waiting = 1 << last
        out = model.writes[last]
        row = model.units[out] // model._rows[out]
        units = (0, row * (model._rows[out] // 2) + row // 2)
        self.counts = [
            (unit, {last: unit + 1}) for unit in units if unit < model.least_written[out]
        ]

    def look_back_to(self, first: int) -> None:
        """Visit what comes after the operator ``first``."""
        model = self._model
        while self._waiting >> first + 1:
            i = self._waiting.bit_length() - 1
            self._waiting ^= 1 << i
            for source in model.reads[i]:
                maker = model.maker[source]
                if not maker:
                    continue
                self.cone |= maker
                self._waiting |= maker
                at, edge = maker.bit_length() - 1, model.edges[source, i]
                for _, counts in self.counts:
                    counts[at] = max(counts.get(at, 0), edge.needed(counts[i]))
