"""The text of one section of a report: its tables, facts and notes."""

from __future__ import annotations

from dataclasses import dataclass

from torch_getfuse.accelerator import (
    format_activations,
    format_buffer,
    format_size,
    format_width,
)
from torch_getfuse.errors import some_of
from torch_getfuse.partition.fusion_group import Stage
from torch_getfuse.partition.search.recursive_split import SET_LIMIT
from torch_getfuse.reporting.estimates import with_prefix
from torch_getfuse.reporting.export import Style, compact, counted, features, saved
from torch_getfuse.reporting.folding import alike_groups, alike_unfusable, folded, times
from torch_getfuse.reporting.kinds import kinds_table
from torch_getfuse.reporting.module_tree import modules_parts
from torch_getfuse.reporting.section import Section, added
from torch_getfuse.reporting.step_tables import (
    floor_facts,
    resident_fact,
    step_assumptions,
    step_parts,
)
from torch_getfuse.terminal import Mark, Marked, numbers, share


@dataclass(frozen=True)
class Detail:
    """What a text shows beside figures, groups and notes.

    Attributes:
        full: a row for each group and operator, and none for several that are alike.
        by_kind: a table of the kinds of operators.
        modules: a table of the modules down to this depth; ``None``: none.
    """

    full: bool = False
    by_kind: bool = False
    modules: int | None = None


def section_parts(section: Section, style: Style, detail: Detail, model: str = "") -> list[str]:
    """Headings, tables and notes of one section, in order; ``model`` is what people call it."""
    parts = [style.heading(f"{section.name}: {_TITLE}" if section.name else _TITLE)]
    if section.obstacle:
        parts.append(style.paragraph(Marked(f"Note: {section.obstacle}", Mark.OVER)))
    parts.append(_dram_table(section, style))
    facts = [["network", _network(section, model)], *section_facts(section)]
    parts.append(style.table(facts, (), "ll", (1,)))
    if detail.by_kind:
        parts += [style.heading("Operators by kind"), kinds_table(section.kinds, style)]
    if detail.modules is not None:
        parts.append(style.heading(f"Modules down to depth {detail.modules}"))
        parts += modules_parts(section, detail.modules, style)
    if section.steps is not None:
        parts += step_parts(section.plan, section.steps, style, detail.full)
    elif section.plan.groups:
        parts.append(style.heading("Fusion groups (group k is the child module fusion_group_k)"))
        parts += _group_table(section, style, detail.full)
    if section.unfusable:
        parts.append(style.heading("Unfusable operators: alone they do not fit the buffer"))
        # The line below both tables stands below the first.
        parts += [p for p in _unfusable_table(section, style, detail.full) if p not in parts]
    if section.unsupported:
        parts.append(style.heading("Unsupported operators: priced as reading everything at once"))
        counts = [[target, str(count)] for target, count in sorted(section.unsupported.items())]
        parts.append(style.table(counts, ("operator", "count"), "lr", (0,)))
    if section.held_whole:
        parts.append(style.paragraph(f"Note: {_held_whole(section)}"))
    parts += [style.paragraph(f"Note: {note}") for note in section.notes]
    if section.reach is not None:
        told = section.reach.told(section.network_planned.total, bool(section.unfusable))
        parts.append(style.paragraph(told))
    return parts


_TITLE = "DRAM access per sample"
_NAMED = 4  # operators of each kind that a note names; the data formats name all


def _dram_table(section: Section, style: Style) -> str:
    unfused, planned, outside = section.unfused, section.planned, section.outside
    fusable = len(section.plan.graph) - len(section.unfusable)
    rows = [
        _row("fusable: features", features(unfused), features(planned)),
        _row("fusable: weights", unfused.weight, planned.weight),
    ]
    if section.steps is None:
        rows.append(
            _row(f"{counted(fusable, 'fusable operator')} (the paper's figure)", *_both(section))
        )
    if section.unfusable:
        rows += [
            _row("unfusable: features", features(outside), features(outside)),
            _row("unfusable: weights", outside.weight, outside.weight),
            _row(
                f"{counted(len(section.unfusable), 'unfusable operator')}, at least",
                outside.total,
                outside.total,
            ),
        ]
    network = (section.network_unfused.total, section.network_planned.total)
    least = ", at least" if section.steps is not None and section.unfusable else ""
    rows.append(_row(f"whole network{least}", *network))
    return style.table(rows, ("", "unfused", "planned", "saved"), "lrrr", (0,))


def _both(section: Section) -> tuple[int, int]:
    return section.unfused.total, section.planned.total


def _row(name: str, unfused: int, planned: int) -> list[str]:
    return [name, format_size(unfused), format_size(planned), saved(unfused, planned)]


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


def _bound(section: Section) -> str:
    """What is known of the optimum."""
    plan = section.plan
    fusable = len(plan.graph) - len(plan.unfusable)
    of_what, whose = f"of the {counted(fusable, 'fusable operator')}", "their"
    bound, further = section.fusable_lower_bound, ""
    if section.steps is not None:
        of_what, whose, bound = "of the whole network", "the", section.lower_bound
        if plan.unfusable:
            further = "; in all of them unfusable operators count at the least that they move"
    elif not fusable:
        return "none: no operator fits the buffer"
    if plan.proof == "optimal":
        return f"optimal ({plan.standing}): no legal plan {of_what} has less DRAM access{further}"
    if not bound:
        return "none is known"
    return (
        f"{format_size(bound)} {of_what} ({plan.standing}); the plan is at most {plan.gap:.1%} "
        f"above {whose} optimum{further}"
    )


