"""The tables of a report, an explanation or an appraisal as a card of a Jupyter notebook."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch_getfuse.reporting import notebook
from torch_getfuse.reporting.export import Style


class _Notebook(Style):
    """HTML with its styles inline; a heading folds what follows it."""

    def table(
        self,
        rows: Sequence[Sequence[str]],
        headers: Sequence[str],
        align: str,
        wrapped: Sequence[int] = (),
        below: Sequence[int] = (),
    ) -> str:
        """A table of text; the notebook breaks its lines."""
        return notebook.table(rows, headers, align)


NOTEBOOK = _Notebook("html", notebook.summary, notebook.paragraph)


def as_card(title: str, parts: Callable[[Style], list[str]], opened: int) -> str:
    """The card of a result: its title, then its tables, folded by their headings.

    Args:
        title: text.
        parts: headings, tables and paragraphs in a style.
        opened: how many headings are open at first.
    """
    return notebook.card(title, notebook.folded(parts(NOTEBOOK), opened))
