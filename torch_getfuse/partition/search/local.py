"""Local search over legal plans, the paper's protocol (docs/method.md, section 9).

Invalid groups are repaired before a plan is evaluated, by a given
:class:`~torch_getfuse.partition.problem.Repair` or by random splitting.
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
    """Local search: one random edit of each plan per step, the best of old and new are kept.

    Starts from ``population`` plans, which count: those of ``start`` (legal, with valid groups),
    and random ones. An edit moves a block (with what the
    order wants to come along) across a group border, merges two neighbours or cuts a group.
    Plans met before are not evaluated again as long as others are found. Of equals the newer
    are kept, so that the search drifts over plateaus.

    Other arguments and errors as :func:`~torch_getfuse.partition.search.random.random_search`.
    """
    rng = Random(seed)
    seen: set[Plan] = set()
    plans: list[tuple[int, Plan]] = []
    with Run(problem, budget, time_limit, progress) as run:
        space = PlanSpace(problem, repair)
        given = [tuple(sorted(plan)) for plan in start]
        while run.more() and len(plans) < population:
            plan = given.pop(0) if given else space.random_plan(rng)
            seen.add(plan)
            plans.append((run.score(plan), plan))
        while run.more():
            edited: list[tuple[int, Plan]] = []
            for _, plan in plans:
                if not run.more():
                    break
                found = space.edited(plan, rng, seen)
                seen.add(found)
                edited.append((run.score(found), found))
            distinct = dict.fromkeys([*edited, *plans])
            plans = sorted(distinct, key=lambda scored: scored[0])[:population]
    return run.result()
