"""Row kernels of operators that slide over a map: convolution, pooling, resizing, padding.

The axis of rows comes first of the map's axes (:class:`SpatialKernel` brings it there). Rows above
and below the map are added here, as the operator defines them (zeros, or minus infinity for a
maximum); the other axes are left to torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from torch_getfuse.backend.fx_nodes.normalize import normalise
from torch_getfuse.backend.rowwise import resize_kernels
from torch_getfuse.backend.rowwise.calls import NoRowKernel, Values, fill
from torch_getfuse.backend.rowwise.copy_kernels import copy_kernel
from torch_getfuse.backend.rowwise.kernels import RowKernel, Site
from torch_getfuse.backend.rowwise.operand_views import Operand
from torch_getfuse.backend.rowwise.sliding import (
    SlidingKernel,
    SpatialKernel,
    node_shape,
    or_default,
)
from torch_getfuse.backend.rules.registry import positional
from torch_getfuse.backend.rules.rule import Call, spread
from torch_getfuse.backend.rules.spatial import UPSAMPLES, resize_mode
from torch_getfuse.ir.window import positions_added

_CONVOLUTIONS: dict[int, Callable[..., torch.Tensor]] = {
    1: F.conv1d,
    2: F.conv2d,
    3: F.conv3d,
}
_TRANSPOSED: dict[int, Callable[..., torch.Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_MAXIMA: dict[int, Callable[..., torch.Tensor]] = {
    1: F.max_pool1d,
    2: F.max_pool2d,
    3: F.max_pool3d,
}

_ADAPTIVE_MAX: dict[int, Callable[..., torch.Tensor]] = {
    1: F.adaptive_max_pool1d,
    2: F.adaptive_max_pool2d,
    3: F.adaptive_max_pool3d,
}
_ADAPTIVE_AVERAGE: dict[int, Callable[..., torch.Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def make(site: Site, name: str) -> RowKernel | None:
    """The kernel of a call by its plain name; ``None`` for one that does not slide.

    Raises:
        NoRowKernel: where it slides in a way that is not computed by rows.
    """
    maker = _KERNELS.get(name)
    if maker is None or site.target.stream_axis is None:
        return None
    return maker(site, name)


class _Convolution(SpatialKernel):
    """What a convolution and a transposed one read of their call.

    Attributes:
        weight, bias: arguments; nodes or ``None``.
        kernels, strides, dilations: per axis of the map.
        groups: channel groups.
    """

    def __init__(self, site: Site, by_axes: Mapping[int, Callable[..., torch.Tensor]]) -> None:
        weight = normalise(site.core.node, positional).args["weight"]
        shape = node_shape(weight)
        axes = len(shape) - 2
        super().__init__(site, axes)
        self.weight, self.bias = weight, self.args.get("bias")
        if any(isinstance(a, fx.Node) and a not in self.weights for a in (weight, self.bias)):
            raise NoRowKernel(f"{self.op.name} has a kernel that is itself computed from the input")
        self.call = by_axes[axes]
        self.kernels = self.ordered(shape[2:])
        self.strides = self.per_axis("stride", 1)
        self.dilations = self.per_axis("dilation", 1)
        self.groups = int(or_default(self.args.get("groups"), 1))

    def taps(self, values: Values) -> torch.Tensor:
        """The weight, the axis of rows in front of the other ones of the map."""
        weight: torch.Tensor = fill(self.weight, values)
        return weight.movedim(2 + self.row_axis - self.axis, 2)


class ConvKernel(_Convolution, SlidingKernel):
    """Convolution over one, two or three axes.

    Attributes:
        begins, ends: padding per axis of the map.
    """

    def __init__(self, site: Site, name: str) -> None:
        super().__init__(site, _CONVOLUTIONS)
        padding = or_default(self.args.get("padding"), 0)
        if padding == "same":
            reach = [d * (k - 1) for d, k in zip(self.dilations, self.kernels, strict=True)]
            self.begins = tuple(r // 2 for r in reach)
            self.ends = tuple(r - r // 2 for r in reach)
        else:
            self.begins = self.ends = self.ordered(
                spread(0 if padding == "valid" else padding, self.axes)
            )
        self.kernel, self.stride = self.kernels[0], self.strides[0]
        self.dilation, self.padding = self.dilations[0], self.begins[0]

    def compute(
        self, values: Values, blocks: Mapping[fx.Node, torch.Tensor], low: int, high: int
    ) -> Any:
        """The convolution of the window's rows.

        At the upper border torch pads both ends, which costs a few rows of work and no copy of
        the block, and the first rows are taken.
        """
        begin, end = self._span(low, high)
        have, until = self.operand_rows(self.operand, low, high)
        above = have - begin if until > have and end == until else 0
        block = self._block(blocks)
        if not above:
            block = self.padded(block, low, high)
        padding = self.begins[1:]
        if self.begins[1:] != self.ends[1:]:
            sides = zip(reversed(self.begins[1:]), reversed(self.ends[1:]), strict=True)
            block = F.pad(block, [size for side in sides for size in side])
            padding = (0,) * len(padding)
        made = self.call(
            block,
            self.taps(values),
            fill(self.bias, values),
            self.strides,
            (above, *padding),
            self.dilations,
            self.groups,
        )
        return made.narrow(self.axis, 0, high - low) if above else made


class TransposedConvKernel(_Convolution):
    """Transposed convolution: input row ``i`` adds to rows ``i*stride - padding + dilation*k``."""

    def __init__(self, site: Site, name: str) -> None:
        super().__init__(site, _TRANSPOSED)
        self.paddings = self.per_axis("padding", 0)
        self.extra = self.per_axis("output_padding", 0)

    def operand_rows(self, operand: Operand, low: int, high: int) -> tuple[int, int]:
        """Input rows that add to some of the output rows, clipped to the map."""
        begin, end = positions_added(
            self.kernels[0], self.strides[0], self.dilations[0], self.paddings[0], low, high
        )
        begin = min(max(0, begin), self.size)
        return begin, max(begin, min(end, self.size))

    def compute(
        self, values: Values, blocks: Mapping[fx.Node, torch.Tensor], low: int, high: int
    ) -> Any:
        """All rows that the input rows add to, cut to those asked for."""
        begin, end = self.operand_rows(self.operand, low, high)
        weight, bias = self.taps(values), fill(self.bias, values)
        block = self._block(blocks)
        if begin == end:
            # Only output padding: no input row adds to it. One row of zeros gives its shape.
            block = block.new_zeros([1 if a == self.axis else n for a, n in enumerate(block.shape)])
        made = self.call(
            block,
            weight,
            bias,
            self.strides,
            (0, *self.paddings[1:]),
            (0, *self.extra[1:]),
            self.groups,
            self.dilations,
        )
        if begin == end:
            return made.narrow(self.axis, 0, 1).expand(
                [high - low if a == self.axis else n for a, n in enumerate(made.shape)]
            )
        top = begin * self.strides[0] - self.paddings[0]  # the output row that made's first one is
        above, below = max(0, top - low), max(0, high - top - made.shape[self.axis])
        kept = made.narrow(self.axis, max(0, low - top), high - low - above - below)
        if not above and not below:
            return kept
        # Rows between the taps, or of the output padding: the bias alone.
        shape = [1 if a == self.axis else n for a, n in enumerate(made.shape)]
        alone = made.new_zeros(shape)
        if bias is not None:
            alone = alone + bias.view([-1, *(1,) * self.axes])
        parts = [alone] * above + [kept] + [alone] * below
        return torch.cat(parts, self.axis)


class PoolKernel(SlidingKernel):
    """Maximum and average pooling over one, two or three axes, ceil mode included."""

    def __init__(self, site: Site, name: str) -> None:
        super().__init__(site, _axes(name))
        args = self.args
        self.maximum = name.startswith("max")
        self.kernels = self.per_axis("kernel_size", 1)
        given = args.get("stride")
        self.strides = self.kernels if given in (None, (), []) else self.per_axis("stride", 1)
        self.paddings = self.per_axis("padding", 0)
        self.dilations = self.per_axis("dilation", 1)
        self.ceil = bool(args.get("ceil_mode"))
        # By position where nn.AvgPool2d calls it, by name where an overload does.
        rest = [*args.get("*", ()), None, None][:2]
        self.counts_padding = args.get("count_include_pad", rest[0]) is not False
        self.divisor = args.get("divisor_override", rest[1])
        self.kernel, self.stride = self.kernels[0], self.strides[0]
        self.dilation, self.padding = self.dilations[0], self.paddings[0]
        if self._pick not in (None, 0):
            raise NoRowKernel(f"{self.op.name} gives positions in the map, not values")

    def compute(
        self, values: Values, blocks: Mapping[fx.Node, torch.Tensor], low: int, high: int
    ) -> Any:
        """Torch's pooling on the window's rows; averages are sums divided here."""
        block = self._block(blocks)
        if self.maximum:
            block = self.padded(block, low, high, -math.inf)
            found = _MAXIMA[self.axes](
                block,
                self.kernels,
                self.strides,
                (0, *self.paddings[1:]),
                self.dilations,
                self.ceil,
            )
            # Of several results the values are taken, as where torch gives indices too.
            return found if self._pick is None else (found, None)
        block = self.padded(block, low, high)
        if self.axes == 1:
            sums = F.avg_pool2d(
                block.unsqueeze(-1), (self.kernel, 1), (self.stride, 1), 0, divisor_override=1
            ).squeeze(-1)
        else:
            pool = F.avg_pool2d if self.axes == 2 else F.avg_pool3d
            sums = pool(
                block,
                self.kernels,
                self.strides,
                (0, *self.paddings[1:]),
                self.ceil,
                divisor_override=1,
            )
        if self.divisor is not None:
            return sums / self.divisor
        counts = torch.tensor([float(self._count(0, row, self.size)) for row in range(low, high)])
        for axis, (made, size) in enumerate(zip(sums.shape[self.axis + 1 :], self.columns), 1):
            across = [float(self._count(axis, place, size)) for place in range(made)]
            counts = counts[..., None] * torch.tensor(across)
        return (sums / counts).to(sums.dtype)

    def _count(self, axis: int, position: int, size: int) -> int:
        """How many positions an average is divided by, along one axis (as torch counts them)."""
        padding = self.paddings[axis]
        begin = position * self.strides[axis] - padding
        end = min(begin + self.kernels[axis], size + padding)
        return end - begin if self.counts_padding else min(end, size) - max(begin, 0)


class AdaptivePoolKernel(SpatialKernel):
    """Adaptive pooling to several rows: row ``r`` is that of its bin of rows."""

    def __init__(self, site: Site, name: str) -> None:
        super().__init__(site, _axes(name))
        pools = _ADAPTIVE_MAX if "max" in name else _ADAPTIVE_AVERAGE
        self._pool = pools[self.axes]
        self.out = self.ordered(self.target.shape[self.axis :])
        if self._pick not in (None, 0):
            raise NoRowKernel(f"{self.op.name} gives positions in the map, not values")

    def _bin(self, row: int) -> tuple[int, int]:
        rows = self.target.rows
        return row * self.size // rows, -(-(row + 1) * self.size // rows)

    def operand_rows(self, operand: Operand, low: int, high: int) -> tuple[int, int]:
        """From the first bin's first row to the last bin's last."""
        return self._bin(low)[0], self._bin(high - 1)[1]

    def compute(
        self, values: Values, blocks: Mapping[fx.Node, torch.Tensor], low: int, high: int
    ) -> Any:
        """Torch's pooling of each bin to one row."""
        block, made = self._block(blocks), []
        first = self._bin(low)[0]
        for row in range(low, high):
            begin, end = self._bin(row)
            part = block.narrow(self.axis, begin - first, end - begin)
            made.append(self._pool(part, (1, *self.out[1:])))
        found = made[0] if len(made) == 1 else torch.cat(made, self.axis)
        return found if self._pick is None else (found, None)


