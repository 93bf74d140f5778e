"""When a search must end: counted steps first, so that a busy machine gives the same plan.

Whatever takes time counts *steps* as it goes: so many for a group that is priced, for an edit of a
plan, for an iteration of a linear program. A time limit stands for :data:`STEPS_PER_SECOND` steps
each second. Steps are counted generously (docs/exact-search.md has what was measured): on an
ordinary machine they end the search well before the clock does, and always at the same place. The
clock ends it on a machine that is much slower or busier; then, and only then, the plan depends on
the machine, and ``"time limit"`` is what is told.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

STEPS_PER_SECOND = 1_200_000

TIME_LIMIT, INTERRUPTED = "time limit", "interrupted"
"""Why a search ended early, where that is the doing of the machine or its user."""

_SLACK = 2  # times its seconds, by the clock, an inner limit may take

_LOOK = 5_000  # steps between looks at the clock

clock = time.perf_counter
"""Seconds; replaced by tests."""


def by_machine(stopped: str) -> bool:
    """Whether a search that was stopped for this reason may end elsewhere the next time."""
    return stopped.endswith((TIME_LIMIT, INTERRUPTED))


class OutOfWork(Exception):
    """A limit on work is reached; says which."""


@dataclass(frozen=True, slots=True)
class _Limit:
    """Count of steps and moment of :func:`clock` at which work ends, and how to tell it."""

    steps: float = math.inf
    ended: float = math.inf
    told: str = ""


class Work:
    """The steps of one problem's searches, and the limits on them.

    Limits nest: an inner one ends with the outer one at the latest.

    Attributes:
        steps: counted so far.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._started = clock()
        self._limit = _Limit()
        self._seconds = math.inf  # of the outermost limit: the one that a user set
        self._next: float = math.inf  # count at which limits are looked at

    def add(self, steps: int) -> None:
        """Count steps.

        Raises:
            OutOfWork: where a limit is reached.
        """
        self.steps += steps
        if self.steps >= self._next:
            self.check()

    def check(self) -> None:
        """Look at the limits, the clock's as well.

        Raises:
            OutOfWork: where one is reached.
        """
        limit = self._limit
        if self.steps >= limit.steps:
            raise OutOfWork(limit.told)
        if limit.ended < math.inf and clock() >= limit.ended:
            raise OutOfWork(TIME_LIMIT)
        self._next = min(limit.steps, self.steps + _LOOK)

    def give_up(self) -> NoReturn:
        """End at the innermost limit, which what comes next, or a solver, cannot do with.

        Raises:
            OutOfWork: always.
        """
        limit = self._limit
        if limit.ended < math.inf and clock() >= limit.ended:
            raise OutOfWork(TIME_LIMIT)
        self.steps = max(self.steps, math.ceil(min(limit.steps, 1 << 62)))
        raise OutOfWork(limit.told)

    @property
    def steps_left(self) -> float:
        """Up to the innermost limit."""
        return max(0, self._limit.steps - self.steps)

    @property
    def left(self) -> float:
        """The same in seconds as they are counted, whatever the clock says."""
        return self.steps_left / STEPS_PER_SECOND

    @property
    def clock_left(self) -> float:
        """Seconds of the clock up to the innermost limit."""
        return max(0.0, self._limit.ended - clock()) if self._limit.ended < math.inf else math.inf

    @contextmanager
    def within(self, seconds: float | None, whole: bool = False) -> Iterator[None]:
        """Limit what is done inside to so many seconds, ``None`` or infinite: to nothing more.

        ``whole``: all that was done since this was made is among them.

        The :class:`OutOfWork` of a limit is for the caller to catch.
        """
        outer, asked = self._limit, self._seconds
        if seconds is not None and seconds < math.inf:
            self._seconds = seconds if asked == math.inf else asked
            steps = math.ceil(max(0.0, seconds) * STEPS_PER_SECOND)
            told = f"work limit of {steps:,} steps for time_limit={self._seconds:g} s"
            if whole:
                inner = _Limit(steps, self._started + seconds, told)
            else:
                # A part of what is limited already may take its time from other parts.
                slack = _SLACK if outer.ended < math.inf else 1
                inner = _Limit(self.steps + steps, clock() + slack * seconds, told)
            if outer.steps < inner.steps:
                inner = _Limit(outer.steps, inner.ended, outer.told)
            self._limit = _Limit(inner.steps, min(outer.ended, inner.ended), inner.told)
        with self._restored(outer, asked):
            yield

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """No limit inside: for what is quick and has to be done however little is left."""
        outer, asked = self._limit, self._seconds
        self._limit = _Limit()
        with self._restored(outer, asked):
            yield

    @contextmanager
    def _restored(self, limit: _Limit, seconds: float) -> Iterator[None]:
        self._next = 0 if self._limit.steps < math.inf else math.inf
        try:
            yield
        finally:
            self._limit, self._seconds = limit, seconds
            self._next = 0 if limit.steps < math.inf else math.inf
