"""The backend in the settings that torch.compile has, and the traps of each."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import re
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from texts import one_line
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed

import torch_getfuse
from torch_getfuse.backend import compiler
from torch_getfuse.errors import GetfuseError


class Net(nn.Module):
    """A convolution, batch norm, in-place activation, skip and pooling: any size, any batch."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width, eps=1e-3)
        self.b = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.a(x)).relu_()
        return nn.functional.max_pool2d(self.b(y) + y, 2).mean((2, 3))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def compile_it(model: Any, dynamic: bool | None = None, **options: object) -> Callable[..., Any]:
    settings = {"buffer": "4KB", "strict": True, **options}
    return torch.compile(model, backend="getfuse", options=settings, dynamic=dynamic)


# -- dynamic shapes -------------------------------------------------------------------------

SHAPES = [(2, 3, 8, 8), (3, 3, 8, 8), (5, 3, 12, 8), (7, 3, 20, 16), (9, 3, 10, 14)]


def count_compiles(backend: Any, dynamic: bool | None) -> int:
    """How often a backend is called for calls at all of ``SHAPES``."""
    calls = 0

    def counting(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        nonlocal calls
        calls += 1
        return backend(gm, inputs)

    torch._dynamo.reset()
    model = Net().eval()
    compiled = torch.compile(model, backend=counting, dynamic=dynamic)
    with torch.no_grad():
        for shape in SHAPES:
            x = torch.randn(shape)
            assert torch.equal(compiled(x), model(x))
    return calls


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_no_more_recompiles_than_torchs_own(dynamic: bool | None) -> None:
    ours = count_compiles(
        lambda gm, inputs: compiler.getfuse(gm, inputs, options={"strict": True}), dynamic
    )
    assert ours == count_compiles(lambda gm, inputs: gm.forward, dynamic)


def test_the_report_says_that_shapes_are_hints() -> None:
    model = Net().eval()
    compiled = compile_it(model, dynamic=True)
    compiled(torch.randn(SHAPES[0]))
    (section,) = torch_getfuse.report(compiled).sections
    assert "shapes are hints: " in section.notes[0]
    assert "= 2, " in section.notes[0]
    assert "= 8" in section.notes[0]
    assert not re.search(r"\b\d+ = ", section.notes[0])  # the channels are no hint
    assert "Note: shapes are hints" in one_line(torch_getfuse.report(compiled))
    torch._dynamo.reset()
    static = compile_it(Net().eval(), dynamic=False)
    static(torch.randn(SHAPES[0]))
    notes = torch_getfuse.report(static).sections[0].notes
    assert not any("shapes are hints" in note for note in notes)


def test_dynamic_eps_and_momentum() -> None:
    """With ``dynamic=True`` Dynamo lifts them as 0-d tensors with ``.item()``."""
    model = Net().train()
    other = copy.deepcopy(model)
    compiled = compile_it(other, dynamic=True)
    for eps in (1e-3, 1e-1):
        model.norm.eps = other.norm.eps = eps
        model.norm.momentum = other.norm.momentum = 10 * eps
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(compiled(x), model(x))
    assert torch.equal(model.norm.running_var, other.norm.running_var)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_dynamic_shapes_with_a_planned_backward(inner: str) -> None:
    model = Net().train()
    other = copy.deepcopy(model)
    compiled = compile_it(other, dynamic=True, inner=inner, backward=True)
    for shape in SHAPES:
        x = torch.randn(shape)
        for run in (model, compiled):
            run.zero_grad()  # type: ignore[attr-defined]
            run(x).square().sum().backward()
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), shape  # type: ignore[arg-type]
    names = [section.name for section in torch_getfuse.report(compiled).sections]
    assert [name.endswith("backward") for name in names] == [False, True] * (len(names) // 2)


# -- parameters of torch.compile (docs/torch-compile.md) ------------------------------------


def test_disable_runs_the_model_as_it_is() -> None:
    class Own(nn.Module):  # records of other instances would be found as well
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu() + 1

    model, x = Own(), torch.randn(1, 3, 8, 8)
    compiled = torch.compile(model, backend="getfuse", disable=True)
    assert torch.equal(compiled(x), model(x))
    assert torch_getfuse.report(model).sections == ()


def test_fullgraph_raises_at_a_break() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        y = x.relu()
        torch._dynamo.graph_break()
        return y + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(broken, backend="getfuse", fullgraph=True)(torch.randn(1, 3, 4, 4))


def test_suppressed_errors_run_eager() -> None:
    model, x = Net().eval(), torch.randn(1, 3, 8, 8)
    compiled = torch.compile(model, backend="getfuse", options={"bufer": 1})
    with torch._dynamo.config.patch(suppress_errors=True):
        assert torch.equal(compiled(x), model(x))


def test_a_stance_that_turns_compiling_off() -> None:
    model, x = Net().eval(), torch.randn(1, 3, 8, 8)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(compile_it(model)(x), model(x))
        with pytest.raises(torch_getfuse.CaptureError, match="set_stance"):
            torch_getfuse.plan(model, (x,))


# -- traps ----------------------------------------------------------------------------------


def test_the_order_of_mutations_is_kept() -> None:
    def work(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        a = x * 2
        b = a + 1
        a.add_(10)
        return a, b, a * 3

    x = torch.randn(1, 3, 4, 4)
    assert all(map(torch.equal, compile_it(work)(x), work(x)))


@pytest.mark.parametrize("buffer", [64, 1024, "256KB"])
def test_writes_to_a_part(buffer: object) -> None:
    """As in MViT's relative positions; the call was an operator and the copy of its part another,
    and no group could have both.
    """
    linear = nn.Linear(8, 8)

    def run(x: torch.Tensor) -> torch.Tensor:
        scores = linear(x)
        scores[:, 1:, 1:] += x[:, 1:, :7]
        scores[:, :1].mul_(2).add_(1)
        part = scores[:, 2:]
        part.relu_()
        return torch.softmax(scores, -1) + part.sum()

    x = torch.randn(2, 8, 8)
    for grad in (False, True):
        torch._dynamo.reset()
        with torch.set_grad_enabled(grad):
            assert torch.equal(compile_it(run, buffer=buffer)(x), run(x))


def test_mutated_inputs_and_views_of_them() -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        view = x[:, :1]
        view.mul_(2)
        return torch.relu(x) + 1

    x = torch.randn(1, 3, 4, 4)
    ours, theirs = x.clone(), x.clone()
    assert torch.equal(compile_it(work)(ours), work(theirs))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_the_compiled_graph_returns_a_tuple(inner: str) -> None:
    """A bare tensor would be indexed without a word."""
    returned = []

    def checking(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        run = compiler.getfuse(gm, inputs, options={"strict": True, "inner": inner})

        def spy(*args: Any) -> Any:
            returned.append(run(*args))
            return returned[-1]

        return spy

    model, x = Net().eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=checking)(x), model(x))
    assert type(returned[0]) is tuple


def test_tuples_dicts_scalars_constants_and_unused_results() -> None:
    def work(x: torch.Tensor, how: dict[str, Any]) -> dict[str, Any]:
        low, _ = torch.aminmax(x, dim=1)
        unused = torch.relu(x) * 3  # noqa: F841
        shifted = torch.relu(x * how["scale"] + torch.ones(4)) + how["shift"]
        values, where = shifted.max(dim=1)
        return {"pair": (low, values), "shape": tuple(x.shape), "x": x, "where": where, "n": 3}

    x, how = torch.randn(1, 3, 4, 4), {"scale": 2.5, "shift": torch.ones(4)}
    got, expected = compile_it(work)(x, how), work(x, how)
    assert got.keys() == expected.keys()
    assert got["shape"] == expected["shape"]
    assert got["x"] is x
    for ours, theirs in zip((*got["pair"], got["where"]), (*expected["pair"], expected["where"])):
        assert torch.equal(ours, theirs)


def test_an_index_error_in_planning_does_not_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo lets a bare IndexError through to the user as one of the program's own."""

    def fail(*args: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(compiler, "plan_graph", fail)
    model, x = Net().eval(), torch.randn(1, 3, 8, 8)
    with pytest.raises(BackendCompilerFailed, match="IndexError: list index") as caught:
        compile_it(model, cache=False)(x)
    assert isinstance(caught.value.inner_exception, GetfuseError)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="IndexError: list index out of range"):
        assert torch.equal(compile_it(model, strict=False, cache=False)(x), model(x))


def test_an_optimizer_step_between_calls() -> None:
    model = Net().eval()
    compiled = compile_it(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 3, 8, 8)
    before = compiled(x)
    before.sum().backward()
    sgd.step()
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), before)


