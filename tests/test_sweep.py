"""Sweeps: the product of what is asked for, resumed after a kill, the same wherever it runs."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import Picky, small
from torch import nn

import torch_getfuse
from torch_getfuse import CaptureError, GetfuseError, OptionError, Sweep, sweeps
from torch_getfuse.cli import bench_command
from torch_getfuse.cli import main as cli
from torch_getfuse.models import ModelError
from torch_getfuse.reporting.export import plain
from torch_getfuse.reporting.knee import find_knee
from torch_getfuse.reporting.section import Section
from torch_getfuse.reporting.sweep_result import FIGURES, KEY, Record, title

X = torch.zeros(1, 3, 8, 8)
ASKED: dict[str, Any] = {
    "buffers": [200, 400, "1KB"],
    "schemes": ["lbdf", "brr"],
    "granularities": ["line", "pixel"],
    "activation_bytes": 1,
    "weight_bytes": 1,
}


def run(**changes: Any) -> Sweep:
    """A sweep of the small model in this process."""
    return torch_getfuse.sweep(small(), (X,), **{"n_jobs": 1, **ASKED, **changes})


def timeless(result: Sweep) -> list[Record]:
    return [{**record, "seconds": None} for record in result.records]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """The points that are really planned: (scheme, buffer)."""
    planned = []

    def plan_graph(graph: Any, options: Any) -> Any:
        planned.append((options.scheme, options.buffer_bytes))
        return original(graph, options)

    original = sweeps.plan_graph
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "plan_graph", plan_graph)
        yield planned


def test_the_product_in_order_and_what_plan_says() -> None:
    result = run()
    asked = [(r["scheme"], r["granularity"], r["buffer_bytes"]) for r in result.records]
    assert asked == [
        (scheme, granularity, buffer)
        # BRR has no granularity and is not repeated.
        for scheme, granularity in (("lbdf", "line"), ("lbdf", "pixel"), ("brr", "line"))
        for buffer in (200, 400, 1024)
    ]
    for record in result.records:
        plan = torch_getfuse.plan(
            small(),
            (X,),
            buffer=record["buffer_bytes"],
            scheme=record["scheme"],
            granularity=record["granularity"],
            activation_bytes=1,
            weight_bytes=1,
        )
        assert record["fingerprint"] == plan.graph.fingerprint
        section = Section(plan)
        assert record["dram_bytes"] == plan.dram_bytes + section.outside.total
        assert record["unfusable_bytes"] == section.outside.total
        assert record["feature_bytes"] == record["dram_bytes"] - section.network_planned.weight
        assert record["lower_bound_bytes"] == plan.lower_bound_bytes + section.outside.total
        assert record["unfused_bytes"] == section.network_unfused.total
        assert record["max_buffer_bytes"] == plan.max_buffer_bytes
        assert (record["groups"], record["unfusable"]) == (len(plan.groups), len(plan.unfusable))
        assert record["proof"] == "optimal"
        assert record["unfused_bytes"] >= record["dram_bytes"]
        assert (record["unfusable"] == 0) == (record["unfusable_bytes"] == 0)


def test_a_larger_buffer_never_costs_more() -> None:
    result = run(buffers=[100, 200, 300, 400, "1KB"], schemes=["lbdf"], granularities=["line"])
    totals = [r["dram_bytes"] for r in result.records]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1]


def test_processes_give_what_this_process_gives() -> None:
    assert timeless(run(n_jobs=2)) == timeless(run())


def test_a_backend_without_a_generator_gives_the_same() -> None:
    from joblib import parallel_config

    with parallel_config(backend="multiprocessing", n_jobs=2):  # Ray's is one of its kind
        assert timeless(run(n_jobs=None)) == timeless(run())


def test_a_local_dask_cluster_gives_the_same() -> None:
    distributed = pytest.importorskip("dask.distributed")
    from joblib import parallel_config

    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster),
        parallel_config(backend="dask"),
    ):
        found = run(buffers=[200, 400])
    assert timeless(found) == timeless(run(buffers=[200, 400]))


# -- the file -----------------------------------------------------------------------------


def test_finished_points_are_not_planned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep.jsonl"
    first = run(path=path, buffers=[200, 400])
    assert len(path.read_text().splitlines()) == len(first.records) == 6
    with counted(monkeypatch) as planned:
        again = run(path=path)
    assert planned == [("lbdf", 1024), ("lbdf", 1024), ("brr", 1024)]
    assert timeless(again) == timeless(run())
    kept = [r for r in again.records if r["buffer_bytes"] != 1024]
    assert kept == list(first.records)  # their seconds as well


def test_the_order_of_the_file_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep.jsonl"
    first = run(path=path)
    path.write_text("\n".join(reversed(path.read_text().splitlines())))  # no newline at the end
    with counted(monkeypatch) as planned:
        assert run(path=path) == first
        assert planned == []
        run(path=path, buffers=[300])
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_damaged_last_line_is_dropped_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "sweep.jsonl"
    first = run(path=path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with counted(monkeypatch) as planned, caplog.at_level(logging.WARNING):
        again = run(path=path)
    assert planned == [("brr", 1024)]
    assert "line 9 is cut off" in caplog.text
    assert timeless(again) == timeless(first)
    assert len([json.loads(line) for line in path.read_bytes().splitlines()]) == 9


def test_other_options_are_other_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sweep.jsonl"
    only: dict[str, Any] = {"buffers": [400], "schemes": ["lbdf"], "granularities": ["line"]}
    run(path=path, **only)
    for change in ({"seed": 1}, {"weight_bytes": 2}, {"methods": ["exact"]}, {"budget": 9}):
        with counted(monkeypatch) as planned:
            run(path=path, **{**only, **change})
        assert planned == [("lbdf", 400)], change
    other = small()
    other[0] = nn.Conv2d(3, 4, 1)
    with counted(monkeypatch) as planned:
        torch_getfuse.sweep(other, (X,), n_jobs=1, path=path, **{**ASKED, **only})
    assert planned == [("lbdf", 400)]


def test_an_interrupt_keeps_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep.jsonl"
    original = sweeps.plan_graph

    def plan_graph(graph: Any, options: Any) -> Any:
        if options.scheme == "brr":
            raise KeyboardInterrupt
        return original(graph, options)

    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "plan_graph", plan_graph)
        with pytest.raises(torch_getfuse.Interrupted) as caught:
            run(path=path)
        assert len(caught.value.sweep.records) == 6
        assert caught.value.plan is None
    assert len(path.read_text().splitlines()) == 6
    with counted(monkeypatch) as planned:
        run(path=path)
    assert planned == [("brr", 200), ("brr", 400), ("brr", 1024)]


# -- errors -------------------------------------------------------------------------------


def test_a_failed_point_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "sweep.jsonl"
    with caplog.at_level(logging.WARNING):
        result = run(path=path, methods=["auto", "direct"], buffers=[400], explainer=None)
    failed = [r for r in result.records if r["method"] == "direct"]
    assert result.errors == failed
    assert len(failed) == 3
    assert all(r["dram_bytes"] is None and "explainer" in r["error"] for r in failed)
    assert caplog.text.count("failed: ") == str(result).count("failed: ") == 3
    assert "Sequential, lbdf line, direct, 400 B failed: " in str(result)
    with counted(monkeypatch) as planned:
        run(path=path, methods=["auto", "direct"], buffers=[400], explainer=None)
    assert len(planned) == 3


def test_a_model_that_cannot_be_captured_does_not_stop_the_others() -> None:
    models = {"good": (small(), (X,)), "bad": (Picky(), (torch.zeros(1, 3, 9, 9),))}
    result = torch_getfuse.sweep(models, buffers=[400], n_jobs=1)
    assert [(r["model"], r["error"] is None) for r in result.records] == [
        ("good", True),
        ("bad", False),
    ]
    with pytest.raises(CaptureError, match="Picky cannot be captured"):
        torch_getfuse.sweep(Picky(), (torch.zeros(1, 3, 9, 9),))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"buffer": "1KB"}, r"buffers=\[...\], not buffer="),
        ({"plan": "plan.json"}, "does not take plan="),
        ({"buffers": []}, r"buffers=\[\]"),
        ({"buffers": ["12XB"]}, "buffer='12XB'"),
        ({"schemes": ["lbfd"]}, "did you mean 'lbdf'"),
        ({"buget": 3}, "unknown option 'buget'; did you mean 'budget'"),
        ({"progress": 3}, "progress=3"),
    ],
)
def test_wrong_use(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        run(**given)


def test_wrong_models() -> None:
    with pytest.raises(OptionError, match="needs example inputs"):
        torch_getfuse.sweep(small())
    with pytest.raises(OptionError, match="got int"):
        torch_getfuse.sweep(3)
    with pytest.raises(OptionError, match="no model"):
        torch_getfuse.sweep([])
    with pytest.raises(OptionError, match="bring their own inputs"):
        torch_getfuse.sweep([small()], (X,))
    with pytest.raises(ModelError, match="no 'smal'"):
        torch_getfuse.sweep("cli_models:smal")


# -- models and forms ---------------------------------------------------------------------


def test_models_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    program = torch.export.export(small(), (X,))
    models = ["cli_models:small", (small(), (X,)), program, (small(), (X,))]
    with counted(monkeypatch) as planned:
        result = torch_getfuse.sweep(models, buffers=["4KB"], n_jobs=1)
    names = [r["model"] for r in result.records]
    assert names == ["cli_models:small", "Sequential", "ExportedProgram", "Sequential (2)"]
    assert len(planned) == 2  # three of them have one graph
    assert len({r["fingerprint"] for r in result.records}) == 2


def test_a_single_value_is_a_list_of_one() -> None:
    result = torch_getfuse.sweep(small(), (X,), buffers="4KB", schemes="brr", n_jobs=1)
    assert [(r["buffer_bytes"], r["scheme"]) for r in result.records] == [(4096, "brr")]


def test_the_accelerators_buffer_is_the_default() -> None:
    (record,) = torch_getfuse.sweep(small(), (X,), accelerator="eyeriss-v1", n_jobs=1).records
    assert (record["buffer_bytes"], record["weight_bytes"]) == (108 * 1024, 2)


def test_forms(tmp_path: Path) -> None:
    result = run()
    table = result.render(plain(160)).splitlines()
    assert len(table) == 2 + len(result.records) + 2
    narrow = result.render(plain(80))  # a table for each scheme and unit
    titles = (
        "Sequential, lbdf line, auto",
        "Sequential, lbdf pixel, auto",
        "Sequential, brr, auto",
    )
    assert [line for line in narrow.splitlines() if line.startswith("Seq")] == [*titles]
    assert max(map(len, narrow.splitlines())) <= 80
    told = "9 points: 9 planned, 0 kept from before, 0 failed"
    assert table[-1] == (
        f"{told}; sizes are of the whole network, unfused: every operator by itself, as the scheme "
        "prices it"
    )
    assert repr(result) == f"Sweep({told})"
    assert "lbdf pixel" in str(result)
    assert result._repr_html_().count("<tr>") == 1 + len(result.records)
    assert json.loads(result.to_json()) == result.to_dict()
    rows = list(csv.DictReader(io.StringIO(result.to_csv())))
    assert [int(row["dram_bytes"]) for row in rows] == [r["dram_bytes"] for r in result.records]
    assert set(rows[0]) == {"model", *KEY, *FIGURES, "error"}
    for suffix in (".txt", ".json", ".csv"):
        result.save(tmp_path / f"sweep{suffix}")
        assert (tmp_path / f"sweep{suffix}").stat().st_size
    result.save(tmp_path / "sweep.md")
    table = [line for line in (tmp_path / "sweep.md").read_text().splitlines() if line[:1] == "|"]
    assert len(table) == 2 + len(result.records)
    assert {line.count("|") for line in table} == {13}
    assert [row["buffer_bytes"] for row in result.to_dict()["knees"]] == [
        knee.buffer_bytes for knee in result.knees()
    ]
    result.save(tmp_path / "sweep.jsonl")
    again = run(path=tmp_path / "sweep.jsonl", buffers=[200, 400, 500, "1KB"])
    assert [r for r in again.records if r["buffer_bytes"] != 500] == list(result.records)
    assert again.kept == 9
    assert "12 points: 3 planned, 9 kept from before, 0 failed" in str(again)
    with pytest.raises(OptionError, match=r"did you mean '\.csv'"):
        result.save(tmp_path / "sweep.cvs")


def test_pandas() -> None:
    pytest.importorskip("pandas")
    assert run().to_pandas()["groups"].min() >= 1


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run()
    (axes,) = result.plot().axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    knees = [knee.buffer_bytes for knee in result.knees()]
    assert knees[0] == 400
    assert labels[0] == "Sequential, lbdf line, auto, knee 400 B"
    assert [label.partition(",")[2][:5] for label in labels[:3]] == [" lbdf", " lbdf", " brr,"]
    assert sum(", knee " in label for label in labels) == len(knees)
    assert any(label.startswith("knee: ") for label in labels)
    drawn = {line.get_label(): line for line in axes.lines}
    unfused = [r["unfused_bytes"] for r in result.records if "lbdf line" in title(r)]
    dashed = [line for label, line in drawn.items() if "unfused" in label]
    assert list(dashed[0].get_ydata()) == [size / (1 << 20) for size in unfused]
    assert drawn["Sequential, floor"].get_ydata()[0] == result.records[0]["floor_bytes"] / (1 << 20)
    assert axes.get_title() == "Sequential: DRAM access against the buffer"
    assert axes.get_ylabel().endswith("(MB)")
    # A notebook shows no figure but pyplot's unless it has a picture of its own.
    assert result.plot()._repr_png_().startswith(b"\x89PNG")
    for name in ("a.svg", "b.svg", "c.png"):
        result.save(tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


# -- floors -------------------------------------------------------------------------------


def wide() -> nn.Module:
    """Two 1x1 convolutions on 16 rows of 4 pixels, of 320 and 260 B, and 64 channels between.

    By lines they take 868 B; in 8 stripes of two rows 836 B, and weights are read 8 times.
    """
    return nn.Sequential(nn.Conv2d(4, 64, 1), nn.Conv2d(64, 4, 1)).eval()


WIDE = torch.zeros(1, 4, 16, 4)
FLOOR = 256 + 256 + 580
CASCADE: dict[str, Any] = {
    "schemes": ["cascade"],
    "activation_bytes": 1,
    "weight_bytes": 1,
    "n_jobs": 1,
}


def test_totals_of_cascade_are_of_the_whole_network() -> None:
    result = torch_getfuse.sweep(wide(), (WIDE,), buffers=[40, 300, 600, 869], **CASCADE)
    for record in result.records:
        plan = torch_getfuse.plan(
            wide(),
            (WIDE,),
            scheme="cascade",
            buffer=record["buffer_bytes"],
            activation_bytes=1,
            weight_bytes=1,
        )
        assert record["dram_bytes"] == plan.dram_bytes
        assert record["lower_bound_bytes"] == plan.lower_bound_bytes
        assert record["unfusable"] == len(plan.unfusable)
        assert record["floor_bytes"] == FLOOR
        assert (record["residency"], record["slice_channels"]) == (True, 16)
    assert [r["unfusable"] for r in result.records] == [2, 1, 0, 0]
    assert result.records[-1]["dram_bytes"] == FLOOR
    assert all(r["residency"] is r["slice_channels"] is None for r in run().records)


def test_the_smallest_buffer_of_a_sweep() -> None:
    result = torch_getfuse.sweep(wide(), (WIDE,), buffers=[2000, 600, 868, 869], **CASCADE)
    (found,) = result.smallest()
    assert (found.buffer_bytes, found.below_bytes, found.dram_bytes) == (869, 868, FLOOR)
    assert (found.floor_bytes, found.percent, found.proved) == (FLOOR, 0, True)
    text = (
        "Sequential, cascade, auto: at the floor of 1.07 KB from 869 B up; 868 B does not suffice"
    )
    assert f"{text} (proved)" in str(result)
    assert result.to_dict()["smallest"] == [found.to_dict()]
    # In 8 stripes up to seven times the weights more.
    at_868 = next(r["dram_bytes"] for r in result.records if r["buffer_bytes"] == 868)
    (near,) = result.smallest(100 * (at_868 / FLOOR - 1) + 1e-9)
    assert (near.buffer_bytes, near.below_bytes) == (868, 600)
    (none,) = torch_getfuse.sweep(wide(), (WIDE,), buffers=[868], **CASCADE).smallest()
    assert (none.buffer_bytes, none.dram_bytes, none.largest_bytes) == (None, at_868, 868)
    above = f"no buffer at the floor of 1.07 KB; 868 B is {at_868 / FLOOR - 1:.1%} above it"
    assert str(none) == f"Sequential, cascade, auto: {above}"


def test_an_unfusable_operator_reaches_no_floor() -> None:
    """Alone on the chip nothing fits, so that all is counted at the least that it moves."""
    one = nn.Sequential(nn.Conv2d(4, 64, 1)).eval()
    result = torch_getfuse.sweep(one, (WIDE,), buffers=[10, "4KB"], **CASCADE)
    small, large = result.records
    assert small["unfusable"] == 1
    assert small["dram_bytes"] == large["dram_bytes"] == small["floor_bytes"]
    assert [(f.buffer_bytes, f.below_bytes) for f in result.smallest()] == [(4096, 10)]


def test_the_smallest_buffer_to_the_kb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By lines three rows and all weights take 3,664 B; there are 62 sizes from 1 to 64 KB."""
    model = nn.Sequential(nn.Conv2d(16, 64, 1), nn.Conv2d(64, 16, 1)).eval()
    x = torch.zeros(1, 16, 64, 16)
    need = 256 + 1024 + 256 + 17 * 64 + 65 * 16
    path = tmp_path / "sweep.jsonl"
    asked: dict[str, Any] = {**CASCADE, "buffers": ["1KB", "64KB"], "within": 0, "path": path}
    with counted(monkeypatch) as planned:
        result = torch_getfuse.sweep(model, (x,), **asked)
    (found,) = result.smallest()
    assert found.buffer_bytes == 1024 * -(-(need + 1) // 1024)
    assert found.below_bytes == found.buffer_bytes - 1024
    assert found.proved
    assert len(planned) == len(set(planned)) <= 2 + 6  # by halves
    assert len(result.records) == 2
    assert len(result.tried) == len(planned) - 2
    assert {r["buffer_bytes"] % 1024 for r in result.tried} == {0}
    with counted(monkeypatch) as planned:
        again = torch_getfuse.sweep(model, (x,), **asked)
    assert planned == []
    assert again == result
    assert json.loads(result.to_json()) == result.to_dict()
    assert result.to_jsonl().count("\n") == len(result.records) + len(result.tried)
    # Without a buffer of the sweep that suffices, there is nothing to halve.
    none = torch_getfuse.sweep(model, (x,), **{**asked, "path": None, "buffers": ["1KB"]})
    assert none.tried == ()
    assert none.smallest()[0].buffer_bytes is None
    assert "no buffer at the floor" in str(none)
    with pytest.raises(OptionError, match="within=-1"):
        torch_getfuse.sweep(model, (x,), **{**asked, "within": -1})


def test_two_models_with_one_graph_have_a_line_each() -> None:
    result = torch_getfuse.sweep(
        [(wide(), (WIDE,)), (wide(), (WIDE,))], buffers=["4KB"], within=0, **CASCADE
    )
    assert [f.model for f in result.smallest()] == ["Sequential", "Sequential (2)"]
    assert len({f.buffer_bytes for f in result.smallest()}) == 1


def test_the_floor_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    result = torch_getfuse.sweep(wide(), (WIDE,), buffers=[600, "64KB"], within=0, **CASCADE)
    assert result.tried
    (axes,) = result.plot().axes
    drawn = {line.get_label(): line for line in axes.lines}
    (curve,) = [line for label, line in drawn.items() if "cascade, auto" in label]
    assert list(drawn["Sequential, floor"].get_ydata()) == [FLOOR / (1 << 20)] * 2
    assert list(curve.get_xdata()) == sorted(curve.get_xdata())
    assert len(curve.get_xdata()) == 2 + len(result.tried)


def point(buffer: int, dram: int) -> dict[str, Any]:
    return {
        "model": "m",
        "scheme": "lbdf",
        "method": "auto",
        "buffer_bytes": buffer,
        "dram_bytes": dram,
    }


def test_the_knee_is_the_furthest_below_the_line_between_the_ends() -> None:
    # Along 0, 1/3, 2/3, 1 of the logarithm of the buffer, 0, 70, 80 and 100 % are saved.
    curve = [point(64, 100), point(128, 30), point(256, 20), point(512, 0)]
    for points in (curve, curve[::-1]):
        knee = find_knee(points)
        assert knee is not None
        assert (knee.buffer_bytes, knee.dram_bytes, knee.share) == (128, 30, 0.7)
    assert find_knee(curve[:2]) is None
    straight = [point(64, 100), point(128, 50), point(256, 0)]
    late = [point(64, 100), point(128, 90), point(256, 0)]
    flat = [point(64, 5), point(128, 5), point(256, 5)]
    assert [find_knee(points) for points in (straight, late, flat)] == [None] * 3


def test_points_of_an_older_version_are_planned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep.jsonl"
    first = run(path=path)
    older = []
    for line in path.read_text().splitlines():
        record = json.loads(line) | {"schema_version": 2}
        for name in ("residency", "slice_channels", "floor_bytes"):
            del record[name]
        older.append(json.dumps(record) + "\n")
    path.write_text("".join(older))
    with counted(monkeypatch) as planned:
        assert timeless(run(path=path)) == timeless(first)
    assert len(planned) == len(first.records)


# -- the command line ---------------------------------------------------------------------

ARGV = ["sweep", "cli_models:small", "--input", "1x3x8x8", "-j", "1", "--buffers", "400,1KB"]


def test_cli(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    argv = [*ARGV, "--schemes", "lbdf,brr", "--activation-bytes", "1", "-o", str(path), "--json"]
    assert cli.main(argv) == 0
    first = capsys.readouterr()
    assert len(json.loads(first.out)["records"]) == len(path.read_text().splitlines()) == 4
    assert first.err == f"torch-getfuse: wrote {path}\n"
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == first.out
    assert cli.main([*ARGV, "-o", str(tmp_path / "sweep.csv")]) == 0
    assert (tmp_path / "sweep.csv").read_text().count("\n") == 3


def test_cli_of_cascade(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*ARGV, "--scheme", "cascade", "--no-residency", "--slice-channels", "2", "--json"]
    assert cli.main([*argv, "--within", "0"]) == 0
    form = json.loads(capsys.readouterr().out)
    assert form["within"] == 0
    assert {(r["scheme"], r["residency"], r["slice_channels"]) for r in form["records"]} == {
        ("cascade", False, 2)
    }
    assert len(form["smallest"]) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*ARGV, "--within", "-1"], "within=-1.0 is not a number of per cent"),
        ([*ARGV, "--schemes", "lbfd"], "did you mean 'lbdf'"),
        ([*ARGV, "-o", "sweep.cvs"], "did you mean '.csv'"),
        ([*ARGV, "-o", "/nowhere/sweep.jsonl"], "cannot write '/nowhere/sweep.jsonl'"),
        (["sweep", "cli_models:smal"], "no 'smal'"),
        (["sweep", "cli_models:small", "--input", "1x4x8x8"], "cannot be captured"),
        (["train", "--scheme", "lbfd"], "did you mean 'lbdf'"),
        (["bench", "plannin"], "did you mean 'planning'"),
    ],
)
def test_cli_mistakes(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_cli_failed_points_are_a_failed_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ARGV, "--methods", "auto,direct", "--explainer", "none"]) == 1
    assert "failed: " in capsys.readouterr().out


