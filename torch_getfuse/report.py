"""What a plan costs and saves, as an object that prints and exports (interface.md, "The report").

Text forms use human sizes (1024-based), data forms integer bytes. Nothing here plans or prices
anything new except the baseline: every fusable operator as a group of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_getfuse.accelerator import format_size, format_width
from torch_getfuse.findings import dram_dict
from torch_getfuse.forms import (
    HTML,
    MARKDOWN,
    PLAIN,
    Style,
    compact,
    csv_text,
    data_frame,
    known_suffix,
)
from torch_getfuse.partition.cost import Dram, boundary, weights_of
from torch_getfuse.partition.plan import FusionGroup, PartitionPlan

if TYPE_CHECKING:
    import pandas

SCHEMA_VERSION = 1

_EMPTY = (
    "Nothing to report: no graph has been compiled yet. Call the compiled model once with an "
    "input, or ask for report(model, x), which plans without running. An nn.Sequential, or another "
    "module of torch's own, is not found where it has no parameters or runs what was compiled for "
    "another one: torch runs one code for them all."
)
_CSS = (
    "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse;margin:1em 0}"
    "td,th{border:1px solid #bbb;padding:.2em .6em;vertical-align:top}"
)


@dataclass(frozen=True)
class Section:
    """One captured graph: a model has several where torch.compile breaks its graph.

    Attributes:
        plan: the plan of this graph, which carries the graph.
        name: ``"graph 0"``, ... where there are several; empty for the only one.
        unsupported: FX target -> number of operators that had no rule.
        notes: anything else a reader must know, a sentence each.
    """

    plan: PartitionPlan
    name: str = ""
    unsupported: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def unfused(self) -> Dram:
        """DRAM access with every fusable operator as a group of its own, per sample."""
        plan = self.plan
        scheme = plan.make_scheme()
        apart = set(plan.unfusable)
        alone = [
            scheme.dram(1 << i, plan.buffer_bytes)
            for i, op in enumerate(plan.graph)
            if op.name not in apart
        ]
        return _sum(alone)

    @cached_property
    def planned(self) -> Dram:
        """DRAM access of the plan's groups, per sample."""
        return _sum([_dram(group) for group in self.plan.groups])

    @cached_property
    def unfusable(self) -> dict[str, Dram]:
        """Operators that alone do not fit -> what each moves by itself, at least, per sample.

        Every input read once, the output written once, the weights read once, whatever the
        method that runs it.
        """
        plan, graph = self.plan, self.plan.graph
        weights = weights_of(graph, plan.weight_bytes)
        found = {}
        for name in plan.unfusable:
            i = graph.index[name]
            reads, writes = boundary(graph, 1 << i)
            found[name] = Dram(
                sum(graph.tensors[t].elements for t in reads) * plan.activation_bytes,
                sum(graph.tensors[t].elements for t in writes) * plan.activation_bytes,
                weights[i],
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Integers in bytes per sample; ``saved_bytes`` = unfused - planned."""
        plan = self.plan
        return {
            "name": self.name,
            "fingerprint": plan.graph.fingerprint,
            "assumptions": {
                "scheme": plan.scheme,
                "granularity": _granularity(plan),
                "buffer_bytes": plan.buffer_bytes,
                "activation_bytes": plan.activation_bytes,
                "weight_bytes": plan.weight_bytes,
                "samples": 1,
            },
            "totals": {
                "operators": len(plan.graph),
                "groups": len(plan.groups),
                "unfused": dram_dict(self.unfused),
                "planned": dram_dict(self.planned),
                "saved_bytes": self.unfused.total - self.planned.total,
                "lower_bound_bytes": plan.lower_bound_bytes,
                "proof": plan.proof,
                "max_buffer_bytes": plan.max_buffer_bytes,
                "unfusable_operators": len(plan.unfusable),
                "unfusable": dram_dict(_sum(list(self.unfusable.values()))),
            },
            "method": plan.method,
            "stages": plan.to_dict()["stages"],
            "groups": [
                {
                    "name": f"fusion_group_{k}",
                    "ops": list(group.ops),
                    "modules": [
                        plan.graph.ops[plan.graph.index[name]].module for name in group.ops
                    ],
                    "buffer_bytes": group.buffer_bytes,
                    **dram_dict(_dram(group)),
                    "ends": group.ends,
                }
                for k, group in enumerate(plan.groups)
            ],
            "unfusable": [
                {"name": name, "kind": self.kind(name), **dram_dict(dram)}
                for name, dram in self.unfusable.items()
            ],
            "unsupported": dict(self.unsupported),
            "notes": list(self.notes),
        }

    def kind(self, name: str) -> str:
        """What people call the operator ``name``."""
        return self.plan.graph.ops[self.plan.graph.index[name]].kind


class Report:
    """Plans and what they cost; ``print(report)`` shows tables.

    Args:
        sections: one per planned graph; empty where nothing has been compiled yet.
        unplanned: a sentence per graph that runs as it is, because planning failed.
        alternatives: whether some graphs are one piece of code compiled for several inputs or
            settings, of which a call runs one; they have no sum.
    """

    def __init__(
        self,
        sections: Sequence[Section],
        unplanned: Sequence[str] = (),
        *,
        alternatives: bool = False,
    ) -> None:
        self.sections = tuple(sections)
        self.unplanned = tuple(unplanned)
        self.alternatives = alternatives

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
        """A page of its own, without scripts or anything fetched."""
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>torch-getfuse report</title><style>{_CSS}</style></head>\n"
            f"<body>\n{self._render(HTML)}\n</body></html>\n"
        )

    # -- data forms -----------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values; sizes are integer bytes per sample."""
        return {
            "schema_version": SCHEMA_VERSION,
            "sections": [section.to_dict() for section in self.sections],
            "unplanned": list(self.unplanned),
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def to_records(self) -> list[dict[str, Any]]:
        """One flat record per fusion group: the rows of :meth:`to_csv` and :meth:`to_pandas`."""
        return [
            {
                "graph": section.name,
                "group": f"fusion_group_{k}",
                "operators": len(group.ops),
                "ops": " ".join(group.ops),
                "buffer_bytes": group.buffer_bytes,
                **dram_dict(_dram(group)),
                "ends": group.ends,
            }
            for section in self.sections
            for k, group in enumerate(section.plan.groups)
        ]

    def to_csv(self) -> str:
        """One line per fusion group below a line of names; operators are joined by spaces."""
        return csv_text(self.to_records(), _COLUMNS)

    def to_pandas(self) -> pandas.DataFrame:
        """One row per fusion group.

        Raises:
            GetfuseError: where pandas is not installed.
        """
        return data_frame(self.to_records(), _COLUMNS)

    def save(self, path: str | Path) -> None:
        """Write the form that the suffix names: .txt, .json, .csv, .md or .html.

        Raises:
            OptionError: for another suffix.
            OSError: where the file cannot be written.
        """
        suffix = known_suffix(path, "a report", _FORMS)
        Path(path).write_text(_FORMS[suffix](self), encoding="utf-8")

    @staticmethod
    def check_suffix(path: str | Path) -> None:
        """Refuse, before any work is done, a path that :meth:`save` could not name a form for.

        Raises:
            OptionError: names the known suffixes.
        """
        known_suffix(path, "a report", _FORMS)

    # -- tables ---------------------------------------------------------------------------

    def _render(self, style: Style) -> str:
        if not self.sections and not self.unplanned:
            return style.paragraph(_EMPTY)
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
        unfused = sum(section.unfused.total for section in self.sections)
        planned = sum(section.planned.total for section in self.sections)
        return (
            f"{len(self.sections)} graphs: {format_size(planned)} of DRAM access planned, "
            f"{format_size(unfused)} unfused, {_saved(unfused, planned)} saved"
        )


_COLUMNS = (
    "graph",
    "group",
    "operators",
    "ops",
    "buffer_bytes",
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
    parts.append(style.heading("Fusion groups (group k is the child module fusion_group_k)"))
    parts.append(_group_table(section, style))
    if section.unfusable:
        parts.append(style.heading("Unfusable operators: alone they do not fit the buffer"))
        rows = [
            [name, section.kind(name), *map(format_size, dram)]
            for name, dram in section.unfusable.items()
        ]
        parts.append(
            style.table(rows, ("operator", "kind", "read", "write", "weights"), "llrrr", {0: 60})
        )
    if section.unsupported:
        parts.append(style.heading("Unsupported operators: priced as reading everything at once"))
        counts = [[target, str(count)] for target, count in sorted(section.unsupported.items())]
        parts.append(style.table(counts, ("operator", "count"), "lr", {0: 90}))
    parts += [style.paragraph(f"Note: {note}") for note in section.notes]
    return parts


_TITLE = "DRAM access per sample"


def _dram_table(section: Section, style: Style) -> str:
    unfused, planned = section.unfused, section.planned
    rows = [
        ["unfused: every fusable operator a group of its own", *_split(unfused)],
        ["planned", *_split(planned)],
        [
            "saved",
            _saved(_features(unfused), _features(planned)),
            _saved(unfused.weight, planned.weight),
            _saved(unfused.total, planned.total),
        ],
    ]
    return style.table(rows, ("", "features", "weights", "total"), "lrrr")


def _facts(section: Section) -> list[list[str]]:
    plan = section.plan
    if plan.proof == "optimal":
        bound = "optimal (proved): no legal plan has less DRAM access"
    elif plan.lower_bound_bytes:
        bound = (
            f"{format_size(plan.lower_bound_bytes)}; the plan is at most {plan.gap:.1%} above "
            "the optimum"
        )
    else:
        bound = "none is known"
    fusable = len(plan.graph) - len(plan.unfusable)
    unfusable = "none"
    if section.unfusable:
        traffic = _sum(list(section.unfusable.values()))
        unfusable = (
            f"{len(section.unfusable)}, moving {format_size(traffic.total)} of their own, "
            f"{format_size(traffic.weight)} of it weights; not in the totals above"
        )
    stages = [
        f"{stage.method}: "
        + ("no plan" if stage.dram_bytes is None else format_size(stage.dram_bytes))
        + f" ({stage.plans} evaluated, {stage.seconds:.1f} s)"
        for stage in plan.stages
    ]
    granularity = _granularity(plan)
    unit = f"granularity {granularity}, " if granularity else ""
    rows = [
        ["lower bound", bound],
        ["maximum buffer usage", _share(plan.max_buffer_bytes, plan.buffer_bytes)],
        ["fusion groups", f"{len(plan.groups)}, of {fusable} fusable operators"],
        ["unfusable operators", unfusable],
        ["search", "; then ".join(stages) or plan.method or "none"],
        [
            "assumptions",
            f"scheme {plan.scheme}, {unit}buffer {format_size(plan.buffer_bytes)}, "
            f"{plan.activation_bytes} B per activation, {format_width(plan.weight_bytes)}, "
            "one sample at a time",
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
            *map(format_size, _dram(group)),
            group.ends,
        ]
        for k, group in enumerate(section.plan.groups)
    ]
    headers = ("group", "operators", "buffer", "share", "read", "write", "weights", "why it ends")
    return style.table(rows, headers, "llrrrrrl", {1: 28, 7: 33})


def _granularity(plan: PartitionPlan) -> str | None:
    """Unit of the streams; ``None`` for a scheme that has none (BRR tiles whole rows)."""
    return plan.granularity if plan.scheme == "lbdf" else None


# -- figures ------------------------------------------------------------------------------


def _sum(drams: Sequence[Dram]) -> Dram:
    return Dram(
        sum(dram.read for dram in drams),
        sum(dram.write for dram in drams),
        sum(dram.weight for dram in drams),
    )


def _dram(group: FusionGroup) -> Dram:
    return Dram(group.dram_read_bytes, group.dram_write_bytes, group.dram_weight_bytes)


def _features(dram: Dram) -> int:
    return dram.read + dram.write


def _split(dram: Dram) -> list[str]:
    return [format_size(size) for size in (_features(dram), dram.weight, dram.total)]


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
