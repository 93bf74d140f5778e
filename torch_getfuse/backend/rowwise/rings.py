"""Line buffers: a ring holds the last rows of a tensor, exactly as many as the cost model says.

A slot holds one unit. The rows lie one after the other, so that a window over them is no copy:
when the last slot is full, the rows move up by one and the oldest goes. Tensors that are written
in place over each other share a ring; every slot is labelled with the unit that it holds, and
reading any other raises.
"""

from __future__ import annotations

import torch

from torch_getfuse.ir import Tensor


class Ring:
    """The storage of one tensor, or of several that are written over each other.

    Args:
        rows: slots; never more.
        unit_elements: elements of a unit.
        dtype: of the elements.
    """

    def __init__(self, rows: int, unit_elements: int, dtype: torch.dtype) -> None:
        self.rows = rows
        self.storage = torch.empty(rows * unit_elements, dtype=dtype)
        self._slots = self.storage.view(rows, unit_elements)
        self.clear()

    def clear(self) -> None:
        """Forget what is held, for the next sample."""
        self._base = 0
        self._labels: list[tuple[str, int] | None] = [None] * self.rows

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

    def label(self, name: str, unit: int) -> int:
        """The slot for a unit that is about to be written."""
        while unit - self._base >= self.rows:
            for slot in range(1, self.rows):
                self._slots[slot - 1].copy_(self._slots[slot])
            self._labels = [*self._labels[1:], None]
            self._base += 1
        if unit < self._base:
            raise RuntimeError(
                f"depth-first: row {unit} of {name!r} comes after its ring of {self.rows} rows has "
                f"moved on to row {self._base}. This is an error of torch_getfuse: please report it"
            )
        self._labels[unit - self._base] = (name, unit)
        return unit - self._base


class RingView:
    """One tensor in a ring.

    Args:
        ring: where its units are.
        tensor: per sample.
    """

    def __init__(self, ring: Ring, tensor: Tensor) -> None:
        self.ring = ring
        self.name = tensor.name
        self.axis = tensor.stream_axis
        shape, rows = tensor.shape, ring.rows
        if self.axis is None:
            self.data = ring.storage.view(shape)
        elif len(shape) == 4 and shape[0] == 1 and self.axis == 2:
            # A row is contiguous, and torch convolves it without a copy: channels last.
            self.data = ring.storage.view(1, rows, shape[3], shape[1]).permute(0, 3, 1, 2)
        else:
            rest = (*shape[: self.axis], *shape[self.axis + 1 :])
            self.data = ring.storage.view(rows, *rest).movedim(0, self.axis)

    def write(self, unit: int, block: torch.Tensor) -> None:
        """Put a unit in its slot."""
        slot = self.ring.label(self.name, unit)
        place = self.data if self.axis is None else self.data.narrow(self.axis, slot, 1)
        if block.shape != place.shape or block.dtype != place.dtype:
            raise RuntimeError(
                f"depth-first: row {unit} of {self.name!r} came as {tuple(block.shape)} "
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
