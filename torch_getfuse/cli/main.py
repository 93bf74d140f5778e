"""The command line ``torch-getfuse``: its commands put together, its mistakes and exit codes.

Exit codes: 0 done; 1 a check failed; 2 wrong use, with one line that says what to type instead;
130 interrupted, with what was known by then written and printed. With ``--json`` a mistake is told
on the standard output too, as ``{"ok": false, "error": ...}``: whoever reads JSON there always
finds some, and whoever watches the terminal sees the line.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from torch_getfuse.cli import (
    accelerators_command,
    bench_command,
    completion_command,
    explain_command,
    plan_command,
    price_command,
    report_command,
    run_command,
    sweep_command,
    train_command,
    verify_command,
)
from torch_getfuse.cli.command import INTERRUPTED, PROGRAM, UsageError, notice, print_json
from torch_getfuse.errors import GetfuseError, nearest

COMMANDS = (
    report_command.COMMAND,
    plan_command.COMMAND,
    run_command.COMMAND,
    explain_command.COMMAND,
    price_command.COMMAND,
    verify_command.COMMAND,
    sweep_command.COMMAND,
    accelerators_command.COMMAND,
    train_command.COMMAND,
    bench_command.COMMAND,
    completion_command.COMMAND,
)

_MODEL = re.compile(r"[\w.]+:\S+|.+\.pt2")
"""A word that names a model; names of operators and explainers rarely look like it."""
_COLUMNS = 78
"""Of what ``--help`` does not leave to argparse: an example is what a shell can read back."""


class _Parser(argparse.ArgumentParser):
    """Raises :class:`UsageError` where argparse would print its usage and exit."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with a MODEL that stands after a list of names taken out of the list."""
        given = list(sys.argv[1:] if args is None else args)
        try:
            return super().parse_known_args(given, namespace)
        except _NoModel as error:
            moved = self._model_first(given)
            if moved is None:
                raise UsageError(f"{error}{self._swallowed(given)}") from error
            return super().parse_known_args(moved, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse has to say, with what to type instead."""
        if re.search(r"required:.*\bMODEL\b", message):
            raise _NoModel(message)
        wrong = re.search(r"invalid choice: '([^']*)'", message)
        known = [command.name for command in COMMANDS] if self.prog == PROGRAM else []
        hint = nearest(wrong[1], known) if wrong else ""
        raise UsageError(f"{message}{hint or f'; see {self.prog} --help'}")

    def _lists(self, given: Sequence[str]) -> list[tuple[int, int]]:
        """Where the names of each ``--keep NAME NAME ...`` start and end."""
        flags = [k for k, word in enumerate(given) if word.startswith("-")]
        flags.append(len(given))
        return [
            (start + 1, end)
            for start, end in itertools.pairwise(flags)
            if getattr(self._option_string_actions.get(given[start]), "nargs", None) == "+"
        ]

    def _model_first(self, given: Sequence[str]) -> list[str] | None:
        """The words with the models that end a list of names before all others."""
        for start, end in self._lists(given):
            first = end
            while first - 1 > start and _MODEL.fullmatch(given[first - 1]):
                first -= 1
            if first < end:
                return [*given[first:end], *given[:first], *given[end:]]
        return None

    def _swallowed(self, given: Sequence[str]) -> str:
        for start, end in self._lists(given):
            if end > start:
                return f"; {given[start - 1]} takes all names after it: put MODEL before it"
        return f"; see {self.prog} --help"


class _Version(argparse.Action):
    """``--version``, which looks the version up only where it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(
            option_strings,
            argparse.SUPPRESS,
            nargs=0,
            default=argparse.SUPPRESS,
            help="show the version and exit",
        )

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from torch_getfuse.version import __version__

        print(f"{PROGRAM} {__version__}")
        parser.exit()


class _NoModel(UsageError):
    """MODEL is missing, or is thought to be one more name of a list."""


def _parser() -> _Parser:
    parser = _Parser(
        prog=PROGRAM,
        description="Fusion groups that fit an on-chip buffer, and the DRAM access they save.",
        epilog=_example(COMMANDS[0].example),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.help,
            description=textwrap.fill(command.help, _COLUMNS),
            epilog=_example(command.example),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.arguments(sub)
        sub.set_defaults(run=command.run, flags=sorted(sub._option_string_actions))
    return parser


def _example(words: str) -> str:
    """An example below ``example:``, continued as a shell continues a line."""
    lines = ["example:", f"  {PROGRAM}"]
    parts = re.findall(r"-\S+ [^-\s]\S*|\S+", words)  # a flag stays with its value
    for part in parts:
        room = _COLUMNS - (0 if part is parts[-1] else len(" \\"))
        if len(lines[-1]) + 1 + len(part) > room:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {part}"
    return "\n".join(lines)


def _unknown(args: argparse.Namespace, words: Sequence[str], unknown: Sequence[str]) -> UsageError:
    """What to say of words that no argument takes."""
    name = unknown[0].partition("=")[0]
    if why := getattr(args, "refused", {}).get(name):
        return UsageError(f"{args.command} does not take {name!r}: {why}")
    hint = nearest(name, args.flags) if name.startswith("-") else _commas(args, words, name)
    return UsageError(
        f"{args.command} does not take {name!r}{hint or f'; see {PROGRAM} {args.command} --help'}"
    )


def _commas(args: argparse.Namespace, words: Sequence[str], name: str) -> str:
    """A hint for ``--schemes lbdf brr``, whose values have commas between them."""
    at = words.index(name)
    start = max((k for k in range(at) if words[k].startswith("-")), default=at)
    if words[start] not in getattr(args, "comma_lists", ()):
        return ""
    values = itertools.takewhile(lambda word: not word.startswith("-"), words[start + 1 :])
    return f"; several values have commas between them: {words[start]} {','.join(values)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (``--help`` and ``--version`` exit)."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # set by the script that ``completion`` prints
        import argcomplete

        argcomplete.autocomplete(parser, always_complete_options=False)
    try:
        args, unknown = parser.parse_known_args(words)
        if unknown:
            raise _unknown(args, words, unknown)
        args.line = shlex.join([PROGRAM, *words])
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except GetfuseError as error:
        return _failed(" ".join(str(error).split()), words, 2)
    except KeyboardInterrupt:
        return _failed("interrupted", words, INTERRUPTED)
    except BrokenPipeError:
        # The reader has gone (report MODEL | head): not a mistake, and nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _failed(error: str, words: Sequence[str], code: int) -> int:
    notice(error)
    if "--json" in words:
        print_json({"ok": False, "error": error})
    return code
