"""Exact search for wide graphs: the cheapest cover by legal groups, as an integer program.

Every legal plan covers each block of operators by exactly one connected, convex, valid group, so

    min sum F_D(S) x_S   with   sum over S containing b of x_S = 1 for every block b,   x binary

is a relaxation of the planning problem: it drops only the rule that the groups must not depend on
each other in a cycle, and a solution that breaks it is cut off and the program solved again. The
groups are listed once: from each block, add a neighbour and what lies between, as long as
``FusionScheme.floor`` allows (it must bound *every* convex group that contains the set, which
LBDF's does). The list grows with the depth of the graph, not with the product of its branches.

The linear relaxation is solved by HiGHS. Its bound is not taken on trust: the dual prices are
checked against every group of the list and lowered until none is violated, and weak duality then
makes their sum a lower bound (``docs/exact-search.md``). On CNNs the relaxation is nearly always
integral, so that the bound is the optimum itself.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csc_matrix, csr_matrix, vstack

from torch_getfuse.partition.group import bits, topological_order
from torch_getfuse.partition.problem import FusionProblem, SearchResult

MAX_SETS = 250_000


@dataclass(frozen=True)
class Candidates:
    """Groups that a plan may use.

    Attributes:
        groups: masks of valid groups.
        complete: whether these are all; without that they bound nothing.
        seen: sets looked at.
    """

    groups: tuple[int, ...]
    complete: bool
    seen: int


def list_groups(
    problem: FusionProblem, seconds: float = math.inf, most: int = MAX_SETS
) -> Candidates:
    """All connected, convex, valid groups of a problem, smallest first, up to ``most`` sets.

    Complete: a convex connected group is reached from any of its blocks through convex connected
    subsets, each by adding a neighbour inside the group and what lies between.
    """
    started = time.perf_counter()
    evaluator, unfusable = problem.evaluator, problem.unfusable
    above, below, near = problem.above, problem.below, problem.near
    block = [0] * len(problem.graph)
    for mask in problem.blocks:
        for i in bits(mask):
            block[i] = mask

    def reach(mask: int) -> tuple[int, int, int]:
        up = down = beside = 0
        for i in bits(mask):
            up |= above[i]
            down |= below[i]
            beside |= near[i]
        return up, down, beside

    surroundings = {mask: reach(mask) for mask in problem.blocks}
    layer = [(mask, *surroundings[mask]) for mask in problem.blocks]
    seen = set(problem.blocks)
    groups = []
    while layer:
        following = []
        for mask, up, down, beside in layer:
            if evaluator.hopeless(mask):
                continue
            if evaluator.valid(mask):
                groups.append(mask)
            tried = mask | unfusable
            while fresh := beside & ~tried:
                other = block[(fresh & -fresh).bit_length() - 1]
                tried |= other
                grown, up2, down2, beside2 = mask, up, down, beside
                extra = other
                while extra & ~unfusable:
                    grown |= extra
                    while extra:
                        part = block[(extra & -extra).bit_length() - 1]
                        extra &= ~part
                        own = surroundings[part]
                        grown |= part
                        up2, down2, beside2 = up2 | own[0], down2 | own[1], beside2 | own[2]
                    extra = up2 & down2 & ~grown
                    if extra & unfusable:
                        break
                if extra or grown in seen:
                    continue
                seen.add(grown)
                following.append((grown, up2, down2, beside2))
            if len(seen) > most or time.perf_counter() - started > seconds:
                return Candidates(tuple(groups), False, len(seen))
        layer = following
    return Candidates(tuple(groups), True, len(seen))


def cover(
    problem: FusionProblem, known: SearchResult, seconds: float = math.inf, most: int = MAX_SETS
) -> SearchResult:
    """The best plan made of listed groups, and a proved lower bound.

    Args:
        problem: graph, cost model (whose floor must bound all larger convex groups) and buffer.
        known: a legal plan; its groups join the list, so that the result is never worse.
        seconds: wall time for the list; the programs get as much again.
        most: sets to look at before the list is given up as too long.

    Returns:
        The plan. Its bound is its own cost where it is proved optimal; where the list is
        incomplete, only the traffic that no plan avoids.
    """
    started = time.perf_counter()
    listed = list_groups(problem, seconds, most)
    groups = tuple(dict.fromkeys((*listed.groups, *known.groups)))
    program = _Program(problem, groups)
    bound = program.bound() if listed.complete else unavoidable(problem)
    best, proved = program.solve(known, seconds)
    if listed.complete:
        bound = max(bound, proved)
    return SearchResult(
        groups=best,
        dram_bytes=problem.cost(best),
        plans=len(groups),
        seconds=time.perf_counter() - started,
        lower_bound_bytes=min(bound, problem.cost(best)),
        stopped="" if listed.complete else "too many groups",
    )


def unavoidable(problem: FusionProblem) -> int:
    """Weights once, inputs read once, outputs written once: bytes that every plan moves."""
    return sum(size for maker, readers, size in problem.duties if not (readers and maker))


class _Program:
    """The integer program over a list of groups."""

    def __init__(self, problem: FusionProblem, groups: tuple[int, ...]) -> None:
        self.problem = problem
        self.groups = groups
        row = {}
        first = 0
        for k, block in enumerate(problem.blocks):
            row[block & -block] = k
            first |= block & -block
        rows, starts = [], [0]
        for group in groups:
            rows += [row[1 << i] for i in bits(group & first)]
            starts.append(len(rows))
        shape = (len(problem.blocks), len(groups))
        self.matrix = csc_matrix((np.ones(len(rows)), rows, starts), shape=shape)
        self.costs = np.array([problem.evaluator.dram(group) for group in groups], dtype=float)

    def bound(self) -> int:
        """A lower bound in bytes by weak duality, whatever the solver's accuracy.

        Prices ``p`` with ``sum of p over a group <= F_D(group)`` for all groups give ``sum p <=
        F_D`` of every plan. The solver's prices may violate that by rounding; lowering each by
        the worst violation (a group has at least one block) mends it.
        """
        ones = np.ones(self.matrix.shape[0])
        found = linprog(self.costs, A_eq=self.matrix, b_eq=ones, bounds=(0, None), method="highs")
        if found.status != 0:
            return unavoidable(self.problem)
        prices = np.asarray(found.eqlin.marginals, dtype=float)
        prices = prices - max(0.0, float((self.matrix.T @ prices - self.costs).max()))
        # Costs are whole bytes, so is the optimum; half a byte is far above the sum's rounding.
        return math.ceil(math.fsum(prices) - 0.5)

    def solve(self, known: SearchResult, seconds: float) -> tuple[tuple[int, ...], int]:
        """The cheapest acyclic choice found, in an order in which it can run, and a bound."""
        ended = time.perf_counter() + seconds
        cuts: list[csr_matrix] = []
        while True:
            left = ended - time.perf_counter()
            if left <= 0:
                return known.groups, 0
            chosen, bound = self._choose(cuts, left)
            if chosen is None:
                return known.groups, 0
            picked = [self.groups[k] for k in chosen]
            alone = [1 << i for i in bits(self.problem.unfusable)]
            order = topological_order([*picked, *alone], self.problem.graph)
            if order is not None:
                best = tuple(picked[k] for k in order if k < len(picked))
                better = self.problem.cost(best) <= known.dram_bytes
                return best if better else known.groups, bound
            # These groups depend on each other in a cycle: not all of them again.
            loop = self._cycle(chosen)
            data = (np.ones(len(loop)), ([0] * len(loop), loop))
            cuts.append(csr_matrix(data, shape=(1, len(self.groups))))

    def _choose(self, cuts: list[csr_matrix], seconds: float) -> tuple[list[int] | None, int]:
        constraints = [LinearConstraint(self.matrix, 1, 1)]
        if cuts:
            sizes = np.array([cut.nnz - 1 for cut in cuts])
            constraints.append(LinearConstraint(vstack(cuts), -np.inf, sizes))
        options = {"mip_rel_gap": 0.0}
        if seconds < math.inf:
            options["time_limit"] = seconds
        found = milp(
            self.costs,
            constraints=constraints,
            integrality=np.ones(len(self.groups)),
            bounds=Bounds(0, 1),
            options=options,
        )
        if found.x is None:
            return None, 0
        # The solver's own bound, less its tolerance of 1e-6 of the value.
        bound = math.floor(found.mip_dual_bound * (1 - 1e-6)) if found.mip_dual_bound else 0
        return [int(k) for k in np.flatnonzero(found.x > 0.5)], bound

    def _cycle(self, chosen: list[int]) -> list[int]:
        """Chosen groups on a cycle: those left when none without open producers remains."""
        graph = self.problem.graph
        alone = [1 << i for i in bits(self.problem.unfusable)]
        blocks = {k: self.groups[k] for k in chosen}
        blocks.update({-1 - n: mask for n, mask in enumerate(alone)})
        while True:
            done = [
                k
                for k, mask in blocks.items()
                if not any(
                    graph.predecessors[i] & other
                    for i in bits(mask)
                    for j, other in blocks.items()
                    if j != k
                )
            ]
            if not done:
                return [k for k in blocks if k >= 0]
            for k in done:
                del blocks[k]
