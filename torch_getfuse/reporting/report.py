"""What a plan costs and saves, as an object that prints and exports.

Text formats use human-readable sizes (1024-based), data formats integer bytes. The figures come
from :mod:`torch_getfuse.reporting.section`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_getfuse.accelerator import format_size
from torch_getfuse.atomic_files import replace_text
from torch_getfuse.errors import OptionError
from torch_getfuse.reporting.export import (
    HTML,
    MARKDOWN,
    PLAIN,
    Style,
    csv_text,
    data_frame,
    save_figure,
    saved,
)
from torch_getfuse.reporting.html.figures import explanation_figures, section_figures
from torch_getfuse.reporting.html.page import Origin, make_page
from torch_getfuse.reporting.pictures import timeline_figure
from torch_getfuse.reporting.section import ON_CHIP, Section
from torch_getfuse.reporting.section_tables import section_parts
from torch_getfuse.reporting.suffixes import PICTURES, REPORT, known_suffix

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from torch_getfuse.reporting.explanation import Explanation

SCHEMA_VERSION = 2


class Report:
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

    def __str__(self) -> str:
        return self._render(PLAIN)

    def __repr__(self) -> str:
        groups = sum(len(section.plan.groups) for section in self.sections)
        return f"<Report of {len(self.sections)} graph(s), {groups} fusion groups>"

    def _repr_html_(self) -> str:
        return self._render(HTML)

    def to_markdown(self) -> str:
        """Headings and pipe tables."""
        return self._render(MARKDOWN) + "\n"

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
        return make_page(self.origin, figures, self._render(HTML))

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

    def to_records(self) -> list[dict[str, Any]]:
        """The rows of :meth:`to_csv` and :meth:`to_pandas`, flat.

        One per fusion group, then one per unfusable operator (``fusable`` is ``False``), so that
        the sum of ``dram_bytes`` is that of the whole network as planned, and the sum of
        ``unfused_bytes`` that of the whole network with every operator alone. ``needs_bytes`` is
        the smallest buffer for an unfusable operator, or for a group with the operators over its
        border; ``None`` if no buffer suffices, or the group ends for another reason. ``macs`` are
        multiply-accumulates; ``None`` where those of an operator are not known. Under cascade
        each step is a row, unfusable operators among them, with its ``way`` and what is on chip:
        ``weights_bytes``, ``lines_bytes``, ``residents_bytes`` and ``idle_bytes``, which are
        ``None`` elsewhere and for unfusable operators.
        """
        return [record for section in self.sections for record in section.records()]

    def to_csv(self) -> str:
        """A header line, then a line per row of :meth:`to_records`; spaces separate operators."""
        return csv_text(self.to_records(), _COLUMNS)

    def to_pandas(self) -> pandas.DataFrame:
        """One row per row of :meth:`to_records`; columns that hold ``None`` are nullable ``Int64``.

        Raises:
            GetfuseError: if pandas is not installed.
        """
        return data_frame(self.to_records(), _COLUMNS).astype(
            dict.fromkeys(("macs", "needs_bytes", *ON_CHIP), "Int64")
        )

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

    def save(self, path: str | Path) -> None:
        """Write the format given by the suffix: .txt, .json, .csv, .md, .html, .svg or .png.

        Raises:
            OptionError: for another suffix, and for a picture where there is nothing to draw.
            GetfuseError: for a picture if matplotlib is not installed.
            OSError: if the file cannot be written.
        """
        suffix = known_suffix(path, "a report", REPORT)
        if suffix in PICTURES:
            save_figure(self.plot(), path, dpi=110)
        else:
            replace_text(path, _FORMS[suffix](self))

    # -- tables ---------------------------------------------------------------------------

    def _render(self, style: Style) -> str:
        if not self.sections and not self.unplanned:
            return style.paragraph(self.empty)
        parts = [style.paragraph(sentence) for sentence in self.unplanned]
        if len(self.sections) > 1:
            parts.append(style.paragraph(self._overall()))
        for section in self.sections:
            parts += section_parts(section, style)
        return "\n\n".join(parts)

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


# -- files --------------------------------------------------------------------------------

_FORMS: Mapping[str, Callable[[Report], str]] = {
    ".txt": lambda report: f"{report}\n",
    ".json": lambda report: report.to_json() + "\n",
    ".csv": Report.to_csv,
    ".md": Report.to_markdown,
    ".html": lambda report: report.to_html(),
}
