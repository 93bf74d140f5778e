"""The components of an explanation: edges, blame, parts, the cut. Edges are given by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch_getfuse.accelerator import format_size
from torch_getfuse.partition.cost.scheme import CostTerm, Dram
from torch_getfuse.reporting.export import counted

_WEIGHTS = {
    "weights": "weights",
    "staging": "staging of streamed weights",
    "slice": "a slice of the weights",
}
"""Kinds of terms that are no part of a map, in words."""

_UNITS = {
    "lines": ("row", ""),
    "pixels": ("pixel", ""),
    "full": ("row", ", all channels"),
    "partial": ("row", ", some channels"),
    "input": ("row", ", read from DRAM"),
}
"""Kinds of terms that are units of a map: the unit, and which channels of it are held."""


@dataclass(frozen=True, slots=True)
class GroupEdge:
    """An edge inside the group, and its tensor.

    Attributes:
        producer, consumer: names of operators.
        tensor: the tensor that the producer writes and the consumer reads.
        shape: shape of the tensor, without the batch axis.
        tensor_bytes: size of the whole tensor, which a cut here writes to DRAM and reads again.
        held_bytes: part of it that the group holds on chip; 0 if it has no buffer of its own.
    """

    producer: str
    consumer: str
    tensor: str
    shape: tuple[int, ...]
    tensor_bytes: int
    held_bytes: int

    def __str__(self) -> str:
        return f"{self.producer} -> {self.consumer}"

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values; sizes are integer bytes."""
        return {
            "producer": self.producer,
            "consumer": self.consumer,
            "tensor": self.tensor,
            "shape": list(self.shape),
            "tensor_bytes": self.tensor_bytes,
            "held_bytes": self.held_bytes,
        }


@dataclass(frozen=True, slots=True)
class Blame:
    """The result of one explainer.

    Attributes:
        explainer: its name.
        edges: (position in ``Explanation.edges``, score), best first; the best edge of the group
            scores 1, the least would score 0.
        seconds: time of the explanation, without loading the explainer.
        parts: number of groups after cutting at these edges alone; ``None`` if one of them is
            invalid.
        dram_bytes: ``F_D`` sum of these groups; ``None`` if ``parts`` is.
    """

    explainer: str
    edges: tuple[tuple[int, float], ...]
    seconds: float
    parts: int | None
    dram_bytes: int | None

    def to_dict(self, edges: Sequence[GroupEdge]) -> dict[str, Any]:
        """Plain Python values; ``edges`` are the explanation's."""
        return {
            "explainer": self.explainer,
            "seconds": self.seconds,
            "edges": [{**edges[k].to_dict(), "score": score} for k, score in self.edges],
            "parts": self.parts,
            "dram_bytes": self.dram_bytes,
        }


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the cut group.

    Attributes:
        operators: names, in topological order.
        buffer_bytes: its ``F_b``; ``None`` if the scheme has no schedule for it.
        fits: whether it is a valid group; ``False`` only for an unfusable operator.
        dram: its DRAM access, in bytes per sample.
    """

    operators: tuple[str, ...]
    buffer_bytes: int | None
    fits: bool
    dram: Dram

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values; sizes are integer bytes."""
        return {
            "operators": list(self.operators),
            "fits": self.fits,
            "buffer_bytes": self.buffer_bytes,
            **dram_dict(self.dram),
        }


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the recursive split cuts the group.

    Attributes:
        by: explainer that gave the edges, or ``"random"`` if none of them leads to a cut.
        parts: the parts, in an executable order.
        edges: positions in ``Explanation.edges`` of the edges between two parts.
        crossing: the tensors of these edges and their sizes in bytes, each once.
    """

    by: str
    parts: tuple[Part, ...]
    edges: tuple[int, ...]
    crossing: Mapping[str, int]

    @property
    def dram(self) -> Dram:
        """DRAM access of all parts together, in bytes per sample."""
        return Dram(*(sum(column) for column in zip(*(p.dram for p in self.parts), strict=True)))

    def to_dict(self, edges: Sequence[GroupEdge]) -> dict[str, Any]:
        """Plain Python values; ``edges`` are the explanation's."""
        return {
            "by": self.by,
            "edges": [edges[k].to_dict() for k in self.edges],
            "crossing": [{"tensor": name, "bytes": size} for name, size in self.crossing.items()],
            "parts": [part.to_dict() for part in self.parts],
            **dram_dict(self.dram),
        }


def dram_dict(dram: Dram) -> dict[str, int]:
    """DRAM access in bytes, under the keys of the data formats."""
    return {
        "dram_read_bytes": dram.read,
        "dram_write_bytes": dram.write,
        "dram_weight_bytes": dram.weight,
        "dram_bytes": dram.total,
    }


def term_text(term: CostTerm) -> str:
    """A term of a group's buffer in words."""
    if term.kind in _WEIGHTS:
        return f"{_WEIGHTS[term.kind]} of {term.name}"
    if term.kind == "resident":
        return f"{term.name}, on chip between steps"
    if term.kind not in _UNITS:
        return f"{term.kind} {term.name}"  # a cost model's own word
    unit, channels = _UNITS[term.kind]
    each = format_size(term.unit_bytes)
    return f"{counted(term.units, unit)} of {term.name}, {each} each{channels}"
