"""Greedy recursive tree split: Algorithm 1 of arXiv 2501.00636 (docs/method.md, section 8).

An invalid group is cut at the edges that an explanation returns (:mod:`edge_cuts`), and each cut
falls into a category: 1 if both sides are valid, 2 if one is, 3 if none is. If there is a cut of
category 1, the one with the least ``F_D`` sum ends the recursion; else a rule picks a cut of
category 2 and the recursion continues on its invalid side; else cuts of category 3 are tried, the
most even first, and the one whose parts end up with the least ``F_D`` sum is taken.

Trying several cuts of category 3 at every level would take exponential time. So a group is solved
with a *width*, the number of trees that may be grown for it: initially ``branch ** 2``, divided
evenly among the cuts tried. Once it is down to 1, only the most even cut is followed. As the parts
of one tree are disjoint, at most ``branch ** 2`` groups per operator of the graph are explained.

The edges come from an :class:`EdgeRanker`; nothing here depends on a neural network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from random import Random
from typing import Protocol

from torch_getfuse.errors import OptionError, nearest
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem, SearchInterrupted, SearchResult
from torch_getfuse.partition.search.edge_cuts import Edge, edge_cuts
from torch_getfuse.partition.search.merge_resplit import regroup
from torch_getfuse.partition.search.random_split import Closures, RandomSplit
from torch_getfuse.partition.search.run import executable
from torch_getfuse.partition.work import INTERRUPTED, STEPS_PER_SECOND, OutOfWork

RULES = ("least_traffic", "most_operators")


class EdgeRanker(Protocol):
    """Explains why a group is invalid, by edges.

    ``explainer=`` takes a factory, called as ``explainer(problem, seed)``: a class with this
    method, or a function that returns a ranker. Its optional attribute ``steps`` is the work
    counted per explanation (``partition/work.py``), in addition to that by the size of the group.
    """

    def __call__(self, group: int) -> list[tuple[Edge, float]]:
        """Solution edges inside a group (producer, consumer) with their scores, best first.

        ``group`` is a bit mask over ``graph.ops``, and an edge a pair of positions in it. The
        answer for a group must not depend on earlier calls: it is cached.
        """
        ...


def group_edges(graph: OpGraph, group: int) -> list[Edge]:
    """Every edge inside a group, by producer and then consumer."""
    return [(i, j) for i in bits(group) for j in bits(graph.readers[i] & group)]


def all_edges(graph: OpGraph) -> EdgeRanker:
    """The exhaustive baseline: every edge, all with score 1."""

    def rank(group: int) -> list[tuple[Edge, float]]:
        return [(edge, 1.0) for edge in group_edges(graph, group)]

    return rank


SET_LIMIT = "set limit"
"""Why a direct plan was not finished, if not because of a limit on work."""

_EXPLAINED, _CUTS, _SIDES = 10, 10, 20
"""Steps counted per operator of an explanation, per cut, and per cut whose sides are computed."""
_BLOCKS, _TENSORS = 4, 4  # blocks or tensors visited per step counted

RANDOM_SHARE = 0.5
"""Share of a group's edges that the random baseline returns: about as many as explainers do."""


def random_edges(graph: OpGraph, share: float = RANDOM_SHARE, seed: int = 0) -> EdgeRanker:
    """The random baseline: a share of a group's edges, at least one; the same at every call."""

    def rank(group: int) -> list[tuple[Edge, float]]:
        edges = group_edges(graph, group)
        rng = Random(f"{seed}:{group}")
        count = max(1, round(share * len(edges)))
        scored = [(edge, rng.random()) for edge in rng.sample(edges, min(count, len(edges)))]
        return sorted(scored, key=lambda entry: -entry[1])

    return rank


def all_ranker(problem: FusionProblem, seed: int) -> EdgeRanker:
    """``explainer="all"``."""
    return all_edges(problem.graph)


def random_ranker(problem: FusionProblem, seed: int) -> EdgeRanker:
    """``explainer="random"``."""
    return random_edges(problem.graph, seed=seed)


