"""What was made from tensors, used again only while these hold the very same bits.

A tensor's identity and version do not show writes through ``.data``, a NumPy array, or shared
memory, so the content itself is compared: every byte, at every use.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

_KEPT = 4
"""Things kept per place: instances of one class that take turns."""

# Bits, not values: NaN equals itself, and -0.0 is not 0.0. Far faster than torch.equal.
_differ: Callable[[int, int, int], int] = ctypes.CDLL(
    "ucrtbase" if sys.platform == "win32" else None
).memcmp
_differ.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]  # type: ignore[attr-defined]
_differ.restype = ctypes.c_int  # type: ignore[attr-defined]


class Snapshot:
    """A copy of a tensor, to see whether another one holds the same.

    Attributes:
        value: the copy, in the layout of the tensor if that is dense.
        dense: whether it has neither gaps nor overlaps.
        address, bytes: of the copy.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.value = tensor.detach().clone(memory_format=torch.preserve_format)
        self.dense = self.value.stride() == tensor.stride()
        if not self.dense:
            self.value = self.value.contiguous()
        self._form = _form(tensor)
        self.address, self.bytes = self.value.data_ptr(), self.value.nbytes

    def has_form(self, tensor: Tensor) -> bool:
        """Whether a tensor has the same shape, layout and type."""
        return _form(tensor) == self._form


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.is_neg()


Made = TypeVar("Made")


class Kept(Generic[Made]):
    """What was made from tensors, one for each of a few sets of them; safe for several threads.

    Args:
        make: makes it from copies of the tensors, so that it is of one piece with what is compared
            even where somebody writes to them meanwhile.
        guarded: whether the caller sees to it that shapes, layouts and types never change.
    """

    def __init__(self, make: Callable[[Sequence[Tensor]], Made], guarded: bool) -> None:
        self._make = make
        self._guarded = guarded
        self._entries: tuple[tuple[weakref.ref[Tensor], list[Snapshot], Made], ...] = ()

    def get(self, key: Tensor, contents: Sequence[Tensor]) -> Made:
        """What ``contents`` make; the object ``key`` only tells where to look for it."""
        for ref, snapshots, made in self._entries:
            if ref() is key and self._hold(snapshots, contents):
                return made
        snapshots = [Snapshot(tensor) for tensor in contents]
        made = self._make([snapshot.value for snapshot in snapshots])
        others = [
            entry
            for entry in self._entries
            if (other := entry[0]()) is not None and other is not key
        ]
        self._entries = ((weakref.ref(key), snapshots, made), *others[: _KEPT - 1])
        return made

    def _hold(self, snapshots: Sequence[Snapshot], contents: Sequence[Tensor]) -> bool:
        """Whether tensors still have the bits of which snapshots were taken."""
        if not self._guarded and not all(map(Snapshot.has_form, snapshots, contents)):
            return False
        for snapshot, tensor in zip(snapshots, contents, strict=True):
            # An alias of its own keeps the memory while it is read, whatever other threads do.
            held = tensor.detach() if snapshot.dense else tensor.detach().contiguous()
            size = snapshot.bytes
            if held.nbytes != size or _differ(held.data_ptr(), snapshot.address, size):
                return False
        return True
