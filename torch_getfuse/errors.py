"""Named errors: what is wrong, where, by how much, and what to do about it.

Each is a ``ValueError`` (a user gave something that cannot be used), so callers that
already catch ``ValueError`` keep working; the command line turns them into one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_LONG_BITS, _SHOWN = 128, 60  # of integers and of text that messages repeat whole


class GetfuseError(ValueError):
    """Base of every error that this package raises on purpose."""


class GraphError(GetfuseError):
    """An operator graph that breaks one of its rules (names, order, shapes, windows)."""


class PlanError(GetfuseError):
    """A partition plan that is illegal, damaged, or belongs to another graph."""


class OptionError(GetfuseError):
    """An unknown option, or a value that an option does not take."""


class PluginError(GetfuseError):
    """An installed package offers something that cannot be loaded; names it and its entry point."""


class FileError(GetfuseError, OSError):
    """A file that cannot be written; names it and the way out.

    An ``OSError`` as well, with its ``errno``, ``strerror`` and ``filename``.
    """

    def __str__(self) -> str:
        return str(self.args[0])


class CaptureError(GetfuseError):
    """A model that could not be turned into an operator graph."""


class NoOperatorError(CaptureError):
    """A graph of views and weight computations only: there is nothing to plan."""


class UnsupportedTorchError(GetfuseError):
    """The installed version of torch lacks a private name that a feature of this package needs."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while planning, with what was known by then.

    Attributes:
        plan: the best legal plan so far, a verified ``PartitionPlan`` with a stage that says
            ``"interrupted"``; ``None`` where none was known yet.
        report: its report, from ``report()``.
        sweep: the finished points, from ``sweep()``.
    """

    def __init__(self, plan: Any = None, report: Any = None, sweep: Any = None) -> None:
        super().__init__("interrupted")
        self.plan = plan
        self.report = report
        self.sweep = sweep


@contextmanager
def interrupts() -> Iterator[None]:
    """Turn every ``KeyboardInterrupt`` inside into an :class:`Interrupted`."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt as error:
        raise Interrupted() from error


def some_of(names: Sequence[str], most: int) -> str:
    """``"a, b and 4 more"``: the first ``most`` of some names, and how many are left out."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def shown(value: object) -> str:
    """A value for messages, in few printable characters, however long it is."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > _LONG_BITS:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``known``, or an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
