"""The optimum of cascade by enumeration: every sequence of steps under every set of residents."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from tests.cascade_simulator import LINE, UNFUSABLE, Around, Cascade, Way, subsets
from tests.graphs import cascade_graph, grown_group, interesting_buffer
from torch_getfuse.partition.node_set import bits

Point = tuple[int, int]
"""Traffic of a way and the buffer that it needs, without what is beside."""


def unbeaten(points: list[Point]) -> list[Point]:
    """The points that no other beats in both, by traffic."""
    kept: list[Point] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


@dataclass
class Move:
    """A step after the operators that are done; sets of tensors are masks of their numbers.

    Attributes:
        touched: tensors that the step touches.
        across: tensors alive at the step that it does not touch.
        first: graph inputs that no step before reads.
        last: of those touched, what no later step reads.
        price: residents that matter -> least traffic, or ``None`` where it cannot run.
    """

    step: int
    touched: int
    across: int
    first: int
    last: int
    price: dict[int, int | None] = field(default_factory=dict)


class Optimum(NamedTuple):
    """The least total, and one plan that has it."""

    total: int
    steps: list[tuple[int, Way]]
    residents: frozenset[str]


class Brute:
    """At most ~7 operators: the tensors have 2^n subsets, each tried with every sequence.

    A sequence is a chain of down-sets. Under one set of residents what a step costs depends on the
    operators before it alone, so of all beginnings that did the same operators the cheapest is
    carried on; a beginning that cannot become cheaper than what is known is dropped.
    """

    def __init__(self, cascade: Cascade) -> None:
        self.cascade, self.graph = cascade, cascade.graph
        self.names = list(self.graph.tensors)
        self.number = {name: 1 << i for i, name in enumerate(self.names)}
        self.everything = (1 << len(self.graph)) - 1
        self.points: dict[tuple[int, int, int, int], list[Point]] = {}
        self.held: dict[int, list[Point]] = {}
        self.bytes = [cascade.whole[name] for name in self.names]
        self.readers = [cascade.read_by(name) for name in self.names]
        self.makers = [cascade.made_by(name) for name in self.names]
        self.steps = [m for m in range(1, self.everything + 1) if self.may_be_step(m)]
        self.moves: dict[int, list[Move]] = {}
        todo = [0]
        for done in todo:
            self.moves[done] = [
                self.move(done, step)
                for step in self.steps
                if not step & done and self.ready(done, step)
            ]
            todo += {done | move.step for move in self.moves[done]} - {*todo}

    def may_be_step(self, mask: int) -> bool:
        alone = mask.bit_count() == 1
        return (alone or not mask & self.cascade.unfusable) and self.cascade.connected(mask)

    def ready(self, done: int, step: int) -> bool:
        return all(not self.graph.predecessors[i] & ~(done | step) for i in bits(step))

    def move(self, done: int, step: int) -> Move:
        touched = across = first = last = 0
        for i in range(len(self.names)):
            uses = self.readers[i] | self.makers[i]
            later = uses & ~(done | step)
            if uses & step:
                touched |= 1 << i
                if not self.makers[i] and not uses & done:
                    first |= 1 << i
                if not later:
                    last |= 1 << i
            elif uses & done and later:
                across |= 1 << i
        return Move(step, touched, across, first, last)

    def price(self, move: Move, residents: int) -> int | None:
        """Least traffic of a step, ``None`` where it does not fit beside the residents."""
        known = residents & (move.touched | move.across)
        if known not in move.price:
            here = residents & move.touched
            beside = sum(self.bytes[i] for i in bits(residents & move.across))
            move.price[known] = None
            if not move.step & self.cascade.unfusable:
                for traffic, need in self.ways(
                    move.step, here, here & move.first, here & move.last
                ):
                    if need + beside < self.cascade.buffer_bytes:
                        move.price[known] = traffic
                        break
            elif not known:
                move.price[known] = self.cascade.run_step(move.step, UNFUSABLE).total
        return move.price[known]

    def around(self, here: int, first: int, last: int) -> Around:
        here_, first_, last_ = (
            frozenset(self.names[i] for i in bits(part)) for part in (here, first, last)
        )
        return Around(here_, first_, last_)

    def ways(self, step: int, here: int, first: int, last: int) -> list[Point]:
        """What the ways of a step move and need, those that are beaten left out."""
        key = step, here, first, last
        if key not in self.points:
            cascade, around = self.cascade, self.around(here, first, last)
            line = cascade.run_step(step, LINE, around)
            points = [(line.total, line.buffer)]
            for count in range(1, cascade.longest(step) + 1):
                units, _ = cascade.least_held(cascade.schedule(step, count), around)
                for streamed, held in self.weights_held(step):
                    traffic = line.total + (count - 1) * streamed
                    points.append((traffic, cascade.bytes_of(units) + held))
            for way in cascade.slices(step):
                run = cascade.run_step(step, way, around)
                points.append((run.total, run.buffer))
            self.points[key] = unbeaten(points)
        return self.points[key]

    def weights_held(self, step: int) -> list[Point]:
        """Bytes of the weights that stream and bytes held for all, over all that may stay."""
        if step not in self.held:
            cascade = self.cascade
            weighty = cascade.weighty(step)
            self.held[step] = unbeaten(
                [
                    (
                        cascade.weights_of(weighty & ~stays),
                        cascade.weights_of(stays) + cascade.staging(weighty & ~stays),
                    )
                    for stays in subsets(weighty)
                ]
            )
        return self.held[step]

    def floor(self, done: int) -> int:
        """The least that any plan moves for the operators left: what crosses once, in any way."""
        cascade, left = self.cascade, self.everything & ~done
        read = sum(
            cascade.whole[n]
            for n in self.graph.inputs
            if cascade.read_by(n) and not cascade.read_by(n) & done
        )
        made = {self.graph.ops[i].writes for i in bits(left)}
        write = sum(cascade.whole[n] for n in self.graph.outputs if n in made)
        return read + write + cascade.weights_of(left)

    def optimum(self, residency: bool = True) -> Optimum:
        """The least total, and one plan that has it; without residency, nothing is resident."""
        floors = {done: self.floor(done) for done in self.moves}
        order = sorted(self.moves, key=int.bit_count)
        best_steps: list[int] = []
        best, best_residents = 1 << 62, 0
        for residents in range(1 << len(self.names) if residency else 1):
            reached: dict[int, tuple[int, int]] = {0: (0, 0)}
            for done in order[:-1]:
                if done not in reached:
                    continue
                so_far = reached[done][0]
                for move in self.moves[done]:
                    price = self.price(move, residents)
                    if price is None:
                        continue
                    after, total = done | move.step, so_far + price
                    if total + floors[after] >= best:
                        continue
                    if after not in reached or total < reached[after][0]:
                        reached[after] = total, move.step
            if self.everything in reached:
                best, best_residents = reached[self.everything][0], residents
                best_steps, done = [], self.everything
                while done:
                    best_steps.append(reached[done][1])
                    done &= ~reached[done][1]
            if best == floors[0]:
                break
        return self.plan(best, best_steps[::-1], best_residents)

    def plan(self, total: int, steps: list[int], residents: int) -> Optimum:
        names = frozenset(self.names[i] for i in bits(residents))
        ways: list[tuple[int, Way]] = []
        for k, step in enumerate(steps):
            best = self.cascade.best_way(step, self.cascade.around(steps, k, names))
            ways.append((step, UNFUSABLE if best is None else best[0]))
        return Optimum(total, ways, names)


def optimum(cascade: Cascade) -> Optimum:
    """The least total over sequences, groups, ways and residents, and one plan that has it."""
    return Brute(cascade).optimum()


def random_cascade(rng: Random, operators: int = 6) -> Cascade:
    """A random graph under a buffer that makes some steps, and sometimes an operator, not fit."""
    graph = cascade_graph(rng, operators)
    width, slice_channels = rng.choice((1, 1, 2)), rng.choice((1, 2, 16))
    free = Cascade(graph, 1 << 60, width, 1, slice_channels)
    alone = [
        min(free.run_step(1 << i, way).buffer for way in free.ways(1 << i))
        for i in range(len(graph))
    ]
    whole = free.run_step((1 << len(graph)) - 1, LINE).buffer
    group = grown_group(rng, graph, rng.randint(min(2, len(graph)), len(graph)))
    stripes = rng.randint(1, free.longest(group))
    striped = [w for w in free.ways(group) if w.kind == "stripes" and w.count == stripes]
    grown = min(free.run_step(group, way).buffer for way in striped)
    buffer_bytes = interesting_buffer(rng, alone, whole, grown)
    return Cascade(graph, buffer_bytes, width, 1, slice_channels)


def random_sequence(rng: Random, brute: Brute) -> list[int]:
    """Steps that cover the graph, whether or not they fit."""
    steps: list[int] = []
    done = 0
    while done != brute.everything:
        steps.append(rng.choice(brute.moves[done]).step)
        done |= steps[-1]
    return steps


def optimum_of_steps(brute: Brute, steps: list[int]) -> int | None:
    """The least total of given steps; ``None`` where they fit beside no residents."""
    moves, done = [], 0
    for step in steps:
        moves += [move for move in brute.moves[done] if move.step == step]
        done |= step
    found = []
    for residents in range(1 << len(brute.names)):
        prices = [brute.price(move, residents) for move in moves]
        if None not in prices:
            found.append(sum(price for price in prices if price is not None))
    return min(found, default=None)