class RecursiveSplit:
    """Splits invalid groups at the edges of an explanation; a repair for searches.

    A group is first split by the cuts of its own explanation. If these do not suffice,
    every part that is still invalid is explained again. Implements
    :class:`~torch_getfuse.partition.problem.Repair`; results are cached by group.

    Args:
        problem: the problem; its blocks are never split (a cut through one is moved to either
            end of it).
        ranker: where solution edges come from.
        rule: which cut of category 2: ``"least_traffic"`` (least added traffic per operator of
            the valid side) or ``"most_operators"`` (the paper's: the largest valid side).
        branch: cuts of category 3 that are tried at most.
        name: name of this repair in reports.
        ranked: steps counted per call of the ranker, in addition to those by size.

    Attributes:
        attempts: distinct invalid groups passed to it.
        rectified: of these, those that the cuts of their own explanation split into valid groups.
        queries: groups that were explained.

    Raises:
        OptionError: for an unknown rule, or a branch below 1.
    """

    def __init__(
        self,
        problem: FusionProblem,
        ranker: EdgeRanker,
        rule: str = "least_traffic",
        branch: int = 4,
        name: str = "explained",
        ranked: int = 0,
    ) -> None:
        if rule not in RULES:
            raise OptionError(f"split_rule={rule!r} is not one of {RULES}{nearest(rule, RULES)}")
        if branch < 1:
            raise OptionError(f"branch={branch!r} is not a number of cuts from 1 up")
        self.name = name
        self._ranked = ranked
        self.attempts = 0
        self.rectified = 0
        self.queries = 0
        self._problem = problem
        self._ranker = ranker
        self._cutter = _Cutter(problem, rule, branch)
        self._width = branch * branch
        self._edges: dict[int, list[Edge]] = {}
        self._answers: dict[int, tuple[int, ...] | None] = {}
        self._tree = _Tree(self._cutter, self._explain)

    @property
    def rectify_rate(self) -> float:
        """``rectified / attempts``; 0 before the first attempt."""
        return self.rectified / self.attempts if self.attempts else 0.0

    def __call__(self, group: int, rng: Random) -> list[int] | None:
        """Valid groups that cover ``group``, or ``None`` if the explanations give no cut.

        ``rng`` is not used: explanations are deterministic.
        """
        if group not in self._answers:
            self._answers[group] = self._split(group)
        groups = self._answers[group]
        return None if groups is None else list(groups)

    def direct(
        self, time_limit: float | None = None, polish: bool = True, sets: int | None = None
    ) -> SearchResult:
        """The plan that results from splitting the whole fusable graph as one invalid group.

        A part is split at random if the explanations give no cut for it or no time is left.

        Args:
            time_limit: seconds, converted to counted work (``partition/work.py``), or ``None``.
            polish: merge and resplit neighbouring groups at the end (:mod:`merge_resplit`);
                ``False`` for Algorithm 1 alone.
            sets: distinct sets to examine, at most.

        Raises:
            SearchInterrupted: for a ``KeyboardInterrupt`` during the polish.
        """
        started = time.perf_counter()
        problem = self._problem
        plan: list[int] = []
        stopped = ""
        work = problem.evaluator.work
        self._cutter.sets = sets
        first_step = work.steps
        solved: list[tuple[int, list[int] | None]] = []
        with work.within(time_limit):
            for part in convex_parts(problem, problem.fusable):
                try:
                    solved.append((part, self._tree.solve([part], self._width)))
                except OutOfWork as limit:
                    solved.append((part, None))
                    stopped = str(limit)
        for part, groups in solved:
            plan += self._at_random(part) if groups is None else groups
        with work.finishing():
            history = [(self._cutter.examined, problem.cost(plan))]

        def result() -> SearchResult:
            with work.finishing():
                return SearchResult(
                    groups=executable(problem, tuple(plan)),
                    dram_bytes=problem.cost(plan),
                    plans=self._cutter.examined,
                    seconds=time.perf_counter() - started,
                    history=tuple(history),
                    stopped=stopped,
                )

        try:
            if polish and not stopped:
                spent = (work.steps - first_step) / STEPS_PER_SECOND
                with work.within(None if time_limit is None else time_limit - spent):
                    for better in regroup(problem, plan, self._tree.halve):
                        plan = list(better)
                        history.append((self._cutter.examined, problem.cost(plan)))
        except OutOfWork as limit:
            stopped = str(limit)
        except KeyboardInterrupt as error:
            stopped = INTERRUPTED
            raise SearchInterrupted(result()) from error
        finally:
            self._cutter.sets = None
        return result()

    @cached_property
    def _random_split(self) -> RandomSplit:
        return RandomSplit(self._problem)

    def _at_random(self, part: int) -> list[int]:
        """Valid groups that cover a connected set: a random split, or its blocks if time is up."""
        try:
            return self._random_split(part, Random(0))
        except OutOfWork:
            return [block for block in self._problem.blocks if block & part]

    def _split(self, group: int) -> tuple[int, ...] | None:
        parts = convex_parts(self._problem, group)
        if parts == [group] and self._cutter.valid(group):
            return (group,)
        self.attempts += 1
        groups = self.cut(group, self._explain(group))
        if groups is not None:
            self.rectified += 1
            return tuple(groups)
        groups = self._tree.solve(parts, self._width)
        return None if groups is None else tuple(groups)

    def cut(self, group: int, edges: Sequence[Edge]) -> list[int] | None:
        """Valid parts of a group by cuts at the given edges alone; ``None`` if they do not suffice.

        No part is explained again: this is what the rectify rate counts.
        """
        tree = _Tree(
            self._cutter, lambda part: [e for e in edges if part >> e[0] & part >> e[1] & 1]
        )
        return tree.solve(convex_parts(self._problem, group), self._width)

    def _explain(self, group: int) -> list[Edge]:
        if group not in self._edges:
            self._problem.evaluator.work.add(self._ranked + _EXPLAINED * group.bit_count())
            self.queries += 1
            self._edges[group] = [edge for edge, _ in self._ranker(group)]
        return self._edges[group]


