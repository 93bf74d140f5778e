"""Cascade plans made by hand or at random, for the executor.

Their layouts and figures are those of the definition (docs/method.md, section 12), counted by the
schedules of the oracle: nothing of the package's cost model or schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import nn

import torch_getfuse
from tests.cascade_schedules import Line, Stripes
from torch_getfuse.ir import OpGraph, WindowKind
from torch_getfuse.partition.cost.cascade.step_layout import StepLayout
from torch_getfuse.partition.cost.cascade.way import LINE, SLICES, STRIPES, UNFUSABLE, Resident, Way
from torch_getfuse.partition.cost.scheme import boundary
from torch_getfuse.partition.fusion_group import FusionGroup
from torch_getfuse.partition.node_set import bits, is_connected, mask_of, neighbours
from torch_getfuse.partition.plan import PartitionPlan

Step = tuple[str, Way, tuple[int, int, int]]
"""Names of operators with a blank between, the way, bytes read, written, and of weights."""


def layouts_by_hand(plan: PartitionPlan, hasty: bool = False) -> list[StepLayout]:
    """Layouts in which each elementwise operator writes over the first operand that it may.

    Args:
        hasty: whether an operand is written over even if another operator still reads it.
    """
    graph, found = plan.graph, []
    for k, (mask, group) in enumerate(zip(plan.masks(), plan.groups, strict=True)):
        way = group.way
        assert way is not None
        alive = {r.tensor: r for r in plan.resident if r.first <= k <= r.last}
        run = schedule_of(graph, mask, way)
        shared = dict(run.storage)
        here = frozenset(alive.keys() & run.tensors.keys())
        for op in run.group if way.kind != SLICES else ():
            z = graph.tensors[op.writes]
            elementwise = not op.mixes_channels and all(
                read.window.kind is WindowKind.IDENTITY for read in op.reads
            )
            for x in (graph.tensors[read.tensor] for read in op.reads):
                if (
                    elementwise
                    and {x.name, z.name} <= here
                    and (x.shape, x.stream_axis) == (z.shape, z.stream_axis)
                    and alive[x.name].last == k
                    and shared[x.name] == x.name
                    and (hasty or (op.name, x.name) not in run.kept)
                ):
                    shared = {
                        name: shared[z.name] if last == x.name else last
                        for name, last in shared.items()
                    }
                    break
        rings = {}
        for last in dict.fromkeys(shared.values()):
            whole = any(shared[name] == last for name in here)
            rings[last] = run.units[last] if whole else max(1, run.peak[last])
        loads, writes = boundary(graph, mask)
        inputs = [name for name in graph.inputs if name in alive and alive[name].first == k]
        loads = [name for name in loads if name not in here or name in inputs]
        writes = [name for name in writes if name not in here or name in graph.outputs]
        found.append(StepLayout(mask, way, rings, shared, here, tuple(loads), tuple(writes)))
    return found


def schedule_of(graph: OpGraph, mask: int, way: Way) -> Line | Stripes:
    """The schedule of the oracle."""
    if way.kind == STRIPES:
        return Stripes(graph, mask, way.count)
    if way.kind == SLICES:
        graph = replace(graph, ops=tuple(replace(op, in_place=False) for op in graph.ops))
    return Line(graph, mask)


def plan_by_hand(
    model: nn.Module,
    x: tuple[torch.Tensor, ...],
    steps: Sequence[Step],
    residents: Sequence[Resident] = (),
    **options: Any,
) -> PartitionPlan:
    """A cascade plan of given steps with given figures."""
    settings = {"buffer": "100MB", "activation_bytes": 1, "weight_bytes": 1, "cache": False}
    base = torch_getfuse.plan(model, x, **{**settings, **options})
    groups = tuple(
        FusionGroup(tuple(names.split()), 0, *figures, way=way) for names, way, figures in steps
    )
    masks = [mask_of(base.graph.index[name] for name in group.ops) for group in groups]
    assert sum(masks) == (1 << len(base.graph)) - 1
    assert sum(len(list(bits(mask))) for mask in masks) == len(base.graph)
    return replace(
        base,
        scheme="cascade",
        granularity="line",
        groups=groups,
        resident=tuple(residents),
        unfusable=tuple(g.ops[0] for g in groups if g.way and g.way.kind == UNFUSABLE),
        lower_bound_bytes=0,
        proof=None,
    )


def random_steps(graph: OpGraph, random: Random) -> tuple[list[Step], list[Resident]]:
    """A legal cascade plan: connected steps in order, any ways, any residents."""
    masks: list[int] = []
    done = 0
    while done != (1 << len(graph)) - 1:
        mask, most = 0, random.randint(1, len(graph))
        for i in range(len(graph)):
            ready = not done >> i & 1 and not graph.predecessors[i] & ~(done | mask)
            near = not mask or (graph.makers[i] | graph.readers[i]) & mask
            alike = any(
                set(graph.consumers[read.tensor]) & set(bits(mask)) for read in graph.ops[i].reads
            )
            if ready and (near or (alike and random.random() < 0.5)) and mask.bit_count() < most:
                mask |= 1 << i
        if not is_connected(mask, neighbours(graph)):
            mask &= -mask
        masks.append(mask)
        done |= mask
    unfusable = [random.random() < 0.1 and mask.bit_count() == 1 for mask in masks]
    residents = []
    for name in graph.tensors:
        users = sum(1 << i for i in graph.consumers[name])
        users |= 1 << graph.producer[name] if name in graph.producer else 0
        life = [k for k, mask in enumerate(masks) if mask & users]
        if life and random.random() < 0.6 and not any(unfusable[life[0] : life[-1] + 1]):
            residents.append(Resident(name, life[0], life[-1]))
    steps = []
    for k, mask in enumerate(masks):
        way = Way(UNFUSABLE) if unfusable[k] else random_way(graph, mask, random)
        here = {r.tensor: r for r in residents if r.first <= k <= r.last}
        steps.append(
            (
                " ".join(graph.ops[i].name for i in bits(mask)),
                way,
                traffic(graph, mask, way, here, k),
            )
        )
    return steps, residents


def random_way(graph: OpGraph, mask: int, random: Random) -> Way:
    """Any way that a step can run in."""
    weighty = [graph.ops[i] for i in bits(mask) if graph.ops[i].weight_elements]
    kind = random.choice([LINE, STRIPES, SLICES])
    if kind == SLICES and weighty and mask.bit_count() == 1:
        shape = graph.tensors[weighty[0].writes].shape
        channels = shape[1] if len(shape) == 4 else shape[-1]
        if channels > 1:
            return Way(SLICES, random.randint(2, channels))
    if kind == LINE:
        return Way(LINE)
    sinks = [graph.ops[i].writes for i in bits(mask) if not graph.readers[i] & mask]
    count = random.randint(1, max(graph.tensors[name].rows for name in sinks))
    return Way(STRIPES, count, tuple(op.name for op in weighty if random.random() < 0.5))


def traffic(
    graph: OpGraph, mask: int, way: Way, alive: dict[str, Resident], k: int
) -> tuple[int, int, int]:
    """Bytes that a step reads, writes, and fetches of weights, one byte an element."""
    loads, writes = boundary(graph, mask)
    read = write = 0
    for name in loads:
        if name not in alive:
            read += graph.tensors[name].elements * (way.count if way.kind == SLICES else 1)
        elif name in graph.inputs and alive[name].first == k:
            read += graph.tensors[name].elements
    for name in writes:
        if name not in alive or name in graph.outputs:
            write += graph.tensors[name].elements
    weights = 0
    for op in (graph.ops[i] for i in bits(mask)):
        streams = way.kind == STRIPES and op.name not in way.weights_stay
        weights += op.weight_elements * (way.count if streams else 1)
    return read, write, weights
