"""Convolutions as a matrix product with the weights as they lie, for maps of few positions.

On a small map most of a convolution's time is reading its weights. To compare them with a copy
(:mod:`snapshots`) reads twice as many bytes once more; a product that takes them from where they
are needs no comparison. The batch norm is then one factor and one summand per channel of the
result, which is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_getfuse.backend.packed.packed_conv import (
    Activation,
    Affine,
    ConvShape,
    NotFinite,
    all_finite,
)

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
    "swish": lambda t: F.silu(t, inplace=True),
    "hardswish": lambda t: F.hardswish(t, inplace=True),
    "hardsigmoid": lambda t: F.hardsigmoid(t, inplace=True),
}

PerChannel = tuple[Tensor | None, Tensor | None]
"""Factor and summand; ``None`` for 1 and 0."""


class LiveConv:
    """One convolution with its post-operators, with nothing kept of its weight.

    Takes float32 and one group. Safe to call from several threads.

    Args:
        shape: kernel, stride and so on.
        activation: applied last, by torch's own operator.
        affine: its bias and the folded batch norm, folded once.
    """

    def __init__(self, shape: ConvShape, activation: Activation, affine: Affine) -> None:
        self.shape = shape
        self.activation = activation
        self.affine = affine

    @property
    def made_of(self) -> Hashable:
        """All that :meth:`prepare` depends on besides the vectors."""
        return "live", self.affine.made_of

    def prepare(self, vectors: Sequence[Tensor]) -> PerChannel:
        """Factor and summand per channel, from the vectors of bias and batch norm.

        Raises:
            NotFinite: where they hold infinities or NaN.
        """
        made = self.affine.fold(vectors)
        if not all_finite([value.sum() for value in made if value is not None]):
            raise NotFinite
        return made

    def product(
        self,
        weight: Tensor,
        made: PerChannel,
        x: Tensor,
        other: Tensor | None,
        sums: list[Tensor],
    ) -> Tensor:
        """The result, positions by channels.

        Args:
            weight: of this call.
            made: of this call's other weights.
            x: the map, ``(N, C, H, W)``, of a 1x1 convolution positions by channels.
            other: added before the activation, positions by channels.
            sums: takes one that is finite if all of the weight is, where ``x`` is.
        """
        factor, summand = made
        positions, matrix = self._operands(x, weight)
        out = torch.mm(positions, matrix.t())
        sums.append(out.select(0, 0).sum())  # every position reads all of the weight
        if factor is not None:
            assert summand is not None
            torch.addcmul(summand, out, factor, out=out)
        elif summand is not None:
            out.add_(summand)
        if other is not None:
            out.add_(other)
        return self._activated(out)

    def _operands(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What each position reads, and the weight, as matrices."""
        outputs = weight.shape[0]
        if self.shape.is_linear:
            return x, weight.reshape(outputs, -1)
        (down, right), (high, wide) = self.shape.padding, self.shape.kernel
        if down or right:
            x = F.pad(x, (right, right, down, down))
        blocks = x.permute(0, 2, 3, 1)
        for axis, size, stride, dilation in zip(
            (1, 2), (high, wide), self.shape.stride, self.shape.dilation, strict=True
        ):
            blocks = blocks.unfold(axis, (size - 1) * dilation + 1, stride)
        blocks = blocks[..., :: self.shape.dilation[0], :: self.shape.dilation[1]]
        channels = blocks.shape[3]
        # In the order in which the weight lies, so that it need not be copied.
        if weight.stride(1) < weight.stride(3):
            blocks, weight = blocks.permute(0, 1, 2, 4, 5, 3), weight.permute(0, 2, 3, 1)
        width = channels * math.prod(self.shape.kernel)
        return blocks.reshape(-1, width), weight.reshape(outputs, width)

    def _activated(self, out: Tensor) -> Tensor:
        name, scalars = self.activation.name, self.activation.scalars
        if name in _IN_PLACE:
            return _IN_PLACE[name](out)
        if name == "hardtanh":
            return out.clamp_(*scalars)
        if name == "leaky_relu":
            return F.leaky_relu(out, scalars[0], inplace=True)
        if name == "gelu":
            return F.gelu(out, approximate=self.activation.algorithm)
        return out
