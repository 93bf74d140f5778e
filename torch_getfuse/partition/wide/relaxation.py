"""A proved lower bound for graphs with more legal groups than can be listed.

Give each block ``b`` a price ``p(b)`` in bytes. With ``m(b)`` the least ``F_D(S) - p(S)`` over the
groups ``S`` whose first block is ``b`` (0 if that is positive), every plan costs at least ``sum
p(b) + sum m(b)``: its groups are disjoint, cover all blocks, and each has one first block. So
*any* prices prove a bound, and only ``m`` has to be computed.

``m`` is computed without listing groups: they are paths through an :class:`.Automaton`, and a
*label* stands for paths from a state to an end. Labels are propagated backwards from the ends. A
label is dropped if another one at its state dominates it (neither its cost nor its room is
larger), or if no prefix makes it negative; the bound for prefixes charges a price per byte of room
instead of limiting it (a Lagrangian relaxation). All of this is integer arithmetic.

Good prices come from the linear program over the sets seen so far; the sets that undercut its
prices join it, until there are none. ``docs/exact-search.md`` has the proofs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.wide.automaton import NO_BLOCK, Automaton, Near

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

MOST_LABELS = 2_000  # per block; with more of them, rooms are rounded
FEW = 24  # labels of which it takes longer to find the dominated ones than to keep them
PER_START = 10  # sets per first block

FINE = 1024
"""Prices are in 1/FINE bytes, so that rounding them lowers a bound by less than a byte."""

MOST = 1 << 62
"""Integers whose absolute values sum to less than this cannot overflow 64 bits."""

LAYER = 60  # steps counted per layer
LABELS = 4  # labels per further step

ROOM_PRICES = (0, 64, 128, 256, 512, *(int(2 ** (k / 2)) for k in range(20, 31)), 65536)
"""Initial prices of a byte of room in the bound for prefixes, in 1/FINE bytes of DRAM access.

