"""Tensors, and the operators that read them through windows and write one each.

Sizes are per sample: the batch axis has been divided out at capture, so a shape's first entry is 1
for an ordinary model (docs/method.md, section 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch_getfuse.errors import GraphError
from torch_getfuse.ir.window import Window
from torch_getfuse.json_fields import Fields


@dataclass(frozen=True, slots=True)
class Tensor:
    """A feature map, as the raster stream of units that crosses the on-chip buffer.

    Attributes:
        name: unique in its graph.
        shape: elements per axis, batch first and divided out (``(1, C, H, W)``).
        stream_axis: the axis whose positions are the rows of the stream; ``None`` for a
            tensor that is one unit. A tensor of rank 4 streams over axis 2 by default; capture
            finds the axis of any other (docs/method.md, section 2).
        bits: width of an element where it is stored, in bits; ``None``: the graph's
            ``activation_bytes``. No part of the graph's identity, as the widths of weights. Which
            tensors are written over others, and all bytes, follow from it: ask the graph
            (:attr:`OpGraph.tensor_bytes`), not ``elements``.
    """

    name: str
    shape: tuple[int, ...]
    stream_axis: int | None = None
    bits: int | None = field(default=None, compare=False)

    @staticmethod
    def default_axis(shape: Sequence[int]) -> int | None:
        """Axis 2 for ``(1, C, H, W)``; anything else is one unit unless capture knows better."""
        return 2 if len(shape) == 4 and shape[0] == 1 else None

    @classmethod
    def of(cls, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor with the default stream axis of its shape."""
        return cls(name, tuple(shape), cls.default_axis(shape))

    @property
    def elements(self) -> int:
        """Elements per sample."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Units at ``line`` granularity."""
        return 1 if self.stream_axis is None else self.shape[self.stream_axis]

    @property
    def cols(self) -> int:
        """Units of one row at ``pixel`` granularity: the axis after the rows, of a rank-4 map."""
        if self.stream_axis is None or len(self.shape) != 4:
            return 1
        return self.shape[self.stream_axis + 1]

    @property
    def channel_axis(self) -> int | None:
        """The axis of channels: axis 1 of what streams over a later one (``(1, C, H, W)``,
        ``(1, C, L)``), else the last (``(1, T, C)``, ``(1, H, W, C)``, ``(1, C)``).

        ``None`` where that is the axis of rows, or the batch.
        """
        if self.stream_axis is not None and self.stream_axis > 1:
            return 1
        last = len(self.shape) - 1
        return last if last > 0 and last != self.stream_axis else None

    def extent(self, axis: int) -> int:
        """Rows (axis 0) or columns (axis 1)."""
        return self.cols if axis else self.rows

    def padded(self, units: int, align_channels: int) -> int:
        """Elements of one of so many units (:attr:`rows`, or rows times :attr:`cols`) as stored.

        Args:
            align_channels: channels are padded to a multiple of it.
        """
        elements, axis = self.elements // units, self.channel_axis
        if align_channels == 1 or axis is None:
            return elements
        channels = self.shape[axis]
        return elements // channels * (-(-channels // align_channels) * align_channels)


@dataclass(frozen=True, slots=True)
class Read:
    """One operand: a tensor and the window through which it is read."""

    tensor: str
    window: Window


@dataclass(frozen=True, slots=True)
class Op:
    """One operator (after folding batch norm and dropping aliases).

    Attributes:
        name: unique, readable and stable: module path plus kind.
        kind: what people call it ("conv2d"); for reports only, never looked at by cost code.
        module: path of the module it came from, ``""`` at the top.
        reads: feature-map operands in order; weights are not among them.
        writes: the tensor it produces.
        weight_elements: elements of weights, biases and whatever else of the model it reads.
        weight_bytes: their bytes as the model stores them, in all; ``None`` where that is not
            known. No part of the graph's identity: one plan fits a model in every width.
        in_place: a unary elementwise operator, which may write over its input.
        mixes_channels: every output channel may need every input channel (convolution,
            linear, matmul); ``False`` for the "local" operators of BRR (docs/method.md, section 4).
        groups: channel groups of a convolution.
        channel_axis: axis of the output's channels, where it is not axis 1 of a map of rank 4 and
            the last one of any other tensor.
        recurrent: carries a state from output unit to output unit, in order. Each unit needs all
            of the weights, so they cannot be taken in slices for several units at once.
        reason: why there is no better rule for it; empty for operators that have one.
        after: names of operators that must run before it although it reads nothing of theirs:
            both draw random numbers, or one writes where the other reads. Only what does not
            follow from the other edges of the graph.
        macs: multiply-accumulates per sample, of the operator as captured (a folded batch norm adds
            none); ``None`` where that is not known. No part of the graph's identity.
    """

    name: str
    kind: str
    reads: tuple[Read, ...]
    writes: str
    module: str = ""
    weight_elements: int = 0
    in_place: bool = False
    mixes_channels: bool = False
    groups: int = 1
    channel_axis: int | None = None
    recurrent: bool = False
    reason: str = ""
    after: tuple[str, ...] = ()
    weight_bytes: int | None = field(default=None, compare=False)
    macs: int | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The form of plan.json; keys that hold their default and are optional are left out."""
        form: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "module": self.module,
            "reads": [{"tensor": r.tensor, "window": r.window.to_json()} for r in self.reads],
            "writes": self.writes,
            "weight_elements": self.weight_elements,
            "in_place": self.in_place,
        }
        if self.weight_bytes is not None:
            form["weight_bytes"] = self.weight_bytes
        if self.macs is not None:
            form["macs"] = self.macs
        if self.mixes_channels:
            form["mixes_channels"] = True
        if self.groups != 1:
            form["groups"] = self.groups
        if self.channel_axis is not None:
            form["channel_axis"] = self.channel_axis
        if self.recurrent:
            form["recurrent"] = True
        if self.reason:
            form["reason"] = self.reason
        if self.after:
            form["after"] = list(self.after)
        return form

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> Op:
        """The inverse of :meth:`to_dict`; raises :class:`GraphError` for anything else."""
        name = form.get("name") if isinstance(form, Mapping) else None
        fields = Fields.of(form, f"operator {ascii(name)[:60]}")
        elements = fields.integer("weight_elements")
        if not elements and form.get("weight_bytes"):
            raise GraphError(f"{fields.where} states bytes of weights, but no weight_elements")
        return cls(
            name=fields.text("name"),
            kind=fields.text("kind"),
            reads=tuple(
                Read(read.text("tensor"), Window.from_json(read.value("window")))
                for read in fields.objects("reads")
            ),
            writes=fields.text("writes"),
            module=fields.text("module") if "module" in fields else "",
            weight_elements=elements,
            in_place=fields.flag("in_place"),
            mixes_channels="mixes_channels" in fields and fields.flag("mixes_channels"),
            groups=fields.integer("groups", 1) if "groups" in fields else 1,
            channel_axis=fields.integer("channel_axis") if "channel_axis" in fields else None,
            recurrent="recurrent" in fields and fields.flag("recurrent"),
            reason=fields.text("reason") if "reason" in fields else "",
            after=fields.texts("after") if "after" in fields else (),
            weight_bytes=fields.integer("weight_bytes") if "weight_bytes" in fields else None,
            macs=fields.integer("macs") if "macs" in fields else None,
        )


def default_channels(rank: int) -> int:
    """The axis of channels where an operator states none: 1 of a map of rank 4, else the last."""
    return 1 if rank == 4 else rank - 1
