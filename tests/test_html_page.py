"""The interactive page of a report: what is in the file. ``test_html_browser.py`` opens it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from graphs import Builder, random_graph

import torch_getfuse
from torch_getfuse.errors import GetfuseError, OptionError
from torch_getfuse.explain_graph import explain_graph
from torch_getfuse.ir import OpGraph, Window
from torch_getfuse.options import Options
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.planner import plan_graph
from torch_getfuse.reporting.html.figures import section_figures, skip_edges
from torch_getfuse.reporting.html.page import PINNED_DATE, Origin, to_script_json
from torch_getfuse.reporting.report import Report
from torch_getfuse.reporting.section import Section

ROOT = Path(__file__).resolve().parents[1]
EVIL = "</script><img src=x onerror=alert(1)><!--<script>"


def plan_of(graph: OpGraph, buffer: int, scheme: str = "lbdf") -> PartitionPlan:
    options = Options(buffer=buffer, scheme=scheme, activation_bytes=1, weight_bytes=1)
    return plan_graph(graph, options)


def blocks(last: int = 64) -> OpGraph:
    """Two residual blocks with Squeeze-and-Excite in the second, and a convolution of its own."""
    build = Builder()
    at = build.conv(build.input((1, 4, 16, 16)), 4, 3)
    inner = build.act(build.conv(at, 8))
    at = build.add(build.conv(inner, 4), at)
    inner = build.act(build.conv(at, 8, 3))
    pooled = build.op("pool", [(inner, Window.reduce())], (1, 8, 1, 1))
    scale = [(inner, Window.identity()), (build.conv(pooled, 8), Window.identity())]
    scaled = build.op("mul", scale, (1, 8, 16, 16))
    at = build.add(build.conv(scaled, 4), at)
    build.conv(at, last)
    return build.graph()


def renamed(graph: OpGraph, name: str) -> OpGraph:
    """The graph with its first operator called ``name``."""
    first = replace(graph.ops[0], name=name, module=name)
    return replace(graph, ops=(first, *graph.ops[1:]))


def embedded(page: str) -> dict[str, Any]:
    """The figures in a page, as a browser reads them: up to the first end of a script."""
    text = page.partition('<script id="figures" type="application/json">')[2]
    found: dict[str, Any] = json.loads(text.partition("</script")[0])
    return found


# -- figures ------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["lbdf", "brr", "cascade"])
def test_units_cover_the_network_in_order_and_add_up(scheme: str) -> None:
    checked = 0
    for seed in range(16):
        graph = random_graph(Random(seed), operators=9)
        buffer = Random(seed).choice((150, 400, 1200))
        try:
            section = Section(plan_of(graph, buffer, scheme))
        except GetfuseError:
            continue  # BRR refuses some graphs
        form = section_figures(section)
        units, ops = form["units"], form["ops"]
        assert sorted(k for unit in units for k in unit["ops"]) == list(range(len(graph)))
        assert all(ops[k]["unit"] == n for n, unit in enumerate(units) for k in unit["ops"])
        assert sum(sum(unit["dram"]) for unit in units) == section.network_planned.total
        assert sum(sum(op["alone"]) for op in ops) == section.network_unfused.total
        for unit in units:
            if unit["fusable"]:
                assert sum(term["bytes"] for term in unit["terms"]) == unit["buffer"] < buffer
        for k, op in enumerate(ops):
            assert op["weight_bytes"] == graph.ops[k].weight_elements
            for read in op["reads"]:
                maker = form["tensors"][read["tensor"]]["maker"]
                assert maker is None or ops[maker]["unit"] <= op["unit"]
        checked += 1
    assert checked >= 12


def test_totals_are_those_of_the_report() -> None:
    section = Section(plan_of(blocks(), 1000))
    assert section.unfusable
    dram = section_figures(section)["dram"]
    assert sum(dram["unfused"].values()) == section.network_unfused.total
    assert sum(dram["planned"].values()) == section.network_planned.total
    assert dram["planned"]["unfusable"] == section.outside.total
    assert (dram["bound"], dram["floor"]) == (section.lower_bound, section.floor.total)


def test_skips_are_edges_beside_a_longer_path() -> None:
    graph = blocks()
    tensors = list(graph.tensors)
    found = {(graph.ops[i].name, tensors[t]) for i, t in skip_edges(graph)}
    # The two shortcuts, and the map that Squeeze-and-Excite scales.
    assert found == {("add4", "conv0"), ("mul9", "act6"), ("add11", "add4")}


def test_branches_are_no_skips() -> None:
    build = Builder()
    x = build.input((1, 2, 8, 8))
    build.add(build.conv(x, 2), build.act(build.conv(x, 2)))
    assert not skip_edges(build.graph())


def test_tensors_that_stay_and_leave_are_told() -> None:
    section = Section(plan_of(blocks(), 2600, "cascade"))
    assert section.steps is not None
    assert section.steps.staying
    tensors = {t["name"]: t for t in section_figures(section)["tensors"]}
    for entry in section.steps.staying:
        assert tensors[entry.tensor]["place"] == "stays"
        assert tensors[entry.tensor]["stay"] == [entry.first, entry.last]
    for left in section.steps.leaving:
        assert tensors[left.tensor]["place"] == "dram"
        assert tensors[left.tensor]["why"] == left.reason
    assert any(t["place"] == "chip" for t in tensors.values())


# -- the file -----------------------------------------------------------------------------


def test_a_name_ends_no_script() -> None:
    report = Report([Section(plan_of(renamed(blocks(), EVIL), 1000))], origin=Origin(EVIL))
    page = report.to_html()
    assert EVIL not in page
    assert "<img" not in page
    assert page.lower().count("</script") == 2
    found = embedded(page)
    assert found["about"]["model"] == found["sections"][0]["ops"][0]["name"] == EVIL


def test_script_json_is_ascii_without_markup() -> None:
    text = to_script_json({"a": "<!--&>", "b": "\u2028\ud800\u00e9"})
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": "<!--&>", "b": "\u2028\ud800\u00e9"}


def test_the_file_names_nothing_to_fetch() -> None:
    page = Report([Section(plan_of(blocks(), 1000))]).to_html()
    assert "default-src 'none'" in page
    assert not re.search(r"""\b(?:src|href)=["']|@import|url\((?!#)""", page)
    assert len(page) < 300_000
    assert "Permission is hereby granted" in page  # each copy of dagre carries its licence


