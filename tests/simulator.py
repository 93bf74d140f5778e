"""The oracle: LBDF's schedule (docs/method.md, section 3), unit by unit, as plain as possible.

It shares with the package only the graph and ``Window.span``; nothing of the fast evaluator.
"""

from __future__ import annotations

from tests.widths import unit_bytes, written_over
from torch_getfuse.ir import OpGraph, Read, Tensor, WindowKind
from torch_getfuse.partition.node_set import bits


def unit_span(read: Read, source: Tensor, target: Tensor, unit: int, pixel: bool) -> range:
    """Input units that output ``unit`` needs: everything between the window's two ends."""
    if not pixel:
        low, high = read.window.span(0, unit, source.rows, target.rows)
        return range(low, high + 1)
    row, col = divmod(unit, target.cols)
    top, bottom = read.window.span(0, row, source.rows, target.rows)
    left, right = read.window.span(1, col, source.cols, target.cols)
    if bottom < top or right < left:
        return range(0)
    return range(top * source.cols + left, bottom * source.cols + right + 1)


class Simulator:
    """Runs one group's schedule and keeps the peak of live units of each storage."""

    def __init__(self, graph: OpGraph, mask: int, pixel: bool = False) -> None:
        self.graph, self.pixel = graph, pixel
        self.group = [graph.ops[i] for i in bits(mask)]
        self.makers = {op.writes: op for op in self.group}
        names = dict.fromkeys(
            t for op in self.group for t in (*(r.tensor for r in op.reads), op.writes)
        )
        self.tensors = {name: graph.tensors[name] for name in names}
        self.units = {n: t.rows * t.cols if pixel else t.rows for n, t in self.tensors.items()}
        self.made = dict.fromkeys(names, 0)
        self.readers = {
            name: [(op, r) for op in self.group for r in op.reads if r.tensor == name]
            for name in names
        }
        self.spans = {
            (op.name, r.tensor): [
                unit_span(r, self.tensors[r.tensor], self.tensors[op.writes], u, pixel)
                for u in range(self.units[op.writes])
            ]
            for op in self.group
            for r in op.reads
        }
        # The lowest unit that any output unit from u on needs.
        self.keep: dict[tuple[str, str], list[int]] = {}
        for (name, tensor), spans in self.spans.items():
            lowest, kept = self.units[tensor], [self.units[tensor]]
            for span in reversed(spans):
                if span:
                    lowest = min(lowest, span.start)
                kept.append(lowest)
            self.keep[name, tensor] = kept[::-1]
        # Tensors in place over their input share its storage; the last one releases for all.
        self.storage = {name: name for name in names}
        over = written_over(graph)
        for op in reversed(self.group):
            if over[graph.index[op.name]]:
                self.storage[op.reads[0].tensor] = self.storage[op.writes]
        self.peak = dict.fromkeys(self.storage.values(), 0)
        self.run()

    def run(self) -> None:
        sinks = [name for name in self.makers if not self.readers[name]]
        steps = max(self.units[name] for name in sinks)
        for q in range(1, steps + 1):
            for name in sinks:
                self.produce(name, -(-q * self.units[name] // steps))

    def produce(self, name: str, count: int) -> None:
        op = self.makers.get(name)
        while self.made[name] < count:
            unit = self.made[name]
            if op is not None:
                for read in op.reads:
                    span = self.spans[op.name, read.tensor][unit]
                    if span:
                        self.produce(read.tensor, span[-1] + 1)
            self.made[name] += 1
            self.note(name)

    def note(self, name: str) -> None:
        """Count the storage's live units at the moment a unit of ``name`` is written."""
        last = self.storage[name]
        released = self.made[name]
        holders = [
            (op, r) for op, r in self.readers[last] if r.window.kind is not WindowKind.REDUCE
        ]
        for op, read in holders:
            released = min(released, self.keep[op.name, read.tensor][self.made[op.writes]])
        live = max(self.made[name] - released, 1)
        self.peak[last] = max(self.peak[last], live)

    def buffer_bytes(self, activation_bytes: int | None = 1, weight_bytes: int = 1) -> int:
        """``activation_bytes=None``: each tensor as the graph stores it."""
        total = sum(op.weight_elements for op in self.group) * weight_bytes
        for name, units in self.peak.items():
            size = unit_bytes(self.graph, name, self.pixel)
            if activation_bytes is not None:
                size = self.tensors[name].elements // self.units[name] * activation_bytes
            total += max(units, 1) * size
        return total
