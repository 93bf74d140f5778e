"""A split graph computes what the graph did, bit for bit, and says so where it cannot."""

from __future__ import annotations

import copy
import itertools
import operator
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from torch_getfuse.backend.fx_nodes.autocast import is_switch
from torch_getfuse.backend.split.submodules import split_graph_module
from torch_getfuse.errors import PlanError
from torch_getfuse.models import calibrate_batch_norm, load_model


def dynamo_graph(model: Callable[..., Any], *inputs: torch.Tensor) -> tuple[fx.GraphModule, list]:
    """The graph that a backend receives, and its real inputs (parameters among them)."""
    torch._dynamo.reset()
    saved = []

    def record(gm: fx.GraphModule, example: list) -> Callable[..., Any]:
        saved.append((gm, list(example)))
        return gm.forward

    torch.compile(model, backend=record)(*inputs)
    assert len(saved) == 1
    return saved[0]


def operators(gm: fx.GraphModule) -> list[fx.Node]:
    return [
        n
        for n in gm.graph.nodes
        if n.op not in ("placeholder", "output", "get_attr") and not is_switch(n)
    ]


def by_name(gm: fx.GraphModule, *groups: str) -> list[list[fx.Node]]:
    nodes = {node.name: node for node in gm.graph.nodes}
    return [[nodes[name] for name in group.split()] for group in groups]


def names_of(groups: Sequence[object]) -> list[str]:
    return [f"fusion_group_{k}" for k in range(len(groups))]


def split(gm: fx.GraphModule, groups: Sequence[Sequence[fx.Node]]) -> fx.GraphModule:
    """The split, checked for what holds for every split."""
    names = names_of(groups)
    result = split_graph_module(gm, groups, names)
    children = [name for name, _ in result.named_children() if name in names]
    called = [n.target for n in result.graph.nodes if n.op == "call_module" and n.target in names]
    assert sorted(children) == sorted(names)
    assert children == called, "children stand in executed order"
    for name, group in zip(names, groups, strict=True):
        inside = {node.name for node in result.get_submodule(name).graph.nodes}
        assert {node.name for node in group} <= inside
    result.graph.lint()
    return result


def random_cuts(nodes: Sequence[fx.Node], count: int, rng: random.Random) -> list[list[fx.Node]]:
    borders = [0, *sorted(rng.sample(range(1, len(nodes)), count - 1)), len(nodes)]
    return [list(nodes[a:b]) for a, b in itertools.pairwise(borders)]


def shuffled(nodes: Sequence[fx.Node], rng: random.Random) -> list[fx.Node]:
    """A random order that respects data edges, and nothing else."""
    left = {node: sum(s in set(nodes) for s in node.all_input_nodes) for node in nodes}
    ready = [node for node in nodes if not left[node]]
    order = []
    while ready:
        node = ready.pop(rng.randrange(len(ready)))
        order.append(node)
        for user in node.users:
            if user in left:
                left[user] -= 1
                if not left[user]:
                    ready.append(user)
    return order


def same(a: Any, b: Any) -> bool:
    left, right = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return left[1] == right[1] and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(left[0], right[0], strict=True)
    )


def run_split(result: fx.GraphModule, inputs: Sequence[Any]) -> torch.Tensor:
    return result(*inputs)[0]


