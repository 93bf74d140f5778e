"""The result of a sweep: its points, their formats, and the file of finished points."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_getfuse.accelerator import format_size
from torch_getfuse.atomic_files import not_written, replace_text
from torch_getfuse.errors import GetfuseError
from torch_getfuse.partition.cost.scheme import NO_CHOICE
from torch_getfuse.plugins import SCHEMES, fact
from torch_getfuse.reporting.export import (
    MARKDOWN,
    Style,
    csv_text,
    data_frame,
    fold,
    plain,
)
from torch_getfuse.reporting.figure import save_figure
from torch_getfuse.reporting.knee import Knee, find_knee
from torch_getfuse.reporting.printed import Printed
from torch_getfuse.reporting.smallest import Smallest, find_smallest
from torch_getfuse.reporting.suffixes import SWEEP, known_suffix
from torch_getfuse.reporting.sweep_picture import Curve, short, sweep_figure
from torch_getfuse.terminal import Mark, Marked

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

SCHEMA_VERSION = 4

KEY = (
    "schema_version",
    "fingerprint",
    "scheme",
    "granularity",
    "buffer_bytes",
    "activation_bytes",
    "weight_bytes",
    "align_channels",
    "residency",
    "slice_channels",
    "method",
    "explainer",
    "split_rule",
    "budget",
    "seed",
    "time_limit",
)
"""Fields of a record that define the point: everything that its figures depend on.

``residency`` and ``slice_channels`` are ``None`` under schemes without steps.
"""
FIGURES = (
    "dram_bytes",
    "feature_bytes",
    "unfused_bytes",
    "unfusable_bytes",
    "lower_bound_bytes",
    "floor_bytes",
    "proof",
    "groups",
    "unfusable",
    "max_buffer_bytes",
    "stopped",
    "seconds",
)
"""Fields of a record with its results."""
_COLUMNS = ("model", *KEY, *FIGURES, "error")
_SINCE_3 = ("residency", "slice_channels", "floor_bytes")
"""Fields that points of an older ``schema_version`` have not; they are planned again."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Sweep(Printed):
    """The result of a sweep; ``print(sweep)`` shows a table.

    Attributes:
        records: one dictionary per point: ``model``, the settings (:data:`KEY`), the results
            (:data:`FIGURES`; ``None`` if the point failed) and ``error`` (``None`` if it did
            not). Sizes are integer bytes per sample and of the whole network: ``dram_bytes`` as
            planned (``feature_bytes`` of it features), ``unfused_bytes`` with every operator
            alone, ``lower_bound_bytes`` of any legal plan. All three include
            ``unfusable_bytes``, the least DRAM access of the ``unfusable`` operators; without it
            they are the paper's figures. ``floor_bytes`` are inputs, outputs and weights once.
            ``seconds`` is the planning time, ``stopped`` why a search ended early.
        kept: number of points that were finished before and taken from the file.
        within: how many per cent above the floor a plan was to be whose buffer was searched for;
            ``None`` if none was.
        tried: the points that this search has planned beside.
    """

    records: tuple[Record, ...]
    kept: int = field(default=0, compare=False)
    within: float | None = None
    tried: tuple[Record, ...] = ()

    @property
    def errors(self) -> list[Record]:
        """The points that failed."""
        return [record for record in self.records if record["error"] is not None]

    def smallest(self, percent: float | None = None) -> list[Smallest]:
        """The smallest buffers known whose plans reach the floor of their network, or come near.

        One per model, scheme and method (and unit or widths, if these differ), without those of
        which no point was planned. A sweep with ``within=`` knows them to the KB.

        Args:
            percent: how far above the floor a plan may be; ``None`` for :attr:`within`, or 0.
        """
        wanted = (self.within or 0.0) if percent is None else percent
        return [find_smallest(points, wanted) for points in self._lines()]

    def _lines(self) -> list[list[Record]]:
        """The points without error that differ in their buffers alone."""
        lines: dict[tuple[Any, ...], list[Record]] = {}
        for record in (*self.records, *self.tried):
            if record["error"] is None:
                lines.setdefault((record["model"], *line_of(record)), []).append(record)
        return list(lines.values())

    def __repr__(self) -> str:
        return f"Sweep({self._summary()})"

    def _summary(self) -> str:
        """Number of points planned, kept and failed."""
        total, failed = len(self.records), len(self.errors)
        planned = total - failed - self.kept
        return f"{total} points: {planned} planned, {self.kept} kept from before, {failed} failed"

    def parts(self, style: Style) -> list[str]:
        """Headings, tables and paragraphs in a text format."""
        rows = [_row(record) for record in self.records if record["error"] is None]
        parts = _tables(rows, style) if rows else []
        parts += [
            style.paragraph(str(found))
            for found in self.smallest()
            if self.within is not None or _has_steps(found.scheme)
        ]
        parts += [
            style.paragraph(Marked(f"{title(r)} failed: {r['error']}", Mark.OVER))
            for r in self.errors
        ]
        parts.append(
            style.paragraph(
                f"{self._summary()}; sizes are of the whole network, "
                "unfused: every operator by itself, as the scheme prices it"
            )
        )
        return parts

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "records": [{name: record[name] for name in _COLUMNS} for record in self.records],
            "within": self.within,
            "tried": [{name: record[name] for name in _COLUMNS} for record in self.tried],
            "smallest": [found.to_dict() for found in self.smallest()],
            "knees": [knee.to_dict() for knee in self.knees()],
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def to_jsonl(self) -> str:
        """One JSON object per line and point, as ``sweep(path=...)`` writes and reads them."""
        return "".join(json.dumps(record) + "\n" for record in (*self.records, *self.tried))

    def to_markdown(self) -> str:
        """A pipe table and sentences below it."""
        return "\n\n".join(self.parts(MARKDOWN)) + "\n"

    def to_csv(self) -> str:
        """A header line, then one line per point."""
        return csv_text(self.records, _COLUMNS)

    def to_pandas(self) -> pandas.DataFrame:
        """One row per point.

        Raises:
            GetfuseError: if pandas is not installed.
        """
        return data_frame(self.records, _COLUMNS)

    def knees(self) -> list[Knee]:
        """Where each curve bends: from there on, a larger buffer saves little more.

        One per model, scheme and method (and unit or widths, if these differ); curves of fewer
        than three buffers, and those that bend nowhere, have none. See :func:`.knee.find_knee`.
        """
        found = [find_knee(points) for points in self._lines()]
        return [knee for knee in found if knee is not None]

    def plot(self) -> Figure:
        """DRAM access of the whole network against the buffer, a line per model, scheme and method.

        Dashed: every operator alone. Dotted: the floor of each model, that is inputs, outputs and
        weights once. A ring marks the knee of a line (:meth:`knees`). Points that are not proved
        optimal are hollow. Both axes are logarithmic.

        Raises:
            GetfuseError: if matplotlib is not installed.
        """
        curves = []
        for points in self._lines():
            points = sorted(points, key=lambda point: int(point["buffer_bytes"]))
            named = _label({**points[0], "model": short(points[0]["model"])})
            curves.append(Curve(named, points, find_knee(points)))
        return sweep_figure(curves)

    def save(self, path: str | Path) -> None:
        """Write the format given by the suffix: .txt, .md, .json, .jsonl, .csv, .svg or .png.

        Raises:
            OptionError: for another suffix.
            GetfuseError: for a picture if matplotlib is not installed.
            FileError: if the file cannot be written.
        """
        _FORMS[known_suffix(path, "a sweep", SWEEP)](self, Path(path))


