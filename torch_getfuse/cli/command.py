"""What a subcommand is, and what all of them share: names, exit codes, their one kind of error."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch_getfuse.errors import GetfuseError, Interrupted

PROGRAM = "torch-getfuse"
INTERRUPTED = 130  # exit code, as of a program that Ctrl-C ends


class UsageError(GetfuseError):
    """The command line itself, or a file that it names, cannot be used."""


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand.

    Attributes:
        name, help, example: what ``--help`` shows; the example without the program's name.
        arguments: adds its arguments to its parser.
        run: does the work and returns the exit code.
    """

    name: str
    help: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def notice(text: str) -> None:
    """One line beside the result, on the standard error stream."""
    print(f"{PROGRAM}: {' '.join(text.split())}", file=sys.stderr)


def print_json(form: object) -> None:
    """A result as JSON."""
    print(json.dumps(form, indent=1))


def until_interrupted(make: Callable[[], Any], what: str) -> tuple[Any, int]:
    """What ``make`` makes, with exit code 0; or what was known when it was interrupted, with 130.

    Args:
        make: calls the API.
        what: which attribute of :class:`Interrupted` is the same kind of thing.

    Raises:
        KeyboardInterrupt: where nothing was known yet.
    """
    try:
        return make(), 0
    except Interrupted as error:
        known = getattr(error, what)
        if known is None:
            raise
        notice(f"interrupted; this is the best {what} by then")
        return known, INTERRUPTED