def check_on_copies(gm: fx.GraphModule, result: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Equal outputs, and equal effects on the inputs and on the random-number generator."""
    ends = []
    for module in (gm, result):
        given = copy.deepcopy(list(inputs))
        torch.manual_seed(5)
        ends.append((module(*given), given, torch.rand(3)))
    assert same(ends[0], ends[1])


# -- small graphs -----------------------------------------------------------------------------


def trap(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a = x * 2
    b = a + 1
    a.add_(10)
    c = a * 3
    return a, b, c


@pytest.mark.parametrize("traced", [True, False], ids=["dynamo", "no fake tensors"])
@pytest.mark.parametrize(
    "groups",
    [
        ("a b add_ c",),
        ("a", "b", "add_", "c"),
        ("a", "c", "add_", "b"),
        ("add_ c", "a b"),
        ("b add_", "c", "a"),
        ("c", "a b"),
        ("b",),
        ("a", "b add_ c"),
    ],
)
def test_mutation_keeps_its_place(groups: tuple[str, ...], traced: bool) -> None:
    x = torch.randn(4)
    gm = dynamo_graph(trap, x)[0] if traced else fx.symbolic_trace(trap)
    if not traced:
        groups = tuple(g.replace("a ", "mul ").replace("b", "add") for g in groups)
        groups = tuple(g.replace("c", "mul_1") for g in groups)
        groups = tuple("mul" if g == "a" else g for g in groups)
    check_on_copies(gm, split(gm, by_name(gm, *groups)), [x])


def test_a_group_around_a_mutation_is_refused() -> None:
    gm, _ = dynamo_graph(trap, torch.randn(4))
    with pytest.raises(PlanError) as raised:
        split(gm, by_name(gm, "a add_", "b"))
    text = str(raised.value)
    assert "fusion_group_0 and fusion_group_1 need each other" in text
    assert "'b' must run after 'a'" in text
    assert "'add_' must run after 'b' (mutation" in text


def test_a_cycle_through_three_groups_is_refused() -> None:
    def chain(x: torch.Tensor) -> torch.Tensor:
        a = x * 2
        b = a + 1
        c = b * 3
        return c - a

    gm, _ = dynamo_graph(chain, torch.randn(4))
    with pytest.raises(PlanError, match="fusion_group_0 and fusion_group_1 need each other"):
        split(gm, by_name(gm, "a sub", "b", "c"))


def views(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    a = x * 2
    row = a[0]
    flat = a.view(-1)
    before = flat.sum()
    row.add_(1)
    a[1] = 7
    a += 1
    torch.mul(x, 3, out=flat.view(x.shape))
    F.relu(row, inplace=True)
    total = torch.zeros(1).index_add_(0, torch.tensor([0]), flat.sum().reshape(1))
    return before, flat * 2, a.t(), total


def norms(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    mean, var = torch.zeros(3), torch.ones(3)
    first = mean + 1
    y = F.batch_norm(x, mean, var, training=True)
    z = torch.batch_norm(y, None, None, mean, var, True, 0.5, 1e-5, False)
    frozen = F.batch_norm(x, mean, var)
    w = F.instance_norm(x, mean, var, use_input_stats=True)
    return first, z, frozen, w, mean * 1, var * 1


def several(x: torch.Tensor) -> tuple[Any, ...]:
    a, b = torch.split(x, [1, 3], dim=2)
    value, index = torch.max(b, dim=2)
    n = x.size(0)
    low, high = torch.aminmax(a)
    return {"value": value + n, "index": index}, [low * 2, high], x.shape[1]


def noise(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    a = F.dropout(x, 0.5, training=True)
    b = torch.rand(2) + 1
    c = F.dropout2d(x, 0.5, training=True)
    d = F.dropout(x, 0.5, training=False)
    e = torch.empty(3).bernoulli_(0.5) * 2
    return a, b, c, d, e


def grad_modes(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    a = x * 2
    with torch.no_grad():
        b = a * 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        c = a.flatten(1) @ a.flatten(1).t()
    return a, b, c * 2


@pytest.mark.parametrize("function", [views, norms, several, noise, grad_modes])
def test_small_graphs_in_random_groups(function: Callable[..., Any]) -> None:
    x = torch.randn(2, 3, 4, 4) if function is not views else torch.randn(2, 3)
    gm, example = dynamo_graph(function, x)
    nodes = operators(gm)
    rng = random.Random(0)
    accepted = 0
    for trial in range(40):
        order = nodes if trial % 2 else shuffled(nodes, rng)
        groups = random_cuts(order, rng.randint(1, len(nodes)), rng)
        groups = [g for g in groups if rng.random() < 0.8] or groups
        try:
            result = split(gm, groups)
        except PlanError:
            assert order is not nodes, "cuts of the order are legal"
            continue
        accepted += 1
        check_on_copies(gm, result, example)
    assert accepted >= 20


def test_grad_mode_of_a_result_is_kept() -> None:
    gm, _ = dynamo_graph(grad_modes, torch.randn(2, 3, 4, 4))
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    result = split(gm, by_name(gm, "a", "b"))
    assert [y.requires_grad for y in result(x)] == [y.requires_grad for y in gm(x)]
    assert [y.requires_grad for y in result(x)] == [True, False, True]


def test_nodes_of_no_group_go_to_their_neighbours() -> None:
    def model(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        low, high = torch.aminmax(x * 2, dim=1)
        scale = w.abs() * 2
        flat = low.view(-1)
        return flat * scale, high + scale, flat

    gm, example = dynamo_graph(model, torch.randn(4, 3), torch.randn(4))
    mul, minmax, last, high = (
        next(n for n in gm.graph.nodes if check(n))
        for check in (
            lambda n: n.target is operator.mul,
            lambda n: n.target is torch.aminmax,
            lambda n: n.target is operator.mul and len(n.all_input_nodes) == 2,
            lambda n: n.target is operator.add,
        )
    )
    result = split(gm, [[mul, minmax], [last], [high]])
    first, second, third = (
        [n.op for n in result.get_submodule(name).graph.nodes if n.op.startswith("call")]
        for name in names_of(range(3))
    )
    assert (len(first), len(second), len(third)) == (5, 3, 1)
    assert {n.target for n in result.graph.nodes if n.op == "call_function"} == {operator.getitem}
    check_on_copies(gm, result, example)


def test_metas_and_sources_are_kept() -> None:
    gm, _ = dynamo_graph(several, torch.randn(2, 3, 4, 4))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(True)).eval()
    gm, _ = dynamo_graph(model, torch.randn(1, 3, 4, 4))
    nodes = operators(gm)
    result = split(gm, [[node] for node in nodes])
    calls = [n for n in result.graph.nodes if n.op == "call_module"]
    assert [n.meta["example_value"].shape for n in calls] == [(1, 4, 4, 4)] * 2
    for old in gm.graph.nodes:
        homes = [m for m in result.modules() if isinstance(m, fx.GraphModule)]
        copies = [n for m in homes for n in m.graph.nodes if n.name == old.name]
        if old.op in ("placeholder", "call_function"):
            assert copies
            assert all(old.meta.keys() <= n.meta.keys() for n in copies)
        if old.op == "placeholder":
            assert all(n._dynamo_source == old._dynamo_source for n in copies)


def test_several_results_have_a_tuple_of_metas() -> None:
    gm, example = dynamo_graph(several, torch.randn(2, 3, 4, 4))
    result = split(gm, [operators(gm)])
    call = next(n for n in result.graph.nodes if n.op == "call_module")
    values = result.get_submodule("fusion_group_0")(*example)
    assert isinstance(call.meta["example_value"], tuple)
    assert len(call.meta["example_value"]) == len(values)


def test_two_splits_share_only_the_parameters() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    text = str(gm.graph)
    groups = [[node] for node in operators(gm)]
    one, two = split(gm, groups), split(gm, groups)
    assert str(gm.graph) == text
    assert one.fusion_group_0 is not two.fusion_group_0
    one.fusion_group_0 = nn.Identity()
    assert same(two(torch.ones(1, 3, 2, 2)), gm(torch.ones(1, 3, 2, 2)))
    assert {id(p) for p in two.parameters()} == {id(p) for p in gm.parameters()}


def test_exported_program() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Dropout(0.5))
    x = torch.randn(2, 3, 5, 5)
    rng = random.Random(1)
    for train in (False, True):
        reference = copy.deepcopy(model).train(train)
        gm = torch.export.export(copy.deepcopy(reference), (x,)).module()
        nodes = [n for n in operators(gm) if n.op == "call_function"]
        for _ in range(5):
            result = split(gm, random_cuts(nodes, 3, rng))
            torch.manual_seed(1)
            expected = reference(x)
            torch.manual_seed(1)
            assert torch.equal(result(x), expected)
            buffers = dict(gm.named_buffers())
            assert all(torch.equal(b, buffers[n]) for n, b in reference.named_buffers())


class Leaves(nn.Module):
    """Leaf modules (symbolic_trace keeps them): one batch norm twice, noise, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.act = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a = self.norm(x)
        mean = self.norm.running_mean * 1
        b = self.norm(x * 2)
        c = a + 1
        d = self.act(a)
        return self.drop(c), self.drop(b), mean, d


class BufferTracer(fx.Tracer):
    proxy_buffer_attributes = True


def test_leaf_modules() -> None:
    rng = random.Random(2)
    x = torch.randn(4, 3)
    accepted = 0
    for _ in range(30):
        model = Leaves()
        root = copy.deepcopy(model)
        gm = fx.GraphModule(root, BufferTracer().trace(root))
        try:
            result = split(gm, random_cuts(shuffled(operators(gm), rng), 4, rng))
        except PlanError:
            continue
        accepted += 1
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        assert same(result(x), expected)
        assert all(torch.equal(b, dict(gm.named_buffers())[n]) for n, b in model.named_buffers())
    assert accepted >= 5


def test_checkpointed_bodies() -> None:
    """A higher-order operator (its body is an attribute) may draw random numbers."""
    drop = nn.Dropout(0.5)

    def model(x: torch.Tensor) -> torch.Tensor:
        a = drop(x)
        b = checkpoint(lambda t: drop(t * 2).sin(), x, use_reentrant=False)
        return drop(a + b)

    x = torch.randn(5, requires_grad=True)
    gm, example = dynamo_graph(model, x)
    nodes = operators(gm)
    check_on_copies(gm, split(gm, [[node] for node in nodes]), example)
    noisy = [n for n in nodes if n.target is F.dropout]
    result = split(gm, [[noisy[0]], [noisy[1]]])
    check_on_copies(gm, result, example)


def test_sizes_that_vary() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        y = (x * 2).view(x.shape[0] * x.shape[1])
        return y.add_(x.shape[0]).view(-1, x.shape[1]) + x

    torch._dynamo.reset()
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example: list) -> Callable[..., Any]:
        groups = [[n] for n in operators(gm) if n.op == "call_function"]
        found.append(split(gm, groups))
        return found[-1].forward

    compiled = torch.compile(model, backend=backend, dynamic=True)
    for shape in ((2, 3), (4, 3), (5, 7)):
        x = torch.randn(shape)
        assert torch.equal(compiled(x), model(x))
    assert len(found) == 1


