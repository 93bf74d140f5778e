"""The command line: what it prints, and one line with exit code 2 for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from torch_getfuse import group_planner, load_plan, sweeps
from torch_getfuse.backend.rowwise.ledger import Counts, GroupLedger
from torch_getfuse.cli import main as cli
from torch_getfuse.cli import options as cli_options
from torch_getfuse.errors import GetfuseError
from torch_getfuse.ir import OpGraph

MODEL = ["cli_models:small", "--input", "1x3x8x8"]
SMALL = [*MODEL, "--buffer", "400", "--activation-bytes", "1", "--weight-bytes", "1"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan file of the small model."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    assert cli.main(["plan", *SMALL, "-o", str(path)]) == 0
    return path


def fails(capsys: pytest.CaptureFixture[str], code: int, *argv: object) -> str:
    """Run a command that must fail with ``code``; its one line."""
    assert cli.main([str(arg) for arg in argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("torch-getfuse: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", *SMALL]) == 0
    out, err = capsys.readouterr()
    assert "DRAM access per sample" in out
    assert "optimal (proved)" in out
    assert err == ""


def test_run(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    kept = tmp_path / "ledger.json"
    assert cli.main(["run", *SMALL, "-o", str(kept)]) == 0
    out, _ = capsys.readouterr()
    assert "equal" in out
    assert "DIFFERS" not in out
    assert cli.main(["run", *MODEL, "--plan", str(saved), "--json"]) == 0
    form = json.loads(capsys.readouterr().out)
    assert form["agrees"]
    assert form["equals_eager"]
    assert form == json.loads(kept.read_text())
    assert all(g["counted_ring_bytes"] == g["planned_ring_bytes"] > 0 for g in form["groups"])


def test_run_takes_plans_in_rows_only(capsys: pytest.CaptureFixture[str]) -> None:
    told = fails(capsys, 2, "run", *SMALL, "--granularity", "pixel")
    assert "granularity='line'" in told


def test_run_tells_a_count_that_differs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(self: GroupLedger, counts: Counts, graph: OpGraph) -> None:
        self.counted_read_bytes = sum(counts.read.values()) + 1

    monkeypatch.setattr(GroupLedger, "count", count)
    assert cli.main(["run", *SMALL]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_widths_of_eighths_and_aligned_channels(capsys: pytest.CaptureFixture[str]) -> None:
    """3x8x8 in and 2x8x8 out, 16 channels of 4 bits each; weights are read in place."""
    widths = ["--activation-bytes", "0.5", "--weight-bytes", "0", "--align-channels", "16"]
    assert cli.main(["report", *MODEL, "--buffer", "1KB", *widths, "--json"]) == 0
    (section,) = json.loads(capsys.readouterr().out)["sections"]
    told = section["assumptions"]
    assert (told["activation_bytes"], told["weight_bytes"], told["align_channels"]) == (0.5, 0, 16)
    assert section["totals"]["planned"]["dram_bytes"] == 2 * 64 * 16 // 2


def test_report_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert cli.main(["report", *SMALL, "--json", "-o", str(page)]) == 0
    form = json.loads(capsys.readouterr().out)
    assert form["schema_version"] == 2
    (section,) = form["sections"]
    assert section["assumptions"]["buffer_bytes"] == 400
    assert section["assumptions"]["weight_bytes"] == 1
    # Unfused: 3x8x8 in, 4x8x8 out and in and out and in, 2x8x8 out, weights 112 + 10.
    assert section["totals"]["unfused"]["dram_bytes"] == 192 + 4 * 256 + 128 + 122
    assert section["totals"]["planned"]["dram_bytes"] == 192 + 128 + 122
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_a_page_tells_its_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert cli.main(["report", *SMALL, "-o", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert f'"model":"{SMALL[0]}"' in text
    assert f'"command":"torch-getfuse report {SMALL[0]} ' in text
    assert '"explanation":null' in text


def test_a_page_of_an_explanation(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "why.html"
    assert cli.main(["explain", *SMALL, "--explainers", "all", "-o", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert f'"command":"torch-getfuse explain {SMALL[0]} ' in text
    assert '"explanation":{"schema_version":1,' in text
    capsys.readouterr()
    assert ".dot, .html, .svg, .png" in fails(capsys, 2, "explain", *SMALL, "-o", "why.pdf")


def test_plan_is_saved_and_told_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    assert cli.main(["plan", *SMALL, "-o", str(path)]) == 0
    out, _ = capsys.readouterr()
    assert out.count("\n") == 1
    assert "1 fusion groups, 442 B of DRAM access (442 B), optimal (proved)" in out
    assert load_plan(path).verify().dram_bytes == 442


def test_a_cascade_plan_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    wide = [*MODEL, "--activation-bytes", "1", "--weight-bytes", "1", "--scheme", "cascade"]
    assert cli.main(["plan", *wide, "--buffer", "180", "-o", str(path)]) == 0
    plan = load_plan(path).verify()
    told = capsys.readouterr().out
    assert f": {len(plan.groups)} steps, {plan.dram_bytes} B of DRAM access" in told
    assert "unfusable" not in told
    assert "fusion groups" not in told
    assert cli.main(["verify", str(path), "--prove"]) == 0
    assert f"OK, {len(plan.groups)} steps, " in capsys.readouterr().out
    assert cli.main(["plan", *wide, "--buffer", "60", "-o", str(path)]) == 0
    plan = load_plan(path).verify()
    assert plan.unfusable
    told = capsys.readouterr().out
    assert f"{len(plan.groups)} steps, {len(plan.unfusable)} unfusable operators, " in told
    assert f"{plan.dram_bytes} B of DRAM access" in told
    assert "; unfusable ones at the least that they move)" in told


def test_the_options_of_cascade(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    argv = [*SMALL, "--scheme", "cascade", "--no-residency", "--slice-channels", "3"]
    assert cli.main(["plan", *argv, "-o", str(path)]) == 0
    plan = load_plan(path)
    assert (plan.residency, plan.slice_channels) == (False, 3)
    capsys.readouterr()
    assert cli.main(["report", *argv, "--json"]) == 0
    (section,) = json.loads(capsys.readouterr().out)["sections"]
    assert section["assumptions"]["residency"] is False
    assert section["assumptions"]["slice_channels"] == 3
    assert cli.main(["explain", *argv]) == 0
    assert "scheme cascade" in capsys.readouterr().out
    told = fails(capsys, 2, "report", *argv, "--slice-channels", "0")
    assert "slice_channels=0" in told


def test_a_picture_of_a_report_is_of_steps(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.svg"
    told = fails(capsys, 2, "report", *SMALL, "-o", path)
    assert "pictures of a report show the steps of --scheme cascade; -o FILE.html" in told
    assert cli.main(["report", *SMALL, "--scheme", "cascade", "-o", str(path)]) == 0
    assert path.read_text().startswith("<?xml")


def test_rows_of_operators(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "ops.csv"
    assert cli.main(["report", *SMALL, "-o", str(path), "--by", "operator"]) == 0
    head, *rows = path.read_text().splitlines()
    assert head.startswith("graph,operator,kind,")
    assert rows
    capsys.readouterr()
    for to in (["-o", tmp_path / "ops.md"], []):
        told = fails(capsys, 2, "report", *SMALL, *to, "--by", "operator")
        assert "--by operator is for -o FILE.csv" in told


def test_plan_json(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    assert cli.main(["plan", *SMALL, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    kept = json.loads(saved.read_text())
    for form in (told, kept):
        del form["stages"]  # holds seconds
    assert told == kept


def test_plan_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *SMALL]) == 0
    assert "fusion_group_0: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "scheme", "granularity"),
    [
        (["--granularity", "pixel"], "lbdf", "pixel"),
        (["--scheme", "brr"], "brr", "line"),
        (["--scheme", "brr", "--granularity", "pixel"], "brr", "line"),  # it is LBDF's
    ],
)
def test_every_cost_model_plans_and_verifies(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    given: list[str],
    scheme: str,
    granularity: str,
) -> None:
    path = tmp_path / "plan.json"
    argv = [*MODEL, "--buffer", "4KB", "--activation-bytes", "1", "--weight-bytes", "1", *given]
    assert cli.main(["plan", *argv, "-o", str(path)]) == 0
    plan = load_plan(path)
    assert (plan.scheme, plan.granularity) == (scheme, granularity)
    assert cli.main(["verify", str(path)]) == 0
    assert cli.main(["report", *MODEL, "--plan", str(path)]) == 0
    assert f"scheme {scheme}, " in " ".join(capsys.readouterr().out.split())


def test_a_saved_plan_can_be_reported(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    assert cli.main(["report", *MODEL, "--plan", str(saved), "--json"]) == 0
    (section,) = json.loads(capsys.readouterr().out)["sections"]
    assert section["assumptions"]["buffer_bytes"] == 400


def test_explain(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "why.dot"
    argv = ["explain", *MODEL, "--buffer", "200", "--activation-bytes", "1", "--weight-bytes", "1"]
    argv += ["--operators", "0", "1", "2", "--explainers", "all", "random", "-o", str(path)]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert "3 operators under a buffer of 200 B: " in out
    assert "weights of 0" in out
    assert err == f"torch-getfuse: wrote {path}\n"
    assert path.read_text().startswith("digraph")
    assert cli.main([*argv, "--json"]) == 0
    form = json.loads(capsys.readouterr().out)
    assert form["demand_bytes"] == sum(term["bytes"] for term in form["terms"])
    assert [blame["explainer"] for blame in form["explainers"]] == ["all", "random"]


def test_explain_tells_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", *SMALL, "--explainers", "all"]) == 0
    assert "of room left" in capsys.readouterr().out


def test_verify(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    assert cli.main(["verify", str(saved)]) == 0
    out, _ = capsys.readouterr()
    assert out.count("\n") == 1
    assert "OK, 1 fusion groups, 442 B of DRAM access" in out
    assert cli.main(["verify", str(saved), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert told["dram_bytes"] == 442


def cheaper(form: dict[str, Any]) -> None:
    form["groups"][0]["dram_write_bytes"] -= 1
    form["dram_bytes"] -= 1
    form["lower_bound_bytes"] -= 1


def other_total(form: dict[str, Any]) -> None:
    form["dram_bytes"] -= 1


def smaller_buffer(form: dict[str, Any]) -> None:
    form["buffer_bytes"] = 100


def lost_operator(form: dict[str, Any]) -> None:
    form["groups"][0]["ops"].pop()


def twice(form: dict[str, Any]) -> None:
    form["groups"].append(form["groups"][0])
    form["dram_bytes"] *= 2


def other_graph(form: dict[str, Any]) -> None:
    form["graph"]["ops"][0]["weight_elements"] += 1


def no_window(form: dict[str, Any]) -> None:
    form["graph"]["ops"][0]["reads"][0]["window"] = "identity twice"


@pytest.mark.parametrize(
    "damage", [cheaper, other_total, smaller_buffer, lost_operator, twice, other_graph, no_window]
)
def test_a_plan_that_fails_a_check(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path, damage: Any
) -> None:
    form = json.loads(saved.read_text())
    damage(form)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(form))
    assert "check failed" in fails(capsys, 1, "verify", path)
    assert cli.main(["verify", str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        (b"", "damaged or truncated"),
        (b'{"schema_version": 1, "graph": {', "damaged or truncated"),
        (b"\x80\xff\x00", "not a text file"),
        (b"[1, 2]", "not a plan"),
        (b'{"a": 1}', "not a plan"),
        (b'{"schema_version": 1, "graph": [], "groups": 0}', "not a plan (no 'graph')"),
    ],
)
@pytest.mark.parametrize("command", [["verify"], ["report", *MODEL, "--plan"]])
def test_a_file_that_is_no_plan(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    content: bytes | None,
    told: str,
    command: list[str],
) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    line = fails(capsys, 2, *command, path)
    if command == ["verify"]:
        assert told in line


def test_a_truncated_plan_file(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(saved.read_text()[:-100])
    assert "truncated" in fails(capsys, 2, "verify", path)
    assert "truncated" in fails(capsys, 2, "report", *MODEL, "--plan", path)


def test_a_plan_of_another_graph(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    line = fails(capsys, 2, "report", "cli_models:small", "--input", "1x3x9x9", "--plan", saved)
    assert "another graph" in line


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "COMMAND"),
        (["repport"], "did you mean 'report'"),
        (["report"], "MODEL"),
        (["report", *MODEL, "--bufer", "1KB"], "did you mean '--buffer'"),
        (["report", *MODEL, "--buffer"], "--buffer"),
        (["report", *MODEL, "--buffer", "0KB"], "buffer='0KB'"),
        (["report", *MODEL, "--buffer", "12XB"], "buffer='12XB'"),
        (["report", *MODEL, "--buffer", "-5"], "buffer"),
        (["report", *MODEL, "--scheme", "lbfd"], "did you mean 'lbdf'"),
        (["report", *MODEL, "--granularity", "pixle"], "did you mean 'pixel'"),
        (["report", *MODEL, "--method", "exat"], "did you mean 'exact'"),
        (["report", *MODEL, "--activation-bytes", "0"], "activation_bytes=0"),
        (["report", *MODEL, "--activation-bytes", "0.3"], "0.25 and 0.375"),
        (["report", *MODEL, "--align-channels", "0"], "align_channels=0"),
        (["report", *MODEL, "--activation-bytes", "two"], "activation_bytes='two'"),
        (["report", *MODEL, "--time-limit", "soon"], "time_limit='soon'"),
        (["report", *MODEL, "--accelerator", "edge-tpus"], "did you mean 'edge-tpu'"),
        (["report", *MODEL, "--plan", ""], "plan=''"),
        (["report", *MODEL, "-o", "report.xlsx"], ".html"),
        (["explain", *MODEL, "--operators", "7"], "'7' is neither an operator"),
        (["explain", *MODEL, "--explainers", "salency"], "did you mean 'saliency'"),
        (["explain", *MODEL, "-o", "why.pgn"], "did you mean '.png'"),
        (["plan", *MODEL, "-o", "no/such/folder/plan.json"], "cannot write"),
        (["report", "mobilenet"], "torchvision:"),
        (["report", "torchvision:mobilenet_v22"], "did you mean 'mobilenet_v2'"),
        (["report", "cli_models:smal"], "did you mean 'small'"),
        (["report", "no_such_module:small"], "no_such_module"),
        (["report", "cli_models:faulty"], "no such luck"),
        (["report", "missing.pt2"], "missing.pt2"),
        (["report", "cli_models:small", "--input", "1,3,8,8"], "did you mean '1x3x8x8'"),
        (["report", "cli_models:small", "--input", "1x3x0x8"], "1x3x0x8"),
        (["report", "cli_models:small", "--input", "1x4x8x8"], "input of 1x4x8x8"),
        (["report", "cli_models:Picky", "--input", "1x3x4x4"], "the width must be 8"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], argv: list[str], told: str) -> None:
    assert told in fails(capsys, 2, *argv)


def test_an_exported_program(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from cli_models import small

    path = tmp_path / "small.pt2"
    torch.export.save(torch.export.export(small().eval(), (torch.zeros(1, 3, 8, 8),)), path)
    assert cli.main(["plan", str(path), *SMALL[3:]]) == 0
    assert "442 B of DRAM access" in capsys.readouterr().out
    assert "input of 1x3x9x9" in fails(capsys, 2, "plan", path, "--input", "1x3x9x9")
    path.write_bytes(path.read_bytes()[:200])
    assert "cannot be read" in fails(capsys, 2, "plan", path)


def test_our_own_fault_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_getfuse import api

    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(api, "report", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", *SMALL])


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_options.Options, "of", interrupted)
    assert cli.main(["report", *SMALL]) == 130
    assert capsys.readouterr() == ("", "torch-getfuse: interrupted\n")


@pytest.mark.parametrize("command", ["plan", "report"])
def test_an_interrupt_writes_what_is_known(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(group_planner, "exact", interrupted)
    path = tmp_path / "known.json"
    assert cli.main([command, *SMALL, "-o", str(path)]) == 130
    out, err = capsys.readouterr()
    assert "interrupted" in out
    assert err == (
        f"torch-getfuse: interrupted; this is the best {command} by then\n"
        f"torch-getfuse: wrote {path}\n"
    )
    form = json.loads(path.read_text())
    if command == "plan":
        assert load_plan(path).verify().stages[-1].stopped == "interrupted"
    else:
        assert "interrupted" in json.dumps(form)


def test_an_interrupted_sweep_writes_its_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, planned = sweeps.plan_graph, []

    def plan_graph(graph: object, options: object) -> object:
        if planned:
            raise KeyboardInterrupt
        planned.append(original(graph, options))
        return planned[0]

    monkeypatch.setattr(sweeps, "plan_graph", plan_graph)
    path = tmp_path / "points.json"
    asked = ["sweep", *MODEL, "--buffers", "64KB,128KB", "-j", "1", "-o", str(path)]
    assert cli.main(asked) == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(json.loads(path.read_text())["records"]) == 1


def test_values_become_the_types_of_the_options() -> None:
    assert cli_options._value("4", int | None) == 4
    assert cli_options._value("none", str | None) is None
    assert cli_options._value("2.5", float) == 2.5
    assert cli_options._value("256KB", int | str) == "256KB"
    assert cli_options._value("auto", bool | str) == "auto"
    assert cli_options._value("False", bool | str) is False


def test_as_a_program(saved: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(
        [sys.executable, "-m", "torch_getfuse", "verify", saved],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "OK" in run.stdout


def test_errors_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def wrong(options: object) -> None:
        raise GetfuseError("two\nlines")

    monkeypatch.setattr(cli_options.Options, "of", wrong)
    assert fails(capsys, 2, "report", *SMALL) == "torch-getfuse: two lines\n"
