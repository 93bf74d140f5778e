"""What results for people to read have in common: their text, and their card in a notebook."""

from __future__ import annotations

from torch_getfuse.reporting.export import Style, plain
from torch_getfuse.reporting.notebook_style import as_card
from torch_getfuse.terminal import text_width, uses_colour


class Printed:
    """Base of results: a report, an explanation, an appraisal, a sweep."""

    _opened = 1
    """Headings of the card that are open at first."""

    def parts(self, style: Style) -> list[str]:
        """Headings, tables and paragraphs in a text format."""
        raise NotImplementedError

    def render(self, style: Style) -> str:
        """The result in a text format."""
        return "\n\n".join(self.parts(style))

    def __str__(self) -> str:
        return self.render(plain(text_width()))

    def _repr_html_(self) -> str:
        return as_card(repr(self), self.parts, self._opened)

    def show(self) -> None:
        """Print it, with colours on a terminal (``NO_COLOR`` and ``FORCE_COLOR`` count)."""
        print(self.render(plain(text_width(), uses_colour())))
