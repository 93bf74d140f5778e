"""Effects keep the order of the program: in the plan, in the split graph, at every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from texts import one_line
from torch import fx, nn

import torch_getfuse
from torch_getfuse.backend.capture.capture import Capture, capture_exported, capture_model
from torch_getfuse.backend.fx_nodes.effects import changes_state, order_edges
from torch_getfuse.backend.fx_nodes.targets import target_of
from torch_getfuse.backend.split.grouping import split_capture
from torch_getfuse.options import Options
from torch_getfuse.planner import plan_graph

BUFFERS = (256, 1024, 4096, 16384, 65536)


class Function(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


class Branches(nn.Module):
    """Two random draws in each of three parallel branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 8, k, padding=k // 2),
                nn.ReLU(),
                nn.Dropout2d(0.2),
                nn.Conv2d(8, 8, 1),
                nn.BatchNorm2d(8),
                nn.Dropout(0.2),
            )
            for k in (1, 3, 5)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return torch.cat([branch(x) for branch in self.branches], 1)


class Mapped(nn.Module):
    """Two regions of vmap between ordinary operators."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p, q = self.a(x), self.b(x)
        y = torch.vmap(lambda t, u: t * u + t)(p, q)
        z = torch.vmap(lambda t, u: torch.relu(t) * u)(y, p)
        result: torch.Tensor = self.a(z) + self.b(p)
        return result


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def after(capture: Capture) -> dict[str, tuple[str, ...]]:
    return {op.name: op.after for op in capture.graph if op.after}


def compiled(function: Any, **options: Any) -> Any:
    options = {"strict": True, "cache": False, **options}
    return torch.compile(function, backend="getfuse", options=options)


# -- edges of the plan ------------------------------------------------------------------------


def test_random_draws_in_branches_are_edges_of_the_plan() -> None:
    x = torch.randn(2, 3, 16, 16)
    model = Branches().train()
    capture = capture_model(model, (x,))
    found = after(capture)
    assert found == {
        "branches.1.2": ("branches.0.5",),
        "branches.2.2": ("branches.1.5",),
    }
    program = torch.export.export(model, (x,))
    assert after(capture_exported(program)) == found
    assert not after(capture_model(model.eval(), (x,)))


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("method", ["auto", "direct", "local"])
def test_every_plan_with_random_draws_can_be_split(buffer: int, method: str) -> None:
    x = torch.randn(2, 3, 16, 16)
    model = Branches().train()
    capture = capture_model(model, (x,))
    options = Options.of({"buffer": buffer, "method": method, "budget": 20, "cache": False})
    split_capture(capture, plan_graph(capture.graph, options).verify())


@pytest.mark.parametrize("buffer", [1024, 65536])
def test_random_draws_in_branches_train_as_in_eager(buffer: int) -> None:
    x = torch.randn(2, 3, 16, 16)
    results = []
    for planned in (False, True):
        torch.manual_seed(0)
        model = Branches().train()
        run = compiled(model, inner="eager", buffer=buffer) if planned else model
        torch.manual_seed(1)
        y = run(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters()), *model.buffers(), torch.rand(1)])
    assert all(map(torch.equal, *results))


def test_a_write_waits_for_readers_that_it_reads_nothing_of() -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 2
        read = y.cos()
        y.add_(1)
        return read.abs(), y.sin()

    x = torch.randn(1, 4, 6, 6)
    capture = capture_model(Function(f), (x,))
    assert after(capture) == {"add": ("cos",)}
    # What tensors order already is no edge of its own.
    pure = capture_model(Function(lambda x: (x.cos() + x.sin()).relu_()), (x,))
    assert not pure.graph.ordered


@pytest.mark.parametrize("buffer", [100, 200, 300, 600, 1000, 262144])
def test_regions_of_vmap_are_run_one_after_another(buffer: int) -> None:
    model, x = Mapped().eval(), torch.randn(1, 16, 8)
    widths = {"activation_bytes": 1, "weight_bytes": 1}
    with torch.no_grad():
        assert torch.equal(compiled(model, inner="eager", buffer=buffer, **widths)(x), model(x))


def test_batch_norm_is_not_folded_over_what_must_run_between() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            self.norm.running_mean.copy_(x.mean((0, 2, 3))[0].expand(4))
            z: torch.Tensor = self.norm(y)
            return z

    x = torch.randn(1, 3, 8, 8)
    plain, model = Between().eval(), Between().eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for buffer in (64, 512, 65536):
            torch._dynamo.reset()
            run = compiled(model, inner="eager", buffer=buffer)
            assert torch.equal(run(x), plain(x))
            assert torch.equal(model.norm.running_mean, plain.norm.running_mean)


# -- what a call writes and draws -------------------------------------------------------------


def graph_of(function: Callable[..., Any], *metas: torch.Tensor) -> fx.GraphModule:
    gm = fx.symbolic_trace(function)
    for node, meta in zip(gm.graph.find_nodes(op="placeholder"), metas, strict=True):
        node.meta["val"] = meta
    fx.passes.fake_tensor_prop.FakeTensorProp(gm).propagate(*metas)
    return gm


def test_and_is_not_in_place() -> None:
    gm = graph_of(lambda x, y: (x & True, y * 2), torch.ones(3) > 0, torch.ones(3))
    assert not changes_state(gm)


def test_the_packed_program_is_told_no_false_reason() -> None:
    def f(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.conv2d(x, torch.ones(4, 3, 3, 3)), mask & True

    with torch.no_grad():
        run = compiled(Function(f))
        run(torch.randn(1, 3, 8, 8), torch.ones(3, dtype=torch.bool))
    assert "changes its inputs" not in one_line(torch_getfuse.report(run))


@pytest.fixture
def library() -> Iterator[None]:
    with torch.library._scoped_library("getfuse_order", "DEF") as lib:
        lib.define("relu(Tensor x) -> Tensor")
        lib.define("batch_norm(Tensor x, Tensor running_mean) -> Tensor")
        lib.define("store(Tensor(a!) x, Tensor y) -> ()")
        lib.define("noise_(Tensor x) -> Tensor")
        yield


@pytest.mark.usefixtures("library")
def test_a_schema_says_what_a_custom_operator_writes() -> None:
    ops = torch.ops.getfuse_order
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    for node, tensor in ((x, torch.ones(2)), (y, torch.ones(2))):
        node.meta["val"] = tensor
    read = graph.call_function(torch.cos, (x,))
    pure = [
        graph.call_function(ops.relu.default, (x,)),
        graph.call_function(ops.batch_norm.default, (y, x)),
        graph.call_function(ops.noise_, (x,)),
    ]
    write = graph.call_function(ops.store.default, (x, y))
    last = graph.call_function(torch.sin, (x,))
    for node in (read, *pure, last):
        node.meta["val"] = torch.ones(2)
    graph.output((read, last, *pure))
    gm = fx.GraphModule(nn.Module(), graph)
    nodes = [read, *pure, write, last]
    edges = order_edges(gm, nodes)
    assert edges == [set(), set(), set(), set(), {0, 1, 2, 3}, {4}]
    assert all(not target_of(node).name for node in (*pure, write))
    assert changes_state(gm)


def test_a_function_from_elsewhere_may_do_anything() -> None:
    def relu(x: torch.Tensor) -> torch.Tensor:
        return x

    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(2)
    calls = [graph.call_function(function, (x,)) for function in (torch.cos, relu, torch.sin)]
    for node in calls:
        node.meta["val"] = torch.ones(2)
    graph.output(tuple(calls))
    gm = fx.GraphModule(nn.Module(), graph)
    assert order_edges(gm, calls) == [set(), {0}, {1}]
    assert changes_state(gm)


def test_a_dropout_that_drops_nothing_is_its_input() -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 2
        early = y.cos()
        z = F.dropout(y, 0.4, training=False)
        z.sigmoid_()
        return early, y + 1, z

    x = torch.randn(2, 3, 4, 4)
    for buffer in (1, 200, 65536):
        torch._dynamo.reset()
        found = compiled(f, inner="eager", buffer=buffer)(x)
        assert all(map(torch.equal, found, f(x)))


def test_a_view_of_an_idle_dropout_is_one_of_its_input() -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        early = x.cos()
        F.dropout(x, 0.4, training=False).view(-1).mul_(2)
        return early, x.sin()

    x = torch.randn(2, 3)
    program = torch.export.export(Function(f), (x,))
    for gm in (capture_model(Function(f), (x,)).graph_module, program.graph_module):
        nodes = list(gm.graph.nodes)
        cos, write, sin = (
            next(i for i, node in enumerate(nodes) if target_of(node).name == name)
            for name in ("cos", "mul_", "sin")
        )
        edges = order_edges(gm, nodes)
        assert cos in edges[write]
        assert write in edges[sin]
        assert changes_state(gm)


# -- inputs that overlap at a later call ------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "auto", "aot_eager"])
def test_inputs_that_overlap_only_at_a_later_call(inner: str) -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tripled = y * 3
        x.mul_(2)
        return x + y, tripled, y.relu()

    def views() -> tuple[torch.Tensor, torch.Tensor]:
        base = torch.arange(8.0)
        return base[:4], base[2:6]

    run = compiled(f, inner=inner)
    run(torch.ones(4), torch.ones(4))
    for _ in range(2):
        assert all(map(torch.equal, run(*views()), f(*views())))
    assert str(torch_getfuse.report(run)).count("overlap in memory") == 1
    apart = torch.ones(4), torch.full((4,), 2.0)
    assert all(map(torch.equal, run(*(t.clone() for t in apart)), f(*apart)))


def test_one_buffer_as_two_numpy_arrays_overlaps() -> None:
    numpy = pytest.importorskip("numpy")

    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        early = y * 3
        x.add_(1)
        return early + y.relu()

    def shared() -> tuple[torch.Tensor, torch.Tensor]:
        base = numpy.ones(6, dtype="float32")
        return torch.from_numpy(base[:4]), torch.from_numpy(base[2:])

    run = compiled(f, inner="aot_eager")
    run(torch.ones(4), torch.ones(4))
    assert torch.equal(run(*shared()), f(*shared()))


# -- changes of shape in place ----------------------------------------------------------------


def squeezed(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x.clone()
    early = y.cos()
    y.squeeze_(0)
    return early, y.sin()


def chain(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x.clone()
    y.t_()
    y.unsqueeze_(0)
    y.mul_(2)
    return y, y.squeeze_(0) + 1


def second_name(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x.clone()
    z = y.mul_(2)
    y.squeeze_(0)
    return z + 1, z


def older_view(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x + 1
    flat = y.view(-1)
    y.transpose_(0, 1)
    total = y.sum(1)
    flat.mul_(2)
    y.t_()
    return y.sin(), total, flat


def idle_dropout(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x + 1
    z = F.dropout(y, 0.3, training=False)  # y itself; its traced value is a copy
    y.unsqueeze_(0)
    return z * 2, z.sum(0), y, z


def idle_dropout_turned(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x + 1
    z = F.dropout(y, 0.3, training=False)
    early = y * 3
    z.mul_(2)
    z.unsqueeze_(0)
    return early, y * 2, y.sum(0), y, z


def input_by_another_name(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    early = x.sin()
    y = x.mul_(2)
    y.squeeze_(0)
    return early, y + 1, x.cos()


def input_turned_and_returned(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x.contiguous()
    y.t_()
    return x.add_(1).sum(1), y


def beside_a_number(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = torch.where(x > 0, x, -0.5)  # what the operator makes of the number is traced, too
    y.squeeze_(0)
    return y == x, y


def halves(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    first, second = (x * 2).split(2, 1)
    second.squeeze_(0)
    first.mul_(3)
    second.unsqueeze_(1)
    return first + 1, second * 2


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "depth_first"])
@pytest.mark.parametrize(
    "function",
    [
        *(squeezed, chain, second_name, older_view, halves, beside_a_number),
        *(idle_dropout, idle_dropout_turned, input_by_another_name, input_turned_and_returned),
    ],
)
def test_shapes_that_change_in_place(function: Callable[..., Any], inner: str) -> None:
    for buffer in (1, 20, "256KB"):
        torch._dynamo.reset()
        run = compiled(function, inner=inner, buffer=buffer, strict=inner != "depth_first")
        for _ in range(2):  # the second call with new inputs of the first shape
            x = torch.randn(1, 4)
            given = x.clone()
            found, wanted = (*run(x), x), (*function(given), given)
            assert all(map(torch.allclose, found, wanted))
            assert [t.shape for t in found] == [t.shape for t in wanted]
            assert [t.stride() for t in found] == [t.stride() for t in wanted]


@pytest.mark.parametrize("function", [input_by_another_name, input_turned_and_returned])
def test_an_input_that_changes_its_shape_is_planned_as_it_was_given(
    function: Callable[..., Any],
) -> None:
    module, x = Function(function), torch.randn(1, 4)
    plan = torch_getfuse.plan(module, (x,), buffer=16)
    assert all(plan.graph.tensors[name].shape == (1, 4) for name in plan.graph.inputs)
    given = x.clone()
    found, _ = torch_getfuse.run_counted(module, (x,), plan)
    assert all(map(torch.equal, found, function(given)))
    assert x.shape == given.shape
    assert torch.equal(x, given)


@pytest.mark.parametrize("buffer", [20, "256KB"])
@pytest.mark.parametrize(
    "function",
    [squeezed, chain, second_name, older_view, halves, idle_dropout, idle_dropout_turned],
)
def test_shapes_that_change_in_place_are_split_as_exported(
    function: Callable[..., Any], buffer: object
) -> None:
    module, x = Function(function), torch.randn(1, 4)
    program = torch.export.export(module, (x,))
    plan = torch_getfuse.plan(program, buffer=buffer, cache=False)
    assert plan.graph.fingerprint == capture_model(module, (x,)).graph.fingerprint
    found, wanted = torch_getfuse.split(program, (), plan)(x), function(x)
    assert all(map(torch.equal, found, wanted))
    assert [t.stride() for t in found] == [t.stride() for t in wanted]


def test_what_reads_a_tensor_is_planned_in_the_shape_that_its_other_name_was_given() -> None:
    module, x = Function(idle_dropout_turned), torch.randn(1, 4)
    for model in (module, torch.export.export(module, (x,))):
        plan = torch_getfuse.plan(model, (x,), cache=False)
        shapes = [plan.graph.tensors[op.writes].shape for op in plan.graph.ops]
        assert shapes == [(1, 4), (1, 4), (1, 4), (1, 1, 4), (1, 4)]


def test_an_idle_cast_of_an_exported_program_waits_for_no_write() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.sum(-1)
        x += x
        return y.type_as(x).exp()

    x = torch.randn(2, 6)
    program = torch.export.export(Function(f), (x,))
    plan = torch_getfuse.plan(program, buffer="64KB", cache=False)
    assert [group.ops for group in plan.groups] == [("sum", "exp"), ("add",)]
    given, right = x.clone(), x.clone()
    assert torch.equal(torch_getfuse.split(program, (), plan)(given), f(right))
    assert torch.equal(given, right)


class Turning(nn.Module):
    """It leaves its input, and maybe its buffer, in another shape; by ``how``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("turned", torch.arange(4.0)[None])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        early = x.sin()
        if self.how == "by its own name":
            x.t_()
        elif self.how == "by another name":
            F.leaky_relu_(x, 0.1).t_()
        elif self.how == "by an idle dropout":
            F.dropout(x, 0.3, training=False).t_()
        elif self.how == "twice":
            x.mul_(2).t_()
            early = early + x.sum(1)
            x.add_(1).transpose_(0, 1)
        elif self.how == "by a cast":
            x.float().t_()
        else:
            self.turned.mul_(2).t_()
            return early + self.turned.sum(1), x
        return early, x.cos().relu(), x * 2