def section_facts(section: Section) -> list[list[str]]:
    """Bound, buffer, counts, search and assumptions: rows of a name and a text."""
    plan, steps = section.plan, section.steps
    fusable = len(plan.graph) - len(plan.unfusable)
    stages = [
        f"{stage.method}: "
        + ("no plan" if stage.dram_bytes is None else format_size(stage.dram_bytes))
        + f" ({stage.plans} evaluated, {stage.seconds:.1f} s{_stopped(stage)})"
        for stage in plan.stages
    ]
    target = "" if section.accelerator is None else f"accelerator {section.accelerator.name}, "
    unit = f"granularity {section.granularity}, " if section.granularity else ""
    rows = [
        ["lower bound", _bound(section)],
        *([] if steps is None else floor_facts(section)),
        ["maximum buffer usage", _usage(plan.max_buffer_bytes, plan.buffer_bytes)],
        ["fusion groups", f"{len(plan.groups)}, of {counted(fusable, 'fusable operator')}"]
        if steps is None
        else ["steps", f"{len(plan.groups)}, of {counted(len(plan.graph), 'operator')}"],
        *([] if steps is None else [["tensors that stay", resident_fact(plan, steps)]]),
        ["unfusable operators", _marked(_unfusable(section), bool(section.unfusable))],
        *_compute(section),
        *([] if section.estimates is None else section.estimates.facts()),
        *(
            [["pinned", "; ".join(f"{name}={what}" for name, what in plan.pins.items())]]
            if plan.pins
            else []
        ),
        ["search", _of_what(section) + ("; then ".join(stages) or plan.method or "none")],
        [
            "assumptions",
            f"{target}scheme {plan.scheme}, {unit}buffer {format_size(plan.buffer_bytes)}, "
            f"{format_activations(plan.activation_bytes, plan.align_channels)}, "
            f"{format_width(plan.weight_bytes)}, "
            + ("" if steps is None else step_assumptions(plan))
            + "one sample at a time; unfused: every operator by itself, as this scheme prices it"
            + (
                ", traced with gradients enabled (report(model, x) traces without)"
                if section.gradients
                else ""
            ),
        ],
    ]
    return rows


def _of_what(section: Section) -> str:
    """What a search counts, where that is not the whole network."""
    return "of the fusable operators, " if section.unfusable and section.steps is None else ""


def _network(section: Section, model: str) -> str:
    """The model's name and the shapes of its inputs, per sample."""
    graph = section.plan.graph
    shapes = ["x".join(map(str, graph.tensors[name].shape)) for name in graph.inputs]
    inputs = f"one sample of {some_of(shapes, _NAMED)}" if shapes else ""
    told = (model, inputs, counted(len(graph), "operator"))
    return ", ".join(part for part in told if part)


def _compute(section: Section) -> list[list[str]]:
    """Multiply-accumulates and arithmetic intensity; no row where nothing is known of them."""
    macs, unknown = section.known_macs, section.uncounted
    if macs is None:
        return []
    told = with_prefix(macs, "MACs", 4)
    if unknown:
        told = f"at least {told}, of {some_of(unknown, _NAMED)} they are not known"
    planned = section.intensity(section.network_planned)
    unfused = section.intensity(section.network_unfused)
    if planned and unfused:
        told += f"; {planned:.1f} per byte of DRAM access as planned, {unfused:.1f} unfused"
    return [["compute", told]]


def _group_table(section: Section, style: Style, full: bool) -> list[str]:
    """The groups, and what the table says of those that are alike."""
    plan = section.plan
    alike = alike_groups(plan, full)
    rows = []
    for same in alike:
        group = plan.groups[same[0]]
        rows.append(
            [
                numbers(same),
                times(len(same), compact(group.ops)),
                format_size(group.buffer_bytes),
                share(group.buffer_bytes, plan.buffer_bytes),
                *map(format_size, group.dram),
                group.ends,
            ]
        )
    headers = ("group", "operators", "buffer", "share", "read", "write", "weights", "why it ends")
    table = style.table(rows, headers, "llrrrrrl", (0,), below=(1, 7))
    return [table, *folded(alike, style)]


def _unfusable_table(section: Section, style: Style, full: bool) -> list[str]:
    alike = [[name] for name in section.unfusable] if full else alike_unfusable(section)
    rows = [
        [
            times(len(same), same[0]),
            section.op(same[0]).kind,
            _buffer(section.needs[same[0]]),
            *map(format_size, section.unfusable[same[0]]),
        ]
        for same in alike
    ]
    headers = ("operator", "kind", "needs", "read", "write", "weights")
    return [style.table(rows, headers, "llrrrr", (0, 1)), *folded(alike, style)]


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


def _marked(text: str, over: bool) -> str:
    return Marked(text, Mark.OVER) if over else text


def _buffer(size: int | None) -> str:
    return "no schedule" if size is None else format_buffer(size)


def _usage(used: int, buffer: int) -> str:
    text = f"{format_size(used)} of {format_size(buffer)} ({used / buffer:.1%})"
    return share(used, buffer, text)