class PadKernel(SlidingKernel):
    """Padding with a constant (rows too), or by mirroring (other axes only)."""

    def __init__(self, site: Site, name: str) -> None:
        # Of the axes before that of rows, none is padded along them.
        super().__init__(site, site.rank - (site.target.stream_axis or 0))
        args = self.args
        pads = [int(p) for p in (args.get("pad") or args["padding"])]
        self.mode = (
            "constant" if "constant" in name else str(or_default(args.get("mode"), "constant"))
        )
        for word, mode in (("reflection", "reflect"), ("replication", "replicate")):
            if name.startswith(word):
                self.mode = mode
        place = 2 * (site.rank - 1 - self.axis)
        begin, end = (*pads, *(0,) * (place + 2))[place : place + 2]
        if self.mode != "constant" and (begin, end) != (0, 0):
            raise NoRowKernel(f"{self.op.name}: padding by {self.mode} copies rows")
        pads[place : place + 2] = [0, 0][: max(0, len(pads) - place)]
        self.pads = pads
        self.value = float(or_default(args.get("value"), 0.0))
        self.kernel = self.stride = self.dilation = 1
        self.padding = begin

    def compute(
        self, values: Values, blocks: Mapping[fx.Node, torch.Tensor], low: int, high: int
    ) -> Any:
        """Rows of the constant above and below the map, and torch's padding of the other axes."""
        block = self.padded(self._block(blocks), low, high, self.value)
        if not any(self.pads):
            return block
        if self.mode == "constant":
            return F.pad(block, self.pads, value=self.value)
        return F.pad(block, [*self.pads, *(0,) * (2 * block.dim() - 4 - len(self.pads))], self.mode)


