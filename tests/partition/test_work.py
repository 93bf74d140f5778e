"""Limits on work: steps first, the clock as a backstop, inner limits within outer ones."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy.optimize import OptimizeResult
from scipy.sparse import identity

from tests.determinism import Ticking
from torch_getfuse.partition import work as module
from torch_getfuse.partition.wide import group_columns
from torch_getfuse.partition.wide.group_columns import minimum, solved
from torch_getfuse.partition.work import STEPS_PER_SECOND, OutOfWork, Work, by_machine


def worked(work: Work, each: int) -> tuple[int, str]:
    """Steps that were counted, so many at a time, until a limit struck; and which."""
    before = work.steps
    try:
        while True:
            work.add(each)
    except OutOfWork as limit:
        return work.steps - before, str(limit)


@pytest.mark.parametrize("speed", [0.0, 1e-3, 6e-3])
def test_steps_strike_whatever_the_clock_says(
    speed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "clock", Ticking(speed))
    work = Work()
    with work.within(2):
        steps, told = worked(work, 7)
    assert 0 <= steps - 2 * STEPS_PER_SECOND < 7
    assert told == f"work limit of {2 * STEPS_PER_SECOND:,} steps for time_limit=2 s"
    assert not by_machine(told)


@pytest.mark.parametrize("speed", [0.1, 0.01])
def test_the_clock_strikes_on_a_slow_machine(speed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "clock", Ticking(speed))
    work = Work()
    with work.within(2):
        steps, told = worked(work, 7)
        assert steps < 2 * STEPS_PER_SECOND
        assert told == "time limit"
        assert by_machine(told)
        with work.finishing():
            work.add(STEPS_PER_SECOND // 2)
        assert worked(work, 1) == (1, "time limit")


def test_waiting_spends_no_time() -> None:
    work = Work()
    with work.within(0.2):
        time.sleep(0.3)
        work.check()  # the wall clock says 0.3 s
        assert work.wall_left > 0.2
        work.add_time(0.3)  # of a thread that has worked
        work.check()
        work.add_time(0.2)
        assert work.wall_left == 0
        with pytest.raises(OutOfWork, match="time limit"):
            work.check()


def test_a_solver_in_its_own_thread_is_counted() -> None:
    def busy(seconds: float) -> str:
        started = time.thread_time()
        while time.thread_time() - started < seconds:
            pass
        return "done"

    work = Work()
    with work.within(0.04):
        assert solved(work, busy, 0.1) == "done"
        with pytest.raises(OutOfWork, match="time limit"):
            work.check()


def test_limits_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "clock", Ticking(0.0))
    work = Work()
    assert work.left == math.inf
    with work.within(None):
        work.add(5 * STEPS_PER_SECOND)
    with work.within(3):
        assert work.left == 3
        with work.within(1):
            steps, told = worked(work, 1)
            assert steps == STEPS_PER_SECOND
            assert told == f"work limit of {STEPS_PER_SECOND:,} steps for time_limit=3 s"
        assert work.left == 2
        with work.within(10):
            assert work.left == 2
            steps, told = worked(work, 1)
        assert steps == 2 * STEPS_PER_SECOND
        assert f"{3 * STEPS_PER_SECOND:,}" in told
    work.add(5 * STEPS_PER_SECOND)  # no limit any more
    with work.within(20, whole=True):
        assert work.left == 20 - work.steps / STEPS_PER_SECOND
        with work.within(1), pytest.raises(OutOfWork):
            work.give_up()
        assert work.left < 20 - 13


def test_that_the_clock_struck_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "clock", ticking := Ticking(0.0))
    work = Work()
    with work.within(1):
        worked(work, 1)
    assert work.reason("work limit", False) == "work limit"  # steps did
    with work.within(1):
        ticking.step = 1.0
        assert worked(work, 1)[1] == "time limit"
    assert work.reason("", False) == "time limit"
    assert work.reason("", False) == ""
    for stopped, proved, told in (("", True, ""), ("interrupted", False, "interrupted")):
        with work.within(1):
            assert worked(work, 1)[1] == "time limit"
        assert work.reason(stopped, proved) == told


@pytest.mark.parametrize(("iterations", "struck"), [(3, True), (1_000, False)])
def test_what_ended_the_solver(
    iterations: int, struck: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HiGHS says for its limits of iterations and of time that one of them was reached."""
    ended = OptimizeResult(status=1, nit=iterations, x=None)
    monkeypatch.setattr(group_columns, "linprog", lambda *_, **__: ended)
    work = Work()
    limit = pytest.raises(OutOfWork, match="time limit" if struck else "work limit")
    with work.within(3_000 / STEPS_PER_SECOND), limit:
        minimum(np.ones(2), identity(2, format="csc"), np.ones(2), work)
    assert work.reason("", False) == ("time limit" if struck else "")
