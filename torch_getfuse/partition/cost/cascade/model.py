"""Cascade as a cost model of groups, and of whole sequences of steps (docs/method.md, section 12).

As a :class:`~torch_getfuse.partition.cost.scheme.FusionScheme` it prices a group by the best of its
ways with nothing resident: that is what the recursive split and the searches over groups ask.
:meth:`Cascade.price` prices a step beside residents.
"""

from __future__ import annotations

from typing import NamedTuple

from torch_getfuse.errors import OptionError
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.cascade.groups import Facts, Group
from torch_getfuse.partition.cost.cascade.layout import places
from torch_getfuse.partition.cost.cascade.pricing import (
    ANY,
    NOTHING,
    Beside,
    Priced,
    best_way,
    least_reread,
    smallest_way,
)
from torch_getfuse.partition.cost.cascade.way import SLICES, UNFUSABLE, Way
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.cost.scheme import CostTerm, Dram, FusionScheme, Steps, once
from torch_getfuse.partition.node_set import bits
from torch_getfuse.widths import Width

_MOST_GROUPS = 1 << 15


class Step(NamedTuple):
    """A step of a sequence with its price.

    Attributes:
        mask: its operators.
        dram: bytes that cross its border, and all fetches of weights.
        priced: its way; ``None`` for an unfusable operator.
    """

    mask: int
    dram: Dram
    priced: Priced | None


class Cascade(FusionScheme):
    """The cascade cost model of one graph.

    Args:
        graph: the operator graph.
        activation_bytes, weight_bytes: element widths in bytes; ``None``: as stored.
        slice_channels: output channels of which streamed weights are staged at a time.

    Attributes:
        facts: what its groups are made from.

    Raises:
        OptionError: for a number of channels below one.
    """

    name = "cascade"
    sequential = True
    row_granularity = "line"
    steps = Steps(50, 5, 0, 0)

    def __init__(
        self,
        graph: OpGraph,
        activation_bytes: Width | None = 1,
        weight_bytes: Width | None = 1,
        slice_channels: int = 16,
    ) -> None:
        if slice_channels < 1:
            raise OptionError(f"slice_channels={slice_channels} is not a number from 1 up")
        super().__init__(graph, activation_bytes, weight_bytes)
        self.slice_channels = slice_channels
        lines = Lbdf(self.graph, "line", activation_bytes, weight_bytes)
        self.facts = Facts(lines, slice_channels, self._count)
        self._groups: dict[int, Group] = {}
        self._ways: dict[tuple[int, int], Priced] = {}

    def _count(self, steps: int) -> None:
        self.extra_steps += steps

    def group(self, mask: int) -> Group:
        """What is known of a set of operators; worked out once."""
        found = self._groups.get(mask)
        if found is None:
            if len(self._groups) >= _MOST_GROUPS:
                self._groups.clear()
            found = self._groups[mask] = Group(self.facts, mask)
        return found

    # -- as a model of groups -------------------------------------------------------------

    def buffer(self, mask: int, buffer_bytes: int) -> int:
        """``F_b`` of the best way with nothing resident; where none fits, of the smallest."""
        return self.best_way(mask, buffer_bytes).buffer

    def best_way(self, mask: int, buffer_bytes: int) -> Priced:
        """The best way with nothing resident; where none fits, the one that needs least."""
        key = mask, buffer_bytes
        found = self._ways.get(key)
        if found is None:
            if len(self._ways) >= _MOST_GROUPS:
                self._ways.clear()
            group = self.group(mask)
            found = best_way(group, NOTHING, buffer_bytes) or smallest_way(group)
            self._ways[key] = found
        return found

    def hopeless(self, mask: int, buffer_bytes: int, part: int = 0) -> bool:
        """Whether the storages alone reach the buffer size."""
        return self.facts.floor(mask, part) >= buffer_bytes

    def reread(self, mask: int, buffer_bytes: int) -> int:
        """Weights fetched in further stripes, or inputs read for further slices."""
        return least_reread(self.group(mask), NOTHING, buffer_bytes, ANY) or 0

    def terms(self, mask: int, buffer_bytes: int) -> tuple[CostTerm, ...]:
        """What each storage holds in the best way with nothing resident, and the weights held;
        of a group that does not fit, in the way that needs least.
        """
        return self.terms_of(mask, NOTHING, self.best_way(mask, buffer_bytes))

    # -- as a model of steps --------------------------------------------------------------

    def step(self, mask: int, beside: Beside, known: int, buffer_bytes: int) -> Step | None:
        """The best way of a step beside residents, and what it moves; ``None`` where none fits.

        Args:
            known: mask of the residents that were alive before it.
        """
        group = self.group(mask)
        priced = best_way(group, beside, buffer_bytes)
        if priced is None:
            return None
        read, write = self.features(group, beside.touched | priced.kept, known)
        weight = group.weights
        if priced.kind == SLICES:
            read += priced.reread
        else:
            weight += priced.reread
        return Step(mask, Dram(read, write, weight), priced)

    def features(self, group: Group, resident: int, known: int) -> tuple[int, int]:
        """Bytes that a step reads and writes of feature maps, each once.

        Args:
            resident: mask of the residents that it touches.
            known: mask of those that were alive before it.
        """
        size = self.facts.size
        read = sum(size[t] for t in bits(group.loads & ~known))
        written = group.makes & self.facts.outputs
        for t in bits(group.makes & ~resident & ~written):
            if self.facts.readers[t] & ~group.mask:
                written |= 1 << t
        return read, sum(size[t] for t in bits(written))

    def unfusable_step(self, mask: int) -> Step:
        """The step of an operator that fits in no way: everything once, by any method."""
        return Step(mask, once(self, mask), None)

    def way_of(self, step: Step) -> Way:
        """How a step runs, as plans record it."""
        priced = step.priced
        if priced is None:
            return Way(UNFUSABLE)
        stay = tuple(self.graph.ops[i].name for i in bits(priced.stay))
        return Way(priced.kind, priced.count, stay)

    def terms_of(self, mask: int, beside: Beside, priced: Priced) -> tuple[CostTerm, ...]:
        """The terms that add up to ``F_b`` of a step: weights, streams, storages, residents."""
        group, facts = self.group(mask), self.facts
        graph, lines = self.graph, facts.lines
        terms = []
        for own in group.weighted:
            name = graph.ops[own.op].name
            if priced.stay >> own.op & 1:
                terms.append(CostTerm("weights", name, own.size, 1))
        if priced.kind == SLICES:
            size = -(-group.weights // priced.count)
            terms.append(CostTerm("slice", graph.ops[group.weighted[0].op].name, size, 1))
        elif streamed := [own for own in group.weighted if not priced.stay >> own.op & 1]:
            most = max(streamed, key=lambda own: own.staging)
            terms.append(CostTerm("staging", graph.ops[most.op].name, most.staging, 1))
        for place in places(group, beside, priced):
            kind = "resident" if place.resident else "lines"
            name = lines.names[place.tensors[-1]]
            terms.append(CostTerm(kind, name, place.units, place.unit_bytes))
        if beside.others:
            terms.append(CostTerm("resident", "tensors that it does not touch", beside.others, 1))
        return tuple(terms)
