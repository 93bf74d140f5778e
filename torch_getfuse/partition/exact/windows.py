"""A plan made better in windows: what lies between two of its down-sets is searched whole, in turn.

A graph with too many down-sets for a proof still has few between two that lie near each other. So
some groups that come next to each other in a plan are replaced by the best that can stand there
(:mod:`.backward`), window after window, each half a window further, until none gets better. Which
groups stand next to each other depends on the order in which the plan runs: rounds along its
branches take turns with rounds across them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch_getfuse.ordering import topological_order
from torch_getfuse.partition.exact.backward import Backward, Conflicts
from torch_getfuse.partition.exact.chains import Chains
from torch_getfuse.partition.exact.down_set_table import Window
from torch_getfuse.partition.exact.down_sets import Limits, TooWide
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem, SearchResult
from torch_getfuse.partition.work import OutOfWork

_BORDER = 16
"""Operators on either side of a border."""

_SIZES = (
    (40, 400, "each"),
    (20, 400, "each"),
    (40, 1_000, "rows"),
    (20, 1_000, "rows"),
    (10, 2_000, "each"),
    (2 * _BORDER, 2_000, "borders"),
)
"""Operators of a window, two groups at least; the most down-sets that it may have; and what moves:
each block, those in a row together, or only the rows between two groups. The next is tried where
there are more down-sets, or it takes too long."""

_STEPS = 500_000
"""Of work that one window may take."""


def windows(
    problem: FusionProblem, known: SearchResult, limits: Limits | None = None
) -> SearchResult:
    """A plan that is never worse than a known one, and that no window makes better.

    Args:
        problem: graph, cost model and buffer; the cost model must be additive.
        known: a legal plan.
        limits: the seconds that it may take.

    Returns:
        The best plan by the end or the limit, without a bound. ``plans``: groups looked at.
    """
    started = time.perf_counter()
    stopped = ""
    with problem.evaluator.work.finishing():
        run = _Windows(problem, known)
    try:
        with problem.evaluator.work.within((limits or Limits()).seconds):
            run.run()
    except OutOfWork as reason:
        stopped = str(reason)
    with problem.evaluator.work.finishing():
        groups = run.plan()
        found = replace(known, groups=groups, dram_bytes=problem.cost(groups))
    return replace(
        found if found.dram_bytes < known.dram_bytes else known,
        plans=run.looked,
        seconds=time.perf_counter() - started,
        lower_bound_bytes=0,
        history=(),
        stopped=stopped,
    )


class _Step(NamedTuple):
    """A group of the plan.

    Attributes:
        group: its mask, with what it may start with in place, which another has as well.
        own: the blocks that it adds to the down-set before it.
        dram: bytes that it moves.
    """

    group: int
    own: int
    dram: int


class _Windows:
    """One run.

    Attributes:
        looked: groups that were looked at.
    """

    def __init__(self, problem: FusionProblem, known: SearchResult) -> None:
        self.problem = problem
        self.chains = Chains(problem)
        self.looked = 0
        self._conflicts: Conflicts = defaultdict(list)
        self._steps = self._as_steps(self.chains.start, known.groups)

    def run(self) -> None:
        """Round after round, until one along the branches and one across them find nothing.

        Raises:
            OutOfWork: at a limit; what was found remains.
        """
        idle, along = 0, True
        while idle < 2:
            before = self._dram()
            self._steps = self._ordered(along)
            self._round()
            idle = idle + 1 if self._dram() == before else 0
            along = not along

    def plan(self) -> tuple[int, ...]:
        """The groups as they are now, each operator in one."""
        return self.chains.without_shared([step.group for step in self._steps])

    def _dram(self) -> int:
        return sum(step.dram for step in self._steps)

    def _as_steps(self, done: int, groups: Iterable[int]) -> list[_Step]:
        """Groups in the order in which they run, from a down-set on."""
        found = []
        for group in groups:
            own = 0
            for i in bits(group & ~done):
                own |= self.chains.block[i]
            whole = group | own  # a later group may start with a part of it, but need not for ever
            found.append(_Step(whole, own, self.problem.evaluator.dram(whole)))
            done = self._after(done, own)
        return found

    def _after(self, done: int, own: int) -> int:
        return self.chains.absorb(done | own, self.chains.after(own))

    def _ordered(self, along: bool) -> list[_Step]:
        """The steps in another order in which they can run.

        Args:
            along: whether a branch is followed to its end before the next, or the first operators
                say which step comes first.
        """
        steps = self._steps
        home = {i: k for k, step in enumerate(steps) for i in bits(step.own)}
        waits: list[set[int]] = [set() for _ in steps]
        unfusable = self.chains.unfusable
        for k, step in enumerate(steps):
            pending = step.own
            while pending:  # through unfusable operators, which belong to no step
                before = 0
                for i in bits(pending):
                    before |= self.chains.predecessors[i]
                waits[k].update(home[i] for i in bits(before & ~unfusable))
                pending = before & unfusable
            waits[k].discard(k)
        first = [step.own & -step.own for step in steps]
        if not along:
            order = topological_order(waits, first.__getitem__)
            assert order is not None, "the groups of a legal plan have an order"
        else:
            order = _along_branches(waits, first)
        return [steps[k] for k in order]

    def _round(self) -> None:
        """Search window after window, from the start to the end."""
        at, start = 0, self.chains.start
        while at < len(self._steps):
            window = self._improve(at, start)
            # Half a window further; a step at least.
            operators = sum(step.own.bit_count() for step in self._steps[at : at + window])
            passed = 0
            while True:
                own = self._steps[at].own
                start = self._after(start, own)
                at, passed = at + 1, passed + own.bit_count()
                if at == len(self._steps) or 2 * passed >= operators:
                    break

    def _improve(self, at: int, start: int) -> int:
        """Replace the steps of the window that begins with one by better ones, if there are any.

        Args:
            at: the first step.
            start: the down-set before it.

        Returns:
            How many steps the window has now.
        """
        work = self.problem.evaluator.work
        for operators, most, moves in _SIZES:
            count, end = self._extent(at, start, operators)
            steps = self._steps[at : at + count]
            dram = sum(step.dram for step in steps)
            chains = self.chains
            if moves != "each":
                chains = chains.coarser(self._units(steps, moves == "borders"))
            search = None
            try:
                with work.steps_within(_STEPS):
                    search = Backward(
                        self.problem, chains, Window(start, end, most), dram, self._conflicts
                    )
                    search.run()
            except (TooWide, OutOfWork):
                work.check()  # ends here where the limit of all windows has struck
                continue
            finally:
                self.looked += search.looked if search is not None else 0
            groups = search.groups_from(0)
            if groups:
                self._steps[at : at + count] = self._as_steps(start, groups)
            return len(groups) or count
        return 1

    def _units(self, steps: Sequence[_Step], borders: bool) -> list[int]:
        """What stays together in a window."""
        units = []
        for k, step in enumerate(steps):
            free = step.own
            if borders:
                blocks = [b for i in bits(free) if (b := self.chains.block[i]) & -b == 1 << i]
                few = blocks[-_BORDER:] if k == 0 else blocks[:_BORDER]
                free = sum(few)
                if free != step.own:
                    units.append(step.own & ~free)
            units += self.chains.rows(free)
        return units

    def _extent(self, at: int, start: int, operators: int) -> tuple[int, int]:
        """Steps of a window of so many operators at most, or two steps; the down-set after them."""
        end, count, size = start, 0, 0
        for step in self._steps[at:]:
            size += step.own.bit_count()
            if count >= 2 and size > operators:
                break
            end, count = self._after(end, step.own), count + 1
        return count, end


def _along_branches(waits: list[set[int]], first: list[int]) -> list[int]:
    """Steps in an order in which each is followed by one that waited for it, where one is ready.

    Args:
        waits: per step, those that come before it.
        first: of several that are ready, the one with the least comes first.
    """
    follows: list[list[int]] = [[] for _ in waits]
    for k, before in enumerate(waits):
        for other in before:
            follows[other].append(k)
    left = [len(before) for before in waits]
    ready = sorted((k for k, count in enumerate(left) if not count), key=lambda k: -first[k])
    order = []
    while ready:
        k = ready.pop()
        order.append(k)
        freed = []
        for other in follows[k]:
            left[other] -= 1
            if not left[other]:
                freed.append(other)
        ready += sorted(freed, key=lambda other: -first[other])
    return order