def test_an_unplanned_graph_is_told_beside_a_planned_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x).relu()
            torch._dynamo.graph_break()
            return self.b(y).mean((2, 3))

    original, calls = compiler.plan_graph, []

    def second_fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("not this one")
        return original(*args)

    monkeypatch.setattr(compiler, "plan_graph", second_fails)
    model, x = Broken().eval(), torch.randn(1, 3, 8, 8)
    compiled = compile_it(model, strict=False, cache=False)
    with pytest.warns(UserWarning, match="not this one"):
        assert torch.equal(compiled(x), model(x))
    for target in (compiled, model):
        report = torch_getfuse.report(target)
        assert [section.name for section in report.sections] == ["graph 0"]
        assert report.unplanned == ("graph 1 runs unplanned: RuntimeError: not this one",)


# -- threads, processes, pickling -----------------------------------------------------------


def test_four_threads_compile_and_run_models_of_their_own() -> None:
    failures: list[BaseException] = []
    # Each of a class of its own, so that each thread compiles.
    kinds = [type(f"Net{k}", (Net,), {"forward": copy_function(Net.forward)}) for k in range(4)]
    models = [kind(4 + k).eval() for k, kind in enumerate(kinds)]
    start = threading.Barrier(len(models))
    found: dict[int, torch_getfuse.Report] = {}

    def work(k: int) -> None:
        try:
            start.wait()
            compiled = compile_it(models[k])
            for size in (8, 12, 8):
                x = torch.randn(2, 3, size, size)
                y = compiled(x)
                y.sum().backward()
                assert torch.equal(y, models[k](x))
            found[k] = torch_getfuse.report(compiled)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for k, report in found.items():
        weights = report.sections[0].plan.graph.ops[0].weight_elements
        assert weights == sum(p.numel() for p in models[k].a.parameters()), k


