"""Whether recorded groups, or steps, are a legal plan and state what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch_getfuse.errors import PlanError
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.cascade.way import Resident
from torch_getfuse.partition.cost.scheme import FusionScheme
from torch_getfuse.partition.fusion_group import FusionGroup, make_step
from torch_getfuse.partition.node_set import bits, is_connected, neighbours, topological_order
from torch_getfuse.partition.pins import Pins
from torch_getfuse.partition.steps.check import check_step_pins, check_steps
from torch_getfuse.partition.steps.problem import StepProblem


def check_groups(
    scheme: FusionScheme,
    buffer_bytes: int,
    groups: Sequence[FusionGroup],
    masks: Sequence[int],
    unfusable: Sequence[str],
    pins: Pins,
) -> None:
    """Hold fusion groups to the rules of docs/method.md, section 1, and to their prices.

    Args:
        scheme: the cost model, with the graph.
        buffer_bytes: each group must stay below it.
        groups: in the order in which they run.
        masks: their operators.
        unfusable: operators of the graph that stand in no group.
        pins: what the groups must keep to.

    Raises:
        PlanError: names the first group that breaks a rule, with the numbers.
    """
    graph = scheme.graph
    seen: dict[str, int] = {}
    for name in unfusable:
        if name in seen:
            raise PlanError(f"{name!r} is listed twice among the unfusable operators")
        seen[name] = -1
    for k, group in enumerate(groups):
        if not group.ops:
            raise PlanError(f"fusion group {k} is empty")
        for name in group.ops:
            if name in seen:
                raise PlanError(f"{name!r} stands in fusion group {k} and a second time")
            seen[name] = k
    missing = [op.name for op in graph if op.name not in seen]
    if missing:
        raise PlanError(
            f"{len(missing)} operators stand in no group: {', '.join(missing[:3])}"
            + (", ..." if len(missing) > 3 else "")
        )
    alone = [1 << graph.index[name] for name in unfusable]
    if topological_order([*masks, *alone], graph) is None:
        raise PlanError("the groups depend on each other in a cycle; no order can run them")
    _check_order(graph, masks)
    near = neighbours(graph)
    for k, (group, mask) in enumerate(zip(groups, masks, strict=True)):
        _check_order_within(graph, group, mask, f"fusion group {k}")
        if not is_connected(mask, near):
            raise PlanError(f"fusion group {k} ({group.ops[0]}, ...) is not connected")
    for k, (group, mask) in enumerate(zip(groups, masks, strict=True)):
        _check_cost(scheme, buffer_bytes, group, mask, f"fusion group {k} ({group.ops[0]}, ...)")
        if broken := pins.broken(graph, mask):
            raise PlanError(f"fusion group {k} ({group.ops[0]}, ...) {broken}")
    for name, mask in zip(unfusable, alone, strict=True):
        need = scheme.buffer(mask, buffer_bytes)
        if need is not None and need < buffer_bytes:
            raise PlanError(
                f"{name!r} is called unfusable but needs only {need} of {buffer_bytes} B"
            )


def check_stated_steps(
    problem: StepProblem,
    groups: Sequence[FusionGroup],
    masks: Sequence[int],
    unfusable: Sequence[str],
    resident: Sequence[Resident],
    pins: Pins,
) -> None:
    """Hold the steps of a cascade plan to the rules of docs/method.md, section 12, and to their
    prices.

    Args:
        problem: graph, cost model, buffer.
        groups: the steps in the order in which they run.
        masks: their operators.
        unfusable: operators that the plan calls so.
        resident: tensors that stay on chip.
        pins: what the steps must keep to.

    Raises:
        PlanError: names the first step that breaks a rule, with the numbers.
    """
    graph = problem.graph
    residents = problem.stated(resident)
    for k, (group, mask) in enumerate(zip(groups, masks, strict=True)):
        if len(set(group.ops)) < len(group.ops):
            twice = next(name for name in group.ops if group.ops.count(name) > 1)
            raise PlanError(f"{twice!r} stands in step {k} twice")
        _check_order_within(graph, group, mask, f"step {k}")
    named = tuple(graph.ops[i].name for i in bits(problem.unfusable))
    if sorted(unfusable) != sorted(named):
        raise PlanError(f"unfusable are {', '.join(named) or 'none'}, not {unfusable}")
    steps = check_steps(problem, masks, residents)
    check_step_pins(problem, masks, residents, pins)
    for k, (group, step) in enumerate(zip(groups, steps, strict=True)):
        right = make_step(problem.scheme, step, group.ends)
        if group != replace(right, ops=group.ops):
            raise PlanError(
                f"step {k} ({group.ops[0]}, ...) states {_figures(group)}; the cost model says "
                f"{_figures(right)}"
            )


def _check_order_within(graph: OpGraph, group: FusionGroup, mask: int, what: str) -> None:
    """The operators of a group stand in an order in which they can run."""
    done = 0
    for name in group.ops:
        i = graph.index[name]
        if late := graph.predecessors[i] & mask & ~done:
            raise PlanError(
                f"{what} names {name!r} before {graph.ops[late.bit_length() - 1].name!r}, which "
                "must run before it; operators stand in the order in which they run"
            )
        done |= 1 << i


def _check_order(graph: OpGraph, masks: Sequence[int]) -> None:
    """The groups stand in an order in which they can run.

    An unfusable operator has no place in the list: it runs as soon as its operands are there.
    """
    group_of = {i: k for k, mask in enumerate(masks) for i in bits(mask)}
    turn: list[int] = []  # of group k: 2k; of an unfusable operator: the odd number after
    for i, before in enumerate(graph.predecessors):
        last = max((turn[j] for j in bits(before)), default=-1)
        own = 2 * group_of[i] if i in group_of else last | 1
        if last > own:
            raise PlanError(
                f"fusion group {own // 2} must run after fusion group {last // 2} "
                f"({graph.ops[i].name} depends on it), but stands before it; groups stand in "
                "the order in which they run"
            )
        turn.append(own)


def _check_cost(
    scheme: FusionScheme, buffer_bytes: int, group: FusionGroup, mask: int, what: str
) -> None:
    need = scheme.buffer(mask, buffer_bytes)
    if need is None or need >= buffer_bytes:
        raise PlanError(f"{what} needs {need} B, not below the buffer of {buffer_bytes} B")
    dram = scheme.dram(mask, buffer_bytes)
    told = (group.buffer_bytes, group.dram)
    if told != (need, dram):
        raise PlanError(
            f"{what} states {told[0]} B of buffer and {tuple(told[1])} B of DRAM reads, writes and "
            f"weights; the cost model says {need} B and {tuple(dram)} B"
        )


def _figures(group: FusionGroup) -> str:
    return f"way {group.way}, {group.buffer_bytes} B of buffer, DRAM {tuple(group.dram)} B"
