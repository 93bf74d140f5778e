"""Widths of elements in bytes, in steps of an eighth, and the whole bytes that elements take.

A width is a number of bytes: 4, 1, 0.5 for 4 bits, 0.125 for one; 0 for weights that cost nothing.
Sizes are always whole bytes: elements are packed, and what they fill is rounded up
(docs/method.md, "Widths and storage").
"""

from __future__ import annotations

import math

Width = int | float
"""Bytes of an element, a multiple of 1/8; an ``int`` where it is whole."""

_STEPS = 8


def as_width(value: object) -> Width | None:
    """``value`` as a width, whole numbers as ``int``; ``None`` for what is none.

    Widths are finite multiples of 1/8 that are not negative.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        return None
    if isinstance(value, int):
        return value
    if not math.isfinite(value) or not (value * _STEPS).is_integer():
        return None
    return int(value) if value.is_integer() else value


def bits_of(width: Width) -> int:
    """Bits of an element."""
    return int(width * _STEPS)


def width_of(bits: int) -> Width:
    """The width of so many bits."""
    return bits // _STEPS if bits % _STEPS == 0 else bits / _STEPS


def packed(elements: int, width: Width) -> int:
    """Whole bytes that elements take side by side."""
    return -(-elements * bits_of(width) // _STEPS)


def not_a_width(value: object, zero: bool) -> str:
    """In words, what is wrong with ``value``, for messages that begin with it.

    Args:
        zero: whether 0 would have been one.
    """
    wanted = f"a multiple of 1/8 byte {'from 0 up' if zero else 'above 0'}, as 4, 1, 0.5 (4 bits)"
    if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
        return f"is not {wanted}"
    steps = math.floor(value * _STEPS), math.ceil(value * _STEPS)
    near = [str(width_of(bits)) for bits in steps if bits or zero]
    return f"is not {wanted}; {' and '.join(near)} {'is' if len(near) == 1 else 'are'} near it"
