"""Output shared by all results: tables, CSV, pandas."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tabulate import tabulate

from torch_getfuse.accelerator import format_size
from torch_getfuse.errors import GetfuseError
from torch_getfuse.partition.cost.scheme import Dram
from torch_getfuse.reporting.layout import natural_width, plain_table
from torch_getfuse.terminal import (
    FIXED,
    HELD_SPACE,
    Mark,
    Marked,
    painted,
    wrap,
)

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Style:
    """One text format: how to write a heading, a paragraph and a table.

    Attributes:
        width: characters of a line of plain text; ``None`` for markup, which wraps by itself.
        colour: whether :class:`~torch_getfuse.terminal.Marked` text is coloured.
    """

    table_format: str
    heading: Callable[[str], str]
    paragraph: Callable[[str], str]
    cell: Callable[[str], str] = str
    width: int | None = None
    colour: bool = False

    def fits(self, rows: Sequence[Sequence[str]], headers: Sequence[str]) -> bool:
        """Whether a table fits without wrapping anything."""
        return self.width is None or natural_width(rows, headers) <= self.width

    def table(
        self,
        rows: Sequence[Sequence[str]],
        headers: Sequence[str],
        align: str,
        wrapped: Sequence[int] = (),
        below: Sequence[int] = (),
    ) -> str:
        """A table of text.

        Args:
            rows: rows of cells.
            headers: names of the columns, or none.
            align: a letter per column, ``l`` or ``r``.
            wrapped: columns that may take several lines in plain text.
            below: columns that may stand below their rows instead, where text is narrow.
        """
        if self.width is not None:
            return plain_table(rows, headers, align, wrapped, below, self.width, self.colour)
        rows = [[value.replace(HELD_SPACE, "\u00a0") for value in row] for row in rows]
        if self.table_format == "pipe" and not headers:
            headers = [""] * len(align)  # a Markdown table needs a header line
        return str(
            tabulate(
                [[self.cell(value) for value in row] for row in rows],
                headers=[self.cell(value) for value in headers],
                tablefmt=self.table_format,
                colalign=[{"l": "left", "r": "right"}[letter] for letter in align],
                disable_numparse=True,
            )
        )


def plain(width: int = FIXED, colour: bool = False) -> Style:
    """Plain text of so many characters in a line."""

    def heading(text: str) -> str:
        title = Marked(text, Mark.TITLE)
        lines = wrap(text, width)
        rule = "=" * max(map(len, lines))
        return "\n".join([*(painted(line, title, colour) for line in lines), rule])

    def paragraph(text: str) -> str:
        return "\n".join(painted(line, text, colour) for line in wrap(text, width))

    return Style("simple", heading, paragraph, width=width, colour=colour)


MARKDOWN = Style(
    "pipe",
    lambda text: f"### {markdown(text)}",
    lambda text: markdown(text),
    lambda text: markdown(text),
)
HTML = Style(
    "html",
    lambda text: f"<h3>{html.escape(text)}</h3>",
    lambda text: f"<p>{html.escape(text)}</p>",
)


def markdown(text: str) -> str:
    """Escape text for Markdown: names such as ``<x>`` or ``$y$`` are not markup."""
    return _MARKUP.sub(r"\\\g<0>", text)


_MARKUP = re.compile(r"[\\&`*\[\]<>|~$#]|(?<!\w)_|_(?!\w)")


def compact(ops: Sequence[str]) -> str:
    """First and last operator and their number, as in ``conv1 .. fc (21 ops)``."""
    if len(ops) == 1:
        return ops[0]
    return f"{ops[0]} .. {ops[-1]} ({len(ops)} ops)"


_T = TypeVar("_T")


def fold(items: Iterable[_T], key: Callable[[_T], Hashable]) -> list[list[_T]]:
    """Items of one key together, in the order of their first ones."""
    found: dict[Hashable, list[_T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())


def counted(number: int, noun: str) -> str:
    """``"1 step"``, ``"2 steps"``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def features(dram: Dram) -> int:
    """Bytes of feature maps that are read and written."""
    return dram.read + dram.write


def saved(unfused: int, planned: int) -> str:
    """What a plan saves, in bytes and in per cent."""
    less = unfused - planned
    if not unfused or not less:
        return "0 B"
    text = f"{format_size(less)} ({less / unfused:.1%})"
    return Marked(text, Mark.SAVED) if less > 0 else text


def csv_text(records: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A header line, then a line per record."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in record.items()} for record in records)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Put an apostrophe in front of text that a spreadsheet would evaluate as a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in _FORMULA else value


_FORMULA = frozenset("=+-@\t\r")


def data_frame(records: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> pandas.DataFrame:
    """A row per record.

    Raises:
        GetfuseError: if pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise GetfuseError("to_pandas() needs pandas: pip install pandas") from error
    return pandas.DataFrame(list(records), columns=list(columns))
