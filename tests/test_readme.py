"""README.md is true: its code runs as pasted, and what it shows is what is printed."""

from __future__ import annotations

import ast
import builtins
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from torch_getfuse.cli import main as cli
from torch_getfuse.options import CHOICES, Options

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
VARIES = re.compile(r"\d+\.\d+ ms|[01]\.\d\d(?= |$)")
"""Times, and scores that another processor may round otherwise."""


def blocks(language: str) -> list[str]:
    """The code blocks of a language, as they would be pasted."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def run(command: list[str], folder: Path) -> str:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands() -> Iterator[list[str]]:
    """The arguments of every ``torch-getfuse`` of the console blocks."""
    for block in blocks("console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[0] == cli.PROGRAM:
                yield words[1:]


@pytest.mark.slow  # MobileNetV2 compiled, and run row by row
@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.count("\n"))
def test_python_runs_as_pasted(code: str, tmp_path: Path) -> None:
    run(["-c", code], tmp_path)


def test_python_needs_nothing_from_before() -> None:
    """The quick part of the test above: every name that a block uses is made in it."""
    assert len(blocks("python")) == 3
    for code in blocks("python"):
        used, made = set(), set(dir(builtins))
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Name):
                (used if isinstance(node.ctx, ast.Load) else made).add(node.id)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                made |= {alias.asname or alias.name for alias in node.names}
        assert used <= made


def test_commands_parse() -> None:
    found = list(commands())
    assert {words[0] for words in found} >= {"report", "plan", "run", "explain", "verify", "sweep"}
    for words in found:
        assert cli._parser().parse_args(words).command == words[0]


def test_the_option_table_is_that_of_the_options() -> None:
    _, _, after = README.partition("| option | values | default |")
    rows = after.partition("\n\n")[0].splitlines()[2:]
    told = {name: row for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert set(told) == {*Options.__dataclass_fields__}
    for name, choices in CHOICES.items():
        for choice in choices:
            assert (f'"{choice}"' if choice else "`None`") in told[name], (name, choice)


def test_the_report_shown_says_what_the_whole_network_saves() -> None:
    (shown,) = (text for text in blocks("text") if text.startswith("max relative error"))
    assert re.search(r"^whole network +114 MB +26\.8 MB +87\.1 MB \(76\.5%\)$", shown, re.M)


@pytest.mark.slow
def test_the_explanation_shown_is_what_is_printed(tmp_path: Path) -> None:
    (asked,) = (words for words in commands() if words[0] == "explain" and "--explainers" in words)
    (shown,) = (text for text in blocks("text") if "operators under a buffer" in text)
    printed = run(["-m", "torch_getfuse", *asked], tmp_path)
    assert (tmp_path / "why.svg").exists()
    # The order of the edges is that of their scores.
    # A time of more digits widens its column, so widths are not compared.
    first, second = (
        sorted(re.sub(r"(-)-+|( ) +", r"\1\2", VARIES.sub("", text)).rstrip().splitlines())
        for text in (shown, printed)
    )
    assert first == second, "paste the output of the command above it into README.md"
    scores = [
        [float(score) for score in re.findall(r"(?<= )[01]\.\d\d(?= |$)", text)]
        for text in (shown, printed)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=0.02)
