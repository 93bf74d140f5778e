"""Figures of matplotlib: made, shown by a notebook, saved. It is imported when one is made."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from torch_getfuse.atomic_files import replace_file
from torch_getfuse.errors import GetfuseError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 100  # of a picture in a notebook


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, which a notebook shows by itself.

    It is not one of pyplot's: nothing keeps it, no window opens.

    Raises:
        GetfuseError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GetfuseError("plots need matplotlib: pip install 'torch-getfuse[plots]'") from error

    class NotebookFigure(Figure):
        """A figure with a picture of itself: a notebook shows pyplot's figures only."""

        def _repr_png_(self) -> bytes:
            _plain_text(self)
            picture = io.BytesIO()
            self.savefig(picture, format="png", dpi=_DPI)
            return picture.getvalue()

    return NotebookFigure(figsize=(width, height), layout="constrained")


def _plain_text(figure: Figure) -> None:
    """Text as it stands: names may contain dollar signs."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)


def save_figure(figure: Figure, path: str | Path, dpi: int) -> None:
    """Write a ``.png`` or ``.svg`` file; the same figure gives the same bytes.

    Raises:
        FileError: if the file cannot be written.
    """
    from matplotlib import rc_context

    _plain_text(figure)
    # Without these an SVG contains the date and random identifiers.
    with rc_context({"svg.hashsalt": "torch-getfuse"}):
        metadata = {"Date": None} if Path(path).suffix.lower() == ".svg" else None
        replace_file(path, lambda part: figure.savefig(part, dpi=dpi, metadata=metadata))
