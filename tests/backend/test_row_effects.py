"""Rows against eager where programs write in place, into buffers, inputs, views and ``out=``.

Whatever cannot run by rows must run by its FX nodes: results, inputs and buffers end up as eager
leaves them, nothing raises in a call, and ``strict`` raises at compile time or is as right.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_getfuse
from tests.backend.test_depth_first import check, distance, notes, plan_of
from torch_getfuse.backend.capture.capture import capture_model
from torch_getfuse.backend.rowwise import kernels as row_kernels
from torch_getfuse.backend.rowwise.calls import NoRowKernel
from torch_getfuse.backend.rowwise.depth_first import split_depth_first
from torch_getfuse.errors import NoOperatorError, OptionError

Maps = list[torch.Tensor]

STEPS = (
    *("conv", "conv", "relu", "double", "add", "pool", "cat", "halves", "tokens", "crop", "mean"),
    *("relu_", "relu inplace", "mul_", "iadd", "iadd map", "view mul_", "setitem", "out", "fill"),
    *("buffer add_", "buffer copy_", "input add_", "dead write"),
)


class Program(nn.Module):
    """Steps drawn from a seed, each on a recent map; returns some maps, old names included."""

    def __init__(self, seed: int, steps: int) -> None:
        super().__init__()
        draw = Random(seed)
        # Mostly steps without an effect outside, or every program would fall back.
        pure = STEPS[: STEPS.index("iadd map") + 1]
        self.drawn = [
            (draw.choice(STEPS if draw.random() < 0.15 else pure), draw.randrange(60))
            for _ in range(steps)
        ]
        self.returned = [draw.randrange(6) == 0 for _ in range(steps + 1)]
        self.kernels = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(steps))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> Maps:
        maps = [x]
        for kernel, (step, drawn) in zip(self.kernels, self.drawn, strict=True):
            maps.append(self.step(step, drawn, kernel, maps))
        kept = [m for m, returned in zip(maps, self.returned, strict=True) if returned]
        return [*kept, maps[-1]]

    def step(self, step: str, drawn: int, kernel: nn.Module, maps: Maps) -> torch.Tensor:
        y = maps[-1 - drawn % min(3, len(maps))]
        other = next(m for m in reversed(maps) if m.shape == y.shape)
        if step == "conv":
            return kernel(y)
        if step == "double":
            return y * 2
        if step == "add":
            return y + other
        if step == "pool":
            return F.max_pool2d(y, 3, 1, 1)
        if step == "cat":
            return torch.cat((y[:, :2], other[:, 2:]), 1)
        if step == "halves":
            left, right = y.chunk(2, 1)
            return torch.cat((right, left.tanh()), 1)
        if step == "tokens":
            tokens = y.flatten(2).transpose(1, 2)
            return F.gelu(tokens).transpose(1, 2).reshape(y.shape)
        if step == "crop" and y.shape[2] > 4:
            return y[:, :, : y.shape[2] - 1 - drawn % 3]
        if step == "mean":
            return y * y.mean((2, 3), keepdim=True)
        if step == "relu_":
            return torch.tanh(y).relu_() if drawn % 2 else y.relu_()
        if step == "relu inplace":
            return F.relu(y + 1 if drawn % 3 else y, inplace=True)
        if step == "mul_":
            return (y - 1).mul_(2) if drawn % 2 else y.mul_(2)
        if step == "iadd":
            y += 1
            return y
        if step == "iadd map":
            z = kernel(y)
            z += other if drawn % 2 else y
            return z
        if step == "view mul_":
            z = y * 3
            z[:, :2].mul_(2)
            return z
        if step == "setitem":
            z = y.clone() if drawn % 2 else y
            z[:, :, 0] = 5
            return z
        if step == "out":
            z = torch.empty_like(y)
            torch.mul(y, 2, out=z)
            return z
        if step == "fill":
            z = torch.zeros_like(y)
            z += y
            return z
        if step == "buffer add_":
            self.count.add_(1)
            return y + self.count
        if step == "buffer copy_":
            self.seen.copy_(y.mean((0, 2, 3)))
            return y
        if step == "input add_":
            maps[0].add_(1)
            return y
        if step == "dead write":
            y.clone().mul_(2)
            return y
        return F.relu(y)


def same(got: object, expected: object) -> None:
    assert distance(got, expected) < 1e-4


def agree(model: nn.Module, x: torch.Tensor, call: Callable[[nn.Module, torch.Tensor], object]):
    """A call leaves results, input and buffers as eager does."""
    eager, ours = copy.deepcopy(model), copy.deepcopy(model)
    its, mine = x.clone(), x.clone()
    with torch.no_grad():
        expected = eager(its)
        got = call(ours, mine)
    same(got, expected)
    same([mine, *ours.buffers()], [its, *eager.buffers()])


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What the backend raises, out of what Dynamo makes of it."""
    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise error.inner_exception from error


