"""What an explanation is made of: edges, blame, parts, the cut. Edges are named by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch_getfuse.partition.cost.scheme import Dram


@dataclass(frozen=True, slots=True)
class GroupEdge:
    """An edge inside the group, and what it carries.

    Attributes:
        producer, consumer: names of operators.
        tensor: what the producer writes and the consumer reads.
        shape: of the tensor, without the batch axis.
        tensor_bytes: the whole tensor: what a cut here writes to DRAM and reads again.
        held_bytes: what the group keeps of it on chip; 0 where it takes no room of its own.
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
    """What one explainer says.

    Attributes:
        explainer: its name.
        edges: (position in ``Explanation.edges``, score), best first; the explainer's best edge
            of the group scores 1, its least would score 0.
        seconds: for the explanation, without loading the explainer.
        parts: groups that the cuts of these edges alone make; ``None`` where they leave an
            invalid one.
        dram_bytes: ``F_D`` sum of these parts, ``None`` with them.
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
        buffer_bytes: its ``F_b``; ``None`` where the scheme has no schedule for it.
        fits: whether it is a valid group; ``False`` only for an unfusable operator.
        dram: what it moves, in bytes per sample.
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
    """Where the recursive split takes the group apart.

    Attributes:
        by: explainer that named the edges, or ``"random"`` where none of them leads to a cut.
        parts: in an order in which they can run.
        edges: positions in ``Explanation.edges`` of those between two parts.
        crossing: the tensors of these edges with their bytes, each once.
    """

    by: str
    parts: tuple[Part, ...]
    edges: tuple[int, ...]
    crossing: Mapping[str, int]

    @property
    def dram(self) -> Dram:
        """What the parts move together, in bytes per sample."""
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
    """DRAM access under the names of the data forms, in bytes."""
    return {
        "dram_read_bytes": dram.read,
        "dram_write_bytes": dram.write,
        "dram_weight_bytes": dram.weight,
        "dram_bytes": dram.total,
    }
