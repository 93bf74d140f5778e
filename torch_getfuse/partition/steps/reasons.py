"""Why a plan's tensors do not stay on chip, and why its steps end where they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch_getfuse.accelerator import format_size
from torch_getfuse.errors import some_of
from torch_getfuse.partition.cost.cascade.model import Step
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.steps.problem import Life, StepProblem

_NAMED = 2  # tensors of each kind that a reason names


class Missing(NamedTuple):
    """Why a tensor that is handed on does not stay.

    Attributes:
        step: of those in which it would have to be on chip, the one that lacks most room; for a
            tensor at or across an unfusable operator, that operator's.
        bytes: that this step would need more, run as it is; ``None`` where no room would help.
    """

    step: int
    bytes: int | None


def missing(
    problem: StepProblem,
    masks: Sequence[int],
    lives: Mapping[int, Life],
    steps: Sequence[Step],
) -> dict[int, Missing]:
    """Tensors that go through DRAM from step to step -> why they do not stay."""
    facts = problem.facts
    found = {}
    around = problem.beside(masks, lives)
    everyone = (1 << len(facts.size)) - 1
    for tensor, life in problem.lives(masks, everyone).items():
        if tensor in lives or life.first == life.last:
            continue
        apart = [k for k in range(life.first, life.last + 1) if masks[k] & problem.unfusable]
        if apart:
            found[tensor] = Missing(apart[0], None)
            continue
        more = []
        for k in range(life.first, life.last + 1):
            beside, step = around[k][0], steps[k]
            assert step.priced is not None, "no step here is unfusable"
            if problem.scheme.group(masks[k]).tensors >> tensor & 1:
                beside = replace(beside, touched=beside.touched | 1 << tensor)
            else:
                beside = replace(beside, others=beside.others + facts.size[tensor])
            terms = problem.scheme.terms_of(masks[k], beside, step.priced)
            more.append((sum(term.bytes for term in terms) - (problem.buffer_bytes - 1), -k))
        most, at = max(more)
        found[tensor] = Missing(-at, max(0, most))
    return found


def why_steps_end(
    problem: StepProblem,
    masks: Sequence[int],
    lives: Mapping[int, Life],
    steps: Sequence[Step],
) -> list[str]:
    """Why each step ends where it does: what becomes of the tensors that it hands on."""
    facts, graph = problem.facts, problem.graph
    names = facts.lines.names
    lacking = missing(problem, masks, lives, steps)
    found = []
    for k, mask in enumerate(masks):
        if mask & problem.unfusable:
            found.append("unfusable: it fits in no way")
            continue
        made = [facts.number[graph.ops[i].writes] for i in bits(mask)]
        stay = [names[t] for t in made if t in lives and lives[t].last > k]
        leave = [t for t in made if t in lacking]
        parts = []
        if stay:
            parts.append(f"{some_of(stay, _NAMED)} {'stays' if len(stay) == 1 else 'stay'}")
        for tensor in leave[:_NAMED]:
            step, more = lacking[tensor]
            if more is None:
                parts.append(f"{names[tensor]} leaves: step {step} is unfusable")
            else:
                parts.append(
                    f"{names[tensor]} leaves: step {step} lacks {format_size(more)} for it"
                )
        if len(leave) > _NAMED:
            parts.append(f"{len(leave) - _NAMED} more leave")
        if not parts:
            parts.append("output" if k == len(masks) - 1 else "all that it makes is an output")
        found.append("; ".join(parts))
    return found