@pytest.mark.parametrize(
    ("groups", "names", "message"),
    [
        (("a",), ("x", "y"), "1 groups but 2 names"),
        (("a", "a b"), ("x", "y"), "'a' is in x and in y"),
        (("a", ""), ("x", "y"), "y has no nodes"),
        (("a", "b"), ("x", "x"), "'x' cannot name a child"),
        (("a",), ("x.y",), "cannot name a child"),
        (("l_x_",), ("x",), "no operator of this graph"),
    ],
)
def test_wrong_use(groups: tuple[str, ...], names: tuple[str, ...], message: str) -> None:
    gm, _ = dynamo_graph(trap, torch.randn(4))
    with pytest.raises(PlanError, match=message):
        split_graph_module(gm, by_name(gm, *groups), names)


def test_nodes_of_another_graph_are_refused() -> None:
    gm, other = fx.symbolic_trace(trap), fx.symbolic_trace(trap)
    with pytest.raises(PlanError, match="capture and split the same graph"):
        split(gm, [operators(other)])


# -- whole networks ---------------------------------------------------------------------------


@dataclass
class Network:
    """A calibrated network, its Dynamo graph, and what eager computes."""

    model: nn.Module
    gm: fx.GraphModule
    inputs: list
    state: dict[str, torch.Tensor]
    expected: tuple[torch.Tensor, dict[str, torch.Tensor]]

    def step(self, function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, dict]:
        """Output, and the state after one step of training (all of it, buffers included)."""
        self.model.load_state_dict(self.state)
        self.model.zero_grad()
        torch.manual_seed(3)
        y = function()
        if self.model.training:
            y.square().mean().backward()
            with torch.no_grad():
                for p in self.model.parameters():
                    p -= 0.1 * p.grad
        return y.detach(), copy.deepcopy(self.model.state_dict())


