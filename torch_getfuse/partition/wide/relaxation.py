"""A proved lower bound for graphs with more legal groups than can be listed.

Prices. Give each block ``b`` a price ``p(b)`` in bytes. With ``m(b)`` the least of ``F_D(S) -
p(S)`` over the groups ``S`` whose first block is ``b`` (and 0 if that is positive), every plan
costs at least ``sum p(b) + sum m(b)``: its groups are disjoint, cover all blocks, and each has one
first block. So *any* prices prove a bound, and all that is needed is ``m``.

``m`` is found without listing groups: they are paths through an :class:`.Automaton`, and a *label*
stands for paths from a state to an end. The ends come first. Of two labels at a state one is
dropped if the other is both no dearer and no larger; and a label is dropped if no beginning makes
it negative, by a bound in which room costs so much a byte instead of being limited. All of this is
integer arithmetic.

Good prices come from the linear program that chooses among the sets met so far; the sets that
undercut its prices join it, until none does. ``docs/exact-search.md`` has the proofs.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from torch_getfuse.partition.wide.group_automaton import Automaton

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

MOST_LABELS = 8_000  # per block; beyond, rooms are rounded
PER_START = 10  # sets per first block

FINE = 1024
"""Prices are in 1/FINE bytes, so that rounding them costs a bound less than a byte."""

MOST = 1 << 62
"""Whole numbers whose sizes add up to less are added in 64 bits without overflow."""

_LAYER = 150  # steps that a layer counts
_LABELS = 4  # labels that count one more

ROOM_PRICES = (0, 64, 128, 256, 512, *(int(2 ** (k / 2)) for k in range(20, 31)), 65536)
"""What a byte of room may cost in the bound of a beginning, in 1/FINE bytes of DRAM access.

