"""What results share that write themselves: suffixes, CSV, pandas, pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_getfuse.errors import GetfuseError, OptionError, nearest

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


def known_suffix(path: str | Path, what: str, known: Iterable[str]) -> str:
    """The suffix of ``path`` in small letters, with its dot.

    Args:
        path: where ``what`` is to be saved.
        what: what it is, with its article.
        known: the suffixes that it has a form for.

    Raises:
        OptionError: for another suffix; names the known ones.
    """
    known, suffix = list(known), Path(path).suffix.lower()
    if suffix not in known:
        raise OptionError(
            f"cannot save {what} as {str(path)!r}: the suffix must be one of "
            f"{', '.join(known)}{nearest(suffix, known) if suffix else ''}"
        )
    return suffix


def csv_text(records: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A line of names, then a line per record."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def data_frame(records: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> pandas.DataFrame:
    """A row per record.

    Raises:
        GetfuseError: where pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise GetfuseError("to_pandas() needs pandas: pip install pandas") from error
    return pandas.DataFrame(list(records), columns=list(columns))


def save_figure(figure: Figure, path: str | Path, dpi: int) -> None:
    """Write a ``.png`` or ``.svg`` file; the same figure gives the same bytes.

    Raises:
        OSError: where the file cannot be written.
    """
    from matplotlib import rc_context

    svg = Path(path).suffix.lower() == ".svg"
    # Without these an SVG holds the date, and random names.
    with rc_context({"svg.hashsalt": "torch-getfuse"}):
        figure.savefig(path, dpi=dpi, metadata={"Date": None} if svg else None)
