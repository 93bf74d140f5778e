"""Weights that take the type or the shape of a feature: the feature's values are not read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torch_getfuse


class Cast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.arange(4.0))
        self.conv = nn.Conv2d(4, 4, 1, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv(x), self.scale.expand(2, 4).type_as(x)


@pytest.mark.parametrize("inner", ["eager", "depth_first"])
def test_a_buffer_takes_the_type_of_an_input(inner: str) -> None:
    """Found by the fuzzer (seed 2831): the backend raised AttributeError."""
    torch.manual_seed(0)
    model, x = Cast().eval(), torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)
    options = {"inner": inner, "strict": True, "cache": False}
    compiled = torch.compile(model, backend="getfuse", options=options)
    with torch.no_grad():
        got, expected = compiled(x), model(x)
    assert got[1].dtype == torch.bfloat16
    assert all(map(torch.equal, got, expected))
    plan = torch_getfuse.plan(model, (x,), buffer="64KB")
    plan.verify()
    assert any("conv" in group.ops for group in plan.groups)


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(3.0))
        self.register_buffer("row", torch.arange(8.0))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        part = self.scale.expand_as(x)[:, 1:]
        column = self.row.expand_as(x).mT.select(3, 0)
        return part, column, x.relu() + self.row.view_as(x[0, 0, 0])


@pytest.mark.parametrize("inner", ["eager", "auto", "depth_first"])
def test_a_part_of_a_buffer_that_takes_the_shape_of_an_input(inner: str) -> None:
    torch.manual_seed(0)
    model, x = Expanded().eval(), torch.randn(1, 4, 8, 8)
    compiled = torch.compile(
        model, backend="getfuse", options={"inner": inner, "strict": True, "cache": False}
    )
    with torch.no_grad():
        assert all(map(torch.equal, compiled(x), model(x)))
