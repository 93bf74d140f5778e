"""Where the curve of a sweep bends: from there on, a larger buffer saves little more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Knee:
    """The knee of one curve.

    Attributes:
        model, scheme, method: whose curve it is.
        buffer_bytes: the buffer at the knee.
        dram_bytes: DRAM access of the whole network there, per sample.
        share: of what the largest buffer saves over the smallest, the part saved by then, 0 to 1.
    """

    model: str
    scheme: str
    method: str
    buffer_bytes: int
    dram_bytes: int
    share: float

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return asdict(self)


def find_knee(points: Sequence[Mapping[str, Any]]) -> Knee | None:
    """The point furthest below the straight line between the ends of a curve.

    Kneedle (Satopää, Albrecht, Irwin and Raghavan, "Finding a Kneedle in a Haystack", ICDCSW 2011)
    for a curve that falls, without smoothing: DRAM access against the logarithm of the buffer, both
    scaled to 0..1 between the ends.

    Args:
        points: records of a sweep that differ in their buffers alone, none of them failed.

    Returns:
        ``None`` for fewer than three buffers, and for a curve that nowhere lies below that line.
    """
    curve = sorted(points, key=lambda point: int(point["buffer_bytes"]))
    if len(curve) < 3:
        return None
    first, last = curve[0], curve[-1]
    width = math.log(last["buffer_bytes"] / first["buffer_bytes"])
    height = first["dram_bytes"] - last["dram_bytes"]
    if not width or height <= 0:
        return None

    def below(point: Mapping[str, Any]) -> float:
        along = math.log(point["buffer_bytes"] / first["buffer_bytes"]) / width
        return float((first["dram_bytes"] - point["dram_bytes"]) / height - along)

    found = max(curve, key=below)
    if below(found) <= 0:
        return None
    return Knee(
        model=found["model"],
        scheme=found["scheme"],
        method=found["method"],
        buffer_bytes=int(found["buffer_bytes"]),
        dram_bytes=int(found["dram_bytes"]),
        share=(first["dram_bytes"] - found["dram_bytes"]) / height,
    )
