"""What a plan costs and saves, as an object that prints and exports.

Text formats use human-readable sizes (1024-based), data formats integer bytes. The figures come
from :mod:`torch_getfuse.reporting.section`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_getfuse.accelerator import format_size
from torch_getfuse.atomic_files import replace_text
from torch_getfuse.errors import OptionError, nearest
from torch_getfuse.reporting import operators_table
from torch_getfuse.reporting.export import (
    HTML,
    MARKDOWN,
    Style,
    counted,
    csv_text,
    data_frame,
    plain,
    saved,
)
from torch_getfuse.reporting.figure import save_figure
from torch_getfuse.reporting.html.figures import explanation_figures, section_figures
from torch_getfuse.reporting.html.page import Origin, make_page
from torch_getfuse.reporting.notebook_style import as_card
from torch_getfuse.reporting.operators_table import operator_records
from torch_getfuse.reporting.pictures import timeline_figure
from torch_getfuse.reporting.printed import Printed
from torch_getfuse.reporting.search_picture import plan_panel, search_figure
from torch_getfuse.reporting.section import ON_CHIP, Section
from torch_getfuse.reporting.section_tables import Detail, section_parts
from torch_getfuse.reporting.suffixes import PICTURES, REPORT, known_suffix
from torch_getfuse.terminal import FIXED, LEAST, text_width, uses_colour

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from torch_getfuse.reporting.explanation import Explanation

SCHEMA_VERSION = 2


class Report(Printed):
    """Plans and what they cost; ``print(report)`` shows tables.

    Args:
        sections: one per planned graph; empty if nothing has been compiled yet.
        unplanned: a sentence per graph that runs unchanged because planning failed.
        alternatives: whether some graphs are the same code compiled for several inputs or
            settings, of which a call runs one; then there are no totals.
        empty: the text if there are neither sections nor unplanned graphs.
        origin: model, options and command line, for the page of :meth:`to_html`.
    """

    def __init__(
        self,
        sections: Sequence[Section],
        unplanned: Sequence[str] = (),
        *,
        alternatives: bool = False,
        empty: str = "Nothing to report: no graph has been compiled yet.",
        origin: Origin | None = None,
    ) -> None:
        self.sections = tuple(sections)
        self.unplanned = tuple(unplanned)
        self.alternatives = alternatives
        self.empty = empty
        self.origin = origin or Origin()

    # -- text forms -----------------------------------------------------------------------

    def to_text(
        self,
        *,
        full: bool = False,
        by_kind: bool = False,
        modules: int | None = None,
        width: int | None = None,
    ) -> str:
        """What ``print(report)`` prints, without colours.

        Args:
            full: each group in a row of its own; else those that are alike are counted in one.
            by_kind: also a table by kinds of operators.
            modules: also the tree of modules, down to this depth.
            width: characters of a line; ``None`` for the terminal's, within 80 and 160, and 100
                where there is none.

        Raises:
            OptionError: for a depth below 1, or a width below 80.
        """
        if width is not None and width < LEAST:
            raise OptionError(f"width={width} is too narrow: text needs {LEAST} columns")
        style = plain(text_width() if width is None else width)
        return "\n\n".join(self.parts(style, _detail(full, by_kind, modules)))

    def show(
        self, *, full: bool = False, by_kind: bool = False, modules: int | None = None
    ) -> None:
        """Print :meth:`to_text`, with colours on a terminal (not where ``NO_COLOR`` is set)."""
        style = plain(text_width(), uses_colour())
        print("\n\n".join(self.parts(style, _detail(full, by_kind, modules))))

    def __repr__(self) -> str:
        groups = sum(len(section.plan.groups) for section in self.sections)
        parts = [counted(groups, "group")]
        if len(self.sections) != 1:
            parts.insert(0, counted(len(self.sections), "graph"))
        if self.sections and not self.alternatives:
            unfused, planned = self._totals()
            parts.append(f"{format_size(planned)} of {format_size(unfused)} unfused")
        return f"Report({', '.join(parts)})"

    def _repr_html_(self) -> str:
        return as_card(repr(self), partial(self.parts, detail=Detail(full=True)), self._opened)

    def to_markdown(self) -> str:
        """Headings and pipe tables."""
        return self._everything(MARKDOWN) + "\n"

    def to_html(self, explanation: Explanation | None = None) -> str:
        """An interactive page in one file, which fetches nothing.

        It shows the operator graph with its fusion groups, what the buffer holds, DRAM access, and
        tables to sort and search. Where scripts do not run, it shows the tables of the text. The
        same report gives the same page, but for its date: ``SOURCE_DATE_EPOCH`` pins that.

        Args:
            explanation: of the same model; the page then shows its blamed edges and its cut.

        Raises:
            OptionError: for an explanation of another graph.
        """
        sections = [section_figures(section) for section in self.sections]
        known = {figures["fingerprint"] for figures in sections}
        if explanation is not None and explanation.fingerprint not in known:
            raise OptionError(
                f"the explanation is of another graph (fingerprint {explanation.fingerprint[:12]}) "
                "than the report: explain and report the same model at the same input shape"
            )
        blamed = None if explanation is None else explanation_figures(explanation)
        told = [*self.unplanned, *([self._overall()] if len(sections) > 1 else [])]
        figures = {"sections": sections, "explanation": blamed, "remarks": told}
        return make_page(self.origin, figures, self._everything(HTML))

    # -- data forms -----------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values; sizes are integer bytes per sample.

        ``totals`` are those of all graphs together, unfusable operators included; ``None`` if a
        call runs only some of the graphs.
        """
        unfused, planned = self._totals()
        together = {
            "unfused_bytes": unfused,
            "planned_bytes": planned,
            "saved_bytes": unfused - planned,
        }
        return {
            "schema_version": SCHEMA_VERSION,
            "totals": None if self.alternatives else together,
            "sections": [section.to_dict() for section in self.sections],
            "unplanned": list(self.unplanned),
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def to_records(self, by: str = "group") -> list[dict[str, Any]]:
        """The rows of :meth:`to_csv` and :meth:`to_pandas`, flat; sizes are integer bytes.

        By ``"group"``: one per fusion group, then one per unfusable operator (``fusable`` is
        ``False``), so that the sum of ``dram_bytes`` is that of the whole network as planned, and
        the sum of ``unfused_bytes`` that of it with every operator alone. ``needs_bytes`` is
        the smallest buffer for an unfusable operator, or for a group with the operators over its
        border; ``None`` if no buffer suffices, or the group ends for another reason. ``macs`` are
        multiply-accumulates; ``None`` where those of an operator are not known. Under cascade
        each step is a row, unfusable operators among them, with its ``way`` and what is on chip:
        ``weights_bytes``, ``lines_bytes``, ``residents_bytes`` and ``idle_bytes``, which are
        ``None`` elsewhere and for unfusable operators.

        By ``"operator"``: one per operator, with its kind and group, shapes and bits of what it
        reads and writes (spaces between several), where its output goes (``"chip"`` within the
        group, ``"dram"``, or ``"stays"`` on chip between steps), ``macs``, weights, its DRAM access
        alone (``unfused_bytes``) and its share of the group's: an input counts at the first
        operator of the group that reads it, so that the sums are the same. ``None`` where the cost
        model's figure of a group cannot be shared out. ``unfusable`` says why one does not fit,
        ``held_whole`` why its price assumes whole maps.

        Raises:
            OptionError: for another ``by``.
        """
        records, _, _ = self._table(by)
        return records

    def to_csv(self, by: str = "group") -> str:
        """A header line, then a line per row of :meth:`to_records`; spaces separate operators."""
        records, columns, _ = self._table(by)
        return csv_text(records, columns)

    def to_pandas(self, by: str = "group") -> pandas.DataFrame:
        """One row per row of :meth:`to_records`; columns that hold ``None`` are nullable ``Int64``.

        Raises:
            GetfuseError: if pandas is not installed.
            OptionError: as :meth:`to_records`.
        """
        records, columns, nullable = self._table(by)
        return data_frame(records, columns).astype(dict.fromkeys(nullable, "Int64"))

    def _table(self, by: str) -> tuple[list[dict[str, Any]], Sequence[str], Sequence[str]]:
        """Rows, columns, and the columns of integers that hold ``None``."""
        if by not in _ROWS:
            raise OptionError(
                f"by={by!r} is no kind of row; known: {', '.join(map(repr, _ROWS))}"
                f"{nearest(str(by), _ROWS)}"
            )
        rows, columns, nullable = _ROWS[by]
        return [row for section in self.sections for row in rows(section)], columns, nullable

    def plot(self) -> Figure:
        """What the buffer holds in each step of the plans of ``scheme="cascade"``.

        Raises:
            OptionError: if no plan is of that scheme.
            GetfuseError: if matplotlib is not installed.
        """
        timelines = [
            section.steps.timeline(section.name)
            for section in self.sections
            if section.steps is not None and section.steps.occupancy
        ]
        if not timelines:
            raise OptionError(
                "there is nothing to draw: pictures of a report show the steps of plans of "
                "scheme='cascade'; others are saved as .txt, .json, .csv, .md or .html"
            )
        return timeline_figure(timelines)

    def plot_search(self) -> Figure:
        """How the plans were found: the best DRAM access so far against the plans tried.

        One stage of the search follows the other; the bound is dotted. DRAM access is of what is
        planned: without the unfusable operators, but for plans of ``scheme="cascade"``.

        Raises:
            OptionError: where there is no plan, or one from a file or the plan cache, which keep
                no history.
            GetfuseError: if matplotlib is not installed.
        """
        if not self.sections:
            raise OptionError("there is nothing to draw: no graph has been planned")
        panels = []
        for section in self.sections:
            plan, of = section.plan, section.name or self.origin.model
            title = f"{plan.method} search, buffer {format_size(plan.buffer_bytes)}"
            panels.append(plan_panel(plan, f"{of}: {title}" if of else title))
        return search_figure(panels)

    def save(
        self,
        path: str | Path,
        by: str = "group",
        *,
        full: bool = False,
        by_kind: bool = False,
        modules: int | None = None,
    ) -> None:
        """Write the format given by the suffix: .txt, .json, .csv, .md, .html, .svg or .png.

        Args:
            by: rows of a .csv file, ``"group"`` or ``"operator"`` (:meth:`to_records`).
            full: of the text (.txt), as for :meth:`to_text`; it has 100 columns on every machine.
            by_kind: of the text, as there.
            modules: of the text, as there.

        Raises:
            OptionError: for another suffix, for a picture where there is nothing to draw, and for
                rows of operators in a format without them.
            GetfuseError: for a picture if matplotlib is not installed.
            FileError: if the file cannot be written.
        """
        suffix = known_suffix(path, "a report", REPORT)
        if suffix != ".csv" and by != "group":
            raise OptionError(f"by={by!r} is for .csv files, not for {str(path)!r}")
        if suffix == ".csv":
            replace_text(path, self.to_csv(by))
        elif suffix in PICTURES:
            save_figure(self.plot(), path, dpi=110)
        elif suffix == ".txt":
            text = self.to_text(full=full, by_kind=by_kind, modules=modules, width=FIXED)
            replace_text(path, f"{text}\n")
        else:
            replace_text(path, _FORMS[suffix](self))

    # -- tables ---------------------------------------------------------------------------

    def parts(self, style: Style, detail: Detail | None = None) -> list[str]:
        """Headings, tables and paragraphs in a text format."""
        if not self.sections and not self.unplanned:
            return [style.paragraph(self.empty)]
        parts = [style.paragraph(sentence) for sentence in self.unplanned]
        if len(self.sections) > 1:
            parts.append(style.paragraph(self._overall()))
        for section in self.sections:
            parts += section_parts(section, style, detail or Detail(), self.origin.model)
        return parts

    def _everything(self, style: Style) -> str:
        return "\n\n".join(self.parts(style, Detail(full=True)))

    def _overall(self) -> str:
        if self.alternatives:
            return (
                f"{len(self.sections)} graphs, some of one piece of code, compiled for several "
                "inputs or settings: a call runs one of those, so they are not added up"
            )
        unfused, planned = self._totals()
        return (
            f"{len(self.sections)} graphs: {format_size(planned)} of DRAM access planned, "
            f"{format_size(unfused)} unfused, {saved(unfused, planned)} saved, unfusable "
            "operators included"
        )

    def _totals(self) -> tuple[int, int]:
        """Unfused and planned DRAM access of all graphs, in bytes."""
        return (
            sum(section.network_unfused.total for section in self.sections),
            sum(section.network_planned.total for section in self.sections),
        )


def _detail(full: bool, by_kind: bool, modules: int | None) -> Detail:
    if modules is not None and modules < 1:
        raise OptionError(f"modules={modules} is no depth: give 1 for the outermost modules")
    return Detail(full, by_kind, modules)


_COLUMNS = (
    "graph",
    "group",
    "fusable",
    "operators",
    "ops",
    "way",
    "macs",
    "buffer_bytes",
    "needs_bytes",
    "unfused_bytes",
    "dram_read_bytes",
    "dram_write_bytes",
    "dram_weight_bytes",
    "dram_bytes",
    *ON_CHIP,
    "ends",
)

_ROWS: Mapping[
    str, tuple[Callable[[Section], list[dict[str, Any]]], Sequence[str], Sequence[str]]
] = {
    "group": (Section.records, _COLUMNS, ("macs", "needs_bytes", *ON_CHIP)),
    "operator": (operator_records, operators_table.COLUMNS, operators_table.NULLABLE),
}
"""Kinds of rows: what makes them, their columns, and those of integers that hold ``None``."""


# -- files --------------------------------------------------------------------------------

_FORMS: Mapping[str, Callable[[Report], str]] = {
    ".json": lambda report: report.to_json() + "\n",
    ".md": Report.to_markdown,
    ".html": lambda report: report.to_html(),
}
