"""Gradients that groups would add up in another order than the model are seen, and do not."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from texts import one_line
from torch import fx, nn

import torch_getfuse
from torch_getfuse.backend import compiler
from torch_getfuse.backend.split.gradient_order import moved_sums
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


def splitted(gm: fx.GraphModule, groups: Mapping[str, Sequence[fx.Node]]) -> fx.GraphModule:
    return split_graph_module(gm, list(groups.values()), list(groups))


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


def of_input(x: torch.Tensor) -> torch.Tensor:
    return x.tanh().square() + x.sigmoid() + x.sin()


def returned(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.exp()
    return y, y.tanh().square() + y.sigmoid() + y.sin()


def twice(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    return torch.dot(y, y).log() + y.sigmoid() + y.sin()


def second_name(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    z = y.contiguous()
    return y.tanh().square() + z.sigmoid() + z.sin()


def two(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    return y.tanh().square() + y.sigmoid()


@pytest.mark.parametrize(
    ("work", "kept", "moved", "name"),
    [
        (three, "exp tanh sigmoid sin", "exp sin sigmoid tanh", "y"),
        (of_input, "tanh sigmoid sin", "sin sigmoid tanh", "l_x_"),
        (returned, "exp tanh sigmoid sin", "exp sin sigmoid tanh", "y"),
        (twice, "exp dot sigmoid sin", "exp sin sigmoid dot", "y"),
        (second_name, "exp contiguous tanh sigmoid sin", "exp contiguous sin sigmoid tanh", "y"),
    ],
)
def test_a_sum_whose_readers_move_is_seen(
    work: Callable[..., Any], kept: str, moved: str, name: str
) -> None:
    x = make()
    gm = captured(work, x)
    right, expected = flat(work(x)), gradient(work, x)
    split = splitted(gm, children(gm, kept.split()))
    assert moved_sums(gm, split) == []
    assert torch.equal(gradient(split, x), expected)
    split = splitted(gm, children(gm, moved.split()))
    assert name in [value.name for value in moved_sums(gm, split)]
    assert torch.equal(flat(split(x)), right), "the results are the same"
    found = gradient(split, x)
    assert not torch.equal(found, expected), "the order of the sum is seen"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_two_gradients_may_swap() -> None:
    x = make()
    gm = captured(two, x)
    split = splitted(gm, children(gm, ["exp", "sigmoid", "tanh"]))
    assert moved_sums(gm, split) == []
    assert torch.equal(gradient(split, x), gradient(two, x))


def test_symbolic_sizes_have_no_gradients() -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        return (x.tanh() * n).reshape(n, 1).sum(1) / n

    x = make(10)
    gm = captured(work, x, dynamic=True)
    sizes = [n for n in gm.graph.nodes if isinstance(n.meta.get("example_value"), torch.SymInt)]
    assert max(len(size.users) for size in sizes) > 2
    split = splitted(gm, children(gm, ["truediv"]))
    assert not set(moved_sums(gm, split)) & set(sizes)


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
    split = splitted(gm, groups)
    assert moved_sums(gm, split) == []
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
    monkeypatch.setattr(
        compiler, "moved_sums", lambda gm, split: gm.graph.find_nodes(op="placeholder")
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
    assert "runs in the order of the model, not by groups" in one_line(
        torch_getfuse.report(compiled)
    )


class Branches(nn.Module):
    """Four readers of one map; the groups run the branches in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, k, padding=k // 2) for k in (1, 3, 5, 7))
        self.last = nn.Conv2d(32, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        return self.last(torch.cat([conv(y) for conv in self.convs], 1)).mean((2, 3))


@pytest.mark.parametrize("backward", ["auto", False, True])
def test_through_torch_compile(backward: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's order is kept, and a note says so; AOTAutograd keeps it with groups."""
    original = compiler.children_of

    def backwards(capture: Any, plan: Any) -> Mapping[str, Sequence[fx.Node]]:
        groups = original(capture, plan)
        convs = capture.graph_module.graph.find_nodes(op="call_function", target=torch.conv2d)
        if len(convs) != 6:
            return groups  # of the backward
        stem, *branches, _ = convs
        rest = [n for nodes in groups.values() for n in nodes if n not in convs[:-1]]
        named = {"stem": [stem], **{f"b{k}": [c] for k, c in enumerate(reversed(branches))}}
        return {**named, "rest": rest}

    monkeypatch.setattr(compiler, "children_of", backwards)
    torch.manual_seed(0)
    model = Branches()
    x = torch.randn(2, 3, 16, 16)
    options = {"strict": True, "inner": "eager", "backward": backward}
    compiled = torch.compile(model, backend="getfuse", options=options)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        y = run(x)
        flat(y).backward()
        results.append([y, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == 13
    assert all(map(torch.equal, *results))
    notes = [n for s in torch_getfuse.report(compiled).sections for n in s.notes]
    told = [n for n in notes if n.startswith("runs in the order of the model")]
    assert (
        told == []
        if backward is True
        else told
        == [
            "runs in the order of the model, not by groups, in which the gradients of y add up in "
            "another order"
        ]
    )


def test_a_parameter_that_is_read_outside_as_well() -> None:
    """A reader in the loss is the third: Dynamo returns a parameter beside the graph."""
    weight = nn.Parameter(torch.ones(1))

    def forward(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.where(x > 0, x, weight), weight.matmul(y.mul(2).t()), weight

    gm = captured(forward, torch.randn(4), torch.randn(4, 1))
    assert moved_sums(gm, splitted(gm, children(gm, ["mul", "t", "matmul"]))) != []
    assert moved_sums(gm, splitted(gm, children(gm, ["mul"]))) == []


def written_through_a_view(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y.squeeze_()
    crossed = y.swapaxes(2, 2)
    y.mT.add_(1)
    return crossed, torch.matmul(y, y.transpose(-1, -2))


def viewed_before(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    rows = y[:, 0]
    y.squeeze_()
    return rows * 3, y.sin(), y.cos(), y.tanh()


def only_read(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y.unsqueeze_(0)
    return y.sin(), y.cos(), y.tanh()


class ChangedInPlace(nn.Module):
    def __init__(self, rest: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.rest = rest

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.rest(self.norm(x))


@pytest.mark.parametrize("rest", [written_through_a_view, viewed_before, only_read])
def test_shapes_that_change_in_place(
    rest: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
) -> None:
    """A view in the place of a change has records of its own beside the other views."""
    options = {"strict": True, "cache": False, "inner": "eager"}
    for seed in range(3):
        torch.manual_seed(seed)
        model, x = ChangedInPlace(rest), torch.randn(2, 4, 6, 6)
        compiled = torch.compile(model, backend="getfuse", options=options)
        results = []
        for run in (model, compiled):
            model.zero_grad()
            sum(value.abs().double().square().mean() for value in run(x)).backward()
            results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(results[0]) == 2
        assert all(map(torch.equal, *results))
        notes = [n for s in torch_getfuse.report(compiled).sections for n in s.notes]
        told = any(n.startswith("runs in the order of the model") for n in notes)
        assert told is (rest is not only_read), notes


def test_an_input_that_changes_its_shape_in_place_changes_once() -> None:
    """Where the graph runs as the model's own, it changes its inputs itself."""

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.mul_(2)
        rows = y[0]
        y.transpose_(0, 1)
        return rows * 3, y.sin(), y.cos(), y.tanh()

    options = {"strict": True, "cache": False, "inner": "eager"}
    compiled = torch.compile(forward, backend="getfuse", options=options)
    found = []
    for run in (forward, compiled):
        x = make(12).view(3, 4).clone()
        results = run(x)
        sum(value.abs().square().mean() for value in results).backward()
        found.append([x, *results])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert found[1][0].shape == (4, 3)
    assert "runs in the order of the model" in one_line(torch_getfuse.report(compiled))


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs_in_random_orders(seed: int) -> None:
    """Every operator a group of its own, in any order: what is not seen is equal."""
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
    expected, right = gradient(work, x), work(x)
    nodes = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
    few = [draw.sample(nodes, count) for count in (len(nodes), 2, 2, 2, 2)]
    for front in few:
        order = [*front, *(node for node in nodes if node not in front)]
        split = splitted(gm, {f"g{k}": [node] for k, node in enumerate(order)})
        assert torch.equal(split(x)[0], right)
        if not moved_sums(gm, split):
            assert torch.equal(gradient(split, x), expected)
        else:
            torch.testing.assert_close(gradient(split, x), expected, rtol=1e-4, atol=1e-4)
