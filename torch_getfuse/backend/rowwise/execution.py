"""One call of a step: its rings, its schedule carried out, and everything that moves counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from torch_getfuse.backend.rowwise.kernels import Accumulator, RowKernel, WholeKernel
from torch_getfuse.backend.rowwise.ledger import Counts
from torch_getfuse.backend.rowwise.onchip import OnChip, Stay, sample_of
from torch_getfuse.backend.rowwise.rings import Part, Ring, RingView
from torch_getfuse.backend.rowwise.turns import Turns
from torch_getfuse.backend.rowwise.weights import Weights
from torch_getfuse.ir import Tensor
from torch_getfuse.partition.cost.cascade.step_layout import StepLayout
from torch_getfuse.partition.cost.cascade.stripe_schedule import Turn
from torch_getfuse.partition.cost.cascade.way import SLICES, STRIPES


class Tap(Protocol):
    """Is shown each row that is computed."""

    def __call__(self, name: str, sample: int, unit: int, block: torch.Tensor, /) -> None:
        """Tensor, sample, row, block."""


class RowError(RuntimeError):
    """A row that could not be computed, by tensor or operator, and what it raised."""


@dataclass(frozen=True)
class Program:
    """All that is known of a step before a call.

    Attributes:
        layout: what the plan says of it.
        turns: its schedule.
        kernels: tensor -> what computes it.
        weights: tensor -> what its operator fetches.
        takers: tensor -> the operators that take in its rows one by one.
        tensors, nodes, dtypes: of each tensor that it touches.
        samples: of the batch.
        stay: what is on chip around it.
        tensor_bytes: of each tensor, as the plan stores it.
    """

    layout: StepLayout
    turns: Turns
    kernels: Mapping[str, RowKernel | Accumulator]
    weights: Mapping[str, Weights]
    takers: Mapping[str, Sequence[Accumulator]]
    tensors: Mapping[str, Tensor]
    nodes: Mapping[str, fx.Node]
    dtypes: Mapping[str, torch.dtype]
    samples: int
    stay: Stay
    tensor_bytes: Mapping[str, int]

    def ring(self, last: str) -> Ring:
        """A new ring for a storage."""
        tensor = self.tensors[last]
        return Ring(self.layout.rings[last], tensor.elements // tensor.rows, self.itemsize(last))

    def itemsize(self, last: str) -> int:
        """Bytes of an element of the widest tensor in a storage."""
        shared = self.layout.shared
        return max(dtype.itemsize for n, dtype in self.dtypes.items() if shared[n] == last)


class Execution:
    """The buffers of one call.

    Args:
        program: of the step.
        values: what nodes give in this call: weights, tensors from outside, room for results.
        chip: where resident tensors are and go.
        counts: takes in what is counted.
        tap: is shown the rows, of steps that are not in slices.
    """

    def __init__(
        self,
        program: Program,
        values: Mapping[fx.Node, Any],
        chip: OnChip,
        counts: Counts,
        tap: Tap | None = None,
    ) -> None:
        self.program, self.values, self.chip = program, values, chip
        self.counts, self.tap = counts, tap
        layout = program.layout
        self.slices = layout.way.count if layout.way.kind == SLICES else 1
        self.whole = {layout.shared[name] for name in layout.resident}
        self.own = {last: program.ring(last) for last in layout.rings if last not in self.whole}
        counts.rings.update({last: ring.elements for last, ring in self.own.items()})
        counts.residents.update(chip.elements(but=layout.resident))
        self.beside = 0

    def run(self) -> None:
        """Carry out the schedule for each sample, and leave on chip what stays.

        Raises:
            RowError: where a row cannot be computed; what is on chip was perhaps written over.
        """
        program, left = self.program, []
        for sample, stores in enumerate(self.chip.stores):
            rings = dict(self.own)
            for name in program.stay.held:
                last = program.layout.shared[name]
                rings[last] = stores[name]
                rings[last].widen(program.itemsize(last))
            for last in self.whole - rings.keys():
                rings[last] = program.ring(last)
            if sample == 0:
                self.counts.residents.update({last: rings[last].elements for last in self.whole})
            self._sample(sample, rings)
            left.append({name: rings[program.layout.shared[name]] for name in program.stay.kept})
        for name in program.layout.resident:
            self.chip.drop(name)
        self.chip.update(left)

    def _sample(self, sample: int, rings: Mapping[str, Ring]) -> None:
        program = self.program
        self.sample = sample
        self.rings = rings
        self.views = {
            name: RingView(rings[last], program.tensors[name], program.dtypes[name])
            for name, last in program.layout.shared.items()
        }
        self.loads = {name: self._memory(name) for name in program.layout.loads}
        self.writes = {name: self._memory(name) for name in program.layout.writes}
        for number in range(self.slices):
            self._pass(number)
        self.counts.samples += 1

    def _pass(self, number: int) -> None:
        """The whole schedule, of a step in slices for one of them."""
        program, layout = self.program, self.program.layout
        for ring in self.own.values():
            ring.clear()
        # Tensors from outside that are on chip by now.
        self.there = set(program.stay.held)
        if number:
            self.there |= layout.resident.intersection(self.loads)
        self.made = dict.fromkeys(layout.shared, 0)
        self.made.update((name, program.tensors[name].rows) for name in self.there)
        self.part: Part | None = None
        self.idle = False
        self.local: dict[str, Mapping[fx.Node, Any]] = {
            kernel.op.name: {**self.values, **self._own(kernel.by_sample)}
            for kernel in program.kernels.values()
            if kernel.by_sample
        }
        if self.slices > 1:
            self._slice(number)
        self.states: dict[Accumulator, Any] = {}
        self.taken: dict[Accumulator, int] = {}
        self.full: dict[str, torch.Tensor] = {}
        self.present: set[str] = set()
        turn = Turn("", 0, 0)
        try:
            if layout.way.kind != STRIPES:
                for name in sorted(self.there):
                    self._take_in(name)
            for stripe in program.turns.stripes:
                self.present &= program.turns.stays
                for turn in stripe:
                    self._turn(turn)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            row = f"row {turn.low} of {turn.tensor}" if turn.tensor else "what is on chip"
            raise RowError(f"{row} cannot be computed: {reason}") from error

    def _slice(self, number: int) -> None:
        """Take the weights of one slice in the place of all."""
        (kernel,) = self.program.kernels.values()
        weights = self.program.weights[kernel.op.writes]
        self.part = weights.part(number, self.slices)
        self.idle = number > 0 if self.part is None else not self.part.size
        if self.part is not None and weights.by_slices and not self.idle:
            values = self._values(kernel)
            self.local[kernel.op.name] = {**values, **weights.cut(values, self.part)}

    # -- turns ------------------------------------------------------------------------------

    def _turn(self, turn: Turn) -> None:
        name, low, high = turn
        kernel = self.program.kernels.get(name)
        if kernel is None:
            if name in self.there:
                return
            block = rows_of(self.loads[name], self.program.tensors[name], low, high)
            self.counts.read[name] += block.numel()
            self.views[name].write(low, high, block)
        else:
            if self.idle:
                return
            self._fetch(kernel)
            if isinstance(kernel, Accumulator) and self.program.layout.way.kind == STRIPES:
                self._take(kernel, self.made[kernel.op.reads[0].tensor])
            if low == high:
                return
            block = self._compute(kernel, low, high)
            self._put(name, low, high, block)
        self.made[name] = high
        if self.program.layout.way.kind != STRIPES:
            self._take_in(name)

    def _put(self, name: str, low: int, high: int, block: torch.Tensor) -> None:
        """Rows that were computed go into their ring, and to memory if they are needed there."""
        tensor, part = self.program.tensors[name], self.part
        if self.tap is not None and part is None:
            for unit in range(low, high):
                self.tap(
                    name, self.sample, unit, rows_of(block, tensor, unit - low, unit - low + 1)
                )
        self.views[name].write(low, high, block, part)
        if name in self.writes:
            place = rows_of(self.writes[name], tensor, low, high)
            (place if part is None else part.of(place)).copy_(block)
            self.counts.written[name] += block.numel()

    def _take_in(self, name: str) -> None:
        for taker in self.program.takers[name]:
            if not self.idle:
                self._fetch(taker)
                self._take(taker, self.made[name])

    def _take(self, taker: Accumulator, end: int) -> None:
        """An operator takes in the rows that there are of its input."""
        view = self.views[taker.op.reads[0].tensor]
        for unit in range(self.taken.get(taker, 0), end):
            state, block = self.states.get(taker), view.read(unit, unit + 1)
            self.states[taker] = taker.take(self._values(taker), state, block, unit)
        self.taken[taker] = end

    def _fetch(self, kernel: RowKernel | Accumulator) -> None:
        """Get an operator's weights, unless they are on chip."""
        name = kernel.op.name
        if name in self.present:
            return
        self.present.add(name)
        weights = self.program.weights[kernel.op.writes]
        self.counts.weight_bytes += weights.fetched(self._values(kernel), self.part)

    def _compute(self, kernel: RowKernel | Accumulator, low: int, high: int) -> torch.Tensor:
        """Rows of an operator; of one in slices, the channels of the slice."""
        values = self._values(kernel)
        if isinstance(kernel, Accumulator):
            block = kernel.finish(values, self.states.pop(kernel))
        elif isinstance(kernel, WholeKernel):
            block = self._whole(kernel, low, high)
        else:
            block = kernel.rows(values, self._inputs(kernel, low, high), low, high)
        if self.part is not None and not self.program.weights[kernel.op.writes].by_slices:
            block = self.part.of(block)
        return block

    def _inputs(self, kernel: RowKernel, low: int, high: int) -> list[torch.Tensor]:
        return [
            self.views[read.tensor].read(*kernel.needs(k, low, high))
            for k, read in enumerate(kernel.op.reads)
        ]

    def _whole(self, kernel: WholeKernel, low: int, high: int) -> torch.Tensor:
        """Rows of an operator that is computed at once and held until its last row is out."""
        name, rows = kernel.target.name, kernel.target.rows
        if low == 0:
            inputs = self._inputs(kernel, 0, rows)
            found = kernel.rows(self._values(kernel), inputs, 0, rows)
            if high == rows:
                return found
            self.full[name] = found
            self.beside += self.program.tensor_bytes[name]
            self.counts.beside = max(self.counts.beside, self.beside)
        block = rows_of(self.full[name], kernel.target, low, high)
        if high == rows:
            del self.full[name]
            self.beside -= self.program.tensor_bytes[name]
        return block

    # -- values -----------------------------------------------------------------------------

    def _own(self, nodes: Mapping[fx.Node, int]) -> dict[fx.Node, torch.Tensor]:
        """Each sample's part of constants that have a batch."""
        return {
            node: self.values[node].narrow(0, self.sample * lead, lead)
            for node, lead in nodes.items()
        }

    def _values(self, kernel: RowKernel | Accumulator) -> Mapping[fx.Node, Any]:
        return self.local.get(kernel.op.name, self.values)

    def _memory(self, name: str) -> torch.Tensor:
        """One sample of a tensor outside the step."""
        full: torch.Tensor = self.values[self.program.nodes[name]]
        return sample_of(full, self.program.tensors[name], self.sample, self.program.samples)


def rows_of(full: torch.Tensor, tensor: Tensor, low: int, high: int) -> torch.Tensor:
    """Rows ``[low, high)`` of a tensor, where they lie."""
    return full if tensor.stream_axis is None else full.narrow(tensor.stream_axis, low, high - low)
