"""Cost models, searches and explainers of one's own: by entry point, and as objects."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import torch_getfuse
from tests.graphs import Builder
from tests.plugin_package import EXAMPLE, ROOT, install_example, offer
from torch_getfuse import plugins, sweeps
from torch_getfuse.accelerator import Accelerator
from torch_getfuse.cli.main import main
from torch_getfuse.errors import GetfuseError, OptionError, PlanError, PluginError
from torch_getfuse.explain_graph import explain_graph
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import (
    CHOICES,
    REFUSED_BY_SWEEP,
    SWEPT,
    OptionKwargs,
    Options,
    SweptKwargs,
)
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.cost.scheme import Evaluator, FusionScheme
from torch_getfuse.partition.plan import load_plan
from torch_getfuse.partition.problem import FusionProblem, SearchResult
from torch_getfuse.partition.search.recursive_split import EdgeRanker, all_edges
from torch_getfuse.planner import plan_graph
from torch_getfuse.reporting.section import Section

SCHEMES, SEARCHES, EXPLAINERS, RULES = (
    f"torch_getfuse.{kind}" for kind in ("schemes", "searches", "explainers", "rules")
)


@pytest.fixture(autouse=True)
def example_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's modules, not installed: no entry point names them."""
    monkeypatch.syspath_prepend(str(EXAMPLE))


def graph() -> OpGraph:
    made = Builder()
    x = made.input((1, 4, 12, 12))
    for _ in range(4):
        x = made.conv(x, 4, 3)
    return made.graph([x])


def whole_maps() -> type[FusionScheme]:
    from getfuse_example.cost_model import WholeMaps

    return WholeMaps


def options(**changes: Any) -> Options:
    known = {"buffer": 2500, "activation_bytes": 1, "weight_bytes": 1, "progress": False}
    return Options.of({**known, **changes})


# -- entry points -------------------------------------------------------------------------


def test_every_built_in_name_can_be_loaded() -> None:
    pytest.importorskip("torch_geometric")
    for registry in (plugins.SCHEMES, plugins.SEARCHES, plugins.EXPLAINERS):
        assert registry.built_in
        assert set(registry.built_in) <= set(CHOICES[registry.option])
        assert all(callable(registry.load(name)) for name in registry.built_in)


def test_names_come_from_installed_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(
        tmp_path,
        "mine",
        {
            SCHEMES: {"whole_maps": "getfuse_example.cost_model:WholeMaps"},
            SEARCHES: {"greedy_merge": "getfuse_example.search:greedy_merge"},
            EXPLAINERS: {"smallest_tensor": "getfuse_example.explainer:SmallestTensor"},
        },
    )
    with pytest.raises(
        OptionError, match=r"scheme='whole_maps' is not one of 'lbdf', 'brr', 'cascade'$"
    ):
        options(scheme="whole_maps")
    monkeypatch.syspath_prepend(str(tmp_path))
    plan = plan_graph(graph(), options(scheme="whole_maps", method="greedy_merge"))
    assert (plan.scheme, plan.method, plan.cost_model) == ("whole_maps", "greedy_merge", None)
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").verify(prove=True) == plan
    by_object = plan_graph(graph(), options(scheme=whole_maps()))
    assert by_object.dram_bytes == plan.dram_bytes
    split = plan_graph(graph(), options(method="direct", explainer="smallest_tensor"))
    assert split.dram_bytes >= plan_graph(graph(), options(method="exact")).dram_bytes
    for name, near in (
        ("scheme", "whole_maps"),
        ("method", "greedy_merge"),
        ("explainer", "smallest_tensor"),
    ):
        with pytest.raises(OptionError, match=f"'{near}'.*; did you mean '{near}'"):
            options(**{name: near.replace("_", "-")})


def test_a_broken_package_is_named_and_only_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("import a_module_that_nobody_has\n")
    offer(tmp_path, "broken", {SCHEMES: {"bad": "broken_module:Scheme"}})
    monkeypatch.syspath_prepend(str(tmp_path))
    plan_graph(graph(), options())
    with pytest.raises(OptionError, match="is not one of 'lbdf', 'brr', 'cascade', 'bad'"):
        options(scheme="unknown")
    with pytest.raises(
        PluginError,
        match=r"'bad' of the package broken 1\.0 cannot be loaded \(entry point "
        r"bad = broken_module:Scheme of torch_getfuse\.schemes\): ModuleNotFoundError: .*nobody",
    ):
        plan_graph(graph(), options(scheme="bad"))


