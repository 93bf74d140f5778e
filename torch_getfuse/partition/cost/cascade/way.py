"""How a step of a cascade plan runs: the records that plans keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch_getfuse.errors import GraphError
from torch_getfuse.json_fields import Fields

LINE, STRIPES, SLICES, UNFUSABLE = "line", "stripes", "slices", "unfusable"
KINDS = (LINE, STRIPES, SLICES, UNFUSABLE)


@dataclass(frozen=True, slots=True)
class Way:
    """How one step runs (docs/method.md, section 12).

    Attributes:
        kind: ``"line"`` (unit by unit, all weights held), ``"stripes"`` (operator by operator, in
            each stripe), ``"slices"`` (one operator, its weights in slices), or ``"unfusable"``
            (an operator that fits in none of them, run by some other method).
        count: stripes or slices; 1 for the others.
        weights_stay: names of the operators whose weights are held and read once; those of all
            others are read once per stripe. Empty for ``"slices"`` and ``"unfusable"``.
    """

    kind: str
    count: int = 1
    weights_stay: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The form of plan.json."""
        return {"kind": self.kind, "count": self.count, "weights_stay": list(self.weights_stay)}

    @classmethod
    def read(cls, fields: Fields) -> Way:
        """The inverse of :meth:`to_dict`; raises :class:`GraphError` for anything else."""
        kind = fields.text("kind")
        if kind not in KINDS:
            raise GraphError(f"{fields.where}.kind {ascii(kind)[:60]} is not one of {KINDS}")
        return cls(kind, fields.integer("count", 1), fields.texts("weights_stay"))

    def __str__(self) -> str:
        if self.kind in (STRIPES, SLICES):
            noun = self.kind if self.count != 1 else self.kind.removesuffix("s")
            return f"{self.count} {noun}"
        return self.kind


@dataclass(frozen=True, slots=True)
class Resident:
    """A tensor that stays on chip between steps.

    Attributes:
        tensor: its name.
        first, last: numbers of the first and the last step of its life: from the one that makes it
            (for an input of the graph: reads it first) to the last that reads it.
    """

    tensor: str
    first: int
    last: int
