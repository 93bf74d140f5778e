"""What Jupyter shows of a result: HTML with its styles inline, no scripts, nothing fetched.

Colours are those of the notebook (``currentColor``, transparent grounds), so that it is readable
in light and dark themes alike; long tables are folded in ``<details>``. All text is escaped here.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_CARD = "font-size:13px;line-height:1.45;max-width:72em;overflow-x:auto"
_LINE = "rgba(128,128,128,.35)"
_TABLE = (
    "color:inherit;font-size:12px;border-collapse:collapse;margin:4px 0;"
    "font-variant-numeric:tabular-nums"
)
SHORT = 12
"""Tables of so many rows need no folding."""
_SIDE = {"l": "left", "r": "right"}


def card(title: str, parts: Iterable[str], subtitle: str = "") -> str:
    """A result: its title, one line below it, and parts in HTML.

    Args:
        title: text.
        parts: of :func:`table`, :func:`paragraph` and :func:`folded`.
        subtitle: text.
    """
    head = f'<div style="font-weight:600;font-size:14px">{html.escape(title)}</div>'
    if subtitle:
        head += f'<div style="opacity:.75">{html.escape(subtitle)}</div>'
    return "\n".join([f'<div style="{_CARD}">{head}', *parts, "</div>"])


def paragraph(text: str) -> str:
    """A paragraph of text."""
    return f'<p style="margin:4px 0">{html.escape(text)}</p>'


def summary(text: str) -> str:
    """The line of a folded part that is always seen: a heading, for :func:`folded`."""
    return f'<summary style="cursor:pointer;font-weight:600">{html.escape(text)}</summary>'


def folded(parts: Iterable[str], opened: int = 0) -> list[str]:
    """Each :func:`summary` and what follows it as one part that opens by a click.

    Args:
        parts: in HTML; what stands before the first summary stays as it is.
        opened: how many are open at first.
    """
    found: list[str] = []
    inside = False
    for part in parts:
        if part.startswith("<summary"):
            if inside:
                found.append("</details>")
            attribute = " open" if opened > 0 else ""
            opened -= 1
            inside = True
            part = f'<details{attribute} style="margin:4px 0">{part}'
        found.append(part)
    return [*found, "</details>"] if inside else found


def table(rows: Sequence[Sequence[str]], headers: Sequence[str], align: str) -> str:
    """A table of text.

    Args:
        rows: of cells.
        headers: names of the columns, or none.
        align: a letter per column, ``l`` or ``r``.
    """
    styles = [
        f"text-align:{_SIDE[letter]};padding:2px 8px" + ";white-space:nowrap" * (letter == "r")
        for letter in align
    ]

    def row(cells: Sequence[str], tag: str, line: str) -> str:
        made = [
            f'<{tag} style="{style}{line}">{html.escape(cell)}</{tag}>'
            for style, cell in zip(styles, cells, strict=True)
        ]
        return f"<tr>{''.join(made)}</tr>"

    head = [row(headers, "th", f";border-bottom:1px solid {_LINE}")] if headers else []
    body = [row(cells, "td", "") for cells in rows]
    return "\n".join([f'<table style="{_TABLE}">', *head, *body, "</table>"])
