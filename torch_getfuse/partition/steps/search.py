"""Exact search over sequences of steps: dynamic programming over down-sets and residents.

After each step of a legal plan the operators that have run are a down-set, and some of the tensors
that it hands on are on chip. What the rest of the plan can cost depends on these two alone. So
the cheapest way to each pair, in the order of the down-sets' sizes, leads to the optimum.

The groups of the next step are grown as in :mod:`..exact.down_sets`: by the ideals of consumers, so
that only connected sets are visited, each once per down-set. A set is given up where its storages
alone do not fit, or where it can only run with weights read again (it fits neither as lines with
all weights held nor in one stripe, and no larger set will) and that is more than a plan up to the
ceiling has left. docs/exact-search.md has the proofs.
"""

from __future__ import annotations

from typing import NamedTuple

from torch_getfuse.partition.cost.cascade.pricing import ANY, Beside, least_reread
from torch_getfuse.partition.cost.scheme import counted
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.steps.lattice import Edge, Lattice, TooWide
from torch_getfuse.partition.steps.problem import Found

_PRICE, _CHOICE = 16, 4
"""Counted as work for each time that a step is priced, and for each set of residents beside it."""

_MOST_NEW = 12
"""Tensors that a step makes and that may stay, of which all subsets are tried."""


class Reached(NamedTuple):
    """The cheapest way to a down-set with certain tensors on chip.

    Attributes:
        cost: bytes moved so far.
        steps: their number; of plans with equal traffic the shortest is kept.
        before, resident: down-set and residents before the last step.
        mask: the last step.
    """

    cost: int
    steps: int
    before: int
    resident: int
    mask: int


class StepSearch:
    """One run of the dynamic program.

    Args:
        lattice: the steps that it may take.
        ceiling: bytes; dearer plans are not looked for.
        width: sets of residents that are followed from each down-set; ``None``: all, which makes
            the result the cheapest.
    """

    def __init__(self, lattice: Lattice, ceiling: int = ANY, width: int | None = None) -> None:
        self.problem, self.lattice, self.ceiling = lattice.problem, lattice, ceiling
        self.width = width
        self.levels: list[dict[int, dict[int, Reached]]] = [
            {} for _ in range(len(self.problem.graph) + 1)
        ]
        self.levels[0][0] = {0: Reached(0, 0, 0, 0, 0)}

    def run(self) -> Found | None:
        """The cheapest plan up to the ceiling; ``None`` where there is none.

        Raises:
            TooWide: where a step makes too many tensors that may stay.
            OutOfWork: where a limit of the problem's work strikes first.
        """
        scheme, work = self.problem.scheme, self.problem.work
        for level in self.levels[:-1]:
            for done in sorted(level):
                states = level[done]
                if self.width is not None and len(states) > self.width:
                    states = self._promising(done, states)
                for edge in self.lattice.edges.get(done, ()):
                    counted(scheme, work, self._take, done, states, edge)
        ends = self.levels[-1].get(self.problem.everything)
        return None if ends is None else self._found(ends[0])

    def _promising(self, done: int, states: dict[int, Reached]) -> dict[int, Reached]:
        """Of the pairs with one down-set those that cost least with what they owe.

        And the one with nothing on chip, from which steps that fit alone always go on.
        """
        size, to_read = self.problem.facts.size, self.problem.handed(done).to_read

        def promise(pair: tuple[int, Reached]) -> tuple[int, int, int]:
            alive, reached = pair
            owed = sum([size[t] for t in bits(to_read & ~alive)])
            return reached.cost + owed, reached.steps, alive

        kept = dict(sorted(states.items(), key=promise)[: self.width])
        return kept if 0 not in states else {0: states[0], **kept}

    def _found(self, last: Reached) -> Found:
        masks, residents = [], 0
        at = last
        while at.mask:
            masks.append(at.mask)
            residents |= at.resident
            at = self.levels[at.before.bit_count()][at.before][at.resident]
        found = Found(tuple(reversed(masks)), residents, last.cost)
        self.problem.offer(found)
        return found

    def _take(self, done: int, states: dict[int, Reached], edge: Edge) -> None:
        """The pairs to which a step leads."""
        problem = self.problem
        facts, size, limit = problem.facts, problem.facts.size, problem.buffer_bytes
        mask, next_ = edge.mask, edge.next
        left = self.lattice.left[next_]
        handed, to_read = problem.handed(done, mask)
        must = problem.kept & handed
        if mask & problem.unfusable:
            if 0 in states and not must:
                moved = problem.scheme.unfusable_step(mask).dram.total
                owed = sum([size[t] for t in bits(to_read)])
                rest = max(left.moved, left.owing + owed)
                if states[0].cost + moved + rest <= self.ceiling:
                    self._enter(next_, 0, states[0], moved, done, 0, mask)
            return
        group = problem.scheme.group(mask)
        made = group.makes & ~facts.outputs
        written = sum([size[t] for t in bits(group.makes & (facts.outputs | handed))])
        known = problem.handed(done).tensors
        starting = handed & problem.may_stay & (group.makes | group.loads & ~known)
        choices = [
            (chosen, sum([size[t] for t in bits(chosen & made)]))
            for chosen in self._choices(starting & ~must, starting & must)
        ]
        for alive, reached in states.items():
            moved = written + group.weights
            moved += sum([size[t] for t in bits(group.loads & ~alive)])
            if reached.cost + edge.moved + left.moved > self.ceiling:
                continue
            staying = alive & handed
            if must & ~(staying | starting):
                continue  # what is pinned was not on chip before this step, or cannot be
            others = sum([size[t] for t in bits(alive & ~group.tensors)])
            problem.work.add(_CHOICE * len(choices))
            for chosen, saved in choices:
                now = staying | chosen
                owed = sum([size[t] for t in bits(to_read & ~now)])
                rest = max(left.moved, left.owing + owed)
                most = self.ceiling - (reached.cost + moved - saved + rest)
                if most < 0:
                    continue
                problem.work.add(_PRICE)
                touched = (alive | chosen) & group.tensors
                beside = Beside(touched, now & group.tensors, others, problem.residency)
                reread = least_reread(group, beside, limit, most)
                if reread is not None:
                    self._enter(next_, now, reached, moved - saved + reread, done, alive, mask)

    def _enter(
        self,
        done: int,
        alive: int,
        reached: Reached,
        moved: int,
        before: int,
        resident: int,
        mask: int,
    ) -> None:
        """Keep a way to a pair if it is the cheapest, or as cheap with fewer steps."""
        states = self.levels[done.bit_count()].setdefault(done, {})
        known = states.get(alive)
        cost, steps = reached.cost + moved, reached.steps + 1
        if known is None or (cost, steps) < (known.cost, known.steps):
            states[alive] = Reached(cost, steps, before, resident, mask)

    def _choices(self, tensors: int, always: int) -> list[int]:
        """Masks of the sets of new residents that are tried, the smallest first.

        Args:
            tensors: those that may be in them.
            always: those that are in all of them.

        Raises:
            TooWide: where there are too many.
        """
        count, size = tensors.bit_count(), self.problem.facts.size
        found = [always]
        if count > _MOST_NEW:
            if self.width is None:
                raise TooWide(f"a step that makes {count} tensors which may stay")
            for tensor in sorted(bits(tensors), key=lambda t: (-size[t], t)):
                found.append(found[-1] | 1 << tensor)
            return found
        for tensor in bits(tensors):
            found += [mask | 1 << tensor for mask in found]
        return found