def test_bench_lists_and_runs(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench"]) == 0
    assert "planning  " in capfd.readouterr().out
    assert cli.main(["bench", "planning", "--help"]) == 0
    assert "--quick" in capfd.readouterr().out


def test_bench_without_a_checkout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        bench_command,
        "__file__",
        str(tmp_path / "site" / "torch_getfuse" / "cli" / "bench_command.py"),
    )
    stranger = tmp_path / "site" / "benchmarks" / "of_another_package.py"
    stranger.parent.mkdir(parents=True)
    stranger.touch()
    assert cli.main(["bench"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "benchmarks come with the sources" in err
    assert "run pip install -e . in a checkout" in err


def test_train_hands_on_what_is_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("torch_geometric")
    from torch_getfuse.explain import validity
    from torch_getfuse.explain.training import train

    asked: list[Any] = []

    def fake(*args: Any, **kwargs: Any) -> train.TrainResult:
        asked.extend((args, kwargs))
        scores = validity.Scores(8, 0.75, 0.5, 0.5, 0.5)
        return train.TrainResult("brr", "line", 1, 8, scores, scores, 2.0, ("a.safetensors",))

    monkeypatch.setattr(train, "train", fake)
    argv = ["train", "--scheme", "brr", "--seed", "3", "--output", str(tmp_path), "--groups", "9"]
    assert cli.main(argv) == 0
    assert asked == [("brr", "line", str(tmp_path), 3), {"progress": False, "groups": 9}]
    assert "75.00% of 8 test samples" in capsys.readouterr().out
    assert cli.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == ["a.safetensors"]


@pytest.mark.parametrize(
    "content",
    [
        b'{"api_key": "precious"}\n',
        b'{"api_key": "precious"}',
        b'{"model": "a file of another program"}\n',
        b"{\n",
        b"what I wrote\nlast night",
        b'{"a": 1}\n{"b": 2}\n',
        b"notes",
        b"[" * 100_000,
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_file_that_is_not_a_sweeps_stays_as_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.jsonl"
    path.write_bytes(content)
    with pytest.raises(GetfuseError, match=r"line 1 of .* is not a point of a sweep"):
        run(path=path)
    assert path.read_bytes() == content


def test_a_first_point_that_is_cut_off_is_planned_again(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    whole = timeless(run(path=path))
    for kept in (0, 1, 5, 40):
        path.write_bytes(path.read_bytes()[:kept])
        assert timeless(run(path=path)) == whole


def test_a_folder_or_a_device_for_a_sweep(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(GetfuseError, match="is not a regular file"):
            run(path=path)
