"""What the search for a sequence of steps is given: the graph, the cost model, the buffer.

docs/method.md, section 12. Sets of operators and of tensors are bit masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from torch_getfuse.accelerator import format_size
from torch_getfuse.errors import OptionError, PlanError
from torch_getfuse.partition.cost.cascade.model import Cascade, Step
from torch_getfuse.partition.cost.cascade.pricing import Beside
from torch_getfuse.partition.cost.cascade.way import Resident
from torch_getfuse.partition.node_set import (
    Neighbours,
    bits,
    mask_of,
    neighbours,
    topological_order,
)
from torch_getfuse.partition.pins import NONE, Pins
from torch_getfuse.partition.problem import (
    blocks_and_ideals,
    contracted,
    merge_in_place,
    refuse_unfusable,
)
from torch_getfuse.partition.work import Work

_DONE, _TENSOR = 3, 1
"""Steps counted for what is known of a down-set, and for each tensor that is looked at for it."""


class Handed(NamedTuple):
    """The tensors that a down-set hands on.

    Attributes:
        tensors: mask of them.
        to_read: mask of those that a fusable operator is still to read.
    """

    tensors: int
    to_read: int


class Found(NamedTuple):
    """A sequence: its steps, the residents between them (mask of tensors), its DRAM bytes."""

    masks: tuple[int, ...]
    residents: int
    dram_bytes: int

    def rank(self) -> tuple[int, int]:
        """Less is better: traffic, then steps."""
        return self.dram_bytes, len(self.masks)


class Life(NamedTuple):
    """The steps during which a tensor is resident: numbers of the first and the last."""

    first: int
    last: int


class StepProblem:
    """Find the sequence of steps of a graph with the least DRAM access under one buffer.

    Args:
        scheme: the cost model.
        buffer_bytes: the on-chip buffer ``B``; a step is valid if ``F_b < B``, strictly.
        residency: whether tensors may stay on chip between steps.
        work: what counts the steps of all that is asked; its own without.
        pins: what steps must hold together or apart, and tensors that must stay on chip.

    Attributes:
        unfusable: mask of the operators that alone fit in no way.
        blocks: per operator, mask of the operators that it is moved with: itself, and those that
            write over its output in place and leave what cannot be resident.
        ideals: per operator, its block, all that the block depends on, and their blocks.
        may_stay: mask of the tensors that may be resident at all.
        kept: mask of those that are pinned: resident, or in one step alone.
        best: the cheapest sequence that any search has found.

    Raises:
        OptionError: for pins that no plan can keep to.
    """

    def __init__(
        self,
        scheme: Cascade,
        buffer_bytes: int,
        residency: bool = True,
        work: Work | None = None,
        pins: Pins = NONE,
    ) -> None:
        graph = scheme.graph
        self.scheme, self.graph, self.facts = scheme, graph, scheme.facts
        self.buffer_bytes, self.residency = buffer_bytes, residency
        self.work = work or Work()
        self.everything = (1 << len(graph)) - 1
        self.best: Found | None = None
        self._handed: dict[int, Handed] = {}
        self._rests: dict[int, int] = {}
        self.unfusable = sum(
            1 << i for i in range(len(graph)) if scheme.buffer(1 << i, buffer_bytes) >= buffer_bytes
        )
        self.may_stay = 0
        if residency:
            facts = self.facts
            for tensor, size in enumerate(facts.size):
                near = facts.readers[tensor] | facts.maker[tensor]
                if not near & self.unfusable and size < buffer_bytes:
                    self.may_stay |= 1 << tensor
        self.pins = pins
        self.kept = mask_of(self.facts.number[name] for name in pins.kept)
        self._refuse_pins()
        apart = pins.loose | mask_of(i for i in range(len(graph)) if self._gains_apart(i))
        merged = merge_in_place(graph, self.unfusable, apart)
        self.blocks, self.ideals = blocks_and_ideals(graph, merged)

    def _refuse_pins(self) -> None:
        """Raises :class:`OptionError` for pins that no plan can keep to."""
        refuse_unfusable(self.graph, self.pins, self.unfusable)
        facts = self.facts
        for tensor in bits(self.kept):
            if stuck := (facts.readers[tensor] | facts.maker[tensor]) & self.unfusable:
                raise OptionError(
                    f"keep={facts.lines.names[tensor]!r}: "
                    f"{self.graph.ops[stuck.bit_length() - 1].name} touches it and fits the buffer "
                    f"of {format_size(self.buffer_bytes)} in no way, so that it goes through DRAM; "
                    "raise buffer="
                )

    def why_none(self) -> str:
        """Why no plan keeps to the pins, with what each needs."""
        facts, needs = self.facts, []
        for whole in self.pins.wholes:
            need = self.scheme.buffer(whole.mask, self.buffer_bytes)
            needs.append(f"{whole.text} needs {format_size(need)} in its smallest way")
        names = facts.lines.names
        needs += [f"keep={names[t]!r} is {format_size(facts.size[t])}" for t in bits(self.kept)]
        return (
            f"no plan keeps to the pins: {'; '.join(needs) or 'split_before= leaves none'}; buffer "
            f"{format_size(self.buffer_bytes)}; raise buffer= or pin less"
        )

    def _gains_apart(self, position: int) -> bool:
        """Whether an operator in place may be better in another step than its producer.

        A step of its own can read the map by rows and leave its result resident, where the step
        that made the map has no room for the whole of it. That moves as much as to write and read
        the result, so it is of use only if the one reader of the result runs in slices, where
        all its weights beside lines take more than a slice of them beside the whole result; or
        if the reader is written over the result.
        """
        facts = self.facts
        lines, tensor = facts.lines, facts.lines.writes[position]
        readers = facts.readers[tensor]
        if not self.may_stay >> tensor & 1 or readers.bit_count() != 1:
            return False
        reader = readers.bit_length() - 1
        if tensor in facts.may_overwrite[reader]:
            return True
        edge, weights = lines.edges[tensor, reader], lines.weights[reader]
        rows = max(1, edge.widest(edge.units_out)) * lines.unit_bytes[tensor]
        return weights + rows > facts.size[tensor] - (-weights // facts.channels[reader])

    def offer(self, found: Found) -> None:
        """Keep a sequence if it is the cheapest so far, or as cheap with fewer steps."""
        if self.best is None or found.rank() < self.best.rank():
            self.best = found

    def one_by_one(self) -> list[int]:
        """Each operator as a step, in the order of the graph, with what writes over its output
        where the two fit together; pinned sets as one step.
        """
        limit, found = self.buffer_bytes, []
        for block in sorted(dict.fromkeys(self.blocks), key=lambda block: block & -block):
            fits = self.scheme.buffer(block, limit) < limit
            found += [block] if fits else [1 << i for i in bits(block)]
        return list(contracted(self.graph, found, self.pins)) if self.pins.wholes else found

    @cached_property
    def near(self) -> Neighbours:
        """Per operator, its producers and consumers."""
        return neighbours(self.graph)

    @cached_property
    def unavoidable(self) -> int:
        """Bytes that every sequence moves: weights and inputs once in, outputs once out, and all
        that the unfusable operators touch.
        """
        with self.work.finishing():
            return self.rest(0)

    def rest(self, before: int, step: int = 0) -> int:
        """Bytes that every plan moves once a down-set is done, but for reading again what it
        hands on: weights, inputs that nothing has read, outputs, the unfusable operators.

        Args:
            before: the down-set, but for a last step: of it more is known mostly.
            step: mask of the last step's operators.
        """
        done = before | step
        found = self._rests.get(done)
        if found is None:
            weights, left = self.scheme.weights, self.everything & ~done
            if step:
                touched = self.facts.touching(step)
                found, left_before = self.rest(before), self.everything & ~before
                self.work.add(_DONE + _TENSOR * touched.bit_count())
                for tensor in bits(touched):
                    found += self._owed(tensor, left) - self._owed(tensor, left_before)
                found -= sum([weights[i] for i in bits(step)])
            else:
                self.work.add(_TENSOR * len(self.facts.size))
                found = sum([weights[i] for i in bits(left)])
                found += sum([self._owed(tensor, left) for tensor in range(len(self.facts.size))])
            self._rests[done] = found
        return found

    def _owed(self, tensor: int, left: int) -> int:
        """Of :meth:`rest`, what a tensor adds while some operators are left."""
        facts, unfusable = self.facts, self.unfusable
        readers, maker = facts.readers[tensor] & left, facts.maker[tensor]
        stubborn = readers & unfusable
        moves = stubborn.bit_count()
        if maker & left:
            moves += facts.outputs >> tensor & 1 or bool(readers and (maker | stubborn) & unfusable)
            moves += bool(maker & unfusable and readers & ~unfusable)
        elif not maker and readers == facts.readers[tensor] and readers & ~unfusable:
            moves += 1
        return moves * facts.size[tensor]

    def handed(self, before: int, step: int = 0) -> Handed:
        """The tensors that a down-set hands on: made or read in it, and read outside.

        Args:
            before, step: as :meth:`rest` has them.
        """
        done = before | step
        found = self._handed.get(done)
        if found is None:
            facts, left = self.facts, self.everything & ~done
            tensors = to_read = 0
            touched: Iterable[int] = range(len(facts.size))
            if step:
                tensors, to_read = self.handed(before)
                mask = facts.touching(step)
                tensors, to_read, touched = tensors & ~mask, to_read & ~mask, bits(mask)
                self.work.add(_DONE + _TENSOR * mask.bit_count())
            else:
                self.work.add(_TENSOR * len(facts.size))
            for tensor in touched:
                readers = facts.readers[tensor]
                if readers & left and (facts.maker[tensor] or readers) & done:
                    tensors |= 1 << tensor
                    if readers & left & ~self.unfusable:
                        to_read |= 1 << tensor
            found = self._handed[done] = Handed(tensors, to_read)
        return found

    # -- sequences ------------------------------------------------------------------------

    def steps_of(self, groups: Sequence[int]) -> list[int]:
        """The groups of a legal plan and the unfusable operators in an order as they can run."""
        steps = [*groups, *(1 << i for i in bits(self.unfusable))]
        order = topological_order(steps, self.graph)
        assert order is not None, "the groups of a legal plan have an order"
        return [steps[k] for k in order]

    def lives(self, masks: Sequence[int], residents: int) -> dict[int, Life]:
        """From which to which step each resident is on chip.

        An input of the graph that nothing reads has no life.
        """
        step_of = {i: k for k, mask in enumerate(masks) for i in bits(mask)}
        found = {}
        for tensor in bits(residents):
            steps = [
                step_of[i] for i in bits(self.facts.readers[tensor] | self.facts.maker[tensor])
            ]
            if steps:
                found[tensor] = Life(min(steps), max(steps))
        return found

    def stated(self, residents: Sequence[Resident]) -> dict[int, Life]:
        """The lives that a plan states, by tensor number.

        Raises:
            PlanError: for a tensor that the graph has not, or that is listed twice.
        """
        found: dict[int, Life] = {}
        for name, first, last in ((r.tensor, r.first, r.last) for r in residents):
            tensor = self.facts.number.get(name)
            if tensor is None:
                raise PlanError(f"the plan keeps {name!r} on chip, which its graph has not")
            if tensor in found:
                raise PlanError(f"the plan lists {name!r} twice among what stays on chip")
            found[tensor] = Life(first, last)
        return found

    def beside(self, masks: Sequence[int], lives: Mapping[int, Life]) -> list[tuple[Beside, int]]:
        """What is resident at each step, and the mask of what was before it."""
        size = self.facts.size
        found = []
        for k, mask in enumerate(masks):
            touches = self.facts.touching(mask)
            alive = [t for t, life in lives.items() if life.first <= k <= life.last]
            touched = sum(1 << t for t in alive if touches >> t & 1)
            staying = sum(1 << t for t in alive if touched >> t & 1 and lives[t].last > k)
            known = sum(1 << t for t in alive if touched >> t & 1 and lives[t].first < k)
            others = sum(size[t] for t in alive if not touches >> t & 1)
            found.append((Beside(touched, staying, others), known))
        return found

    def priced(
        self, masks: Sequence[int], lives: Mapping[int, Life], free: bool = True
    ) -> list[Step | None]:
        """The steps with their prices; ``None`` for one that does not fit.

        Args:
            lives: of the tensors that are resident.
            free: whether others may be resident in one step alone.
        """
        found: list[Step | None] = []
        for mask, (beside, known) in zip(masks, self.beside(masks, lives), strict=True):
            if mask & self.unfusable:
                found.append(self.scheme.unfusable_step(mask))
            else:
                beside = replace(beside, free=free and self.residency)
                found.append(self.scheme.step(mask, beside, known, self.buffer_bytes))
        return found
