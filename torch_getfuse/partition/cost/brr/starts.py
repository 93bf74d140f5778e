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
from typing import NamedTuple

from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.node_set import bits

Pair = tuple[int, int]
"""Bytes held at least, and per further tile line."""

Sums = tuple[int, int, int]
"""Sums over convolutions (docs/exact-search.md, "Passes"): bytes of the rows that the sinks need in
the end; less those by which a tile may hold less than its share; and of all rows."""

NOTHING: Sums = (0, 0, 0)
ALWAYS, NEVER = 0, 1
"""Literals of condition 0, which is always met. Literal ``2 * k`` is condition ``k``, ``2 * k + 1``
its opposite."""


class Condition(NamedTuple):
    """Something that is met or not, as the starts are chosen.

    Attributes:
        sources: literals of which one must hold; none: a first operator is full.
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
        """Mask of the first operator that it is about."""
        return self.same & -self.same


NO_OPERATORS = (Condition((), 0, 0, NOTHING, NOTHING),)


class Price(NamedTuple):
    """What a condition costs.

    Attributes:
        sources: as :attr:`Condition.sources`.
        first: mask of the first operator, for a condition without sources.
        met, unmet: bytes in either case.
    """

    sources: tuple[int, ...]
    first: int
    met: Pair
    unmet: Pair


class Choice(NamedTuple):
    """One choice of starts.

    Attributes:
        need, line: bytes held at least (``F_min``), and per further tile line (``F_line``).
        full: mask of the first operators that are full.
    """

    need: int
    line: int
    full: int


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
    met: list[bool] = []
    found = 0
    for k, condition in enumerate(conditions):
        if condition.sources:
            met.append(any(met[literal >> 1] != literal & 1 for literal in condition.sources))
        else:
            met.append(not k or bool(condition.first & full))
        found |= condition.same if met[k] else condition.other
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


def pareto_front(prices: Sequence[Price]) -> list[Choice]:
    """The choices than which none needs less and no more per line, or no more and less per line.

    Args:
        prices: of the conditions, each after those that it depends on; the first one is always
            met.

    Returns:
        By rising ``need`` and falling ``line``. Of choices that hold equally much, the one whose
        mask of full operators is the least number.
    """
    matters = [False] * len(prices)
    for k in range(len(prices) - 1, 0, -1):
        price = prices[k]
        if matters[k] or price.met != price.unmet:
            matters[k] = True
            for literal in price.sources:
                matters[literal >> 1] = True
    joined = [k for k, price in enumerate(prices) if price.sources and matters[k]]
    need, line = prices[0].met
    for k, price in enumerate(prices):
        if price.sources and not matters[k]:
            need, line = need + price.met[0], line + price.met[1]
    start = Choice(need, line, 0)
    if not joined:
        front = [start]
        for price in prices[1:]:
            if not price.sources:
                front = _best(_moved(front, price, True) + _moved(front, price, False))
        return front
    return _decide(prices, joined, start)


def _decide(prices: Sequence[Price], joined: Sequence[int], start: Choice) -> list[Choice]:
    """:func:`pareto_front` where the conditions ``joined`` depend on others.

    A state is the mask of those among them of whose sources one is known to hold.
    """
    feeds: dict[int, list[tuple[int, int]]] = {}
    waiting = {}
    for k in joined:
        waiting[k] = len(prices[k].sources)
        for literal in prices[k].sources:
            feeds.setdefault(literal >> 1, []).append((k, literal & 1))
    # A condition is decided as soon as its sources are, so that few are half known.
    order = []
    for free in (k for k in range(1, len(prices)) if not prices[k].sources):
        ready = [free]
        while ready:
            k = ready.pop()
            order.append(k)
            for fed, _ in feeds.get(k, ()):
                waiting[fed] -= 1
                if not waiting[fed]:
                    ready.append(fed)
    states: dict[int, list[Choice]] = {0: [start]}
    for k in order:
        price = prices[k]
        targets = [
            sum(1 << fed for fed, opposite in feeds.get(k, ()) if opposite != met)
            for met in (False, True)
        ]
        grown: dict[int, list[Choice]] = {}
        for state, choices in states.items():
            for met in (bool(state >> k & 1),) if price.sources else (True, False):
                target = state & ~(1 << k) | targets[met]
                grown.setdefault(target, []).extend(_moved(choices, price, met))
        states = {state: _best(choices) for state, choices in grown.items()}
    return states[0]


def _moved(choices: list[Choice], price: Price, met: bool) -> list[Choice]:
    """Choices with one more condition decided."""
    (need, line), full = (price.met, price.first) if met else (price.unmet, 0)
    return [Choice(a + need, b + line, c | full) for a, b, c in choices]


def _best(choices: list[Choice]) -> list[Choice]:
    """The Pareto front of choices."""
    if len(choices) > 1:
        choices.sort()
        found = [choices[0]]
        for choice in choices:
            if choice.line < found[-1].line:
                found.append(choice)
        return found
    return choices


def _plus(a: Sums, b: Sums) -> Sums:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]
