"""When a search must end: by counted steps first, so that a busy machine gives the same plan.

Everything that takes time counts *steps*: evaluating the cost of a group, editing a plan, an
iteration of a linear program. A time limit allows :data:`STEPS_PER_SECOND` steps per second, which
an ordinary machine takes in about that time or less (docs/exact-search.md has the measurements);
the count ends the search always at the same point. The clock is that of CPU time, so that other
programs hardly move it, and allows twice the limit, for programs that share a processor's caches
and units do move it. It ends the search on a machine that is slower than that. Then, and only then,
the plan depends on the machine, and the reason reported is ``"time limit"``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

STEPS_PER_SECOND = 1_500_000

TIME_LIMIT, INTERRUPTED = "time limit", "interrupted"
"""Why a search ended early, if the cause is the machine or its user."""

_CLOCK = 2  # CPU time allowed, as a multiple of a limit's seconds

_SLACK = 2  # and more to an inner limit, as a multiple of that

_WALL = 3  # seconds by the wall clock allowed to a library, for each of CPU time

_LOOK = 5_000  # steps between two readings of the clock

clock = time.thread_time
"""Seconds of CPU time of the thread that searches; replaced by tests."""


def by_machine(stopped: str) -> bool:
    """Whether a search stopped for this reason may end at another point the next time."""
    return stopped.endswith((TIME_LIMIT, INTERRUPTED))


class OutOfWork(Exception):
    """A limit on work is reached; the message says which."""


@dataclass(frozen=True, slots=True)
class _Limit:
    """Count of steps and CPU time at which work ends, and the message for it."""

    steps: float = math.inf
    ended: float = math.inf
    message: str = ""


class Work:
    """The steps of one problem's searches, and the limits on them.

    Limits nest: an inner one ends with the outer one at the latest.

    Attributes:
        steps: steps counted so far.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._struck = False
        self._elsewhere = 0.0
        self._started = self._spent()
        self._limit = _Limit()
        self._seconds = math.inf  # of the outermost limit: the one that a user set
        self._next: float = math.inf  # count at which limits are checked next

    def _spent(self) -> float:
        """CPU time so far, from no particular start."""
        return clock() + self._elsewhere

    def add_time(self, seconds: float) -> None:
        """Count CPU time that another thread has spent for this work."""
        self._elsewhere += seconds

    def add(self, steps: int) -> None:
        """Count steps.

        Raises:
            OutOfWork: if a limit is reached.
        """
        self.steps += steps
        if self.steps >= self._next:
            self.check()

    def check(self) -> None:
        """Check all limits, including the clock.

        Raises:
            OutOfWork: if one is reached.
        """
        limit = self._limit
        if self.steps >= limit.steps:
            raise OutOfWork(limit.message)
        if limit.ended < math.inf and self._spent() >= limit.ended:
            self._strike()
        self._next = min(limit.steps, self.steps + _LOOK)

    def give_up(self, by_clock: bool = False) -> NoReturn:
        """End at the innermost limit: what is left of it is too little for the next step.

        Args:
            by_clock: a library has ended by the clock, with steps left.

        Raises:
            OutOfWork: always.
        """
        limit = self._limit
        if by_clock or (limit.ended < math.inf and self._spent() >= limit.ended):
            self._strike()
        self.steps = max(self.steps, math.ceil(min(limit.steps, 1 << 62)))
        raise OutOfWork(limit.message)

    def _strike(self) -> NoReturn:
        self._struck = True
        raise OutOfWork(TIME_LIMIT)

    def reason(self, stopped: str, proved: bool) -> str:
        """Why a stage ended: by the clock, if that ended any part of it, whoever caught it.

        The result depends on the machine then, if it is not proved.

        Args:
            stopped: the reason that the stage has; ``""`` for none.
            proved: whether its plan is the optimum.
        """
        struck, self._struck = self._struck, False
        return TIME_LIMIT if struck and not proved and not by_machine(stopped) else stopped

    @property
    def steps_left(self) -> float:
        """Steps left up to the innermost limit."""
        return max(0, self._limit.steps - self.steps)

    @property
    def left(self) -> float:
        """:attr:`steps_left` in seconds of counted work, independent of the clock."""
        return self.steps_left / STEPS_PER_SECOND

    @property
    def wall_left(self) -> float:
        """Seconds for a library that reads the wall clock, with room for a busy machine."""
        return _WALL * max(0.0, self._limit.ended - self._spent())

    @contextmanager
    def within(self, seconds: float | None, whole: bool = False) -> Iterator[None]:
        """Limit the work inside the context to ``seconds``; ``None`` or infinite adds no limit.

        CPU time ends it after twice that.

        ``whole``: count from the creation of this object, not from now.

        The caller catches :class:`OutOfWork`.
        """
        outer, outer_seconds = self._limit, self._seconds
        if seconds is not None and seconds < math.inf:
            self._seconds = seconds if outer_seconds == math.inf else outer_seconds
            steps = math.ceil(max(0.0, seconds) * STEPS_PER_SECOND)
            message = f"work limit of {steps:,} steps for time_limit={self._seconds:g} s"
            if whole:
                inner = _Limit(steps, self._started + _CLOCK * seconds, message)
            else:
                # Nested in an outer limit, this part may use clock time of the other parts.
                allowed = _CLOCK * seconds * (_SLACK if outer.ended < math.inf else 1)
                inner = _Limit(self.steps + steps, self._spent() + allowed, message)
            if outer.steps < inner.steps:
                inner = _Limit(outer.steps, inner.ended, outer.message)
            self._limit = _Limit(inner.steps, min(outer.ended, inner.ended), inner.message)
        with self._restored(outer, outer_seconds):
            yield

    @contextmanager
    def steps_within(self, steps: int) -> Iterator[None]:
        """Limit the work inside the context to so many steps, however long they take.

        The caller catches :class:`OutOfWork`.
        """
        outer, outer_seconds = self._limit, self._seconds
        if self.steps + steps < outer.steps:
            message = f"work limit of {steps:,} steps"
            self._limit = _Limit(self.steps + steps, outer.ended, message)
        with self._restored(outer, outer_seconds):
            yield

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Lift all limits inside the context: for quick work that must be done in any case."""
        outer, outer_seconds = self._limit, self._seconds
        self._limit = _Limit()
        with self._restored(outer, outer_seconds):
            yield

    @contextmanager
    def _restored(self, limit: _Limit, seconds: float) -> Iterator[None]:
        self._next = 0 if self._limit.steps < math.inf else math.inf
        try:
            yield
        finally:
            self._limit, self._seconds = limit, seconds
            self._next = 0 if limit.steps < math.inf else math.inf
