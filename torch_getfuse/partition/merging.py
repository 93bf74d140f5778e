"""Greedy merging: the two neighbouring groups that save most become one, until none save anything.

From single blocks upwards. What a pair saves depends on these two alone, so that after each merge
only the pairs of the new group are offered; and priced only those that come to be the best. A merge
that would close a cycle is never made: of the groups on a path around it, each stays in the way
until it becomes part of one of the two.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping

from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem, SearchResult
from torch_getfuse.partition.work import OutOfWork

_NEAR, _OFFER, _MEMBER = 4, 4, 3
"""Steps counted for each group that is passed on a path around a merge; for a pair that is offered,
and each operator of it."""


def merge_greedily(problem: FusionProblem, seconds: float | None = None) -> SearchResult:
    """The plan that merging gives, the pair that saves most first.

    Args:
        problem: graph, cost model and buffer; each of its blocks must be valid.
        seconds: counted as work first; ``None``: no limit. At a limit, the plan by then.

    Returns:
        A legal plan, without a bound. ``plans``: pairs that were priced.
    """
    started = time.perf_counter()
    stopped = ""
    with problem.evaluator.work.finishing():
        merging = _Merging(problem)
    try:
        with problem.evaluator.work.within(seconds):
            merging.run()
    except OutOfWork as reason:
        stopped = str(reason)
    with problem.evaluator.work.finishing():
        groups = problem.order(merging.groups())
        assert groups is not None, "no merge closes a cycle"
        dram = problem.cost(groups)
    spent = time.perf_counter() - started
    return SearchResult(groups, dram, merging.priced, spent, stopped=stopped)


class _Merging:
    """One run.

    Attributes:
        priced: pairs so far.
    """

    def __init__(self, problem: FusionProblem) -> None:
        self.problem = problem
        self.priced = 0
        self._near = problem.near
        self._home = {i: block for block in problem.blocks for i in bits(block)}
        self._agains: dict[int, int] = {}
        # Bytes saved (the most first), the union, the two groups, and whether these bytes are sure.
        self._offers: list[tuple[int, int, int, int, bool]] = []

    def groups(self) -> list[int]:
        """As they are now."""
        return list(dict.fromkeys(self._home.values()))

    def run(self) -> None:
        """Merge until no pair saves anything.

        Raises:
            OutOfWork: at a limit.
        """
        for block in self.problem.blocks:
            self._offer(block, once=True)
        while self._offers:
            _, union, one, other, sure = heapq.heappop(self._offers)
            if not self._is_group(one) or not self._is_group(other):
                continue
            if not sure:
                self._price(union, one, other)
            elif not path_around(self.problem, self._home, one, other):
                for i in bits(union):
                    self._home[i] = union
                self._offer(union)

    def _is_group(self, group: int) -> bool:
        return self._home[(group & -group).bit_length() - 1] == group

    def _offer(self, group: int, once: bool = False) -> None:
        """Offer the pairs of a group; ``once``: of two groups that both are offered, by one.

        They may save what they do if nothing is read again: whether they are valid and what they
        read again is asked where that is the most that any pair saves.
        """
        near = 0
        for i in bits(group):
            near |= self._near[i]
        others = dict.fromkeys(self._home[i] for i in bits(near & ~group) if i in self._home)
        for other in others:
            if once and other < group:
                continue
            saved = self._again(group) + self._again(other) + self._shared(group, other)
            if saved > 0:
                heapq.heappush(self._offers, (-saved, group | other, group, other, False))

    def _again(self, group: int) -> int:
        """What a group moves beyond everything once."""
        if group not in self._agains:
            problem = self.problem
            problem.evaluator.work.add(_MEMBER * group.bit_count())
            self._agains[group] = problem.cost((group,)) - problem.moved(group)
        return self._agains[group]

    def _shared(self, one: int, other: int) -> int:
        """What two groups save by the tensors that they both touch."""
        fewer, more = sorted((one, other), key=int.bit_count)
        self.problem.evaluator.work.add(_OFFER + _MEMBER * fewer.bit_count())
        saved = 0
        for i in bits(fewer):
            for crossing in self.problem.crossings_of[i]:
                inside = crossing.touched & fewer
                if crossing.touched & more and inside & -inside == 1 << i:  # once for each tensor
                    saved += crossing.moved(one) + crossing.moved(other)
                    saved -= crossing.moved(one | other)
        return saved

    def _price(self, union: int, one: int, other: int) -> None:
        """Offer a pair for what it saves, if its union is valid."""
        problem = self.problem
        self.priced += 1
        if problem.evaluator.valid(union):
            saved = problem.cost((one, other)) - problem.evaluator.dram(union)
            if saved > 0:
                heapq.heappush(self._offers, (-saved, union, one, other, True))


def path_around(problem: FusionProblem, home: Mapping[int, int], one: int, other: int) -> bool:
    """Whether a path leaves two groups and comes back: as one they would wait for themselves.

    Args:
        problem: counts the work.
        home: by fusable operator, the group that it is in.
        one, other: two of these groups.
    """
    union, successors = one | other, problem.graph.successors
    seen, waiting = union, [union]
    while waiting:
        ahead = 0
        for i in bits(waiting.pop()):
            ahead |= successors[i]
        if ahead & union and seen != union:
            return True
        for i in bits(ahead & ~seen):
            if not seen >> i & 1:
                group = home.get(i, 1 << i)  # unfusable operators are no group
                seen |= group
                waiting.append(group)
                problem.evaluator.work.add(_NEAR)
    return False
