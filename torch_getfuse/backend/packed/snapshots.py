"""What was made from tensors, used again only while these hold the very same bits.

A tensor's identity and version do not show writes through ``.data``, a NumPy array, or shared
memory, so the content itself is compared: every byte, at every use.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

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


class Maker(Protocol):
    """Makes something from tensors; several may share what they make.

    Attributes:
        labels: of the tensors, in order: makers that give a tensor the same label mean the same.
    """

    labels: Sequence[Hashable]

    def make(self, values: Sequence[Tensor], shared: dict[Hashable, Any]) -> Any:
        """What tensors make.

        Args:
            values: copies of the tensors, so that what is made is of one piece with what is
                compared even where somebody writes to them meanwhile.
            shared: parts that were made from the same copies, of this maker or of others; takes
                new ones.
        """


class Kept:
    """What was made from tensors, for each of a few sets of them; safe for several threads.

    All makers see one copy of each tensor. Once it is found to be another tensor's, every part
    that was made of the set goes.

    Args:
        guarded: whether the caller sees to it that shapes, layouts and types never change.
        frozen: whether constants of the graph never change.

    Attributes:
        frozen: as given.
        constants: what was made of frozen constants, for all programs of the graph.
    """

    def __init__(self, guarded: bool, frozen: bool) -> None:
        self.frozen = frozen
        self.constants: dict[Hashable, Any] = {}
        self._guarded = guarded
        self._sets: tuple[_Set, ...] = ()
        self._lock = threading.Lock()

    def get(self, maker: Maker, key: Tensor, contents: Sequence[Tensor]) -> Any:
        """What a maker makes of ``contents``; the object ``key`` only tells where to look."""
        for found in self._sets:
            if found.key() is key:
                known = found.made.get(maker)
                if known is not None and self._hold(known[0], contents):
                    return known[1]
        with self._lock:
            return self._make(maker, key, contents)

    def _make(self, maker: Maker, key: Tensor, contents: Sequence[Tensor]) -> Any:
        others = [each for each in self._sets if each.key() is not None]
        found = next((each for each in others if each.key() is key), None)
        if found is not None:
            others.remove(found)
            copied = [
                (found.snapshots[label], tensor)
                for label, tensor in zip(maker.labels, contents, strict=True)
                if label in found.snapshots
            ]
            if not all(self._hold([snapshot], [tensor]) for snapshot, tensor in copied):
                found = None
        if found is None:
            found = _Set(key)
        for label, tensor in zip(maker.labels, contents, strict=True):
            if label not in found.snapshots:
                found.snapshots[label] = Snapshot(tensor)
        snapshots = [found.snapshots[label] for label in maker.labels]
        made = maker.make([snapshot.value for snapshot in snapshots], found.shared)
        found.made[maker] = snapshots, made
        self._sets = (found, *others[: _KEPT - 1])
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


class _Set:
    """Copies of one set of tensors by label, parts made of them, and what each maker made."""

    def __init__(self, key: Tensor) -> None:
        self.key = weakref.ref(key)
        self.snapshots: dict[Hashable, Snapshot] = {}
        self.shared: dict[Hashable, Any] = {}
        # Of makers that are still used.
        self.made: weakref.WeakKeyDictionary[Maker, tuple[list[Snapshot], Any]] = (
            weakref.WeakKeyDictionary()
        )
