"""The figures of a cascade plan: what is on chip in each step, what leaves the chip, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch_getfuse.accelerator import format_size
from torch_getfuse.partition.cost.cascade.model import Cascade, Step
from torch_getfuse.partition.cost.cascade.way import SLICES
from torch_getfuse.partition.cost.scheme import CostTerm
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.partition.steps.check import check_steps
from torch_getfuse.partition.steps.problem import StepProblem
from torch_getfuse.partition.steps.reasons import missing
from torch_getfuse.reporting.export import counted
from torch_getfuse.reporting.pictures import Timeline

_WEIGHTS = ("weights", "staging", "slice")
"""Kinds of terms that are weights; the others are lines and residents."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What the buffer holds during a step, in bytes; together the whole buffer.

    Attributes:
        step: its number.
        weights: held for the step, or the staging through which they stream, or one slice.
        lines: live units of the tensors that are not resident.
        residents: whole tensors that stay on chip, whether or not the step touches them.
        unknown: the whole buffer in the step of an unfusable operator, which some other method
            runs; 0 in every other.
        idle: what is left.
    """

    step: int
    weights: int
    lines: int
    residents: int
    unknown: int
    idle: int

    def to_dict(self) -> dict[str, int]:
        """Plain Python values, in bytes."""
        return {
            "step": self.step,
            "weights_bytes": self.weights,
            "lines_bytes": self.lines,
            "residents_bytes": self.residents,
            "unknown_bytes": self.unknown,
            "idle_bytes": self.idle,
        }


@dataclass(frozen=True, slots=True)
class Staying:
    """A tensor that stays on chip.

    Attributes:
        tensor: its name.
        bytes: of the whole tensor.
        first, last: numbers of the steps between which it stays.
    """

    tensor: str
    bytes: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Leaving:
    """A tensor that goes through DRAM from step to step.

    Attributes:
        tensor: its name.
        bytes: of the whole tensor.
        written_bytes, read_bytes: what the steps write and read of it.
        step: of those in which it would have to be on chip, the one that lacks most room, or an
            unfusable one.
        lacking_bytes: that this step, run as it is, would need more; 0 where it would fit, ``None``
            where no room would help.
        reason: the same in words.
    """

    tensor: str
    bytes: int
    written_bytes: int
    read_bytes: int
    step: int
    lacking_bytes: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Again:
    """Weights or an input that a step reads several times.

    Attributes:
        step: its number.
        operator: whose weights or input it is.
        what: ``"weights"``, which stream once per stripe, or the name of the input that is read
            once per slice of the weights.
        times: how often it is read.
        extra_bytes: beyond the first time.
        lacking_bytes: that the step would need more to hold the weights of this operator as well.
    """

    step: int
    operator: str
    what: str
    times: int
    extra_bytes: int
    lacking_bytes: int


class StepFigures:
    """What a report says of the steps of a cascade plan beyond their traffic.

    Args:
        plan: its scheme is cascade.

    Attributes:
        occupancy: of each step.
        staying: tensors that stay on chip, by their first steps.
        leaving: tensors that go through DRAM from step to step, the dearest first.
        again: what is read several times, by steps.

    Raises:
        PlanError: for a plan that breaks a rule.
    """

    def __init__(self, plan: PartitionPlan) -> None:
        scheme = plan.make_scheme()
        assert isinstance(scheme, Cascade), "only plans of cascade are steps"
        self._plan, self._scheme = plan, scheme
        self._problem = problem = StepProblem(scheme, plan.buffer_bytes, plan.residency)
        facts = problem.facts
        self._names = facts.lines.names
        self._masks = plan.masks()
        self._lives = problem.stated(plan.resident)
        self._steps = check_steps(problem, self._masks, self._lives)
        self._beside = [beside for beside, _ in problem.beside(self._masks, self._lives)]
        self.occupancy = tuple(self._occupancy(k, step) for k, step in enumerate(self._steps))
        self.staying = tuple(
            Staying(self._names[tensor], facts.size[tensor], *life)
            for tensor, life in sorted(
                self._lives.items(), key=lambda entry: (*entry[1], self._names[entry[0]])
            )
        )
        self.leaving = self._find_leaving()
        self.again = tuple(
            entry for k, step in enumerate(self._steps) for entry in self._read_again(k, step)
        )

    @property
    def most_staying(self) -> int:
        """The most bytes of resident tensors in any step."""
        return max((held.residents for held in self.occupancy), default=0)

    def terms(self, number: int) -> tuple[CostTerm, ...]:
        """The terms that add up to what a step needs; none for an unfusable operator's."""
        step = self._steps[number]
        if step.priced is None:
            return ()
        return self._scheme.terms_of(step.mask, self._beside[number], step.priced)

    def timeline(self, name: str) -> Timeline:
        """What the buffer holds in each step, for drawing.

        Args:
            name: of the graph, for the title; or empty.
        """
        plan, held = self._plan, self.occupancy
        unknown = {"unfusable": [h.unknown for h in held]} if plan.unfusable else {}
        return Timeline(
            f"{name}: "
            * bool(name)
            + f"{format_size(plan.dram_bytes)} of DRAM access in {counted(len(held), 'step')}, "
            f"buffer {format_size(plan.buffer_bytes)}",
            {
                "weights": [h.weights for h in held],
                "lines": [h.lines for h in held],
                "tensors that stay": [h.residents for h in held],
                **unknown,
            },
            plan.buffer_bytes,
        )

    def _occupancy(self, number: int, step: Step) -> Occupancy:
        buffer = self._plan.buffer_bytes
        if step.priced is None:
            return Occupancy(number, 0, 0, 0, buffer, 0)
        weights = lines = residents = 0
        for term in self.terms(number):
            if term.kind in _WEIGHTS:
                weights += term.bytes
            elif term.kind == "resident":
                residents += term.bytes
            else:
                lines += term.bytes
        return Occupancy(number, weights, lines, residents, 0, buffer - weights - lines - residents)

    def _find_leaving(self) -> tuple[Leaving, ...]:
        facts, names = self._problem.facts, self._names
        written: dict[int, int] = {}
        read: dict[int, int] = {}
        for step in self._steps:
            group = self._scheme.group(step.mask)
            priced = step.priced
            times = 1 if priced is None or priced.kind != SLICES else priced.count
            for tensor in bits(group.loads):
                read[tensor] = read.get(tensor, 0) + times * facts.size[tensor]
            for tensor in bits(group.makes):
                if facts.outputs >> tensor & 1 or facts.readers[tensor] & ~step.mask:
                    written[tensor] = facts.size[tensor]
        found = []
        lacking = missing(self._problem, self._masks, self._lives, self._steps)
        for tensor, (step_number, more) in lacking.items():
            found.append(
                Leaving(
                    names[tensor],
                    facts.size[tensor],
                    written.get(tensor, 0),
                    read[tensor],
                    step_number,
                    more,
                    self._why(step_number, more),
                )
            )
        return tuple(sorted(found, key=lambda e: -(e.written_bytes + e.read_bytes)))

    def _why(self, step: int, more: int | None) -> str:
        if more is None:
            return f"step {step} is unfusable"
        if not self._plan.residency:
            return "residency=False: nothing stays"
        if not more:
            return "room in all steps; not tried"
        return f"step {step} lacks {format_size(more)}"

    def _read_again(self, number: int, step: Step) -> list[Again]:
        priced = step.priced
        if priced is None or priced.count == 1:
            return []
        graph, facts = self._plan.graph, self._problem.facts
        group = self._scheme.group(step.mask)
        over = priced.buffer - (self._plan.buffer_bytes - 1)
        if priced.kind == SLICES:
            (own,) = group.weighted
            more = over + own.size - -(-own.size // priced.count)
            return [
                Again(
                    number,
                    graph.ops[own.op].name,
                    self._names[tensor],
                    priced.count,
                    (priced.count - 1) * facts.size[tensor],
                    more,
                )
                for tensor in bits(group.loads)
                if tensor not in self._lives
            ]
        streamed = [own for own in group.weighted if not priced.stay >> own.op & 1]
        staging = max((own.staging for own in streamed), default=0)
        found = []
        for own in streamed:
            rest = max((other.staging for other in streamed if other is not own), default=0)
            more = over + own.size - staging + rest
            name, extra = graph.ops[own.op].name, (priced.count - 1) * own.size
            found.append(Again(number, name, "weights", priced.count, extra, more))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values; sizes are integer bytes."""
        return {
            "occupancy": [held.to_dict() for held in self.occupancy],
            "resident": [asdict(entry) for entry in self.staying],
            "leaving": [asdict(entry) for entry in self.leaving],
            "read_again": [asdict(entry) for entry in self.again],
        }
