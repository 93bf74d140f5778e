"""What a depth-first run counted, beside what the plan said: bytes over the border, ring bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate


@dataclass
class Counts:
    """Elements, counted as they move, of all samples of a run.

    Attributes:
        read: loaded from tensors outside the group.
        written: written to tensors that are needed outside the group.
        rings: allocated as rings.
        beside: most that was held beside the rings by operators that are computed whole.
        samples: samples run.
    """

    read: int = 0
    written: int = 0
    rings: int = 0
    beside: int = 0
    samples: int = 0


@dataclass
class GroupLedger:
    """One fusion group: the plan's figures and those counted, in bytes per sample.

    Bytes are elements times the plan's ``activation_bytes``, whatever the dtype of the run.

    Attributes:
        name: ``fusion_group_<k>``.
        ops: its operators.
        planned_read_bytes, planned_write_bytes, planned_ring_bytes: the plan's.
        weight_bytes: the plan's; weights are read where they lie, and not counted.
        counted_read_bytes, counted_write_bytes, counted_ring_bytes: ``None`` for a group that
            did not run depth-first.
        beside_bytes: held beside the rings by operators that are computed whole.
        whole: those operators.
        fallback: why the group ran as its FX nodes; ``""`` for one that ran depth-first.
    """

    name: str
    ops: tuple[str, ...]
    planned_read_bytes: int
    planned_write_bytes: int
    planned_ring_bytes: int
    weight_bytes: int
    counted_read_bytes: int | None = None
    counted_write_bytes: int | None = None
    counted_ring_bytes: int | None = None
    beside_bytes: int = 0
    whole: tuple[str, ...] = ()
    fallback: str = ""

    def count(self, counts: Counts, activation_bytes: int) -> None:
        """Enter what a run counted, per sample.

        Raises:
            RuntimeError: where the samples of a batch did not all move the same.
        """
        samples = counts.samples
        if counts.read % samples or counts.written % samples:
            raise RuntimeError(f"{self.name}: its {samples} samples moved different bytes")
        self.counted_read_bytes = counts.read // samples * activation_bytes
        self.counted_write_bytes = counts.written // samples * activation_bytes
        self.counted_ring_bytes = counts.rings * activation_bytes
        self.beside_bytes = counts.beside * activation_bytes

    def fall_back(self, reason: str) -> None:
        """The group runs as its FX nodes, so nothing is counted."""
        self.fallback = reason
        self.counted_read_bytes = self.counted_write_bytes = self.counted_ring_bytes = None
        self.beside_bytes, self.whole = 0, ()

    @property
    def agrees(self) -> bool:
        """Whether it ran by rows and all three counts are the plan's, to the byte."""
        planned = self.planned_read_bytes, self.planned_write_bytes, self.planned_ring_bytes
        counted = self.counted_read_bytes, self.counted_write_bytes, self.counted_ring_bytes
        return planned == counted

    def to_dict(self) -> dict[str, Any]:
        """Every attribute, and ``agrees``."""
        return {
            "name": self.name,
            "ops": list(self.ops),
            "planned_read_bytes": self.planned_read_bytes,
            "counted_read_bytes": self.counted_read_bytes,
            "planned_write_bytes": self.planned_write_bytes,
            "counted_write_bytes": self.counted_write_bytes,
            "planned_ring_bytes": self.planned_ring_bytes,
            "counted_ring_bytes": self.counted_ring_bytes,
            "weight_bytes": self.weight_bytes,
            "beside_bytes": self.beside_bytes,
            "whole": list(self.whole),
            "fallback": self.fallback,
            "agrees": self.agrees,
        }


@dataclass
class Ledger:
    """What a run of a plan counted; printing it gives a table.

    Attributes:
        groups: in the plan's order.
        activation_bytes: the plan's width of an element.
        samples: the batch; every figure is per sample.
        unfusable: operators outside the groups, which ran as their FX nodes and are not counted.
    """

    groups: list[GroupLedger] = field(default_factory=list)
    activation_bytes: int = 1
    samples: int = 1
    unfusable: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether there are groups, and each ran depth-first and counted what the plan says."""
        return bool(self.groups) and all(group.agrees for group in self.groups)

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
        rows = sum(not group.fallback for group in self.groups)
        found = [f"inner depth_first: {rows} of {len(self.groups)} groups run row by row"]
        found += [f"{g.name} runs as its FX nodes: {g.fallback}" for g in self.groups if g.fallback]
        found += [
            f"{g.name} computes whole maps of {', '.join(g.whole)} beside its rings"
            for g in self.groups
            if g.whole
        ]
        return found

    def __str__(self) -> str:
        head = ["group", "operators"]
        head += [f"{what}\n{who}" for what in ("read", "write", "ring") for who in _WHO]
        head += ["weights", ""]
        rows = [
            [
                group.name,
                len(group.ops),
                group.planned_read_bytes,
                group.counted_read_bytes,
                group.planned_write_bytes,
                group.counted_write_bytes,
                group.planned_ring_bytes,
                group.counted_ring_bytes,
                group.weight_bytes,
                "equal" if group.agrees else "not run by rows" if group.fallback else "DIFFERS",
            ]
            for group in self.groups
        ]
        table = tabulate(rows, head, missingval="-")
        lines = [f"bytes per sample, elements of {self.activation_bytes} B", table]
        lines += [f"{g.name} ran as FX nodes: {g.fallback}" for g in self.groups if g.fallback]
        lines += [
            f"{g.name}: computed whole, {g.beside_bytes} B beside the rings: {', '.join(g.whole)}"
            for g in self.groups
            if g.whole
        ]
        if self.unfusable:
            lines.append(f"unfusable, not counted: {', '.join(self.unfusable)}")
        return "\n".join(lines)


_WHO = ("planned", "counted")
