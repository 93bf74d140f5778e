"""The text of reports: its width, groups that are alike, kinds of operators, modules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import pytest
from graphs import Builder, random_graph, residual_chain
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import operator_graph

from torch_getfuse.accelerator import format_size
from torch_getfuse.cli import main as cli
from torch_getfuse.errors import OptionError
from torch_getfuse.explain_graph import explain_graph
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.planner import plan_graph
from torch_getfuse.price_graph import price_graph
from torch_getfuse.reporting.export import plain
from torch_getfuse.reporting.folding import alike_groups, alike_unfusable
from torch_getfuse.reporting.module_tree import modules_of
from torch_getfuse.reporting.report import Report
from torch_getfuse.reporting.section import Section

WIDTHS = (80, 100, 120, 160)
CODES = re.compile(r"\x1b\[[0-9;]*m")


def plan_of(graph: OpGraph, buffer: object, scheme: str = "lbdf") -> PartitionPlan:
    given = {"buffer": buffer, "scheme": scheme, "activation_bytes": 1, "weight_bytes": 1}
    return plan_graph(graph, Options.of(given))


def named(graph: OpGraph, rng: Random) -> OpGraph:
    """The graph with names as long as those of deep models."""
    parts = ("features", "encoder", "layers", "denseblock4", "0", "12", "self_attention", "conv")
    new = {}
    for op in graph:
        module = ".".join(rng.choice(parts) for _ in range(rng.randint(1, 7)))
        new[op.name] = f"{module}.{op.name}"
    tensors = {
        new.get(name, name): replace(tensor, name=new.get(name, name))
        for name, tensor in graph.tensors.items()
    }
    ops = tuple(
        replace(
            op,
            name=new[op.name],
            module=new[op.name].rpartition(".")[0],
            writes=new[op.writes],
            macs=rng.choice((0, 10**9, 123456)),
            reads=tuple(replace(r, tensor=new.get(r.tensor, r.tensor)) for r in op.reads),
            after=tuple(new[name] for name in op.after),
        )
        for op in graph
    )
    outputs = tuple(new.get(name, name) for name in graph.outputs)
    return replace(graph, ops=ops, tensors=tensors, outputs=outputs)


# -- width --------------------------------------------------------------------------------


def sizes(section: Section) -> Iterator[str]:
    """Every size of a report, as text."""
    for group in section.plan.groups:
        yield from map(format_size, group.dram)
        if group.buffer_bytes:
            used = group.buffer_bytes if section.steps is None else None
            yield f"{group.buffer_bytes / section.plan.buffer_bytes:.1%}"
            yield format_size(used) if used is not None else ""
    for dram in section.unfusable.values():
        yield from map(format_size, dram)
    for total in (section.network_unfused.total, section.network_planned.total):
        yield format_size(total)
    for held in section.steps.occupancy if section.steps else ():
        if not held.unknown:
            yield from map(format_size, (held.weights, held.lines, held.residents, held.idle))
    for kind in section.kinds:
        yield format_size(kind.weight_bytes)
    for module in modules_of(section, 3):
        yield format_size(module.unfused_bytes)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["lbdf", "brr", "cascade"]))
def test_no_line_is_too_long_and_no_number_broken(seed: int, scheme: str) -> None:
    rng = Random(seed)
    make = rng.choice((random_graph, residual_chain))
    graph = named(make(rng, rng.randint(2, 14), rng.choice((4, 9, 30))), rng)
    section = Section(plan_of(graph, rng.choice((60, 200, 900, 5000)), scheme))
    report = Report([replace(section, unsupported={"aten._scaled_dot_product_attention": 2})])
    for width in WIDTHS:
        text = report.to_text(width=width, by_kind=True, modules=3, full=rng.random() < 0.5)
        assert max(map(len, text.splitlines())) <= width
        for size in sizes(section):
            assert size in text


@pytest.mark.parametrize("scheme", ["lbdf", "cascade"])
def test_prices_keep_to_the_width(scheme: str) -> None:
    graph = named(residual_chain(Random(3), 9, 12), Random(3))
    names = [*graph.index]
    asked = [names[:4], [names[4], names[7]], names[5:7], names[8:]]
    priced = price_graph(graph, {"buffer": 900, "scheme": scheme}, asked)
    assert not priced.legal
    for width in WIDTHS:
        text = priced.render(plain(width))
        assert max(map(len, text.splitlines())) <= width
        for group in priced.groups:
            assert all(format_size(size) in text for size in group.dram)


@pytest.mark.parametrize(
    "name", ["squeezenet1_0", pytest.param("efficientnet_b3", marks=pytest.mark.slow)]
)
def test_networks_keep_to_the_width(name: str) -> None:
    plan = plan_of(operator_graph(name), "128KB")
    section = Section(plan)
    for width in WIDTHS:
        text = Report([section]).to_text(width=width, by_kind=True, modules=4)
        assert max(map(len, text.splitlines())) <= width
        for size in sizes(section):
            assert size in text
    why = explain_graph(plan.graph, Options.of({"buffer": "128KB"}), None, ["random", "all"])
    for width in WIDTHS:
        assert max(map(len, why.render(plain(width)).splitlines())) <= width


def test_text_has_the_width_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report([Section(plan_of(blocks(), 600))])
    assert str(report) == report.to_text() == report.to_text(width=100)
    monkeypatch.setenv("COLUMNS", "80")
    assert str(report) == report.to_text(width=80) != report.to_text(width=100)
    with pytest.raises(OptionError, match="width=79 is too narrow"):
        report.to_text(width=79)


def test_a_file_is_the_same_on_every_machine(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Report([Section(plan_of(blocks(), 600))])
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("FORCE_COLOR", "1")
    report.save(tmp_path / "report.txt", by_kind=True)
    text = (tmp_path / "report.txt").read_text()
    assert text == report.to_text(width=100, by_kind=True) + "\n"
    assert "\x1b" not in text


def test_colours_are_shown_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report([Section(plan_of(blocks(), 200))])
    assert report.sections[0].unfusable
    report.show()
    assert capsys.readouterr().out == f"{report}\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    report.show()
    shown = capsys.readouterr().out
    assert "\x1b[31m" in shown
    assert CODES.sub("", shown) == f"{report}\n"
    for text in (str(report), report.to_text(), report.to_markdown(), report._repr_html_()):
        assert "\x1b" not in text


def test_a_plan_prints_within_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(operator_graph("mobilenet_v2"), "1MB")
    monkeypatch.setenv("COLUMNS", "80")
    lines = str(plan).splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(str(plan).split()).count("fusion_group_") == len(plan.groups)
    for group in plan.groups:
        assert all(f" {name}" in str(plan) for name in group.ops)


# -- groups that are alike ----------------------------------------------------------------


def blocks(count: int = 3) -> OpGraph:
    """Residual blocks of two convolutions and a sum, then a convolution of its own."""
    build = Builder()
    at = build.conv(build.input((1, 4, 8, 8)), 8)
    for _ in range(count):
        at = build.add(build.conv(build.conv(at, 8, 3), 8, 3), at)
    build.conv(at, 64)
    return build.graph()


@cache
def resnet() -> Section:
    return Section(plan_of(operator_graph("resnet18"), "256KB"))


def test_every_group_is_in_one_row() -> None:
    plan = resnet().plan
    alike = alike_groups(plan)
    assert sorted(k for same in alike for k in same) == list(range(len(plan.groups)))
    assert len(alike) < len(plan.groups)
    for same in alike:
        groups = [plan.groups[k] for k in same]
        figures = {(g.buffer_bytes, g.dram, len(g.ops)) for g in groups}
        assert len(figures) == 1
        shapes = {
            tuple(
                plan.graph.tensors[plan.graph.ops[plan.graph.index[n]].writes].shape for n in g.ops
            )
            for g in groups
        }
        assert len(shapes) == 1
    apart = alike_unfusable(resnet())
    assert sorted(name for same in apart for name in same) == sorted(plan.unfusable)


def test_alike_groups_differ_in_names_alone() -> None:
    plan = plan_of(blocks(), 1400)
    same = max(alike_groups(plan), key=len)
    assert len(same) > 1
    text = Report([Section(plan)]).to_text(width=160)
    count = len(same)
    first = plan.groups[same[0]].ops
    assert re.search(rf"^{same[0]}.*  {count} x {re.escape(first[0])}", text, re.M)
    assert "N x: so many that are alike" in text
    full = Report([Section(plan)]).to_text(width=160, full=True)
    assert " x " not in full
    for k, group in enumerate(plan.groups):
        assert re.search(rf"^{k} +{re.escape(group.ops[0])}", full, re.M)
    # Another reason or other figures: not alike.
    one, other = (plan.groups[k] for k in same[:2])
    for changed in (
        replace(other, ends="output"),
        replace(other, buffer_bytes=other.buffer_bytes - 1),
    ):
        groups = tuple(changed if group is other else group for group in plan.groups)
        assert all(
            same[1] not in rows or same[0] not in rows
            for rows in alike_groups(replace(plan, groups=groups))
        )
    assert one.ends != other.ends or one.ends == "output"  # names differ, and count as alike


def test_data_and_markup_have_every_group() -> None:
    section = resnet()
    report = Report([section])
    assert len(report.to_dict()["sections"][0]["groups"]) == len(section.plan.groups)
    assert len(report.to_records()) == len(section.plan.groups) + len(section.plan.apart)
    for text in (report.to_markdown(), report._repr_html_()):
        for group in section.plan.groups:
            assert group.ops[0] in text
        assert "so many that are alike" not in text


def test_steps_of_cascade_are_folded_too() -> None:
    plan = plan_of(operator_graph("mobilenet_v2"), "64KB", "cascade")
    alike = alike_groups(plan)
    assert len(alike) < len(plan.groups)
    for same in alike:
        assert len({str(plan.groups[k].way) for k in same}) == 1
    text = Report([Section(plan)]).to_text(width=160)
    bars = text.partition("in each step")[2].partition("W weights")[0]
    rows = [line for line in bars.splitlines() if re.match(r"\d", line)]
    shown = {k for row in rows for k in spread(row.split("  ")[0])}
    assert shown == set(range(len(plan.groups)))


def spread(label: str) -> range:
    first, _, last = label.partition("-")
    return range(int(first), int(last or first) + 1)


# -- kinds and modules --------------------------------------------------------------------


def test_kinds_add_up() -> None:
    section = resnet()
    kinds = section.kinds
    assert sum(kind.operators for kind in kinds) == len(section.plan.graph)
    assert sum(kind.unfusable for kind in kinds) == len(section.plan.unfusable)
    assert sum(kind.weight_bytes for kind in kinds) == section.floor.weight
    assert sum(kind.macs or 0 for kind in kinds) == section.known_macs
    for kind in kinds:
        assert kind.operators == kind.fused + kind.alone + kind.unfusable
    single = sum(len(g.ops) == 1 for g in section.plan.groups)
    assert sum(kind.alone for kind in kinds) == single
    assert section.to_dict()["kinds"] == [kind.to_dict() for kind in kinds]
    assert kinds[0].kind == "conv2d"
    text = Report([section]).to_text(by_kind=True)
    assert "Operators by kind" in text
    assert "Operators by kind" not in str(Report([section]))


def test_kinds_of_unknown_macs() -> None:
    section = Section(plan_of(blocks(), 600))
    assert {kind.macs for kind in section.kinds} == {None}
    assert re.search(r"^all +11 .* not known", Report([section]).to_text(by_kind=True), re.M)


def test_modules_add_up() -> None:
    section = resnet()
    modules = modules_of(section, 2)
    root, *rest = modules
    assert (root.path, root.depth, len(root.operators)) == ("", 0, len(section.plan.graph))
    assert root.planned_bytes == section.network_planned.total
    assert root.unfused_bytes == section.network_unfused.total
    assert root.weight_bytes == section.floor.weight
    assert root.groups == tuple(range(len(section.plan.groups)))
    assert root.outputs == ((1, 1000),)
    assert {m.depth for m in rest} == {1, 2}
    for parent in modules:
        below = [m for m in rest if m.depth == parent.depth + 1]
        below = [m for m in below if m.path.rpartition(".")[0] == parent.path]
        own = [n for n in parent.operators if section.op(n).module == parent.path]
        if below:
            inner = [name for m in below for name in m.operators]
            assert sorted(inner + own) == sorted(parent.operators)
        if parent.planned_bytes is not None:
            for k in parent.groups:
                assert set(section.plan.groups[k].ops) <= set(parent.operators)
    block = next(m for m in modules if m.path == "layer1.0")
    assert block.outputs == ((1, 64, 56, 56),)
    text = Report([section]).to_text(modules=1, width=160)
    assert "Modules down to depth 1" in text
    assert re.search(r"^  layer1 +\d+ ", text, re.M)
    assert "layer1.0 " not in text.partition("Fusion groups")[0]


def test_depths() -> None:
    report = Report([resnet()])
    with pytest.raises(OptionError, match="modules=0 is no depth"):
        report.to_text(modules=0)


SMALL = ("cli_models:small", "--input", "1x3x8x8", "--buffer", "400")


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    assert cli.main(["report", *SMALL]) == 0
    bare = capsys.readouterr().out
    path = tmp_path / "report.txt"
    asked = ("--full", "--by-kind", "--modules", "1", "-o", str(path))
    assert cli.main(["report", *SMALL, *asked]) == 0
    out = capsys.readouterr().out
    assert path.read_text() == out
    for title in ("Operators by kind", "Modules down to depth 1"):
        assert title in out
        assert title not in bare
    assert cli.main(["report", *SMALL, "--modules"]) == 0
    assert "Modules down to depth 2" in capsys.readouterr().out
    assert cli.main(["report", *SMALL, "--modules", "0"]) == 2
    assert "'0' is no depth of modules" in capsys.readouterr().err
