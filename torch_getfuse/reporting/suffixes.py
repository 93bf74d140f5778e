"""The files that results are saved in, by suffix.

A module of its own without other imports: the command line names the suffixes in its help, and
refuses another before any work is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch_getfuse.errors import OptionError, nearest

PICTURES = (".svg", ".png")
"""Drawn by matplotlib, an extra."""
REPORT = (".txt", ".json", ".csv", ".md", ".html", *PICTURES)
"""Of a report; pictures only where a plan has steps."""
EXPLANATION = (".txt", ".json", ".md", ".dot", ".html", *PICTURES)
APPRAISAL = (".txt", ".md", ".json")
SWEEP = (".txt", ".md", ".json", ".jsonl", ".csv", *PICTURES)


def known_suffix(path: str | Path, what: str, known: Iterable[str]) -> str:
    """The suffix of ``path`` in lower case, with its dot.

    Args:
        path: where ``what`` is to be saved.
        what: what it is, with its article.
        known: the supported suffixes.

    Raises:
        OptionError: for another suffix; lists the supported ones.
    """
    known, suffix = list(known), Path(path).suffix.lower()
    if suffix not in known:
        one_of = "one of " if len(known) > 1 else ""
        raise OptionError(
            f"cannot save {what} as {str(path)!r}: the suffix must be {one_of}"
            f"{', '.join(known)}{nearest(suffix, known) if suffix else ''}"
        )
    return suffix
