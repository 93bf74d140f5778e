"""A partition plan as a card of a Jupyter notebook: what its file says, without its cost model."""

from __future__ import annotations

from torch_getfuse.accelerator import format_activations, format_size, format_width
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.reporting import notebook
from torch_getfuse.reporting.export import compact, counted


def plan_card(plan: PartitionPlan) -> str:
    """The card, in HTML; its tables are folded."""
    steps = any(group.way for group in plan.groups)
    named = ("step", "operators", "way") if steps else ("group", "operators")
    rows = [
        [
            str(k),
            compact(group.ops),
            *([str(group.way)] if steps else []),
            f"{group.buffer_bytes / plan.buffer_bytes:.1%}",
            *map(format_size, group.dram),
            group.ends,
        ]
        for k, group in enumerate(plan.groups)
    ]
    headers = (*named, "buffer", "read", "write", "weights", "why it ends")
    parts = [
        notebook.summary(f"{counted(len(rows), named[0])} of {len(plan.graph)} operators"),
        notebook.table(rows, headers, "l" * len(named) + "rrrrl"),
    ]
    if plan.apart:
        parts += [
            notebook.summary(f"{len(plan.apart)} unfusable: alone they do not fit the buffer"),
            notebook.paragraph(", ".join(plan.apart)),
        ]
    if plan.resident:
        rows = [[stays.tensor, str(stays.first), str(stays.last)] for stays in plan.resident]
        parts += [
            notebook.summary(f"{counted(len(rows), 'tensor')} on chip between steps"),
            notebook.table(rows, ("tensor", "first step", "last step"), "lrr"),
        ]
    opened = len(plan.groups) <= notebook.SHORT
    assumed = [
        plan.scheme,
        format_activations(plan.activation_bytes, plan.align_channels),
        format_width(plan.weight_bytes),
        *([f"found by {plan.method}"] if plan.method else []),
        *([f"bound {plan.standing}"] if plan.proof else []),
    ]
    return notebook.card(repr(plan), notebook.folded(parts, opened), ", ".join(assumed))