@pytest.fixture(
    scope="module",
    params=[
        (name, train)
        for name in ("mobilenet_v2", "resnet18", "efficientnet_b0")
        for train in (False, True)
    ],
    ids=lambda p: f"{p[0]}-{'train' if p[1] else 'eval'}",
)
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    name, train = request.param
    model = load_model(f"torchvision:{name}")
    assert isinstance(model, nn.Module)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    calibrate_batch_norm(model, x)
    model.train(train)
    state = copy.deepcopy(model.state_dict())
    with torch.set_grad_enabled(train):
        gm, inputs = dynamo_graph(model, x)
        found = Network(model, gm, inputs, state, (x, {}))
        found.expected = found.step(lambda: model(x))
        yield found


def test_networks_in_random_groups(network: Network) -> None:
    nodes = operators(network.gm)
    rng = random.Random(4)
    accepted = 0
    for trial in range(8):
        order = nodes if trial < 4 else shuffled(nodes, rng)
        groups = random_cuts(order, rng.randint(2, 40), rng)
        if trial % 2:  # views, getitem and the like are left to find their own place
            groups = [[n for n in g if n.target not in ("add_", torch.flatten)] for g in groups]
            groups = [g for g in groups if g]
        try:
            result = split(network.gm, groups)
        except PlanError:
            assert order is not nodes, "cuts of the order are legal"
            continue
        accepted += 1
        y, state = network.step(partial(run_split, result, network.inputs))
        assert torch.equal(y, network.expected[0])
        assert all(torch.equal(state[key], value) for key, value in network.expected[1].items())
    assert accepted >= 4


def calls_of(work: Callable[[], object]) -> int:
    """How many functions ``work`` calls, of Python's and of C's."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_the_work_of_a_split_grows_with_the_graph() -> None:
    """Not with its square: eight times the operators, in groups as large, are eight times it."""
    calls = []
    for blocks in (20, 160):
        layers = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(True))] * blocks
        gm, _ = dynamo_graph(nn.Sequential(*layers), torch.randn(1, 4, 4, 4))
        nodes = operators(gm)
        groups = [nodes[k : k + 6] for k in range(0, len(nodes), 6)]
        calls.append(calls_of(partial(split_graph_module, gm, groups, names_of(groups))))
    assert calls[1] < 10 * calls[0], calls