@pytest.mark.parametrize("buffer", [20, "256KB"])
@pytest.mark.parametrize(
    "how",
    [
        *("by its own name", "by another name", "by an idle dropout", "twice", "by a cast"),
        "a buffer",
    ],
)
def test_an_exported_program_turns_its_inputs_and_buffers(how: str, buffer: object) -> None:
    model, example = Turning(how), (torch.randn(1, 4),)
    program = torch.export.export(model, example)
    plan = torch_getfuse.plan(program, buffer=buffer, cache=False)
    assert all(plan.graph.tensors[name].shape == (1, 4) for name in plan.graph.inputs)
    if how != "by its own name":  # which Dynamo does not trace
        assert plan.graph.fingerprint == capture_model(model, example).graph.fingerprint
    split = torch_getfuse.split(program, (), plan)

    def left(run: Callable[..., Any]) -> tuple[torch.Tensor, ...]:
        x, before = torch.arange(4.0)[None], model.turned.clone()
        try:
            return (*run(x), x, model.turned.clone())
        finally:
            model.turned.as_strided_(before.size(), before.stride()).copy_(before)

    wanted = left(model)
    for found in (left(split), left(lambda x: torch_getfuse.run_counted(program, (x,), plan)[0])):
        assert all(map(torch.equal, found, wanted))
        assert [t.stride() for t in found] == [t.stride() for t in wanted]


