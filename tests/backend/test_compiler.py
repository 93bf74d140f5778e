"""The torch.compile backend: its contract with Dynamo, its options, and what report() finds."""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import one_line
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import torch_getfuse
from torch_getfuse import group_planner
from torch_getfuse.backend import compiler


class Block(nn.Module):
    """A convolution with folded batch norm, a skip and two outputs."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.norm(self.conv(x)).relu()
        return {"sum": self.last(y) + y, "skip": y}


def compile_block(**options: object) -> tuple[nn.Module, object, torch.Tensor]:
    torch.manual_seed(0)
    model = Block().eval()
    settings = {"buffer": "2KB", "strict": True, **options}
    return model, torch.compile(model, backend="getfuse", options=settings), torch.randn(2, 3, 8, 8)


def test_the_name_needs_no_import() -> None:
    code = (
        "import torch\n"
        "assert 'getfuse' in torch._dynamo.list_backends()\n"
        "m = torch.nn.Conv2d(1, 1, 1).eval()\n"
        "x = torch.ones(1, 1, 4, 4)\n"
        "assert torch.equal(torch.compile(m, backend='getfuse')(x), m(x))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_equal_to_eager_with_the_structure_of_the_model() -> None:
    model, compiled, x = compile_block()
    with torch.no_grad():
        expected, got = model(x), compiled(x)  # type: ignore[operator]
    assert got.keys() == expected.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_gradients_flow_through_the_groups() -> None:
    model, compiled, x = compile_block()
    for run in (model, compiled):
        model.zero_grad()
        run(x)["sum"].sum().backward()  # type: ignore[operator]
        if run is model:
            expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    got = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(got) == len(expected) == 6
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_one_child_per_group() -> None:
    model, _, x = compile_block()
    plan = torch_getfuse.plan(model, (x,), buffer="2KB")
    split = torch_getfuse.split(model, (x,), plan)
    assert [name for name, _ in split.named_children()] == [
        f"fusion_group_{k}" for k in range(len(plan.groups))
    ]
    expected, got = model(x), split(x)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert {id(p) for p in model.parameters()} <= {id(p) for p in split.parameters()}


def test_report_before_and_after() -> None:
    model, compiled, x = compile_block()
    assert "no graph has been compiled" in one_line(torch_getfuse.report(compiled))
    compiled(x)  # type: ignore[operator]
    text = str(torch_getfuse.report(compiled))
    assert "conv .. add (4 ops)" in text
    assert str(torch_getfuse.report(model)) == text
    planned = torch_getfuse.report(model, x, buffer="2KB").to_dict()["sections"][0]
    assert (
        planned["fingerprint"]
        == torch_getfuse.report(model).to_dict()["sections"][0]["fingerprint"]
    )


def test_reports_in_a_loop_plan_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_getfuse.reporting import outlook

    asked = []
    original = outlook.Proof

    def count(*args: Any) -> Any:
        asked.append(args)
        return original(*args)

    monkeypatch.setattr(outlook, "Proof", count)
    _, compiled, x = compile_block()
    for _ in range(3):
        compiled(x)  # type: ignore[operator]
        assert "scheme='cascade'" in one_line(torch_getfuse.report(compiled))
    assert len(asked) == 1


def test_second_instance_of_a_class_has_its_own_results_and_a_report() -> None:
    """Dynamo compiles the class once: the second instance never reaches the backend."""
    _, compiled, x = compile_block()
    compiled(x)  # type: ignore[operator]
    second = Block().eval()
    options = {"buffer": "2KB", "strict": True}
    again = torch.compile(second, backend="getfuse", options=options)
    assert torch.equal(again(x)["sum"], second(x)["sum"])
    assert "compiled for another instance of this class" in one_line(torch_getfuse.report(again))


def test_reports_of_a_function_and_of_methods() -> None:
    class Two(Block):
        def half(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).relu()

    model, second, x = Two().eval(), Two().eval(), torch.randn(2, 3, 8, 8)

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return model.half(x) * 2

    def compile_it(what: Callable[..., Any]) -> Callable[..., Any]:
        run = torch.compile(what, backend="getfuse", options={"strict": True})
        run(x)
        return run

    compile_it(model)
    for one in (compile_it(model.half), model.half, compile_it(doubled), doubled):
        report = torch_getfuse.report(one)
        assert len(report.sections) == 1
        assert "another instance" not in one_line(report)
    assert "another instance" in one_line(torch_getfuse.report(compile_it(second.half)))


def _as_a_function(model: nn.Module, options: dict[str, object]) -> Callable[..., Any]:
    return torch.compile(model.forward, backend="getfuse", options=options)


def _as_a_module(model: nn.Module, options: dict[str, object]) -> Callable[..., Any]:
    return torch.compile(model, backend="getfuse", options=options)


@pytest.mark.parametrize("compile_it", [_as_a_function, _as_a_module])
def test_two_wrappers_of_one_model_have_reports_of_their_own(
    compile_it: Callable[..., Callable[..., Any]],
) -> None:
    """Two buffers compared side by side; the model itself has both plans, which have no sum."""
    torch._dynamo.reset()
    model, x = Block().eval(), torch.randn(2, 3, 8, 8)
    buffers = {}
    for size in (2048, 4096):
        compiled = compile_it(model, {"buffer": size, "strict": True})
        compiled(x)
        buffers[compiled] = size
    for compiled, size in buffers.items():
        (section,) = torch_getfuse.report(compiled).sections
        assert section.plan.buffer_bytes == size
    report = torch_getfuse.report(model)
    assert [section.plan.buffer_bytes for section in report.sections] == [2048, 4096]
    assert "a call runs one of those, so they are not added up" in one_line(report)
    again = compile_it(model, {"buffer": 2048, "strict": True})  # torch runs the first one's code
    assert torch_getfuse.report(again).sections[0].plan.buffer_bytes == 2048


def test_a_backend_that_brings_its_options_has_a_report() -> None:
    """The wrapper knows of none, and another model's were compiled with none as well."""
    torch._dynamo.reset()
    x = torch.randn(2, 3, 8, 8)
    others = torch.compile(nn.Conv2d(3, 4, 3), backend="getfuse")
    others(x)
    backend = functools.partial(compiler.getfuse, options={"buffer": 2048})
    compiled = torch.compile(Block().eval(), backend=backend)
    compiled(x)
    (section,) = torch_getfuse.report(compiled).sections
    assert section.plan.buffer_bytes == 2048