def test_two_packages_with_one_name_are_both_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("first", "second"):
        offer(tmp_path, package, {SCHEMES: {"twice": "getfuse_example.cost_model:WholeMaps"}})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match=r"'twice' is offered by first 1\.0 and second 1\.0"):
        plan_graph(graph(), options(scheme="twice"))


def test_a_package_cannot_take_a_built_in_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(tmp_path, "other", {SCHEMES: {"lbdf": "getfuse_example.cost_model:WholeMaps"}})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert plugins.SCHEMES.load("lbdf") is Lbdf


def test_the_identity_of_a_name_follows_the_sources_of_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "changing_scheme.py"
    module.write_text("from getfuse_example.cost_model import WholeMaps as Scheme\n")
    offer(tmp_path, "changing", {SCHEMES: {"changing": "changing_scheme:Scheme"}})
    monkeypatch.syspath_prepend(str(tmp_path))
    before = plugins.SCHEMES.identity("changing")
    assert before is not None
    assert before.startswith("changing = changing_scheme:Scheme of changing 1.0, ")
    assert plugins.SCHEMES.identity("changing") == before
    module.write_text(module.read_text() + "# edited\n")
    assert plugins.SCHEMES.identity("changing") != before
    assert plugins.SCHEMES.identity("lbdf") == "lbdf"
    assert plugins.SCHEMES.identity(Lbdf) is None


# -- objects ------------------------------------------------------------------------------


class Mine(Lbdf):
    """LBDF under another name, of which nothing is promised."""

    name = "mine"
    additive = False
    has_predictor = False
    has_cover = False


