"""NSGA-II over legal plans: DRAM access against maximum buffer usage (docs/method.md, section 9).

The algorithm is pymoo's (Deb et al., 2002); plans are drawn, crossed, edited and repaired by the
same :class:`~torch_getfuse.partition.search.moves.PlanSpace` as in the local search. pymoo is an
optional dependency, imported only when the search is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from torch_getfuse.errors import OptionError
from torch_getfuse.partition.problem import FusionProblem, Repair, SearchResult
from torch_getfuse.partition.search.moves import Plan, PlanSpace
from torch_getfuse.partition.search.run import Progress, Run

POPULATION = 10
MATINGS = 10  # mating rounds per generation; with too few new plans after them the search ends


@dataclass(frozen=True)
class ParetoResult(SearchResult):
    """A search result with the Pareto front of the plans evaluated.

    Attributes:
        front: (``F_D`` sum, maximum buffer usage) in bytes of the evaluated plans that no other
            one dominates, by rising ``F_D``.
    """

    front: tuple[tuple[int, int], ...] = ()


def nsga2_search(
    problem: FusionProblem,
    budget: int,
    seed: int,
    repair: Repair | None = None,
    time_limit: float | None = None,
    progress: Progress | None = None,
    population: int = POPULATION,
) -> ParetoResult:
    """NSGA-II; returns the plan with the least DRAM access, and the Pareto front.

    No plan is evaluated twice, so on a graph with few plans the search ends before its budget.

    Arguments as :func:`~torch_getfuse.partition.search.local.random_search`.

    Raises:
        OptionError: for a budget below 1, or if pymoo is not installed.
    """
    rng = Random(seed)
    front = _Front()
    with Run(problem, budget, time_limit, progress) as run:
        algorithm = _algorithm(PlanSpace(problem, repair), rng, population)
        task = _task(problem, run, front)
        algorithm.setup(task, seed=rng.getrandbits(32))
        while run.more():
            plans = algorithm.ask()
            if plans is None or not len(plans):
                break
            plans = plans[: budget - run.plans]
            for plan in plans:
                # pymoo's evaluator marks a plan as evaluated; one at a time, so that the limit
                # is checked before each.
                if not run.more():
                    break
                algorithm.evaluator.eval(task, plan, algorithm=algorithm)
            else:
                algorithm.tell(infills=plans)
    best = run.result()
    if not front.pairs():  # the limit was reached in the first generation
        with problem.evaluator.work.finishing():
            front.add((best.dram_bytes, max_buffer(problem, best.groups)))
    return ParetoResult(**vars(best), front=front.pairs())


class _Front:
    """The pairs that no other pair dominates."""

    def __init__(self) -> None:
        self._pairs: list[tuple[int, int]] = []

    def add(self, pair: tuple[int, int]) -> None:
        if any(a <= pair[0] and b <= pair[1] for a, b in self._pairs):
            return
        self._pairs = [(a, b) for a, b in self._pairs if a < pair[0] or b < pair[1]]
        self._pairs.append(pair)

    def pairs(self) -> tuple[tuple[int, int], ...]:
        return tuple(sorted(self._pairs))


def max_buffer(problem: FusionProblem, plan: Plan) -> int:
    """Maximum buffer usage of a plan of valid groups in bytes; 0 for an empty one."""
    return max((problem.evaluator.buffer(group) or 0 for group in plan), default=0)


def _task(problem: FusionProblem, run: Run, front: _Front) -> Any:
    """The problem as pymoo sees it: one variable, which is a plan, and two objectives."""
    from pymoo.core.problem import ElementwiseProblem

    class PlanTask(ElementwiseProblem):
        def __init__(self) -> None:
            super().__init__(n_var=1, n_obj=2, vtype=object)

        def _evaluate(self, x: Any, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            pair = run.score(x[0]), max_buffer(problem, x[0])
            front.add(pair)
            out["F"] = list(pair)

    return PlanTask()


def _algorithm(space: PlanSpace, rng: Random, population: int) -> Any:
    """NSGA-II of pymoo with operators on plans."""
    try:
        import numpy as np
        from pymoo.algorithms.moo.nsga2 import NSGA2, binary_tournament
        from pymoo.core.crossover import Crossover
        from pymoo.core.duplicate import DuplicateElimination
        from pymoo.core.mating import Mating
        from pymoo.core.mutation import Mutation
        from pymoo.core.repair import Repair as PymooRepair
        from pymoo.core.sampling import Sampling
        from pymoo.core.termination import NoTermination
        from pymoo.operators.selection.tournament import TournamentSelection
    except ImportError as error:
        raise OptionError(
            f"method='nsga2' needs pymoo ({error}): pip install torch-getfuse[search]"
        ) from error

    seen: set[Plan] = set()

    def column(plans: list[Plan]) -> Any:
        # Filled one by one: numpy would turn a list of tuples into a matrix.
        array = np.empty((len(plans), 1), dtype=object)
        for k, plan in enumerate(plans):
            array[k, 0] = plan
        return array

    class RandomPlans(Sampling):
        def _do(self, problem: Any, n_samples: int, *args: Any, **kwargs: Any) -> Any:
            return column([space.random_plan(rng) for _ in range(n_samples)])

    class Cross(Crossover):
        def __init__(self) -> None:
            super().__init__(n_parents=2, n_offsprings=2)

        def _do(self, problem: Any, X: Any, *args: Any, **kwargs: Any) -> Any:
            children = np.empty_like(X)
            for k in range(X.shape[1]):
                first, second = X[0, k, 0], X[1, k, 0]
                children[0, k, 0] = space.crossed(first, second, rng)
                children[1, k, 0] = space.crossed(second, first, rng)
            return children

    class Edit(Mutation):
        def _do(self, problem: Any, X: Any, *args: Any, **kwargs: Any) -> Any:
            return column([space.edited(plan, rng) for plan in X[:, 0]])

    class SplitInvalid(PymooRepair):
        def _do(self, problem: Any, X: Any, *args: Any, **kwargs: Any) -> Any:
            return column([space.repaired(plan, rng) for plan in X[:, 0]])

    class SeenBefore(DuplicateElimination):
        """Marks plans seen in any generation, once per batch: when it is compared with itself."""

        def _do(self, pop: Any, other: Any, is_duplicate: Any) -> Any:
            if other is None:
                for k, individual in enumerate(pop):
                    is_duplicate[k] = individual.X[0] in seen
                    seen.add(individual.X[0])
            return is_duplicate

    fresh = SeenBefore()
    mating = Mating(
        TournamentSelection(func_comp=binary_tournament),
        Cross(),
        Edit(),
        repair=SplitInvalid(),
        eliminate_duplicates=fresh,
        n_max_iterations=MATINGS,
    )
    return NSGA2(
        pop_size=population,
        sampling=RandomPlans(),
        repair=SplitInvalid(),
        mating=mating,
        eliminate_duplicates=fresh,
        termination=NoTermination(),
    )
