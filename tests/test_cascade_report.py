"""Reports of cascade plans: totals, occupancy, what stays and what leaves, in every form."""

from __future__ import annotations

import csv
import functools
import io
import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from graphs import IDENTITY, Builder, cascade_graph, heavy_between

from torch_getfuse.accelerator import format_size
from torch_getfuse.errors import OptionError, PlanError
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options
from torch_getfuse.partition.cost.cascade.way import Resident
from torch_getfuse.partition.cost.scheme import Dram
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.partition.steps.optimum import Proof
from torch_getfuse.partition.steps.problem import StepProblem
from torch_getfuse.partition.work import Work
from torch_getfuse.planner import plan_graph
from torch_getfuse.reporting import outlook
from torch_getfuse.reporting.report import Report
from torch_getfuse.reporting.section import Section, is_fusable
from torch_getfuse.reporting.step_tables import bar
from torch_getfuse.reporting.steps import Again, Leaving, Occupancy, Staying, StepFigures


def plan_of(graph: OpGraph, buffer: int, **options: object) -> PartitionPlan:
    """A plan of one byte per element."""
    given = {"scheme": "cascade", "activation_bytes": 1, "weight_bytes": 1, **options}
    return plan_graph(graph, Options.of({"buffer": buffer, **given}))


def steps_of(section: Section) -> StepFigures:
    assert section.steps is not None
    return section.steps


def told(section: Section) -> str:
    """The report's text with single spaces."""
    return " ".join(str(Report([section])).split())


def two_steps() -> OpGraph:
    """Two 1x1 convolutions, 4 -> 64 -> 4 channels, of 320 and 260 B, on 16 rows of 4 pixels."""
    build = Builder()
    build.conv(build.conv(build.input((1, 4, 16, 4)), 64), 4)
    return build.graph()


@functools.cache
def random_plans() -> tuple[PartitionPlan, ...]:
    """Plans of random graphs under buffers that some of their operators do not fit."""
    plans = []
    for seed in range(60):
        rng = Random(seed)
        graph, buffer = cascade_graph(rng), rng.choice((40, 80, 160, 320))
        plans.append(plan_of(graph, buffer, slice_channels=rng.choice((1, 2, 16))))
    return tuple(plans)


# -- figures ------------------------------------------------------------------------------


def test_an_unfusable_operator_counts_once() -> None:
    """x, conv0 and conv1 have 16 B; conv0 2 B of weights, conv1 1,000 B in one channel."""
    section = Section(plan_of(heavy_between(), 100))
    assert [group.ops for group in section.plan.groups if not is_fusable(group)] == [("conv1",)]
    assert section.planned == Dram(16 + 2 * 16, 16 + 16, 2)
    assert section.outside == Dram(16, 16, 1000)
    assert section.network_planned == Dram(64, 48, 1002)
    assert section.network_planned.total == section.plan.dram_bytes
    assert section.lower_bound == section.plan.lower_bound_bytes == 64 + 48 + 1002
    assert section.fusable_lower_bound == 48 + 32 + 2
    assert section.floor == Dram(16, 16, 1002)
    assert section.network_unfused == section.network_planned  # nothing stays, nothing is joined
    text = told(section)
    assert "1 unfusable operator, at least 1.01 KB 1.01 KB 0 B" in text
    assert "whole network, at least 1.09 KB 1.09 KB 0 B" in text
    assert (
        "optimal (proved): no legal plan of the whole network has less DRAM access; in all of them "
        "unfusable operators count at the least that they move"
    ) in text
    assert "paper" not in text


def test_totals_and_rows_add_up() -> None:
    seen = set()
    for plan in random_plans():
        section = Section(plan)
        totals = section.to_dict()["totals"]
        rows = section.records()
        assert totals["planned"]["dram_bytes"] == plan.dram_bytes
        assert sum(row["dram_bytes"] for row in rows) == plan.dram_bytes
        assert sum(row["unfused_bytes"] for row in rows) == totals["unfused"]["dram_bytes"]
        assert totals["unfused"]["dram_bytes"] >= plan.dram_bytes >= section.floor.total
        assert totals["lower_bound_bytes"] == plan.lower_bound_bytes
        for part in ("dram_read_bytes", "dram_write_bytes", "dram_weight_bytes"):
            both = totals["fusable"]["planned"][part] + totals["unfusable"][part]
            assert totals["planned"][part] == both == sum(row[part] for row in rows)
        assert len(rows) == totals["groups"] == len(plan.groups)
        seen |= {row["way"].split()[-1] for row in rows}
    assert seen >= {"line", "stripes", "slices", "unfusable"}


