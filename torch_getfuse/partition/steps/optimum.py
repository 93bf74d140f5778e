"""From a graph to the best sequence of steps: the optimum with its proof, or a good plan.

A plan made by merging; where most of its steps are single operators, everything up to its cost,
with a part of the time. If that does not end, a better plan: the operators one by one, improved in
windows, each of which is searched whole while the rest of the sequence stays as it is; and again
everything up to its cost: a better plan, or the proof that there is none. Where that would take too
long, windows over the best plan come first. Where a graph is too wide, the good plan remains.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
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
"""Sets of residents that are followed from each down-set, but in the proof."""

_WIDTHS = (_WIDTH, 16, 4)
"""The same for the steps of the merged plan: fewer where it takes too long."""

FIRST, TRIAL, WINDOWED, PROOF, IMPROVED, LAST, SHORTENED = 1 / 2, 0.1, 0.25, 2 / 3, 3 / 4, 7 / 8, 1
"""Shares of the time that is left: of merging with its residents, of the first proof, of windows,
of the second proof, of windows over the best plan by then, of the last proof, and of windows that
look for fewer steps."""

FEW = 1.5
"""Operators for each step of the merged plan, up to which a proof is tried first."""

Run = Callable[[str, Callable[[], "Solved"]], "Solved"]
"""Runs a stage, of which it is told the name."""


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
    """The sequence with the least DRAM access, proved; see :func:`solve`.

    Args:
        problem: graph, cost model, buffer.
        seconds: counted as work first; ``None``: no limit.

    Returns:
        Where the graph is too wide or a limit strikes, the best that was found, a bound and the
        reason. Nothing found and no reason: no plan keeps to the pins.
    """
    started = time.perf_counter()
    with problem.work.within(seconds):
        solved = solve(problem, lambda _, stage: stage())
    return replace(solved, found=problem.best, seconds=time.perf_counter() - started)


def solve(problem: StepProblem, run: Run) -> Solved:
    """All stages, within the limits of the problem's work; :attr:`StepProblem.best` is the result.

    Args:
        run: is given each stage.

    Returns:
        What the proof gave.
    """

    def part(share: float) -> float | None:
        left = problem.work.left
        return None if left == math.inf else share * left

    merged = run("merging", lambda: merged_plan(problem, part(FIRST)))
    proof = Proof(problem)
    # Where most steps are single operators the proof takes less time than windows.
    if merged.found is not None and FEW * len(merged.found.masks) >= len(problem.graph):
        solved = run("exact", lambda: proof.run(part(TRIAL), shortest=True))
        if not solved.stopped:
            return solved
    cut_short = False
    if problem.best is None or problem.best.dram_bytes > problem.unavoidable:
        cut_short = bool(run("windows", lambda: good_plan(problem, part(WINDOWED))).stopped)
    solved = run("exact", lambda: proof.run(part(PROOF)))
    if problem.best is None:
        return solved
    if solved.stopped and (cut_short or problem.best is merged.found):
        known = problem.best
        run("windows", lambda: improved(problem, known, part(IMPROVED)))
    if solved.stopped and not proof.too_wide:
        solved = run("exact", lambda: proof.run(part(LAST), patient=True))
    best = problem.best
    run("fewer steps", lambda: shortened(problem, best, part(SHORTENED)))
    return solved


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
    """The groups that greedy merging makes, with good residents.

    Nothing is found where pinned sets do not fit as groups, or the limit strikes first.
    """
    started = time.perf_counter()
    evaluator = Evaluator(problem.scheme, problem.buffer_bytes, problem.work, problem.pins)
    found, plans, stopped = None, 0, "the pinned steps do not fit"
    part = None if seconds is None else seconds / (1 + len(_WIDTHS))
    try:
        groups = FusionProblem(evaluator)
        if groups.unready is None:  # else a pinned set is no group by itself
            merged = merge_greedily(groups, part)
            plans, stopped = merged.plans, merged.stopped
            steps = problem.steps_of(merged.groups)
            for width in _WIDTHS:  # steps that make many tensors take long
                try:
                    with problem.work.within(part):
                        found = with_residents(problem, steps, width)
                    break
                except OutOfWork as reason:
                    stopped = str(reason)
    except OutOfWork as reason:
        stopped = str(reason)
    spent = time.perf_counter() - started
    return Solved(found, problem.unavoidable, plans, spent, stopped)


class Proof:
    """The optimum, with the best sequence that is known as a ceiling.

    Args:
        problem: graph, cost model, buffer.

    Attributes:
        too_wide: whether it would not end in any time.
    """

    def __init__(self, problem: StepProblem) -> None:
        self.problem = problem
        self.too_wide = False
        self._lattice = Lattice(problem, most=MOST_GROUPS)

    def run(
        self, seconds: float | None = None, shortest: bool = False, patient: bool = False
    ) -> Solved:
        """Search up to a limit. The next call goes on from there, up to the best known by then.

        Args:
            seconds: counted as work first; ``None``: no limit.
            shortest: whether of plans with equal traffic the shortest is wanted. That takes longer
                where the best that is known is the optimum.
            patient: whether to go on up to the limit though it is plain that it will strike.
        """
        started = time.perf_counter()
        problem, lattice = self.problem, self._lattice
        bound, stopped = problem.unavoidable, ""
        known = problem.best
        ceiling = ANY if known is None else known.dram_bytes - (not shortest)
        try:
            with problem.work.within(seconds):
                if ceiling >= bound:
                    lattice.build(ceiling, early=known is not None and not patient)
                    bound = max(bound, lattice.bound)
                    StepSearch(lattice, ceiling).run()
                if problem.best is not None:
                    bound = problem.best.dram_bytes
        except (TooWide, OutOfWork) as reason:
            stopped = str(reason)
            self.too_wide = isinstance(reason, TooWide)
        spent = time.perf_counter() - started
        return Solved(problem.best, bound, lattice.groups, spent, stopped)


def with_residents(problem: StepProblem, masks: Sequence[int], width: int = _WIDTH) -> Found | None:
    """Steps that are given, with good residents; ``None`` where the steps do not fit.

    They are the best where no more than ``width`` sets compete at any step.

    Raises:
        OutOfWork: where a limit of the problem's work strikes first.
    """
    lattice = Lattice(problem, fixed=_chain(masks)).build()
    return StepSearch(lattice, width=width).run() if 0 in lattice.left else None


def best_residents(
    problem: StepProblem, masks: Sequence[int], seconds: float | None = None
) -> tuple[Found | None, bool]:
    """Steps that are given with the best ways and residents; and whether these are proved the best.

    Where that takes longer than ``seconds``, or a step makes too many tensors, those of
    :func:`with_residents`. Nothing is found where no residents keep to the pins.
    """
    lattice = Lattice(problem, fixed=_chain(masks)).build()
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
                lattice = Lattice(problem, ceiling, _WINDOW_GROUPS, fixed, inside).build()
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
