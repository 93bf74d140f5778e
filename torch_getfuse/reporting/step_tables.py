"""The text of a cascade plan: steps, what is on chip in each, tensors that stay or leave."""

from __future__ import annotations

from torch_getfuse.accelerator import format_size
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.reporting.export import Style, compact, counted, features
from torch_getfuse.reporting.section import Section, group_dram, is_fusable
from torch_getfuse.reporting.steps import Again, Occupancy, StepFigures

_BAR = 26  # characters of a bar; its table then fits 80 columns
_WEIGHTS, _LINES, _RESIDENTS, _UNKNOWN, _IDLE = "W=#?."
_LEFT = ("tensor", "size", "written", "read", "why it does not stay")
_AGAIN = ("step", "what", "times", "extra", "why")


def step_parts(plan: PartitionPlan, steps: StepFigures, style: Style) -> list[str]:
    """Headings and tables of the steps of a plan."""
    parts = []
    if plan.groups:
        parts += [
            style.heading("Steps (step k is the child module fusion_group_k)"),
            _step_table(plan, style),
            style.heading(f"On chip, {format_size(plan.buffer_bytes)} in each step"),
            _occupancy_table(plan, steps, style),
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
        parts.append(style.table(rows, headers, "lrrr", {0: 60}))
    if steps.leaving:
        parts.append(style.heading("Tensors that go through DRAM"))
        left = [
            [e.tensor, *map(format_size, (e.bytes, e.written_bytes, e.read_bytes)), e.reason]
            for e in steps.leaving
        ]
        parts.append(style.table(left, _LEFT, "lrrrl", {0: 48, 4: 34}))
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
        parts.append(style.table(again, _AGAIN, "llrrl", {1: 48}))
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


def _step_table(plan: PartitionPlan, style: Style) -> str:
    rows = [
        [
            str(k),
            compact(group.ops),
            str(group.way),
            f"{group.buffer_bytes / plan.buffer_bytes:.1%}" if is_fusable(group) else "",
            *map(format_size, group_dram(group)),
            group.ends,
        ]
        for k, group in enumerate(plan.groups)
    ]
    headers = ("step", "operators", "way", "share", "read", "write", "weights", "what it hands on")
    return style.table(rows, headers, "lllrrrrl", {1: 28, 7: 31})


def _occupancy_table(plan: PartitionPlan, steps: StepFigures, style: Style) -> str:
    rows = [
        [
            str(held.step),
            bar(held, plan.buffer_bytes),
            *(
                ["", "", "", ""]
                if held.unknown
                else map(format_size, (held.weights, held.lines, held.residents, held.idle))
            ),
        ]
        for held in steps.occupancy
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