def test_unfused_is_every_operator_in_its_best_way() -> None:
    """Slices of an operator read its input again: a matter of features, not of weights.

    A row of x has 32 B, one of the output 256, the weights 576: 864 B by lines. With a sixth of the
    weights 384 B, and 96 B more where x stays for the step that negates it.
    """
    build = Builder()
    x = build.input((1, 8, 4, 4))
    build.conv(x, 64)
    build.op("neg", [(x, IDENTITY)], (1, 8, 4, 4))
    section = Section(plan_of(build.graph(), 390))
    assert {str(group.way) for group in section.plan.groups} == {"line", "6 slices"}
    assert section.unfused == Dram(7 * 128, 1024 + 128, 576)
    assert section.planned == section.unfused
    (again,) = steps_of(section).again
    assert again == Again(again.step, "conv0", "x0", 6, 5 * 128, 288 + 576 - 389)
    (left,) = steps_of(section).leaving
    assert (left.written_bytes, left.read_bytes, left.lacking_bytes) == (0, 7 * 128, 384 + 96 - 389)
    larger = Section(plan_of(build.graph(), 700))
    assert larger.planned == Dram(128, 1024 + 128, 576)
    assert larger.unfused == Dram(3 * 128, 1024 + 128, 576)


def test_the_occupancy_of_a_step_is_the_whole_buffer() -> None:
    for plan in random_plans():
        steps = steps_of(Section(plan))
        for held, group in zip(steps.occupancy, plan.groups, strict=True):
            used = held.weights + held.lines + held.residents
            assert used == group.buffer_bytes
            assert used + held.unknown + held.idle == plan.buffer_bytes
            assert (held.unknown > 0) is (not is_fusable(group))
            alive = [r for r in plan.resident if r.first <= held.step <= r.last]
            size = {entry.tensor: entry.bytes for entry in steps.staying}
            # One may be written over another: then they share what the larger takes.
            assert held.residents <= sum(size[r.tensor] for r in alive)
            assert bool(held.residents) is bool(alive)
        assert [(e.tensor, e.first, e.last) for e in sorted(steps.staying, key=by_name)] == [
            (r.tensor, r.first, r.last) for r in sorted(plan.resident, key=by_name)
        ]


def by_name(entry: object) -> str:
    return str(entry.tensor)  # type: ignore[attr-defined]


def test_features_are_those_that_leave_and_the_ends() -> None:
    """Tensors that cross steps, inputs and outputs are all that moves."""
    for plan in random_plans():
        section = Section(plan)
        steps = steps_of(section)
        left = {entry.tensor for entry in steps.leaving}
        crossing = sum(e.written_bytes + e.read_bytes for e in steps.leaving)
        size = {name: plan.graph.tensors[name].elements for name in plan.graph.tensors}
        read = {tensor for op in plan.graph for tensor in (r.tensor for r in op.reads)}
        made = {op.writes for op in plan.graph} & set(plan.graph.outputs)
        ends = sum(size[name] for name in plan.graph.inputs if name in read - left)
        ends += sum(size[name] for name in made - left)
        ends += sum(
            entry.extra_bytes
            for entry in steps.again
            if entry.what != "weights" and entry.what not in left
        )
        assert section.network_planned.read + section.network_planned.write == crossing + ends


def test_weights_are_read_again_where_the_figures_say() -> None:
    found = 0
    plans = [plan_of(two_steps(), 840 + 8 * k) for k in range(4)]
    for plan in (*random_plans(), *plans):
        section = Section(plan)
        again = [e for e in steps_of(section).again if e.what == "weights"]
        extra = section.network_planned.weight - section.floor.weight
        assert extra == sum(entry.extra_bytes for entry in again)
        found += len(again)
        for entry in steps_of(section).again:
            way = plan.groups[entry.step].way
            assert way is not None
            assert entry.times == way.count > 1
            assert entry.operator not in way.weights_stay
            assert entry.lacking_bytes > 0  # or they would be held
    assert found > 5


