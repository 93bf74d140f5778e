"""inner=: each fusion group compiled on its own, by name or callable, and what the report tells."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed, TensorifyScalarRestartAnalysis
from torch._subclasses.fake_tensor import FakeTensor

import torch_getfuse
from torch_getfuse.errors import OptionError


class Net(nn.Module):
    """Two convolutions, one in place, a skip, and a linear that fits no small buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.a(x)).relu_()
        y = torch.relu_(self.b(y) + y)
        return self.head(y.mean((2, 3)))


def compiled_net(backend: object, **options: object) -> tuple[nn.Module, Callable[..., Any]]:
    torch.manual_seed(0)
    model = Net().eval()
    settings = {"buffer": "2KB", "strict": True, "inner": backend, **options}
    return model, torch.compile(model, backend="getfuse", options=settings)


X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def notes(compiled: object) -> list[str]:
    return [note for s in torch_getfuse.report(compiled).sections for note in s.notes]


@pytest.mark.parametrize(
    ("name", "said"),
    [("eager", []), ("auto", ["inner auto: runs by FX nodes: the call is recorded for gradients"])],
)
def test_fx_nodes_give_every_bit_and_auto_says_why_it_runs_them(name: str, said: list[str]) -> None:
    model, compiled = compiled_net(name)
    assert torch.equal(compiled(X), model(X))
    assert notes(compiled) == said


def test_a_callable_gets_each_group_with_fake_inputs_and_a_tuple_to_return() -> None:
    seen: list[tuple[fx.GraphModule, Sequence[object]]] = []

    def record(gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        seen.append((gm, inputs))
        return gm.forward

    model, compiled = compiled_net(record)
    with torch.no_grad():
        assert torch.equal(compiled(X), model(X))
    plan = torch_getfuse.report(compiled).sections[0].plan
    assert len(seen) == len(plan.groups) + len(plan.unfusable) >= 3
    assert plan.unfusable
    for gm, inputs in seen:
        assert all(isinstance(value, FakeTensor) for value in inputs)
        assert isinstance(gm.graph.output_node().args[0], tuple)
        assert not list(gm.parameters()), "weights stay inputs"
    assert f"inner record: {len(seen)} of {len(seen)} groups compiled in" in notes(compiled)[0]


def test_a_compiled_group_bakes_no_weights_in() -> None:
    model, compiled = compiled_net("aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(X), model(X))
        model.a.weight.mul_(2)  # type: ignore[operator, union-attr]
        model.b.weight = nn.Parameter(torch.ones_like(model.b.weight))  # type: ignore[union-attr, arg-type]
        assert torch.equal(compiled(X), model(X))
        second = Net().eval()
        again = torch.compile(
            second,
            backend="getfuse",
            options={"buffer": "2KB", "strict": True, "inner": "aot_eager"},
        )
        assert torch.equal(again(X), second(X))


def failing(gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
    if any(node.target is torch.conv2d for node in gm.graph.nodes):
        raise RuntimeError("no convolution here\nand more")
    return gm.forward


def test_a_group_that_fails_stays_eager_and_is_warned_of_once() -> None:
    model, compiled = compiled_net(failing, strict=False)
    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"fusion_group_0 runs eager: inner failing failed: "):
            got = compiled(X)
        assert torch.equal(got, model(X))
        told = notes(compiled)
        assert any("RuntimeError: no convolution here" in note for note in told)
        assert "and more" not in str(told)
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            compiled_net(failing, strict=False)[1](X)


def test_strict_raises_what_a_group_raised() -> None:
    _, compiled = compiled_net(failing)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="no convolution here"):
        compiled(X)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (lambda results: results[0], "returned a Tensor; it must return a tuple of 1"),
        (lambda results: (*results, 1), "returned a tuple of 2; it must return a tuple of 1"),
        (lambda results: None, "returned a NoneType; it must return a tuple of 1"),
    ],
)
def test_results_other_than_a_tuple_of_the_groups_are_refused(
    wrong: Callable[..., object], found: str
) -> None:
    """A bare tensor would be indexed in silence: its first image for the batch."""

    def inner(gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        return lambda *args: wrong(gm(*args))

    _, compiled = compiled_net(inner, strict=False)
    with torch.no_grad(), pytest.raises(OptionError, match=f"fusion_group_0 {found}"):
        compiled(X)


def test_a_backend_that_returns_no_callable_is_refused() -> None:
    _, compiled = compiled_net(lambda gm, inputs: 3)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="returned a int for fusion_"):
        compiled(X)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inducter", "did you mean 'inductor'"),
        ("getfuse", "inner='getfuse' is not a backend"),
        (3, "inner=3 is not 'auto'"),
    ],
)
def test_wrong_names_are_refused(name: object, message: str) -> None:
    _, compiled = compiled_net(name)
    with pytest.raises(BackendCompilerFailed, match=message):
        compiled(X)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_inductor(train: bool) -> None:
    model, compiled = compiled_net("inductor", buffer="8KB")
    model.train(train)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        model.norm.reset_running_stats()  # type: ignore[operator, union-attr]
        with torch.set_grad_enabled(train):
            y = run(X)
        if train:
            y.square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((y.detach(), *grads, model.norm.running_var.clone()))  # type: ignore[operator, union-attr]
    assert len(results[0]) == (10 if train else 2)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    assert any("inner inductor" in note for note in notes(compiled))
    assert all("failed" not in note for note in notes(compiled))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_restart_that_a_group_asks_for_reaches_dynamo(training: bool, strict: bool) -> None:
    """Inductor asks for it where a symbolic float must be a number; it is no failure."""
    asked: list[fx.GraphModule] = []

    def inner(gm: fx.GraphModule, example_inputs: Sequence[object]) -> fx.GraphModule:
        asked.append(gm)
        if len(asked) == 1:
            raise TensorifyScalarRestartAnalysis
        return gm

    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()).train(training)
    compiled = torch.compile(
        model, backend="getfuse", options={"inner": inner, "strict": strict, "cache": False}
    )
    x = torch.randn(1, 2, 8, 8, requires_grad=training)
    with warnings.catch_warnings(), torch.set_grad_enabled(training):
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Guards may run slower")  # on Python 3.13.0
        assert torch.equal(compiled(x), model(x))
    assert len(asked) > 1
    assert not torch_getfuse.report(compiled).unplanned
