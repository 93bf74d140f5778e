"""One row per operator of a planned graph: shapes, widths, compute, and its share of DRAM access.

What a group moves is shared out among its operators so that their sum is the group's figure: an
input to the first operator of the group that reads it, an output to the operator that writes it,
weights to their own. Weights or inputs that a group reads several times count as often.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch_getfuse.accelerator import format_buffer
from torch_getfuse.ir import Op, OpGraph
from torch_getfuse.partition.fusion_group import FusionGroup
from torch_getfuse.reporting.section import Section, is_fusable
from torch_getfuse.widths import bits_of

COLUMNS = (
    "graph",
    "operator",
    "kind",
    "module",
    "group",
    "fusable",
    "inputs",
    "output",
    "input_shapes",
    "output_shape",
    "input_bits",
    "output_bits",
    "output_place",
    "macs",
    "weight_elements",
    "weight_bytes",
    "unfused_bytes",
    "dram_read_bytes",
    "dram_write_bytes",
    "dram_weight_bytes",
    "dram_bytes",
    "needs_bytes",
    "unfusable",
    "held_whole",
)
NULLABLE = (
    "macs",
    "dram_read_bytes",
    "dram_write_bytes",
    "dram_weight_bytes",
    "dram_bytes",
    "needs_bytes",
)
"""Columns of integers that hold ``None`` where a figure is not known."""


def operator_records(section: Section) -> list[dict[str, Any]]:
    """The rows of :data:`COLUMNS`, in the order of the groups; see :meth:`Report.to_records`."""
    plan, graph = section.plan, section.plan.graph
    places = tensor_places(section)
    found = []
    for number, group in enumerate(plan.groups):
        ops = [section.op(name) for name in group.ops]
        if is_fusable(group):
            shares = _shares(section, number, group, ops)
        else:
            shares = [list(group.dram)]
        name = f"fusion_group_{number}"
        found += [_row(section, op, name, places, share) for op, share in zip(ops, shares)]
    for number, unfusable in enumerate(plan.apart):
        share = list(section.unfusable[unfusable])
        found.append(
            _row(section, graph.ops[graph.index[unfusable]], f"unfusable_{number}", places, share)
        )
    return found


def tensor_places(section: Section) -> dict[str, str]:
    """Tensors -> ``"stays"`` (on chip between steps), ``"dram"`` (crosses DRAM) or ``"chip"``.

    The last is made and read within one group.
    """
    graph = section.plan.graph
    home = {name: k for k, group in enumerate(section.plan.groups) for name in group.ops}
    staying = set() if section.steps is None else {e.tensor for e in section.steps.staying}
    places = {}
    for name in graph.tensors:
        maker = graph.producer.get(name)
        made = None if maker is None else home.get(graph.ops[maker].name)
        inside = made is not None and name not in graph.outputs
        inside &= all(home.get(graph.ops[i].name) == made for i in graph.consumers[name])
        places[name] = "stays" if name in staying else "chip" if inside else "dram"
    return places


def _row(
    section: Section, op: Op, group: str, places: dict[str, str], share: Sequence[int | None]
) -> dict[str, Any]:
    graph = section.plan.graph
    reads = [read.tensor for read in op.reads]
    unfusable = op.name in section.unfusable
    needs = section.needs[op.name] if unfusable else None
    reason = ""
    if unfusable:
        reason = "no schedule" if needs is None else f"alone it needs {format_buffer(needs)}"
    known = [part for part in share if part is not None]
    return {
        "graph": section.name,
        "operator": op.name,
        "kind": op.kind,
        "module": op.module,
        "group": group,
        "fusable": not unfusable,
        "inputs": " ".join(reads),
        "output": op.writes,
        "input_shapes": " ".join(_shape(graph, name) for name in reads),
        "output_shape": _shape(graph, op.writes),
        "input_bits": " ".join(str(bits_of(graph.width(name))) for name in reads),
        "output_bits": bits_of(graph.width(op.writes)),
        "output_place": places[op.writes],
        "macs": op.macs,
        "weight_elements": op.weight_elements,
        "weight_bytes": section.scheme.weights[graph.index[op.name]],
        "unfused_bytes": section.alone(op.name).total,
        "dram_read_bytes": share[0],
        "dram_write_bytes": share[1],
        "dram_weight_bytes": share[2],
        "dram_bytes": sum(known) if len(known) == len(share) else None,
        "needs_bytes": needs,
        "unfusable": reason,
        "held_whole": section.held_whole.get(op.name, ""),
    }


def _shape(graph: OpGraph, tensor: str) -> str:
    return "x".join(map(str, graph.tensors[tensor].shape))


# -- shares -------------------------------------------------------------------------------


def _shares(
    section: Section, number: int, group: FusionGroup, ops: Sequence[Op]
) -> list[list[int | None]]:
    """Reads, writes and weights of each operator; ``None`` where the group's cannot be shared."""
    graph, steps = section.plan.graph, section.steps
    names = {op.name for op in ops}
    size = graph.tensor_bytes
    arrived, kept = set(), set()
    if steps is not None:  # residents come on chip in their first step
        arrived = {e.tensor for e in steps.staying if e.first < number <= e.last}
        kept = {e.tensor for e in steps.staying if e.first == number}
    reads = dict.fromkeys(names, 0)
    writes, weights = dict(reads), dict(reads)
    seen = set(arrived)
    for op in ops:
        for read in op.reads:
            maker = graph.producer.get(read.tensor)
            if read.tensor not in seen and (maker is None or graph.ops[maker].name not in names):
                seen.add(read.tensor)
                reads[op.name] += size[read.tensor]
        needed = any(graph.ops[i].name not in names for i in graph.consumers[op.writes])
        if op.writes in graph.outputs or (needed and op.writes not in kept):
            writes[op.name] = size[op.writes]
        weights[op.name] = section.scheme.weights[graph.index[op.name]]
    for entry in () if steps is None else steps.again:
        if entry.step == number:
            target = weights if entry.what == "weights" else reads
            target[entry.operator] += entry.extra_bytes
    columns = [
        _scaled([part[op.name] for op in ops], whole)
        for part, whole in zip((reads, writes, weights), group.dram)
    ]
    return [list(row) for row in zip(*columns)]


def _scaled(parts: Iterable[int], whole: int) -> list[int | None]:
    """Parts that add up to ``whole``, each several times where the group reads all of them so."""
    parts = list(parts)
    total = sum(parts)
    times, left = divmod(whole, total) if total else (1, whole)
    if left:
        return [None] * len(parts)
    return [part * times for part in parts]
