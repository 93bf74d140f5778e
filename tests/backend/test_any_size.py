"""Dynamic shapes with ``inner="auto"``: a program per size, packed weights that all share."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_getfuse
from torch_getfuse.backend import compiler
from torch_getfuse.backend.packed import any_size, fast
from torch_getfuse.backend.packed.any_size import AnySize
from torch_getfuse.backend.packed.packed_conv import PackedConv
from torch_getfuse.backend.packed.program import FastProgram

pytestmark = pytest.mark.fast_program

SIZES = ((2, 4, 24, 24), (2, 4, 16, 20), (3, 4, 9, 32))


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 64, 3, 2, bias=False),
        nn.BatchNorm2d(64), nn.ReLU6(), nn.Conv2d(64, 4, 1), nn.Hardsigmoid(),
    ]  # fmt: skip
    return nn.Sequential(*layers).eval()


def images(*shapes: Sequence[int]) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(*shape) for shape in shapes or SIZES]


def compiled(model: nn.Module, **settings: Any) -> Any:
    torch._dynamo.reset()
    options = {"method": "direct", "strict": True, "cache": False}
    return torch.compile(model, backend="getfuse", options=options, **settings)


def notes(model: Any) -> str:
    return " | ".join(n for s in torch_getfuse.report(model).sections for n in s.notes)


def close(ours: Tensor, eager: Tensor) -> None:
    assert ours.shape == eager.shape
    assert ours.stride() == eager.stride()
    assert torch.allclose(ours, eager, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[AnySize]:
    """What graphs for any size became, in order; programs win whatever the clock says."""
    found: list[AnySize] = []

    def watched(*given: Any) -> Any:
        program, note = fast.fast_program(*given)
        if isinstance(program, AnySize):
            found.append(program)
        return program, note

    monkeypatch.setattr(compiler, "fast_program", watched)
    monkeypatch.setattr(fast, "_times", lambda *_: (0.001, 0.002))
    monkeypatch.setattr(fast, "_seen_faster", lambda *given: (given[3], []))
    return found


def programs(program: AnySize) -> list[FastProgram]:
    return [size.run for size in program._sizes.values() if isinstance(size.run, FastProgram)]


def decided(run: Any, sizes: Sequence[Tensor]) -> None:
    """Call each size until it has been decided."""
    for x in sizes:
        for _ in range(any_size.CALLS):
            run(x)


@pytest.mark.parametrize("how", ["automatic", "dynamic=True", "marked"])
def test_each_size_has_a_program(how: str, made: list[AnySize]) -> None:
    model, sizes = stack(), images()
    run = compiled(model, dynamic=True if how == "dynamic=True" else None)
    if how == "marked":
        for axis in (0, 2, 3):
            torch._dynamo.mark_dynamic(sizes[0], axis)
    with torch.no_grad():
        for _ in range(2):
            for x in sizes:
                for _ in range(any_size.CALLS):
                    close(run(x), model(x))
    told = notes(run)
    assert "inner auto: any size: each has a program of its own" in told
    for rows in (24, 16, 9):
        assert f"= {rows}" in told
    assert "runs by FX nodes:" not in told
    last = made[-1]
    assert {tuple(size) for key in last._sizes for size in key if isinstance(size, torch.Size)} >= {
        SIZES[1],
        SIZES[2],
    }
    assert all("packed convolutions" in size.note for size in last._sizes.values())


def any_of(model: nn.Module, sizes: Sequence[Tensor], made: list[AnySize]) -> tuple[Any, AnySize]:
    """A model compiled for any batch, height and width, and what its one graph became."""
    for axis in (0, 2, 3):
        torch._dynamo.mark_dynamic(sizes[0], axis)
    run = compiled(model)
    run(sizes[0])
    (program,) = made
    return run, program


@torch.no_grad()
def test_weights_are_packed_once(made: list[AnySize], monkeypatch: pytest.MonkeyPatch) -> None:
    packs: list[PackedConv] = []
    prepare = PackedConv.prepare

    def counted(self: PackedConv, *given: Any) -> Any:
        packs.append(self)
        return prepare(self, *given)

    monkeypatch.setattr(PackedConv, "prepare", counted)
    model, sizes = stack(), images()
    run, program = any_of(model, sizes, made)
    assert len(packs) == 3
    decided(run, sizes)
    assert len(programs(program)) == 3
    assert len(packs) == 3
    model[3].weight.mul_(0.5)
    for x in sizes:
        close(run(x), model(x))
    assert len(packs) == 6
    (kept,) = program._weights._sets
    assert len(kept.snapshots) == 4  # three weights, and the vectors of all
    assert len(kept.shared) == 3


def through_numpy(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.detach().numpy()[...] *= 1.5


def other_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def last_bit(model: nn.Module) -> None:
    model[3].weight.detach().numpy().reshape(-1)[-1] = -1e3  # type: ignore[index]


def statistics(model: nn.Module) -> None:
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.numpy()[...] += 0.7


def nan(model: nn.Module) -> None:
    model[3].weight.detach().numpy()[0, 0, 0, 0] = float("nan")  # type: ignore[index]


@torch.no_grad()
def test_every_size_sees_weights_that_change(made: list[AnySize]) -> None:
    model, sizes = stack(), images()
    run, program = any_of(model, sizes, made)
    decided(run, sizes)
    for write in (through_numpy, other_data, last_bit, statistics, nan):
        before = model(sizes[0])
        write(model)
        assert not torch.equal(model(sizes[0]), before)
        for x in [*sizes, *sizes]:
            close(run(x), model(x))
    assert len(programs(program)) == 3
    # Written between calls of every two sizes: one copy of the weights, whatever the size.
    model[3].weight.copy_(torch.randn_like(model[3].weight))
    for x in sizes:
        model[0].weight.mul_(1.1)
        close(run(x), model(x))
    assert len(program._weights._sets) == 1


@torch.no_grad()
def test_few_sizes_are_kept(made: list[AnySize], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(any_size, "KEPT", 2)
    monkeypatch.setattr(any_size, "FREE", 100)
    model, sizes = stack(), images()
    run, program = any_of(model, sizes, made)
    decided(run, sizes[:2])
    first = weakref.ref(programs(program)[0])
    for _ in range(4):
        run(sizes[0])
        run(sizes[1])
    # A third one that is called as often runs by FX nodes; called more than twice as often, not.
    for _ in range(4):
        close(run(sizes[2]), model(sizes[2]))
    assert len(programs(program)) == 2
    assert "= 9" not in notes(run)
    for _ in range(4 * any_size.CALLS):
        close(run(sizes[2]), model(sizes[2]))
    assert len(programs(program)) == 2
    assert "= 9" in notes(run)
    gone = [x for x in sizes[:2] if f"= {x.shape[2]}" not in notes(run)]
    assert len(gone) == 1
    close(run(gone[0]), model(gone[0]))
    gc.collect()
    assert (first() is None) == (gone[0] is sizes[0])
    assert len(program._weights._sets[0].made) == 2


@torch.no_grad()
def test_sizes_that_come_once_cost_nothing(
    made: list[AnySize], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(any_size, "_COUNTED", 8)
    model, sizes = stack(), images()
    run, program = any_of(model, sizes, made)
    for rows in range(10, 40):
        x = torch.randn(2, 4, rows, 17)
        close(run(x), model(x))
    assert program._decisions == 1
    assert len(program._counted) <= 8


@torch.no_grad()
def test_deciding_draws_no_random_numbers(made: list[AnySize]) -> None:
    model, sizes = stack(), images()
    run, program = any_of(model, sizes, made)
    before = torch.get_rng_state()
    decided(run, sizes)
    assert program._decisions == 3
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_building_takes_a_share_of_the_time(
    made: list[AnySize], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(any_size, "FREE", 2)
    model, sizes = stack(), images()
    run, program = any_of(model, sizes, made)
    program._deciding = 1e6  # seconds
    decided(run, sizes)
    assert program._decisions == 2  # the free ones
    program._running = 2e6
    run(sizes[2])
    assert program._decisions == 2
    program._running = 2e7
    close(run(sizes[2]), model(sizes[2]))
    assert program._decisions == 3


@torch.no_grad()
def test_a_size_that_disagrees_runs_by_fx_nodes(
    made: list[AnySize], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = FastProgram.compute

    def wrong(self: FastProgram, *args: Any) -> Any:
        found = compute(self, *args)
        return tuple(x + 1 for x in found) if found[0].shape[0] == 3 else found

    monkeypatch.setattr(FastProgram, "compute", wrong)
    model, sizes = stack(), images()
    run, program = any_of(model, sizes, made)
    sizes[1][0, 0, 0, 0] = float("nan")
    decided(run, sizes)
    for x in sizes:
        close(run(x), model(x))
    right, holds_nan, disagrees = (size.note for size in program._sizes.values())
    assert "packed convolutions" in right
    assert "= 16, " in holds_nan
    assert "runs by FX nodes: inputs or weights hold infinities or NaN" in holds_nan
    assert "= 9, " in disagrees
    assert "runs by FX nodes: result 0 differs by" in disagrees
    assert holds_nan in notes(run)


@torch.no_grad()
def test_a_build_that_fails_is_no_failed_call(
    made: list[AnySize], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes = stack(), images()
    run, _ = any_of(model, sizes, made)

    def fails(*_: Any) -> Any:
        raise RuntimeError("no memory\nand more")

    monkeypatch.setattr(fast, "_program", fails)
    decided(run, sizes[1:2])
    close(run(sizes[1]), model(sizes[1]))
    assert "runs by FX nodes: RuntimeError: no memory |" in notes(run) + " |"


@torch.no_grad()
def test_threads_of_several_sizes(made: list[AnySize], monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = stack(), images()
    run, program = any_of(model, sizes, made)
    right = [model(x) for x in sizes]
    calls: list[tuple[Any, ...]] = []  # what each size gives the graph

    def seen(self: AnySize, *args: Any) -> Any:
        calls.append(args)
        return tuple(self._plain(*args))

    with monkeypatch.context() as patch:
        patch.setattr(AnySize, "__call__", seen)
        for x in sizes:
            run(x)
    failures: list[BaseException] = []

    def work(first: int) -> None:
        try:
            with torch.no_grad():
                for k in range(30):
                    at = (first + k) % len(sizes)
                    close(program(*calls[at])[0], right[at])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(programs(program)) == 3


class Resized(nn.Module):
    """Computes with its sizes, and returns one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        batch, _, rows, cols = x.shape
        y = F.relu(self.conv(x))
        y = F.interpolate(y, size=(rows // 2 + 1, cols // 2), mode="nearest")
        y = self.last(y) * (rows / cols) + torch.arange(cols // 2)
        return y.reshape(batch, -1, y.shape[-1]), rows * cols


@torch.no_grad()
def test_sizes_that_the_graph_computes(made: list[AnySize]) -> None:
    model, sizes = Resized().eval(), images()
    run, program = any_of(model, sizes, made)
    for _ in range(any_size.CALLS + 1):
        for x in sizes:
            ours, number = run(x)
            eager, right = model(x)
            close(ours, eager)
            assert number == right
    assert len(programs(program)) == 3


class Chosen(nn.Module):
    """A shape that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten()[x.flatten()[:16].nonzero()[:, 0]]


@torch.no_grad()
def test_shapes_that_depend_on_data_run_by_fx_nodes(made: list[AnySize]) -> None:
    model, x = Chosen().eval(), images()[0]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = compiled(model, dynamic=True)
        for _ in range(any_size.CALLS):
            close(run(x), model(x))
    assert made == []
    assert "its shapes do not follow from the sizes: " in notes(run)


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        return self.conv(x)


@torch.no_grad()
def test_what_changes_its_inputs_runs_by_fx_nodes(made: list[AnySize]) -> None:
    model, x = Adds().eval(), images()[0]
    run = compiled(model, dynamic=True)
    ours, theirs = x.clone(), x.clone()
    assert torch.equal(run(ours), model(theirs))
    assert torch.equal(ours, theirs)
    assert made == []
    assert "changes its inputs" in notes(run)


def test_training_is_as_before(made: list[AnySize]) -> None:
    model, sizes = stack(), images()
    run = compiled(model, dynamic=True)
    for x in sizes:
        assert torch.equal(run(x), model(x))
        run(x).sum().backward()
    assert made == []
    assert "recorded for gradients" in notes(run)
    with torch.inference_mode():
        for x in sizes * any_size.CALLS:
            close(run(x), model(x))
    assert programs(made[-1])