def test_an_object_serves_where_a_name_does(tmp_path: Path) -> None:
    plan = plan_graph(graph(), options(scheme=Mine))
    assert (plan.scheme, plan.granularity, plan.proof) == ("mine", "line", None)
    assert plan.verify() is plan
    assert Section(plan).granularity == "line"
    plan.save(tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["scheme"] == "mine"
    with pytest.raises(
        PlanError,
        match=r"cost model is not known: scheme='mine' .*install the package .*verify\(scheme=",
    ):
        loaded.verify()
    with pytest.raises(PlanError, match="the plan is for scheme 'mine', not 'whole_maps'"):
        loaded.verify(scheme=whole_maps())
    found = loaded.verify(scheme=Mine)
    assert found == plan
    assert found.verify() is found, "it keeps the cost model"
    given = options(scheme=Mine, plan=tmp_path / "plan.json")
    assert plan_graph(graph(), given) == plan
    pixels = plan_graph(graph(), options(scheme=Mine, granularity="pixel"))
    assert pixels.granularity == "pixel"


def test_a_scheme_that_is_installed_under_another_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(tmp_path, "mine", {SCHEMES: {"maps": "getfuse_example.cost_model:WholeMaps"}})
    monkeypatch.syspath_prepend(str(tmp_path))
    plan = plan_graph(graph(), options(scheme=whole_maps()))
    path = tmp_path / "plan.json"
    plan.save(path)
    assert main(["verify", str(path)]) == 1
    assert (
        "scheme='whole_maps' is not one of 'lbdf', 'brr', 'cascade', 'maps'"
        in capsys.readouterr().err
    )
    assert main(["verify", str(path), "--scheme", "maps", "--prove"]) == 0
    assert load_plan(path).verify(scheme="maps") == plan


def test_what_a_scheme_does_not_promise_is_not_used() -> None:
    plan = plan_graph(graph(), options(scheme=Mine))
    assert [stage.method for stage in plan.stages] == ["direct", "exact", "local"]
    assert plan.stages[1].stopped == "not tried: scheme 'mine' does not promise additive traffic"
    with pytest.raises(OptionError, match="'saliency' asks a validity predictor, and scheme 'mi"):
        plan_graph(graph(), options(scheme=Mine, explainer="saliency"))
    for scheme in (Mine, "cascade"):
        with pytest.raises(OptionError, match="'saliency' asks a validity predictor, and scheme"):
            explain_graph(graph(), options(scheme=scheme, buffer=1000), explainers=["saliency"])
    why = explain_graph(graph(), options(scheme=Mine, buffer=1000))
    assert not why.valid
    assert [blame.explainer for blame in why.blames] == ["all"], "the one that the options name"
    assert why.probability is None


def test_a_cost_model_without_promises_has_safe_answers() -> None:
    class Bare(FusionScheme):
        def buffer(self, mask: int, buffer_bytes: int) -> int:
            return 100 * mask.bit_count() ** 2

    scheme = Bare(graph(), 2, 1)
    kinds = FusionScheme.__annotations__
    flags = {name: getattr(Bare, name) for name in kinds if kinds[name] == "ClassVar[bool]"}
    assert len(flags) == 9
    assert not any(flags.values())
    assert not scheme.hopeless(0b1111, 100)
    assert (scheme.reread(0b1, 100), scheme.least_reread(0b1, 100)) == (0, 0)
    assert sum(term.bytes for term in scheme.terms(0b11, 500)) == scheme.buffer(0b11, 500) == 400
    assert scheme.dram(0b11, 500) == (2 * 576, 2 * 576, 2 * (4 * 4 * 9 + 4))
    plan = plan_graph(graph(), options(scheme=Bare, buffer=500))
    assert plan.scheme == "Bare"
    assert [len(group.ops) for group in plan.groups] == [2, 2]


def test_the_example_is_what_it_promises() -> None:
    scheme = whole_maps()(graph(), 1, 1)
    everything = (1 << len(scheme.graph)) - 1
    for mask in range(1, everything + 1):
        grown = [mask | 1 << i for i in range(mask.bit_length(), len(scheme.graph))]
        assert all(scheme.buffer(mask, 1) <= scheme.buffer(more, 1) for more in grown)
    problem = FusionProblem(Evaluator(scheme, 10_000))
    problem.check_additive([everything, 0b0110])
    optimum = plan_graph(graph(), options(scheme=whole_maps(), method="exact"))
    assert optimum.proof == "optimal"


def test_a_scheme_may_be_a_function_or_have_arguments() -> None:
    class Scaled(Lbdf):
        name = "scaled"

        def __init__(self, *args: Any, factor: int = 1, **named: Any) -> None:
            super().__init__(*args, **named)
            self._factor = factor

        def buffer(self, mask: int, buffer_bytes: int = 0) -> int:
            return self._factor * super().buffer(mask)

        def hopeless(self, mask: int, buffer_bytes: int, part: int = 0) -> bool:
            return self._factor * self.floor(mask, part) >= buffer_bytes

    def twice(graph: OpGraph, **widths: Any) -> FusionScheme:
        return Scaled(graph, factor=2, **widths)

    partial = plan_graph(graph(), options(scheme=functools.partial(Scaled, factor=2)))
    assert partial.scheme == "scaled"
    function = plan_graph(graph(), options(scheme=twice))
    assert function.scheme == "twice"
    assert [g.ops for g in function.groups] == [g.ops for g in partial.groups]
    assert partial.groups != plan_graph(graph(), options()).groups


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheme": Lbdf}, "scheme= is an object called 'lbdf', as one that comes with"),
        ({"scheme": 3}, "scheme=3 is not one of 'lbdf', 'brr', 'cascade'; or give"),
        ({"method": None}, "method=None is not one of 'auto', "),
        ({"explainer": "saliencey"}, "did you mean 'saliency'"),
        ({"granularity": "tile", "scheme": Mine}, "granularity='tile' is not one of 'line', 'pix"),
        ({"accelerator": Accelerator}, "accelerator=<class"),
    ],
)
def test_wrong_objects_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        plan_graph(graph(), options(**given))