def test_a_plan_by_hand() -> None:
    """Two steps by lines. One step would take 548 B in 16 stripes of a row, and read all weights
    16 times: 15 * 580 B, more than the 2 * 4,096 of the map between.
    """
    graph = two_steps()
    # conv0: rows of 16 and 256 B and 320 B of weights; conv1: 256 + 16 + 260 B.
    section = Section(plan_of(graph, 600))
    steps = steps_of(section)
    assert len(section.plan.groups) == 2
    assert steps.staying == ()
    assert steps.leaving == (
        Leaving("conv0", 4096, 4096, 4096, 0, 16 + 4096 + 320 - 599, "step 0 lacks 3.74 KB"),
    )
    assert steps.occupancy == (
        Occupancy(0, 320, 272, 0, 0, 600 - 592),
        Occupancy(1, 260, 272, 0, 0, 600 - 532),
    )
    never = Section(plan_of(graph, 600, residency=False))
    assert steps_of(never).leaving[0].reason == "residency=False: nothing stays"
    assert "none, by residency=False" in told(never)


def test_residents_are_listed_by_their_first_steps() -> None:
    build = Builder()
    x = build.input((1, 4, 4, 4))
    build.conv(build.conv(build.conv(x, 32), 32), 4)
    # 160, 1,056 and 132 B of weights: the middle one fits beside nothing but its maps.
    plan = plan_of(build.graph(), 1300)
    steps = steps_of(Section(plan))
    assert [(e.tensor, e.bytes) for e in steps.staying] == [
        (r.tensor, plan.graph.tensors[r.tensor].elements)
        for r in sorted(plan.resident, key=lambda r: (r.first, r.last, r.tensor))
    ]
    assert steps.staying, "a buffer under which something stays"
    text = told(Section(plan))
    one: Staying = steps.staying[0]
    assert f"{one.tensor} {one.bytes} B {one.first} {one.last}" in text
    assert (
        f"tensors that stay {len(steps.staying)}, at most {format_size(steps.most_staying)} at"
        in text
    )


# -- forms --------------------------------------------------------------------------------


def test_the_bar_has_a_character_for_each_share() -> None:
    held = Occupancy(0, weights=25, lines=25, residents=26, unknown=0, idle=28)
    assert bar(held, 104) == "W" * 6 + "=" * 7 + "#" * 6 + "." * 7
    assert bar(Occupancy(0, 0, 0, 0, 104, 0), 104) == "?" * 26
    for plan in random_plans():
        for entry in steps_of(Section(plan)).occupancy:
            assert len(bar(entry, plan.buffer_bytes)) == 26


def test_the_bars_fit_80_columns() -> None:
    for plan in random_plans():
        lines = Report([Section(plan)]).to_text(width=160).splitlines()
        start = next(k for k, line in enumerate(lines) if line.startswith("On chip, "))
        end = next(k for k, line in enumerate(lines) if line.startswith("W weights, "))
        assert max(map(len, lines[start:end])) <= 80


