"""Results of compiled groups have the strides of the trace, whatever the compiler returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import torch_getfuse
from torch_getfuse.backend.inner.compile_groups import compile_child

Results = tuple[torch.Tensor, ...]


def packing(gm: fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., Any]:
    """A compiler whose results have no gaps, and axes in their plain order."""
    return lambda *args: tuple(t.contiguous().clone() for t in gm(*args))


def traced(function: Callable[..., Results], x: torch.Tensor, mode: str) -> fx.GraphModule:
    child = make_fx(function, tracing_mode=mode)(x)
    output = child.graph.output_node()
    output.args = (tuple(output.args[0]),)
    child.recompile()
    return child


def views(x: torch.Tensor) -> Results:
    first, second = x.chunk(2, 1)
    return (
        first, second.transpose(2, 3), second[:, :, ::2], x.permute(0, 2, 3, 1), x + 1,
        x.mean(1, keepdim=True).expand(-1, 6, -1, -1), x[:1], x.flatten(2),
    )  # fmt: skip


def strides_that_count(t: torch.Tensor) -> list[int]:
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_strides_are_those_of_the_trace(mode: str) -> None:
    x = torch.randn(2, 4, 6, 8)
    child = traced(views, x, mode)
    compiled = compile_child(child, packing)
    for size in [x.shape] if mode == "fake" else [x.shape, (3, 4, 10, 8), (3, 4, 7, 5), x.shape]:
        x = torch.randn(size)
        ours, theirs = compiled(x), child(x)
        assert isinstance(ours, tuple)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
            assert strides_that_count(a) == strides_that_count(b)


def test_results_in_the_right_layout_are_not_copied() -> None:
    child = traced(views, torch.randn(2, 4, 6, 8), "symbolic")
    results: list[Results] = []

    def keeping(gm: fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., Any]:
        return lambda *args: results.append(gm(*args)) or results[-1]

    ours = compile_child(child, keeping)(torch.randn(2, 4, 6, 8))
    assert all(a is b for a, b in zip(ours, results[-1], strict=True))


def test_a_result_that_is_no_tensor_and_one_that_overlaps_stay() -> None:
    def function(x: torch.Tensor) -> Any:
        return x.unfold(0, 3, 1), x.shape[0]

    child = traced(function, torch.randn(5), "symbolic")
    compiled = compile_child(child, lambda gm, _: lambda x: (gm(x)[0].contiguous(), gm(x)[1]))
    windows, size = compiled(torch.arange(7.0))
    assert size == 7
    assert windows.stride() == (3, 1)
    assert torch.equal(windows, torch.arange(7.0).unfold(0, 3, 1))


def test_gradients_flow_through_a_copied_result() -> None:
    child = traced(lambda x: (x.chunk(2, 1)[1],), torch.randn(2, 4, 3), "fake")
    x = torch.randn(2, 4, 3, requires_grad=True)
    (y,) = compile_child(child, packing)(x)
    assert y.stride() == (12, 3, 1)
    y.sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 0, 1, 1])[None, :, None].expand(2, 4, 3))


def test_groups_get_the_strides_that_they_are_compiled_for() -> None:
    found = []

    def inner(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        tensors = {i: x.stride() for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)}
        packed = packing(gm, inputs)

        def run(*args: Any) -> Any:
            found.extend(args[i].stride() == strides for i, strides in tensors.items())
            return packed(*args)

        return run

    model = Shuffled().eval()
    options = {"inner": inner, "buffer": "3KB", "strict": True}
    compiled = torch.compile(model, backend="getfuse", options=options)
    x = torch.randn(2, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    assert len(torch_getfuse.report(compiled).sections[0].plan.groups) > 1
    assert found
    assert all(found)


class Shuffled(nn.Module):
    """Half the channels of a map pass a convolution, and the halves are mixed: as ShuffleNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 4, 3, 2, 1)
        self.wide = nn.Conv2d(4, 8, 1)
        self.side = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(self.down(self.down(x)))
        for _ in range(2):
            first, second = x.chunk(2, 1)
            x = torch.cat([first, self.side(second)], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w)
        return x


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_trains_on_halves_of_a_map(dynamic: bool) -> None:
    """The backward refused the half that the forward had kept for it: it came without its gaps.

    With dynamic shapes inductor failed before that, at the order of strides N and N**2
    (``backend/inner/inductor_patches/strides.py``).
    """
    torch.manual_seed(0)
    model = Shuffled()
    other = copy.deepcopy(model)
    options = {"inner": "inductor", "strict": True}
    compiled = torch.compile(other, backend="getfuse", options=options, dynamic=dynamic)
    for size in (64, 96) if dynamic else (64,):
        x = torch.randn(2, 4, size, size)
        gradients = []
        for run, owner in ((compiled, other), (model, model)):
            input_ = x.clone().requires_grad_()
            run(input_).square().sum().backward()
            gradients.append([input_.grad, *(p.grad for p in owner.parameters())])
        torch.testing.assert_close(*gradients)
