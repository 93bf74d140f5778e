"""The tensors that capture finds: where their batch is, and which axis runs along their rows."""

from __future__ import annotations

from torch_getfuse.backend.capture.graph_values import Base, Feature
from torch_getfuse.backend.rules.rule import Spec, TensorInfo
from torch_getfuse.backend.rules.view_windows import Along
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
        stream: int | None,
        op: int | None,
        bits: int | None = None,
    ) -> int:
        """A tensor more, and its number.

        Args:
            batch: axis that the batch is in, and the product of the sizes inside of it there.
            stream: axis whose positions are rows.
            op: number of the operator that writes it.
            bits: of an element where it is stored; ``None`` for those of its dtype.
        """
        shape = list(info.shape)
        if batch is not None:
            shape[batch[0]] //= self.batch
        if stream is None:
            stream = Tensor.default_axis(shape)
        elif not 0 < stream < len(shape) or (len(shape) == 4 and stream == 3):
            stream = None
        bits = 8 * info.dtype.itemsize if bits is None else bits
        self._bases.append(Base(info, batch, Tensor("", tuple(shape), stream, bits), op))
        return len(self._bases) - 1

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

    def stream_of(self, spec: Spec, info: TensorInfo) -> int | None:
        """The axis of the output that runs along the rows of an operand."""
        if spec.stream_axis is not None:
            return spec.stream_axis
        rank = len(info.shape)
        rows = {id(r): self._bases[r.operand.value.base].tensor.rows for r in spec.reads}
        for reading in sorted(spec.reads, key=lambda r: -rows[id(r)]):
            feature: Feature = reading.operand.value
            source = self._bases[feature.base].tensor
            hits = [] if source.stream_axis is None else feature.layout.find(source.stream_axis)
            if len(hits) != 1:
                continue
            axis: int | None = hits[0][0]
            if reading.accesses is not None:
                access = reading.accesses[hits[0][0]]
                axis = access.axis if isinstance(access, Along) else None
            elif reading.operand.shape != info.shape:
                axis = None
            if axis is not None and 0 < axis < rank and (rank, axis) != (4, 3):
                return axis
        return None
