"""``torch-getfuse bench``: the benchmarks of a checkout of the sources."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from pathlib import Path
from typing import Any

from torch_getfuse.cli.command import PROGRAM, Command, UsageError, print_json
from torch_getfuse.cli.completers import completed_by
from torch_getfuse.errors import nearest


def run(args: argparse.Namespace) -> int:
    """List the benchmarks, or run one; returns its exit code."""
    scripts = _scripts()
    if not scripts:
        raise UsageError(
            "the benchmarks come with the sources, not with the installed package: run "
            f"pip install -e . in a checkout and {PROGRAM} bench again"
        )
    if args.name is None:
        told = {name: _first_line(path) for name, path in scripts.items()}
        width = max(map(len, told))
        if args.json:
            print_json(told)
        else:
            print("\n".join(f"{name:{width}}  {text}" for name, text in told.items()))
        return 0
    if args.name not in scripts:
        hint = nearest(args.name, scripts) or f"; known: {', '.join(scripts)}"
        raise UsageError(f"there is no benchmark {args.name!r}{hint}")
    import subprocess

    sys.stdout.flush()
    # Benchmarks use the graphs of the tests, which stand beside them.
    root = scripts[args.name].parents[1]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(scripts[args.name]), *args.arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def _scripts() -> dict[str, Path]:
    """Name -> script; empty beside an installed package, where the folders are of others."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    checkout = (folder.parent / "pyproject.toml").exists()
    found = sorted(folder.glob("*.py")) if checkout else []
    return {path.stem: path for path in found if path.stem[0] != "_"}


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def _names(prefix: str, **_: Any) -> list[str]:
    return [name for name in _scripts() if name.startswith(prefix)]


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    name = parser.add_argument(
        "name", metavar="NAME", nargs="?", help="without it: list the benchmarks"
    )
    completed_by(name, _names)
    parser.add_argument(
        "arguments", metavar="...", nargs=argparse.REMAINDER, help="arguments of the benchmark"
    )


COMMAND = Command(
    "bench",
    "run a benchmark, or list them; only from a checkout of the sources",
    "bench planning --quick",
    _arguments,
    run,
)
