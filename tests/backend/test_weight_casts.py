"""Weights that are made another type as a feature has it: the feature's values are not read."""

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
