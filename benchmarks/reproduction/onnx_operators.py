"""Networks with the operators that ONNX files have, the paper's granularity.

Where torch has one operator, exporters of the paper's time wrote several: SiLU is Sigmoid and Mul,
hard-swish is Add, Clip, Mul and Div. Clip stands for ReLU6, one operator in both.
"""

from __future__ import annotations

import torch
from torch import nn

SUFFIX = "@onnx"
"""Ends the name of a network that is written in this way."""


class _SiLU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


class _Hardswish(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.clamp(x + 3, 0, 6) / 6


_WRITTEN_OUT = {nn.SiLU: _SiLU, nn.Hardswish: _Hardswish}


def write_out(model: nn.Module) -> nn.Module:
    """The model with activations that ONNX has no operator for written out, in place."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in _WRITTEN_OUT:
                setattr(parent, name, _WRITTEN_OUT[type(child)]())
    return model
