"""Random search over legal plans, with the paper's protocol (docs/method.md, section 9).

Invalid groups are repaired before a plan is evaluated, by a
:class:`~torch_getfuse.partition.problem.Repair` passed in or by random splitting.
"""

from __future__ import annotations

from random import Random

from torch_getfuse.partition.problem import FusionProblem, Repair, SearchResult
from torch_getfuse.partition.search.moves import PlanSpace
from torch_getfuse.partition.search.run import Progress, Run


def random_search(
    problem: FusionProblem,
    budget: int,
    seed: int,
    repair: Repair | None = None,
    time_limit: float | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """The best of ``budget`` random plans, with invalid groups repaired.

    Args:
        problem: the search runs over its blocks; ``FusionProblem(..., merge=False)`` for the
            paper's protocol.
        budget: plans to evaluate.
        seed: seed of all random choices.
        repair: tried first on each invalid group; random splitting handles what it declines.
        time_limit: seconds, converted to counted work (``partition/work.py``), or ``None``.
        progress: called after each plan with (plans evaluated, least ``F_D`` so far).

    Raises:
        OptionError: for a budget below 1.
        SearchInterrupted: for a ``KeyboardInterrupt`` after the first plan.
    """
    rng = Random(seed)
    with Run(problem, budget, time_limit, progress) as run:
        space = PlanSpace(problem, repair)
        while run.more():
            run.score(space.random_plan(rng))
    return run.result()