These at first; each run then tries as many between those that the last one had use for.
"""
RARE = 0.05  # share of the labels, at each end, whose room prices the next run does without
WIDER = 1.25  # how far it goes beyond the others


@dataclass(frozen=True, slots=True)
class _Steps:
    """One layer's steps, by the state that they lead to.

    Attributes:
        block: whose decision it is; -1 for an unfusable operator.
        empty: the state of the empty set before it, -1 if no set starts here or later.
        source: state that each step starts from; the steps to the first state after it first.
        joins: whether the block joins.
        cost, room: what the step adds to ``F_D`` (in 1/FINE bytes) and to the floor.
        first: per state after it, the first of its steps; and at the end, their number.
        ending: states that the block can join to end a set.
        last_cost, last_room: what that adds, per state of ``ending``.
    """

    block: int
    empty: int
    source: Ints
    joins: Flags
    cost: Ints
    room: Ints
    first: Ints
    ending: Ints
    last_cost: Ints
    last_room: Ints


def _steps(automaton: Automaton) -> Iterator[_Steps]:
    empty = 0
    for layer, after in zip_longest(automaton.layers, automaton.layers[1:]):
        leaving, joining = np.flatnonzero(layer.leave >= 0), np.flatnonzero(layer.join >= 0)
        target = np.concatenate([layer.leave[leaving], layer.join[joining]])
        order = np.argsort(target, kind="stable")
        cost = np.concatenate([np.zeros(len(leaving), np.int64), FINE * layer.cost[joining]])
        ending = np.flatnonzero(layer.ends)
        states = len(after.leave) if after else 0
        yield _Steps(
            block=layer.block if layer.block < len(automaton.problem.blocks) else -1,
            empty=empty,
            source=np.concatenate([leaving, joining])[order],
            joins=order >= len(leaving),
            cost=cost[order],
            room=np.concatenate([layer.leave_room[leaving], layer.room[joining]])[order],
            first=np.searchsorted(target[order], np.arange(states + 1)),
            ending=ending,
            last_cost=FINE * layer.cost[ending],
            last_room=layer.last_room[ending],
        )
        empty = int(layer.leave[empty]) if empty >= 0 else -1


class Pricing:
    """The least of ``F_D - prices`` per first block, over the sets of an automaton.

    Args:
        automaton: of the problem.
        most: labels per block; beyond, rooms are rounded down until they fit, which keeps the
            result a bound.
    """

    def __init__(self, automaton: Automaton, most: int = MOST_LABELS) -> None:
        self.automaton = automaton
        self.buffer_bytes = automaton.problem.evaluator.buffer_bytes
        self.most = most
        self.per_start = PER_START
        fusable = len(automaton.problem.blocks)
        order = [block for block in automaton.skeleton.order if block < fusable]
        self.place = np.argsort(order)
        some = automaton.layers and len(automaton.layers[0].leave)
        self._layers = tuple(_steps(automaton)) if some else ()
        self._rates = np.array(ROOM_PRICES, np.int64)
        # Of what a room price makes of all rooms together; beyond, such prices are left out.
        widest = 2 * sum(automaton.skeleton.room) + self.buffer_bytes
        widest += 2 * sum(
            stream.unit_bytes * int(stream.levels.units.max())
            for stream in automaton.skeleton.streams
        )
        self._dearest = (MOST // 2) // max(1, widest)
        self._rates = np.minimum(self._rates, self._dearest)

    def within(self, share: float, per_start: int) -> Pricing:
        """The same for a share of the buffer, with fewer sets: it bounds nothing."""
        tighter = copy(self)
        tighter.buffer_bytes = int(share * self.buffer_bytes)
        tighter.per_start = per_start
        return tighter

    def run(self, prices: Ints) -> tuple[Ints, list[int]]:
        """Shortfall per block (0 or less, in 1/FINE bytes), and sets that have it or nearly so.

        Raises:
            OutOfWork: where a limit on work is reached.
        """
        count = self.automaton.problem.evaluator.work.add
        shortfall = np.zeros(len(self.automaton.problem.blocks), np.int64)
        rates = self._rates[:, None]
        before = self._before(prices, rates)
        count(sum(_LAYER // 2 + len(steps.source) // _LABELS for steps in self._layers))
        limit = rates * (self.buffer_bytes - 1)
        used = np.zeros(len(rates), np.int64)
        # Per layer from the last: the label that each label goes on to, -1: an end.
        nexts: list[Ints] = []
        joined: list[Flags] = []
        starts: list[tuple[int, int]] = []
        # Where rooms are rounded, the true ones tell which sets do fit.
        state, cost, room, true = (np.zeros(0, np.int64) for _ in range(4))
        for steps, least in zip(reversed(self._layers), reversed(before), strict=True):
            # Each label goes back along every step to its state.
            begin, times = steps.first[state], steps.first[state + 1] - steps.first[state]
            onto = np.repeat(np.arange(len(state)), times)
            count(_LAYER + (len(onto) + len(steps.ending)) // _LABELS)
            back = np.arange(len(onto)) + np.repeat(begin - (np.cumsum(times) - times), times)
            price = int(prices[steps.block]) if steps.block >= 0 else 0
            states = np.concatenate([steps.source[back], steps.ending])
            joins = np.concatenate([steps.joins[back], np.ones(len(steps.ending), bool)])
            costs = np.concatenate([cost[onto] + steps.cost[back], steps.last_cost])
            costs -= price * joins
            added = steps.room[back]
            rooms = np.concatenate([room[onto] + added, steps.last_room])
            trues = np.concatenate([true[onto] + added, steps.last_room])
            onto = np.concatenate([onto, np.full(len(steps.ending), -1)])
            # What a label can start from at best, whatever a byte of room costs.
            hopes = rates * rooms + (least - limit)[:, states]
            use = hopes.argmax(axis=0)
            hope = hopes[use, np.arange(len(use))] + costs
            kept = np.flatnonzero((hope < 0) & (rooms < self.buffer_bytes))
            if steps.block >= 0 and steps.empty >= 0:
                here = kept[(states[kept] == steps.empty) & joins[kept] & (costs[kept] < 0)]
                if len(here):
                    shortfall[steps.block] = costs[here].min()
                    here = here[trues[here] < self.buffer_bytes]
                    here = here[np.argsort(costs[here], kind="stable")[: self.per_start]]
                    starts += [(len(nexts), int(onto[k])) for k in here]
            kept = kept[self._undominated(states[kept], costs[kept], rooms[kept])]
            if len(kept) > self.most:
                rooms, kept = self._rounded(states, costs, rooms, kept)
            used += np.bincount(use[kept], minlength=len(used))
            nexts.append(onto[kept])
            joined.append(joins[kept])
            state, cost, room, true = states[kept], costs[kept], rooms[kept], trues[kept]
        self._rates = np.minimum(_closer(self._rates, used), self._dearest)
        return shortfall, [self._trace(nexts, joined, *start) for start in starts]

    def _before(self, prices: Ints, rates: Ints) -> list[Ints]:
        """Per layer, room price and state: the least cost, room included, from the empty set."""
        least = np.zeros((len(rates), 1), np.int64)
        found = []
        for steps in self._layers:
            found.append(least)
            cost = least[:, steps.source] + rates * steps.room + steps.cost
            if steps.block >= 0:
                cost -= prices[steps.block] * steps.joins
            least = np.minimum.reduceat(cost, steps.first[:-1], axis=1) if len(cost[0]) else cost
        return found

    def _undominated(self, state: Ints, cost: Ints, room: Ints) -> Ints:
        """Positions, ascending, of labels that no label of the same state matches in both."""
        if len(state) < 2:
            return np.arange(len(state))
        if (int(state.max()) + 1) * self.buffer_bytes < MOST:
            order = np.argsort(state * self.buffer_bytes + room, kind="stable")
        else:
            order = np.lexsort((room, state))
        ordered = state[order]
        starts = np.ones(len(order), bool)
        starts[1:] = ordered[1:] != ordered[:-1]
        # Each state on a range of its own, below that of the state before.
        value = cost[order]
        span = int(value.max()) - int(value.min()) + 1
        if span * (int(starts.sum()) + 1) >= MOST:
            value = np.unique(value, return_inverse=True)[1]
            span = len(value)
        value -= np.cumsum(starts) * span
        kept = np.ones(len(order), bool)
        kept[1:] = value[1:] < np.minimum.accumulate(value)[:-1]
        return np.sort(order[kept])

    def _rounded(self, state: Ints, cost: Ints, room: Ints, kept: Ints) -> tuple[Ints, Ints]:
        """Rooms rounded down until at most ``most`` labels are left, and these."""
        step = max(1, self.buffer_bytes // 256)
        while len(kept) > self.most and step <= self.buffer_bytes:
            room = room // step * step
            kept = kept[self._undominated(state[kept], cost[kept], room[kept])]
            step *= 2
        return room, kept

    def _trace(self, nexts: list[Ints], joined: list[Flags], step: int, label: int) -> int:
        """The mask of the set that ``step``'s block, counted from the last, begins."""
        blocks = self.automaton.problem.blocks
        mask = blocks[self._layers[-1 - step].block]
        while label >= 0:
            step -= 1
            if joined[step][label]:
                mask |= blocks[self._layers[-1 - step].block]
            label = int(nexts[step][label])
        return mask


def _closer(rates: Ints, used: Ints) -> Ints:
    """As many prices of room, spread over the range that was of use; ``used``: how often each."""
    total = np.cumsum(np.where(rates > 0, used, 0))
    if not total[-1]:
        return rates
    low, high = np.searchsorted(total, [RARE * total[-1], (1 - RARE) * total[-1]])
    ends = rates[low] / WIDER, min(rates[high] * WIDER, ROOM_PRICES[-1])
    inner = np.geomspace(*ends, len(rates) - 2).astype(np.int64)
    return np.concatenate([[0], inner, [ROOM_PRICES[-1]]])
