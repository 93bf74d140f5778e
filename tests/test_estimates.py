"""Multiply-accumulates and estimates in reports: figures by hand, every form, what is not known."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from graphs import Builder
from torch import nn

import torch_getfuse
from torch_getfuse.accelerator import ACCELERATORS, Accelerator
from torch_getfuse.backend.compiled_models import find
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.planner import plan_graph
from torch_getfuse.reporting.estimates import Estimates, with_prefix
from torch_getfuse.reporting.html.figures import section_figures
from torch_getfuse.reporting.report import Report
from torch_getfuse.reporting.section import Section

MACS = (256, 256, 4096)  # 1x1 convolutions of a 4x4 map, 4 -> 4 -> 4 -> 64 channels
# Unfused 192 B read, 1152 written, 360 of weights; planned 128, 1088, 360 (tests/test_report.py).
MINE = Accelerator(
    "mine",
    100,
    1,
    1,
    dram_bytes_per_second=1e9,
    dram_picojoules_per_byte=100.0,
    macs_per_second=1e9,
)


def counted(*macs: int | None) -> PartitionPlan:
    """The plan of three convolutions for 100 bytes, of which the last never fits."""
    build = Builder()
    at = build.input((1, 4, 4, 4))
    for channels in (4, 4, 64):
        at = build.conv(at, channels)
    graph: OpGraph = build.graph()
    ops = tuple(replace(op, macs=n) for op, n in zip(graph.ops, macs, strict=True))
    options = Options(buffer=100, activation_bytes=1, weight_bytes=1)
    return plan_graph(replace(graph, ops=ops), options)


def flat(section: Section) -> str:
    return " ".join(str(Report([section])).split())


@pytest.mark.parametrize(
    ("value", "figures", "text"),
    [
        (300774272, 4, "300.8 MX"),
        (999960, 4, "1 MX"),
        (999.4, 3, "999 X"),
        (0, 3, "0 X"),
        (0.00117, 3, "1.17 mX"),
        (1.4e-6, 3, "1.4 uX"),
        (2e-10, 3, "2e-10 X"),
        (3.2e15, 3, "3.2e+03 TX"),
    ],
)
def test_decimal_prefixes(value: float, figures: int, text: str) -> None:
    assert with_prefix(value, "X", figures) == text


def test_macs_of_the_network_and_of_groups() -> None:
    report = Report([section := Section(counted(*MACS))])
    assert "compute 4.608 kMACs; 2.9 per byte of DRAM access as planned, 2.7 unfused" in flat(
        section
    )
    form = report.to_dict()["sections"][0]
    assert form["macs"] == {
        "total": 4608,
        "known": 4608,
        "unknown": [],
        "per_byte": {"unfused": 4608 / 1704, "planned": 4608 / 1576},
    }
    assert [group["macs"] for group in form["groups"]] == [512]
    assert [op["macs"] for op in form["unfusable"]] == [4096]
    assert form["estimates"] is None
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [row["macs"] for row in rows] == ["512", "4096"]
    assert [op["macs"] for op in section_figures(section)["ops"]] == list(MACS)


def test_what_is_not_known_is_named() -> None:
    report = Report([section := Section(counted(256, None, 4096))])
    assert "compute at least 4.352 kMACs, of conv1 they are not known; 2.8 per" in flat(section)
    form = report.to_dict()["sections"][0]
    assert (form["macs"]["total"], form["macs"]["known"]) == (None, 4352)
    assert form["macs"]["unknown"] == ["conv1"]
    assert [group["macs"] for group in form["groups"]] == [None]
    assert [row["macs"] for row in csv.DictReader(io.StringIO(report.to_csv()))] == ["", "4096"]


def test_a_graph_of_which_nothing_is_known_has_no_row() -> None:
    section = Section(counted(None, None, None), accelerator=MINE)
    assert "compute" not in flat(section)
    assert section.estimates is not None
    assert section.estimates.mac_seconds is None
    assert "estimate: least time DRAM access 1.7 us -> 1.58 us at 1 GB/s estimate" in flat(section)
    form = Report([section]).to_dict()["sections"][0]
    assert form["macs"]["per_byte"] == {"unfused": None, "planned": None}
    assert form["estimates"]["bound"] == {"unfused": None, "planned": None}


def test_estimates_by_hand() -> None:
    section = Section(counted(*MACS), accelerator=MINE)
    form = Report([section]).to_dict()["sections"][0]["estimates"]
    assert form["dram_seconds"] == pytest.approx({"unfused": 1704e-9, "planned": 1576e-9})
    assert form["mac_seconds"] == pytest.approx(4608e-9)
    assert form["bound"] == {"unfused": "macs", "planned": "macs"}
    assert form["dram_joules"] == pytest.approx({"unfused": 170.4e-9, "planned": 157.6e-9})
    assert json.loads(json.dumps(form)) == form
    text = flat(section)
    for part in (
        "estimate: least time DRAM access 1.7 us -> 1.58 us at 1 GB/s; MACs 4.61 us at 1 G a "
        "second: bound by MACs",
        "estimate: least energy DRAM access 170 nJ -> 158 nJ at 100 pJ per byte",
        "estimates assume peak figures of mine; DRAM access and MACs at the same time; one sample; "
        "no other work, traffic or energy",
    ):
        assert part in text, part


def test_the_plan_may_change_what_bounds() -> None:
    # 4608 MACs take longer than 1576 bytes, but not than 1704.
    between = replace(MINE, macs_per_second=2.8e9)
    assert "bound by DRAM access unfused, by MACs as planned" in flat(
        Section(counted(*MACS), accelerator=between)
    )
    fast = replace(MINE, macs_per_second=1e12)
    assert "bound by DRAM access estimate" in flat(Section(counted(*MACS), accelerator=fast))


@pytest.mark.parametrize(
    ("figures", "rows"),
    [
        ({}, []),
        ({"macs_per_second": 1e9}, ["time MACs 4.61 us at 1 G a second estimates"]),
        ({"dram_picojoules_per_byte": 1.0}, ["energy DRAM access 1.7 nJ -> 1.58 nJ"]),
    ],
)
def test_only_what_the_accelerator_states(figures: dict[str, float], rows: list[str]) -> None:
    section = Section(counted(*MACS), accelerator=Accelerator("some", 100, 1, 1, **figures))
    assert (section.estimates is None) == (not rows)
    assert ("estimate" in flat(section)) == bool(rows)
    assert all(row in flat(section) for row in rows)


def test_flash_that_is_only_read_gives_weights_alone() -> None:
    flash = replace(MINE, read_only=True)
    section = Section(counted(*MACS), accelerator=flash)
    form = Report([section]).to_dict()["sections"][0]["estimates"]
    assert form["dram_seconds"] == pytest.approx({"unfused": 360e-9, "planned": 360e-9})
    assert "flash reads 360 ns at 1 GB/s" in flat(section)
    assert "of its memory outside, which is read-only flash, the reads of weights alone" in flat(
        section
    )
    assert {name for name, preset in ACCELERATORS.items() if preset.read_only} == {
        f"ethos-u55-{macs}" for macs in (32, 64, 128, 256)
    }


def test_a_plan_that_needs_to_write_to_flash_says_so_once() -> None:
    """128 B of maps go between operators; the input and the outputs, 1088 B, are not the plan's."""
    flash = replace(MINE, name="chip", read_only=True)
    section = Section(counted(*MACS), notes=("a note",), accelerator=flash)
    told, note = section.remarks
    assert note == "a note"
    assert told.startswith("chip cannot run this plan as it is: its memory outside is read-only fl")
    assert "the plan moves 128 B of feature maps there and back. To keep them on chip try" in told
    assert "try scheme='cascade' (tensors stay between steps), a larger buffer= than 100 B" in told
    report = Report([section])
    assert report.to_dict()["sections"][0]["notes"] == [told, note]
    assert f"Note: {told}" in flat(section)
    assert told in section_figures(section)["notes"]
    assert flat(section).count("feature maps") == 1, "not in the estimates as well"
    assert Section(counted(*MACS), accelerator=MINE).remarks == ()


