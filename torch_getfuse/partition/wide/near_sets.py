"""All sets that a plan cheaper than the known one may use, by their reduced costs.

Prices ``p`` that no set of the automaton undercuts prove that a plan costs ``sum p`` plus the
reduced costs ``F_D(S) - p(S)`` of its groups, none of which is negative. So a plan that costs no
more than some limit has no group whose reduced cost exceeds that limit less ``sum p``. Where bound
and plan are close, the sets that are left are few, and they are listed: paths through the automaton
as in :mod:`relaxation`, but without dominance, for each set counts. ``docs/exact-search.md``,
section 6, has the proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix, vstack

from torch_getfuse.partition.node_set import is_connected, is_convex
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.wide.automaton import NO_BLOCK
from torch_getfuse.partition.wide.group_columns import Columns
from torch_getfuse.partition.wide.relaxation import (
    FEW,
    FINE,
    LABELS,
    LAYER,
    Pricing,
    followed,
    names_of,
)

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

NONE = -(1 << 60)  # a reach that no set is within
_LEGAL = 20  # steps counted for checking the legality of one set, and one more per operator
AT_ONCE = 500  # labels that are held against all prices of room at once
_TRACED = 8  # operators of the sets found per further step
_SCAN, SCANNED = 100, 50  # steps counted for pricing all sets, and entries per further step


class NearSets:
    """Sets that may be groups, as rows of blocks; whether they are legal is found when asked.

    Args:
        columns: columns of the problem.
        rows: the blocks (columns) of each set (row), in order.
        costs: ``F_D`` of each set, bytes, or less; exact once it was asked whether it is legal.
    """

    def __init__(self, columns: Columns, rows: csr_matrix, costs: Ints) -> None:
        self.columns = columns
        self.rows = rows.astype(np.int64)
        self.costs = costs
        self.first = np.minimum.reduceat(rows.indices, rows.indptr[:-1])
        self._legal = np.full(len(costs), -1, np.int8)

    @classmethod
    def of(cls, columns: Columns, groups: Sequence[int]) -> NearSets:
        """Of sets that are given."""
        return cls(columns, columns.matrix(groups).T.tocsr(), columns.costs(groups))

    def __len__(self) -> int:
        return len(self.costs)

    def mask(self, number: int) -> int:
        """The operators of a set."""
        start, end = self.rows.indptr[number : number + 2]
        blocks = self.columns.problem.blocks
        return sum(blocks[k] for k in self.rows.indices[start:end])

    def numbers(self, groups: Sequence[int]) -> Ints:
        """The numbers of those groups that are among the sets."""
        names = names_of(self.rows.shape[1])
        sums = self.columns.matrix(groups).T.astype(np.int64) @ names
        wanted = set(groups)
        alike = np.flatnonzero(np.isin(self.rows @ names, sums)).tolist()
        return np.array([k for k in alike if self.mask(k) in wanted], np.int64)

    def legal(self, number: int) -> bool:
        """Whether a set is a legal group.

        Raises:
            OutOfWork: at a limit.
        """
        if self._legal[number] < 0:
            mask, problem = self.mask(number), self.columns.problem
            self._legal[number] = is_legal(problem, mask)
            if self._legal[number] and problem.rereads:
                self.costs[number] = problem.evaluator.dram(mask)
        return bool(self._legal[number])

    def reduced(self, alive: Ints, prices: Ints) -> Ints:
        """``F_D - prices`` of some of the sets, in 1/:data:`.FINE` bytes."""
        some = self.rows[alive]
        self.columns.problem.evaluator.work.add(_SCAN + some.nnz // SCANNED)
        reduced: Ints = self.costs[alive] * FINE - some @ prices
        return reduced

    def shortfall(self, alive: Ints, reduced: Ints) -> Ints:
        """Per block, the least reduced cost of the sets whose first block it is, or 0."""
        shortfall = np.zeros(self.rows.shape[1], np.int64)
        np.minimum.at(shortfall, self.first[alive], reduced)
        return shortfall


def is_legal(problem: FusionProblem, mask: int) -> bool:
    """Whether a set of operators is connected, convex and fits."""
    problem.evaluator.work.add(_LEGAL + mask.bit_count())
    return (
        is_connected(mask, problem.near)
        and is_convex(mask, problem.above, problem.below)
        and problem.evaluator.valid(mask)
    )


@dataclass(frozen=True, slots=True)
class _Labels:
    """The labels that a layer kept: beginnings of what is still to be decided.

    Attributes:
        block: that the layer decides; :data:`.NO_BLOCK` for an unfusable operator.
        following: per label, the label of the next layer that it goes on with; -1 at an end.
        joins: per label, whether the block joins.
    """

    block: int
    following: Ints
    joins: Flags


def near_sets(
    columns: Columns, pricing: Pricing, prices: Ints, reach: Ints, most: int
) -> NearSets | None:
    """All sets of the automaton whose reduced cost is at most ``reach``, by their first blocks.

    Args:
        columns: columns of the problem.
        pricing: the oracle of its automaton.
        prices: per block, 1/:data:`.FINE` bytes.
        reach: per block, 1/:data:`.FINE` bytes; :data:`NONE` where no set that begins with it is
            wanted.
        most: labels, over all layers.

    Returns:
        The sets; ``None`` where there are more labels, or a layer has more of them to look at.

    Raises:
        OutOfWork: at a limit.
    """
    rates = pricing.rates
    before = pricing.before(prices, -reach)
    limit = rates[:, None] * (pricing.limit - 1)
    count = columns.problem.evaluator.work.add
    layers: list[_Labels] = []  # from the last
    starts: list[tuple[Ints, Ints]] = []  # labels after the first block, and what sets cost
    # Cost and room of each label, and the name of its set; then nothing, which the ends follow.
    state, labels = np.zeros(0, np.int64), np.zeros((3, 1), np.int64)
    names = names_of(len(prices))
    several = len(pricing.automaton.besides) > 0  # then a set may be several paths
    kept_so_far = 0
    for steps, least in zip(reversed(pricing.layers), reversed(before), strict=True):
        if int(steps.times[state].sum()) > most:
            return None
        onto, back = steps.propagated(state)
        count(LAYER + len(onto) // LABELS)
        states, joins, begins = steps.source[back], steps.joins[back], steps.begins[back]
        costs, rooms, named = labels = labels.take(onto, 1)
        labels[:2] += steps.change[:2].take(back, 1)
        if steps.block != NO_BLOCK:
            costs -= prices[steps.block] * joins
            named += names[steps.block] * joins
        beyond = costs - reach[steps.block] * begins
        fits = rooms < pricing.limit
        # The best prefix of each label: its bound holds at every price of room.
        if len(onto) <= AT_ONCE:
            hopes = rates[:, None] * rooms + (least - limit)[:, states]
            kept = np.flatnonzero((hopes.max(axis=0) + beyond <= 0) & fits)
        else:
            kept = np.flatnonzero(fits)
            for rate, floor in zip(rates, least - limit, strict=True):
                hope = beyond[kept] + rate * rooms[kept] + floor[states[kept]]
                kept = kept[hope <= 0]
        if several and len(kept) > FEW:
            kept = kept[_cheapest(states[kept], *labels.take(kept, 1))]
        here = kept[begins[kept]]
        starts.append((onto[here], costs[here]))
        kept = kept[~begins[kept]]
        kept_so_far += len(kept) + len(here)
        if kept_so_far > most:
            return None
        layers.append(_Labels(steps.block, onto[kept], joins[kept]))
        state, labels = states[kept], followed(labels, kept)
    rows, costs = _traced(columns, layers, starts, prices)
    if several:
        more, their = pricing.besides.within(prices, reach)
        rows, costs = _distinct(vstack([rows, more], "csr"), np.append(costs, their))
    return NearSets(columns, rows, costs)


def _cheapest(state: Ints, cost: Ints, room: Ints, name: Ints) -> Ints:
    """Positions, ascending, of the labels that none of the same set at their state dominates."""
    order = np.lexsort((room, cost, name, state))
    starts = np.ones(len(order), bool)
    starts[1:] = (np.diff(state[order]) != 0) | (np.diff(name[order]) != 0)
    # Shift each set to a separate range of values, below that of the one before.
    value = room[order] - np.cumsum(starts) * (int(room.max(initial=0)) + 1)
    kept = np.ones(len(order), bool)
    kept[1:] = value[1:] < np.minimum.accumulate(value)[:-1]
    return np.sort(order[kept])


def _distinct(rows: csr_matrix, costs: Ints) -> tuple[csr_matrix, Ints]:
    """Each set once, at its least cost."""
    sums = rows @ names_of(rows.shape[1])
    order = np.lexsort((costs, sums))
    (alike,) = np.nonzero(sums[order[1:]] == sums[order[:-1]])
    same = abs(rows[order[alike + 1]] - rows[order[alike]]).getnnz(axis=1) == 0
    kept = np.ones(len(order), bool)
    kept[alike[same] + 1] = False
    order = np.sort(order[kept])
    return rows[order], costs[order]


def _traced(
    columns: Columns, layers: list[_Labels], starts: list[tuple[Ints, Ints]], prices: Ints
) -> tuple[csr_matrix, Ints]:
    """The sets of labels, and their costs: all are followed at once, a layer at a time."""
    number = label = np.zeros(0, np.int64)
    members, blocks, reduced = [number], [number], [number]  # an automaton may have no sets
    count = 0
    for layer, (after, costs) in zip(reversed(layers), reversed(starts), strict=True):
        joined = layer.joins[label]
        members.append(number[joined])
        blocks.append(np.full(int(joined.sum()), layer.block))
        label = layer.following[label]
        fresh = np.arange(count, count + len(after))
        count += len(after)
        members.append(fresh)
        blocks.append(np.full(len(fresh), layer.block))
        reduced.append(costs)
        number, label = np.concatenate([number, fresh]), np.concatenate([label, after])
        number, label = number[label >= 0], label[label >= 0]
    at, block = np.concatenate(members), np.concatenate(blocks)
    columns.problem.evaluator.work.add(len(at) // _TRACED)
    shape = (count, len(columns.problem.blocks))
    rows = csr_matrix((np.ones(len(at), np.int64), (at, block)), shape)
    rows.sort_indices()
    return rows, (np.concatenate(reduced) + rows @ prices) // FINE