def line_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """The settings of a point but for its buffer."""
    return tuple(record[name] for name in KEY if name != "buffer_bytes")


def _has_steps(scheme: str) -> bool:
    """Whether plans of a scheme are sequences of steps; not for one that is not installed here."""
    return bool(SCHEMES.find(scheme) and fact(SCHEMES.load(scheme), "sequential", False))


def identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """The settings of a point; points of equal identity have equal figures."""
    return tuple(record[name] for name in KEY)


# -- the file of finished points ----------------------------------------------------------


class Journal:
    """A file of JSON lines, one per finished point; later lines replace earlier ones.

    Attributes:
        records: points finished before without error, by :func:`identity`.

    Raises:
        GetfuseError: if the file contains something else.
        FileError: if it cannot be written.
        OSError: if it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.records: dict[tuple[Any, ...], Record] = {}
        if self.path.exists() and not self.path.is_file():
            raise GetfuseError(f"{str(self.path)!r} is not a regular file; name another one")
        # Bytes, so that a truncated character is handled like any other damage.
        data = self.path.read_bytes() if self.path.exists() else b""
        lines = data.splitlines(keepends=True)
        whole = 0
        for number, line in enumerate(lines, 1):
            record = _parsed(line)
            if record is None and number == len(lines) and _is_cut_off(line):
                log.warning(
                    "%s: line %d is cut off, as by a kill; that point is planned again",
                    self.path,
                    number,
                )
                break
            if record is None:
                raise GetfuseError(
                    f"line {number} of {str(self.path)!r} is not a point of a sweep; the file is "
                    "left as it is: name another one"
                )
            whole += len(line)
            if record["error"] is None and record["schema_version"] == SCHEMA_VERSION:
                self.records[identity(record)] = record
        try:
            self._file = self.path.open("ab")
        except OSError as error:
            raise not_written(path, error) from error
        if whole < len(data):
            self._file.truncate(whole)
        elif data and not data.endswith(b"\n"):
            self._file.write(b"\n")

    def append(self, record: Record) -> None:
        """Append a finished point; it is on disk when this returns."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _is_cut_off(line: bytes) -> bool:
    """Whether an unterminated line can be the start of one that :meth:`Journal.append` wrote."""
    start = json.dumps({_COLUMNS[0]: ""}).removesuffix('"}').encode()
    return not line.endswith(b"\n") and (line.startswith(start) or start.startswith(line))


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    older = record.get("schema_version") in (1, 2)
    wanted = [name for name in _COLUMNS if not older or name not in _SINCE_3]
    return record if all(name in record for name in wanted) else None


