"""What a depth-first run counted, beside what the plan said: bytes over the border, ring bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch_getfuse.accelerator import format_size
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.cascade.way import UNFUSABLE
from torch_getfuse.reporting import notebook
from torch_getfuse.reporting.export import Style, counted
from torch_getfuse.reporting.notebook_style import as_card
from torch_getfuse.reporting.printed import Printed
from torch_getfuse.terminal import Mark, Marked
from torch_getfuse.widths import Width


@dataclass
class Counts:
    """What a run of all samples moved and held, counted as it happens.

    Attributes:
        read: elements loaded from tensors outside the group, by tensor.
        written: elements written to tensors that are needed outside the group, by tensor.
        rings: elements allocated as rings, under the last tensor of each.
        residents: elements on chip in stores, touched or not, of one sample, by tensor.
        beside: most bytes that were held beside the rings by operators that are computed whole.
        weight_bytes: of weights, each time they are fetched, in bytes.
        samples: samples run.
    """

    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    rings: Counter[str] = field(default_factory=Counter)
    residents: Counter[str] = field(default_factory=Counter)
    beside: int = 0
    weight_bytes: int = 0
    samples: int = 0


@dataclass
class GroupLedger:
    """One fusion group: the plan's figures and those counted, in bytes per sample.

    Bytes are rows times the bytes of a row of their tensor as the plan stores it, for weights its
    ``weight_bytes``, whatever the dtype of the run.

    Attributes:
        name: ``fusion_group_<k>``.
        ops: its operators.
        planned_read_bytes, planned_write_bytes, planned_ring_bytes: the plan's.
        weight_bytes: the plan's, of all fetches.
        way: how it runs, as a step of a cascade plan; ``""`` under other schemes.
        planned_resident_bytes: the plan's, of all tensors that are on chip beside the rings.
        counted_read_bytes, counted_write_bytes, counted_ring_bytes, counted_weight_bytes,
            counted_resident_bytes: ``None`` for a group that did not run depth-first.
        beside_bytes: held beside the rings by operators that are computed whole.
        whole: those operators.
        unseen: operators whose weights could not be counted where they are taken: each fetch
            counts as the plan's.
        copied: resident tensors that were in memory as well, since what reads or makes them does
            not run by rows; that is not counted.
        fallback: why the group ran as its FX nodes; ``""`` for one that ran depth-first.
    """

    name: str
    ops: tuple[str, ...]
    planned_read_bytes: int
    planned_write_bytes: int
    planned_ring_bytes: int
    weight_bytes: int
    way: str = ""
    planned_resident_bytes: int = 0
    counted_read_bytes: int | None = None
    counted_write_bytes: int | None = None
    counted_ring_bytes: int | None = None
    counted_weight_bytes: int | None = None
    counted_resident_bytes: int | None = None
    beside_bytes: int = 0
    whole: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    fallback: str = ""

    def count(self, counts: Counts, graph: OpGraph) -> None:
        """Enter what a run counted, per sample.

        Args:
            graph: the plan's, which says how its tensors are stored.

        Raises:
            RuntimeError: where the samples of a batch did not all move the same, or some moved
                parts of rows.
        """
        samples = counts.samples
        if counts.weight_bytes % samples:
            raise RuntimeError(f"{self.name}: its {samples} samples moved different bytes")
        self.counted_read_bytes = self._bytes(counts.read, graph, samples)
        self.counted_write_bytes = self._bytes(counts.written, graph, samples)
        self.counted_ring_bytes = self._bytes(counts.rings, graph)
        self.counted_weight_bytes = counts.weight_bytes // samples
        self.counted_resident_bytes = self._bytes(counts.residents, graph)
        self.beside_bytes = counts.beside

    def _bytes(self, elements: Mapping[str, int], graph: OpGraph, samples: int = 1) -> int:
        """Bytes of the rows that elements of tensors make up."""
        total = 0
        for name, count in elements.items():
            tensor = graph.tensors[name]
            rows, rest = divmod(count, samples * (tensor.elements // tensor.rows))
            if rest:
                raise RuntimeError(
                    f"{self.name}: {count} elements of {name!r} in {samples} samples are no equal "
                    "number of rows in each"
                )
            total += rows * graph.row_bytes[name]
        return total

    def fall_back(self, reason: str, copied: Iterable[str] = ()) -> None:
        """The group runs as its FX nodes, so nothing is counted.

        Args:
            copied: resident tensors that it reads or makes.
        """
        self.fallback = reason
        self.copied = tuple(copied)
        self.counted_read_bytes = self.counted_write_bytes = self.counted_ring_bytes = None
        self.counted_weight_bytes = self.counted_resident_bytes = None
        self.beside_bytes, self.whole, self.unseen = 0, (), ()

    @property
    def agrees(self) -> bool:
        """Whether it ran by rows, all counts are the plan's, to the byte, and nothing is copied."""
        return self.counts_agree and not self.copied

    @property
    def counts_agree(self) -> bool:
        """Whether it ran by rows and all counts are the plan's, whatever is copied beside."""
        return all(planned == counted for planned, counted in self.figures())

    def figures(self) -> list[tuple[int, int | None]]:
        """Planned and counted: read, written, in rings, weights, resident."""
        return [
            (self.planned_read_bytes, self.counted_read_bytes),
            (self.planned_write_bytes, self.counted_write_bytes),
            (self.planned_ring_bytes, self.counted_ring_bytes),
            (self.weight_bytes, self.counted_weight_bytes),
            (self.planned_resident_bytes, self.counted_resident_bytes),
        ]

    @property
    def standing(self) -> str:
        """In words, how the counts stand to the plan's."""
        if self.agrees:
            return "equal"
        if self.way == UNFUSABLE:
            return "not counted"
        if self.fallback:
            return "not run by rows"
        return "equal but for copies" if self.counts_agree else "DIFFERS"

    def to_dict(self) -> dict[str, Any]:
        """Every attribute, and ``agrees``."""
        return {
            "name": self.name,
            "ops": list(self.ops),
            "way": self.way,
            "planned_read_bytes": self.planned_read_bytes,
            "counted_read_bytes": self.counted_read_bytes,
            "planned_write_bytes": self.planned_write_bytes,
            "counted_write_bytes": self.counted_write_bytes,
            "planned_ring_bytes": self.planned_ring_bytes,
            "counted_ring_bytes": self.counted_ring_bytes,
            "weight_bytes": self.weight_bytes,
            "counted_weight_bytes": self.counted_weight_bytes,
            "planned_resident_bytes": self.planned_resident_bytes,
            "counted_resident_bytes": self.counted_resident_bytes,
            "beside_bytes": self.beside_bytes,
            "whole": list(self.whole),
            "unseen": list(self.unseen),
            "copied": list(self.copied),
            "fallback": self.fallback,
            "agrees": self.agrees,
        }