def direct(
    problem: FusionProblem, ranker: EdgeRanker, rule: str = "least_traffic", branch: int = 4
) -> SearchResult:
    """The direct method of docs/method.md, section 9: :meth:`RecursiveSplit.direct`.

    ``plans`` of the result counts the groups whose validity was evaluated.

    Raises:
        OptionError: for an unknown rule, or a branch below 1.
    """
    return RecursiveSplit(problem, ranker, rule, branch).direct()


def convex_parts(problem: FusionProblem, group: int) -> list[int]:
    """Cut a set of operators where a path leaves and re-enters it through an unfusable operator.

    Each such operator cuts at its topological position, in topological order. The parts of the
    whole fusable graph are intervals of positions: a path that leaves one and comes back stays
    in the interval, so it would have to pass an unfusable operator there, and none is left. So
    their connected parts, which are returned, form no cycle. A block has one position and is never
    split.
    """
    parts = []
    done = 0
    for block in problem.in_order:
        u = block.bit_length() - 1
        if block & problem.unfusable and problem.above[u] & group and problem.below[u] & group:
            # Everything before u, not only what u depends on: otherwise parallel branches could
            # depend on each other through several such operators.
            parts += problem.parts(group & done)
            group &= ~done
        done |= block
    return parts + problem.parts(group)


