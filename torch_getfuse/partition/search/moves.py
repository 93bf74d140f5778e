"""The space of legal plans: random plans, random edits, crossing over, repair.

A plan is a sorted tuple of group masks over whole blocks of a
:class:`~torch_getfuse.partition.problem.FusionProblem`. Every function here keeps it legal
(docs/method.md, section 1): groups are connected, and the graph of groups with the unfusable
operators as nodes of their own has no cycle. So groups are convex too. Validity is restored by a
repair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from random import Random

from torch_getfuse.partition.node_set import bits, is_connected
from torch_getfuse.partition.problem import FusionProblem, Repair
from torch_getfuse.partition.search.random_split import Closures, RandomSplit

Plan = tuple[int, ...]

MOVE, MERGE = 0.4, 0.4  # shares of the edits; the rest are cuts
REDRAWS = 16  # edits drawn until one gives a plan not met before

_MERGE, _DRAWN, _GROWN, _EDIT = 3, 10, 10, 30  # steps that they count


class PlanSpace:
    """Legal plans of one problem.

    Args:
        problem: the problem.
        repair: what an invalid group is given to first; random splitting takes what it declines.
    """

    def __init__(self, problem: FusionProblem, repair: Repair | None = None) -> None:
        self.problem = problem
        self._repair = repair
        self._closures = Closures(problem)
        self._split = RandomSplit(problem, self._closures)
        self._unfusable = tuple(1 << i for i in bits(problem.unfusable))
        self._count = problem.evaluator.work.add
        self._needs: dict[int, int] = {}
        self._feeds: dict[int, int] = {}

    # -- order ----------------------------------------------------------------------------

    def needs(self, mask: int) -> int:
        """The operators outside a mask that must run before it; remembered."""
        try:
            return self._needs[mask]
        except KeyError:
            found = 0
            for i in bits(mask):
                found |= self.problem.graph.predecessors[i]
            self._needs[mask] = found = found & ~mask
            return found

    def feeds(self, mask: int) -> int:
        """The operators outside a mask that must run after some of it; remembered."""
        try:
            return self._feeds[mask]
        except KeyError:
            found = 0
            for i in bits(mask):
                found |= self.problem.graph.successors[i]
            self._feeds[mask] = found = found & ~mask
            return found

    def order(self, groups: Sequence[int]) -> list[int] | None:
        """Groups and unfusable operators in an order in which they can run; ``None``: a cycle."""
        waiting = sorted([*groups, *self._unfusable])
        needs = self.needs
        found: list[int] = []
        done = 0
        while waiting:
            self._count(len(waiting))
            later = []
            for group in waiting:
                if needs(group) & ~done:
                    later.append(group)
                else:
                    done |= group
                    found.append(group)
            if len(later) == len(waiting):
                return None
            waiting = later
        return found

    def _merged(self, plan: Plan, mask: int) -> int:
        """``mask`` and the groups on paths from it back to it; 0 if one is unfusable."""
        self._count(_MERGE * (len(plan) + len(self._unfusable)))
        others = [g for g in (*plan, *self._unfusable) if not g & mask]
        below = _reach(others, self.feeds(mask), self.feeds)
        above = _reach(others, self.needs(mask), self.needs)
        for group in others:
            if group & below and group & above:
                if group & self.problem.unfusable:
                    return 0
                mask |= group
        return mask

    # -- whole plans ----------------------------------------------------------------------

    def random_plan(self, rng: Random) -> Plan:
        """A random legal plan with valid groups.

        The groups are drawn in an order in which they can run. Each starts at a random block
        that can run next and grows to a size between one block and all of them, drawn evenly on
        a logarithmic scale, by a random consumer of what is there and whatever else that
        consumer needs. So it is connected and legal by construction, and every legal plan can
        come out. Unfusable operators run as soon as they can.
        """
        closures, unfusable = self._closures, self.problem.unfusable
        most = math.log(len(self.problem.blocks) + 1)
        groups: list[int] = []
        done = 0
        ready = self._sources()
        while True:
            for block in ready:
                if block & unfusable:
                    done |= block
                    ready += self._freed(block, done)
            ready = [block for block in ready if not block & unfusable]
            if not ready:
                return self.repaired(groups, rng)
            self._count(_DRAWN)
            group = ready[rng.randrange(len(ready))]
            size = int(math.exp(rng.random() * most))
            count = 1
            border = list(bits(self.feeds(group)))
            while border and count < size:
                self._count(_GROWN + len(border))
                i = border.pop(rng.randrange(len(border)))
                more = closures.upstream(i) & ~done & ~group
                if more & unfusable:
                    continue
                group |= more
                count += len(closures.leaders(more))
                border += [j for j in bits(self.feeds(more)) if j not in border]
                border = [j for j in border if not group >> j & 1]
            groups += self.problem.parts(group)
            done |= group
            ready = [block for block in ready if not block & group]
            ready += self._freed(group, done)

    def _sources(self) -> list[int]:
        """Blocks and unfusable operators that wait for nothing."""
        before = self.problem.graph.predecessors
        return [self._closures.block[i] for i, mask in enumerate(before) if not mask]

    def _freed(self, mask: int, done: int) -> list[int]:
        """Blocks and unfusable operators that can run once ``mask``, the last of ``done``, has."""
        followers = (self._closures.block[i] for i in bits(self.feeds(mask)))
        return [b for b in dict.fromkeys(followers) if not (b & done or self.needs(b) & ~done)]

    def repaired(self, groups: Sequence[int], rng: Random) -> Plan:
        """The plan of ``groups`` with the invalid ones split into valid ones."""
        valid = self.problem.evaluator.valid
        found: list[int] = []
        for group in groups:
            if valid(group):
                found.append(group)
                continue
            parts = self._repair(group, rng) if self._repair is not None else None
            found += self._split(group, rng) if parts is None else parts
        return tuple(sorted(found))

    def crossed(self, first: Plan, second: Plan, rng: Random) -> Plan:
        """The groups of ``first`` up to a random moment of its run, then those of ``second``.

        What has run by that moment is a down-set, so ``second`` cut down to the rest stays legal.
        Its groups may be invalid: they are not repaired yet.
        """
        order = self.order(first)
        assert order is not None, "a legal plan can run"
        done = 0
        for group in order[: rng.randint(0, len(order))]:
            done |= group
        groups = [group for group in first if group & done]
        for group in second:
            if group & ~done:
                groups += self.problem.parts(group & ~done)
        return tuple(sorted(groups))

    # -- edits ----------------------------------------------------------------------------

    def edited(self, plan: Plan, rng: Random, seen: Collection[Plan] = ()) -> Plan:
        """``plan`` after one random edit and repair.

        Edits that would make a cycle, change nothing, or lead to a plan of ``seen`` are drawn
        again, up to :data:`REDRAWS` times; then whatever came last is taken.
        """
        found = plan
        for _ in range(REDRAWS if plan else 0):
            self._count(_EDIT + len(plan))
            draw = rng.random()
            if draw < MOVE:
                changed = self._move(plan, rng)
            elif draw < MOVE + MERGE:
                changed = self._merge(plan, rng)
            else:
                changed = self._cut(plan, rng)
            if changed is None:
                continue
            removed, groups = changed
            found = self._replaced(plan, removed, self.repaired(groups, rng))
            if found != plan and found not in seen:
                break
        return found

    @staticmethod
    def _replaced(plan: Plan, removed: int, groups: Sequence[int]) -> Plan:
        return tuple(sorted([*(g for g in plan if not g & removed), *groups]))

    def _pair(self, plan: Plan, rng: Random) -> tuple[int, int, int] | None:
        """A random group, the group across a random one of its borders, and the operator there."""
        group = rng.choice(plan)
        border = list(bits((self.feeds(group) | self.needs(group)) & self.problem.fusable))
        if not border:
            return None
        i = rng.choice(border)
        return group, next(other for other in plan if other >> i & 1), i

    def _move(self, plan: Plan, rng: Random) -> tuple[int, list[int]] | None:
        """Move a block across a border, with what must come along for the order's sake."""
        pair = self._pair(plan, rng)
        if pair is None:
            return None
        group, other, i = pair
        closures = self._closures
        follows = self.feeds(group) >> i & 1
        moved = other & (closures.upstream(i) if follows else closures.downstream(i))
        if not is_connected(group | moved, self.problem.near):
            return None  # only the order, no tensor, joins them
        groups = [group | moved, *self.problem.parts(other & ~moved)]
        rest = [g for g in plan if g not in (group, other)]
        return None if self.order([*rest, *groups]) is None else (group | other, groups)

    def _merge(self, plan: Plan, rng: Random) -> tuple[int, list[int]] | None:
        """Merge two neighbours, and the groups that would be on a cycle with them."""
        pair = self._pair(plan, rng)
        merged = self._merged(plan, pair[0] | pair[1]) if pair else 0
        if not merged or not is_connected(merged, self.problem.near):
            return None
        return merged, [merged]

    def _cut(self, plan: Plan, rng: Random) -> tuple[int, list[int]] | None:
        """Cut a group in two, along the order."""
        group = rng.choice(plan)
        if group == self._closures.block[(group & -group).bit_length() - 1]:
            return None
        cut = self._closures.random_cut(group, rng)
        return group, self.problem.parts(cut) + self.problem.parts(group & ~cut)


def _reach(groups: Sequence[int], front: int, step: Callable[[int], int]) -> int:
    """``front``, the groups that it touches, and all that they lead to by ``step``."""
    reached, left = front, list(groups)
    while True:
        later = []
        for group in left:
            if group & reached:
                reached |= group | step(group)
            else:
                later.append(group)
        if len(later) == len(left):
            return reached
        left = later
