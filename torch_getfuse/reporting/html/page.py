"""One self-contained HTML file from figures, styles and scripts."""

from __future__ import annotations

import html
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from torch_getfuse.errors import OptionError
from torch_getfuse.version import __version__

SCRIPTS = (
    "libraries.min.js",
    "base.js",
    "layout.js",
    "graph.js",
    "charts.js",
    "details.js",
    "tables.js",
    "answer.js",
    "main.js",
)
"""Files of ``static/`` in the order in which they run."""

PINNED_DATE = "SOURCE_DATE_EPOCH"
"""Environment variable that pins the date: https://reproducible-builds.org/specs/source-date-epoch"""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a report comes from, as its page says.

    Attributes:
        model: what people call the model: the name on the command line, or its class.
        options: the options that were given, as text.
        command: the command line; empty in Python.
    """

    model: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    command: str = ""


def make_page(origin: Origin, figures: Mapping[str, Any], tables: str) -> str:
    """The text of the page.

    The same arguments give the same text but for the date, which is that of
    ``SOURCE_DATE_EPOCH`` where that is set.

    Args:
        origin: where the report comes from.
        figures: plain values under ``sections`` and ``explanation`` (:mod:`.figures`), and
            ``remarks``, sentences on the whole report.
        tables: the report as HTML tables, shown where scripts do not run.

    Raises:
        OptionError: where ``SOURCE_DATE_EPOCH`` is no number of seconds.
    """
    about = {
        "model": origin.model,
        "options": dict(origin.options),
        "command": origin.command,
        "version": __version__,
        "date": _date(),
    }
    kind = "report" if figures["explanation"] is None else "explanation"
    title = f"{origin.model}: fusion {kind}" if origin.model else f"torch-getfuse {kind}"
    parts = {
        "title": html.escape(title),
        "style": _static("page.css"),
        "tables": tables,
        "figures": to_script_json({"about": about, **figures}),
        "script": "\n".join(map(_static, SCRIPTS)),
    }
    return re.sub(r"<!--@(\w+)-->", lambda match: parts[match[1]], _static("page.html"))


def to_script_json(value: object) -> str:
    """JSON that may stand in a ``<script>``: no name in it can end the element or open a comment.

    All but ASCII is escaped, and ``<``, ``>`` and ``&`` as well.
    """
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _date() -> str:
    pinned = os.environ.get(PINNED_DATE)
    try:
        at = time.gmtime(None if pinned is None else int(pinned))
    except (ValueError, OverflowError, OSError) as error:
        raise OptionError(
            f"{PINNED_DATE}={pinned!r} is no number of seconds since 1970; unset it, or set it to "
            "one like 1767225600"
        ) from error
    return time.strftime("%Y-%m-%d %H:%M UTC", at)


@cache
def _static(name: str) -> str:
    return (files(__package__) / "static" / name).read_text(encoding="utf-8")