class _Cutter:
    """Cuts of groups along block borders, and how they rank; shared by all trees of a split."""

    def __init__(self, problem: FusionProblem, rule: str, branch: int) -> None:
        self.problem = problem
        self.rule = rule
        self.branch = branch
        self.sets: int | None = None
        self._count = problem.evaluator.work.add
        self._valid: dict[int, bool] = {}
        self._several = [block for block in problem.blocks if block & (block - 1)]
        self._closures = Closures(problem)
        self._traffic: dict[int, int] = {}
        graph = problem.graph
        self._tensors = [
            (
                1 << graph.producer[name] if name in graph.producer else 0,
                sum(1 << c for c in graph.consumers[name]),
                size,
                name in graph.outputs,
            )
            for name, size in graph.tensor_bytes.items()
        ]

    @property
    def examined(self) -> int:
        """Number of distinct sets whose validity was evaluated."""
        return len(self._valid)

    def valid(self, mask: int) -> bool:
        """Whether a set is valid; raises :class:`OutOfWork` at a limit."""
        if mask not in self._valid:
            if self.sets is not None and len(self._valid) >= self.sets:
                raise OutOfWork(SET_LIMIT)
            self._valid[mask] = self.problem.evaluator.valid(mask)
        return self._valid[mask]

    def cuts(self, group: int, edges: Sequence[Edge]) -> list[int]:
        """Upper sides of all candidate cuts of a group of whole blocks, each once."""
        above, below = self.problem.above, self.problem.below
        uppers: dict[int, None] = {}
        steps = _CUTS + len(self._several) // _BLOCKS
        for edge in edges:
            for upper in edge_cuts(group, edge, above, below):
                self._count(steps)
                # Moved to either end of the blocks that it goes through.
                larger = smaller = upper
                for block in self._several:
                    if block & upper and block & ~upper:
                        first = (block & -block).bit_length() - 1
                        larger |= self._closures.upstream(first) & group
                        smaller &= ~self._closures.downstream(first)
                uppers[larger] = None
                uppers[smaller] = None
        return [upper for upper in uppers if upper and upper != group]

    def sides(self, group: int, upper: int) -> tuple[list[int], list[int]]:
        """The connected parts of the upper side, and those of the lower side."""
        self._count(_SIDES + group.bit_count())
        return self.problem.parts(upper), self.problem.parts(group & ~upper)

    def rank(self, group: int, good: int) -> float:
        """Rank of a cut of category 2 (the least is taken); ``good`` is the valid side."""
        if self.rule == "most_operators":
            return -good.bit_count()
        added = self.traffic(good) + self.traffic(group & ~good) - self.traffic(group)
        return added / good.bit_count()

    def traffic(self, mask: int) -> int:
        """Bytes of features that cross a set's border; unlike ``F_D``, defined for invalid sets.

        Its differences rank cuts like those of ``F_D`` under LBDF, whose weight term is the same
        for every plan.
        """
        if mask not in self._traffic:
            self._count(len(self._tensors) // _TENSORS + 1)
            total = 0
            for maker, readers, size, output in self._tensors:
                if maker & mask:
                    if output or readers & ~mask:
                        total += size
                elif readers & mask:
                    total += size
            self._traffic[mask] = total
        return self._traffic[mask]


class _Tree:
    """Algorithm 1 with one source of edges.

    Recursion is only as deep as the width can be divided; all other levels are a loop, because a
    cut of category 2 may split off a single operator of hundreds.
    """

    def __init__(self, cutter: _Cutter, edges: Callable[[int], Sequence[Edge]]) -> None:
        self._cutter = cutter
        self._edges = edges
        self._steps: dict[tuple[int, int], list[int] | None] = {}

    def solve(self, groups: Sequence[int], width: int) -> list[int] | None:
        """The valid parts of connected groups, or ``None`` if one of them cannot be cut."""
        valid_parts = []
        waiting = list(reversed(groups))
        while waiting:
            group = waiting.pop()
            if self._cutter.valid(group):
                valid_parts.append(group)
                continue
            key = group, width
            if key not in self._steps:
                self._steps[key] = self._step(group, width)
            parts = self._steps[key]
            if parts is None:
                return None
            waiting += reversed(parts)
        return valid_parts

    def halve(self, group: int) -> list[int] | None:
        """A valid group as it is, else its best cut of category 1; ``None`` if it has none."""
        cutter = self._cutter
        if cutter.valid(group):
            return [group]
        best: tuple[int, list[int]] | None = None
        for upper in cutter.cuts(group, self._edges(group)):
            first, second = cutter.sides(group, upper)
            parts = [*first, *second]
            if all(map(cutter.valid, parts)):
                cost = cutter.problem.cost(parts)
                if best is None or cost < best[0]:
                    best = cost, parts
        return None if best is None else best[1]

    def _step(self, group: int, width: int) -> list[int] | None:
        """The parts that replace an invalid group; ``None`` if nothing cuts it."""
        cutter = self._cutter
        both: list[tuple[int, list[int]]] = []
        one: list[tuple[float, list[int]]] = []
        none: list[tuple[int, list[int]]] = []
        for upper in cutter.cuts(group, self._edges(group)):
            first, second = cutter.sides(group, upper)
            parts = [*first, *second]
            good_first = all(map(cutter.valid, first))
            good_second = all(map(cutter.valid, second))
            if good_first and good_second:
                both.append((cutter.problem.cost(parts), parts))
            elif both:
                continue
            elif good_first or good_second:
                good = upper if good_first else group & ~upper
                one.append((cutter.rank(group, good), parts))
            elif not one:
                imbalance = abs(2 * upper.bit_count() - group.bit_count())
                none.append((imbalance, parts))
        for ranked in (both, one):
            if ranked:
                return min(ranked, key=lambda entry: entry[0])[1]
        none.sort(key=lambda entry: entry[0])
        tried = min(cutter.branch, width, len(none))
        if tried < 2:
            return none[0][1] if none else None
        best: tuple[int, list[int]] | None = None
        for _, parts in none[:tried]:
            solved = self.solve(parts, width // tried)
            if solved is not None:
                cost = cutter.problem.cost(solved)
                if best is None or cost < best[0]:
                    best = cost, solved
        return None if best is None else best[1]
