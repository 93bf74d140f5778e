"""The tables of a report, an explanation or an appraisal as a card of a Jupyter notebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch_getfuse.reporting import notebook
from torch_getfuse.reporting.export import Style


class _Notebook(Style):
    """HTML with its styles inline; a heading folds what follows it."""

    def table(
        self,
        rows: Sequence[Sequence[str]],
        headers: Sequence[str],
        align: str,
        widths: Mapping[int, int] | None = None,
    ) -> str:
        """A table of text; the notebook breaks its lines."""
        return notebook.table(rows, headers, align)


NOTEBOOK = _Notebook("html", notebook.summary, notebook.paragraph)


def as_card(made: object, parts: Callable[[Style], list[str]], opened: int = 1) -> str:
    """The card of a result: its ``repr``, then its tables, folded by their headings.

    Args:
        made: the result.
        parts: headings, tables and paragraphs in a style.
        opened: how many headings are open at first.
    """
    return notebook.card(repr(made), notebook.folded(parts(NOTEBOOK), opened))
