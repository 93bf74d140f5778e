"""What a plan costs and saves, as an object that prints and exports.

Text formats use human-readable sizes (1024-based), data formats integer bytes. The figures come
from :mod:`torch_getfuse.reporting.section`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_getfuse.accelerator import format_buffer, format_size, format_width
from torch_getfuse.atomic_files import replace_text
from torch_getfuse.errors import some_of
from torch_getfuse.partition.cost.scheme import Dram
from torch_getfuse.partition.fusion_group import Stage
from torch_getfuse.partition.search.recursive_split import SET_LIMIT
from torch_getfuse.reporting.export import (
    HTML,
    MARKDOWN,
    PLAIN,
    Style,
    compact,
    csv_text,
    data_frame,
    known_suffix,
)
from torch_getfuse.reporting.section import Section, added, group_dram

if TYPE_CHECKING:
    import pandas

SCHEMA_VERSION = 2

_CSS = (
    "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse;margin:1em 0}"
    "td,th{border:1px solid #bbb;padding:.2em .6em;vertical-align:top}"
)


class Report:
    """Plans and what they cost; ``print(report)`` shows tables.

    Args:
        sections: one per planned graph; empty if nothing has been compiled yet.
        unplanned: a sentence per graph that runs unchanged because planning failed.
        alternatives: whether some graphs are the same code compiled for several inputs or
            settings, of which a call runs one; then there are no totals.
        empty: the text if there are neither sections nor unplanned graphs.
    """

    def __init__(
        self,
        sections: Sequence[Section],
        unplanned: Sequence[str] = (),
        *,
        alternatives: bool = False,
        empty: str = "Nothing to report: no graph has been compiled yet.",
    ) -> None:
        self.sections = tuple(sections)
        self.unplanned = tuple(unplanned)
        self.alternatives = alternatives
        self.empty = empty

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

    def to_html(self) -> str:
        """A self-contained page, without scripts or external resources."""
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>torch-getfuse report</title><style>{_CSS}</style></head>\n"
            f"<body>\n{self._render(HTML)}\n</body></html>\n"
        )

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
        border; ``None`` if no buffer suffices, or the group ends for another reason.
        """
        return [record for section in self.sections for record in section.records()]

    def to_csv(self) -> str:
        """A header line, then a line per row of :meth:`to_records`; spaces separate operators."""
        return csv_text(self.to_records(), _COLUMNS)

    def to_pandas(self) -> pandas.DataFrame:
        """One row per row of :meth:`to_records`; ``needs_bytes`` is a nullable ``Int64``.

        Raises:
            GetfuseError: if pandas is not installed.
        """
        return data_frame(self.to_records(), _COLUMNS).astype({"needs_bytes": "Int64"})

    def save(self, path: str | Path) -> None:
        """Write the format given by the suffix: .txt, .json, .csv, .md or .html.

        Raises:
            OptionError: for another suffix.
            OSError: if the file cannot be written.
        """
        suffix = known_suffix(path, "a report", _FORMS)
        replace_text(path, _FORMS[suffix](self))

    @staticmethod
    def check_suffix(path: str | Path) -> None:
        """Reject a path whose suffix :meth:`save` does not support, before any work is done.

        Raises:
            OptionError: for another suffix; lists the supported ones.
        """
        known_suffix(path, "a report", _FORMS)

    # -- tables ---------------------------------------------------------------------------

    def _render(self, style: Style) -> str:
        if not self.sections and not self.unplanned:
            return style.paragraph(self.empty)
        parts = [style.paragraph(sentence) for sentence in self.unplanned]
        if len(self.sections) > 1:
            parts.append(style.paragraph(self._overall()))
        for section in self.sections:
            parts += _section_parts(section, style)
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
            f"{format_size(unfused)} unfused, {_saved(unfused, planned)} saved, unfusable "
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
    "buffer_bytes",
    "needs_bytes",
    "unfused_bytes",
    "dram_read_bytes",
    "dram_write_bytes",
    "dram_weight_bytes",
    "dram_bytes",
    "ends",
)


