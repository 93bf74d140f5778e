"""Convolutions as oneDNN runs them best: weights reordered once, what follows fused in.

A :class:`PackedConv` stands for a convolution, the eval batch norm after it, an activation, and a
residual addition. Its weights are inputs of the graph: :mod:`weight_store` sees to it that what
was folded and reordered is what a call gives.
"""

from __future__ import annotations

import cmath
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_getfuse.backend.torch_private import onednn


@dataclass(frozen=True)
class Activation:
    """A oneDNN post-operator.

    Attributes:
        name: as ``mkldnn::_convolution_pointwise`` calls it.
        scalars: its parameters.
        algorithm: of gelu, ``"none"`` or ``"tanh"``.
    """

    name: str = "none"
    scalars: tuple[float, ...] = ()
    algorithm: str = ""

    @property
    def follows_addition(self) -> bool:
        """Whether oneDNN also runs it after a fused addition."""
        return self.name in ("none", "relu")


@dataclass(frozen=True)
class ConvShape:
    """What does not change from call to call; pairs are (rows, columns).

    Attributes:
        input_size: of one whole image ``(1, C, H, W)``. oneDNN may choose the layout of packed
            weights by it; inputs of other sizes are still right.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    input_size: tuple[int, int, int, int]

    @property
    def is_linear(self) -> bool:
        """Whether it is a matrix product over channels, position by position."""
        return (self.kernel, self.stride, self.padding, self.groups) == ((1, 1), (1, 1), (0, 0), 1)


class NotFinite(Exception):
    """Weights or inputs hold infinities or NaN.

    oneDNN's activations hide them (its ReLU of NaN is 0, torch's is NaN), so only eager is right.
    """


class Affine:
    """Bias and batch norm of a convolution as one factor and one summand per channel.

    Args:
        given: which vectors there are: the bias of the convolution, and mean, variance, weight and
            bias of the batch norm if there is one.
        epsilon: of the batch norm; ``None`` for no batch norm.
    """

    def __init__(self, given: Sequence[bool], epsilon: float | None) -> None:
        self._given = tuple(given)
        self._epsilon = epsilon

    @property
    def made_of(self) -> Hashable:
        """All that :meth:`fold` depends on besides the vectors."""
        return self._given, self._epsilon

    def fold(self, vectors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Factor (``None`` for 1) and summand (``None`` for 0) from the vectors that there are.

        With batch norm in float32 whatever the weights are: a bfloat16 fold would round twice.
        """
        parts = iter(vectors)
        bias, *norm = (next(parts) if given else None for given in self._given)
        if self._epsilon is None:
            return None, bias
        mean, variance, scale, shift = norm
        assert mean is not None
        assert variance is not None
        factor = torch.rsqrt(variance.float() + self._epsilon)
        if scale is not None:
            factor = factor * scale.float()
        start = -mean.float() if bias is None else bias.float() - mean.float()
        summand = start * factor
        return factor, summand if shift is None else summand + shift.float()


class Packed(NamedTuple):
    """Weights made ready."""

    weight: Tensor
    bias: Tensor | None


class PackedConv:
    """One convolution with its post-operators; safe to call from several threads.

    A 1x1 convolution runs as oneDNN's linear operator, which costs less per call.

    Args:
        shape: kernel, stride and so on.
        activation: applied last.
        affine: its bias and the folded batch norm.
        adds: whether a second map is added before the activation.
    """

    def __init__(
        self, shape: ConvShape, activation: Activation, affine: Affine, adds: bool
    ) -> None:
        self.shape = shape
        self.activation = activation
        self.affine = affine
        self.adds = adds
        # oneDNN's linear operator adds last, so an activation after the addition is not its.
        self.linear = shape.is_linear and not (adds and activation.name != "none")
        stride, dilation = list(shape.stride), list(shape.dilation)
        self._whole: tuple[Any, ...] = (list(shape.padding), stride, dilation, shape.groups)
        self._rows: tuple[Any, ...] = ([0, shape.padding[1]], stride, dilation, shape.groups)
        self._post = (activation.name, list(activation.scalars), activation.algorithm)
        after = None if activation.name == "none" else activation.name
        self._after_addition: tuple[Any, ...] = ("add", 1.0, after, [], "")
        self._on_whole, self._on_rows = self.operator(), self.operator(by_rows=True)

    @property
    def made_of(self) -> Hashable:
        """All that :meth:`prepare` depends on besides weights, but for the size of the input.

        By that oneDNN chooses the layout of strided 1x1 convolutions alone, as measured over the
        convolutions of MobileNetV2 and ResNet: the other layout costs them 15 microseconds a call.
        """
        shape = replace(self.shape, input_size=(1, self.shape.input_size[1], 0, 0))
        return "packed", shape, self.linear, self.affine.made_of

    def prepare(self, weight: Tensor, vectors: Sequence[Tensor]) -> Packed:
        """Weights folded and reordered.

        Args:
            weight: of the convolution.
            vectors: of its bias and batch norm, those that there are.

        Raises:
            NotFinite: where they hold infinities or NaN.
        """
        factor, bias = self.affine.fold(vectors)
        if bias is not None:
            bias = bias.to(weight.dtype)
        if factor is not None:
            weight = (weight.float() * factor[:, None, None, None]).to(weight.dtype)
        if not all_finite([value.sum() for value in (weight, bias) if value is not None]):
            raise NotFinite
        _, _, rows, cols = size = self.shape.input_size
        if self.linear:
            matrix = weight.reshape(weight.shape[0], -1).contiguous()
            packed = onednn().pack_linear(matrix, rows * cols)
        else:
            packed = onednn().pack_convolution(weight.contiguous(), *self._whole, list(size))
        return Packed(packed, None if bias is None else bias.contiguous())

    def operator(self, by_rows: bool = False) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        """The operator of oneDNN, and what it takes behind maps, packed weight and bias.

        A linear one takes maps whose last axis is the channels, and gives such a one; any other
        takes ``(N, C, H, W)`` and gives ``channels_last``.

        Args:
            by_rows: for blocks of rows that hold their vertical padding already.
        """
        if self.linear:
            if self.adds:
                return onednn().linear_add, ("add",)
            return onednn().linear, self._post
        window = self._rows if by_rows else self._whole
        if self.adds:
            return onednn().convolution_add, (*window, *self._after_addition)
        return onednn().convolution, (*window, *self._post)

    def whole(self, packed: Packed, *maps: Tensor) -> Tensor:
        """All rows of the maps, ``(N, C, H, W)``; the result is ``channels_last``."""
        return self._run(self._on_whole, packed, maps)

    def rows(self, packed: Packed, *maps: Tensor) -> Tensor:
        """The rows that blocks of rows give, which hold their vertical padding already."""
        return self._run(self._on_rows, packed, maps)

    def _run(
        self,
        operator: tuple[Callable[..., Tensor], tuple[Any, ...]],
        packed: Packed,
        maps: Sequence[Tensor],
    ) -> Tensor:
        run, rest = operator
        if not self.linear:
            return run(*maps, packed.weight, packed.bias, *rest)
        flat = (x.permute(0, 2, 3, 1) for x in maps)
        return run(*flat, packed.weight, packed.bias, *rest).permute(0, 3, 1, 2)


def all_finite(sums: Sequence[Tensor]) -> bool:
    """Whether sums are finite: no summand of theirs was infinite or NaN then."""
    return all(cmath.isfinite(each.item()) for each in sums)