Each run replaces them by as many in the range that was useful in the previous run.
"""
RARE = 0.05  # share of the labels, at each end of the range, whose prices the next run drops
WIDER = 1.25  # factor by which the next range extends beyond the others
HIGHER = 16  # factor of the highest price if that was useful


@dataclass(frozen=True, slots=True)
class _Steps:
    """The steps of one layer, sorted by target state; after them the ends.

    Attributes:
        block: the block decided in this layer; :data:`.NO_BLOCK` for an unfusable operator.
        inner: number of steps that lead to a state; the others end a set.
        source: per step, the state that it starts from.
        joins, begins: per step, whether the block joins, and whether it is the first to join.
        change: increase of ``F_D`` (in 1/FINE bytes) and of the floor, a column per step; the
            latter twice, for labels have their room twice (:meth:`Pricing.run`).
        first, times: per target state, its first step and the number of them.
    """

    block: int
    inner: int
    source: Ints
    joins: Flags
    begins: Flags
    change: Ints
    first: Ints
    times: Ints

    def propagated(self, state: Ints) -> tuple[Ints, Ints]:
        """Labels, by the states that they are at, along all steps backwards; then the ends.

        Returns:
            Which label each of the new ones follows, -1 for the ends, and by which step.
        """
        times = self.times[state]
        onto = np.repeat(np.arange(len(state)), times)
        back = np.arange(len(onto)) + (self.first[state] - np.cumsum(times) + times)[onto]
        ends = np.arange(self.inner, len(self.source))
        return np.concatenate([onto, np.full(len(ends), -1)]), np.concatenate([back, ends])


def _steps(automaton: Automaton) -> Iterator[_Steps]:
    layers = automaton.layers
    states = [len(layer.leave) for layer in layers]
    empty = np.ones(states[0], bool)  # of the states before a layer, which are the empty set
    for layer, following in zip(layers, [*states[1:], 0], strict=True):
        sources, targets, changes = [], [], []
        ends, last = [], []
        for target, room, join in layer.steps():
            (some,) = np.nonzero(target >= 0)
            cost = FINE * join.cost[some] if join else np.zeros(len(some), np.int64)
            sources.append(some)
            targets.append(target[some])
            changes.append((cost, room[some]))
            if join:
                (some,) = np.nonzero(join.ends)
                ends.append(some)
                last.append((FINE * join.cost[some], join.last_room[some]))
        target = np.concatenate(targets)
        order = np.argsort(target, kind="stable")
        inner, leaving = len(order), len(sources[0])
        first = np.searchsorted(target[order], np.arange(following + 1))
        order = np.concatenate([order, np.arange(inner, inner + sum(map(len, ends)))])
        source = np.concatenate([*sources, *ends])[order]
        cost, room = (np.concatenate(part) for part in zip(*changes, *last, strict=True))
        joins = order >= leaving
        yield _Steps(
            block=layer.block,
            inner=inner,
            source=source,
            joins=joins,
            begins=joins & empty[source],
            change=np.stack([cost, room, room])[:, order],
            first=first[:-1],
            times=np.diff(first),
        )
        left = layer.leave[empty]
        empty = np.zeros(following, bool)
        empty[left[left >= 0]] = True


class Undercutting(NamedTuple):
    """A set that undercuts prices.

    Attributes:
        home: its first block.
        reduced: ``F_D - prices``, in 1/FINE bytes.
        mask: its operators.
        cost: ``F_D`` in bytes, or less where an automaton says less.
    """

    home: int
    reduced: int
    mask: int
    cost: int

    def priced(self, cost: int) -> Undercutting:
        """The same at another cost."""
        return self._replace(cost=cost, reduced=self.reduced + FINE * (cost - self.cost))


class Pricing:
    """The least ``F_D - prices`` per first block, over the sets of an automaton.

    Args:
        automaton: the automaton of the problem.
        most: labels per block; with more of them, rooms are rounded down until no more than these
            are left, which keeps the result a bound.
        rates: the first prices of room, ascending.
    """

    def __init__(
        self,
        automaton: Automaton,
        most: int = MOST_LABELS,
        rates: Sequence[int] | Ints = ROOM_PRICES,
    ) -> None:
        self.automaton = automaton
        self.limit = automaton.limit
        self.most = most
        fusable = len(automaton.problem.blocks)
        order = [block for block in automaton.skeleton.order if block < fusable]
        self.place = np.argsort(order)
        some = automaton.layers and len(automaton.layers[0].leave)
        self.layers = tuple(_steps(automaton)) if some else ()
        self.besides = _Besides(automaton, self.place)
        # Where a set is several paths: sums of these tell which of them are one set.
        self._names = names_of(fusable)
        # Prices of room are capped so that price times the sum of all rooms cannot overflow.
        self._highest_rate = (MOST // 2) // max(1, 2 * automaton.widest + automaton.limit)
        self.rates = np.minimum(np.array(rates, np.int64), self._highest_rate)

    def run(self, prices: Ints) -> tuple[Ints, list[Undercutting]]:
        """Shortfall per block (0 or less, in 1/FINE bytes), and sets that attain it or nearly so.

        Raises:
            OutOfWork: if a limit on work is reached.
        """
        count = self.automaton.problem.evaluator.work.add
        shortfall, besides = self.besides.run(prices)
        rates = self.rates[:, None]
        before = self.before(prices)
        limit = rates * (self.limit - 1)
        used = np.zeros(len(rates), np.int64)
        # Per layer from the last: the successor of each label, -1 at an end.
        nexts: list[Ints] = []
        joined: list[Flags] = []
        starts: list[tuple[int, int, int, int]] = []  # block, cost, step and label
        # Cost and room of each label, the true room where it is rounded, which decides whether it
        # fits, and the name of its set; then nothing, which the ends follow.
        state, labels = np.zeros(0, np.int64), np.zeros((4, 1), np.int64)
        doublings = 0  # of the step to which rooms were rounded last
        for steps, least in zip(reversed(self.layers), reversed(before), strict=True):
            onto, back = steps.propagated(state)
            count(LAYER + len(onto) // LABELS)
            states, joins, begins = steps.source[back], steps.joins[back], steps.begins[back]
            costs, rooms, trues, names = labels = labels.take(onto, 1)
            labels[:3] += steps.change.take(back, 1)
            if steps.block != NO_BLOCK:
                costs -= prices[steps.block] * joins
                names += self._names[steps.block] * joins
            # The best prefix of each label: its bound holds at every price of room.
            hopes = rates * rooms + (least - limit)[:, states]
            kept = np.flatnonzero((hopes.max(axis=0) + costs < 0) & (rooms < self.limit))
            # Sets that are complete stay among the labels: which prices of room these have use for
            # is a good guide to what to try next.
            here = kept[begins[kept]]
            here = here[costs[here] < 0]
            if len(here):
                shortfall[steps.block] = min(shortfall[steps.block], costs[here].min())
                here = here[trues[here] < self.limit]
                here = here[np.argsort(costs[here], kind="stable")]
                here = here[np.sort(np.unique(names[here], return_index=True)[1])[:PER_START]]
                starts += [(steps.block, int(costs[k]), len(nexts), int(onto[k])) for k in here]
            if len(kept) > FEW:
                kept = kept[self._undominated(states[kept], costs[kept], rooms[kept])]
            if len(kept) > self.most:
                labels[1], kept, doublings = self._rounded(states, costs, rooms, kept, doublings)
            used += np.bincount(hopes[:, kept].argmax(axis=0), minlength=len(used))
            nexts.append(onto[kept])
            joined.append(joins[kept])
            state, labels = states[kept], followed(labels, kept)
        self.rates = np.minimum(_focused(self.rates, used), self._highest_rate)
        found = []
        for block, reduced, *start in starts:
            members = self._trace(nexts, joined, *start)
            paid = sum(prices[members].tolist())
            mask = sum(self.automaton.problem.blocks[k] for k in members)
            found.append(Undercutting(block, reduced, mask, (reduced + paid) // FINE))
        return shortfall, found + besides

    def before(self, prices: Ints, surcharge: Ints | None = None) -> list[Ints]:
        """Per layer, price of room and state: least cost from the empty set, room included.

        ``surcharge``: per block, what a set that begins with it costs more.
        """
        count = self.automaton.problem.evaluator.work.add
        entries = LABELS * len(ROOM_PRICES)
        count(sum(LAYER // 3 + len(self.rates) * len(s.source) // entries for s in self.layers))
        rates = self.rates[:, None]
        empty = len(self.automaton.layers[0].leave) if self.layers else 1
        least = np.zeros((len(rates), empty), np.int64)
        costs = []
        for steps in self.layers:
            costs.append(least)
            cost, room, _ = steps.change[:, : steps.inner]
            cost = least[:, steps.source[: steps.inner]] + rates * room + cost
            if steps.block != NO_BLOCK:
                cost -= prices[steps.block] * steps.joins[: steps.inner]
                if surcharge is not None:
                    cost += surcharge[steps.block] * steps.begins[: steps.inner]
            least = np.minimum.reduceat(cost, steps.first, axis=1) if steps.inner else cost
        return costs

    def near_by(self, plan: Sequence[int], prices: Ints, most: int) -> Near:
        """Which sets have reduced costs of at most ``most``, in 1/:data:`FINE` bytes."""
        return Near(plan, prices, most, self.rates, self.before(prices))

    def _undominated(self, state: Ints, cost: Ints, room: Ints) -> Ints:
        """Positions, ascending, of the labels that no other label of their state dominates."""
        if len(state) < 2:
            return np.arange(len(state))
        if (int(state.max()) + 1) * self.limit < MOST:
            order = np.argsort(state * self.limit + room, kind="stable")
        else:
            order = np.lexsort((room, state))
        ordered = state[order]
        starts = np.ones(len(order), bool)
        starts[1:] = ordered[1:] != ordered[:-1]
        # Shift each state to a separate range of values, below that of the previous state.
        value = cost[order]
        span = int(value.max()) - int(value.min()) + 1
        if span * (int(starts.sum()) + 1) >= MOST:
            value = np.unique(value, return_inverse=True)[1]
            span = len(value)
        value -= np.cumsum(starts) * span
        kept = np.ones(len(order), bool)
        kept[1:] = value[1:] < np.minimum.accumulate(value)[:-1]
        return np.sort(order[kept])

    def _rounded(
        self, state: Ints, cost: Ints, room: Ints, kept: Ints, doublings: int
    ) -> tuple[Ints, Ints, int]:
        """Rooms rounded down until at most ``most`` labels are left, if that can be.

        Args:
            doublings: of the step, that may do; nothing else depends on it.

        Returns:
            The rooms, the labels, and the fewest doublings that do.
        """
        step = max(1, self.limit // 256)
        highest = (self.limit // step).bit_length() - 1

        def rounded(labels: Ints, doublings: int) -> tuple[Ints, Ints]:
            rooms = room // (step << doublings) * (step << doublings)
            return rooms, labels[self._undominated(state[labels], cost[labels], rooms[labels])]

        rooms, left = rounded(kept, doublings)
        if len(left) > self.most:
            while len(left) > self.most and doublings < highest:
                doublings += 1
                rooms, left = rounded(left, doublings)
            return rooms, left, doublings
        while doublings:
            finer, more = rounded(kept, doublings - 1)
            if len(more) > self.most:
                break
            rooms, left, doublings = finer, more, doublings - 1
        return rooms, left, doublings

    def _trace(self, nexts: list[Ints], joined: list[Flags], step: int, label: int) -> list[int]:
        """The blocks of the set that starts with that of ``step``, counted from the last."""
        members = [self.layers[-1 - step].block]
        while label >= 0:
            step -= 1
            if joined[step][label]:
                members.append(self.layers[-1 - step].block)
            label = int(nexts[step][label])
        return members


class _Besides:
    """The groups that an automaton leaves out.

    Attributes:
        rows: the blocks (columns) of each group (row).
        costs: ``F_D``, in 1/FINE bytes.
        home: the first block of each.
    """

    def __init__(self, automaton: Automaton, place: Ints) -> None:
        problem, self.masks = automaton.problem, automaton.besides
        home = {mask & -mask: k for k, mask in enumerate(problem.blocks)}
        members = [[home[1 << i] for i in bits(mask) if 1 << i in home] for mask in self.masks]
        self.home = np.array([min(some, key=place.__getitem__) for some in members], np.int64)
        starts = np.cumsum([0, *map(len, members)])
        flat = np.array([k for some in members for k in some], np.int64)
        shape = (len(members), len(problem.blocks))
        self.rows = csr_matrix((np.ones(len(flat), np.int64), flat, starts), shape)
        self.costs = FINE * np.array(list(map(problem.evaluator.dram, self.masks)), np.int64)
        self._count = problem.evaluator.work.add

    def run(self, prices: Ints) -> tuple[Ints, list[Undercutting]]:
        """As :meth:`Pricing.run`."""
        self._count(len(self.masks))
        shortfall = np.zeros(len(prices), np.int64)
        reduced = self.costs - self.rows @ prices
        np.minimum.at(shortfall, self.home, reduced)
        columns = self.home, reduced, self.costs // FINE
        found = [
            Undercutting(home, its, self.masks[k], cost)
            for k, (home, its, cost) in enumerate(zip(*(c.tolist() for c in columns), strict=True))
            if its < 0
        ]
        return shortfall, found

    def within(self, prices: Ints, reach: Ints) -> tuple[csr_matrix, Ints]:
        """Rows and costs, in bytes, of those whose reduced cost is at most that of their block."""
        (near,) = np.nonzero(self.costs - self.rows @ prices <= reach[self.home])
        return self.rows[near], self.costs[near] // FINE


def names_of(blocks: int) -> Ints:
    """A number per block; sums of them tell sets of blocks apart, but for an unlikely chance."""
    return np.random.default_rng(0).integers(1 << 62, size=blocks)


def proved_by(prices: Ints, shortfall: Ints) -> int:
    """What prices prove of any plan, in 1/FINE bytes; beyond 64 bits for huge sizes."""
    proved: int = sum(prices.tolist()) + sum(shortfall.tolist())
    return proved


def followed(labels: Ints, kept: Ints) -> Ints:
    """Labels that are kept, a column each, and nothing, which what follows none adds to."""
    found = np.zeros((len(labels), len(kept) + 1), np.int64)
    found[:, :-1] = labels.take(kept, 1)
    return found


def _focused(rates: Ints, used: Ints) -> Ints:
    """As many prices of room over the range that was useful; ``used``: use count of each.

    Where that is up to the highest, higher ones as well.
    """
    total = np.cumsum(np.where(rates > 0, used, 0))
    if not total[-1]:
        return rates
    low, high = np.searchsorted(total, [RARE * total[-1], (1 - RARE) * total[-1]])
    highest = rates[-1] * (HIGHER if high == len(rates) - 1 else 1)
    ends = rates[low] / WIDER, min(rates[high] * WIDER, highest)
    inner = np.geomspace(*ends, len(rates) - 2).astype(np.int64)
    return np.concatenate([[0], inner, [highest]])
