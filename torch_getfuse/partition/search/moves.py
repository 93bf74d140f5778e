"""The space of legal plans: random plans, random edits, crossover, repair.

A plan is a sorted tuple of group masks over whole blocks of a
:class:`~torch_getfuse.partition.problem.FusionProblem`. Every function here keeps it legal
(docs/method.md, section 1): groups are connected, and the graph of groups, with each unfusable
operator as a separate node, has no cycle. So groups are convex too. A repair restores validity.
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
REDRAWS = 16  # edits drawn at most until one gives a plan not seen before

_MERGE, _DRAWN, _GROWN, _EDIT = 3, 10, 10, 30  # steps counted for each


class PlanSpace:
    """Legal plans of one problem.

    Args:
        problem: the problem.
        repair: tried first on each invalid group; random splitting handles what it declines.
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
        """The operators outside a mask that must run before it; cached."""
        try:
            return self._needs[mask]
        except KeyError:
            before = 0
            for i in bits(mask):
                before |= self.problem.graph.predecessors[i]
            self._needs[mask] = before = before & ~mask
            return before

    def feeds(self, mask: int) -> int:
        """The operators outside a mask that must run after some of it; cached."""
        try:
            return self._feeds[mask]
        except KeyError:
            after = 0
            for i in bits(mask):
                after |= self.problem.graph.successors[i]
            self._feeds[mask] = after = after & ~mask
            return after

    def order(self, groups: Sequence[int]) -> list[int] | None:
        """Groups and unfusable operators in an executable order; ``None`` if there is a cycle."""
        waiting = sorted([*groups, *self._unfusable])
        needs = self.needs
        ordered: list[int] = []
        done = 0
        while waiting:
            self._count(len(waiting))
            later = []
            for group in waiting:
                if needs(group) & ~done:
                    later.append(group)
                else:
                    done |= group
                    ordered.append(group)
            if len(later) == len(waiting):
                return None
            waiting = later
        return ordered

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

        The groups are drawn in an executable order. Each starts at a random block that can run
        next and grows to a target size, drawn log-uniformly between one block and all of them,
        by adding a random consumer of its members and everything else which that consumer needs.
        So it is connected and legal by construction, and every legal plan is possible. Unfusable
        operators run as soon as they can.
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
        """Blocks and unfusable operators without predecessors."""
        before = self.problem.graph.predecessors
        blocks = (self._closures.block[i] for i, mask in enumerate(before) if not mask)
        return [block for block in dict.fromkeys(blocks) if not self.needs(block)]

    def _freed(self, mask: int, done: int) -> list[int]:
        """Blocks and unfusable operators that can run after ``mask``, the last part of ``done``."""
        followers = (self._closures.block[i] for i in bits(self.feeds(mask)))
        return [b for b in dict.fromkeys(followers) if not (b & done or self.needs(b) & ~done)]

    def repaired(self, groups: Sequence[int], rng: Random) -> Plan:
        """The plan of ``groups`` with invalid groups split into valid ones."""
        valid = self.problem.evaluator.valid
        valid_groups: list[int] = []
        for group in groups:
            if valid(group):
                valid_groups.append(group)
                continue
            parts = self._repair(group, rng) if self._repair is not None else None
            valid_groups += self._split(group, rng) if parts is None else parts
        return tuple(sorted(valid_groups))

    def crossed(self, first: Plan, second: Plan, rng: Random) -> Plan:
        """The groups of ``first`` up to a random point of its order, then those of ``second``.

        The operators up to that point are a down-set, so ``second`` restricted to the others stays
        legal. The groups may be invalid: they are not repaired here.
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

        Edits that would make a cycle, change nothing, or give a plan in ``seen`` are drawn
        again, up to :data:`REDRAWS` times in all; then the last plan is returned.
        """
        new_plan = plan
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
            new_plan = self._replaced(plan, removed, self.repaired(groups, rng))
            if new_plan != plan and new_plan not in seen:
                break
        return new_plan

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
        """Move a block across a border, with the operators that the order requires to move too."""
        pair = self._pair(plan, rng)
        if pair is None:
            return None
        group, other, i = pair
        closures = self._closures
        follows = self.feeds(group) >> i & 1
        moved = other & (closures.upstream(i) if follows else closures.downstream(i))
        if not is_connected(group | moved, self.problem.near):
            return None  # joined by an order constraint only, not by a tensor
        groups = [group | moved, *self.problem.parts(other & ~moved)]
        rest = [g for g in plan if g not in (group, other)]
        return None if self.order([*rest, *groups]) is None else (group | other, groups)

    def _merge(self, plan: Plan, rng: Random) -> tuple[int, list[int]] | None:
        """Merge two neighbours, and the groups that would form a cycle with them."""
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
    """``front``, the groups that overlap it, and everything reachable from those by ``step``."""
    reached, waiting = front, list(groups)
    while True:
        later = []
        for group in waiting:
            if group & reached:
                reached |= group | step(group)
            else:
                later.append(group)
        if len(later) == len(waiting):
            return reached
        waiting = later