@pytest.mark.parametrize(
    "change", [lambda model, x: model(torch.cat([x, x])), lambda model, x: model.train()(x)]
)
def test_graphs_of_one_code_are_not_added_up(change: Callable[..., object]) -> None:
    torch._dynamo.reset()
    _, compiled, x = compile_block()
    compiled(x)  # type: ignore[operator]
    assert "graphs" not in str(torch_getfuse.report(compiled)).partition("\n")[0]
    change(compiled, x)
    assert one_line(torch_getfuse.report(compiled)).startswith(
        "2 graphs, some of one piece of code, compiled for several inputs or settings: a call "
        "runs one of those, so they are not added up "
    )


@pytest.mark.parametrize("make", [Block, lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())])
def test_a_report_where_dynamo_freezes_parameters(make: Callable[[], nn.Module]) -> None:
    """They are attributes of the graph then, not inputs; each instance has code of its own."""
    x = torch.randn(2, 3, 8, 8)
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        for model in (make().eval(), make().eval()):
            compiled = torch.compile(model, backend="getfuse", options={"strict": True})
            compiled(x)
            text = str(torch_getfuse.report(compiled))
            assert text == str(torch_getfuse.report(model))
            assert "fusion_group_0" in torch_getfuse.report(model).to_csv()
            assert len(torch_getfuse.report(model).sections) == 1
            assert "another instance" not in text


def test_replaced_and_updated_parameters_are_used() -> None:
    model, compiled, x = compile_block()
    compiled(x)  # type: ignore[operator]
    model.last.weight = nn.Parameter(torch.randn_like(model.last.weight))  # type: ignore[union-attr]
    with torch.no_grad():
        model.conv.weight.mul_(2)  # type: ignore[union-attr, operator]
    assert torch.equal(compiled(x)["sum"], model(x)["sum"])  # type: ignore[operator]


