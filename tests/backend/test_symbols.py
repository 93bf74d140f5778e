"""Dynamic shapes of fusion groups: every size that a group's shapes are made of is an input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import free_symbols


class Strided(nn.Module):
    """Each map's height is made of the input's, and only the first group reads the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.b = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.b(self.a(x).relu()))
        return nn.functional.interpolate(y, scale_factor=2, mode="bilinear")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_every_size_is_an_input(train: bool, backward: bool) -> None:
    seen = []

    def inner(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        sizes = {str(value.node.expr) for value in inputs if isinstance(value, torch.SymInt)}
        made_of = {str(s) for v in inputs if isinstance(v, torch.Tensor) for s in free_symbols(v)}
        assert made_of <= sizes
        seen.append(sizes)
        return gm.forward

    torch.manual_seed(0)
    model = Strided().train(train)
    other = copy.deepcopy(model)
    options = {"buffer": "2KB", "strict": True, "inner": inner, "backward": backward}
    compiled = torch.compile(other, backend="getfuse", options=options, dynamic=True)
    for shape in ((2, 3, 16, 16), (3, 3, 24, 16), (2, 3, 20, 28)):
        x = torch.randn(shape)
        ours, theirs = compiled(x), model(x)
        # AOTAutograd takes the resize apart, which rounds otherwise.
        torch.testing.assert_close(ours, theirs)
        ours.square().sum().backward()
    assert len(seen) >= 3
    assert max(map(len, seen)) >= 2


def test_static_shapes_need_none() -> None:
    def inner(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        assert not any(isinstance(value, (int, torch.SymInt)) for value in inputs)
        return gm.forward

    model, x = Strided().eval(), torch.randn(2, 3, 16, 16)
    options = {"buffer": "2KB", "strict": True, "inner": inner}
    compiled = torch.compile(model, backend="getfuse", options=options, dynamic=False)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


class Same(nn.Module):
    """Padded as TensorFlow does it: by ceilings of quotients, in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, stride=2) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            height, width = x.shape[2:]
            above = max((math.ceil(height / 2) - 1) * 2 + 3 - height, 0)
            beside = max((math.ceil(width / 2) - 1) * 2 + 3 - width, 0)
            x = conv(nn.functional.pad(x, (beside, 0, above, 0))).relu()
        return x


def test_sizes_by_any_arithmetic() -> None:
    seen = []

    def inner(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append(gm)
        return gm.forward

    model = Same().eval()
    options = {"buffer": "8KB", "strict": True, "inner": inner}
    compiled = torch.compile(model, backend="getfuse", options=options, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 8, 40, 56), (3, 8, 33, 41), (2, 8, 56, 47)):
            x = torch.randn(shape)
            assert torch.equal(compiled(x), model(x))
    assert len(seen) >= 3
