"""Exact search for wide graphs: the cheapest cover by legal groups, as a linear program.

Every legal plan covers each block of operators by exactly one connected, convex, valid group, so

    min sum F_D(S) x_S   with   sum over S containing b of x_S = 1 for every block b,   x >= 0

is a relaxation of the planning problem: it drops the rule that the groups must not depend on each
other in a cycle, and wholeness. On CNNs its solution is nearly always whole.

It is solved by column generation: prices from the groups met so far, then the groups that undercut
them, until none does. Groups that undercut come from a list of all of them where that is short
(:mod:`.listing`), otherwise from :class:`~torch_getfuse.partition.bound.Pricing`. The solver
is never trusted: whatever prices it returns are rounded to whole bytes, and the bound that they
prove is computed here in integers (``docs/exact-search.md``). The plan is then chosen among the
legal groups met, by an integer program.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix, vstack

from torch_getfuse.partition.bound import FINE, Pricing
from torch_getfuse.partition.group import bits, is_connected, is_convex, topological_order
from torch_getfuse.partition.listing import MAX_SETS, Listed, list_groups, program
from torch_getfuse.partition.problem import FusionProblem, SearchResult

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

SMOOTHING = 0.6  # weight of the best prices so far against the linear program's
MOST_COLUMNS = 15_000  # that the integer program is given
# Shares of the time after which each stage ends: list, its prices, its plan, bound, groups, plan.
LISTED, STARTED, FIRST, PRICED, PLANNED, ENDED = 0.1, 0.2, 0.25, 0.75, 0.87, 0.96
TIGHTER = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)  # shares of the buffer that the plan's groups aim at


class Oracle(Protocol):
    """Finds groups that undercut prices."""

    def run(self, prices: Ints, expired: Callable[[], bool] = ...) -> tuple[Ints, list[int]] | None:
        """Per block ``m <= 0`` and sets, or ``None`` if time is up; 1/:data:`FINE` bytes.

        Every legal group can be assigned to one of its blocks, the same for all prices, so that
        ``F_D - prices`` of the group is at least that block's ``m``.
        """
        ...


@dataclass(frozen=True)
class Proof:
    """What column generation reached.

    Attributes:
        bound: no legal plan has less, in bytes.
        sets: masks met; legal groups among them.
        prices: per block, in 1/:data:`FINE` bytes; those that prove the bound.
        finished: whether no better prices exist for this oracle, to a whole byte or so.
    """

    bound: int
    sets: tuple[int, ...]
    prices: Ints
    finished: bool


def prove(
    problem: FusionProblem,
    oracle: Oracle,
    known: SearchResult,
    ended: float = math.inf,
    start: Proof | None = None,
) -> Proof:
    """Raise the lower bound until it meets the linear program, the known plan, or the clock.

    Args:
        problem: the problem; its plans' blocks are priced.
        oracle: finds sets that undercut the prices.
        known: a legal plan; without ``start``, the first prices share its cost out to its blocks.
        ended: moment of ``time.perf_counter`` to stop at.
        start: what is known of sets and prices.
    """
    scheme, blocks = problem.evaluator.scheme, problem.blocks
    sets = start.sets if start else ()
    costs = {mask: scheme.dram(mask, 0).total for mask in (*blocks, *known.groups, *sets)}
    best, best_prices = problem.unavoidable, np.zeros(len(blocks), np.int64)
    centre = start.prices.astype(float) if start else _shares(problem, known) * FINE
    level, step = -(1 << 62), _granularity(problem)
    smoothing, finished = SMOOTHING, False

    def expired() -> bool:
        return time.perf_counter() >= ended

    while not expired():
        matrix, values = program(problem, tuple(costs), costs)
        left = ended - time.perf_counter()
        found = linprog(
            values,
            A_eq=matrix,
            b_eq=np.ones(matrix.shape[0]),
            bounds=(0, None),
            method="highs",
            options={"time_limit": left} if left < math.inf else {},
        )
        if found.status != 0:
            break
        trial = smoothing * centre + (1 - smoothing) * np.asarray(found.eqlin.marginals) * FINE
        prices = np.floor(trial).astype(np.int64)
        answer = oracle.run(prices, expired)
        if answer is None:
            break
        shortfall, undercut = answer
        proved = int(prices.sum() + shortfall.sum())
        if proved > level:
            centre, level = trial, proved
            best_prices = prices
            # Every plan costs the weights and whole multiples of the step.
            base = _weights(problem)
            whole = base - (base * FINE - proved) // (FINE * step) * step
            best = max(best, whole)
        fresh = [group for group in undercut if group not in costs]
        costs.update((group, scheme.dram(group, 0).total) for group in fresh)
        finished = best >= known.dram_bytes or (
            not fresh and (smoothing == 0 or best >= found.fun - step)
        )
        if finished:
            break
        # Prices between the centre and the program's may miss sets that undercut the latter.
        smoothing = SMOOTHING if fresh else 0.0
    return Proof(best, tuple(costs), best_prices, finished)


def cover(
    problem: FusionProblem, known: SearchResult, seconds: float = math.inf, most: int = MAX_SETS
) -> SearchResult:
    """The best plan made of groups that good prices ask for, and a proved lower bound.

    Args:
        problem: graph, cost model (LBDF) and buffer.
        known: a legal plan; its groups join the others, so that the result is never worse.
        seconds: wall time.
        most: sets to look at before the list of all groups is given up as too long.

    Returns:
        The plan and its bound, equal where it is proved optimal. ``stopped`` says whether the
        clock ended the proof.

    Raises:
        OptionError: for a scheme other than LBDF whose groups are too many to list.
    """
    started = time.perf_counter()
    if not problem.blocks:
        return SearchResult((), 0, 0, time.perf_counter() - started)
    listed = list_groups(problem, LISTED * seconds, most)
    share = PRICED if listed.complete else STARTED
    proof = prove(problem, Listed(problem, listed.groups), known, started + share * seconds)
    if listed.complete:
        pool = _pool(problem, proof, known, started + PLANNED * seconds)
    else:
        # Prices of an incomplete list prove nothing, but they and its plan are a good start.
        first = _pool(problem, proof, known, started + STARTED * seconds)
        plan = _Program(problem, first).solve(known, started + FIRST * seconds)
        known = replace(known, groups=plan, dram_bytes=problem.cost(plan))
        pricing = Pricing(problem)
        proof = prove(problem, pricing, known, started + PRICED * seconds, proof)
        pool = _enriched(problem, proof, known, started + PLANNED * seconds)
    plan = _Program(problem, pool).solve(known, started + ENDED * seconds)
    cost = problem.cost(plan)
    return SearchResult(
        groups=plan,
        dram_bytes=cost,
        plans=len(proof.sets),
        seconds=time.perf_counter() - started,
        lower_bound_bytes=proof.bound,
        stopped="" if proof.finished else "time limit",
    )


def _weights(problem: FusionProblem) -> int:
    """Bytes of the weights of everything fusable, which every plan moves once."""
    ops, width = problem.graph.ops, problem.evaluator.scheme.weight_bytes
    return sum(ops[i].weight_elements for i in bits(problem.fusable)) * width


def _granularity(problem: FusionProblem) -> int:
    """The largest step, in bytes, that all tensors' sizes are multiples of."""
    width = problem.evaluator.scheme.activation_bytes
    return math.gcd(*(tensor.elements * width for tensor in problem.graph.tensors.values()))