def _section_parts(section: Section, style: Style) -> list[str]:
    parts = [style.heading(f"{section.name}: {_TITLE}" if section.name else _TITLE)]
    parts.append(_dram_table(section, style))
    parts.append(style.table(_facts(section), (), "ll", {1: 88}))
    if section.plan.groups:
        parts.append(style.heading("Fusion groups (group k is the child module fusion_group_k)"))
        parts.append(_group_table(section, style))
    if section.unfusable:
        parts.append(style.heading("Unfusable operators: alone they do not fit the buffer"))
        rows = [
            [name, section.op(name).kind, _buffer(section.needs[name]), *map(format_size, dram)]
            for name, dram in section.unfusable.items()
        ]
        headers = ("operator", "kind", "needs", "read", "write", "weights")
        parts.append(style.table(rows, headers, "llrrrr", {0: 60}))
    if section.unsupported:
        parts.append(style.heading("Unsupported operators: priced as reading everything at once"))
        counts = [[target, str(count)] for target, count in sorted(section.unsupported.items())]
        parts.append(style.table(counts, ("operator", "count"), "lr", {0: 90}))
    if section.held_whole:
        parts.append(style.paragraph(f"Note: {_held_whole(section)}"))
    parts += [style.paragraph(f"Note: {note}") for note in section.notes]
    return parts


_TITLE = "DRAM access per sample"
_NAMED = 4  # operators of each kind that a note names; the data formats name all


def _dram_table(section: Section, style: Style) -> str:
    unfused, planned, outside = section.unfused, section.planned, section.outside
    fusable = len(section.plan.graph) - len(section.unfusable)
    rows = [
        _row("fusable: features", _features(unfused), _features(planned)),
        _row("fusable: weights", unfused.weight, planned.weight),
        _row(f"{_count(fusable, 'fusable operator')} (the paper's figure)", *_both(section)),
    ]
    if section.unfusable:
        rows += [
            _row("unfusable: features", _features(outside), _features(outside)),
            _row("unfusable: weights", outside.weight, outside.weight),
            _row(
                f"{_count(len(section.unfusable), 'unfusable operator')}, at least",
                outside.total,
                outside.total,
            ),
        ]
    network = (section.network_unfused.total, section.network_planned.total)
    rows.append(_row("whole network", *network))
    return style.table(rows, ("", "unfused", "planned", "saved"), "lrrr")


def _both(section: Section) -> tuple[int, int]:
    return section.unfused.total, section.planned.total


def _row(name: str, unfused: int, planned: int) -> list[str]:
    return [name, format_size(unfused), format_size(planned), _saved(unfused, planned)]


def _held_whole(section: Section) -> str:
    """The operators whose cost assumes whole maps, their DRAM access, and what it means."""
    held = section.held_whole
    kinds: dict[str, list[str]] = {}
    for name in held:
        kinds.setdefault(section.op(name).kind, []).append(name)
    named = []
    for kind, names in kinds.items():
        named.append(f"{kind} {some_of(names, _NAMED)}")
    apart = [name for name in held if name in section.unfusable]
    cost = "all of them still fit alone"
    if apart:
        moved = added(section.unfusable[name] for name in apart).total
        cost = f"{len(apart)} of {len(held)} do not fit and move {format_size(moved)} on their own"
    reasons = list(dict.fromkeys(held.values()))
    why = "; ".join(reasons[:_NAMED]) + ("; ..." if len(reasons) > _NAMED else "")
    return (
        f"priced as holding whole maps: {', '.join(named)} ({why}); {cost}. This is a limit of "
        "the cost model, not of the chip: streamed along an axis they could need less"
    )


