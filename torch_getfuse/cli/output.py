"""Where results go: ``-o FILE`` by its suffix, ``--json``, and ``--open`` in the browser."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch_getfuse.cli.command import UsageError, notice
from torch_getfuse.cli.completers import completed_by, files
from torch_getfuse.errors import FileError
from torch_getfuse.reporting.suffixes import PICTURES, known_suffix

SHOWN = (".html", *PICTURES)
"""Suffixes of the files that a browser shows."""


def add_output(
    parser: argparse.ArgumentParser, suffixes: Sequence[str], told: str = "", opens: str = ""
) -> None:
    """``-o``, ``--json`` and, where there is a page or picture, ``--open``.

    Args:
        suffixes: of the files that the command can write.
        told: more about ``-o``.
        opens: suffix of the file that ``--open`` makes where no file was named.
    """
    group = parser.add_argument_group("output")
    written = group.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=f"write the result to FILE, by its suffix: {', '.join(suffixes)}{told}",
    )
    completed_by(written, files(*suffixes))
    group.add_argument("--json", action="store_true", help="print JSON instead of text")
    if opens:
        shown = [suffix for suffix in suffixes if suffix in SHOWN]
        group.add_argument(
            "--open",
            action="store_true",
            help=f"show the result in the browser: FILE ({', '.join(shown)}), or without -o a "
            f"temporary {opens}",
        )


class Destination:
    """The file that a command writes, and whether the browser shows it.

    Args:
        args: with ``output``, and ``open`` where the command has it.
        what: what is written, with its article.
        suffixes: of the files that it can be written to.
        opens: suffix of the file that ``--open`` makes where no file was named.

    Raises:
        UsageError: before any work is done, for what cannot be drawn or shown.
        OptionError: the same for another suffix; lists the supported ones.

    Attributes:
        suffix: of the file, in lower case with its dot; ``""`` where none is written.
    """

    def __init__(
        self, args: argparse.Namespace, what: str, suffixes: Sequence[str], opens: str = ""
    ) -> None:
        self._path: str | None = args.output
        self._open = bool(opens) and args.open
        self.suffix = ""
        if self._path is not None:
            self.suffix = known_suffix(self._path, what, suffixes)
            if self._open and self.suffix not in SHOWN:
                shown = ", ".join(suffix for suffix in suffixes if suffix in SHOWN)
                raise UsageError(
                    f"a browser does not show {self.suffix} files: for --open name a file by "
                    f"{shown}, or leave -o out"
                )
        elif self._open:
            self.suffix = opens
        if self.suffix in PICTURES and importlib.util.find_spec("matplotlib") is None:
            raise UsageError(
                f"{self.suffix} pictures need matplotlib: pip install 'torch-getfuse[plots]'"
            )

    def write(self, save: Callable[[str], object]) -> None:
        """``save(path)`` where a file is wanted, and show it where the browser is.

        Raises:
            UsageError: where the file cannot be written.
        """
        if not self.suffix:
            return
        path = self._path
        if path is None:
            # It stays: the browser reads it when this program has ended.
            handle, path = tempfile.mkstemp(prefix="torch-getfuse-", suffix=self.suffix)
            os.close(handle)
        try:
            save(path)
        except FileError:
            raise
        except OSError as error:
            raise UsageError(
                f"cannot write {path!r}: {error.strerror}; name another file with -o"
            ) from error
        if self._path is not None:
            notice(f"wrote {path}")
        if self._open:
            _show(path, temporary=self._path is None)


def print_result(made: Any, args: argparse.Namespace, **detail: Any) -> None:
    """A report, an explanation, an appraisal or a sweep, as JSON where that is asked for.

    Args:
        detail: of the text, as the result's ``show`` takes it.
    """
    if args.json:
        print(made.to_json())
    else:
        made.show(**detail)


def _show(path: str, temporary: bool) -> None:
    import webbrowser

    if not webbrowser.open(Path(path).resolve().as_uri()):
        notice(f"there is no browser to open here; the file is {path}")
    elif temporary:
        notice(f"opened {path}")
