"""LBDF's schedule of a fusion group, unit by unit (docs/method.md, section 3), for the executors.

:class:`~torch_getfuse.partition.cost.lbdf.model.Lbdf` computes the cost of a group without running
this. The schedule lists the steps in order, one per row that is loaded or computed, and the rows
that each ring must hold. ``line`` granularity only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch_getfuse.errors import PlanError
from torch_getfuse.ir import Op, OpGraph, Read, WindowKind
from torch_getfuse.partition.cost.scheme import boundary
from torch_getfuse.partition.node_set import bits


class Step(NamedTuple):
    """One unit of one tensor: computed by its operator, or loaded if that is not in the group."""

    tensor: str
    unit: int


@dataclass(frozen=True)
class Schedule:
    """The steps of a group and the rings that they need.

    Attributes:
        steps: the steps in order; nothing is computed or loaded twice.
        storage: tensor -> last tensor that shares its storage: itself, unless an operator
            overwrites it.
        rings: last tensor of each storage -> rows of its ring.
        loads, writes: tensors read from outside, and tensors needed outside.
    """

    steps: tuple[Step, ...]
    storage: dict[str, str]
    rings: dict[str, int]
    loads: tuple[str, ...]
    writes: tuple[str, ...]


def make_schedule(graph: OpGraph, mask: int, rings: dict[str, int]) -> Schedule:
    """The schedule of a group in rings of a given size.

    After the sinks are done, tensors needed outside advance together to their ends, and then
    tensors from outside are read to theirs: a strided 1x1 window skips the last rows, which cross
    the border nevertheless (``F_D`` counts whole tensors). By then consumers on which no tensor
    needed outside depends are finished and need nothing; rows that are read last are not kept.

    Args:
        graph: the operator graph.
        mask: the group.
        rings: last tensor of each storage -> rows, from the cost model.

    Raises:
        PlanError: if a ring is too small for the schedule.
    """
    run = _Run(graph, mask, rings)
    sinks = [op.writes for op in run.makers.values() if not run.readers[op.writes]]
    longest = max(run.rows[name] for name in sinks)
    for q in range(1, longest + 1):
        for name in sinks:
            run.produce(name, -(-q * run.rows[name] // longest))
    loads, writes = boundary(graph, mask)
    left = {
        name: run.rows[name] - run.made[name]
        for name in reversed(run.makers)  # a consumer comes before the tensors that it reads
        if name in writes and run.made[name] < run.rows[name]
    }
    run.end_all_but(left)
    longest = max(left.values(), default=0)
    for q in range(1, longest + 1):
        for name, rows in left.items():
            run.produce(name, run.rows[name] - rows + -(-q * rows // longest))
    run.end_all_but({})
    for name in loads:
        run.produce(name, run.rows[name])
    return Schedule(tuple(run.steps), run.storage, dict(rings), tuple(loads), tuple(writes))


class _Run:
    """Simulates the schedule on counts alone."""

    def __init__(self, graph: OpGraph, mask: int, rings: dict[str, int]) -> None:
        group = [graph.ops[i] for i in bits(mask)]
        self.makers: dict[str, Op] = {op.writes: op for op in group}
        names = dict.fromkeys(
            name for op in group for name in (*(read.tensor for read in op.reads), op.writes)
        )
        self.rows = {name: graph.tensors[name].rows for name in names}
        self.made = dict.fromkeys(names, 0)
        self.readers: dict[str, list[tuple[Op, Read]]] = {name: [] for name in names}
        for op in group:
            for read in op.reads:
                self.readers[read.tensor].append((op, read))
        self.storage = {name: name for name in names}
        for i in reversed(list(bits(mask))):
            if graph.overwrites[i]:
                op = graph.ops[i]
                self.storage[op.reads[0].tensor] = self.storage[op.writes]
        self.rings = rings
        self.steps: list[Step] = []
        # Per operator and operand: rows needed up to each output row, and the lowest row that this
        # or any later output row needs.
        self.ends: dict[tuple[str, str], list[int]] = {}
        self.keeps: dict[tuple[str, str], list[int]] = {}
        for op in group:
            for read in op.reads:
                self._spans(op, read)

    def _spans(self, op: Op, read: Read) -> None:
        rows_in, rows_out = self.rows[read.tensor], self.rows[op.writes]
        spans = [read.window.span(0, row, rows_in, rows_out) for row in range(rows_out)]
        lowest, keeps = rows_in, [rows_in]
        for low, high in reversed(spans):
            if low <= high:
                lowest = min(lowest, low)
            keeps.append(lowest)
        self.ends[op.name, read.tensor] = [high + 1 if low <= high else 0 for low, high in spans]
        self.keeps[op.name, read.tensor] = keeps[::-1]

    def end_all_but(self, wanted: Mapping[str, int]) -> None:
        """From here on, produce only the rest of these tensors and what it needs.

        Readers that produce nothing more are dropped.
        """
        final = {name: self.rows[name] if name in wanted else self.made[name] for name in self.made}
        for name in reversed(self.makers):
            op, more = self.makers[name], final[name] > self.made[name]
            for read in op.reads if more else ():
                needed = max(self.ends[op.name, read.tensor][: final[name]])
                final[read.tensor] = max(final[read.tensor], needed)
        for name, readers in self.readers.items():
            self.readers[name] = [
                (op, read) for op, read in readers if final[op.writes] > self.made[op.writes]
            ]

    def produce(self, name: str, count: int) -> None:
        """Produce the first ``count`` units of a tensor; uses a stack instead of recursion."""
        stack = [(name, count)]
        while stack:
            name, count = stack[-1]
            unit = self.made[name]
            if unit >= count:
                stack.pop()
                continue
            op = self.makers.get(name)
            wanted = None
            for read in op.reads if op is not None else ():
                end = self.ends[op.name, read.tensor][unit]  # type: ignore[union-attr]
                if self.made[read.tensor] < end:
                    wanted = read.tensor, end
                    break
            if wanted is not None:
                stack.append(wanted)
                continue
            self.made[name] += 1
            self.steps.append(Step(name, unit))
            self._check(name)

    def _check(self, name: str) -> None:
        """Check that the live units of a tensor's storage fit into its ring."""
        last = self.storage[name]
        released = self.made[name]
        for op, read in self.readers[last]:
            if read.window.kind is not WindowKind.REDUCE:
                done = self.made[op.writes]
                released = min(released, self.keeps[op.name, read.tensor][done])
        live = max(self.made[name] - released, 1)
        if live > self.rings[last]:
            raise PlanError(
                f"the schedule holds {live} rows of {name!r} after its row {self.made[name] - 1}, "
                f"the cost model gives its ring {self.rings[last]}"
            )
