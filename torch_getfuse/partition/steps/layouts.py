"""What the executor is told of the steps of a plan: where their tensors lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch_getfuse.partition.cost.cascade.layout import places
from torch_getfuse.partition.cost.cascade.step_layout import StepLayout
from torch_getfuse.partition.cost.scheme import boundary
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.steps.check import check_steps
from torch_getfuse.partition.steps.problem import Life, StepProblem


def step_layouts(
    problem: StepProblem, masks: Sequence[int], residents: Mapping[int, Life]
) -> list[StepLayout]:
    """The layout of each step of a plan.

    Args:
        problem: graph, cost model, buffer.
        masks: the operators of each step.
        residents: by tensor number.

    Raises:
        PlanError: for what is no legal plan.
    """
    graph, scheme, names = problem.graph, problem.scheme, problem.facts.lines.names
    steps = check_steps(problem, masks, residents)
    found = []
    for step, (beside, known) in zip(steps, problem.beside(masks, residents), strict=True):
        rings: dict[str, int] = {}
        shared: dict[str, str] = {}
        if step.priced is not None:
            beside = replace(beside, free=False)
            for place in places(scheme.group(step.mask), beside, step.priced):
                last = names[place.tensors[-1]]
                rings[last] = place.units
                shared.update((names[tensor], last) for tensor in place.tensors)
        loads, writes = boundary(graph, step.mask)
        before = {names[tensor] for tensor in bits(known)}
        resident = frozenset(names[tensor] for tensor in bits(beside.touched))
        found.append(
            StepLayout(
                step.mask,
                scheme.way_of(step),
                rings,
                shared,
                resident,
                tuple(name for name in loads if name not in before),
                tuple(name for name in writes if name not in resident or name in graph.outputs),
            )
        )
    return found
