"""Line buffers: a ring holds the last rows of a tensor, exactly as many as the cost model says.

A slot holds one unit. The rows lie one after the other, so that a window over them is no copy:
when the last slot is full, the rows move up and the oldest go. Tensors that are written in place
over each other share a ring; every slot is labelled with the unit that it holds, and reading any
other raises. A ring of as many rows as the tensor has is a store: nothing in it ever moves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from torch_getfuse.ir import Tensor


class Part(NamedTuple):
    """A slice of a tensor: ``size`` positions along an axis, from ``start`` on."""

    axis: int
    start: int
    size: int

    def of(self, block: torch.Tensor) -> torch.Tensor:
        """The part of a block, where it lies."""
        return block.narrow(self.axis, self.start, self.size)


class Ring:
    """The storage of one tensor, or of several that are written over each other.

    Args:
        rows: slots; never more.
        unit_elements: elements of a unit.
        itemsize: bytes of an element, of the widest tensor that it holds.
    """

    def __init__(self, rows: int, unit_elements: int, itemsize: int) -> None:
        self.rows = rows
        self.unit_elements = unit_elements
        self.itemsize = itemsize
        self.slots = torch.empty(rows, unit_elements * itemsize, dtype=torch.uint8)
        self.clear()

    @property
    def elements(self) -> int:
        """Room that it has."""
        return self.rows * self.unit_elements

    def widen(self, itemsize: int) -> None:
        """Make room for tensors of wider elements in the same slots; what is held stays."""
        if itemsize > self.itemsize:
            held, self.itemsize = self.slots, itemsize
            self.slots = torch.empty(self.rows, self.unit_elements * itemsize, dtype=torch.uint8)
            self.slots[:, : held.shape[1]].copy_(held)

    def clear(self) -> None:
        """Forget what is held, for the next sample."""
        self._base = 0
        self._labels: list[tuple[str, int] | None] = [None] * self.rows

    def copy(self) -> Ring:
        """Another ring that holds the same."""
        found = Ring(self.rows, self.unit_elements, self.itemsize)
        found.slots.copy_(self.slots)
        found._base, found._labels = self._base, list(self._labels)
        return found

    def find(self, name: str, first: int, end: int) -> int:
        """The slot of unit ``first``; raises where units ``[first, end)`` are not all held."""
        for unit in range(first, end):
            slot = unit - self._base
            held = self._labels[slot] if 0 <= slot < self.rows else None
            if held != (name, unit):
                raise RuntimeError(
                    f"depth-first: row {unit} of {name!r} is not in its ring of {self.rows} rows; "
                    f"its place holds {held}. This is an error of torch_getfuse: please report it"
                )
        return first - self._base

    def label(self, name: str, first: int, end: int) -> int:
        """The slot of unit ``first`` of units ``[first, end)`` that are about to be written."""
        if first < self._base:
            raise RuntimeError(
                f"depth-first: row {first} of {name!r} comes after its ring of {self.rows} rows "
                f"has moved on to row {self._base}. This is an error of torch_getfuse: please "
                "report it"
            )
        if (gone := end - self._base - self.rows) > 0:
            for slot in range(gone, self.rows):
                self.slots[slot - gone].copy_(self.slots[slot])
            self._labels = [*self._labels[gone:], *[None] * min(gone, self.rows)]
            self._base += gone
        if first < self._base:
            raise RuntimeError(
                f"depth-first: {end - first} rows of {name!r} do not fit into its ring of "
                f"{self.rows} rows. This is an error of torch_getfuse: please report it"
            )
        for unit in range(first, end):
            self._labels[unit - self._base] = (name, unit)
        return first - self._base


class RingView:
    """One tensor in a ring.

    Args:
        ring: where its units are.
        tensor: per sample.
        dtype: of the tensor's elements.
    """

    def __init__(self, ring: Ring, tensor: Tensor, dtype: torch.dtype) -> None:
        self.ring = ring
        self.name = tensor.name
        self.axis = tensor.stream_axis
        shape, rows = tensor.shape, ring.rows
        units = ring.slots.view(dtype)[:, : ring.unit_elements]
        if self.axis is None:
            self.data = units.view(shape)
        elif len(shape) == 4 and shape[0] == 1 and self.axis == 2:
            # A row is contiguous, and torch convolves it without a copy: channels last.
            self.data = units.view(1, rows, shape[3], shape[1]).permute(0, 3, 1, 2)
        else:
            rest = (*shape[: self.axis], *shape[self.axis + 1 :])
            self.data = units.view(rows, *rest).movedim(0, self.axis)

    def write(self, first: int, end: int, block: torch.Tensor, part: Part | None = None) -> None:
        """Put units ``[first, end)`` in their slots, or a part of each beside what they hold."""
        slot = self.ring.label(self.name, first, end)
        place = self.data if self.axis is None else self.data.narrow(self.axis, slot, end - first)
        if part is not None:
            place = part.of(place)
        if block.shape != place.shape or block.dtype != place.dtype:
            raise RuntimeError(
                f"depth-first: row {first} of {self.name!r} came as {tuple(block.shape)} "
                f"{block.dtype}, expected {tuple(place.shape)} {place.dtype}. This is an error of "
                "torch_getfuse: please report it"
            )
        place.copy_(block)

    def read(self, first: int, end: int) -> torch.Tensor:
        """Units ``[first, end)``, where they lie."""
        slot = self.ring.find(self.name, first, end)
        if self.axis is None:
            return self.data
        return self.data.narrow(self.axis, slot if end > first else 0, end - first)
