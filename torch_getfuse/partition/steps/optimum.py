"""From a graph to the best sequence of steps: the optimum with its proof, or a good plan.

First the plans whose groups of several operators read no weights again: their lattice is small, and
their optimum is mostly that of all. Then, up to its cost, everything: a better plan, or the proof.
Where a graph is too wide for that, a plan is improved in windows, each of which is searched whole
while the rest of the sequence stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from torch_getfuse.partition.cost.cascade.pricing import ANY
from torch_getfuse.partition.steps.lattice import Lattice, TooWide
from torch_getfuse.partition.steps.problem import Found, StepProblem
from torch_getfuse.partition.steps.search import StepSearch
from torch_getfuse.partition.work import OutOfWork

MOST_GROUPS = 60_000
"""Groups on the down-sets of a graph that is searched whole."""

_WINDOW, _WINDOW_GROUPS = 24, 4_000
"""Operators of a window, and groups on its down-sets."""

_FIRST_RISE = 500
"""The first ceiling above a bound is higher by one part in so many, the next twice that, ..."""


class Solved(NamedTuple):
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
        reason.
    """
    started = time.perf_counter()
    groups, bound, stopped = 0, problem.unavoidable, ""
    best: Found | None = None
    try:
        with problem.work.within(seconds):
            lattice = Lattice(problem, again=False, most=MOST_GROUPS)
            groups += lattice.groups
            best = _cheapest(lattice)
            assert best is not None, "operators that are fusable fit one by one"
            ceiling = best.dram_bytes - 1
            lattice = Lattice(problem, ceiling, most=MOST_GROUPS)
            groups += lattice.groups
            bound = max(bound, lattice.bound)
            best = StepSearch(lattice, ceiling).run() or best
            bound = best.dram_bytes
    except (TooWide, OutOfWork) as reason:
        stopped = str(reason)
    return Solved(best, bound, groups, time.perf_counter() - started, stopped)


def _cheapest(lattice: Lattice) -> Found | None:
    """The cheapest plan of a lattice without a ceiling, by ceilings that rise.

    ``None`` where there is none: a step may fit beside some residents, as its relaxed price says,
    and beside none that a plan can have.
    """
    rise = lattice.bound // _FIRST_RISE + 1
    ceiling = lattice.bound
    while (found := StepSearch(lattice, ceiling).run()) is None and ceiling < ANY:
        ceiling, rise = min(lattice.bound + rise, ANY), 2 * rise
    return found


def with_residents(problem: StepProblem, masks: Sequence[int]) -> Found | None:
    """Steps that are given, with the best residents; ``None`` where the steps do not fit.

    Raises:
        OutOfWork: where a limit of the problem's work strikes first.
    """
    lattice = Lattice(problem, fixed=_chain(masks))
    return None if 0 not in lattice.left else _cheapest(lattice)


def improved(problem: StepProblem, known: Found, seconds: float | None = None) -> Solved:
    """A sequence improved in windows until none of them gets better, or a limit strikes.

    Returns:
        The best found, with a bound that every plan has.
    """
    started = time.perf_counter()
    best, groups, stopped = known, 0, ""
    try:
        with problem.work.within(seconds):
            before = -1
            while before != best.dram_bytes:
                before, done = best.dram_bytes, 0
                while done != problem.everything:
                    chain = _chain(best.masks)
                    inside = _window(chain, done)
                    fixed = {at: mask for at, mask in chain.items() if not mask & inside}
                    ceiling = best.dram_bytes - 1
                    try:
                        lattice = Lattice(
                            problem, ceiling, True, _WINDOW_GROUPS, fixed=fixed, inside=inside
                        )
                        groups += lattice.groups
                        best = StepSearch(lattice, ceiling).run() or best
                    except TooWide:
                        groups += _WINDOW_GROUPS
                    done = _halfway(_chain(best.masks), done, inside)
    except OutOfWork as reason:
        stopped = str(reason)
    return Solved(best, problem.unavoidable, groups, time.perf_counter() - started, stopped)


def _chain(masks: Sequence[int]) -> dict[int, int]:
    """The down-sets before each of some steps, and the step."""
    found, done = {}, 0
    for mask in masks:
        found[done] = mask
        done |= mask
    return found


def _window(chain: dict[int, int], done: int) -> int:
    """Mask of the operators of the next steps: two steps, and more up to a number of operators."""
    inside = chain[done]
    following = chain.get(done | inside)
    count = 1
    while following and (count < 2 or (inside | following).bit_count() <= _WINDOW):
        inside |= following
        following = chain.get(done | inside)
        count += 1
    return inside


def _halfway(chain: dict[int, int], done: int, inside: int) -> int:
    """The down-set from which the next window starts: half a window further, a step at least."""
    half = done.bit_count() + inside.bit_count() // 2
    at = done | chain[done]
    while at in chain and at.bit_count() < half:
        at |= chain[at]
    return at