def test_what_an_object_gives_is_checked() -> None:
    def nonsense(*args: object, **named: object) -> dict[str, object]:
        return {}

    with pytest.raises(OptionError, match="scheme=nonsense makes a dict of a graph"):
        plan_graph(graph(), options(scheme=nonsense))

    class Halves(Lbdf):
        name = "halves"

        def buffer(self, mask: int, buffer_bytes: int = 0) -> Any:
            return super().buffer(mask) / 2

    with pytest.raises(GetfuseError, match=r"scheme 'halves' gives .*\.\d for the buffer of the"):
        plan_graph(graph(), options(scheme=Halves))

    def nothing(problem: FusionProblem, *rest: object) -> Any:
        return []

    def cheap(problem: FusionProblem, *rest: object) -> SearchResult:
        return SearchResult(problem.blocks, 1, 1, 0.0)

    def bounded(problem: FusionProblem, *rest: object) -> SearchResult:
        cost = problem.cost(problem.blocks)
        return SearchResult(problem.blocks, cost, 1, 0.0, lower_bound_bytes=cost)

    def endless(problem: FusionProblem, *rest: object) -> SearchResult:
        while True:
            problem.evaluator.work.add(1000)

    with pytest.raises(OptionError, match="method=nothing returns a list"):
        plan_graph(graph(), options(method=nothing))
    with pytest.raises(PlanError, match=r"the cheap search states 1 B .* for a plan of 5200 B"):
        plan_graph(graph(), options(method=cheap))
    with pytest.raises(PlanError, match=r"lost its plan at the work limit.*torch_getfuse\.Run"):
        plan_graph(graph(), options(method=endless, time_limit=0.1))
    plan = plan_graph(graph(), options(method=bounded))
    assert plan.proof == "bound", "what every plan moves, not what the search says"
    assert plan.lower_bound_bytes < plan.dram_bytes


def test_an_explainer_of_ones_own_is_asked() -> None:
    asked = []

    def watched(problem: FusionProblem, seed: int) -> EdgeRanker:
        inner = all_edges(problem.graph)

        def rank(group: int) -> list[tuple[tuple[int, int], float]]:
            asked.append(group)
            return inner(group)

        return rank

    plan = plan_graph(graph(), options(method="direct", explainer=watched, buffer=900))
    assert asked
    assert plan.groups == plan_graph(graph(), options(method="direct", buffer=900)).groups
    why = explain_graph(graph(), options(buffer=900), explainers=("all", watched))
    assert [blame.explainer for blame in why.blames] == ["all", "watched"]
    assert why.blames[0].edges == why.blames[1].edges
    json.loads(why.to_json())


def test_an_accelerator_of_ones_own() -> None:
    chip = Accelerator("chip", 3000, 2, 1)
    made = Options.of({"accelerator": chip})
    assert (made.buffer_bytes, made.activation_bytes, made.weight_bytes) == (3000, 2, 1)
    with pytest.raises(OptionError, match=r"Accelerator 'chip': buffer_bytes=0"):
        Accelerator("chip", 0, 1, 1)


# -- sweeps and the plan cache ------------------------------------------------------------


