"""The report: its figures in integers, every form it takes, and what it says when empty."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from graphs import Builder

import torch_getfuse
from torch_getfuse.errors import GetfuseError, OptionError, PlanError
from torch_getfuse.ir import Window
from torch_getfuse.options import Options
from torch_getfuse.partition.fusion_group import Stage
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.planner import plan_graph
from torch_getfuse.reporting.report import Report
from torch_getfuse.reporting.section import Section

NAMES = ("fusion_group_0", "unfusable_0")


def make_plan(buffer: int = 100) -> PartitionPlan:
    """Three 1x1 convolutions on a 4x4 map, 4 -> 4 -> 4 -> 64 channels; the last never fits."""
    build = Builder()
    at = build.input((1, 4, 4, 4))
    for channels in (4, 4, 64):
        at = build.conv(at, channels)
    return plan_graph(build.graph(), Options(buffer=buffer, activation_bytes=1, weight_bytes=1))


@pytest.fixture
def plan() -> PartitionPlan:
    return make_plan()


@pytest.fixture
def report(plan: PartitionPlan) -> Report:
    return Report([Section(plan, unsupported={"aten.sort": 2}, notes=("a note",))])


def test_totals(plan: PartitionPlan) -> None:
    # Each map of 4 channels has 64 B, each small convolution 20 B of weights.
    section = Section(plan)
    assert section.unfused == (128, 128, 40)
    assert section.planned == (64, 64, 40)
    # 64 B in, 64 x 16 B out, 64 x 4 weights and 64 biases
    assert section.unfusable == {"conv2": (64, 1024, 320)}


def test_unfusable_traffic_counts_widths(plan: PartitionPlan) -> None:
    wide = replace(plan, activation_bytes=2, weight_bytes=4)
    assert Section(wide).unfusable == {"conv2": (128, 2048, 1280)}


def test_dict_is_integers(report: Report) -> None:
    form = json.loads(report.to_json())
    assert form == report.to_dict()
    assert form["schema_version"] == 2
    assert form["totals"] == {"unfused_bytes": 1704, "planned_bytes": 1576, "saved_bytes": 128}
    (section,) = form["sections"]
    assert section["totals"] == {
        "operators": 3,
        "groups": 1,
        "unfused": dram(192, 1152, 360),
        "planned": dram(128, 1088, 360),
        "saved_bytes": 128,
        "lower_bound_bytes": 1576,
        "proof": "optimal",
        "claimed_by": "",
        "max_buffer_bytes": 88,
        "fusable": {
            "operators": 2,
            "unfused": dram(128, 128, 40),
            "planned": dram(64, 64, 40),
            "saved_bytes": 128,
            "lower_bound_bytes": 168,
        },
        "unfusable": {"operators": 1, **dram(64, 1024, 320)},
    }
    assert section["groups"] == [
        {
            "name": "fusion_group_0",
            "ops": ["conv0", "conv1"],
            "modules": ["", ""],
            "macs": None,  # of a graph that nobody has counted
            "buffer_bytes": 88,
            # A row of 16 B of each small map and of 256 B of the wide one, all weights, one more.
            "needs_bytes": 3 * 16 + 256 + 40 + 320 + 1,
            **dram(64, 64, 40),
            "ends": "unfusable neighbour conv2",
        }
    ]
    assert section["unfusable"] == [
        {
            "name": "conv2",
            "kind": "conv",
            "macs": None,
            "needs_bytes": 593,
            **dram(64, 1024, 320),
        }
    ]
    assert section["held_whole"] == []
    assert section["unsupported"] == {"aten.sort": 2}
    assert section["notes"] == ["a note"]
    assert all(type(v) is int for k, v in leaves(form) if k.endswith("_bytes"))


def dram(read: int, write: int, weight: int) -> dict[str, int]:
    return {
        "dram_read_bytes": read,
        "dram_write_bytes": write,
        "dram_weight_bytes": weight,
        "dram_bytes": read + write + weight,
    }


def leaves(form: Any) -> list[tuple[str, Any]]:
    if isinstance(form, dict):
        below = [leaf for value in form.values() for leaf in leaves(value)]
        return [(k, v) for k, v in form.items() if not isinstance(v, dict | list)] + below
    if isinstance(form, list):
        return [leaf for value in form for leaf in leaves(value)]
    return []


def test_text(report: Report) -> None:
    text = str(report)
    for part in (
        "fusable: features 256 B 128 B 128 B (50.0%)",
        "2 fusable operators (the paper's figure) 296 B 168 B 128 B (43.2%)",
        "1 unfusable operator, at least 1.38 KB 1.38 KB 0 B",
        "whole network 1.66 KB 1.54 KB 128 B (7.5%)",
        "optimal (proved): no legal plan of the 2 fusable operators has less",
        "88 B of 100 B (88.0%)",
        "1, of 2 fusable operators",
        "unfusable operators 1; from a buffer of 593 B up it fits",
        "conv2 conv 593 B 64 B 1 KB 320 B",
        "exact: 168 B",
        "scheme lbdf, granularity line, buffer 100 B, 1 B per activation, 1 B per weight",
        "conv0 .. conv1 (2 ops)",
        "unfusable neighbour conv2",
        "aten.sort",
        "Note: a note",
    ):
        assert part in " ".join(text.split()), part


def test_a_brr_plan_claims_no_granularity() -> None:
    build = Builder()
    at = build.input((1, 4, 16, 10))
    for channels in (64, 16):
        at = build.conv(at, channels, kernel=3)
    options = Options(
        buffer=12000, scheme="brr", granularity="pixel", activation_bytes=1, weight_bytes=1
    )
    plan = plan_graph(build.graph(), options)
    assert (plan.scheme, plan.granularity) == ("brr", "line")
    assert PartitionPlan.from_dict(plan.to_dict()).verify() == plan
    report = Report([Section(plan)])
    (section,) = report.to_dict()["sections"]
    assert section["assumptions"]["granularity"] is None
    assert "granularity" not in str(report)
    assert "scheme brr, buffer 11.7 KB, 1 B per activation" in " ".join(str(report).split())
    # Rows as in tests/partition/test_brr.py. The weights do not fit beside them, but a tile holds
    # all 16 lines, so they are read once.
    (group,) = section["groups"]
    assert group["buffer_bytes"] == 1320
    assert group["dram_weight_bytes"] == 2368 + 9232


def test_text_fits_a_terminal(plan: PartitionPlan) -> None:
    long = [f"features.{i}.block.{i}.conv.0.1" for i in range(3)]
    ops = tuple(replace(op, name=name) for op, name in zip(plan.graph.ops, long, strict=True))
    (group,) = plan.groups
    renamed = replace(
        plan,
        graph=replace(plan.graph, ops=ops),
        groups=(
            replace(group, ops=tuple(long[:2]), ends=f"branch: {long[2]} also needs {long[0]}"),
        ),
        unfusable=(long[2],),
    )
    text = str(Report([Section(renamed)]))
    assert max(map(len, text.splitlines())) <= 100
    assert long[0] in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"proof": "bound", "lower_bound_bytes": 100},
            "100 B of the 2 fusable operators (proved); the plan is at most 68.0% above their "
            "optimum",
        ),
        ({"proof": None, "lower_bound_bytes": 0}, "none is known"),
    ],
)
def test_lower_bounds(plan: PartitionPlan, change: dict[str, Any], text: str) -> None:
    told = " ".join(str(Report([Section(replace(plan, **change))])).split())
    assert text in told


def test_stages_in_order(plan: PartitionPlan) -> None:
    stages = (Stage("direct", None, 3, 0.0), Stage("exact", 168, 9, 0.25))
    text = " ".join(str(Report([Section(replace(plan, stages=stages))])).split())
    assert "direct: no plan (3 evaluated, 0.0 s); then exact: 168 B (9 evaluated, 0.2 s)" in text


def test_several_graphs(plan: PartitionPlan) -> None:
    report = Report([Section(plan, "graph 0"), Section(plan, "graph 1")])
    text = " ".join(str(report).split())
    assert (
        "2 graphs: 3.08 KB of DRAM access planned, 3.33 KB unfused, 256 B (7.5%) saved, unfusable "
        "operators included"
    ) in text
    assert report.to_dict()["totals"]["planned_bytes"] == 3152
    assert "graph 0: DRAM access per sample" in text
    assert [(record["graph"], record["group"]) for record in report.to_records()] == [
        (name, group) for name in ("graph 0", "graph 1") for group in NAMES
    ]
    assert repr(report) == "Report(2 graphs, 2 groups, 3.08 KB of 3.33 KB unfused)"


def test_everything_unfusable() -> None:
    section = Section(make_plan(buffer=10))
    report = Report([section])
    text = " ".join(str(report).split())
    assert "0, of 0 fusable operators" in text
    assert "lower bound none: no operator fits the buffer" in text
    assert "optimal" not in text
    assert "3; from a buffer of 53 B up conv0 fits, from 593 B up all of them do" in text
    assert section.needs == {"conv0": 53, "conv1": 53, "conv2": 593}
    for name, size in section.needs.items():  # strictly: the buffer must be larger than the demand
        alone = 1 << section.plan.graph.index[name]
        assert section.scheme.buffer(alone, size) == size - 1
    assert report.to_dict()["sections"][0]["totals"]["saved_bytes"] == 0
    assert report.to_records() == section.records()
    assert [record["dram_bytes"] for record in report.to_records()] == [148, 148, 1408]


def test_a_larger_buffer_never_raises_what_the_network_moves() -> None:
    totals = [
        Section(make_plan(buffer=size)).network_planned.total for size in (10, 60, 88, 89, 593, 700)
    ]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] == Section(make_plan(buffer=10)).network_unfused.total == 1704
    # The fusion groups alone, which the paper counts, move more where more operators fit.
    assert make_plan(buffer=700).dram_bytes > make_plan(buffer=89).dram_bytes


def test_rows_add_up_to_the_whole_network(plan: PartitionPlan) -> None:
    section = Section(plan)
    rows = section.records()
    assert sum(row["dram_bytes"] for row in rows) == section.network_planned.total == 1576
    assert sum(row["unfused_bytes"] for row in rows) == section.network_unfused.total == 1704


def test_maps_that_are_held_whole() -> None:
    build = Builder()
    at = build.input((1, 4, 64))
    for _ in range(2):
        at = build.op("conv1d", [(at, Window.whole())], (1, 4, 64), 20, mixes=True)
    plan = plan_graph(build.graph(), Options(buffer=600, activation_bytes=1, weight_bytes=1))
    section = Section(plan)
    assert list(section.held_whole) == ["conv1d0", "conv1d1"]
    text = " ".join(str(Report([section])).split())
    assert "Note: priced as holding whole maps: conv1d conv1d0, conv1d1" in text
    assert "all of them still fit alone" in text
    assert "not of the chip" in text
    assert [h["name"] for h in section.to_dict()["held_whole"]] == ["conv1d0", "conv1d1"]
    small = plan_graph(plan.graph, Options(buffer=100, activation_bytes=1, weight_bytes=1))
    assert "2 of 2 do not fit and move 1.04 KB on their own" in str(Report([Section(small)]))


def test_an_operator_without_a_rule_is_held_whole(plan: PartitionPlan) -> None:
    first, *rest = plan.graph.ops
    ops = (replace(first, reason="no rule for fold"), *rest)
    odd = replace(plan, graph=replace(plan.graph, ops=ops))
    assert Section(odd).held_whole == {"conv0": "no rule for fold"}
    assert not Section(plan).held_whole
    assert "held" not in str(Report([Section(plan)]))


def test_empty() -> None:
    report = Report([])
    assert "no graph has been compiled yet" in str(report)
    assert report.to_dict() == {
        "schema_version": 2,
        "totals": {"unfused_bytes": 0, "planned_bytes": 0, "saved_bytes": 0},
        "sections": [],
        "unplanned": [],
    }
    assert str(Report([], empty="as told")) == "as told"
    assert "no graph has been compiled yet" in report.to_html()
    assert report.to_csv().count("\n") == 1
    assert report.to_pandas().empty


def test_csv(report: Report) -> None:
    row, apart = csv.DictReader(io.StringIO(report.to_csv()))
    assert (apart["group"], apart["fusable"], apart["ops"]) == ("unfusable_0", "False", "conv2")
    assert (apart["needs_bytes"], apart["dram_bytes"]) == ("593", "1408")
    assert row["group"] == "fusion_group_0"
    assert row["ops"].split() == ["conv0", "conv1"]
    assert int(row["buffer_bytes"]) == 88
    assert int(row["dram_bytes"]) == 168


def test_markdown(report: Report) -> None:
    text = report.to_markdown()
    assert "### DRAM access per sample" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
    assert any("conv0 .. conv1 (2 ops)" in line for line in rows)


def test_markdown_escapes_its_own_marks(plan: PartitionPlan) -> None:
    report = Report([Section(plan, unsupported={"a|b": 1})])
    assert "a\\|b" in report.to_markdown()


class _Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.tables += tag == "table"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_well_formed_and_escaped(plan: PartitionPlan) -> None:
    report = Report([Section(plan, unsupported={"<script>": 1}, notes=("a < b",))])
    page = report.to_html()
    parser = _Balanced()
    parser.feed(page)
    assert not parser.open
    assert parser.tables == 5
    assert "<script>" not in page
    assert "a &lt; b" in page


def test_pandas(report: Report) -> None:
    frame = report.to_pandas()
    assert list(frame["dram_bytes"]) == [168, 1408]
    assert str(frame["buffer_bytes"].dtype) == "int64"
    assert str(frame["needs_bytes"].dtype) == "Int64"
    assert frame["dram_bytes"].sum() == 1576


def test_pandas_absent(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(GetfuseError, match="pip install pandas"):
        report.to_pandas()


@pytest.mark.parametrize(
    ("suffix", "start"),
    [
        (".txt", "DRAM access per sample\n"),
        (".json", '{\n "schema_version": 2'),
        (".csv", "graph,group,fusable,operators,ops,"),
        (".md", "### DRAM access"),
        (".HTML", "<!DOCTYPE html>"),
    ],
)
def test_save_by_suffix(report: Report, tmp_path: Path, suffix: str, start: str) -> None:
    path = tmp_path / f"report{suffix}"
    report.save(path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith(start)
    assert text.endswith("\n")


@pytest.mark.parametrize("name", ["report.xlsx", "report", "report.htm"])
def test_unknown_suffix(report: Report, tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match=r"\.txt, \.json, \.csv, \.md, \.html"):
        report.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_plan_that_nobody_has_verified(plan: PartitionPlan) -> None:
    assert torch_getfuse.report(plan).sections[0].plan == plan
    for wrong, told in (
        (replace(plan, unfusable=("nobody",)), "unfusable operator 'nobody' is not in"),
        (replace(plan, groups=()), "2 operators stand in no group: conv0, conv1"),
        (replace(plan, buffer_bytes=88), "needs 88 B, not below the buffer of 88 B"),
    ):
        with pytest.raises(PlanError, match=told):
            torch_getfuse.report(wrong)
