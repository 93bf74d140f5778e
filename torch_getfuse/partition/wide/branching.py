"""Branch and bound over listed sets: which of them make the cheapest legal plan, proved.

A node is a part of the list. Its linear program is solved over few columns; its prices ask for
more, and sets that turn out to be illegal leave the list. Rounded to integers, the prices prove
what every plan of the node's sets costs at least, and which of them no plan cheaper than the best
known has. Where the program's solution is no plan, it is given inequalities that all plans satisfy
(:mod:`.plan_cuts`). If that does not help, two blocks that it has together by halves stay in one
group in one half of the node, and in two groups in the other; where it is a plan but for a cycle,
the parts are the ways not to have that cycle. The solver is not trusted: what is concluded follows
from integers (``docs/exact-search.md``, section 6).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import combinations, count
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import OptimizeResult
from scipy.sparse import csr_matrix, hstack, identity, triu

from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.wide.cycles import Cycle, find_cycles, split_cycles
from torch_getfuse.partition.wide.group_columns import minimum
from torch_getfuse.partition.wide.near_sets import SCANNED, NearSets
from torch_getfuse.partition.wide.plan_cuts import WHOLE, Cut, Cuts, of_cycles, of_three_blocks
from torch_getfuse.partition.wide.relaxation import FINE, MOST
from torch_getfuse.partition.work import OutOfWork

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

ROUNDS = 40, 3  # rounds of inequalities, in the first node and in others
ADDED = 200  # columns that a program is given at once
SMOOTHED = 10_000  # sets from which on prices are smoothed

Pair = tuple[int, int]


class _Prices(NamedTuple):
    """Prices of a program, in 1/:data:`.FINE` bytes.

    Attributes:
        blocks: of each block.
        charges: what a set costs more for each unit that it has in an inequality; nothing in those
            that were added since.
    """

    blocks: Ints
    charges: Ints


class _Node(NamedTuple):
    """A part of the list.

    Attributes:
        level: what its plans cost at least, 1/:data:`.FINE` bytes.
        serial: a number of its own: of equals the first made comes first.
        alive: its sets.
        active: those that its program begins with.
        best: prices that none of the sets undercuts.
    """

    level: int
    serial: int
    alive: Ints
    active: Ints
    best: _Prices | None


class Branching:
    """One search.

    Args:
        near: all sets that a plan may use that is cheaper than the known one.
        plan: the known plan.
        start: legal groups that the first program has, if they are among the sets.
        prices: of blocks, in 1/:data:`.FINE` bytes; by these it has the sets of least reduced cost,
            as many as there are blocks.

    Attributes:
        plan, cost: the best plan, and its bytes.
        used: the legal groups that the first program had in the end.
        level: no legal plan of the near sets that is cheaper than ``cost`` costs less, in
            1/:data:`.FINE` bytes.
        nodes: how many were looked at.
    """

    def __init__(
        self,
        near: NearSets,
        plan: tuple[int, ...],
        start: Sequence[int] = (),
        prices: Ints | None = None,
    ) -> None:
        self.near = near
        self.problem = near.columns.problem
        self.plan, self.cost = plan, self.problem.cost(plan)
        self.used: tuple[int, ...] = tuple(dict.fromkeys((*plan, *start)))
        self.level = -(1 << 62)
        self.nodes = 0
        self._start = prices
        self.cuts = Cuts(len(near))
        self._home = {i: k for k, mask in enumerate(self.problem.blocks) for i in bits(mask)}

    def run(self) -> None:
        """Search until no cheaper plan is left.

        Raises:
            OutOfWork: at a limit; the attributes hold what was found by then.
        """
        every = np.arange(len(self.near))
        single = np.flatnonzero(np.diff(self.near.rows.indptr) == 1)  # blocks alone are legal
        active = np.union1d(single, self.near.numbers(self.used))
        best = None
        if self._start is not None:
            start = _Prices(self._start, np.zeros(0, np.int64))
            reduced = self._reduced(every, start)
            # Where no legal group undercuts the prices, sets may that nobody has asked about.
            _, legal = self._undercutting(every, reduced, active)
            every, reduced = every[legal], reduced[legal]
            best = self._lowered(start, every, reduced)
            first = every[np.argsort(reduced, kind="stable")[: len(single)]]
            active = np.union1d(active, first)
        active = active[[self.near.legal(k) for k in active]]
        serial = count()
        waiting = [_Node(self.level, next(serial), every, active, best)]
        while waiting and waiting[0].level < self.cost * FINE:
            node: _Node | None = heapq.heappop(waiting)
            # Down to a plan, or to where there is none, before the next of those that wait.
            while node is not None:
                least = min(node.level, waiting[0].level) if waiting else node.level
                self.level = max(self.level, least)
                (level, _, _, active, best), parts = self._look_at(node)
                nodes = [
                    _Node(level, next(serial), part, np.intersect1d(active, part), best)
                    for part in parts
                ]
                node = nodes.pop() if nodes else None
                for other in nodes:
                    heapq.heappush(waiting, other)
        self.level = max(self.level, self.cost * FINE)

    def _look_at(self, node: _Node) -> tuple[_Node, Sequence[Ints]]:
        """What is known of a node then, and the parts of its sets, the most hopeful last."""
        self.nodes += 1
        level, _, alive, active, best = node
        for rounds in count():
            best, alive, active, values = self._relax(alive, active, best)
            if self.nodes == 1:
                self.used = tuple(map(self.near.mask, active))
            level = max(level, self._proved(best))
            looked = _Node(level, node.serial, node.alive, active, best)
            if not len(alive):
                return looked, ()
            used = values > WHOLE
            sets, shares = active[used], values[used]
            cover = self._offer(sets) if (shares > 1 - WHOLE).all() else []
            if rounds == ROUNDS[self.nodes > 1] or not self.cuts.add(
                self._cuts(cover, sets, shares)
            ):
                break
        if not cover:
            return looked, self._by_pair(alive, sets, shares)
        parts = [*self._by_cycle(alive, cover)][::-1]
        if not parts and self.near.columns.bound(level) < self.cost:
            raise OutOfWork("no prices that prove the solution")
        return looked, parts

    def _cuts(self, cover: Sequence[int], sets: Ints, shares: Floats) -> list[Cut]:
        """Inequalities that a cover, or the shares of sets, do not satisfy."""
        rows = self.near.rows
        if cover:
            return [*of_cycles(self.problem, rows, cover)]
        return [*of_three_blocks(rows, sets, shares, self.problem.evaluator.work)]

    def _offer(self, sets: Ints) -> list[int]:
        """The masks of a cover; it is kept, made legal, if it is the best plan."""
        picked = [self.near.mask(k) for k in sets]
        if not self.problem.covers(picked):
            raise OutOfWork("no cover, and no prices that say so")
        with self.problem.evaluator.work.finishing():
            plan = self.problem.order(split_cycles(self.problem, picked))
            if plan is not None and (cost := self.problem.cost(plan)) < self.cost:
                self.plan, self.cost = plan, cost
        return picked

    def _relax(
        self, alive: Ints, active: Ints, best: _Prices | None
    ) -> tuple[_Prices, Ints, Ints, Floats]:
        """The linear program over some sets.

        Args:
            alive, active: the sets, and its first columns.
            best: prices that none of the sets undercuts. The program ends where it costs no more
                than they prove.

        Returns:
            Such prices that prove most, the sets that a better plan may use, the columns of the
            last program, and the value of each.

        Raises:
            OutOfWork: at a limit, and where the solver fails.
        """
        near = self.near
        blocks = near.rows.shape[1]
        # Each block may be covered for the cost of a whole plan, so that there is a solution.
        dear = np.full(blocks, float(self.cost))
        while True:
            within = hstack([near.rows[active].T.astype(float), identity(blocks)], "csc")
            costs = np.concatenate([near.costs[active], dear])
            work, cuts = self.problem.evaluator.work, self._cuts_of(active, blocks)
            solution = minimum(costs, within, np.ones(blocks), work, cuts, self.cuts.most)
            if solution is None:
                raise OutOfWork("the solver found no prices")
            fresh: Ints | None = None
            if best is None or solution.fun * FINE >= self._proved(best) + FINE / 2:
                for prices in self._tried(self._prices(solution), best, len(alive)):
                    reduced = self._reduced(alive, prices)
                    fresh, legal = self._undercutting(alive, reduced, active)
                    alive = alive[legal]
                    prices = self._lowered(prices, alive, reduced[legal])
                    if best is None or self._proved(prices) > self._proved(best):
                        best = prices
                        alive = self._useful(alive, best)
                    if len(fresh):
                        break
            assert best is not None
            if fresh is None or not len(fresh) or self._proved(best) >= self.cost * FINE:
                return best, self._useful(alive, best), active, solution.x[: len(active)]
            active = np.concatenate([active, fresh[np.isin(fresh, alive)]])

    def _cuts_of(self, active: Ints, blocks: int) -> csr_matrix | None:
        """The inequalities as rows of the program."""
        if not len(self.cuts):
            return None
        return hstack([self.cuts.matrix[active].T, csr_matrix((len(self.cuts), blocks))], "csr")

    def _prices(self, solution: OptimizeResult) -> _Prices:
        """The duals of a solution."""
        duals = solution.eqlin.marginals * FINE
        charges = -solution.ineqlin.marginals * FINE if len(self.cuts) else np.zeros(0)
        if not np.abs(duals).sum() + np.abs(charges) @ self.cuts.most < MOST / 4:
            raise OutOfWork("prices too large")
        return _Prices(np.rint(duals).astype(np.int64), np.rint(charges).astype(np.int64).clip(0))

    def _tried(self, duals: _Prices, best: _Prices | None, sets: int) -> Iterator[_Prices]:
        """Of many sets, prices half way from the best to the duals of a program; then the duals.

        Where a program has few of its sets as columns, its duals are far off, and prove little.
        """
        if best is not None and sets >= SMOOTHED:
            added = len(duals.charges) - len(best.charges)
            charges = np.append(best.charges, np.zeros(added, np.int64))
            yield _Prices((best.blocks + duals.blocks) // 2, (charges + duals.charges) // 2)
        yield duals

    def _reduced(self, alive: Ints, prices: _Prices) -> Ints:
        """Reduced cost of sets, 1/FINE bytes."""
        reduced = self.near.reduced(alive, prices.blocks)
        if len(prices.charges):
            matrix = self.cuts.matrix[alive][:, : len(prices.charges)]
            self.problem.evaluator.work.add(matrix.nnz // SCANNED)
            reduced += matrix @ prices.charges
        return reduced

    def _lowered(self, prices: _Prices, alive: Ints, reduced: Ints) -> _Prices:
        """Prices lowered until no set undercuts them."""
        blocks = prices.blocks + self.near.shortfall(alive, reduced)
        if sum(map(abs, blocks.tolist())) >= MOST // 2:
            raise OutOfWork("prices too large")
        return _Prices(blocks, prices.charges)

    def _proved(self, prices: _Prices) -> int:
        """What prices that no set undercuts prove of plans, 1/FINE bytes."""
        charged = self.cuts.most[: len(prices.charges)]
        return int(prices.blocks.sum() - prices.charges @ charged)

    def _useful(self, alive: Ints, prices: _Prices) -> Ints:
        """The sets that a better plan may use, by prices that none of them undercuts."""
        room = self.cost * FINE - 1 - self._proved(prices)
        useful: Ints = alive[self._left(self._reduced(alive, prices), room)]
        return useful

    def _left(self, reduced: Ints, room: int) -> Ints:
        """Which sets a better plan may use: ``room`` is what all its reduced costs sum up to.

        If all are multiples of some number, so is their sum.
        """
        left = np.arange(len(reduced))
        while len(left):
            step = int(np.gcd.reduce(reduced[left])) or 1
            fits = reduced[left] <= room // step * step
            if fits.all():
                break
            left = left[fits]
        return left

    def _undercutting(
        self, alive: Ints, reduced: Ints, active: Ints
    ) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Legal sets that undercut prices and are no columns yet, and which are not illegal.

        ``reduced`` grows with what sets turn out to cost.
        """
        legal = np.ones(len(alive), bool)
        under = np.flatnonzero((reduced < 0) & ~np.isin(alive, active, assume_unique=True))
        fresh: list[int] = []
        for k in under[_in_turn(self.near.first[alive[under]], reduced[under])].tolist():
            number = int(alive[k])
            cost = int(self.near.costs[number])
            legal[k] = self.near.legal(number)
            reduced[k] += FINE * (int(self.near.costs[number]) - cost)  # known only now, it may be
            if legal[k] and reduced[k] < 0:
                fresh.append(number)
                if len(fresh) == ADDED:
                    break
        return np.array(fresh, np.int64), legal

    # -- parts of a node ------------------------------------------------------------------

    def _by_pair(self, alive: Ints, used: Ints, values: Floats) -> list[Ints]:
        """The sets without two blocks in one group, and those without them in two."""
        rows = self.near.rows[used].astype(float)
        shared = triu(rows.T @ rows.multiply(values[:, None]), 1).tocoo()
        away = np.abs(shared.data - 0.5)
        if not len(away) or away.min() > 0.5 - WHOLE:
            raise OutOfWork("no two blocks to branch on")
        k = np.lexsort((shared.col, shared.row, away.round(9)))[0]
        pair = int(shared.row[k]), int(shared.col[k])
        parts = [self._apart(alive, pair), self._together(alive, pair)]
        if max(map(len, parts)) == len(alive):  # values that the solver made up: no progress
            raise OutOfWork("no two blocks to branch on")
        return parts

    def _by_cycle(self, alive: Ints, picked: list[int]) -> Iterator[Ints]:
        """The ways in which plans avoid the first cycle of a cover; none for a legal one.

        Some group of the cycle does not have the operators at which it is entered and left; or all
        have them, and two of these groups are one.
        """
        cycles = find_cycles(self.problem, picked)
        if not cycles:
            return
        cycle: Cycle = cycles[0]
        pairs = [(self._home[entered], self._home[left]) for _, entered, left in cycle]
        for pair in pairs:
            if pair[0] != pair[1]:
                yield self._apart(alive, pair)
                alive = self._together(alive, pair)
        for one, other in combinations(pairs, 2):
            yield self._together(alive, (one[0], other[0]))

    def _apart(self, alive: Ints, pair: Pair) -> Ints:
        apart: Ints = alive[self._members(alive, pair) < 2]
        return apart

    def _together(self, alive: Ints, pair: Pair) -> Ints:
        together: Ints = alive[self._members(alive, pair) != 1]
        return together

    def _members(self, alive: Ints, pair: Pair) -> Ints:
        """How many of two blocks each set has."""
        members: Ints = np.asarray(self.near.rows[alive][:, list(pair)].sum(axis=1)).ravel()
        return members


def _in_turn(first: Ints, reduced: Ints) -> Ints:
    """The least of each first block, then the second of each, and so on."""
    order = np.lexsort((reduced, first))
    starts = np.flatnonzero(np.diff(first[order], prepend=-1))
    place = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    turns: Ints = order[np.lexsort((reduced[order], place))]
    return turns