def test_graph_breaks_give_a_section_each() -> None:
    class Broken(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            y = self.conv(x).relu()
            torch._dynamo.graph_break()
            return self.last(y)

    model, x = Broken().eval(), torch.randn(1, 3, 8, 8)
    compiled = torch.compile(model, backend="getfuse", options={"strict": True})
    assert torch.equal(compiled(x), model(x))
    report = torch_getfuse.report(compiled)
    assert [s["name"] for s in report.to_dict()["sections"]] == ["graph 0", "graph 1"]
    assert str(report).startswith("2 graphs: ")  # one call runs both


def test_functions_compile_too() -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * 2

    compiled = torch.compile(work, backend="getfuse")
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(compiled(x), work(x))
    assert "relu .. mul (2 ops)" in one_line(torch_getfuse.report(compiled))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": {"bufer": 1}}, "unknown option 'bufer'; did you mean 'buffer'"),
        ({"options": {"buffer": "12XB"}}, "12XB"),
        ({"options": {"plan": "none.json"}}, "plan 'none.json': it cannot be read"),
        ({"mode": "max-autotune"}, "mode='max-autotune' is a setting of inductor"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    compiled = torch.compile(Block().eval(), backend="getfuse", **settings)  # type: ignore[call-overload]
    with pytest.raises(BackendCompilerFailed, match=message):
        compiled(torch.randn(1, 3, 8, 8))


def test_a_plan_of_another_graph_is_refused(tmp_path: Path) -> None:
    model, x = Block().eval(), torch.randn(1, 3, 8, 8)
    torch_getfuse.plan(model, (x,)).save(tmp_path / "plan.json")
    other = torch.compile(
        Block(5).eval(), backend="getfuse", options={"plan": str(tmp_path / "plan.json")}
    )
    with pytest.raises(BackendCompilerFailed, match="another graph"):
        other(x)


def test_a_failure_warns_once_and_runs_unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no plan today")

    monkeypatch.setattr(compiler, "plan_graph", fail)
    monkeypatch.setattr(compiler, "find_plan", lambda *_: None)  # none kept by another test
    model, x = Block().eval(), torch.randn(1, 3, 8, 8)
    compiled = torch.compile(model, backend="getfuse")
    with pytest.warns(UserWarning, match="RuntimeError: no plan today"):
        got = compiled(x)
    assert torch.equal(got["sum"], model(x)["sum"])
    assert "no plan today" in one_line(torch_getfuse.report(compiled))
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.compile(Block().eval(), backend="getfuse")(x)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="no plan today"):
        torch.compile(Block().eval(), backend="getfuse", options={"strict": True})(x)


def test_missing_inputs_are_named() -> None:
    with pytest.raises(torch_getfuse.OptionError, match="example inputs are missing"):
        torch_getfuse.plan(Block())
    with pytest.raises(torch_getfuse.OptionError, match="args must be a tuple"):
        torch_getfuse.plan(Block(), torch.randn(1, 3, 8, 8))  # type: ignore[arg-type]
    with pytest.raises(torch_getfuse.OptionError, match="needs example inputs"):
        torch_getfuse.report(Block(), buffer="1KB")


def test_a_graph_without_operators_runs_as_it_is() -> None:
    def views(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).unsqueeze(0)

    x = torch.randn(2, 3, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(torch.compile(views, backend="getfuse")(x), views(x))


def test_an_interrupt_while_planning_leaves_nothing_half_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 1)).eval()
    x = torch.randn(1, 3, 9, 9)
    options = {"buffer": 777, "cache": False, "inner": "eager", "strict": True}
    compiled = torch.compile(model, backend="getfuse", options=options)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(group_planner, "exact", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            compiled(x)
    assert caught.value.plan.verify().stages[-1].stopped == "interrupted"  # type: ignore[attr-defined]
    assert not torch_getfuse.report(compiled).sections
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    (section,) = torch_getfuse.report(compiled).sections
    assert "interrupted" not in [stage.stopped for stage in section.plan.stages]