def test_cascade_keeps_what_flash_cannot_take() -> None:
    graph = counted(*MACS).graph
    flash = replace(MINE, read_only=True)
    asked = {"buffer": 4096, "scheme": "cascade", "activation_bytes": 1, "weight_bytes": 1}
    assert Section(plan_graph(graph, Options.of(asked)), accelerator=flash).remarks == ()
    without = {"residency": False, "split_before": ["conv1"]}
    plan = plan_graph(graph, Options.of({**asked, **without}))
    (told,) = Section(plan, accelerator=flash).remarks
    assert "try a larger buffer= than 4 KB, or" in told


def test_assumptions_name_the_accelerator() -> None:
    section = Section(counted(*MACS), accelerator=MINE)
    assert "assumptions accelerator mine, scheme lbdf, granularity line, buffer 100 B" in flat(
        section
    )
    assert section_figures(section)["assumptions"][0] == "accelerator mine"
    assert section.to_dict()["assumptions"]["accelerator"] == "mine"
    assert "assumptions scheme lbdf" in flat(Section(counted(*MACS)))
    assert Section(counted(*MACS)).to_dict()["assumptions"]["accelerator"] is None


def test_a_rate_for_other_widths_is_said_to_be_one() -> None:
    assert "MAC rate" not in flat(Section(counted(*MACS), accelerator=MINE))
    wide = replace(MINE, activation_bytes=2)
    told = "its MAC rate is for activations of 2 B and weights of 1 B, which are not the plan's"
    assert told in flat(Section(counted(*MACS), accelerator=wide))
    no_rate = replace(wide, macs_per_second=None)
    assert "MAC rate" not in flat(Section(counted(*MACS), accelerator=no_rate))


