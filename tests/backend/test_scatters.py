"""Scatters to axes of size one: what they are replaced by gives the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
from torch import fx, nn
from torch._inductor import config
from torch.fx.experimental.proxy_tensor import make_fx

from torch_getfuse.backend.inner.compile_groups import compile_child, find_inner
from torch_getfuse.backend.inner.inductor_patches import mended
from torch_getfuse.backend.inner.inductor_patches.scatters import sum_scatters

Indices = Sequence[torch.Tensor | None]


def scatter(shape: Sequence[int], values: torch.Tensor, indices: Indices) -> fx.GraphModule:
    """``index_put`` of values to random numbers of ``shape``, with accumulation."""

    def call(x: torch.Tensor, values: torch.Tensor, *some: torch.Tensor) -> torch.Tensor:
        rest = iter(some)
        where = [None if index is None else next(rest) for index in indices]
        return torch.ops.aten.index_put.default(x, where, values, True)

    some = [index for index in indices if index is not None]
    return make_fx(call, tracing_mode="fake")(torch.randn(*shape), values, *some)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("shape", "values", "indices"),
    [
        ((2, 3, 1, 1), (2, 3, 4, 5), (None, None, zeros(4, 1), zeros(5))),
        ((1, 3), (4, 3), (zeros(4),)),
        ((1, 3), (3,), (zeros(),)),
        ((1, 3, 1), (4, 3), (zeros(4), None, zeros(4))),  # apart: the indices' axis comes first
        ((2, 1, 3), (2, 1, 3), (None, zeros(1))),
        ((1, 1), (6,), (zeros(6), zeros(6))),
    ],
)
def test_a_scatter_to_one_place_is_a_sum(
    shape: Sequence[int], values: Sequence[int], indices: Indices
) -> None:
    graph = scatter(shape, torch.randn(*values), indices)
    inputs = torch.randn(*shape), torch.randn(*values), *(i for i in indices if i is not None)
    expected = graph(*inputs)
    assert sum_scatters(graph) == 1
    assert "index_put" not in graph.code
    torch.testing.assert_close(graph(*inputs), expected)


@pytest.mark.parametrize(
    ("shape", "values", "indices"),
    [
        ((2, 3), (4, 3), (zeros(4),)),  # two places
        ((1, 3), (1, 3), (zeros(4),)),  # values are spread over the indices
        ((1, 3), (4, 1), (zeros(4),)),  # and over an axis that is kept
        ((1, 3), (1, 3), (torch.ones(1, dtype=torch.bool),)),  # a mask
    ],
)
def test_other_scatters_stay(shape: Sequence[int], values: Sequence[int], indices: Indices) -> None:
    graph = scatter(shape, torch.randn(*values), indices)
    code = graph.code
    assert sum_scatters(graph) == 0
    assert graph.code == code


def test_without_accumulation_the_last_value_stays() -> None:
    graph = make_fx(
        lambda x, v, i: torch.ops.aten.index_put.default(x, [i], v, False), tracing_mode="fake"
    )(torch.randn(1, 3), torch.randn(4, 3), zeros(4))
    assert sum_scatters(graph) == 0


def test_inductor_gets_no_such_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def compile_one(gm: fx.GraphModule, example_inputs: Any, **settings: Any) -> Any:
        seen.append(gm.code)
        return make_boxed_func(gm.forward)  # instead of C++, which takes half a minute

    monkeypatch.setattr(mended, "inductor_compile", compile_one)
    child = scatter((1, 3), torch.randn(4, 3), (zeros(4),))
    backend = find_inner("inductor")
    assert backend is not None
    with config.patch(force_disable_caches=True):  # a graph from the cache is not compiled
        compiled = compile_child(child, backend)
    (code,) = seen
    assert "index_put" not in code
    inputs = torch.randn(1, 3), torch.randn(4, 3), zeros(4)
    torch.testing.assert_close(compiled(*inputs), child(*inputs))
    assert "index_put" in child.code, "other backends get the graph as it is"


class Pooled(nn.Module):
    """A branch through a 1x1 map and back, as DeepLab's image pooling, beside another."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = self.block(32)
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), *self.block(32))
        self.both = self.block(64)
        self.last = nn.Conv2d(32, 32, 3, padding=1)

    def block(self, channels: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = nn.functional.interpolate(self.pooled(x), size=x.shape[-2:], mode="bilinear")
        return self.last(self.both(torch.cat([self.beside(x), up], 1)))


def test_gradients_of_image_pooling_with_inductor() -> None:
    """They were zero: inductor read the gradient of the 1x1 map before it was written."""
    torch.manual_seed(0)
    model = Pooled().eval()
    other = copy.deepcopy(model)
    x = torch.randn(2, 32, 4, 4)
    compiled = torch.compile(
        other, backend="getfuse", options={"inner": "inductor", "strict": True}
    )
    model(x).square().mean().backward()
    compiled(x).square().mean().backward()
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-9)
