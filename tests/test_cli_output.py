"""Where the command line's results go, the browser, and what it says of slips of the hand."""

from __future__ import annotations

import importlib.util
import json
import logging
import webbrowser
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest

from torch_getfuse.cli import main as cli

NAME = "cli_models:small"
MODEL = [NAME, "--input", "1x3x8x8"]
SMALL = [*MODEL, "--buffer", "400", "--activation-bytes", "1", "--weight-bytes", "1"]


class Browser:
    """Stands for the browser, and keeps what it was asked to open."""

    def __init__(self) -> None:
        self.there = True
        self.opened: list[Path] = []

    def open(self, url: str) -> bool:
        parts = urlparse(url)
        assert parts.scheme == "file"
        self.opened.append(Path(url2pathname(parts.path)))
        return self.there


@pytest.fixture
def browser(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Browser:
    made = Browser()
    monkeypatch.setattr(webbrowser, "open", made.open)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return made


# -- the browser --------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "name"), [("report", "page.html"), ("explain", "why.html")])
def test_open_shows_the_file(
    browser: Browser, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, name: str
) -> None:
    path = tmp_path / name
    assert cli.main([command, *SMALL, "-o", str(path), "--open"]) == 0
    assert browser.opened == [path]
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert capsys.readouterr().err == f"torch-getfuse: wrote {path}\n"


def test_open_shows_a_picture(
    browser: Browser, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "why.svg"
    assert cli.main(["explain", *SMALL, "--explainers", "all", "-o", str(path), "--open"]) == 0
    argv = ["sweep", *MODEL, "--buffers", "400,1KB", "-j", "1", "--open", "--json"]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert len(browser.opened) == 2
    assert browser.opened[0] == path
    made = browser.opened[1]
    assert (made.parent, made.suffix) == (tmp_path, ".svg")
    assert "<svg" in made.read_text(encoding="utf-8")
    assert err == f"torch-getfuse: wrote {path}\ntorch-getfuse: opened {made}\n"
    assert '"records"' in out


@pytest.mark.parametrize("command", ["report", "explain"])
def test_open_makes_a_page_where_none_was_named(
    browser: Browser, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    assert cli.main([command, *SMALL, "--open", "--json"]) == 0
    (made,) = browser.opened
    assert (made.parent, made.suffix) == (tmp_path, ".html")
    assert made.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    out, err = capsys.readouterr()
    assert err == f"torch-getfuse: opened {made}\n"
    json.loads(out)


def test_no_browser(browser: Browser, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    browser.there = False
    path = tmp_path / "report.html"
    assert cli.main(["report", *SMALL, "-o", str(path), "--open"]) == 0
    assert capsys.readouterr().err == (
        f"torch-getfuse: wrote {path}\n"
        f"torch-getfuse: there is no browser to open here; the file is {path}\n"
    )


def test_a_browser_shows_no_json(browser: Browser, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", *SMALL, "-o", "report.json", "--open"]) == 2
    assert "name a file by .html, or leave -o out" in capsys.readouterr().err
    assert not browser.opened


def test_pictures_without_matplotlib_are_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else original(name)
    )
    for command in ("explain", "sweep"):
        assert cli.main([command, "no_such_module:model", "-o", "picture.svg"]) == 2
        assert "pip install 'torch-getfuse[plots]'" in capsys.readouterr().err


# -- mistakes, with --json ----------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["repport", "--json"],
        ["report", "--json"],
        ["report", *MODEL, "--bufer", "1KB", "--json"],
        ["report", *MODEL, "--buffer", "0KB", "--json"],
        ["plan", *MODEL, "--json", "-o", "no/such/folder/plan.json"],
        ["run", *MODEL, "--json", "--scheme", "brr"],
        ["explain", *MODEL, "--json", "--operators", "7"],
        ["price", *MODEL, "--json", "--groups", "no-such-file.json"],
        ["verify", "--json", "no-such-file.json"],
        ["sweep", "cli_models:smal", "--json"],
        ["accelerators", "--json", "no-such-file.toml"],
        ["train", "--json", "--scheme", "lbfd"],
        ["bench", "--json", "plannin"],
    ],
    ids=lambda argv: argv[0],
)
def test_mistakes_are_json_too(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    form = json.loads(out)
    assert list(form) == ["ok", "error"]
    assert form["ok"] is False
    assert err == f"torch-getfuse: {form['error']}\n"


def test_an_interrupt_is_json_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torch_getfuse.api.report", interrupted)
    assert cli.main(["report", *MODEL, "--json"]) == 130
    assert json.loads(capsys.readouterr().out) == {"ok": False, "error": "interrupted"}


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_command_that_prints_a_result_has_json(command: Any) -> None:
    words = command.example.split()
    if command.name == "completion":  # prints a script
        with pytest.raises(ValueError, match="does not take"):
            raise cli._unknown(*parsed(words))
    else:
        assert cli._parser().parse_args([words[0], "--json", *words[1:]]).json


def parsed(words: list[str]) -> tuple[Any, list[str], list[str]]:
    words = [*words, "--json"]
    args, unknown = cli._parser().parse_known_args(words)
    return args, words, unknown


# -- slips of the hand --------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--keep", "--together"])
def test_a_model_after_a_list_of_names(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    after = ["report", *SMALL[1:], "--json", flag, "0", "1", NAME]
    before = ["report", NAME, *SMALL[1:], "--json", flag, "0", "1"]
    told = []
    for argv in (after, before):
        assert cli.main(argv) == 0
        (section,) = json.loads(capsys.readouterr().out)["sections"]
        told.append(section["totals"])
    assert told[0] == told[1]


def test_models_after_a_list_of_names() -> None:
    parse = cli._parser().parse_args
    args = parse(["explain", "--operators", "a", "b", "x:y", "--explainers", "all"])
    assert (args.model, args.operators, args.explainers) == ("x:y", ["a", "b"], ["all"])
    args = parse(["sweep", "--keep", "a", "x:y", "model.pt2"])
    assert (args.model, args.option_keep) == (["x:y", "model.pt2"], ["a"])
    args = parse(["report", "x:y", "--keep", "a", "b:c"])  # nothing is missing
    assert (args.model, args.option_keep) == ("x:y", ["a", "b:c"])


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["report", "--keep", "a", "mobilenet_v2"], "--keep takes all names after it: put MODEL"),
        (["report", "--keep", NAME], "--keep takes all names after it: put MODEL before it"),
        (["report"], "required: MODEL; see torch-getfuse report --help"),
        (["sweep", NAME, "--schemes", "lbdf", "brr"], "between them: --schemes lbdf,brr"),
        (
            ["sweep", NAME, "--buffers", "64KB", "128KB", "1MB"],
            "several values have commas between them: --buffers 64KB,128KB,1MB",
        ),
        (["sweep", "--schemes", "lbdf", "brr", NAME], "'brr' stands for a MODEL here; several"),
        (["sweep", "--buffers", "64KB", "128KB", NAME], "as in --buffers 64KB,128KB,1MB"),
        (["report", NAME, "resnet18"], "does not take 'resnet18'; see torch-getfuse report --help"),
        (
            ["report", *MODEL, "resnet18"],
            "does not take 'resnet18'; see torch-getfuse report --help",
        ),
    ],
)
def test_slips(capsys: pytest.CaptureFixture[str], argv: list[str], told: str) -> None:
    assert cli.main(argv) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "sweep"])
def test_torch_keeps_its_log_for_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    records: list[logging.LogRecord] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    log, handler = logging.getLogger("torch._subclasses.fake_tensor"), Kept()
    log.addHandler(handler)
    try:
        argv = [command, "cli_models:shrinking", "--input", "1x3x2x2"]
        monkeypatch.delenv("TORCH_LOGS", raising=False)
        assert cli.main(argv) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err.startswith("torch-getfuse: cli_models:shrinking ")
        assert not records
        monkeypatch.setenv("TORCH_LOGS", "+dynamo")  # whoever sets it wants the log
        assert cli.main(argv) == 2
        assert "attempting to run meta" in str(records[0].msg)
    finally:
        log.removeHandler(handler)
