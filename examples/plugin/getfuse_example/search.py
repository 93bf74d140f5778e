"""A search: merge the two neighbouring groups that save most, until none do."""

from __future__ import annotations

from collections.abc import Callable

from torch_getfuse import FusionProblem, Repair, Run, SearchResult


def greedy_merge(
    problem: FusionProblem,
    budget: int,
    seed: int,
    repair: Repair | None,
    time_limit: float | None,
    progress: Callable[[int, int], None] | None,
) -> SearchResult:
    """From every operator alone to larger groups, the best merge first.

    Nothing is drawn, so ``seed`` is of no account; no group is ever too large, so ``repair`` is
    not either.
    """
    with Run(problem, budget, time_limit, progress) as run:
        plan = list(problem.blocks)
        run.score(tuple(plan))
        while run.more():
            best, saved = None, 0
            for k, one in enumerate(plan):
                for other in plan[k + 1 :]:
                    joined = one | other
                    rest = [group for group in plan if group not in (one, other)]
                    if not problem.evaluator.valid(joined) or problem.parts(joined) != [joined]:
                        continue
                    gain = problem.cost((one, other)) - problem.evaluator.dram(joined)
                    if gain > saved and problem.order([*rest, joined]) is not None:
                        best, saved = [*rest, joined], gain
            if best is None:
                break
            plan = best
            run.score(tuple(plan))
    return run.result()