# -- from the doors -----------------------------------------------------------------------


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3))


def told(report: Report) -> list[Estimates | None]:
    return [section.estimates for section in report.sections]


def test_a_report_estimates_for_the_preset_or_the_object_that_was_given(tmp_path: Path) -> None:
    model, x = Small().eval(), torch.rand(1, 3, 8, 8)
    (by_name,) = told(torch_getfuse.report(model, x, accelerator="ethos-u65-256", cache=False))
    assert by_name is not None
    assert by_name.accelerator is ACCELERATORS["ethos-u65-256"]
    own = replace(MINE, buffer_bytes=65536)
    (by_object,) = told(torch_getfuse.report(model, x, accelerator=own, cache=False))
    assert by_object is not None
    assert by_object.accelerator is own
    assert by_object.macs == 8 * 64 * 27 + 8 * 36 * 72
    assert told(torch_getfuse.report(model, x, buffer="64KB", cache=False)) == [None]
    # A plan file does not say what it was planned for.
    plan = torch_getfuse.plan(model, (x,), accelerator="ethos-u65-256", cache=False)
    plan.save(tmp_path / "plan.json")
    saved = torch_getfuse.report(torch_getfuse.load_plan(tmp_path / "plan.json"))
    assert told(saved) == [None]
    assert saved.sections[0].known_macs == by_object.macs


def test_a_compiled_model_estimates_as_well() -> None:
    model, x = Small(), torch.rand(1, 3, 8, 8)
    options = {"accelerator": "ethos-u65-256", "inner": "eager", "backward": True, "cache": False}
    compiled = torch.compile(model, backend="getfuse", options=options)
    compiled(x).sum().backward()
    assert find(compiled)
    forward, backward = told(torch_getfuse.report(compiled))
    assert forward is not None
    assert backward is not None
    assert forward.accelerator is backward.accelerator is ACCELERATORS["ethos-u65-256"]
    section = torch_getfuse.report(compiled).sections[1]
    # The gradient of a convolution has no rule: unknown, and said to be.
    assert section.uncounted
    assert all(section.op(name).reason for name in section.uncounted)