def copy_function(function: Any) -> Any:
    """The same function with a code object of its own, which Dynamo files compiles under."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, "forward")


FORK = """
import multiprocessing, torch
from torch import nn
torch.set_num_threads(1)
m = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
x = torch.ones(1, 3, 8, 8)
c = torch.compile(m, backend="getfuse", options={"strict": True, "cache": False})
def work(queue):
    old = torch.equal(c(x), m(x))
    new = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Sigmoid()).eval()
    torch._dynamo.reset()
    other = torch.compile(new, backend="getfuse", options={"strict": True})
    queue.put(old and torch.equal(other(x), new(x)))
c(x)
context = multiprocessing.get_context("fork")
queue = context.Queue()
child = context.Process(target=work, args=(queue,))
child.start()
assert queue.get(timeout=100)
child.join()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="fork is not there")
def test_a_forked_process_runs_and_compiles() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)


SPAWN = """
import multiprocessing, torch
from torch import nn
def work(queue):
    m = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    x = torch.ones(1, 3, 8, 8)
    c = torch.compile(m, backend="getfuse", options={"strict": True})
    queue.put(torch.equal(c(x), m(x)))
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=work, args=(queue,))
    child.start()
    assert queue.get(timeout=100)
    child.join()
"""


def test_a_spawned_process_compiles(tmp_path: Any) -> None:
    assert "spawn" in multiprocessing.get_all_start_methods()
    script = tmp_path / "spawned.py"
    script.write_text(SPAWN)
    subprocess.run([sys.executable, str(script)], check=True, timeout=120)


def test_plans_and_reports_pickle() -> None:
    model, x = Net().eval(), torch.randn(1, 3, 8, 8)
    compiled = compile_it(model)
    compiled(x)
    report = torch_getfuse.report(compiled)
    again = pickle.loads(pickle.dumps(report))
    assert str(again) == str(report)
    assert again.to_dict() == report.to_dict()
    plan = torch_getfuse.plan(model, (x,), buffer="4KB")
    other = pickle.loads(pickle.dumps(plan))
    assert other == plan
    assert torch.equal(torch_getfuse.split(model, (x,), other.verify())(x), model(x))


# -- options are refused at once ------------------------------------------------------------


@pytest.mark.parametrize("ask", [torch_getfuse.plan, torch_getfuse.explain])
def test_an_inner_backend_is_refused_where_nothing_is_compiled(ask: Callable[..., Any]) -> None:
    model, x = Net().eval(), torch.randn(1, 3, 8, 8)
    with pytest.raises(torch_getfuse.OptionError, match="'bogus' is not a backend"):
        ask(model, (x,), inner="bogus")
    with pytest.raises(torch_getfuse.OptionError, match="did you mean 'inductor'"):
        ask(model, (x,), inner="inducter")


def test_report_refuses_an_inner_backend() -> None:
    model, x = Net().eval(), torch.randn(1, 3, 8, 8)
    with pytest.raises(torch_getfuse.OptionError, match="did you mean 'inductor'"):
        torch_getfuse.report(model, x, inner="inducter")
    assert torch_getfuse.report(model, x, inner="inductor").sections
