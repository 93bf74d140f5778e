"""How sets of blocks may go on, as an automaton of the same decisions knows.

Each of its states stands for many sets, and needs no more room than any of them up to an end; so a
set whose state cannot end within the buffer cannot either, and is not made. It may be one that does
not tell rows (:mod:`.tile_outline`), or one that has prices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from torch_getfuse.partition.wide.automaton import NEVER, Automaton, Layer, Near, rooms
from torch_getfuse.partition.wide.relaxation import FINE, LAYER
from torch_getfuse.partition.wide.tile_sets import Flags, Ints, TileSets

FIRST = -1  # in place of a tensor whose maker is full: the block starts a group

RATES = 6  # prices of room, of those that an oracle has

_BEYOND = 1 << 59  # cost of what cannot end
_CELLS = 40  # entries of tables per step


class Passes(NamedTuple):
    """How often a group reads its weights.

    Attributes:
        least, most: passes; 0 for any number.
        stay: whether the weights stay in the buffer.
    """

    least: int
    most: int
    stay: bool = False


class Way(NamedTuple):
    """How a block joins.

    Attributes:
        full: whether it is a full convolution.
        lines: tile lines of sinks that are alike, at least and at most, if it is the first to join.
        others: whether it may also join where it is not the first, or sinks are not alike.
        source: of several tensors that it reads, one whose maker is full, or :data:`FIRST`;
            ``None`` where that does not matter.
    """

    full: bool
    lines: tuple[int, int]
    others: bool
    source: int | None


class Step(NamedTuple):
    """A decision.

    Attributes:
        decided: number of decisions before it.
        ways: in which the block can join.
        number: of that in which it does; -1 if it stays out.
    """

    decided: int
    ways: Sequence[Way]
    number: int

    @property
    def way(self) -> Way | None:
        """The one in which it does."""
        return None if self.number < 0 else self.ways[self.number]

    @property
    def plain(self) -> int:
        """The number of the same way where sources do not matter; -1 for none."""
        way = self.way
        if way is None or way.source is None:
            return -1
        plain = Way(way.full, way.lines, way.others, None)
        return self.ways.index(plain) if plain in self.ways else -1


class Guide:
    """Follows sets through the states of an automaton, and leaves out those that cannot end.

    Args:
        layers: the automaton.
        limit: a set that holds as much, in bytes, does not fit.
        passes: those that it tells apart.
        starts: its state of the empty set, for each of them, with sinks that will be alike and
            that will not; -1 for none.
    """

    # Whether sets that are equal, but for the way to them, may go on in different ways.
    tells_apart: ClassVar[bool] = False

    def __init__(
        self, layers: Sequence[Layer], limit: int, passes: Sequence[Passes], starts: Ints
    ) -> None:
        self.layers, self.limit = layers, limit
        self._passes, self._starts = passes, starts
        self._to_end = [need for _, need in rooms(layers, limit)]
        self._share_by([int((need < NEVER).sum()) for need in self._to_end])

    def start(self, nothing: TileSets, passes: Sequence[Passes]) -> tuple[TileSets, Ints]:
        """Those empty sets that may end, and the number of each set among them, or -1.

        ``passes``: those that are told apart, each among some of the guide's.
        """
        among = np.array([self._among(one) for one in passes])
        other = np.cumsum(np.diff(nothing.differ, prepend=nothing.differ[:1]) != 0)
        nothing.outline = self._starts[other * len(self._passes) + among[nothing.passes]]
        may = nothing.outline >= 0
        return nothing.take(np.flatnonzero(may)), np.where(may, np.cumsum(may) - 1, -1)

    def share(self, decided: int) -> float:
        """The share of the states through which sets go on that precedes a decision."""
        return self._share[decided]

    def going(
        self,
        step: Step,
        before: TileSets,
        sets: TileSets,
        came: Ints,
        shared: Sequence[int],
    ) -> tuple[TileSets, Ints]:
        """Those of some sets that may end later, and the states they come from.

        A set may hold more of a tensor than its state does; what the state needs further for those
        that share it is less by that at most.

        Args:
            step: the last decision.
            before: the states before it.
            sets, came: the sets after it, and the states they come from.
            shared: rows of :attr:`TileSets.held` of which more may be held later.
        """
        if step.decided + 1 == len(self.layers):
            return sets, came
        sets.outline = self._following(step)[sets.outline]
        (go,) = np.nonzero(sets.outline >= 0)
        held = sets.held[shared].sum(axis=0)
        need = (self._to_end[step.decided + 1][sets.outline[go]] - held[go]).clip(0)
        go = go[sets.room[go] + need < self.limit]
        return self._near(step, before, sets.take(go), came[go], held[go])

    def _near(
        self, step: Step, before: TileSets, sets: TileSets, came: Ints, held: Ints
    ) -> tuple[TileSets, Ints]:
        """Those of some sets that may end within the limit which are worth it.

        ``held``: bytes that each holds of tensors of which more may be held later.
        """
        return sets, came

    def _following(self, step: Step) -> Ints:
        """The state after a step, by that before it; -1 where nothing can follow."""
        layer, way = self.layers[step.decided], step.way
        if way is None:
            return layer.leave
        found = layer.joins[step.number].to
        if step.plain >= 0:
            # A state that does not tell whether the block is full says nothing of its sources.
            return np.where(found < 0, layer.joins[step.plain].to, found)
        return found

    def sourced(self, step: Step, sets: TileSets) -> Flags:
        """Of which sets the states say that the block is full, so that its sources matter."""
        joins = self.layers[step.decided].joins
        only = (joins[step.number].to >= 0) & (joins[step.plain].to < 0)
        flags: Flags = only[sets.outline]
        return flags

    def _among(self, one: Passes) -> int:
        """The number of the range that has all passes of one."""
        return next(
            k
            for k, other in enumerate(self._passes)
            if other.stay == one.stay
            and other.least <= one.least
            and (not other.most or 0 < one.most <= other.most)
        )

    def _share_by(self, counts: Sequence[int]) -> None:
        """Share by so many states of each layer."""
        shares = np.cumsum([0, *counts]) / max(1, sum(counts))
        self._share: list[float] = shares.tolist()


class Priced(Guide):
    """An automaton with prices: leaves out sets that no plan cheaper than the known one may use.

    Args:
        automaton: the automaton.
        passes, starts: see :class:`Guide`.
        near: its prices.

    Attributes:
        within: how many of its states lie on paths that are near.
    """

    # What is near depends on the cost of the way.
    tells_apart: ClassVar[bool] = True

    def __init__(
        self, automaton: Automaton, passes: Sequence[Passes], starts: Ints, near: Near
    ) -> None:
        super().__init__(automaton.layers, automaton.limit, passes, starts)
        self._prices, self._most = near.prices, near.most
        some = np.unique(np.linspace(0, len(near.rates) - 1, RATES).astype(np.int64))
        self._rates = near.rates[some, None]
        self._full = self._rates * (self.limit - 1)
        self._after = self._costs_to_end()
        automaton.problem.evaluator.work.add(
            len(self.layers) * LAYER + len(some) * automaton.states // _CELLS
        )
        within = [
            int(((before[some] + after - self._full).max(axis=0) <= self._most).sum())
            for before, after in zip(near.before, self._after, strict=True)
        ]
        self._share_by(within)
        self.within = sum(within)

    def start(self, nothing: TileSets, passes: Sequence[Passes]) -> tuple[TileSets, Ints]:
        sets, numbers = super().start(nothing, passes)
        sets.hopes = np.zeros((len(self._rates), len(sets)), np.int64)
        return sets, numbers

    def _near(
        self, step: Step, before: TileSets, sets: TileSets, came: Ints, held: Ints
    ) -> tuple[TileSets, Ints]:
        added = FINE * sets.cost
        if step.way is not None:
            added -= self._prices[self.layers[step.decided].block]
        sets.hopes = sets.hopes + self._rates * (sets.room - before.room[came]) + added
        after = self._after[step.decided + 1].take(sets.outline, 1) - self._rates * held
        (go,) = np.nonzero((sets.hopes + after - self._full).max(axis=0) <= self._most)
        return sets.take(go), came[go]

    def _costs_to_end(self) -> list[Ints]:
        """Per layer, price of room and state: the least cost up to an end, room included."""
        found: list[Ints] = []
        for layer in reversed(self.layers):
            least = np.full((len(self._rates), len(layer.leave)), _BEYOND)
            for to, room, join in layer.steps():
                added = FINE * join.cost - self._prices[layer.block] if join else np.zeros_like(to)
                if found:
                    (some,) = np.nonzero(to >= 0)
                    costs = found[-1].take(to[some], 1) + self._rates * room[some] + added[some]
                    least[:, some] = np.minimum(least[:, some], costs)
                if join:
                    (some,) = np.nonzero(join.ends)
                    costs = self._rates * join.last_room[some] + added[some]
                    least[:, some] = np.minimum(least[:, some], costs)
            found.append(least)
        return found[::-1]