def test_data_forms_agree() -> None:
    section = Section(plan_of(heavy_between(), 100), "graph 0")
    report = Report([section])
    form = json.loads(report.to_json())
    assert form == report.to_dict()
    (told,) = form["sections"]
    assert [group["way"]["kind"] for group in told["groups"]] == ["line", "unfusable", "line"]
    assert told["assumptions"]["residency"] is True
    assert told["assumptions"]["slice_channels"] == 16
    assert told["totals"]["floor"]["dram_bytes"] == 16 + 16 + 1002
    assert told["occupancy"][1] == {
        "step": 1,
        "weights_bytes": 0,
        "lines_bytes": 0,
        "residents_bytes": 0,
        "unknown_bytes": 100,
        "idle_bytes": 0,
    }
    assert "cascade" not in told
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [(row["group"], row["way"], row["fusable"]) for row in rows] == [
        ("fusion_group_0", "line", "True"),
        ("fusion_group_1", "unfusable", "False"),
        ("fusion_group_2", "line", "True"),
    ]
    assert rows[1]["weights_bytes"] == rows[1]["idle_bytes"] == ""
    assert [row["needs_bytes"] for row in rows] == ["", str(section.needs["conv1"]), ""]
    for row, held in zip(rows, told["occupancy"], strict=True):
        if row["way"] != "unfusable":
            assert int(row["idle_bytes"]) == held["idle_bytes"]
            used = sum(int(row[f"{k}_bytes"]) for k in ("weights", "lines", "residents"))
            assert used == int(row["buffer_bytes"])
    frame = report.to_pandas()
    assert frame["dram_bytes"].sum() == section.plan.dram_bytes
    assert str(frame["idle_bytes"].dtype) == "Int64"
    for text in (report.to_markdown(), report._repr_html_()):
        assert text.count("unfusable: it fits in no way") == 1
        assert "Tensors that go through DRAM" in text


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan = plan_of(heavy_between(), 100)
    report = Report([Section(plan, "graph 0"), Section(plan, "graph 1")])
    first, second = report.plot().axes
    assert [text.get_text() for text in first.get_legend().get_texts()] == [
        "weights",
        "lines",
        "tensors that stay",
        "unfusable",
    ]
    assert len(second.patches) == 4 * len(plan.groups)
    tops = {round(1024 * (p.get_y() + p.get_height())) for p in first.patches if p.get_height()}
    assert max(tops) == 100
    for name in ("a.svg", "b.svg", "c.png"):
        report.save(tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    lines = Report([Section(plan_of(two_steps(), 1000, scheme="lbdf"))])
    with pytest.raises(OptionError, match="plans of scheme='cascade'"):
        lines.save(tmp_path / "d.png")


def test_a_plan_that_breaks_a_rule_is_refused() -> None:
    plan = plan_of(two_steps(), 600)
    with pytest.raises(PlanError, match="2 operators stand in no step"):
        _ = Section(replace(plan, groups=())).steps
    wrong = replace(plan, groups=plan.groups[::-1])
    with pytest.raises(PlanError, match="must run after 'conv0' of a later step"):
        str(Report([Section(wrong)]))
    stays = (*plan.resident, Resident("nowhere", 0, 0))
    with pytest.raises(PlanError, match="keeps 'nowhere' on chip, which its graph has not"):
        str(Report([Section(replace(plan, resident=stays))]))
    with pytest.raises(PlanError, match="'conv0' is not called unfusable but does not fit 9 B"):
        str(Report([Section(replace(plan, buffer_bytes=9))]))


# -- beside other schemes -----------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["lbdf", "brr"])
def test_other_schemes_end_with_what_cascade_reaches(scheme: str) -> None:
    graph = two_steps()
    section = Section(plan_of(graph, 600, scheme=scheme), notes=("a note",))
    best = plan_of(graph, 600)
    assert best.proof == "optimal"
    assert section.to_dict()["cascade"] == {
        "dram_bytes": best.dram_bytes,
        "proof": "optimal",
        "unfusable": 0,
    }
    last = Report([section]).to_text(width=160).splitlines()[-1]
    assert last.startswith(
        "scheme='cascade' (tensors that stay on chip, weights that stream) reaches "
        f"{format_size(best.dram_bytes)} (proved), "
    )


def test_more_less_and_as_much() -> None:
    reach = outlook.Reach(900, 0)
    assert reach.told(1000, True).endswith("reaches 900 B (proved), 10.0% less")
    assert reach.told(900, True).endswith("(proved), as much")
    assert reach.told(800, False).endswith("12.5% more")
    least = "12.5% more, beside figures that count unfusable operators at their least"
    assert reach.told(800, True).endswith(least)
    assert "(proved, 2 unfusable)" in outlook.Reach(900, 2).told(1000, True)


def test_it_is_worked_out_once_and_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = outlook.Proof

    def count(problem: StepProblem) -> Proof:
        asked.append(problem)
        return original(problem)

    monkeypatch.setattr(outlook, "Proof", count)
    section = Section(plan_of(two_steps(), 600, scheme="lbdf"))
    Report([section]).to_records()
    assert not asked
    for name in ("graph 0", "graph 1"):
        report = Report([replace(section, name=name)])  # as report(compiled) makes each time
        assert str(report)
        assert report.to_json()
    assert len(asked) == 1


def test_nothing_is_said_of_what_is_not_proved_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = two_steps()
    for steps in (100, 300):  # before there is a problem, and in the search
        monkeypatch.setattr(outlook, "_STEPS", steps)
        section = Section(plan_of(graph, 600, scheme="lbdf"))
        assert section.to_dict()["cascade"] is None
        assert "cascade" not in str(Report([section]))


def test_nothing_is_said_beside_a_scheme_of_ones_own() -> None:
    from torch_getfuse.partition.cost.lbdf.model import Lbdf

    class Own(Lbdf):
        name = "own"

    section = Section(plan_of(two_steps(), 600, scheme=Own))
    assert section.reach is None


def test_a_limit_in_steps_asks_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_getfuse.partition import work

    counted = Work()
    counted.add(7)
    monkeypatch.setattr(work, "clock", lambda: pytest.fail("the clock is asked"))
    with counted.steps_within(100):
        counted.add(92)
        assert counted.steps_left == 8
        with pytest.raises(work.OutOfWork, match="work limit of 100 steps"):
            counted.add(8)
    assert counted.steps_left == float("inf")
