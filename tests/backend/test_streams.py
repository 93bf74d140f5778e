"""Signals, volumes and tokens: their rows, what the cost models say of them, and counted runs."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_getfuse
from tests.backend.test_depth_first import check
from tests.cascade_both import assert_step, model_of, random_around, random_buffer, random_step
from tests.cascade_simulator import Cascade as Oracle
from tests.graphs import random_group
from tests.simulator import Simulator
from torch_getfuse.backend.capture.capture import capture_model
from torch_getfuse.backend.rules.view_windows import Atom, Layout
from torch_getfuse.partition.cost.lbdf.model import Lbdf


class Signal(nn.Module):
    """Strided, dilated and depthwise convolutions, a skip, a norm by tokens, a way back up."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(1, 6, 5, 2, 2), nn.Conv1d(6, 6, 3, padding=4, dilation=4)
        self.c, self.norm = nn.Conv1d(6, 6, 3, padding=1, groups=6), nn.LayerNorm(6)
        self.up = nn.ConvTranspose1d(6, 2, 4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.a(x[:, None]))
        z = y + F.gelu(self.c(self.b(y)))
        found: torch.Tensor = self.up(self.norm(z.transpose(1, 2)).transpose(1, 2))
        return found


class Volume(nn.Module):
    """A residual block of a video network and a pool of it, whole at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(2, 4, 3, (1, 2, 2), 1), nn.Conv3d(4, 4, 3, padding=1)
        self.norm, self.down = nn.BatchNorm3d(4), nn.Conv3d(4, 4, 1, 2)
        self.pool, self.fc = nn.MaxPool3d(3, 2, 1), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.a(x))
        z = F.relu(self.pool(self.norm(self.b(y))) + self.down(y))
        found: torch.Tensor = self.fc(F.adaptive_avg_pool3d(z, 1).flatten(1))
        return found


class Tokens(nn.Module):
    """Patches, a class token, a block with separate queries, keys and values, and a map again."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 8, 2, 2), nn.Parameter(torch.randn(1, 1, 8))
        self.norm, self.q, self.k, self.v = nn.LayerNorm(8), *(nn.Linear(8, 8) for _ in range(3))
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.conv = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1)
        y = self.norm(x)
        q, k, v = (f(y).unflatten(2, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.mlp(x)
        found: torch.Tensor = self.conv(x[:, 1:].transpose(1, 2).unflatten(2, (5, 4)))
        return found


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "signal": (Signal, (40,)),
    "depth": (Volume, (2, 9, 6, 5)),
    "height": (Volume, (2, 4, 12, 6)),
    "tokens": (Tokens, (3, 10, 8)),
}


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    return build().eval(), torch.randn(1, *shape)


@pytest.mark.parametrize("name", MODELS)
def test_everything_streams(name: str) -> None:
    """Nothing but keys and values, and what is pooled, is needed as a whole."""
    graph = capture_model(*(lambda m, x: (m, (x,)))(*built(name))).graph
    axes = {"signal": {1, 2}, "depth": {2}, "height": {3}, "tokens": {1, 2}}[name]
    streams = {t.stream_axis for t in graph.tensors.values() if len(t.shape) > 2 or t.rows > 1}
    assert streams == axes
    whole = [(op.kind, r.tensor) for op in graph for r in op.reads if r.window.kind == "whole"]
    wanted = [("scaled_dot_product_attention", kind) for kind in ("k", "v")]
    assert whole == (wanted if name == "tokens" else [])


@pytest.mark.parametrize("name", MODELS)
def test_lbdf_holds_what_its_schedule_holds(name: str) -> None:
    model, x = built(name)
    graph, rng = capture_model(model, (x,)).graph, Random(name)
    for granularity in ("line", "pixel"):
        lbdf = Lbdf(graph, granularity, 1, 1)
        for _ in range(25):
            mask = random_group(rng, graph)
            expected = Simulator(graph, mask, granularity == "pixel").buffer_bytes()
            assert lbdf.buffer(mask) == expected
            assert lbdf.floor(mask) <= expected


@pytest.mark.parametrize("name", MODELS)
def test_cascade_prices_what_its_steps_move(name: str) -> None:
    model, x = built(name)
    oracle, rng = Oracle(capture_model(model, (x,)).graph, 1), Random(name)
    cascade = model_of(oracle)
    for _ in range(10):
        mask = random_step(rng, oracle.graph, rng.choice((1, 3)))
        around = random_around(rng, oracle, mask)
        oracle.buffer_bytes = random_buffer(rng, oracle, mask, around)
        assert_step(oracle, cascade, mask, around)


@pytest.mark.parametrize("scheme", ["lbdf", "cascade"])
@pytest.mark.parametrize("name", MODELS)
def test_counted_runs(name: str, scheme: str) -> None:
    model, x = built(name)
    if scheme == "lbdf":
        for buffer in ("2KB", "1MB"):
            check(model, [x], buffer=buffer)
        return
    plan = torch_getfuse.plan(
        model, (x,), buffer="2KB", activation_bytes=1, weight_bytes=1, scheme=scheme, cache=False
    )
    got, ledger = torch_getfuse.run_counted(model, (x,), plan)
    assert [group.fallback for group in ledger.groups if group.fallback] == []
    assert ledger.agrees
    with torch.no_grad():
        assert torch.allclose(got, model(x), atol=1e-5)


def test_channels_are_where_the_operator_has_them() -> None:
    """Not on the last axis, which is that of rows of a signal."""
    for name, first in (("signal", 6), ("height", 4), ("tokens", 8)):
        model, x = built(name)
        graph = capture_model(model, (x,)).graph
        assert graph.channels(graph.ops[0]) == first
        assert type(graph).from_dict(graph.to_dict()) == graph


@pytest.mark.parametrize("inner", [1, 3])
def test_a_view_without_its_batch(inner: int) -> None:
    """Views of an axis with two outer, five samples and some inner positions."""
    base = Layout.of((2 * 5 * inner, 4))
    assert base.without_batch(0, inner, 5).axes == (
        (Atom(0, 2 * inner),),
        (Atom(1, 4),),
    )
    apart = base.reshape((2, 5, inner, 4)).without_batch(0, inner, 5)
    assert apart.shape == (2, 1, inner, 4)
    assert apart.axes[0] == (Atom(0, 2, inner),)
