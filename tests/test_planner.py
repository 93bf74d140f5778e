"""The planner: legal verified plans by every method, the best of them by "auto", honest stages."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import random
from typing import Any

import pytest

from tests.determinism import Ticking, outputs_of_hash_seeds
from tests.graphs import Builder, random_graph, wide_graph
from torch_getfuse import group_planner, planner
from torch_getfuse.errors import GetfuseError, Interrupted, OptionError, PlanError
from torch_getfuse.ir import OpGraph, Window
from torch_getfuse.options import CHOICES, Options
from torch_getfuse.partition import work
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.cost.scheme import Dram
from torch_getfuse.partition.exact import backward, windows
from torch_getfuse.partition.exact.down_sets import TooWide
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.partition.problem import FusionProblem, SearchInterrupted, SearchResult
from torch_getfuse.partition.wide import group_cover
from torch_getfuse.planner import plan_graph
from torch_getfuse.reporting.section import Section

METHODS = [method for method in CHOICES["method"] if method is not None]
SEARCHES = ["random", "local", "nsga2"]


def options(method: str = "auto", buffer: int = 400, **changes: Any) -> Options:
    return Options(
        **{
            "buffer": buffer,
            "method": method,
            "activation_bytes": 1,
            "weight_bytes": 1,
            "budget": 40,
            "progress": False,
            **changes,
        }
    )


def cnn(blocks: int = 4) -> OpGraph:
    """Inverted residual blocks with skip connections, as in MobileNetV2."""
    build = Builder()
    at = build.act(build.conv(build.input((1, 3, 16, 16)), 8, 3))
    for _ in range(blocks):
        wide = build.act(build.conv(at, 24))
        deep = build.act(build.conv(wide, 24, 3, depthwise=True))
        at = build.add(build.conv(deep, 8), at)
    build.op("pool", [(at, Window.reduce())], (1, 8, 1, 1))
    return build.graph()


def timeless(plan: PartitionPlan) -> PartitionPlan:
    stages = tuple(dataclasses.replace(stage, seconds=0.0) for stage in plan.stages)
    return dataclasses.replace(plan, stages=stages)


def gives_up(*args: object) -> None:
    raise TooWide("for a test")


def proves_nothing(problem: FusionProblem, known: SearchResult, seconds: float) -> SearchResult:
    """In place of the cover."""
    return dataclasses.replace(known, lower_bound_bytes=problem.unavoidable, stopped="for a test")


def needs(method: str) -> None:
    if method == "nsga2":
        pytest.importorskip("pymoo")


@pytest.mark.parametrize("scheme", ["lbdf", "brr"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_legal_plans(method: str, scheme: str) -> None:
    needs(method)
    for seed in range(25):
        rng = random.Random(f"{method} {seed}")
        graph = random_graph(rng, rng.randint(1, 10))
        chosen = options(method, rng.choice((40, 150, 400, 2000)), scheme=scheme, seed=seed)
        plan = plan_graph(graph, chosen).verify()
        best = plan_graph(graph, dataclasses.replace(chosen, method="exact"))
        assert best.proof == "optimal"
        assert plan.lower_bound_bytes <= best.dram_bytes <= plan.dram_bytes
        assert (plan.proof == "optimal") == (plan.lower_bound_bytes == plan.dram_bytes)
        assert plan.dram_bytes <= Section(plan).unfused.total or method not in ("auto", "exact")
        if plan.groups:
            assert plan.stages
            assert plan.method in [stage.method for stage in plan.stages]
            assert min(stage.dram_bytes or 0 for stage in plan.stages) == plan.dram_bytes


@pytest.mark.parametrize("scheme", ["lbdf", "brr"])
@pytest.mark.parametrize("buffer", [700, 1000, 2000, 8000])
def test_auto_is_exact_and_shows_its_stages(scheme: str, buffer: int) -> None:
    auto = plan_graph(cnn(), options("auto", buffer, scheme=scheme))
    exact = plan_graph(cnn(), options("exact", buffer, scheme=scheme))
    assert auto.dram_bytes == exact.dram_bytes == auto.lower_bound_bytes
    assert (auto.proof, auto.method) == ("optimal", "exact")
    assert [stage.method for stage in auto.stages] == ["direct", "exact"]
    direct, proved = auto.stages
    assert direct.dram_bytes is not None
    assert direct.dram_bytes >= proved.dram_bytes == auto.dram_bytes
    alone = plan_graph(cnn(), options("auto", buffer, scheme=scheme, explainer=None))
    assert [stage.method for stage in alone.stages] == ["exact"]
    assert alone.groups == auto.groups  # whatever plan was known before


def test_auto_gives_direct_so_many_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_planner, "_DIRECT_SETS", 3)
    auto = plan_graph(cnn(), options("auto", 700))
    assert [(stage.method, stage.stopped) for stage in auto.stages] == [
        ("direct", "set limit"),
        ("exact", ""),
    ]
    assert auto.proof == "optimal"


def test_a_trial_that_will_not_end_is_given_up_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twelve branches the search from the start passes nothing: it has no second of the ten."""
    told = []
    real = group_planner.exact

    def watched(problem: Any, *args: Any) -> SearchResult:
        before = problem.evaluator.work.steps
        try:
            return real(problem, *args)
        except TooWide as reason:
            told.append((str(reason), problem.evaluator.work.steps - before))
            raise

    monkeypatch.setattr(group_planner, "exact", watched)
    plan_graph(wide_graph(), options(buffer=4096))
    reason, steps = told[0]
    assert "of the operators in 2% of its limits" in reason
    assert steps < work.STEPS_PER_SECOND / 2