class ShuffleKernel(SlidingKernel):
    """Pixel shuffle: ``factor`` output rows from each input row."""

    def __init__(self, site: Site, name: str) -> None:
        super().__init__(site, 2)
        self.factor = self.target.rows // self.size

    def operand_rows(self, operand: Operand, low: int, high: int) -> tuple[int, int]:
        """The input rows whose output rows are among those asked for."""
        return low // self.factor, (high - 1) // self.factor + 1

    def compute(
        self, values: Values, blocks: Mapping[fx.Node, torch.Tensor], low: int, high: int
    ) -> Any:
        """Torch's shuffle, cut to the rows asked for."""
        made = F.pixel_shuffle(self._block(blocks), self.factor)
        return made.narrow(self.axis, low - low // self.factor * self.factor, high - low)


class UnshuffleKernel(SlidingKernel):
    """Pixel unshuffle: one output row from ``factor`` input rows."""

    def __init__(self, site: Site, name: str) -> None:
        super().__init__(site, 2)
        self.kernel = self.stride = self.size // self.target.rows
        self.dilation, self.padding = 1, 0

    def compute(
        self, values: Values, blocks: Mapping[fx.Node, torch.Tensor], low: int, high: int
    ) -> Any:
        """Torch's unshuffle."""
        return F.pixel_unshuffle(self._block(blocks), self.stride)


def _axes(name: str) -> int:
    """2 for ``max_pool2d_with_indices``."""
    return next(axes for axes in (1, 2, 3) if f"{axes}d" in name)


def _pad_mode(args: Mapping[str, Any], name: str) -> str:
    for word, mode in (("reflection", "reflect"), ("replication", "replicate")):
        if name.startswith(word):
            return mode
    return "constant" if "constant" in name else str(or_default(args.get("mode"), "constant"))


def _pad(site: Site, name: str) -> RowKernel | None:
    """``None`` where rows are copied to the border: it is then computed whole."""
    if _pad_mode(normalise(site.core.node, positional).args, name) != "constant" and site.held(0):
        return None
    return PadKernel(site, name)


def _resize(site: Site, name: str) -> RowKernel | None:
    call = Call(name, normalise(site.core.node, positional).args, ())
    if resize_mode(call)[0] == "area":
        return AdaptivePoolKernel(site, f"adaptive_avg_pool{site.rank - 2}d")
    return resize_kernels.make(site, call)


def _convolution(site: Site, name: str) -> RowKernel:
    transposed = bool(normalise(site.core.node, positional).args.get("transposed"))
    if transposed or name.startswith("conv_transpose"):
        return TransposedConvKernel(site, name)
    return ConvKernel(site, name)


_EACH = (1, 2, 3)
_KERNELS: dict[str, Callable[[Site, str], RowKernel | None]] = {
    "convolution": _convolution,
    **{f"conv{word}{n}d": _convolution for word in ("", "_transpose") for n in _EACH},
    **{f"{word}_pool{n}d": PoolKernel for word in ("max", "avg") for n in _EACH},
    **{f"max_pool{n}d_with_indices": PoolKernel for n in _EACH},
    **{f"adaptive_{word}_pool{n}d": AdaptivePoolKernel for word in ("avg", "max") for n in _EACH},
    "interpolate": _resize,
    **dict.fromkeys(UPSAMPLES, _resize),
    "pad": _pad,
    "constant_pad_nd": _pad,
    **{f"{word}_pad{n}d": _pad for word in ("reflection", "replication") for n in _EACH},
    "pixel_shuffle": ShuffleKernel,
    **dict.fromkeys(("unfold", "repeat_interleave"), copy_kernel),
    "pixel_unshuffle": UnshuffleKernel,
}
