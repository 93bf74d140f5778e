"""Gradients add up in the model's order, whatever order the groups run in."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import torch_getfuse
from torch_getfuse.backend import compiler
from torch_getfuse.backend.split.gradient_order import (
    branch_point,
    moved_sums,
    split_in_gradient_order,
)
from torch_getfuse.backend.split.submodules import split_graph_module


def captured(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> fx.GraphModule:
    """The graph that Dynamo gives a backend."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch.compile(function, backend=keep, dynamic=dynamic, fullgraph=True)(*args)
    return graphs[0]


def children(gm: fx.GraphModule, order: Sequence[str]) -> dict[str, list[fx.Node]]:
    """A child for each of these functions, in this order, and for whatever is left."""
    nodes = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
    named = {n: getattr(n.target, "__name__", str(n.target)) for n in nodes}
    found = {f"{name}_group": [n for n in nodes if named[n] == name] for name in order}
    assert all(found.values()), named.values()
    found["rest"] = [n for n in nodes if named[n] not in order]
    return {name: nodes for name, nodes in found.items() if nodes}


def gradient(function: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(flat(function(x)), x)
    return found


def flat(value: Any) -> torch.Tensor:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return torch.stack([v.square().sum() for v in values]).sum()


def make(size: int = 1000) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(size, requires_grad=True)


def three(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    return y.tanh().square() + y.sigmoid() + y.sin()


def test_a_moved_reader_of_three_is_seen_and_its_gradient_kept() -> None:
    x = make()
    gm = captured(three, x)
    kept = children(gm, ["exp", "tanh", "sigmoid", "sin"])
    moved = children(gm, ["exp", "sin", "sigmoid", "tanh"])
    assert moved_sums(gm, split_graph_module(gm, list(kept.values()), list(kept))) == []
    plain = split_graph_module(gm, list(moved.values()), list(moved))
    (value,) = moved_sums(gm, plain)
    assert value.name == "y"
    expected = gradient(three, x)
    assert not torch.equal(gradient(plain, x), expected), "the order of the sum is seen"
    split, why = split_in_gradient_order(gm, moved)
    assert why == ""
    assert torch.equal(gradient(split, x), expected)
    assert list(dict(split.named_children()))[:4] == list(moved)[:4], "in the order of the plan"
    # The graph that was given is as it was.
    assert all(node.target is not branch_point for node in gm.graph.nodes)


def test_an_input_with_three_readers() -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        return x.tanh().square() + x.sigmoid() + x.sin()

    x = make()
    gm = captured(work, x)
    split, why = split_in_gradient_order(gm, children(gm, ["sin", "sigmoid", "tanh"]))
    assert why == ""
    assert torch.equal(gradient(split, x), gradient(work, x))


def test_symbolic_sizes_have_no_gradients() -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        return (x.tanh() * n).reshape(n, 1).sum(1) / n

    x = make(10)
    gm = captured(work, x, dynamic=True)
    sizes = [n for n in gm.graph.nodes if isinstance(n.meta.get("example_value"), torch.SymInt)]
    assert max(len(size.users) for size in sizes) > 2
    groups = children(gm, ["truediv"])
    split = split_graph_module(gm, list(groups.values()), list(groups))
    for node in gm.graph.nodes:  # as if every reader had moved
        assert node not in moved_sums(gm, split) or node not in sizes


def returned(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.exp()
    return y, y.tanh().square() + y.sigmoid() + y.sin()


def in_place(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    z = y.tanh().square() + y.sigmoid() + y.sin()
    return y.add_(1) + z


def twice(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    return torch.dot(y, y).tanh() + y.sigmoid() + y.sin()


def second_name(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    z = y.contiguous()
    return y.tanh().square() + z.sigmoid() + z.sin()


@pytest.mark.parametrize(
    ("work", "order", "why"),
    [
        (returned, ["exp", "sin", "sigmoid", "tanh"], "it is returned as well"),
        (in_place, ["exp", "sin", "sigmoid", "tanh"], "it is changed in place"),
        (twice, ["exp", "sin", "sigmoid", "dot"], "an operator reads it twice"),
        (second_name, ["exp", "contiguous", "sin", "sigmoid", "tanh"], "it may have a second name"),
    ],
)
def test_what_cannot_have_aliases_says_why(
    work: Callable[..., Any], order: Sequence[str], why: str
) -> None:
    x = make()
    gm = captured(work, x)
    split, reason = split_in_gradient_order(gm, children(gm, order))
    assert reason.startswith("the gradients of ")
    assert reason.endswith(f"add up in another order: {why}")
    for ours, theirs in zip(split(x), [work(x)] if work is not returned else work(x)):
        assert torch.equal(ours, theirs)


def test_a_weight_with_three_readers_has_no_aliases() -> None:
    weight = nn.Parameter(torch.randn(1000))

    def work(x: torch.Tensor) -> torch.Tensor:
        return torch.maximum(x, weight) + torch.hypot(x, weight) + torch.atan2(x, weight)

    gm = captured(work, make())
    groups = children(gm, ["atan2", "hypot", "maximum"])
    _, why = split_in_gradient_order(gm, groups)
    assert why.endswith("autocast may keep one copy of it for all")


def without_gradient(x: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, ...]:
    z, y = x.sin(), other.exp()
    return z + y.tanh(), y.sigmoid(), y.cos()


def unused(x: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x.exp()
    y.tanh().square()
    return y.sigmoid() * other, y.sin()


@pytest.mark.parametrize("work", [without_gradient, unused])
def test_what_no_gradient_comes_from_may_move(work: Callable[..., Any]) -> None:
    x, other = make(), torch.ones(1000)
    gm = captured(work, x, other)
    groups = children(gm, ["exp", "sin", "sigmoid", "tanh"])
    assert "sigmoid" in gm.code.partition("tanh")[2], "the groups turn them round"
    split, why = split_in_gradient_order(gm, groups)
    assert (moved_sums(gm, split), why) == ([], "")
    got, expected = (gradient(lambda x, f=f: f(x, other), x) for f in (split, work))
    assert torch.equal(got, expected)


class Kept(nn.Module):
    """What AOTAutograd differentiates in other steps, and random numbers that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = F.conv2d(x, self.weight)
        mixed = torch.lerp(y, y.transpose(0, 3), 0.25)
        F.dropout(y, 0.5)
        return mixed, y, y.flatten(1), F.interpolate(y, scale_factor=2.0, mode="bilinear")


def test_gradients_that_cannot_move_are_eager_s_and_so_is_the_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = compiler.split_in_gradient_order
    monkeypatch.setattr(
        compiler, "split_in_gradient_order", lambda *args: (original(*args)[0], "they moved")
    )
    torch.manual_seed(0)
    model, x = Kept(), torch.randn(1, 4, 8, 8)
    compiled = torch.compile(model, backend="getfuse", options={"strict": True, "cache": False})
    results = []
    for run in (model, compiled):
        model.zero_grad()
        torch.manual_seed(1)
        sum(value.abs().double().square().mean() for value in run(x)).backward()
        results.append((model.weight.grad.clone(), torch.get_rng_state()))
    assert all(map(torch.equal, *results))
    assert "runs in the order of the model, not by groups" in str(torch_getfuse.report(compiled))


def test_readers_that_give_no_gradient_are_left_out() -> None:
    x = make()
    first, _, third = branch_point(x * 2, 3)
    (got,) = torch.autograd.grad((first * 3 + third).sum(), x)
    assert torch.equal(got, torch.full_like(x, 8))
    unused = branch_point(x.detach(), 2)
    assert not unused[0].requires_grad
    functional = torch.func.grad(lambda v: torch.stack(branch_point(v, 2)).sum())(x)
    assert torch.equal(functional, torch.full_like(x, 2))


class Branches(nn.Module):
    """Four readers of one map; the groups run the branches in another order."""

    def __init__(self, also: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, k, padding=k // 2) for k in (1, 3, 5, 7))
        self.last = nn.Conv2d(32, 8, 1)
        self.also = also

    def forward(self, x: torch.Tensor) -> Any:
        y = self.stem(x)
        z = self.last(torch.cat([conv(y) for conv in self.convs], 1)).mean((2, 3))
        return (y, z) if self.also else z


@pytest.mark.parametrize("also", [False, True])
def test_through_torch_compile(also: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With aliases groups may run in any order; where they cannot be, the model's order stays."""
    seen = []
    original = compiler.split_in_gradient_order

    def backwards(gm: fx.GraphModule, groups: dict[str, list[fx.Node]]) -> Any:
        convs = [n for n in gm.graph.nodes if n.target is torch.conv2d]
        stem, *branches, _ = convs
        rest = [n for nodes in groups.values() for n in nodes if n not in convs[:-1]]
        named = {"stem": [stem], **{f"b{k}": [c] for k, c in enumerate(reversed(branches))}}
        seen.append(original(gm, {**named, "rest": rest}))
        return seen[-1]

    monkeypatch.setattr(compiler, "split_in_gradient_order", backwards)
    torch.manual_seed(0)
    model = Branches(also)
    x = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, backend="getfuse", options={"strict": True})
    results = []
    for run in (model, compiled):
        model.zero_grad()
        flat(run(x)).backward()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == 12
    assert all(map(torch.equal, *results))
    assert bool(seen[0][1]) == also
    notes = [note for s in torch_getfuse.report(compiled).sections for note in s.notes]
    assert any("not by groups, in which the gradients of" in n for n in notes) == also


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs_in_random_orders(seed: int) -> None:
    """Every operator a group of its own, in any order that the graph allows."""
    draw = random.Random(seed)
    unary = (torch.tanh, torch.sigmoid, torch.sin, torch.cos, torch.atan, torch.erf)

    # Each step reads two of the last five values; drawn here, for Dynamo would trace the drawing.
    steps = [
        (draw.randrange(max(0, k - 5), k), draw.randrange(max(0, k - 5), k), draw.choice(unary))
        for k in range(2, 16)
    ]

    def work(x: torch.Tensor) -> torch.Tensor:
        values = [x.sin(), x.cos()]
        for a, b, function in steps:
            values.append(function(values[a]) + values[b])
        return torch.stack(values[-3:]).sum(0)

    x = make(500)
    gm = captured(work, x)
    nodes = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
    draw.shuffle(nodes)
    groups = {f"g{k}": [node] for k, node in enumerate(nodes)}
    split, why = split_in_gradient_order(gm, groups)
    assert torch.equal(split(x)[0], work(x))
    if not why:
        assert torch.equal(gradient(split, x), gradient(work, x))
        if moved_sums(gm, split_graph_module(gm, list(groups.values()), list(groups))):
            targets = [n.target for child in split.children() for n in child.graph.nodes]  # type: ignore[union-attr]
            assert branch_point in targets
