"""``torch._inductor.config.freezing`` with ``inner="auto"``: weights baked in, as by inductor."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn

import torch_getfuse
from torch_getfuse.backend.packed import fast
from torch_getfuse.backend.packed.program import FastProgram
from torch_getfuse.backend.packed.snapshots import Kept
from torch_getfuse.backend.packed.steps import build_steps

pytestmark = pytest.mark.fast_program

SAID = "weights are frozen (torch._inductor.config.freezing): not compared at calls"


class Net(nn.Module):
    """Convolutions of all kinds: linear ones, grouped, with a residual, on a computed weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 32, 1, bias=False)
        self.deep = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.back = nn.Conv2d(32, 16, 1)
        self.scale = nn.Parameter(torch.rand(16, 1, 1, 1) + 0.5)
        self.last = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        y = nn.functional.relu6(self.deep(nn.functional.relu6(self.wide(x))))
        x = x + self.back(y)
        return torch.conv2d(x, self.last.weight * self.scale, self.last.bias).relu()


def compiled(model: nn.Module, x: Tensor, freezing: bool, **settings: Any) -> Any:
    torch._dynamo.reset()
    options = {"method": "direct", "strict": True, "cache": False}
    run = torch.compile(model, backend="getfuse", options=options, **settings)
    with torch._inductor.config.patch(freezing=freezing), torch.no_grad():
        run(x)
    return run


def notes(model: Any) -> str:
    return " | ".join(n for s in torch_getfuse.report(model).sections for n in s.notes)


def close(ours: Tensor, eager: Tensor) -> None:
    assert ours.stride() == eager.stride()
    assert torch.allclose(ours, eager, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.usefixtures("always")
def test_frozen_weights_are_right_and_never_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Net().eval(), torch.randn(2, 4, 9, 9)
    run = compiled(model, x, freezing=True)
    assert SAID in notes(run)

    def never(*_: object) -> bool:
        raise AssertionError("a weight was compared")

    monkeypatch.setattr(Kept, "_hold", never)
    with torch.no_grad():
        close(run(x), model(x))
        other = torch.randn_like(x)
        close(run(other), model(other))


def test_a_write_is_seen_unless_weights_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_times", lambda *_: (0.001, 0.002))
    monkeypatch.setattr(fast, "_seen_faster", lambda *given: (given[3], []))
    for freezing in (False, True):
        model, x = Net().eval(), torch.randn(2, 4, 9, 9)
        run = compiled(model, x, freezing)
        assert (SAID in notes(run)) == freezing
        with torch.no_grad():
            before = model(x)
            model.wide.weight.data.mul_(2)
            assert not torch.allclose(model(x), before)
            close(run(x), before if freezing else model(x))


@pytest.mark.usefixtures("always")
def test_another_parameter_is_another_graph() -> None:
    """Dynamo guards which tensors the constants are."""
    model, x = Net().eval(), torch.randn(2, 4, 9, 9)
    run = compiled(model, x, freezing=True)
    model.wide.weight = nn.Parameter(model.wide.weight * 3)
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        close(run(x), model(x))


@pytest.mark.usefixtures("always")
def test_frozen_weights_that_are_not_finite() -> None:
    model, x = Net().eval(), torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        model.first.weight[0, 0, 0, 0] = float("nan")
        run = compiled(model, x, freezing=True)
        close(run(x), model(x))
    assert "infinities or NaN" in notes(run)


@pytest.mark.usefixtures("always")
def test_all_sizes_share_frozen_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Net().eval(), torch.randn(2, 4, 9, 11)
    programs: list[FastProgram] = []
    made = FastProgram.__init__

    def record(self: FastProgram, *args: Any, **given: Any) -> None:
        made(self, *args, **given)
        programs.append(self)

    monkeypatch.setattr(FastProgram, "__init__", record)
    run = compiled(model, x, freezing=True, dynamic=True)
    first = [w.constant for w in programs[-1]._weights if w and w.constant]
    larger = torch.randn(2, 4, 14, 18)
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        for _ in range(4):
            close(run(larger), model(larger))
    assert len(torch_getfuse.report(run).sections) == 1
    assert SAID in notes(run)
    second = [w.constant for w in programs[-1]._weights if w and w.constant]
    assert len(first) == 4
    assert all(one is other for one, other in zip(first, second, strict=True))


def test_a_program_lets_go_of_maps_that_nothing_reads() -> None:
    """Of both forms of a map: the flat one and the one that it is a view of."""
    found: list[Any] = []
    torch._dynamo.reset()

    def backend(gm: Any, inputs: Any) -> Any:
        found.append((gm, inputs))
        return gm.forward

    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Softplus(), nn.Softplus()
    ).eval()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=False)(torch.randn(1, 4, 9, 9))
        (gm, inputs), held = found[0], []

        def softplus(value: Tensor) -> Tensor:
            local = inspect.currentframe().f_back.f_locals  # type: ignore[union-attr]
            held.append({v.data_ptr() for name, v in local.items() if name[0] in "mf"})
            assert held[-1] == {value.data_ptr()}
            return nn.functional.softplus(value)

        steps = build_steps(gm)
        assert len(steps) == 5
        steps[-2:] = [replace(step, whole=softplus) for step in steps[-2:]]
        close(FastProgram(gm, steps, [], 1)(*inputs)[0], gm(*inputs)[0])
    assert len(held) == 2
