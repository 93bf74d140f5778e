"""The tensors that capture finds, and where their batch is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch_getfuse.backend.capture.graph_values import Base, Feature
from torch_getfuse.backend.rules.rule import Spec, TensorInfo
from torch_getfuse.backend.rules.view_windows import Along, Layout
from torch_getfuse.ir import Tensor


class Bases:
    """Tensors by number.

    Args:
        batch: samples in the traced inputs; shapes are divided by it.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self._bases: list[Base] = []

    def __getitem__(self, base: int) -> Base:
        return self._bases[base]

    def add(
        self,
        info: TensorInfo,
        batch: tuple[int, int] | None,
        op: int | None,
        bits: int | None = None,
    ) -> int:
        """A tensor more, and its number; its rows are found later (:mod:`streams`).

        Args:
            batch: axis that the batch is in, and the product of the sizes inside of it there.
            op: number of the operator that writes it.
            bits: of an element where it is stored; ``None`` for those of its dtype.
        """
        shape = list(info.shape)
        if batch is not None:
            shape[batch[0]] //= self.batch
        bits = 8 * info.dtype.itemsize if bits is None else bits
        tensor = replace(Tensor.of("", shape), bits=bits)
        self._bases.append(Base(info, batch, tensor, op))
        return len(self._bases) - 1

    def joint(self, infos: Sequence[TensorInfo]) -> tuple[TensorInfo, int]:
        """Several tensors that one call makes are one tensor of all their elements, whose width is
        their mean: of values and their indices (``topk``), the bytes of both.
        """
        sizes = [math.prod(info.shape) for info in infos]
        total = sum(sizes)
        whole = -(-total // self.batch) * self.batch
        bits = sum(8 * i.dtype.itemsize * n for i, n in zip(infos, sizes, strict=True))
        mean = -(-bits // total) if total else 8 * infos[0].dtype.itemsize
        return TensorInfo((self.batch, whole // self.batch), infos[0].dtype), mean

    def per_sample(self, base: int, count: int | None) -> int | None:
        """A count of what all samples need to make a tensor, for one of them.

        What makes one tensor of all samples is counted whole.
        """
        if count is None or self._bases[base].batch is None:
            return count
        return count // self.batch

    def stream(self, base: int, axis: int | None) -> None:
        """Let a tensor stream over ``axis``; where it has no such rows, over the default one."""
        old = self._bases[base]
        shape = old.tensor.shape
        if axis is None:
            axis = Tensor.default_axis(shape)
        elif not has_rows(shape, axis):
            axis = None
        self._bases[base] = replace(old, tensor=replace(old.tensor, stream_axis=axis))

    def of_one_sample(self, feature: Feature) -> Layout:
        """What a view shows of one sample."""
        batch = self._bases[feature.base].batch
        if batch is None:
            return feature.layout
        return feature.layout.without_batch(*batch, self.batch)

    def find_batch(self, feature: Feature) -> tuple[int, int] | None:
        """Axis of a view that the batch is in, and the product of the sizes inside of it."""
        batch = self._bases[feature.base].batch
        if batch is None:
            return None
        axis, inner = batch
        for place, atoms in enumerate(feature.layout.axes):
            inside = 1
            for atom in reversed(atoms):
                holds = atom.stride <= inner and inner * self.batch <= atom.stride * atom.size
                if atom.axis == axis and holds and atom.start == 0:
                    # One sample outside of these positions: an axis of one before them is its own.
                    outside = inner == atom.stride * atom.size and atom is atoms[0]
                    if outside and place and not feature.layout.axes[place - 1]:
                        return place - 1, 1
                    return place, inside * (inner // atom.stride)
                inside *= atom.size
        return None

    def batch_of(self, spec: Spec, info: TensorInfo) -> tuple[int, int] | None:
        """The batch of the output lies along the axis that runs along the operand's batch."""
        for reading in spec.reads:
            found = self.find_batch(reading.operand.value)
            if found is None:
                continue
            place, inner = found
            if reading.accesses is None:
                shape = reading.operand.shape
                if len(shape) == len(info.shape) and shape[place] == info.shape[place]:
                    return place, inner
                continue
            access = reading.accesses[place]
            if isinstance(access, Along):
                if info.shape[access.axis] == reading.operand.shape[place]:
                    return access.axis, inner
            elif access.reduce:
                return None
        return self.guess_batch(info)

    def guess_batch(self, info: TensorInfo) -> tuple[int, int] | None:
        """Where the batch is by the sizes alone."""
        if info.shape and info.shape[0] % self.batch == 0:
            return 0, info.shape[0] // self.batch
        return (info.shape.index(self.batch), 1) if self.batch in info.shape else None


def has_rows(shape: Sequence[int], axis: int) -> bool:
    """Whether a tensor can stream over an axis: not over the columns of a map, or one sample."""
    return (axis > 0 or shape[0] > 1) and (len(shape), axis) != (4, 3)
