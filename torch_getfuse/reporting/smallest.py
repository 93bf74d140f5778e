"""The smallest buffer whose plan reaches the floor of a network, or comes near it.

The floor is the inputs, outputs and weights of the network, each once. Points are records of a
sweep (:mod:`.sweep_result`); those with unfusable operators, whose traffic is only bounded, do not
reach it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch_getfuse.accelerator import KB, format_buffer, format_size


@dataclass(frozen=True, slots=True)
class Smallest:
    """What is known of one model under one scheme and method.

    Attributes:
        model, scheme, method: whose points they are.
        percent: how far above the floor the plan may be.
        floor_bytes: of the whole network.
        buffer_bytes: the smallest buffer known to suffice; ``None`` if none is.
        dram_bytes: DRAM access there, or in the largest buffer if none suffices.
        largest_bytes: the largest buffer of all points.
        below_bytes: the largest buffer below that does not suffice; 0 where none is known.
        proved: whether it is proved that ``below_bytes`` does not suffice.
    """

    model: str
    scheme: str
    method: str
    percent: float
    floor_bytes: int
    buffer_bytes: int | None
    dram_bytes: int
    largest_bytes: int
    below_bytes: int
    proved: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return asdict(self)

    def __str__(self) -> str:
        near = f"within {self.percent:g}% of" if self.percent else "at"
        text = f"{self.model}, {self.scheme}, {self.method}: "
        floor = f"the floor of {format_size(self.floor_bytes)}"
        if self.buffer_bytes is None:
            above = self.dram_bytes / self.floor_bytes - 1
            return (
                f"{text}no buffer {near} {floor}; {format_buffer(self.largest_bytes)} is "
                f"{above:.1%} above it"
            )
        text += f"{near} {floor} from {format_buffer(self.buffer_bytes)} up"
        if not self.below_bytes:
            return text
        how = "does not suffice (proved)" if self.proved else "does not suffice by its plan"
        return f"{text}; {format_buffer(self.below_bytes)} {how}"


def find_smallest(points: Sequence[Mapping[str, Any]], percent: float) -> Smallest:
    """The smallest buffer among points that differ in their buffers alone.

    Args:
        points: one at least, none of them failed.
        percent: how far above the floor a plan may be.
    """
    enough, below = _sides(points, percent)
    largest = max(points, key=_buffer)
    found = min(enough, key=_buffer, default=None)
    under = max(below, key=_buffer, default=None)
    return Smallest(
        model=largest["model"],
        scheme=largest["scheme"],
        method=largest["method"],
        percent=percent,
        floor_bytes=largest["floor_bytes"],
        buffer_bytes=None if found is None else _buffer(found),
        dram_bytes=(found or largest)["dram_bytes"],
        largest_bytes=_buffer(largest),
        below_bytes=0 if under is None else _buffer(under),
        proved=under is not None
        and (bool(under["unfusable"]) or not _near(under, under["lower_bound_bytes"], percent)),
    )


def next_buffer(points: Sequence[Mapping[str, Any]], percent: float) -> int | None:
    """The buffer in bytes, a whole number of KB, whose plan halves what is left to search.

    ``None`` where no point suffices, or one does and one that is smaller by a KB does not.
    """
    enough, below = _sides(points, percent)
    if not enough:
        return None
    high = -(-min(map(_buffer, enough)) // KB)
    low = max(map(_buffer, below), default=0) // KB
    return (low + high) // 2 * KB if high - low > 1 else None


def _sides(
    points: Iterable[Mapping[str, Any]], percent: float
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The points that suffice, and those below all of them that do not."""
    enough: list[Mapping[str, Any]] = []
    others: list[Mapping[str, Any]] = []
    for point in points:
        suffices = not point["unfusable"] and _near(point, point["dram_bytes"], percent)
        (enough if suffices else others).append(point)
    least = min(map(_buffer, enough), default=0)
    return enough, [point for point in others if enough and _buffer(point) < least]


def _near(point: Mapping[str, Any], dram_bytes: int, percent: float) -> bool:
    floor = int(point["floor_bytes"])
    return 100 * (dram_bytes - floor) <= percent * floor


def _buffer(point: Mapping[str, Any]) -> int:
    return int(point["buffer_bytes"])
