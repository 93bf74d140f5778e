"""One run of a search: its budget, its time limit and its best plan so far.

The budget is the number of plans evaluated. The same problem, budget and seed give the same result
bit for bit, unless CPU time ends the search (``partition/work.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from types import TracebackType

from torch_getfuse.errors import OptionError
from torch_getfuse.partition.problem import (
    FusionProblem,
    SearchInterrupted,
    SearchResult,
)
from torch_getfuse.partition.search.moves import Plan, PlanSpace
from torch_getfuse.partition.work import INTERRUPTED, OutOfWork

Progress = Callable[[int, int], None]

_LAST_RESORT = 0.5  # seconds for a first plan if the time is up before there is one


class Run:
    """Budget, time limit and best plan so far of one search; a context manager that ends it.

    If a limit is reached inside the context, even in the middle of an edit or a repair, the search
    ends there and its best plan is kept; before the first plan, a random plan or the plan of
    single blocks is taken. A ``KeyboardInterrupt`` propagates, with the best plan if there is one.

    Args:
        problem: the problem to search.
        budget: plans to evaluate, at least 1.
        time_limit: seconds, converted to counted work (``partition/work.py``), or ``None``.
        progress: called after each plan with (plans evaluated, least ``F_D`` so far).

    Raises:
        OptionError: for a budget below 1.
    """

    def __init__(
        self,
        problem: FusionProblem,
        budget: int,
        time_limit: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        if budget < 1:
            raise OptionError(f"budget={budget!r} is not a number of plans from 1 up")
        self.problem = problem
        self.plans = 0
        self.best: Plan | None = None
        self.best_bytes = 0
        self.stopped = ""
        self._budget = budget
        self._limit = problem.evaluator.work.within(time_limit)
        self._progress = progress
        self._history: list[tuple[int, int]] = []
        self._started = time.perf_counter()

    def __enter__(self) -> Run:
        self._limit.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self._limit.__exit__(None, None, None)
        if isinstance(error, KeyboardInterrupt) and self.best is not None:
            self.stopped = INTERRUPTED
            raise SearchInterrupted(self.result()) from error
        if not isinstance(error, OutOfWork):
            return False
        self.stopped = str(error)
        with self.problem.evaluator.work.finishing():
            if self.best is None:
                self.score(self._last_resort())
        return True

    def _last_resort(self) -> Plan:
        """A plan when no time was left for the first: a random one, or single blocks."""
        blocks = self.problem.blocks
        try:
            with self.problem.evaluator.work.within(_LAST_RESORT):
                drawn = PlanSpace(self.problem).random_plan(Random(0))
                return min(drawn, blocks, key=self.problem.cost)
        except OutOfWork:
            return blocks

    @property
    def seconds(self) -> float:
        """Seconds since the search began."""
        return time.perf_counter() - self._started

    def more(self) -> bool:
        """Whether another plan may be evaluated; raises :class:`OutOfWork` at a limit."""
        if self.plans >= self._budget:
            return False
        self.problem.evaluator.work.check()
        return True

    def score(self, plan: Plan) -> int:
        """Evaluate a plan of valid groups: its ``F_D`` sum in bytes.

        The cost of groups that were part of an earlier plan comes from the evaluator's cache.
        """
        cost = self.problem.cost(plan)
        self.plans += 1
        if self.best is None or cost < self.best_bytes:
            self.best, self.best_bytes = plan, cost
            self._history.append((self.plans, cost))
        if self._progress is not None:
            self._progress(self.plans, self.best_bytes)
        return cost

    def result(self) -> SearchResult:
        """The best plan, with its groups in an executable order."""
        assert self.best is not None, "a search evaluates at least one plan"
        return SearchResult(
            groups=executable(self.problem, self.best),
            dram_bytes=self.best_bytes,
            plans=self.plans,
            seconds=self.seconds,
            history=tuple(self._history),
            stopped=self.stopped,
        )


def executable(problem: FusionProblem, plan: Plan) -> tuple[int, ...]:
    """The groups of a legal plan, in an order executable together with the unfusable operators."""
    order = problem.order(plan)
    assert order is not None, "the groups of a legal plan form no cycle"
    return order
