"""LBDF's schedule of a fusion group, unit by unit (docs/method.md, section 3), for the executors.

:class:`~torch_getfuse.partition.cost.lbdf.model.Lbdf` computes the cost of a group without running
this. The schedule lists the steps in order, one per row that is loaded or computed, and the rows
that each ring must hold. ``line`` granularity only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
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
        loads, writes: tensors loaded from outside, and tensors needed outside.
    """

    steps: tuple[Step, ...]
    storage: dict[str, str]
    rings: dict[str, int]
    loads: tuple[str, ...]
    writes: tuple[str, ...]


def make_schedule(
    graph: OpGraph,
    mask: int,
    rings: Mapping[str, int],
    storage: Mapping[str, str] | None = None,
    held: Collection[str] = (),
) -> Schedule:
    """The schedule of a group in rings of a given size.

    After the sinks are done, tensors needed outside advance together to their ends, and then
    tensors from outside are read to theirs: a strided 1x1 window skips the last rows, which cross
    the border nevertheless (``F_D`` counts whole tensors). By then consumers on which no tensor
    needed outside depends are finished and need nothing; rows that are read last are not kept.

    Args:
        graph: the operator graph.
        mask: the group.
        rings: last tensor of each storage -> rows, from the cost model.
        storage: tensor -> last tensor that shares its storage; without it, operators that may
            overwrite their input do.
        held: tensors from outside of which all rows are there from the start.

    Raises:
        PlanError: if a ring is too small for the schedule, or a row is overwritten too early.
    """
    run = ScheduleRun(graph, mask, rings, storage, held)
    longest = max(run.rows[name] for name in run.sinks)
    for q in range(1, longest + 1):
        for name in run.sinks:
            run.produce(name, -(-q * run.rows[name] // longest))
    run.complete()
    return Schedule(tuple(run.steps), run.storage, dict(rings), run.loads, run.writes)


def storages(graph: OpGraph, mask: int) -> dict[str, str]:
    """Each tensor of a group -> the last tensor that shares its storage (section 3, "in place")."""
    group = [(graph.ops[i], graph.overwrites[i]) for i in bits(mask)]
    found = {
        name: name for op, _ in group for name in (*(read.tensor for read in op.reads), op.writes)
    }
    for op, overwrites in reversed(group):
        if overwrites:
            found[op.reads[0].tensor] = found[op.writes]
    return found


class ScheduleRun:
    """Simulates a schedule on counts alone; arguments as of :func:`make_schedule`.

    Attributes:
        makers: tensor -> operator of the group that writes it, in order.
        rows, made: rows of each tensor, and how many of them there are by now.
        readers: tensor -> operators that read it and still make something.
        sinks: tensors that no operator of the group reads.
        loads, writes: as in :class:`Schedule`.
        steps: what was made and loaded by :meth:`produce`.
        ends, keeps: per operator and operand, rows needed up to each output row, and the lowest
            row that this or any later output row needs.
    """

    def __init__(
        self,
        graph: OpGraph,
        mask: int,
        rings: Mapping[str, int],
        storage: Mapping[str, str] | None = None,
        held: Collection[str] = (),
    ) -> None:
        group = [graph.ops[i] for i in bits(mask)]
        self.makers: dict[str, Op] = {op.writes: op for op in group}
        names = dict.fromkeys(
            name for op in group for name in (*(read.tensor for read in op.reads), op.writes)
        )
        self.rows = {name: graph.tensors[name].rows for name in names}
        self.made = {name: self.rows[name] if name in held else 0 for name in names}
        self.readers: dict[str, list[tuple[Op, Read]]] = {name: [] for name in names}
        for op in group:
            for read in op.reads:
                self.readers[read.tensor].append((op, read))
        self.storage = storages(graph, mask) if storage is None else dict(storage)
        self.rings = rings
        self.sinks = [name for name in self.makers if not self.readers[name]]
        loads, writes = boundary(graph, mask)
        self.loads = tuple(name for name in loads if name not in held)
        self.writes = tuple(writes)
        self.steps: list[Step] = []
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

    def complete(self) -> None:
        """After the sinks are done: make what is needed outside to its end, load to the end."""
        left = {
            name: self.rows[name] - self.made[name]
            for name in reversed(self.makers)  # a consumer comes before the tensors that it reads
            if name in self.writes and self.made[name] < self.rows[name]
        }
        self._end_all_but(left)
        longest = max(left.values(), default=0)
        for q in range(1, longest + 1):
            for name, rows in left.items():
                self.produce(name, self.rows[name] - rows + -(-q * rows // longest))
        self._end_all_but({})
        for name in self.loads:
            self.produce(name, self.rows[name])

    def _end_all_but(self, wanted: Mapping[str, int]) -> None:
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
            self.check_overwritten(name, unit + 1)
            self.made[name] += 1
            self.steps.append(Step(name, unit))
            self.check_ring(name, self.released(self.storage[name], self.made[name]))

    def released(self, name: str, made: int) -> int:
        """Of ``made`` rows of a tensor those that no reader needs, nor any row before them."""
        released = made
        for op, read in self.readers[name]:
            if read.window.kind is not WindowKind.REDUCE:
                keeps = self.keeps[op.name, read.tensor][self.made[op.writes]]
                released = min(released, keeps)
        return released

    def check_ring(self, name: str, released: int) -> None:
        """Check that the live rows of a tensor's storage fit into its ring.

        Raises:
            PlanError: if they do not.
        """
        last = self.storage[name]
        live = max(self.made[name] - released, 1)
        if live > self.rings[last]:
            raise PlanError(
                f"the schedule holds {live} rows of {name!r} after its row {self.made[name] - 1}, "
                f"the cost model gives its ring {self.rings[last]}"
            )

    def check_overwritten(self, name: str, end: int, behind: Iterable[str] = ()) -> None:
        """Check that rows below ``end`` of a tensor are written over rows that all have let go.

        Args:
            behind: ``reduce`` readers that have not taken in what there is; the others have.

        Raises:
            PlanError: if an operand that shares the tensor's storage is still read there.
        """
        op = self.makers.get(name)
        for x in {read.tensor for read in op.reads} if op is not None else ():
            if self.storage[x] != self.storage[name]:
                continue
            for other, read in self.readers[x]:
                reduces = read.window.kind is WindowKind.REDUCE
                kept = self.keeps[other.name, x][self.made[other.writes]]
                if other is not op and (other.writes in behind if reduces else kept < end):
                    raise PlanError(
                        f"{name!r} is written over {x!r} up to row {end - 1}, of which "
                        f"{other.name!r} still reads row {kept}"
                    )