@dataclass
class Ledger(Printed):
    """What a run of a plan counted; printing it gives a table.

    Attributes:
        groups: in the plan's order.
        activation_bytes: the plan's width of an element; ``None``: tensors as stored.
        samples: the batch; every figure is per sample.
        unfusable: operators that ran as their FX nodes and are not counted: outside the groups, or
            steps of their own.
    """

    groups: list[GroupLedger] = field(default_factory=list)
    activation_bytes: Width | None = 1
    samples: int = 1
    unfusable: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether there are groups, and each ran depth-first and counted what the plan says.

        Not asked of unfusable operators.
        """
        fusable = self._fusable()
        return bool(fusable) and all(group.agrees for group in fusable)

    def _fusable(self) -> list[GroupLedger]:
        return [group for group in self.groups if group.way != UNFUSABLE]

    def to_dict(self) -> dict[str, Any]:
        """The form of ``--json``: the attributes, ``agrees``, and one object per group."""
        return {
            "agrees": self.agrees,
            "activation_bytes": self.activation_bytes,
            "samples": self.samples,
            "unfusable": list(self.unfusable),
            "groups": [group.to_dict() for group in self.groups],
        }

    def notes(self) -> list[str]:
        """What a reader of a report must know of how the groups run."""
        groups = self._fusable()
        rows = sum(not group.fallback for group in groups)
        found = [f"inner depth_first: {rows} of {len(groups)} groups run row by row"]
        found += [f"{g.name} runs as its FX nodes: {g.fallback}" for g in groups if g.fallback]
        found += [
            f"{g.name} computes whole maps of {', '.join(g.whole)} beside its rings"
            for g in groups
            if g.whole
        ]
        found += [
            f"{g.name} has {', '.join(g.copied)} in memory as well as on chip"
            for g in groups
            if g.copied
        ]
        return found

    def __repr__(self) -> str:
        groups = self._fusable()
        agree = sum(group.agrees for group in groups)
        told = "equal to the plan" if self.agrees else f"{agree} equal to the plan"
        samples = f", {self.samples} samples" if self.samples > 1 else ""
        return f"Ledger({counted(len(groups), 'group')}, {told}{samples})"

    def _repr_html_(self) -> str:
        def parts(style: Style) -> list[str]:
            return [style.heading("Bytes per sample of each group"), *self.parts(style)]

        return as_card(repr(self), parts, len(self.groups) <= notebook.SHORT)

    def render(self, style: Style) -> str:
        """The ledger in a text format."""
        return "\n".join(self.parts(style))

    def parts(self, style: Style) -> list[str]:
        """A table of planned sizes, beside them what was counted if another; and remarks."""
        ways = any(group.way for group in self.groups)
        titles = ("read", "write", "lines", "weights", "resident")[: 5 if ways else 4]
        head = ("group", *(["way"] if ways else []), "ops", *titles, "counted")
        rows = [
            [
                group.name,
                *([group.way] if ways else []),
                str(len(group.ops)),
                *(_pair(*figures) for figures in group.figures()[: len(titles)]),
                group.standing if group.agrees else Marked(group.standing, Mark.OVER),
            ]
            for group in self.groups
        ]
        stored = "tensors as stored"
        if self.activation_bytes is not None:
            stored = f"elements of {self.activation_bytes} B"
        told = (
            f"per sample, {stored}: as planned, and bytes as counted where those differ by any; "
            "lines and weights fill the buffer"
        )
        align = "ll"[: 1 + ways] + "r" * (1 + len(titles)) + "l"
        table = style.table(rows, head, align, (0, len(align) - 1))
        return [style.paragraph(told), table, *map(style.paragraph, self._remarks())]

    def _remarks(self) -> list[str]:
        """What the table does not say of its groups, a line each."""
        groups = self._fusable()
        lines = [f"{g.name} ran as FX nodes: {g.fallback}" for g in groups if g.fallback]
        lines += [
            f"{g.name}: computed whole, {g.beside_bytes} B beside the rings: {', '.join(g.whole)}"
            for g in groups
            if g.whole
        ]
        lines += [
            f"{g.name}: weights counted as the plan's: {', '.join(g.unseen)}"
            for g in groups
            if g.unseen
        ]
        lines += [
            f"{g.name}: in memory as well as on chip, not counted: {', '.join(g.copied)}"
            for g in groups
            if g.copied
        ]
        if self.unfusable:
            lines.append(f"unfusable, not counted: {', '.join(self.unfusable)}")
        return lines


def _pair(planned: int, counted: int | None) -> str:
    """What was planned; to the byte, beside what was counted, where that is known and another."""
    if counted in (None, planned):
        return format_size(planned)
    return f"{planned} B / {counted} B"
