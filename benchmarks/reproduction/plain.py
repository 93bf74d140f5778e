"""The plain local search: the paper's, read literally, beside the package's own.

The paper words its local search in a sentence: a population of 10 that starts at random, one
random edit of each plan per step, the best 10 of old and new are kept, and invalid groups are
split at random where no explainer is asked. Here is the least that this sentence needs:

- an edit moves *one* operator into a neighbouring group (with ``edits=EDITS`` it may also merge
  two neighbours or cut a group); one that would make a cycle leaves the plan as it was, and its
  evaluation is spent;
- random splitting cuts at a random position of the topological order, until every part fits;
- nothing is remembered: a plan met before is evaluated again.

The package's search (:mod:`torch_getfuse.partition.search.moves`) merges and cuts as well, moves
what the order wants to come along, merges what a cycle would need, cuts parallel branches apart,
and draws again where an edit leads to a plan met before.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from torch_getfuse.partition.node_set import bits, components
from torch_getfuse.partition.problem import FusionProblem, Repair, SearchResult
from torch_getfuse.partition.search.moves import Plan, PlanSpace
from torch_getfuse.partition.search.run import Run

POPULATION = 10
EDITS = ("move", "merge", "cut")


class PositionSplit:
    """Cuts a group at random positions of the topological order until every part is valid."""

    name = "positions"

    def __init__(self, problem: FusionProblem) -> None:
        self._problem = problem

    def __call__(self, group: int, rng: Random) -> list[int]:
        """Valid connected parts of a group of single operators, each of which fits alone."""
        found = []
        waiting = [group]
        while waiting:
            part = waiting.pop()
            if not part & (part - 1) or self._problem.evaluator.valid(part):
                found.append(part)
            else:
                waiting += _cut(part, rng, self._problem)
        return found


def plain_local_search(
    problem: FusionProblem,
    budget: int,
    seed: int,
    repair: Repair | None = None,
    edits: Sequence[str] = ("move",),
) -> SearchResult:
    """Local search as the paper words it.

    Args:
        problem: over single operators (``merge=False``).
        budget: plans to evaluate.
        seed: of everything that is drawn.
        repair: is given each invalid group; ``None`` for :class:`PositionSplit`.
        edits: the kinds of edit to draw from, of :data:`EDITS`.
    """
    rng = Random(seed)
    space = PlanSpace(problem, repair or PositionSplit(problem))
    with Run(problem, budget) as run:
        plans: list[tuple[int, Plan]] = []
        while run.more() and len(plans) < POPULATION:
            plan = space.random_plan(rng)
            plans.append((run.score(plan), plan))
        while run.more():
            edited = []
            for _, plan in plans:
                if not run.more():
                    break
                changed = _edited(space, plan, rng.choice(edits), rng)
                edited.append((run.score(changed), changed))
            plans = sorted([*plans, *edited], key=lambda scored: scored[0])[:POPULATION]
    return run.result()


def _edited(space: PlanSpace, plan: Plan, edit: str, rng: Random) -> Plan:
    """``plan`` after a random edit and repair, or as it was where there is no such edit."""
    problem = space.problem
    group = rng.choice(plan)
    if edit == "cut":
        removed = group
        groups = _cut(group, rng, problem) if group & (group - 1) else [group]
    else:
        border = list(bits((space.feeds(group) | space.needs(group)) & problem.fusable))
        if not border:
            return plan
        i = rng.choice(border)
        other = next(g for g in plan if g >> i & 1)
        removed = group | other
        if edit == "merge":
            groups = [removed]
        else:
            groups = [group | 1 << i, *components(other & ~(1 << i), problem.near)]
    rest = [g for g in plan if not g & removed]
    if space.order([*rest, *groups]) is None:
        return plan
    return tuple(sorted([*rest, *space.repaired(groups, rng)]))


def _cut(group: int, rng: Random, problem: FusionProblem) -> list[int]:
    """The components of both sides of a random position of a group of at least two operators."""
    at = rng.choice(list(bits(group))[1:])
    below = (1 << at) - 1
    return [*components(group & below, problem.near), *components(group & ~below, problem.near)]