@pytest.mark.parametrize("frozen", [False, True])
def test_planning_leaves_the_garbage_collector_as_it_was(
    frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it lasts, what the process held before is not looked at."""
    seen = []
    real = group_planner.exact

    def watched(*args: Any) -> SearchResult:
        seen.append(gc.get_freeze_count() > 0)
        return real(*args)

    monkeypatch.setattr(group_planner, "exact", watched)
    gc.unfreeze()
    try:
        if frozen:
            gc.freeze()
        plan_graph(cnn(), options())
        assert (gc.get_freeze_count() > 0) is frozen
        assert seen[0]
    finally:
        gc.unfreeze()
    with pytest.raises(OptionError, match="explainer"):
        plan_graph(cnn(), options("direct", explainer=None))
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("scheme", ["lbdf", "brr"])
@pytest.mark.parametrize("buffer", [700, 2000])
def test_auto_helps_a_long_proof_by_a_local_search(
    scheme: str, buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = plan_graph(cnn(), options("auto", buffer, scheme=scheme))
    monkeypatch.setattr(group_planner, "_FEW_STEPS", 1)
    monkeypatch.setattr(group_planner, "_PASSED", 0.0)  # of one step nothing follows
    auto = plan_graph(cnn(), options("auto", buffer, scheme=scheme))
    proof = ["backward"] if scheme == "brr" else ["windows", "exact"]
    assert [stage.method for stage in auto.stages] == ["direct", "merging", *proof]
    assert all((stage.dram_bytes or 0) >= auto.dram_bytes for stage in auto.stages)
    assert (auto.proof, auto.method) == ("optimal", proof[-1])
    assert auto.dram_bytes == at_once.dram_bytes
    unexplained = plan_graph(cnn(), options("auto", buffer, scheme=scheme, explainer=None))
    assert [stage.method for stage in unexplained.stages] == ["merging", *proof]
    assert unexplained.groups == auto.groups  # whatever plan was known before


@pytest.mark.parametrize("explainer", ["all", "random", None])
@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_plan(method: str, explainer: str | None) -> None:
    needs(method)
    if method == "direct" and explainer is None:
        pytest.skip("needs an explainer")
    chosen = options(method, 1000, explainer=explainer, seed=7)
    once, twice = (plan_graph(cnn(), chosen) for _ in range(2))
    assert timeless(once) == timeless(twice)


@pytest.mark.parametrize("method", SEARCHES)
def test_an_interrupt_keeps_the_best_plan(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(method)
    full = plan_graph(cnn(), options(method, 1000))
    score = planner_run().score
    scored: list[int] = []

    def interrupted(self: Any, plan: Any) -> int:
        if len(scored) == 15:
            raise KeyboardInterrupt
        scored.append(score(self, plan))
        return scored[-1]

    monkeypatch.setattr(planner_run(), "score", interrupted)
    with pytest.raises(Interrupted) as caught:
        plan_graph(cnn(), options(method, 1000))
    plan = caught.value.plan.verify()
    (stage,) = plan.stages
    assert (stage.stopped, stage.plans) == ("interrupted", 15)
    assert plan.method == method
    assert plan.dram_bytes == min(scored) >= full.dram_bytes
    assert full.stages[0].stopped == ""


def planner_run() -> Any:
    """The books of a search, which every search evaluates its plans with."""
    from torch_getfuse.partition.search.run import Run

    return Run


@pytest.mark.parametrize("method", SEARCHES)
def test_the_time_limit_is_counted_and_told(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(method)
    monkeypatch.setattr(work, "clock", lambda: 0.0)
    # Wide enough that no search has seen every plan by then.
    chosen = options(method, 8000, budget=10**9, time_limit=0.3)
    plan = plan_graph(cnn(12), chosen).verify()
    (stage,) = plan.stages
    assert stage.stopped == "work limit of 450,000 steps for time_limit=0.3 s"
    assert 1 <= stage.plans < 10**9
    assert timeless(plan) == timeless(plan_graph(cnn(12), chosen))


@pytest.mark.parametrize("scheme", ["lbdf", "brr"])
@pytest.mark.parametrize("method", ["auto", "exact"])
def test_where_exact_gives_up_the_bound_stays_true(
    method: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options(method, 1000, scheme=scheme)
    optimum = plan_graph(cnn(), dataclasses.replace(chosen, method="exact")).dram_bytes

    monkeypatch.setattr(group_planner, "exact", gives_up)
    monkeypatch.setattr(backward.FromTheEnd, "run", gives_up)
    if scheme == "brr":  # else it proves the optimum, and the search from the start is not tried
        monkeypatch.setattr(group_cover, "cover", proves_nothing)
    plan = plan_graph(cnn(), chosen).verify()
    (stage,) = [stage for stage in plan.stages if stage.method == "exact"]
    assert (stage.dram_bytes, stage.stopped) == (None, "gave up: for a test")
    assert plan.method != "exact"
    assert 0 < plan.lower_bound_bytes <= optimum <= plan.dram_bytes
    methods = [stage.method for stage in plan.stages]
    assert ("backward" in methods, "cover" in methods) == (scheme == "brr", True)
    assert (plan.proof == "optimal") == (plan.lower_bound_bytes == plan.dram_bytes)


@pytest.mark.parametrize(
    ("stage", "scheme"),
    [
        ("exact", "lbdf"),
        ("local", "brr"),
        ("cover", "lbdf"),
        ("windows", "lbdf"),
        ("windows", "brr"),
        ("backward", "brr"),
    ],
)
def test_an_interrupt_of_any_stage_of_auto_keeps_the_best_plan(
    stage: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    def stopped(problem: Any, *args: object, **named: object) -> None:
        result = SearchResult(problem.blocks, problem.cost(problem.blocks), 0, 0.0)
        raise SearchInterrupted(dataclasses.replace(result, stopped="interrupted"))

    monkeypatch.setattr(group_planner, "exact", gives_up)
    run = interrupted if stage == "backward" else gives_up
    monkeypatch.setattr(backward.FromTheEnd, "run", run)
    if scheme == "brr":
        monkeypatch.setattr(group_cover, "cover", proves_nothing)
    if stage == "local":
        monkeypatch.setattr(group_planner, "local_search", stopped)
    elif stage != "backward":
        module = {"cover": group_cover, "windows": windows}.get(stage, group_planner)
        monkeypatch.setattr(module, stage, interrupted)
    with pytest.raises(Interrupted) as caught:
        plan_graph(cnn(), options("auto", 1000, scheme=scheme, budget=20))
    plan = caught.value.plan.verify()
    assert (plan.stages[-1].method, plan.stages[-1].stopped) == (stage, "interrupted")
    assert [other.stopped for other in plan.stages].count("interrupted") == 1
    assert plan.dram_bytes == min(s.dram_bytes for s in plan.stages if s.dram_bytes is not None)


def test_an_interrupt_before_any_plan_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(group_planner, "exact", interrupted)
    with pytest.raises(Interrupted) as caught:
        plan_graph(cnn(), options("exact", 1000))
    assert caught.value.plan is None


def test_direct_needs_an_explainer() -> None:
    with pytest.raises(OptionError, match="explainer=None"):
        plan_graph(cnn(), options("direct", explainer=None))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_fusable_is_an_empty_plan(method: str) -> None:
    plan = plan_graph(cnn(), options(method, 1)).verify()
    assert plan.groups == ()
    assert set(plan.unfusable) == {op.name for op in plan.graph}
    assert (plan.dram_bytes, plan.lower_bound_bytes, plan.proof) == (0, 0, "optimal")


@pytest.mark.parametrize("method", ["local", "random"])
def test_the_bar_is_shown_only_when_asked_for(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for progress in (False, "auto"):  # captured, so no terminal
        plan_graph(cnn(), options(method, 1000, progress=progress))
        assert capsys.readouterr() == ("", "")
    plan_graph(cnn(), options(method, 1000, progress=True))
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{method} search" in err


def test_a_given_plan_is_used_and_another_graphs_refused() -> None:
    plan = plan_graph(cnn(), options("exact", 1000))
    assert plan_graph(cnn(), Options(plan=plan)) is plan
    with pytest.raises(ValueError, match=r"fingerprint|another graph"):
        plan_graph(cnn(5), Options(plan=plan))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"buffer": 401}, "buffer 400 B, not 401 B"),
        ({"scheme": "brr"}, "scheme lbdf, not brr"),
        ({"granularity": "pixel"}, "granularity line, not pixel"),
        ({"activation_bytes": 2}, "activation_bytes 1, not 2"),
        ({"keep": ["conv1"]}, r"keep \[\], not \['conv1'\]"),
        ({"accelerator": "ethos-u55-64"}, "buffer 400 B, not "),
    ],
)
def test_options_beside_a_plan_are_those_it_was_made_for(other: dict[str, Any], told: str) -> None:
    graph = cnn()
    made = {"buffer": 400, "activation_bytes": 1, "weight_bytes": 1}
    plan = plan_graph(graph, Options.of(made))
    # What says the same is taken, and what is not named; what has no meaning is not asked.
    for named in ({}, made, {"buffer": "400"}, {"residency": False, "time_limit": 1}):
        assert plan_graph(graph, Options.of({**named, "plan": plan})).groups == plan.groups
    with pytest.raises(OptionError, match=f"the given plan was made for .*{told}"):
        plan_graph(graph, Options.of({**other, "plan": plan}))


@pytest.mark.parametrize("scheme", ["lbdf", "brr"])
@pytest.mark.parametrize("method", METHODS)
def test_a_limit_strikes_at_the_same_place_however_fast_the_clock(
    method: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(method)
    chosen = options(method, 3000, scheme=scheme, budget=10**6, time_limit=0.005)
    found = []
    for step in (0.0, 1e-7, 3e-7):
        monkeypatch.setattr(work, "clock", Ticking(step))
        plan = plan_graph(cnn(10), chosen)
        assert "time limit" not in [stage.stopped for stage in plan.stages]
        found.append(timeless(plan))
    assert found[0] == found[1] == found[2]
    assert any("work limit of" in stage.stopped for stage in found[0].stages)


@pytest.mark.parametrize("scheme", ["lbdf", "brr"])
@pytest.mark.parametrize("method", METHODS)
def test_on_a_machine_too_slow_the_clock_strikes(
    method: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(method)
    monkeypatch.setattr(work, "clock", Ticking(1.0))
    chosen = options(method, 3000, scheme=scheme, budget=10**6, time_limit=0.1)
    plan = plan_graph(cnn(10), chosen).verify()
    assert any("time limit" in stage.stopped for stage in plan.stages)


def test_a_clock_that_strikes_within_a_stage_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a stage may go on with what it has; where it proves nothing the plan depends on it."""

    def cut_short(problem: Any, *args: object, **named: object) -> SearchResult:
        with contextlib.suppress(work.OutOfWork), problem.evaluator.work.within(1.0):
            problem.evaluator.work.give_up(by_clock=True)
        cost = problem.cost(problem.blocks)
        return SearchResult(problem.blocks, cost, 0, 0.0, stopped="work limit of 3 steps")

    monkeypatch.setattr(group_planner, "local_search", cut_short)
    monkeypatch.setattr(group_planner, "exact", gives_up)
    monkeypatch.setattr(backward.FromTheEnd, "run", gives_up)
    monkeypatch.setattr(group_cover, "cover", proves_nothing)
    plan = plan_graph(cnn(), options("auto", 1000, scheme="brr", budget=20))
    assert plan.stages[-1].stopped == "time limit"
    assert not any(work.by_machine(stage.stopped) for stage in plan.stages[:-1])


HASHED = """
import dataclasses, sys
from tests.test_planner import cnn, options
from torch_getfuse import group_planner
from torch_getfuse.partition.exact import backward, windows
from torch_getfuse.partition.exact.down_sets import TooWide
from torch_getfuse.planner import plan_graph

def gives_up(*args):
    raise TooWide("for a test")

for method in sys.argv[1:]:
    for scheme in ("lbdf", "brr"):
        plan = plan_graph(cnn(), options(method, 1000, scheme=scheme))
        print(method, [g.ops for g in plan.groups])
group_planner.exact = gives_up
for scheme in ("lbdf", "brr"):
    plan = plan_graph(cnn(), options("auto", 1000, scheme=scheme))
    print([g.ops for g in plan.groups], [(s.method, s.plans, s.dram_bytes) for s in plan.stages])
"""


def test_same_plans_under_any_hash_seed() -> None:
    methods = [m for m in METHODS if m != "nsga2" or importlib.util.find_spec("pymoo")]
    outputs = outputs_of_hash_seeds(HASHED, *methods)
    (output,) = outputs
    assert len(output.splitlines()) == 2 * len(methods) + 2


# -- traffic that does not add up -------------------------------------------------------------


class Surcharged(Lbdf):
    """Moves a byte more for each group, whatever is in it."""

    def dram(self, mask: int, buffer_bytes: int = 0) -> Dram:
        read, write, weight = super().dram(mask, buffer_bytes)
        return Dram(read + 1, write, weight)


@pytest.mark.parametrize("method", METHODS)
def test_a_cost_model_that_does_not_add_up_is_found_out(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(method)
    monkeypatch.setattr(planner, "scheme_of", lambda graph, chosen: Surcharged(graph))
    with pytest.raises(GetfuseError, match=r"moves \d+ B by dram\(\) and \d+ B added up"):
        plan_graph(cnn(), options(method, 1000))


@pytest.mark.parametrize("explainer", ["all", None])
def test_nothing_is_proved_of_a_cost_model_that_is_not_additive(
    explainer: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(Lbdf):
        additive = False

    monkeypatch.setattr(planner, "scheme_of", lambda graph, chosen: Plain(graph))
    plan = plan_graph(cnn(), options("auto", 1000, explainer=explainer)).verify()
    methods = [stage.method for stage in plan.stages]
    assert methods == (["direct"] if explainer else []) + ["exact", "local"]
    (stage,) = [stage for stage in plan.stages if stage.method == "exact"]
    assert (stage.dram_bytes, stage.plans) == (None, 0)
    assert stage.stopped == "not tried: scheme 'lbdf' does not promise additive traffic"
    assert (plan.proof, plan.lower_bound_bytes) == (None, 0)
    with pytest.raises(OptionError, match=r"additive = False.*method='local'"):
        plan_graph(cnn(), options("exact", 1000))


def test_an_illegal_plan_of_a_search_is_not_returned() -> None:
    def twice(problem: Any, *args: object, **named: object) -> SearchResult:
        groups = (*problem.blocks, problem.blocks[0])
        return SearchResult(groups, problem.cost(groups), 1, 0.0)

    with pytest.raises(PlanError, match="the twice search found an illegal plan"):
        plan_graph(cnn(), options(twice, 1000))


def test_a_bound_that_contradicts_a_plan_is_not_claimed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(problem: Any, *args: object) -> None:
        error = TooWide("for a test")
        error.bound = 1 << 40
        raise error

    monkeypatch.setattr(group_planner, "exact", wrong)
    plan = plan_graph(cnn(), options("auto", 1000)).verify()
    assert (plan.proof, plan.lower_bound_bytes) == (None, 0)
    assert "contradicts" in caplog.text