def programs(first: int, end: int) -> int:
    """Programs of these seeds, each way; how many groups ran by rows."""
    rows = 0
    for seed in range(first, end):
        torch._dynamo.reset()
        torch.manual_seed(seed)
        draw = Random(seed)
        model = Program(seed, draw.randint(1, 6)).eval()
        x = torch.randn(draw.choice((1, 1, 2)), 4, draw.randint(3, 9), 6)
        buffer = draw.choice((600, 2000, 10**6))
        try:
            plan = plan_of(copy.deepcopy(model), (x.clone(),), buffer=buffer)
        except NoOperatorError:
            continue  # what it returns is the input

        def counted(own: nn.Module, given: torch.Tensor, plan=plan) -> object:
            nonlocal rows
            got, ledger = torch_getfuse.run_counted(own, (given,), plan)
            rows += sum(group.agrees for group in ledger.groups)
            assert all(group.agrees or group.fallback for group in ledger.groups), str(ledger)
            return got

        def compiled(
            own: nn.Module, given: torch.Tensor, strict: bool = False, plan=plan
        ) -> object:
            options = {"inner": "depth_first", "plan": plan, "strict": strict, "cache": False}
            return torch.compile(own, backend="getfuse", options=options)(given)

        agree(model, x, counted)
        agree(model, x, compiled)
        with contextlib.suppress(NoRowKernel), refusals():
            agree(model, x, lambda own, given: compiled(own, given, strict=True))
    return rows


def test_random_programs_leave_everything_as_eager_does() -> None:
    assert programs(0, 6) >= 3


@pytest.mark.slow
@pytest.mark.exhaustive
def test_many_random_programs() -> None:
    assert programs(6, 300) >= 150


class Function(nn.Module):
    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: torch.Tensor) -> object:
        return self.function(*x)


