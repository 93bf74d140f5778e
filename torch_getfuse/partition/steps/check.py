"""Whether steps and residents are a legal plan, and what each step then costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch_getfuse.errors import PlanError
from torch_getfuse.partition.cost.cascade.model import Step
from torch_getfuse.partition.node_set import bits, is_connected
from torch_getfuse.partition.pins import Pins
from torch_getfuse.partition.steps.problem import Life, StepProblem


def check_steps(
    problem: StepProblem, masks: Sequence[int], residents: Mapping[int, Life]
) -> list[Step]:
    """The steps of a plan with their prices (docs/method.md, section 12).

    Args:
        problem: graph, cost model, buffer.
        masks: the operators of each step.
        residents: by tensor number.

    Raises:
        PlanError: names the first rule that is broken, with the numbers.
    """
    graph = problem.graph
    done = 0
    for k, mask in enumerate(masks):
        if not mask:
            raise PlanError(f"step {k} has no operator")
        if mask & done:
            twice = graph.ops[(mask & done).bit_length() - 1].name
            raise PlanError(f"{twice!r} stands in step {k} and in one before it")
        for i in bits(mask):
            if late := graph.predecessors[i] & ~(done | mask):
                after = graph.ops[late.bit_length() - 1].name
                raise PlanError(
                    f"step {k} runs {graph.ops[i].name!r}, which must run after {after!r} of a "
                    "later step; steps stand in the order in which they run"
                )
        unfusable = mask & problem.unfusable
        if unfusable and mask & (mask - 1):
            name = graph.ops[unfusable.bit_length() - 1].name
            raise PlanError(f"step {k} runs {name!r} beside others; it is unfusable, a step alone")
        if not is_connected(mask, problem.near):
            raise PlanError(f"step {k} ({_first(problem, mask)}, ...) is not connected")
        done |= mask
    if left := problem.everything & ~done:
        raise PlanError(f"{left.bit_count()} operators stand in no step: {_first(problem, left)}")
    _check_residents(problem, masks, residents)
    steps = []
    for k, step in enumerate(problem.priced(masks, residents, free=False)):
        if step is None:
            raise PlanError(
                f"step {k} ({_first(problem, masks[k])}, ...) does not fit the buffer of "
                f"{problem.buffer_bytes} B beside its residents in any way"
            )
        steps.append(step)
    return steps


def check_step_pins(
    problem: StepProblem, masks: Sequence[int], residents: Mapping[int, Life], pins: Pins
) -> None:
    """Whether steps and residents keep to pins; raises :class:`PlanError` for the first that is
    broken.
    """
    for k, mask in enumerate(masks):
        if broken := pins.broken(problem.graph, mask):
            raise PlanError(f"step {k} ({_first(problem, mask)}, ...) {broken}")
    for name in pins.kept:
        tensor = problem.facts.number[name]
        life = problem.lives(masks, 1 << tensor)[tensor]
        if life.first < life.last and tensor not in residents:
            raise PlanError(
                f"keep= pins {name!r}, but it goes through DRAM between step {life.first} and step "
                f"{life.last}"
            )


def _check_residents(
    problem: StepProblem, masks: Sequence[int], residents: Mapping[int, Life]
) -> None:
    names = problem.facts.lines.names
    lives = problem.lives(masks, sum(1 << t for t in residents))
    apart = [k for k, mask in enumerate(masks) if mask & problem.unfusable]
    for tensor, life in residents.items():
        name = names[tensor]
        if not problem.residency:
            raise PlanError(f"{name!r} stays on chip in a plan without residency")
        if tensor not in lives:
            raise PlanError(f"{name!r} is said to stay on chip, but no step makes or reads it")
        first, last = lives[tensor]
        if life != (first, last):
            raise PlanError(
                f"{name!r} is said to stay from step {life.first} to {life.last}; a tensor stays "
                f"from the step that makes it to the last that reads it: from {first} to {last}"
            )
        for k in apart:
            if life.first <= k <= life.last:
                raise PlanError(
                    f"{name!r} stays across step {k}, {_first(problem, masks[k])}; nothing does "
                    "across an unfusable operator"
                )


def _first(problem: StepProblem, mask: int) -> str:
    return problem.graph.ops[(mask & -mask).bit_length() - 1].name
