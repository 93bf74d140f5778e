"""What ``--help`` shows: only what applies, within 80 columns, and without numpy or torch."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from torch_getfuse.cli import main as cli
from torch_getfuse.cli import options as cli_options
from torch_getfuse.cli.command import Command
from torch_getfuse.options import REFUSED_BY_SWEEP, SWEPT, Options
from torch_getfuse.reporting import appraisal, explanation, report, suffixes, sweep_result

ROOT = Path(__file__).resolve().parents[1]
MODEL = ["cli_models:small", "--input", "1x3x8x8"]
PLANNING = {option for options in cli_options.PLANNING.values() for option in options}


@pytest.fixture(autouse=True)
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        cli.main([*words, "--help"])
    assert leaving.value.code == 0
    return capsys.readouterr().out


def options_in(text: str) -> set[str]:
    """Options of planning that a help shows."""
    flags = {flag.replace("-", "_") for flag in re.findall(r"^  --([a-z-]+)", text, re.MULTILINE)}
    return flags & {field.name for field in dataclasses.fields(Options)}


@pytest.mark.parametrize("command", ["", *(command.name for command in cli.COMMANDS)])
def test_help_fits_and_names_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    lines = help_of(capsys, *command.split()).splitlines()
    assert max(map(len, lines)) <= 80
    example = " ".join(lines[lines.index("example:") + 1 :]).replace(" \\ ", " ")
    words = example.split()
    assert words[0] == "torch-getfuse"
    assert cli._parser().parse_args(words[1:]).command == (command or "report")


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_a_parser_runs_its_command(command: Command) -> None:
    assert cli._parser().parse_args(command.example.split()).run is command.run


def test_every_option_is_in_one_group_or_of_torch_compile() -> None:
    grouped = [option for options in cli_options.PLANNING.values() for option in options]
    fields = [field.name for field in dataclasses.fields(Options)]
    assert sorted([*grouped, *cli_options.RUNNING]) == sorted(fields)
    for option in PLANNING:
        assert cli_options._help_text(option, ()), option


@pytest.mark.parametrize("command", ["report", "plan", "price", "explain"])
def test_options_of_torch_compile_are_not_shown(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    text = help_of(capsys, command)
    assert options_in(text) == PLANNING
    for title in ("output", "hardware", "cost model"):
        assert f"\n{title}:\n" in text
    assert "eyeriss-v1" in text


def test_help_of_run_shows_what_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "run")
    assert options_in(text) == PLANNING - {"granularity"}
    assert "brr" not in text


def test_help_of_sweep_shows_what_a_sweep_takes(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "sweep")
    assert options_in(text) == PLANNING - {*SWEPT, *REFUSED_BY_SWEEP}
    for lists in SWEPT.values():
        assert f"--{lists} LIST" in text


@pytest.mark.parametrize("option", REFUSED_BY_SWEEP)
def test_a_sweep_says_why_it_refuses(capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert cli.main(["sweep", MODEL[0], f"--{option}", "x"]) == 2
    assert capsys.readouterr().err == (
        f"torch-getfuse: sweep does not take '--{option}': {REFUSED_BY_SWEEP[option]}\n"
    )


def test_what_has_no_effect_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *MODEL, "--inner", "eager", "--strict"]) == 0
    out, err = capsys.readouterr()
    assert "fusion_group_0" in out
    assert err == (
        "torch-getfuse: --inner, --strict are options of torch.compile, and without effect on "
        "plan\n"
    )
    assert cli.main(["plan", *MODEL, "--backward", "perhaps"]) == 2
    assert "backward='perhaps'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "known"),
    [
        ("report", suffixes.REPORT),
        ("plan", (".json",)),
        ("run", (".json",)),
        ("explain", suffixes.EXPLANATION),
        ("price", suffixes.APPRAISAL),
        ("sweep", suffixes.SWEEP),
    ],
)
def test_suffixes_are_named(
    capsys: pytest.CaptureFixture[str], command: str, known: tuple[str, ...]
) -> None:
    told = ", ".join(known)
    assert told in " ".join(help_of(capsys, command).split())
    needed = ["--groups", "groups.json"] if command == "price" else []
    scheme = ["--scheme", "cascade"] if command == "report" else []  # which has pictures
    assert cli.main([command, MODEL[0], *needed, *scheme, "-o", "result.docx"]) == 2
    err = capsys.readouterr().err
    assert "as 'result.docx': the suffix must be " in err
    assert told in err


def test_the_suffixes_are_those_that_are_written() -> None:
    written = {".txt", ".csv", *report._FORMS, *suffixes.PICTURES}
    assert written == {*suffixes.REPORT}
    assert (*explanation._FORMS, *suffixes.PICTURES) == suffixes.EXPLANATION
    assert tuple(sweep_result._FORMS) == suffixes.SWEEP
    assert suffixes.APPRAISAL == (".txt", ".md", ".json")
    assert appraisal.APPRAISAL is suffixes.APPRAISAL


def test_what_is_answered_at_once_imports_neither_numpy_nor_torch() -> None:
    commands = [
        ["--help"],
        ["--version"],
        *([command.name, "--help"] for command in cli.COMMANDS),
        ["repport"],
        ["report"],
        ["report", "--keep", "a"],
        ["report", MODEL[0], "--bufer", "1KB"],
        ["report", MODEL[0], "--buffer", "12XB"],
        ["report", MODEL[0], "--scheme", "lbfd"],
        ["report", MODEL[0], "--accelerator", "edge-tpus", "--json"],
        ["report", MODEL[0], "-o", "report.xlsx"],
        ["explain", MODEL[0], "--explainers", "salency"],
        ["price", MODEL[0], "--groups", "groups.json", "-o", "price.csv"],
        ["sweep", MODEL[0], "-o", "sweep.html"],
        ["sweep", MODEL[0], "--schemes", "lbdf", "brr"],
        ["run", MODEL[0], "-o", "run.txt"],
        ["verify", "no-such-plan.json"],
        ["train", "--scheme", "lbfd"],
        ["accelerators", "--json"],
        ["bench", "--json"],
    ]
    code = (
        "import sys\n"
        "from torch_getfuse.cli.main import main\n"
        f"for words in {commands!r}:\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        "    found = {'numpy', 'torch', 'scipy', 'tabulate'} & sys.modules.keys()\n"
        "    if found: sys.exit(f'{words} imports {found}')\n"
        "print('all')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("all\n")


def test_explainers_are_trained_for_two_cost_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--scheme", "cascade"]) == 2
    assert "explainers are trained for lbdf and brr alone" in capsys.readouterr().err
