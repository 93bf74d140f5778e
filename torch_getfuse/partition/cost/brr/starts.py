"""What the choice of its starts decides in a BRR group: which convolutions are full, at what price.

Each first operator of a group is full or partial on its own. A local operator is full if one that
it reads is, a convolution if none is. So whether an operator is full depends on a *condition*: that
a first operator is full, or that one of several conditions is met. An operator follows a
condition or its opposite, and most groups have one condition for each first operator and one more
where branches join. What a group holds is a sum over conditions, each with a price if it is met and
one if it is not.

The choices that matter are those on the Pareto front of ``F_min`` and ``F_line``.
:func:`pareto_front` finds it by dynamic programming: conditions are decided in turn, and of what
was decided before only that is kept which a condition still to be decided depends on. The front is
exact, and found in time linear in the number of first operators where few branches are open at a
time, though they have exponentially many choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.node_set import bits

Sums = tuple[int, int, int]
"""Bytes of convolutions' rows (docs/exact-search.md, "Passes"): those that the sinks need in the
end; those by which a tile may hold less than its share; and all of them."""

NOTHING: Sums = (0, 0, 0)
ALWAYS, NEVER = 0, 1
"""Literals of condition 0, which is always met. Literal ``2 * k`` is condition ``k``, ``2 * k + 1``
its opposite."""


class Condition(NamedTuple):
    """Something that is met or not, as the starts are chosen.

    Attributes:
        sources: literals of which one must hold; none: a first operator is full. Condition 0 is
            its own.
        same, other: masks of the members that are full if it is met, and if it is not.
        met, unmet: what these hold in either case.
    """

    sources: tuple[int, ...]
    same: int
    other: int
    met: Sums
    unmet: Sums

    @property
    def first(self) -> int:
        """Mask of the first operator that it is about; 0 for others."""
        return 0 if self.sources else self.same & -self.same


NO_OPERATORS = (Condition((ALWAYS,), 0, 0, NOTHING, NOTHING),)


Price = list[int]
"""What a condition costs: bytes held at least and per further tile line, if it is met; the same if
it is not."""

Choice = tuple[int, int, int]
"""One choice of starts: bytes held at least (``F_min``) and per further tile line (``F_line``), and
the mask of the first operators that are full."""


class Starts:
    """The conditions of the groups of one graph.

    Args:
        graph: the operator graph.
        local: mask of its local operators.
        full, some: per operator, what its output adds to :attr:`Condition.met` if it is full, and
            if it is partial.
        inputs: per operator, bytes of all that it reads.
    """

    def __init__(
        self,
        graph: OpGraph,
        local: int,
        full: Sequence[Sums],
        some: Sequence[Sums],
        inputs: Sequence[int],
    ) -> None:
        self._makers = graph.makers
        self._local = local
        self._full, self._some, self._inputs = full, some, inputs

    def join(
        self, conditions: tuple[Condition, ...], mask: int, added: int
    ) -> tuple[Condition, ...]:
        """The conditions of the group ``mask``, which ``added`` made of one that has these."""
        found = list(conditions)
        for i in bits(added):
            before = self._makers[i] & mask
            local = bool(self._local >> i & 1)
            literal = _followed(found, before)
            k, opposite = literal >> 1, bool(literal & 1)
            sources, same, other, met, unmet = found[k]
            if before and not local:
                opposite = not opposite
            if opposite:
                other |= 1 << i
            else:
                same |= 1 << i
            if not local:
                full, some = self._full[i], self._some[i]
                met = _plus(met, some if opposite else full)
                unmet = _plus(unmet, full if opposite else some)
            if not before:  # a local operator holds what it reads, a convolution if it is partial
                whole = 0, 0, self._inputs[i]
                unmet = _plus(unmet, whole)
                if local:
                    met = _plus(met, whole)
            found[k] = Condition(sources, same, other, met, unmet)
        return tuple(found)


def _followed(conditions: list[Condition], before: int) -> int:
    """The literal that one of the operators ``before`` is full; a new condition if there is none.

    Without operators: that the operator at hand, which is first, is full.
    """
    if before and not before & (before - 1):
        for k, (_, same, other, _, _) in enumerate(conditions):
            if same & before:
                return 2 * k
            if other & before:
                return 2 * k + 1
    literals = set()
    for k, condition in enumerate(conditions):
        if condition.same & before:
            literals.add(2 * k)
        if condition.other & before:
            literals.add(2 * k + 1)
    literals.discard(NEVER)
    if len(literals) == 1:
        return literals.pop()
    if before and not literals:
        return NEVER
    if ALWAYS in literals or any(literal ^ 1 in literals for literal in literals):
        return ALWAYS
    sources = tuple(sorted(literals))
    for k, condition in enumerate(conditions):
        if sources and condition.sources == sources:
            return 2 * k
    conditions.append(Condition(sources, 0, 0, NOTHING, NOTHING))
    return 2 * len(conditions) - 2


def met_members(conditions: Sequence[Condition], full: int) -> int:
    """Mask of the members that are full if the first operators ``full`` are, and no others."""
    met = [True]
    found = conditions[0].same
    for condition in conditions[1:]:
        if condition.sources:
            met.append(any(met[literal >> 1] != literal & 1 for literal in condition.sources))
        else:
            met.append(bool(condition.first & full))
        found |= condition.same if met[-1] else condition.other
    return found


def whole_maps(conditions: Sequence[Condition], full: bool) -> int:
    """Bytes of all rows that are held, outside inputs included, if all starts are full, or none."""
    met = [True]
    total = conditions[0].met[2]
    for condition in conditions[1:]:
        sources = condition.sources
        met.append(any(met[source >> 1] != source & 1 for source in sources) if sources else full)
        total += (condition.met if met[-1] else condition.unmet)[2]
    return total


def fewest_rows(conditions: Sequence[Condition]) -> tuple[int, int]:
    """The first of the :data:`Sums` at least, and the second at most, however starts are chosen."""
    needed = short = 0
    for condition in conditions:
        (a, b, _), (c, d, _) = condition.met, condition.unmet
        needed += a if a < c else c
        short += b if b > d else d
    return needed, short


def pareto_front(
    sources: Sequence[tuple[int, ...]], firsts: Sequence[int], prices: Sequence[Price]
) -> list[Choice]:
    """The choices than which none needs less and no more per line, or no more and less per line.

    Args:
        sources: of each condition, as :attr:`Condition.sources`; condition 0 is always met, and
            the others come after those that they depend on.
        firsts: mask of the first operator of each condition that has one, else 0.
        prices: of each condition.

    Returns:
        By rising need and falling bytes per line. Of choices that hold equally much, the one whose
        mask of full operators is the least number.
    """
    count = len(prices)
    need, line = prices[0][:2]
    joined = []
    if count > 2:
        matters = [False] * count
        for k in range(count - 1, 0, -1):
            a, b, c, d = prices[k]
            if not matters[k] and a == c and b == d and sources[k]:
                need, line = need + a, line + b
                continue
            for literal in sources[k]:
                matters[literal >> 1] = True
            if sources[k]:
                joined.append(k)
    front = [(need, line, 0)]
    if joined:
        return _decide(sources, firsts, prices, joined, front)
    for k in range(1, count):
        if not sources[k]:
            front = _best(
                _moved(front, prices[k], True, firsts[k]) + _moved(front, prices[k], False)
            )
    return front


def _decide(
    sources: Sequence[tuple[int, ...]],
    firsts: Sequence[int],
    prices: Sequence[Price],
    joined: Sequence[int],
    start: list[Choice],
) -> list[Choice]:
    """:func:`pareto_front` where the conditions ``joined`` depend on others.

    A state is the mask of those among them of whose sources one is known to hold.
    """
    states = {0: start}
    for k, if_met, if_unmet in _order(tuple(sources), tuple(joined)):
        known = 1 << k
        grown: dict[int, list[Choice]] = {}
        for state, choices in states.items():
            if state & known or not sources[k]:
                grown.setdefault(state & ~known | if_met, []).extend(
                    _moved(choices, prices[k], True, firsts[k])
                )
            if not state & known:
                grown.setdefault(state | if_unmet, []).extend(_moved(choices, prices[k], False))
        states = {state: _best(choices) for state, choices in grown.items()}
    return states[0]


@lru_cache(1 << 12)
def _order(
    sources: tuple[tuple[int, ...], ...], joined: tuple[int, ...]
) -> tuple[tuple[int, int, int], ...]:
    """The order in which conditions are decided, and what is known of others if each is met.

    Groups that begin alike ask for the same.

    Returns:
        Per condition: itself, and masks of the ``joined`` of whose sources one holds if it is met,
        and if it is not.
    """
    feeds: dict[int, list[tuple[int, int]]] = {}
    waiting = {}
    for k in joined:
        waiting[k] = len(sources[k])
        for literal in sources[k]:
            feeds.setdefault(literal >> 1, []).append((k, literal & 1))
    # A condition is decided as soon as its sources are, so that few are half known.
    found = []
    for free in range(1, len(sources)):
        ready = [] if sources[free] else [free]
        while ready:
            k = ready.pop()
            if_met = if_unmet = 0
            for fed, opposite in feeds.get(k, ()):
                if opposite:
                    if_unmet |= 1 << fed
                else:
                    if_met |= 1 << fed
                waiting[fed] -= 1
                if not waiting[fed]:
                    ready.append(fed)
            found.append((k, if_met, if_unmet))
    return tuple(found)


def _moved(choices: list[Choice], price: Price, met: bool, first: int = 0) -> list[Choice]:
    """Choices with one more condition decided."""
    need, line = price[:2] if met else price[2:]
    return [(a + need, b + line, c | first) for a, b, c in choices]


def _best(choices: list[Choice]) -> list[Choice]:
    """The Pareto front of choices."""
    if len(choices) > 1:
        choices.sort()
        found = [choices[0]]
        least = found[0][1]
        for choice in choices:
            if choice[1] < least:
                found.append(choice)
                least = choice[1]
        return found
    return choices


def _plus(a: Sums, b: Sums) -> Sums:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]