def _shares(problem: FusionProblem, known: SearchResult) -> Floats:
    """The known plan's cost, each group's shared out by what its blocks would cost alone."""
    dram = problem.evaluator.dram
    shares = np.zeros(len(problem.blocks))
    for group in known.groups:
        inside = [k for k, block in enumerate(problem.blocks) if block & group]
        alone = np.array([max(1, dram(problem.blocks[k])) for k in inside], dtype=float)
        shares[inside] = dram(group) * alone / alone.sum()
    return shares


def _legal(problem: FusionProblem, mask: int) -> bool:
    return (
        is_connected(mask, problem.near)
        and is_convex(mask, problem.above, problem.below)
        and problem.evaluator.valid(mask)
    )


def _repaired(problem: FusionProblem, sets: Iterable[int], ended: float) -> Iterator[int]:
    """The legal groups among ``sets``, and what is legal of the others less one block.

    Ends at a moment of ``time.perf_counter``: the buffer of a large group is slow to compute.
    """
    block_of = {block & -block: block for block in problem.blocks}
    firsts = sum(block_of)
    for mask in sets:
        if time.perf_counter() >= ended:
            return
        if _legal(problem, mask):
            yield mask
            continue
        for i in bits(mask & firsts):
            smaller = mask & ~block_of[1 << i]
            if smaller and time.perf_counter() < ended and _legal(problem, smaller):
                yield smaller