def _facts(section: Section) -> list[list[str]]:
    plan = section.plan
    fusable = len(plan.graph) - len(plan.unfusable)
    of_what = f"of the {_count(fusable, 'fusable operator')}"
    if not fusable:
        bound = "none: no operator fits the buffer"
    elif plan.proof == "optimal":
        bound = f"optimal ({plan.standing}): no legal plan {of_what} has less DRAM access"
    elif plan.lower_bound_bytes:
        bound = (
            f"{format_size(plan.lower_bound_bytes)} {of_what} ({plan.standing}); the plan is at "
            f"most {plan.gap:.1%} above their optimum"
        )
    else:
        bound = "none is known"
    stages = [
        f"{stage.method}: "
        + ("no plan" if stage.dram_bytes is None else format_size(stage.dram_bytes))
        + f" ({stage.plans} evaluated, {stage.seconds:.1f} s{_stopped(stage)})"
        for stage in plan.stages
    ]
    unit = f"granularity {section.granularity}, " if section.granularity else ""
    rows = [
        ["lower bound", bound],
        ["maximum buffer usage", _share(plan.max_buffer_bytes, plan.buffer_bytes)],
        ["fusion groups", f"{len(plan.groups)}, of {_count(fusable, 'fusable operator')}"],
        ["unfusable operators", _unfusable(section)],
        ["search", "; then ".join(stages) or plan.method or "none"],
        [
            "assumptions",
            f"scheme {plan.scheme}, {unit}buffer {format_size(plan.buffer_bytes)}, "
            f"{plan.activation_bytes} B per activation, {format_width(plan.weight_bytes)}, "
            "one sample at a time"
            + (
                ", traced with gradients enabled (report(model, x) traces without)"
                if section.gradients
                else ""
            ),
        ],
    ]
    return rows


def _group_table(section: Section, style: Style) -> str:
    buffer = section.plan.buffer_bytes
    rows = [
        [
            str(k),
            compact(group.ops),
            format_size(group.buffer_bytes),
            f"{group.buffer_bytes / buffer:.1%}",
            *map(format_size, group_dram(group)),
            group.ends,
        ]
        for k, group in enumerate(section.plan.groups)
    ]
    headers = ("group", "operators", "buffer", "share", "read", "write", "weights", "why it ends")
    return style.table(rows, headers, "llrrrrrl", {1: 28, 7: 33})


def _stopped(stage: Stage) -> str:
    """Why a stage ended early; not for the set limit, by which "direct" always ends."""
    return "" if stage.stopped in ("", SET_LIMIT) else f", {stage.stopped}"


def _unfusable(section: Section) -> str:
    """Their number, and the buffers from which the first and the last of them would fit."""
    if not section.unfusable:
        return "none"
    needs = {name: size for name, size in section.needs.items() if size is not None}
    text = str(len(section.unfusable))
    if not needs:
        return f"{text}; the scheme has a schedule for none of them"
    first = min(needs, key=lambda name: needs[name])
    if len(needs) == len(section.unfusable) == 1:
        return f"{text}; from a buffer of {format_buffer(needs[first])} up it fits"
    last = "all of them do"
    if len(needs) < len(section.unfusable):
        last = f"all but {len(section.unfusable) - len(needs)}, which have no schedule, do"
    return (
        f"{text}; from a buffer of {format_buffer(needs[first])} up {first} fits, from "
        f"{format_buffer(max(needs.values()))} up {last}"
    )


def _buffer(size: int | None) -> str:
    return "no schedule" if size is None else format_buffer(size)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# -- figures ------------------------------------------------------------------------------


def _features(dram: Dram) -> int:
    return dram.read + dram.write


def _saved(unfused: int, planned: int) -> str:
    saved = unfused - planned
    return f"{format_size(saved)} ({saved / unfused:.1%})" if unfused and saved else "0 B"


def _share(used: int, buffer: int) -> str:
    return f"{format_size(used)} of {format_size(buffer)} ({used / buffer:.1%})"


# -- files --------------------------------------------------------------------------------

_FORMS: Mapping[str, Callable[[Report], str]] = {
    ".txt": lambda report: f"{report}\n",
    ".json": lambda report: report.to_json() + "\n",
    ".csv": Report.to_csv,
    ".md": Report.to_markdown,
    ".html": Report.to_html,
}
