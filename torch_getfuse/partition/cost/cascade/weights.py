"""Which weights stay on chip while a step runs in stripes: an exact subset sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch_getfuse.partition.cost.cascade.groups import Weighted


class Staying(NamedTuple):
    """A choice of weights that stay.

    Attributes:
        held: bytes that stay.
        staging: bytes that streaming the others takes.
        ops: mask of the operators whose weights stay.
    """

    held: int
    staging: int
    ops: int


def most_staying(weighted: Sequence[Weighted], room: int) -> Staying | None:
    """The most bytes of weights that can stay, with the least staging for the others.

    Of the operators that stream, the one with the most staging decides how much of the chip the
    streams take. So for each amount of staging, those that would need more must stay, and of the
    rest a subset is chosen whose bytes come closest to what is left.

    Args:
        weighted: the weights of each operator of a step.
        room: bytes for both.

    Returns:
        ``None`` where even streaming all takes more than ``room``.
    """
    total = sum(own.size for own in weighted)
    if total <= room:
        return Staying(total, 0, sum(1 << own.op for own in weighted))
    best: Staying | None = None
    for staging in sorted({own.staging for own in weighted}):
        forced = [own for own in weighted if own.staging > staging]
        held = sum(own.size for own in forced)
        left = room - staging - held
        if left < 0 or (best is not None and held + left <= best.held):
            continue
        sizes = [own.size for own in weighted if own.staging <= staging]
        chosen = _closest(sizes, left)
        held += sum(sizes[k] for k in chosen)
        if best is None or held > best.held:
            ops = sum(1 << own.op for own in forced)
            free = [own.op for own in weighted if own.staging <= staging]
            best = Staying(held, staging, ops | sum(1 << free[k] for k in chosen))
    return best


def _closest(sizes: Sequence[int], room: int) -> list[int]:
    """Positions of sizes whose sum is the greatest that is at most ``room``.

    Bit ``s`` of an integer says whether the sum ``s`` can be reached; with each size, the integer
    is shifted and added to itself.
    """
    if not sizes:
        return []
    unit = math.gcd(*sizes)
    steps = [size // unit for size in sizes]
    most = room // unit
    within = (1 << most + 1) - 1
    reached = [1]
    for step in steps:
        reached.append((reached[-1] | reached[-1] << step) & within)
    left = reached[-1].bit_length() - 1
    chosen = []
    for k in range(len(steps) - 1, -1, -1):
        if not reached[k] >> left & 1:
            chosen.append(k)
            left -= steps[k]
    return chosen[::-1]