def late_input(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = F.relu(x)
    x.mul_(2)
    return y, x


def into_out(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.empty_like(x)
    torch.mul(x, 2, out=made)
    return F.relu(x) * 3, made


def copied_before(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x * 2
    copied = y.transpose(2, 3).reshape(1, -1)
    y.add_(1)
    return F.relu(copied), y.tanh()


def written_copy(x: torch.Tensor) -> tuple[torch.Tensor]:
    y = x.clone()
    view = y.float()
    y.sigmoid_()
    return (view.mT * 2,)


def written_among_several(x: torch.Tensor) -> torch.Tensor:
    torch._foreach_add_([torch.ones(2), x], 1)
    return F.leaky_relu_(x, 0.1) // 1


def view_of_an_idle_dropout(x: torch.Tensor) -> torch.Tensor:
    y = x.sum(1)
    F.dropout(x, 0.3, training=False).view(-1).zero_()
    return F.relu(y)


def view_of_a_copy(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x * 3
    flat = y.mT.flatten(1)
    windows = flat.unfold(1, 2, 3)
    flat.zero_()
    return windows + 1, y


@pytest.mark.parametrize(
    "function",
    [
        *(late_input, into_out, copied_before, written_copy, written_among_several),
        *(view_of_an_idle_dropout, view_of_a_copy),
    ],
)
@pytest.mark.parametrize("buffer", [16, 80, 10**6])
def test_writes_that_someone_sees(function: Callable[..., object], buffer: int) -> None:
    model, x = Function(function), torch.randn(1, 2, 4, 6)
    plan = plan_of(model, (x.clone(),), buffer=buffer)
    agree(model, x, lambda own, given: torch_getfuse.run_counted(own, (given,), plan)[0])


@pytest.mark.parametrize("buffer", [16, 10**6])
def test_a_copy_of_what_is_written_before_and_after_it_is_taken_between(buffer: int) -> None:
    def run(x: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        F.leaky_relu_(x, 0.1)
        copied = part.clone()
        y = copied.exp()
        F.leaky_relu_(x, 0.1)
        return y

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.arange(-6.0, 6.0).view(2, 6)
        return x, x[:, :1]

    model, given, right = Function(run), inputs(), inputs()
    plan = plan_of(model, inputs(), buffer=buffer)
    assert len(plan.groups) == 2  # both writes, and the reader of the copy
    got, _ = torch_getfuse.run_counted(model, given, plan)
    same([got, *given], [model(*right), *right])


def test_activations_in_place_on_private_values_run_by_rows() -> None:
    def block(x: torch.Tensor) -> torch.Tensor:
        y = F.relu(x * 3, inplace=True)
        z = torch.tanh(y)
        z += y
        return z.mul_(2)

    check(Function(block), (torch.randn(1, 3, 8, 8),))


def test_a_write_that_nothing_comes_of_is_no_effect() -> None:
    def unused(x: torch.Tensor) -> torch.Tensor:
        F.hardswish(x * 2, inplace=True).tanh()
        return F.relu(x) + 1

    check(Function(unused), (torch.randn(1, 3, 8, 8),))

    class Seen(nn.Module):
        """It comes to a buffer, which no result shows."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1, 3, 8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            F.hardswish(y, inplace=True)
            self.seen.copy_(y)
            return F.relu(x) + 1

    model, x = Seen(), torch.randn(1, 3, 8, 8)
    plan = plan_of(copy.deepcopy(model), (x,))
    agree(model, x, lambda own, given: torch_getfuse.run_counted(own, (given,), plan)[0])


# -- the kinds of call that used to raise, or to give something else -------------------------

BY_ROWS: dict[str, tuple[Callable[..., object], tuple[tuple[int, ...], ...]]] = {
    "one part": (lambda x: F.mish(torch.chunk(x, 1, 1)[0]), ((1, 4, 6, 6),)),
    "a constant per sample": (
        lambda x: F.relu(x) * torch.arange(3.0).view(3, 1, 1, 1),
        ((3, 2, 8, 1),),
    ),
    "the type of another": (lambda x, y: F.relu((x > 0).type_as(y)), ((2, 6, 8, 7), (2, 6, 8, 7))),
    "conv1d over tokens": (
        lambda x: F.conv1d((x * 2).flatten(2), torch.ones(3, 4, 3) / 9, padding=1),
        ((1, 4, 6, 5),),
    ),
    "pool over tokens": (lambda x: F.avg_pool1d((x * 2).flatten(2), 4, 4), ((1, 4, 6, 6),)),
    "padded tokens": (
        lambda x: F.pad((x * 2).flatten(2).transpose(1, 2)[:, None], (0, 1), value=1.0) * 2,
        ((1, 4, 6, 5),),
    ),
    "resized from two rows to two": (
        lambda x: F.interpolate(F.relu(F.adaptive_avg_pool2d(x, 2)), size=(2, 2), mode="bilinear"),
        ((1, 4, 6, 6),),
    ),
    "more bins than rows": (lambda x: F.adaptive_avg_pool2d(x * 2, 6), ((1, 4, 3, 3),)),
    "a matrix of one column": (
        lambda x: x.prod(1).max(-1)[0] @ torch.ones(7, 1),
        ((1, 4, 7, 13),),
    ),
    "a vector": (lambda x: x.prod(1).max(-1)[0] @ torch.ones(7), ((1, 4, 7, 13),)),
    "strides of an axis of size one": (
        lambda x: torch.einsum("...ij,...kj->...ik", x, x),
        ((1, 4, 8, 16),),
    ),
    "the first row": (lambda x, y: torch.relu((x + y)[:, :, :1]), ((1, 4, 6, 6), (1, 4, 6, 6))),
}


@pytest.mark.parametrize("name", BY_ROWS)
def test_runs_by_rows(name: str) -> None:
    function, shapes = BY_ROWS[name]
    torch.manual_seed(0)
    x = [torch.randn(shape) for shape in shapes]
    model = Function(function)
    check(model, x)
    got, _ = torch_getfuse.run_counted(model, tuple(x), plan_of(model, x))
    assert got.stride() == model(*x).stride()


def test_a_scalar_beside_a_batch_has_no_axis_of_samples() -> None:
    model = Function(lambda x, y: (F.normalize(x, dim=0), F.relu(y) * 2))
    x, y = torch.tensor(3.0), torch.randn(2, 8, 4)
    got, _ = torch_getfuse.run_counted(model, (x, y), plan_of(model, (x, y)))
    same(got, model(x, y))


def test_results_lie_as_those_of_the_fx_nodes_whatever_the_trace_says_of_strides() -> None:
    """The traced sum has other strides along its axes of size one than the one at run time."""

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        part = x.diagonal()
        total = torch.add(y, part, alpha=3)
        y.zero_()
        return torch.where(part > 0, part, total)

    model = Function(function)

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tensor([3, 0, 1, 2], dtype=torch.uint8).view(1, 4, 1, 1)
        return x, x[..., :1]

    plan = plan_of(model, inputs(), buffer=1024)
    got, ledger = torch_getfuse.run_counted(model, inputs(), plan)
    expected = model(*inputs())
    assert torch.equal(got, expected)
    assert got.stride() == expected.stride()
    assert [bool(group.fallback) for group in ledger.groups] == [True, True, False]


def test_inputs_of_other_strides_than_in_the_trace_are_tried_in_the_call() -> None:
    model, x = Function(lambda x: F.relu(torch.tanh(x * 2)) + 1), torch.randn(1, 3, 6, 6)
    split, ledger = split_depth_first(capture_model(model, (x,)), plan_of(model, (x,)))
    (entry,), runner = ledger.groups, split.fusion_group_0
    turned = x.contiguous(memory_format=torch.channels_last)
    for given in (x, turned, x):
        got, expected = runner(given), model(given)
        same(got, expected)
        assert got.stride() == expected.stride()
    assert not entry.fallback
    assert len(runner.layouts) == 2  # each tried once

    def fails(*_: object) -> None:
        raise NoRowKernel("tanh has no rows in this layout")

    runner.trial = fails
    wide = torch.randn(1, 3, 6, 12)[..., ::2]
    assert torch.equal(runner(wide), model(wide))
    assert entry.fallback == "in a call, tanh has no rows in this layout"


FALLS_BACK: dict[str, tuple[Callable[..., object], tuple[int, ...], str]] = {
    "complex numbers": (
        lambda x: F.relu(torch.view_as_complex(x).real),
        (1, 4, 4, 2),
        "must have a last dimension with stride 1",  # rows in a ring have another layout
    ),
    "a view without a rule": (
        lambda x: (y := x * 2, y.view(torch.int32)),
        (1, 4, 6, 6),
        "share memory",
    ),
    "memory by strides": (
        lambda x: torch.as_strided(x * 2, (2, 2), (1, 1)),
        (1, 4, 6, 6),
        "by strides",
    ),
    "a transform": (lambda x: torch.vmap(lambda t: F.relu(t) * 2)(x) + 1, (1, 4, 6, 6), "vmap"),
    "random numbers": (lambda x: F.dropout(x, 0.5) * 0 + x, (1, 4, 6, 6), "draws random numbers"),
}


@pytest.mark.parametrize("name", FALLS_BACK)
def test_falls_back_and_says_so(name: str) -> None:
    function, shape, reason = FALLS_BACK[name]
    model, x = Function(function), torch.randn(shape)
    plan = plan_of(model, (x,))
    got, ledger = torch_getfuse.run_counted(model, (x,), plan)
    same(got, model(x))
    told = [group.fallback for group in ledger.groups]
    assert any(reason in text for text in told), told
    assert not ledger.agrees


# -- the trial at compile time, and the way out of a call --------------------------------------


class Wrong(row_kernels.CallKernel):
    """Gives something else in the third row."""

    def compute(self, values, blocks, low: int, high: int):  # type: ignore[no-untyped-def]
        found = super().compute(values, blocks, low, high)
        return found + 1 if self.op.kind == "tanh" and low == 2 else found


def test_a_kernel_that_differs_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_getfuse.backend.rowwise.kernel_registry.CallKernel", Wrong)
    model, x = Function(lambda x: F.relu(torch.tanh(x * 2)) + 1), torch.randn(1, 3, 6, 6)
    plan = plan_of(model, (x,))
    got, ledger = torch_getfuse.run_counted(model, (x,), plan)
    assert torch.equal(got, model(x))
    (group,) = ledger.groups
    assert group.fallback.startswith("tanh (tanh) by rows gives values that differ by up to 1")
    assert group.fallback.endswith("in row 2")
    options = {"inner": "depth_first", "strict": True, "cache": False, "plan": plan}
    with pytest.raises(Exception, match="fusion_group_0 cannot run by rows: tanh"):
        torch.compile(model, backend="getfuse", options=options)(x)


def test_a_row_that_fails_in_a_call_runs_the_fx_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Function(lambda x: F.relu(torch.tanh(x * 2)) + 1), torch.randn(1, 3, 6, 6)
    run = torch.compile(model, backend="getfuse", options={"inner": "depth_first", "cache": False})
    with torch.no_grad():
        same(run(x), model(x))
        assert "1 of 1 groups run row by row" in notes(run)

        def broken(*args: object) -> None:
            raise ValueError("no such row")

        monkeypatch.setattr(row_kernels.CallKernel, "compute", broken)
        assert torch.equal(run(x), model(x))
        assert torch.equal(run(x), model(x))
    text = "in a call, row 0 of mul cannot be computed: ValueError: no such row"
    assert notes(run).count(text) == 1


def test_an_error_of_the_user_s_own_data_is_raised_and_rows_go_on() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.ReLU(), nn.Tanh())
    run = torch.compile(model, backend="getfuse", options={"inner": "depth_first", "cache": False})
    good, bad = torch.tensor([[0, 4, 2]]), torch.tensor([[0, 9, 2]])
    with torch.no_grad():
        same(run(good), model(good))
        assert "1 of 1 groups run row by row" in notes(run)
        with pytest.raises(IndexError):
            run(bad)
        same(run(good), model(good))
    assert "in a call" not in notes(run)


def test_a_plan_without_groups_agrees_with_nothing() -> None:
    model, x = Function(lambda x: F.relu(x * 2)), torch.randn(1, 3, 6, 6)
    plan = plan_of(model, (x,), buffer=8)
    got, ledger = torch_getfuse.run_counted(model, (x,), plan)
    assert torch.equal(got, model(x))
    assert not plan.groups
    assert not ledger.agrees


def test_an_exported_program_returns_what_it_returns() -> None:
    one = nn.Conv2d(3, 4, 3).eval()

    class Both(nn.Module):
        def forward(self, x: torch.Tensor, y: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"sum": F.relu(x + y["z"]), "half": x / 2}

    x = torch.randn(1, 3, 8, 8)
    for model, args in ((one, (x,)), (Both(), (x, {"z": x + 1}))):
        program = torch.export.export(model, args)
        plan = torch_getfuse.plan(program, cache=False)
        got, ledger = torch_getfuse.run_counted(program, args, plan)
        assert ledger.agrees
        expected = model(*args)
        assert type(got) is type(expected)
        same(got, expected)
    with pytest.raises(OptionError, match=r"\(1, 3, 9, 8\).*are for \(1, 3, 8, 8\)"):
        torch_getfuse.run_counted(program, (torch.randn(1, 3, 9, 8), {"z": x}), plan)