def test_objects_in_a_sweep(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model, x = torch.nn.Conv2d(3, 4, 3).eval(), torch.zeros(1, 3, 8, 8)
    path = tmp_path / "sweep.jsonl"

    def run(**given: Any) -> sweeps.Sweep:
        return torch_getfuse.sweep(model, (x,), n_jobs=1, path=path, progress=False, **given)

    first = run(schemes=["lbdf", Mine], methods=["auto", _blocks])
    assert [record["scheme"] for record in first.records] == ["lbdf", "lbdf", "mine", "mine"]
    assert [record["method"] for record in first.records] == ["auto", "_blocks"] * 2
    assert first.kept == 0
    again = run(schemes=["lbdf", Mine], methods=["auto", _blocks])
    assert again.kept == 1, "only the point that is all names"
    assert "mine" in str(again)

    class Other(Mine):
        pass

    with pytest.raises(OptionError, match="two schemes are called 'mine'"):
        run(schemes=[Mine, Other])


def _blocks(problem: FusionProblem, *rest: object) -> SearchResult:
    return SearchResult(problem.blocks, problem.cost(problem.blocks), 1, 0.0)


def test_plans_by_objects_are_not_cached(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from torch_getfuse.backend.plan_cache import cache_key, find_plan, store_plan

    for given in ({"scheme": Mine}, {"method": _blocks}, {"explainer": _blocks}):
        asked = options(cache=tmp_path, **given)
        assert cache_key(graph(), asked) is None
        store_plan(plan_graph(graph(), options()), graph(), asked)
        assert find_plan(graph(), asked) is None
    assert not list(tmp_path.iterdir())
    named = options(cache=tmp_path)
    store_plan(plan_graph(graph(), named), graph(), named)
    assert find_plan(graph(), named) is not None


# -- what an editor completes -------------------------------------------------------------


def test_the_keyword_arguments_are_the_options() -> None:
    fields = [field.name for field in dataclasses.fields(Options)]
    assert sorted(OptionKwargs.__annotations__) == sorted(fields)
    told, known = (typing.get_type_hints(each) for each in (OptionKwargs, Options))
    assert {name: told[name] for name in fields} == {name: known[name] for name in fields}
    swept = {*SWEPT, *REFUSED_BY_SWEEP, "progress"}
    assert set(SweptKwargs.__annotations__) == set(fields) - swept


@pytest.mark.parametrize("name", torch_getfuse.__all__)
def test_public_names_are_documented(name: str) -> None:
    value = getattr(torch_getfuse, name)
    assert name in torch_getfuse._HOMES
    assert inspect.getdoc(value), f"{name} has no docstring"
    if callable(value) and not isinstance(value, type):
        known = inspect.signature(value).parameters
        assert all(p.annotation is not p.empty for p in known.values())


# -- the example package ------------------------------------------------------------------

SCRIPT = """
import torch, torch_getfuse
from example_model import net
model, x = net(), torch.rand(1, 3, 16, 16)
options = dict(buffer="24KB", scheme="whole_maps", method="greedy_merge",
               explainer="smallest_tensor")
plan = torch_getfuse.plan(model, (x,), **options)
blur = next(op for op in plan.graph if op.kind == "example::blur")
assert (str(blur.reads[0].window), blur.reason) == ("3x3", "")
plan.save("plan.json")
assert torch_getfuse.load_plan("plan.json").verify(prove=True).scheme == "whole_maps"
compiled = torch.compile(model, backend="getfuse", options={**options, "cache": "plans"})
with torch.no_grad():
    assert torch.equal(compiled(x), model(x))
print(torch_getfuse.report(compiled))
lines = torch_getfuse.plan(model, (x,), buffer="24KB")
y, ledger = torch_getfuse.run_counted(model, (x,), lines)
assert torch.equal(y, model(x))
print(ledger)
"""
MODEL = """
import torch
from torch import nn
import getfuse_example.operators

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    def forward(self, x):
        y = torch.ops.example.soft_clip(self.first(x), 1.5)
        return self.second(torch.ops.example.blur(y)) + y

def net():
    return Net().eval()
"""


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs Python in a folder where the example is installed, and gives what it prints."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("example")
    site = install_example(folder)
    (folder / "example_model.py").write_text(MODEL)
    path = os.pathsep.join(map(str, (ROOT, site, folder)))

    def run(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    return run


def test_the_example_package_through_python(example: Callable[..., str]) -> None:
    printed = " ".join(example("-c", SCRIPT).split())
    assert "scheme whole_maps, buffer 24 KB" in printed
    assert "greedy_merge: " in printed
    assert "example::blur) is not torch's own: its rule says what it reads" in printed


def test_the_example_package_on_the_command_line(example: Callable[..., str]) -> None:
    planning = ("-m", "torch_getfuse", "plan", "example_model:net", "--input", "1x3x16x16")
    chosen = ("--scheme", "whole_maps", "--method", "greedy_merge", "--buffer", "24KB")
    asked = (*chosen, "--explainer", "smallest_tensor", "-o", "cli.json")
    assert "fusion groups" in example(*planning, *asked)
    assert "cli.json: OK" in example("-m", "torch_getfuse", "verify", "--prove", "cli.json")
    missed = example(*planning, "--scheme", "whole_mops", code=2)
    assert missed == (
        "torch-getfuse: scheme='whole_mops' is not one of 'lbdf', 'brr', 'cascade', 'whole_maps'; "
        "did you mean 'whole_maps'?\n"
    )
    told = example(
        *("-m", "torch_getfuse", "explain", "example_model:net", "--input", "1x3x16x16"),
        *("--scheme", "whole_maps", "--buffer", "19KB", "--explainers", "smallest_tensor"),
    )
    assert "smallest_tensor" in told