def test_a_group_that_writes_to_an_expansion_stays_eager() -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        wide = x.expand(4)
        early = wide + 1
        wide[-1] = 3
        return wide, early

    run = compiled(f, inner="aot_eager")
    with torch.no_grad():
        assert all(map(torch.equal, run(torch.tensor(1.0)), f(torch.tensor(1.0))))
    assert "whose elements share memory" in one_line(torch_getfuse.report(run))


def test_a_write_through_a_view_of_a_function_that_was_taken_apart() -> None:
    """Both functions become ATen operators, each traced anew; their storages stay one."""

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        z = torch.gather(y, 0, torch.zeros_like(y, dtype=torch.int64))
        z.T.add_(1)
        return y + z

    x = torch.randn(3, 2)
    options = {"inner": "eager", "strict": True, "buffer": 64, "cache": False}
    compiled = torch.compile(function, backend="getfuse", options=options)
    assert torch.equal(compiled(x), function(x))


@pytest.mark.parametrize("batch", [1, 2])
def test_training_in_channels_last_keeps_strides_and_bits(batch: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(8, 4, (1, 3)), nn.Conv2d(4, 2, (3, 1), groups=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.one(x)
            return F.hardswish(self.two(y)) + torch.flip(x + x, [-2]).mean()

    torch.manual_seed(0)
    model = Net()
    x = torch.randn(batch, 8, 5, 13).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    options = {"inner": "eager", "strict": True, "cache": False}
    expected = model(x)
    got = torch.compile(model, backend="getfuse", options=options)(x)
    assert got.stride() == expected.stride()
    assert torch.equal(got, expected)
