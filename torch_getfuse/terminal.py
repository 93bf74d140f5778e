"""Width and colours of printed text, and how it is wrapped.

Text has the width of the terminal, within :data:`LEAST` and :data:`MOST` columns, or of ``COLUMNS``
where that is set. Where standard output is no terminal (a pipe, a file, a notebook) it has
:data:`FIXED` columns, so that the same result prints the same everywhere.

Escape codes are written to a terminal alone and made in :func:`painted` alone. ``NO_COLOR`` forbids
and ``FORCE_COLOR`` demands them, in this order (no-color.org, force-color.org); a terminal with
``TERM=dumb`` has none.
"""

from __future__ import annotations

import enum
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

LEAST, FIXED, MOST = 80, 100, 160
"""Columns of text: the fewest, those where there is no terminal, and the most."""

NEARLY_FULL = 0.9
"""Share of the buffer from which it counts as nearly full."""


class Mark(str, enum.Enum):
    """What a colour says."""

    SAVED = "32"
    """Green: DRAM access that is saved."""
    NEAR = "33"
    """Yellow: nearly the whole buffer."""
    OVER = "31"
    """Red: does not fit the buffer, or is not legal."""
    TITLE = "1"
    """Bold: a heading."""


class Marked(str):
    """Text with a :class:`Mark`, which shows on a terminal only."""

    __slots__ = ("mark",)

    mark: Mark

    def __new__(cls, text: str, mark: Mark) -> Marked:
        made = super().__new__(cls, text)
        made.mark = mark
        return made


def share(used: int, limit: int, text: str | None = None) -> str:
    """A share of the buffer, marked where it is nearly full or too much.

    Args:
        used, limit: bytes.
        text: what to print; ``None`` for the share in per cent.
    """
    told = f"{used / limit:.1%}" if text is None else text
    if used >= limit:
        return Marked(told, Mark.OVER)
    return Marked(told, Mark.NEAR) if used >= NEARLY_FULL * limit else told


def painted(text: str, of: str, colour: bool) -> str:
    """``text`` in the colour of ``of``, if that has a mark and there are colours."""
    if not (colour and isinstance(of, Marked) and text):
        return text
    return f"\x1b[{of.mark.value}m{text}\x1b[0m"


def text_width(stream: TextIO | None = None) -> int:
    """Columns of text that is printed to a stream; standard output if none is given."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        width = int(columns)
    elif _is_terminal(stream):
        width = shutil.get_terminal_size((FIXED, 24)).columns
    else:
        width = FIXED
    return min(max(width, LEAST), MOST)


def uses_colour(stream: TextIO | None = None) -> bool:
    """Whether text that is printed to a stream has colours."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and _is_terminal(stream)


def _is_terminal(stream: TextIO | None) -> bool:
    stream = sys.stdout if stream is None else stream
    return stream is not None and stream.isatty()


# -- lines --------------------------------------------------------------------------------

_UNITS = r"(?:[kKMGT]?B|[kMGT]?MACs|[munp]?[sJ]|[kMGT]|GB/s|ops?|%)(?![\w.])"
_TOGETHER = re.compile(
    rf"(?<=\d) (?={_UNITS})"  # a number and its unit
    r"|(?:(?<=\bstep)|(?<=\bgroup)|(?<=\bpart)) (?=\d)"
    r"|(?<=\d) (?=x )|(?<=\S) (?=(?:\.\.|->)(?: |$))"  # 3 x; an arrow ends its line
)
HELD_SPACE = "\x1f"
"""A space at which no line ends."""
_LEAST_PIECE = 8  # characters of a name that is shortened


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` characters.

    Lines end between words; a number stays with its unit. A word that is longer than a line, that
    is a name, goes on in the next one after one of its dots; if there is none in reach, after
    another mark (``/``, ``:``, ``_``, ``-``); and what has none of them is shortened in its middle.
    """
    lines, line = [], ""
    for word in _TOGETHER.sub(HELD_SPACE, text).split(" "):
        pieces = [word] if len(word) <= width else _pieces(word, width)
        for k, piece in enumerate(pieces):
            gap = " " if line and not k else ""
            if line and len(line) + len(gap) + len(piece) > width:
                lines.append(line)
                line = piece.lstrip(HELD_SPACE)
            else:
                line += gap + piece
    return [line.replace(HELD_SPACE, " ").rstrip() for line in (*lines, line)]


def longest_word(text: str) -> int:
    """Characters of the longest part that :func:`wrap` leaves in one line, if it can."""
    return max(map(len, _TOGETHER.sub(HELD_SPACE, text).split(" ")))


def _pieces(word: str, width: int) -> list[str]:
    """Parts of a word that may stand in lines of their own."""
    bare = word.lstrip(HELD_SPACE)
    indent = word[: len(word) - len(bare)]
    if HELD_SPACE in bare:  # "features.12.conv.0.0 ..": they may stand apart here
        first, _, rest = bare.partition(HELD_SPACE)
        return [*_pieces(indent + first, width), *_pieces(HELD_SPACE + rest, width)]
    found = []
    room = max(width - len(indent), _LEAST_PIECE)
    for piece in re.split(r"(?<=\.)(?=[^.])", bare):
        smaller = [piece] if len(piece) <= room else re.split(r"(?<=[/:_-])(?=[^/:_-])", piece)
        found += [_shortened(part, room) for part in smaller]
    return [indent + found[0], *found[1:]]


def _shortened(name: str, width: int) -> str:
    if len(name) <= width:
        return name
    kept = max(width, _LEAST_PIECE) - 3
    return f"{name[: -(-kept // 2)]}...{name[len(name) - kept // 2 :]}"


def hanging(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """Lines of ``text`` of at most ``width`` characters behind two indents."""
    head, *tail = wrap(text, width - max(len(first), len(rest)))
    return [first + head, *(rest + line for line in tail)]


def numbers(values: Iterable[int]) -> str:
    """Whole numbers in ascending order: ``"0-3, 7, 9, 11 .. 15"`` for 0 to 3, 7, 9, 11, 13, 15."""
    left, told = list(values), []
    while left:
        run = _progression(left)
        first, last = left[0], left[run - 1]
        step = left[1] - first if run > 1 else 1
        if run >= 2 and step == 1:
            told.append(f"{first}-{last}")
        elif run >= _PROGRESSION:
            told.append(f"{first}, {first + step} .. {last}")
        else:
            run = 1
            told.append(str(first))
        left = left[run:]
    return ", ".join(told)


_PROGRESSION = 4  # numbers at equal distances that are not all written


def _progression(values: Sequence[int]) -> int:
    """How many of the first values are at equal distances."""
    run = min(len(values), 2)
    while run < len(values) and values[run] - values[run - 1] == values[1] - values[0]:
        run += 1
    return run
