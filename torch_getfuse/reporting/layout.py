"""Tables of plain text within a width.

Columns of figures keep their widths; columns of words and names are wrapped into what is left. A
table may name columns that move below their rows, each in lines of its own, where there is little
room beside the others. One that is still too wide has its columns closer together, then its headers
in several lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import simple_separated_format, tabulate

from torch_getfuse.terminal import longest_word, painted, wrap

_ROOM = 40  # characters with which a column stays beside the others
_NAME = 24  # characters of a name from which it may be wrapped
_FEWEST = 8  # characters of a wrapped column
_INDENT = " " * 4  # of columns below their rows

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class _Column:
    """Characters of a column: as wide as it would be, and as narrow as it may."""

    natural: int
    least: int


def plain_table(
    rows: Rows,
    headers: Sequence[str],
    align: str,
    wrapped: Sequence[int],
    below: Sequence[int],
    width: int,
    colour: bool,
) -> str:
    """A table of text.

    Args:
        rows: rows of cells.
        headers: names of the columns, or none.
        align: a letter per column, ``l`` or ``r``.
        wrapped: the columns whose cells may take several lines.
        below: those that may also move below their rows, the last one first.
        width: characters of a line. A table whose columns of figures alone are wider is wider.
        colour: whether marked cells are coloured.
    """
    cells = [*([headers] if headers else []), *rows]
    moved = _moved(cells, below, width)
    kept = [k for k in range(len(align)) if k not in moved]
    beside = [[row[k] for k in kept] for row in cells]
    loose = {kept.index(k) for k in (*wrapped, *below) if k in kept}
    sizes, gap = _sizes(beside, bool(headers), loose, width)
    blocks = [
        _lines(row, sizes, colour and not (headers and k == 0)) for k, row in enumerate(beside)
    ]
    rule = ["-" * size for size in sizes]  # gives tabulate the widths of the columns as well
    lines = iter(
        tabulate(
            [rule, *(line for block in blocks for line in block)],
            tablefmt=simple_separated_format(" " * gap),
            colalign=[{"l": "left", "r": "right"}[align[k]] for k in kept],
            disable_numparse=True,
            preserve_whitespace=True,
        ).splitlines()
    )
    ruled = next(lines)
    text = [] if headers else [ruled]
    for row, block in zip(cells, blocks, strict=True):
        text += [next(lines).rstrip() for _ in block]
        for k in moved:
            told = wrap(row[k], width - len(_INDENT)) if row[k] else []
            text += [_INDENT + painted(line, row[k], colour) for line in told]
        if row is headers:
            text.append(ruled)
    return "\n".join(text if headers else [*text, ruled])


def natural_width(rows: Rows, headers: Sequence[str]) -> int:
    """Characters of a line of a table in which nothing is wrapped."""
    return sum(_naturals([headers, *rows])) + 2 * (len(headers) - 1)


def _naturals(cells: Rows) -> list[int]:
    return [max(map(len, column)) for column in zip(*cells, strict=True)]


def _moved(cells: Rows, below: Sequence[int], width: int) -> list[int]:
    """The columns that move below their rows."""
    sizes = _naturals(cells)
    for count in range(len(below) + 1):
        stay = below[: len(below) - count]
        taken = [
            min(size, _ROOM) if k in stay else size
            for k, size in enumerate(sizes)
            if k in stay or k not in below
        ]
        if sum(taken) + 2 * (len(taken) - 1) <= width:
            break
    return [k for k in below if k not in stay]


def _sizes(cells: Rows, headed: bool, loose: set[int], width: int) -> tuple[list[int], int]:
    """Widths of the columns, and the spaces between two of them."""
    for gap, broken in ((2, False), (1, False), (1, True)):
        columns = _columns(cells, loose, headed and broken)
        room = width - gap * (len(columns) - 1)
        if sum(column.least for column in columns) <= room:
            break
    else:
        columns = [
            _Column(column.natural, min(column.least, _FEWEST) if k in loose else column.least)
            for k, column in enumerate(columns)
        ]
    sizes = [column.least for column in columns]
    while sum(sizes) < room:
        grows = [k for k, column in enumerate(columns) if sizes[k] < column.natural]
        if not grows:
            break
        sizes[min(grows, key=lambda k: sizes[k])] += 1
    used = [
        max(len(line) for row in cells for line in wrap(row[k], size))
        for k, size in enumerate(sizes)
    ]
    return used, gap


def _columns(cells: Rows, loose: set[int], broken: bool) -> list[_Column]:
    """The columns; ``broken`` if the first row, of headers, may take several lines."""
    found = []
    for k, natural in enumerate(_naturals(cells)):
        column = [row[k] for row in cells]
        least = natural
        if k in loose:
            least = min(natural, max(min(max(map(longest_word, column)), _NAME), 1))
        elif broken:
            least = max(longest_word(column[0]), *map(len, column[1:]), 0)
        found.append(_Column(natural, least))
    return found


def _lines(cells: Sequence[str], sizes: Sequence[int], colour: bool) -> list[list[str]]:
    """The lines of one row, each with a cell per column."""
    columns = [wrap(cell, max(size, 1)) for cell, size in zip(cells, sizes, strict=True)]
    return [
        [
            painted(lines[n], cell, colour) if n < len(lines) else ""
            for cell, lines in zip(cells, columns, strict=True)
        ]
        for n in range(max(map(len, columns)))
    ]
