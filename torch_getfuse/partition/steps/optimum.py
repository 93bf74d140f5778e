"""From a graph to the best sequence of steps: the optimum with its proof, or a good plan.

First a good plan: the operators one by one, improved in windows, each of which is searched whole
while the rest of the sequence stays as it is. Then everything up to its cost: a better plan, or the
proof that there is none. Where a graph is too wide for that, the good plan remains.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch_getfuse.partition.cost.cascade.pricing import ANY
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.merging import merge_greedily
from torch_getfuse.partition.node_set import is_connected
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.steps.lattice import Lattice, TooWide
from torch_getfuse.partition.steps.problem import Found, StepProblem
from torch_getfuse.partition.steps.search import StepSearch
from torch_getfuse.partition.work import STEPS_PER_SECOND, OutOfWork

MOST_GROUPS = 60_000
"""Groups on the down-sets of a graph that is searched whole."""

_WINDOWS, _WINDOW_GROUPS = (24, 12, 6), 4_000
"""Operators of a window, fewer where there are more groups on its down-sets than so many."""

_MANY_WINDOWS = 12
"""No window takes more than one part in so many of the time of all."""

_WIDTH = 64
"""Sets of residents that are followed from each down-set before the proof."""

SHARE = 0.4
"""Of the time, at most, for the plan before the proof."""

PROOF, MERGED = 2 / 3, 3 / 4
"""Of what is then left, for the proof; and of what is left without one, for :func:`merged_plan`."""


@dataclass(frozen=True, slots=True)
class Solved:
    """What a search for a sequence of steps found.

    Attributes:
        found: the best sequence; ``None`` where it ended before the first.
        bound: no legal plan moves fewer bytes.
        groups: that were looked at.
        seconds: wall time.
        stopped: why it ended before the proof; ``""`` with it.
    """

    found: Found | None
    bound: int
    groups: int
    seconds: float
    stopped: str = ""


def optimum(problem: StepProblem, seconds: float | None = None) -> Solved:
    """The sequence with the least DRAM access, proved.

    Args:
        problem: graph, cost model, buffer.
        seconds: counted as work first; ``None``: no limit.

    Returns:
        Where the graph is too wide or a limit strikes, the best that was found, a bound and the
        reason. Nothing found and no reason: no plan keeps to the pins.
    """
    started = time.perf_counter()
    with problem.work.within(seconds):
        good = good_plan(problem, None if seconds is None else SHARE * seconds)
        solved = proved(problem, PROOF * problem.work.left)
        if solved.found is None:
            return replace(solved, seconds=time.perf_counter() - started)
        groups = good.groups + solved.groups
        if solved.stopped:
            groups += merged_plan(problem, MERGED * problem.work.left).groups
        short = shortened(problem, problem.best or solved.found)
    return replace(
        solved,
        found=short.found,
        groups=groups + short.groups,
        seconds=time.perf_counter() - started,
    )


def good_plan(problem: StepProblem, seconds: float | None = None) -> Solved:
    """The operators one by one, pinned sets as one step, improved in windows.

    Nothing is found where these do not fit, as pins can have it.
    """
    started = time.perf_counter()
    found, steps = None, problem.one_by_one()
    if all(is_connected(step, problem.near) for step in steps):
        with problem.work.finishing():
            found = with_residents(problem, steps)
    if found is None:
        assert problem.pins, "operators that are fusable fit one by one"
        seconds_spent = time.perf_counter() - started
        return Solved(None, problem.unavoidable, 0, seconds_spent, "the pinned steps do not fit")
    solved = improved(problem, found, seconds)
    return replace(solved, seconds=time.perf_counter() - started)


def merged_plan(problem: StepProblem, seconds: float | None = None) -> Solved:
    """The groups that greedy merging makes, with residents, improved in windows if they are better.

    Merging does not know of residents, and windows seldom part what it has joined: where a graph is
    searched whole, or windows come to an end, their plan is mostly better.
    """
    started = time.perf_counter()
    evaluator = Evaluator(problem.scheme, problem.buffer_bytes, problem.work, problem.pins)
    try:
        groups = FusionProblem(evaluator)
        unready = groups.unready
    except OutOfWork as reason:
        return Solved(problem.best, problem.unavoidable, 0, 0.0, str(reason))
    if unready is not None:  # a pinned set that is no group by itself
        return Solved(problem.best, problem.unavoidable, 0, 0.0, "the pinned steps do not fit")
    merged = merge_greedily(groups, None if seconds is None else seconds / 2)
    known = problem.best
    with problem.work.finishing():
        found = with_residents(problem, problem.steps_of(merged.groups))
    solved = Solved(problem.best, problem.unavoidable, merged.plans, 0.0, merged.stopped)
    if found is not None and found is problem.best and found is not known:
        better = improved(problem, found, None if seconds is None else seconds / 2)
        solved = replace(better, groups=solved.groups + better.groups)
    return replace(solved, seconds=time.perf_counter() - started)


def proved(problem: StepProblem, seconds: float | None = None) -> Solved:
    """The optimum, with the best sequence that is known as a ceiling."""
    started = time.perf_counter()
    groups, bound, stopped = 0, problem.unavoidable, ""
    ceiling = ANY if problem.best is None else problem.best.dram_bytes - 1
    try:
        with problem.work.within(seconds):
            if ceiling >= bound:
                lattice = Lattice(problem, ceiling, MOST_GROUPS)
                groups = lattice.groups
                bound = max(bound, lattice.bound)
                StepSearch(lattice, ceiling).run()
            if problem.best is not None:
                bound = problem.best.dram_bytes
    except (TooWide, OutOfWork) as reason:
        stopped = str(reason)
    return Solved(problem.best, bound, groups, time.perf_counter() - started, stopped)


def with_residents(problem: StepProblem, masks: Sequence[int]) -> Found | None:
    """Steps that are given, with good residents; ``None`` where the steps do not fit.

    They are the best where no more than ``_WIDTH`` sets compete at any step.

    Raises:
        OutOfWork: where a limit of the problem's work strikes first.
    """
    lattice = Lattice(problem, fixed=_chain(masks))
    return StepSearch(lattice, width=_WIDTH).run() if 0 in lattice.left else None


def best_residents(
    problem: StepProblem, masks: Sequence[int], seconds: float | None = None
) -> tuple[Found | None, bool]:
    """Steps that are given with the best ways and residents; and whether these are proved the best.

    Where that takes longer than ``seconds``, or a step makes too many tensors, those of
    :func:`with_residents`. Nothing is found where no residents keep to the pins.
    """
    lattice = Lattice(problem, fixed=_chain(masks))
    if 0 not in lattice.left:
        return None, True
    try:
        with problem.work.within(seconds):
            return StepSearch(lattice).run(), True
    except (TooWide, OutOfWork):
        with problem.work.finishing():
            return with_residents(problem, masks), False


def improved(problem: StepProblem, known: Found, seconds: float | None = None) -> Solved:
    """A sequence improved in windows until none of them gets better, or a limit strikes.

    Returns:
        The best found, with a bound that every plan has.
    """
    return _in_windows(problem, known, seconds, 1)


def shortened(problem: StepProblem, known: Found, seconds: float | None = None) -> Solved:
    """A sequence with the same traffic and fewer steps, where windows have one."""
    return _in_windows(problem, known, seconds, 0)


def _in_windows(problem: StepProblem, known: Found, seconds: float | None, saved: int) -> Solved:
    """Search window after window, and again from the start as long as something gets better.

    Args:
        saved: bytes that a better plan saves at least; 0: it may just have fewer steps.
    """
    started = time.perf_counter()
    best, groups, stopped = known, 0, ""
    try:
        with problem.work.within(seconds):
            before: Found | None = None
            while best != before and best.dram_bytes >= problem.unavoidable + saved:
                before, done = best, 0
                while done != problem.everything:
                    ceiling = best.dram_bytes - saved
                    chain = _chain(best.masks)
                    window = _window(problem, chain, done, ceiling, seconds)
                    inside, groups = window.inside, groups + window.groups
                    if window.found is not None:
                        best = min(best, window.found, key=Found.rank)
                    done = _halfway(_chain(best.masks), done, inside)
    except OutOfWork as reason:
        stopped = str(reason)
    best = problem.best or best
    return Solved(best, problem.unavoidable, groups, time.perf_counter() - started, stopped)


def _chain(masks: Sequence[int]) -> dict[int, int]:
    """The down-sets before each of some steps, and the step."""
    found, done = {}, 0
    for mask in masks:
        found[done] = mask
        done |= mask
    return found


class _Window(NamedTuple):
    """What a window gave: its operators, the best plan (``None``: none is better), groups grown."""

    inside: int
    found: Found | None
    groups: int


def _window(
    problem: StepProblem,
    chain: dict[int, int],
    done: int,
    ceiling: int,
    seconds: float | None,
) -> _Window:
    """All steps of the operators that come next in a chain are tried, the others stay as they are.

    A window that is too wide, or takes too much of the time, is tried again with fewer operators.

    Args:
        seconds: of all windows together.
    """
    groups = 0
    share = ANY if seconds is None else int(seconds * STEPS_PER_SECOND / _MANY_WINDOWS)
    for operators in _WINDOWS:
        inside = chain[done]
        following = chain.get(done | inside)
        count = 1
        while following and (count < 2 or (inside | following).bit_count() <= operators):
            inside |= following
            following = chain.get(done | inside)
            count += 1
        fixed = {at: mask for at, mask in chain.items() if not mask & inside}
        try:
            with problem.work.steps_within(share):
                lattice = Lattice(problem, ceiling, _WINDOW_GROUPS, fixed, inside)
                groups += lattice.groups
                return _Window(inside, StepSearch(lattice, ceiling, _WIDTH).run(), groups)
        except (TooWide, OutOfWork):
            problem.work.check()  # ends here where the limit of all windows has struck
    return _Window(chain[done], None, groups)


def _halfway(chain: dict[int, int], done: int, inside: int) -> int:
    """The down-set from which the next window starts: half a window further, a step at least."""
    half = done.bit_count() + inside.bit_count() // 2
    at = done | chain[done]
    while at in chain and at.bit_count() < half:
        at |= chain[at]
    return at
