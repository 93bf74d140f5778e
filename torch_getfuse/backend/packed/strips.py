"""Depth-first runs of a few steps: strip by strip, so that what lies between stays in cache.

A :class:`StripPlan` is the schedule, computed once: for every strip and step the rows to compute,
and the rows of each operand that they need. Every map that is needed outside advances by its
share of rows per strip; what a strip needs of the maps inside is computed anew (the halo), which
for a strip of many rows costs less than moving rows between buffers (docs/depth-first.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from torch_getfuse.backend.fx_nodes.values import traced_value
from torch_getfuse.backend.packed.steps import Step


@dataclass(frozen=True)
class Block:
    """Rows of one map that a step is given.

    Attributes:
        source: position of the step in the segment that computes the map, or ``-1 - k`` for the
            k-th map from outside.
        low, high: rows to take, counted from the first row of what that strip has of the map.
        before, after: rows of padding to add above and below.
        fill: what the padding holds.
        whole: the map is read as it is (a scale of one row).
    """

    source: int
    low: int = 0
    high: int = 0
    before: int = 0
    after: int = 0
    fill: float = 0.0
    whole: bool = False

    def take(self, value: Tensor) -> Tensor:
        """The block out of what there is of the map; a view where nothing is padded."""
        if self.whole:
            return value
        if self.low or self.high != value.shape[2]:
            value = value.narrow(2, self.low, self.high - self.low)
        if self.before or self.after:
            value = F.pad(value, (0, 0, self.before, self.after), value=self.fill)
        return value


@dataclass(frozen=True)
class Work:
    """One step in one strip.

    Attributes:
        step: its position in the segment.
        rows: output rows computed.
        blocks: its operands.
        keep: for a map needed outside, (first row of the block, first row of the map, rows) to
            copy out; ``None`` otherwise.
    """

    step: int
    rows: int
    blocks: tuple[Block, ...]
    keep: tuple[int, int, int] | None


@dataclass(frozen=True)
class StripPlan:
    """The schedule of a segment.

    Attributes:
        strips: the work of each strip, in order.
        outside: nodes of the maps that come from outside.
        outputs: positions of the steps whose maps are needed outside.
    """

    strips: tuple[tuple[Work, ...], ...]
    outside: tuple[fx.Node, ...]
    outputs: tuple[int, ...]


def map_rows(node: fx.Node) -> int:
    """Rows of a map."""
    return int(traced_value(node).shape[2])


def last_reads(steps: Sequence[Step]) -> dict[fx.Node, int]:
    """Node -> position of the last step that reads its value, as a map or as a weight."""
    return {node: at for at, step in enumerate(steps) for node in (*step.maps, *step.weights)}


class Segment:
    """Steps that may run as strips: their maps, and what is needed outside.

    Args:
        steps: consecutive steps of a program, each able to run by rows.
        needed: nodes whose values are needed after the segment.
    """

    @classmethod
    def part(
        cls,
        steps: Sequence[Step],
        first: int,
        end: int,
        returned: set[fx.Node],
        last: Mapping[fx.Node, int],
    ) -> Segment:
        """Steps ``first`` to ``end - 1`` of a program.

        Args:
            steps: of the whole program.
            returned: nodes that the graph returns.
            last: :func:`last_reads` of the program.
        """
        part = steps[first:end]
        needed = {s.node for s in part if s.node in returned or last.get(s.node, -1) >= end}
        return cls(part, needed)

    def __init__(self, steps: Sequence[Step], needed: set[fx.Node]) -> None:
        self.steps = tuple(steps)
        self.home = {step.node: k for k, step in enumerate(self.steps)}
        outside: dict[fx.Node, int] = {}
        for step in self.steps:
            for node in step.maps:
                if node not in self.home:
                    outside.setdefault(node, -1 - len(outside))
        self.sources = {**outside, **self.home}
        self.outside = tuple(outside)
        self.outputs = tuple(k for k, step in enumerate(self.steps) if step.node in needed)
        self.rows = tuple(map_rows(step.node) for step in self.steps)

    @property
    def runs(self) -> bool:
        """Whether strips can compute it: what is read whole must come from outside."""
        return bool(self.outputs) and all(
            window is not None or node not in self.home
            for step in self.steps
            for node, window in zip(step.maps, step.windows, strict=True)
        )

    def ranges(self, strip: int, strips: int) -> list[tuple[int, int]]:
        """Rows ``low`` to ``high - 1`` that each step computes in a strip; empty where none."""
        wanted: list[tuple[int, int] | None] = [None] * len(self.steps)
        for k in self.outputs:
            size = self.rows[k]
            wanted[k] = (strip * size // strips, (strip + 1) * size // strips)
        for k in range(len(self.steps) - 1, -1, -1):
            own = wanted[k]
            if own is None or own[0] >= own[1]:
                continue
            step = self.steps[k]
            for node, window in zip(step.maps, step.windows, strict=True):
                source = self.home.get(node)
                if source is None or window is None:
                    continue
                # At least a row, so that there is a map to pad where all lies in the padding.
                start, end = window.needs(*own)
                low = min(max(start, 0), self.rows[source] - 1)
                high = max(min(end, self.rows[source]), low + 1)
                before = wanted[source]
                if before is None or before[0] >= before[1]:
                    wanted[source] = (low, high)
                else:
                    wanted[source] = (min(before[0], low), max(before[1], high))
        return [(0, 0) if rows is None else rows for rows in wanted]

    def reads(self, ranges: Sequence[tuple[int, int]]) -> dict[fx.Node, int]:
        """Rows that a strip takes of each map from outside; of several readers the most."""
        found: dict[fx.Node, int] = {}
        for step, (low, high) in zip(self.steps, ranges, strict=True):
            for node, window in zip(step.maps, step.windows, strict=True):
                if node not in self.home and window is not None and low < high:
                    start, end = window.needs(low, high)
                    found[node] = max(found.get(node, 0), min(end - start, map_rows(node)))
        return found

    def plan(self, strips: int) -> StripPlan:
        """The schedule for so many strips."""
        work = []
        for strip in range(strips):
            ranges = self.ranges(strip, strips)
            line = []
            for k, (low, high) in enumerate(ranges):
                if low >= high:
                    continue
                keep = None
                if k in self.outputs:
                    size = self.rows[k]
                    first, last = strip * size // strips, (strip + 1) * size // strips
                    keep = (first - low, first, last - first)
                line.append(Work(k, high - low, self._blocks(k, low, high, ranges), keep))
            work.append(tuple(line))
        return StripPlan(tuple(work), self.outside, self.outputs)

    def _blocks(
        self, k: int, low: int, high: int, ranges: Sequence[tuple[int, int]]
    ) -> tuple[Block, ...]:
        blocks = []
        step = self.steps[k]
        for node, window in zip(step.maps, step.windows, strict=True):
            source = self.sources[node]
            if window is None:
                blocks.append(Block(source, whole=True))
                continue
            size = self.rows[source] if source >= 0 else map_rows(node)
            start, end = window.needs(low, high)
            first, last = max(start, 0), min(end, size)
            base = ranges[source][0] if source >= 0 else 0
            before = min(end, 0) - min(start, 0)
            after = max(end, size) - max(start, size)
            if first >= last:
                first = last = base
            blocks.append(Block(source, first - base, last - base, before, after, window.fill))
        return tuple(blocks)


def run_strips(
    segment: Segment,
    plan: StripPlan,
    given: Sequence[Tensor],
    calls: Sequence[Callable[..., Tensor]],
    results: Sequence[Tensor | None],
    which: range,
) -> None:
    """Run some strips of a plan for one image.

    Args:
        segment, plan: what to run.
        given: the maps from outside, ``(1, C, H, W)``.
        calls: per step, what computes a block from its operands.
        results: per step, the map to fill; ``None`` where it is needed inside only.
        which: the strips.
    """
    # Maps from outside stand behind the steps, last first: their positions are negative.
    values = [given[0]] * len(segment.steps) + list(reversed(given))
    for strip in which:
        for work in plan.strips[strip]:
            value = calls[work.step](*(block.take(values[block.source]) for block in work.blocks))
            values[work.step] = value
            if work.keep is not None:
                begin, first, count = work.keep
                result = results[work.step]
                assert result is not None
                torch.narrow(result, 2, first, count).copy_(value.narrow(2, begin, count))
