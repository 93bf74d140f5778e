"""Models of torch's eager-mode quantisation (``torch.ao.nn.quantized``), as graphs can show them.

Their modules compute on tensors of quantized types with weights packed out of sight, which neither
Dynamo nor ``torch.export`` traces. The *reference* of such a model computes the same in real
numbers: what a module gives is quantized and dequantized, and weights are integers beside their
scales, as PT2E writes it. It is for planning; rounding differs from the packed kernels'.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torch_getfuse.errors import CaptureError

_PREFIXES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
_FLOATS = ("FloatFunctional", "FXFloatFunctional")
"""Modules of theirs that compute in floats, until they are converted."""


def is_eager_quantised(model: object) -> bool:
    """Whether a model holds modules of eager-mode quantisation."""
    return isinstance(model, nn.Module) and any(map(_is_quantized, model.modules()))


def check_traceable(model: object, what: str) -> None:
    """Refuse what only planning can do something with.

    Raises:
        CaptureError: for a model of eager-mode quantisation.
    """
    if is_eager_quantised(model):
        raise CaptureError(
            f"{what} needs a model that torch traces, and {type(model).__name__} holds modules of "
            "torch's eager-mode quantisation, which it does not; plan(), report(), explain(), "
            "price() and sweep() take it. To run groups, quantize the float model by PT2E (torchao)"
        )


def reference_of(model: nn.Module) -> nn.Module:
    """A copy of the model that computes the same in real numbers.

    Raises:
        CaptureError: for a module that has no reference here.
    """
    importlib.import_module("torch.ao.quantization.fx")  # registers quantized_decomposed
    found = copy.deepcopy(model)
    inside: tuple[str, ...] = ()
    for name, module in list(found.named_modules()):
        if not _is_quantized(module) or name.startswith(inside):
            continue
        inside = (*inside, f"{name}.")  # packed weights are modules as well
        made = _reference(module)
        if made is None:
            raise CaptureError(
                f"{name} is a {type(module).__module__}.{type(module).__name__} of torch's "
                "eager-mode quantisation, which has no reference here; quantize the float model "
                "by PT2E (torchao), or plan the float model with activation_bytes=1, weight_bytes=1"
            )
        if not name:
            return made
        made.train(module.training)
        parent, _, leaf = name.rpartition(".")
        setattr(found.get_submodule(parent), leaf, made)
    return found


def _is_quantized(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.startswith(_PREFIXES) and kind.__name__ not in _FLOATS


class _Quantized(nn.Module):
    """Gives a function of its inputs, quantized and dequantized."""

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        scale: Any,
        zero_point: Any,
        dtype: torch.dtype = torch.uint8,
    ) -> None:
        super().__init__()
        self.function = function
        self.scale, self.zero_point = float(scale), int(zero_point)
        self.dtype = dtype

    def forward(self, *args: Any) -> torch.Tensor:
        return self.requantized(self.function(*args))

    def requantized(self, x: torch.Tensor) -> torch.Tensor:
        """The values that the quantized tensor of ``x`` stands for."""
        bounds = torch.iinfo(self.dtype)
        how = (self.scale, self.zero_point, bounds.min, bounds.max, self.dtype)
        space = torch.ops.quantized_decomposed
        quantized = space.quantize_per_tensor.default(x, *how)
        result: torch.Tensor = space.dequantize_per_tensor.default(quantized, *how)
        return result


class _Weighted(_Quantized):
    """A convolution or a linear layer, with its weight as integers."""

    def __init__(
        self, function: Callable[..., torch.Tensor], module: Any, *, relu: bool, options: Any
    ) -> None:
        super().__init__(function, module.scale, module.zero_point)
        weight, bias = module.weight(), module.bias()
        self.register_buffer("weight", weight.int_repr())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.relu, self.options = relu, options
        self.axis = None
        if weight.qscheme() == torch.per_tensor_affine:
            self.how: tuple[Any, ...] = (weight.q_scale(), weight.q_zero_point())
        else:
            self.axis = weight.q_per_channel_axis()
            self.register_buffer("scales", weight.q_per_channel_scales())
            self.register_buffer("zero_points", weight.q_per_channel_zero_points())

    def forward(self, *args: Any) -> torch.Tensor:
        (x,) = args
        bounds, space = torch.iinfo(torch.int8), torch.ops.quantized_decomposed
        tail = (bounds.min, bounds.max, torch.int8)
        if self.axis is None:
            weight = space.dequantize_per_tensor.default(self.weight, *self.how, *tail)
        else:
            how = (self.scales, self.zero_points, self.axis)
            weight = space.dequantize_per_channel.default(self.weight, *how, *tail)
        y = self.function(x, weight, self.bias, **self.options)
        return self.requantized(F.relu(y) if self.relu else y)


class _Functional(_Quantized):
    """``QFunctional``: additions, products and concatenations."""

    def __init__(self, module: Any) -> None:
        super().__init__(torch.add, module.scale, module.zero_point)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.requantized(x + y)

    def add_relu(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.requantized(F.relu(x + y))

    def mul(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.requantized(x * y)

    def add_scalar(self, x: torch.Tensor, y: float) -> torch.Tensor:
        return x + y  # moves the zero point alone

    def mul_scalar(self, x: torch.Tensor, y: float) -> torch.Tensor:
        return x * y  # changes the scale alone

    def cat(self, x: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
        return self.requantized(torch.cat(x, dim))


_CONVOLUTIONS = {
    f"{prefix}{size}d": getattr(F, f"conv{size}d")
    for size in (1, 2, 3)
    for prefix in ("Conv", "ConvReLU")
}
_LINEAR = ("Linear", "LinearReLU")
_ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "ReLU6": F.relu6,
    "Hardswish": F.hardswish,
    "Sigmoid": torch.sigmoid,
}


def _reference(module: Any) -> nn.Module | None:
    """What computes as a quantized module does; ``None`` for a kind that is not known here."""
    kind = type(module).__name__
    if kind == "Quantize":
        dtype = torch.uint8 if module.dtype == torch.quint8 else torch.int8
        return _Quantized(nn.Identity(), module.scale, module.zero_point, dtype)
    if kind == "DeQuantize":
        return nn.Identity()
    if kind == "Dropout":
        return nn.Dropout(module.p)
    if kind == "QFunctional":
        return _Functional(module)
    if kind == "ReLU6" and not hasattr(module, "scale"):
        return nn.ReLU6()
    if kind in _ACTIVATIONS:
        prefix = "output_" if hasattr(module, "output_scale") else ""
        scale, zero_point = (getattr(module, prefix + n) for n in ("scale", "zero_point"))
        return _Quantized(_ACTIVATIONS[kind], scale, zero_point)
    relu = kind.endswith(("ReLU", "ReLU1d", "ReLU2d", "ReLU3d"))
    if kind in _CONVOLUTIONS and module.padding_mode == "zeros":
        options = {name: getattr(module, name) for name in ("stride", "padding", "dilation")}
        options["groups"] = module.groups
        return _Weighted(_CONVOLUTIONS[kind], module, relu=relu, options=options)
    if kind in _LINEAR:
        return _Weighted(F.linear, module, relu=relu, options={})
    return None