def test_same_report_same_page_but_for_the_date(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report([Section(plan_of(blocks(), 1000))])
    monkeypatch.setenv(PINNED_DATE, "1767225600")
    page = report.to_html()
    assert embedded(page)["about"]["date"] == "2026-01-01 00:00 UTC"
    assert report.to_html() == page
    monkeypatch.setenv(PINNED_DATE, "1767312000")
    assert report.to_html().replace("2026-01-02", "2026-01-01") == page
    monkeypatch.delenv(PINNED_DATE)
    assert re.fullmatch(
        r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", embedded(report.to_html())["about"]["date"]
    )


def test_a_date_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PINNED_DATE, "today")
    with pytest.raises(OptionError, match="SOURCE_DATE_EPOCH='today'"):
        Report([]).to_html()


def test_a_report_knows_its_model_and_options() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).eval()
    x = torch.zeros(1, 3, 8, 8)
    report = torch_getfuse.report(model, x, buffer="2KB", accelerator=None, residency=True)
    assert report.origin == Origin(
        "Sequential", {"buffer": "2KB", "accelerator": "None", "residency": "True"}
    )
    about = embedded(report.to_html())["about"]
    assert (about["model"], about["command"]) == ("Sequential", "")
    assert about["version"] == torch_getfuse.__version__


def test_an_explanation_and_what_it_belongs_to() -> None:
    graph = blocks()
    why = explain_graph(
        graph, Options(buffer=1000, activation_bytes=1, weight_bytes=1), None, ["all"]
    )
    report = Report([Section(plan_of(graph, 1000))])
    told = embedded(report.to_html(why))["explanation"]
    assert [entry["explainer"] for entry in told["explainers"]] == ["all"]
    assert sum(term["bytes"] for term in told["terms"]) == why.demand_bytes
    assert embedded(report.to_html())["explanation"] is None
    other = Report([Section(plan_of(blocks(last=8), 1000))])
    with pytest.raises(OptionError, match="of another graph"):
        other.to_html(why)


def test_the_libraries_are_those_of_package_json() -> None:
    package = json.loads((ROOT / "tools/html-libraries/package.json").read_text())
    static = ROOT / "torch_getfuse/reporting/html/static/libraries.min.js"
    built = static.read_text().splitlines()[1]
    for name, version in package["dependencies"].items():
        assert f"{name} {version} (" in built, "make html-libraries"
