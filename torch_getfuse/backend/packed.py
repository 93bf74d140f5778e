"""Convolutions as oneDNN runs them best: weights reordered once, what follows fused in.

A :class:`PackedConv` stands for a convolution, the eval batch norm after it, an activation, and a
residual addition. Its weights are inputs of the graph and are looked at on every call: a fold or a
reordering is reused only for the very tensors, at the very version, that it was made from. So it
is right after an optimizer step, a ``load_state_dict``, and for another instance of the class.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_KEPT = 4
"""Sets of weights kept per convolution: instances of one class that take turns."""


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
            weights by it; inputs of other heights are still right.
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


class ConvWeights(NamedTuple):
    """Tensors of a convolution and of the batch norm folded into it, as one call gives them."""

    weight: Tensor
    bias: Tensor | None
    mean: Tensor | None = None
    variance: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    @classmethod
    def of(cls, values: Iterable[Tensor | None]) -> ConvWeights:
        """From the values in order; the first is there."""
        weight, *others = values
        assert weight is not None
        return cls(weight, *others)


@dataclass(frozen=True)
class _Packed:
    """Weights made ready, and the tensors (with their versions) that they were made from."""

    sources: tuple[tuple[weakref.ref[Tensor], int], ...]
    weight: Tensor
    bias: Tensor | None

    def fits(self, given: Sequence[Tensor]) -> bool:
        return len(given) == len(self.sources) and all(
            ref() is tensor and version == tensor._version
            for (ref, version), tensor in zip(self.sources, given, strict=True)
        )


class PackedConv:
    """One convolution with its post-operators; safe to call from several threads.

    A 1x1 convolution runs as oneDNN's linear operator, which costs less per call.

    Args:
        shape: kernel, stride and so on.
        activation: applied last.
        epsilon: of the folded batch norm; ``None`` for no batch norm.
        adds: whether a second map is added before the activation.
    """

    def __init__(
        self, shape: ConvShape, activation: Activation, epsilon: float | None, adds: bool
    ) -> None:
        self.shape = shape
        self.activation = activation
        self.epsilon = epsilon
        self.adds = adds
        # oneDNN's linear operator adds last, so an activation after the addition is not its.
        self.linear = shape.is_linear and not (adds and activation.name != "none")
        self._packed: tuple[_Packed, ...] = ()
        stride, dilation = list(shape.stride), list(shape.dilation)
        self._whole: tuple[Any, ...] = (list(shape.padding), stride, dilation, shape.groups)
        self._rows: tuple[Any, ...] = ([0, shape.padding[1]], stride, dilation, shape.groups)
        self._post = (activation.name, list(activation.scalars), activation.algorithm)
        after = None if activation.name == "none" else activation.name
        self._after_addition: tuple[Any, ...] = ("add", 1.0, after, [], "")

    def ready(self, weights: ConvWeights) -> _Packed:
        """This call's weights packed, made now or before."""
        given = [tensor for tensor in weights if tensor is not None]
        for packed in self._packed:
            if packed.fits(given):
                return packed
        made = self._make(weights, given)
        if made.sources:
            alive = [p for p in self._packed if all(ref() is not None for ref, _ in p.sources)]
            self._packed = (made, *alive[: _KEPT - 1])
        return made

    def whole(self, packed: _Packed, x: Tensor, other: Tensor | None = None) -> Tensor:
        """All rows of ``x``, ``(N, C, H, W)``; the result is ``channels_last``."""
        return self._run(self._whole, packed, x, other)

    def rows(self, packed: _Packed, x: Tensor, other: Tensor | None = None) -> Tensor:
        """The rows that a block of input rows gives, which holds its vertical padding already."""
        return self._run(self._rows, packed, x, other)

    def _run(
        self, window: tuple[Any, ...], packed: _Packed, x: Tensor, other: Tensor | None
    ) -> Tensor:
        weight, bias = packed.weight, packed.bias
        if self.linear:
            images, channels, rows, cols = x.shape
            flat = x.permute(0, 2, 3, 1).reshape(-1, channels)
            if other is None:
                out: Tensor = _linear(flat, weight, bias, *self._post)
            else:
                added = other.permute(0, 2, 3, 1).reshape(-1, other.shape[1])
                out = _linear_add(flat, added, weight, bias, "add")
            return out.view(images, rows, cols, -1).permute(0, 3, 1, 2)
        if other is None:
            found: Tensor = _conv(x, weight, bias, *window, *self._post)
        else:
            found = _conv_add(x, other, weight, bias, *window, *self._after_addition)
        return found

    def _make(self, weights: ConvWeights, given: list[Tensor]) -> _Packed:
        weight, bias = weights.weight.detach(), weights.bias
        if self.epsilon is not None:
            assert weights.mean is not None
            assert weights.variance is not None
            # In float32 whatever the weights are: a bfloat16 fold would round twice.
            factor = torch.rsqrt(weights.variance.float() + self.epsilon)
            if weights.scale is not None:
                factor = factor * weights.scale.float()
            start = -weights.mean.float() if bias is None else bias.float() - weights.mean.float()
            folded = start * factor
            if weights.shift is not None:
                folded = folded + weights.shift.float()
            bias = folded.to(weight.dtype)
            weight = (weight.float() * factor[:, None, None, None]).to(weight.dtype)
        _, _, rows, cols = size = self.shape.input_size
        if self.linear:
            matrix = weight.reshape(weight.shape[0], -1).contiguous()
            packed = torch.ops.mkldnn._reorder_linear_weight(matrix, rows * cols)
        else:
            packed = torch.ops.mkldnn._reorder_convolution_weight(
                weight.contiguous(), *self._whole, list(size)
            )
        # Tensors made in inference mode have no version, so nothing tells when they change.
        tracked = not any(tensor.is_inference() for tensor in given)
        sources = tuple((weakref.ref(t), t._version) for t in given) if tracked else ()
        return _Packed(sources, packed, None if bias is None else bias.detach().contiguous())


_conv = torch.ops.mkldnn._convolution_pointwise.default
_conv_add = torch.ops.mkldnn._convolution_pointwise.binary
_linear = torch.ops.mkldnn._linear_pointwise.default
_linear_add = torch.ops.mkldnn._linear_pointwise.binary