def _promising(problem: FusionProblem, proof: Proof) -> list[int]:
    """The sets met, those first that are cheapest beside the prices."""
    dram = problem.evaluator.scheme.dram
    matrix, costs = program(problem, proof.sets, {m: dram(m, 0).total for m in proof.sets})
    reduced = costs * FINE - matrix.T @ proof.prices
    return [proof.sets[k] for k in np.argsort(reduced, kind="stable")]


def _enriched(
    problem: FusionProblem, proof: Proof, known: SearchResult, ended: float
) -> tuple[int, ...]:
    """Legal groups for a plan: column generation once more, with legal groups only.

    The sets that proved the bound need not be legal, mostly because their true buffer exceeds
    their floor. Sets that are made to fit a somewhat smaller buffer mostly are.
    """
    half = (time.perf_counter() + ended) / 2
    legal = _repaired(problem, _promising(problem, proof), half)
    pool = dict.fromkeys((*problem.blocks, *known.groups, *legal))
    pricings = [Pricing(problem, share) for share in TIGHTER]
    tried: set[int] = set()
    idle = turn = 0
    while idle < len(pricings) and time.perf_counter() < ended:
        groups = tuple(pool)
        matrix, costs = program(problem, groups)
        found = linprog(costs, A_eq=matrix, b_eq=np.ones(matrix.shape[0]), bounds=(0, None))
        if found.status != 0:
            break
        prices = np.floor(np.asarray(found.eqlin.marginals) * FINE).astype(np.int64)
        answer = pricings[turn % len(pricings)].run(prices, lambda: time.perf_counter() >= ended)
        if answer is None:
            break
        fresh = [mask for mask in answer[1] if mask not in tried]
        tried.update(fresh)
        before = len(pool)
        pool.update(dict.fromkeys(_repaired(problem, fresh, ended)))
        idle = idle + 1 if len(pool) == before else 0
        turn += 1
    return _fewer(problem, tuple(pool), proof, known)


def _pool(
    problem: FusionProblem, proof: Proof, known: SearchResult, ended: float
) -> tuple[int, ...]:
    """The legal groups met, for a plan."""
    legal = _repaired(problem, _promising(problem, proof), ended)
    groups = tuple(dict.fromkeys((*problem.blocks, *known.groups, *legal)))
    return _fewer(problem, groups, proof, known)


def _fewer(
    problem: FusionProblem, groups: tuple[int, ...], proof: Proof, known: SearchResult
) -> tuple[int, ...]:
    """As many groups as an integer program can take: those that undercut the prices most.

    The single blocks and the known plan's groups, which stand first, always stay.
    """
    if len(groups) <= MOST_COLUMNS:
        return groups
    matrix, costs = program(problem, groups)
    reduced = costs - matrix.T @ proof.prices / FINE
    reduced[: len({*problem.blocks, *known.groups})] = -math.inf
    return tuple(groups[k] for k in np.sort(np.argsort(reduced, kind="stable")[:MOST_COLUMNS]))


class _Program:
    """The integer program over a list of groups."""

    def __init__(self, problem: FusionProblem, groups: tuple[int, ...]) -> None:
        self.problem = problem
        self.groups = groups
        self.matrix, self.costs = program(problem, groups)

    def solve(self, known: SearchResult, ended: float) -> tuple[int, ...]:
        """The cheapest acyclic choice found, in an order in which it can run; never worse than
        the known plan.
        """
        cuts: list[csr_matrix] = []
        while (left := ended - time.perf_counter()) > 0:
            chosen = self._choose(cuts, left)
            if chosen is None:
                break
            picked = [self.groups[k] for k in chosen]
            alone = [1 << i for i in bits(self.problem.unfusable)]
            order = topological_order([*picked, *alone], self.problem.graph)
            if order is not None:
                best = tuple(picked[k] for k in order if k < len(picked))
                return best if self.problem.cost(best) < known.dram_bytes else known.groups
            # These groups depend on each other in a cycle: not all of them again.
            loop = self._cycle(chosen)
            data = (np.ones(len(loop)), ([0] * len(loop), loop))
            cuts.append(csr_matrix(data, shape=(1, len(self.groups))))
        return known.groups

    def _choose(self, cuts: list[csr_matrix], seconds: float) -> list[int] | None:
        constraints = [LinearConstraint(self.matrix, 1, 1)]
        if cuts:
            sizes = np.array([cut.nnz - 1 for cut in cuts])
            constraints.append(LinearConstraint(vstack(cuts), -np.inf, sizes))
        options = {"mip_rel_gap": 1e-6}
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
            return None
        return [int(k) for k in np.flatnonzero(found.x > 0.5)]

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