# -- forms --------------------------------------------------------------------------------

_HEADERS = (
    "model",
    "scheme",
    "method",
    "buffer",
    "unfused",
    "planned",
    "saved",
    "groups",
    "largest",
    "unfusable",
    "seconds",
    "proof",
)


_ALIGN = "lll" + "r" * (len(_HEADERS) - 4) + "l"
_LABELS = 3  # columns that say whose points they are


def _tables(rows: list[list[str]], style: Style) -> list[str]:
    """One table; or where that is too wide, one for each model, scheme and method."""
    if style.fits(rows, _HEADERS):
        return [style.table(rows, _HEADERS, _ALIGN)]
    parts, lines = [], fold(rows, lambda row: tuple(row[:_LABELS]))
    for points in lines:
        short = [row[_LABELS:] for row in points]
        parts += [
            style.heading(", ".join(points[0][:_LABELS])),
            style.table(short, _HEADERS[_LABELS:], _ALIGN[_LABELS:], (6, 8)),
        ]
    return parts


def _row(record: Record) -> list[str]:
    dram, unfused, bound = (
        record[name] for name in ("dram_bytes", "unfused_bytes", "lower_bound_bytes")
    )
    if record["proof"] == "optimal":
        proof = "optimal"
    else:
        proof = f"at most {dram / bound - 1:.1%} above" if bound else "none"
    if record["stopped"]:
        proof += f" ({record['stopped']})"
    alone = f"{record['unfusable']}: {format_size(record['unfusable_bytes'])}"
    return [
        record["model"],
        _scheme(record),
        record["method"],
        format_size(record["buffer_bytes"]),
        format_size(unfused),
        format_size(dram),
        Marked(f"{(unfused - dram) / unfused:.1%}", Mark.SAVED) if dram < unfused else "0.0%",
        str(record["groups"]),
        format_size(record["max_buffer_bytes"]),
        Marked(alone, Mark.OVER) if record["unfusable"] else "none",
        f"{record['seconds']:.2f}",
        proof,
    ]


def _scheme(record: Record) -> str:
    name, unit = str(record["scheme"]), record["granularity"]
    # A scheme that was given as an object, or whose package is not here, is known by name alone.
    chosen = SCHEMES.find(name) and fact(SCHEMES.load(name), "granularities", ())
    return f"{name} {unit}" if chosen or unit != NO_CHOICE else name


def _label(record: Record) -> str:
    return f"{record['model']}, {_scheme(record)}, {record['method']}"


def title(record: Record) -> str:
    """A point as text."""
    return f"{_label(record)}, {format_size(record['buffer_bytes'])}"


def _text(form: Callable[[Sweep], str]) -> Callable[[Sweep, Path], None]:
    def write(result: Sweep, path: Path) -> None:
        replace_text(path, form(result))

    return write


def _picture(result: Sweep, path: Path) -> None:
    save_figure(result.plot(), path, dpi=150)


_FORMS: Mapping[str, Callable[[Sweep, Path], None]] = {
    ".txt": _text(lambda result: result.render(plain()) + "\n"),
    ".md": _text(Sweep.to_markdown),
    ".json": _text(lambda result: result.to_json() + "\n"),
    ".jsonl": _text(Sweep.to_jsonl),
    ".csv": _text(Sweep.to_csv),
    ".svg": _picture,
    ".png": _picture,
}
