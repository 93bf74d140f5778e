"""Two operators of a library of its own, and how they read."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import torch_getfuse
from torch_getfuse import Window


@torch.library.custom_op("example::soft_clip", mutates_args=())
def soft_clip(x: torch.Tensor, limit: float) -> torch.Tensor:
    """``limit * tanh(x / limit)``, elementwise."""
    return limit * torch.tanh(x / limit)


@torch.library.custom_op("example::blur", mutates_args=())
def blur(x: torch.Tensor) -> torch.Tensor:
    """The mean of each 3x3 window of a map ``(N, C, H, W)``."""
    return F.avg_pool2d(x, 3, stride=1, padding=1)


@soft_clip.register_fake
def _(x: torch.Tensor, limit: float) -> torch.Tensor:
    return torch.empty_like(x)


@blur.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def register() -> None:
    """The rules; called when capture meets the first operator of the library."""
    torch_getfuse.register_rule("example::soft_clip", like="tanh")
    torch_getfuse.register_rule("example::blur", windows=Window.sliding((3, 3), padding=(1, 1)))
