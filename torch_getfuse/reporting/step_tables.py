"""The text of a cascade plan: steps, what is on chip in each, tensors that stay or leave."""

from __future__ import annotations

from torch_getfuse.accelerator import format_size
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.reporting.export import Style, compact, counted, features
from torch_getfuse.reporting.folding import alike_groups, folded, runs, times
from torch_getfuse.reporting.section import Section, is_fusable
from torch_getfuse.reporting.steps import Again, Occupancy, StepFigures
from torch_getfuse.terminal import Mark, Marked, numbers, share

_BAR = 26  # characters of a bar; its table then fits 80 columns
_WEIGHTS, _LINES, _RESIDENTS, _UNKNOWN, _IDLE = "W=#?."
_LEFT = ("tensor", "size", "written", "read", "why it does not stay")
_AGAIN = ("step", "what", "times", "extra", "why")


def step_parts(plan: PartitionPlan, steps: StepFigures, style: Style, full: bool) -> list[str]:
    """Headings and tables of the steps of a plan; ``full`` if each has a row of its own."""
    parts = []
    if plan.groups:
        parts += [
            style.heading("Steps (step k is the child module fusion_group_k)"),
            *_step_table(plan, style, full),
            style.heading(f"On chip, {format_size(plan.buffer_bytes)} in each step"),
            _occupancy_table(plan, steps, style, full),
            style.paragraph(
                f"{_WEIGHTS} weights, {_LINES} lines of tensors, {_RESIDENTS} tensors that stay, "
                f"{_IDLE} idle"
                + (f", {_UNKNOWN} unfusable: run by other means" if plan.unfusable else "")
            ),
        ]
    if steps.staying:
        parts.append(style.heading("Tensors that stay on chip"))
        rows = [
            [entry.tensor, format_size(entry.bytes), str(entry.first), str(entry.last)]
            for entry in steps.staying
        ]
        headers = ("tensor", "size", "first step", "last step")
        parts.append(style.table(rows, headers, "lrrr", (0,)))
    if steps.leaving:
        parts.append(style.heading("Tensors that go through DRAM"))
        left = [
            [e.tensor, *map(format_size, (e.bytes, e.written_bytes, e.read_bytes)), e.reason]
            for e in steps.leaving
        ]
        parts.append(style.table(left, _LEFT, "lrrrl", (0, 4)))
    if steps.again:
        parts.append(style.heading("Read more than once"))
        again = [
            [
                str(entry.step),
                _what(entry),
                str(entry.times),
                format_size(entry.extra_bytes),
                f"step {entry.step} lacks {format_size(entry.lacking_bytes)} to hold the weights",
            ]
            for entry in steps.again
        ]
        parts.append(style.table(again, _AGAIN, "llrrl", (1, 4)))
    return parts


def floor_facts(section: Section) -> list[list[str]]:
    """The row of the floor."""
    floor, planned = section.floor, section.network_planned.total
    above = f"{planned / floor.total - 1:.1%} above it" if planned != floor.total else "at it"
    return [
        [
            "floor",
            f"{format_size(floor.total)}: inputs and outputs ({format_size(features(floor))}) and "
            f"weights ({format_size(floor.weight)}), each once; the plan is {above}",
        ]
    ]


def resident_fact(plan: PartitionPlan, steps: StepFigures) -> str:
    """How many tensors stay, and the most that they take."""
    if not plan.residency:
        return "none, by residency=False"
    if not steps.staying:
        return "none"
    return f"{len(steps.staying)}, at most {format_size(steps.most_staying)} at a time"


def step_assumptions(plan: PartitionPlan) -> str:
    """The options that only cascade has."""
    channels = counted(plan.slice_channels, "channel")
    return f"weights that stream staged by {channels}, "


def _step_table(plan: PartitionPlan, style: Style, full: bool) -> list[str]:
    alike = alike_groups(plan, full)
    rows = []
    for same in alike:
        group = plan.groups[same[0]]
        rows.append(
            [
                numbers(same),
                times(len(same), compact(group.ops)),
                str(group.way) if is_fusable(group) else Marked(str(group.way), Mark.OVER),
                share(group.buffer_bytes, plan.buffer_bytes) if is_fusable(group) else "",
                *map(format_size, group.dram),
                group.ends,
            ]
        )
    headers = ("step", "operators", "way", "share", "read", "write", "weights", "what it hands on")
    return [
        style.table(rows, headers, "lllrrrrl", (0,), below=(1, 7)),
        *folded(alike, style),
    ]


def _occupancy_table(plan: PartitionPlan, steps: StepFigures, style: Style, full: bool) -> str:
    """A bar per step; neighbours that hold the same have one, for the order of steps matters."""

    def key(held: Occupancy) -> tuple[int, ...]:
        return held.weights, held.lines, held.residents, held.unknown

    same = [[held] for held in steps.occupancy] if full else runs(steps.occupancy, key)
    rows = [
        [
            numbers(held.step for held in run),
            bar(run[0], plan.buffer_bytes),
            *(
                ["", "", "", ""]
                if run[0].unknown
                else map(format_size, (*key(run[0])[:3], run[0].idle))
            ),
        ]
        for run in same
    ]
    headers = ("step", "", "weights", "lines", "that stay", "idle")
    return style.table(rows, headers, "llrrrr")


def bar(held: Occupancy, buffer_bytes: int) -> str:
    """The buffer as a bar, each part to the nearest character."""
    parts = (
        (_WEIGHTS, held.weights),
        (_LINES, held.lines),
        (_RESIDENTS, held.residents),
        (_UNKNOWN, held.unknown),
        (_IDLE, held.idle),
    )
    text, total = "", 0
    for letter, size in parts:
        total += size
        upto = (2 * total * _BAR + buffer_bytes) // (2 * buffer_bytes)
        text += letter * (upto - len(text))
    return text


def _what(entry: Again) -> str:
    if entry.what == "weights":
        return f"weights of {entry.operator}"
    return f"{entry.what}, by {entry.operator}"
