"""Models that the command line's tests name as ``cli_models:callable``."""

from __future__ import annotations

import torch
from torch import nn


def small() -> nn.Module:
    """Two convolutions over maps of 3 channels."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))


def faulty() -> nn.Module:
    """Raises where it is built."""
    raise RuntimeError("no such luck\nand more")


class Picky(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] == 8, "the width must be 8"
        return x.relu()


def shrinking() -> nn.Module:
    """Pools maps of less than 4x4 to nothing, which torch's tracer logs before it raises."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.MaxPool2d(2))
