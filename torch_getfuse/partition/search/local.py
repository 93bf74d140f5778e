"""Local search over legal plans, with the paper's protocol (docs/method.md, section 9).

Invalid groups are repaired before a plan is evaluated, by a
:class:`~torch_getfuse.partition.problem.Repair` passed in or by random splitting.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from torch_getfuse.partition.problem import FusionProblem, Repair, SearchResult
from torch_getfuse.partition.search.moves import Plan, PlanSpace
from torch_getfuse.partition.search.run import Progress, Run


def local_search(
    problem: FusionProblem,
    budget: int,
    seed: int,
    repair: Repair | None = None,
    time_limit: float | None = None,
    progress: Progress | None = None,
    population: int = 10,
    start: Sequence[Plan] = (),
) -> SearchResult:
    """Local search: each step edits every plan once at random and keeps the best of old and new.

    Starts from ``population`` plans, which count towards the budget: those of ``start`` (legal,
    with valid groups), filled up with random ones. An edit moves a block (and the operators that
    the order requires to move with it) across a group border, merges two neighbours or cuts a
    group. Plans seen before are not evaluated again as long as an edit gives a new one. Ties go
    to the newer plan, so that the search drifts over plateaus.

    Other arguments and errors as :func:`~torch_getfuse.partition.search.random.random_search`.
    """
    rng = Random(seed)
    seen: set[Plan] = set()
    plans: list[tuple[int, Plan]] = []
    with Run(problem, budget, time_limit, progress) as run:
        space = PlanSpace(problem, repair)
        starts = [tuple(sorted(plan)) for plan in start]
        while run.more() and len(plans) < population:
            plan = starts.pop(0) if starts else space.random_plan(rng)
            seen.add(plan)
            plans.append((run.score(plan), plan))
        while run.more():
            edited: list[tuple[int, Plan]] = []
            for _, plan in plans:
                if not run.more():
                    break
                neighbour = space.edited(plan, rng, seen)
                seen.add(neighbour)
                edited.append((run.score(neighbour), neighbour))
            distinct = dict.fromkeys([*edited, *plans])
            plans = sorted(distinct, key=lambda scored: scored[0])[:population]
    return run.result()
