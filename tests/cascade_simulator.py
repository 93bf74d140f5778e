"""The oracle: cascade's steps (docs/method.md, section 12), run on counts, as plain as possible.

It shares with the package only the graph, ``Window.span`` and ``bits``; nothing of the evaluator.
A step is a mask of operators; what it holds and moves follows from its :class:`Way` and from what
it sees of the plan around it (:class:`Around`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, combinations, product
from typing import NamedTuple

from tests.cascade_schedules import Line, Stripes
from tests.widths import bits_in, unit_bytes
from torch_getfuse.ir import Op, OpGraph, WindowKind
from torch_getfuse.partition.node_set import bits

KINDS = ("line", "stripes", "slices", "unfusable")


@dataclass(frozen=True)
class Way:
    """How a step runs: ``count`` stripes or slices; ``stays``: operators whose weights stay."""

    kind: str
    count: int = 1
    stays: int = 0


LINE, UNFUSABLE = Way("line"), Way("unfusable")


class Around(NamedTuple):
    """What a step sees of the plan.

    Attributes:
        resident: the residents that it touches.
        first: of them, graph inputs that no step before it reads.
        last: of them, tensors that no step after it reads.
        beside: bytes of the residents alive at it that it does not touch.
    """

    resident: frozenset[str] = frozenset()
    first: frozenset[str] = frozenset()
    last: frozenset[str] = frozenset()
    beside: int = 0


ALONE = Around()
"""Of a step in a plan where nothing is resident."""


@dataclass(frozen=True)
class StepRun:
    """What a step held and moved, in bytes.

    Attributes:
        units: units that each storage holds, under the last tensor in it.
        storage: tensor -> last tensor in its storage.
    """

    units: dict[str, int]
    storage: dict[str, str]
    features: int
    weights: int
    beside: int
    read: int
    write: int
    weight: int

    @property
    def buffer(self) -> int:
        return self.features + self.weights + self.beside

    @property
    def total(self) -> int:
        return self.read + self.write + self.weight


class Illegal(Exception):
    """A plan that breaks a rule, and which."""


def elementwise(op: Op) -> bool:
    return not op.mixes_channels and all(r.window.kind is WindowKind.IDENTITY for r in op.reads)


def subsets(mask: int) -> Iterator[int]:
    members = [1 << i for i in bits(mask)]
    for some in chain.from_iterable(combinations(members, n) for n in range(len(members) + 1)):
        yield sum(some)


class Cascade:
    """Runs steps and plans of a graph.

    Args:
        graph: the operator graph.
        buffer_bytes: the on-chip buffer; what is held must be less.
        activation_bytes: width of an element of a feature map; ``None`` for what the graph stores.
        weight_bytes: width of a weight; ``None`` for what the model stores.
        slice_channels: output channels of a streamed weight that are on chip at once, twice.
    """

    def __init__(
        self,
        graph: OpGraph,
        buffer_bytes: int,
        activation_bytes: int | None = 1,
        weight_bytes: int | None = 1,
        slice_channels: int = 16,
    ) -> None:
        self.graph, self.buffer_bytes = graph, buffer_bytes
        self.activation_bytes, self.weight_bytes = activation_bytes, weight_bytes
        self.slice_channels = slice_channels
        if activation_bytes is None:
            self.unit_bytes = {name: unit_bytes(graph, name) for name in graph.tensors}
        else:
            self.unit_bytes = {
                n: t.elements // t.rows * activation_bytes for n, t in graph.tensors.items()
            }
        self.whole = {n: self.unit_bytes[n] * t.rows for n, t in graph.tensors.items()}
        self.weights = [
            graph.stored_bytes(op) if weight_bytes is None else op.weight_elements * weight_bytes
            for op in graph.ops
        ]
        # A slice reads its input again after others have written, so nothing is in place there.
        self.apart = replace(graph, ops=tuple(replace(op, in_place=False) for op in graph.ops))
        self.runs: dict[tuple[int, int], Line | Stripes] = {}
        self.sliced: dict[int, Line] = {}

    @cached_property
    def unfusable(self) -> int:
        """The operators that fit in no way with nothing resident."""
        each = [1 << i for i in range(len(self.graph))]
        return sum(op for op in each if self.best_way(op, ALONE) is None)

    # -- one step ----------------------------------------------------------------------------------

    def schedule(self, mask: int, stripes: int = 0) -> Line | Stripes:
        """The run of a step in a number of stripes; by lines without."""
        if (mask, stripes) not in self.runs:
            graph = self.graph
            run = Stripes(graph, mask, stripes) if stripes else Line(graph, mask)
            self.runs[mask, stripes] = run
        return self.runs[mask, stripes]

    def reads_of(self, mask: int) -> list[str]:
        """Tensors that a step reads from outside."""
        names = dict.fromkeys(r.tensor for i in bits(mask) for r in self.graph.ops[i].reads)
        return [n for n in names if not self.made_by(n) & mask]

    def writes_of(self, mask: int) -> list[str]:
        """Tensors that a step makes and that are needed outside it or returned."""
        graph = self.graph
        made = [graph.ops[i].writes for i in bits(mask)]
        return [n for n in made if n in graph.outputs or self.read_by(n) & ~mask]

    def made_by(self, name: str) -> int:
        return 1 << self.graph.producer[name] if name in self.graph.producer else 0

    def read_by(self, name: str) -> int:
        return sum(1 << i for i in self.graph.consumers[name])

    def touched(self, mask: int) -> list[str]:
        """Tensors that a step reads or makes."""
        return [*self.reads_of(mask), *(self.graph.ops[i].writes for i in bits(mask))]

    def channels(self, op: Op) -> int:
        """Output channels of which weights are fetched on their own."""
        if op.recurrent:
            return 1  # each step needs all of the weights
        shape = self.graph.tensors[op.writes].shape
        if op.channel_axis is not None:
            return shape[op.channel_axis]
        return shape[1] if len(shape) == 4 else shape[-1]

    def crossing(self, mask: int, around: Around, times: int = 1) -> tuple[int, int]:
        """Bytes read and written; what is not resident is read a number of ``times``."""
        read = sum(
            self.whole[n] * (n in around.first if n in around.resident else times)
            for n in self.reads_of(mask)
        )
        write = sum(
            self.whole[n]
            for n in self.writes_of(mask)
            if n not in around.resident or n in self.graph.outputs
        )
        return read, write

    def weighty(self, mask: int) -> int:
        """The operators of a step that have weights."""
        return sum(1 << i for i in bits(mask) if self.weights[i])

    def weights_of(self, mask: int) -> int:
        return sum(self.weights[i] for i in bits(mask))

    def longest(self, mask: int) -> int:
        """Units of the longest tensor that a step makes and does not read: the most stripes."""
        sinks = [self.graph.ops[i] for i in bits(mask) if not self.graph.readers[i] & mask]
        return max(self.graph.tensors[op.writes].rows for op in sinks)

    def staging(self, streaming: int) -> int:
        """Bytes for the weights that stream: twice a slice of the most demanding operator."""
        need = [0]
        for i in bits(streaming):
            channels = self.channels(self.graph.ops[i])
            slice_bytes = -(-self.weights[i] * min(self.slice_channels, channels) // channels)
            need.append(min(self.weights[i], 2 * slice_bytes))
        return max(need)

    def overwritable(self, run: Line | Stripes, around: Around) -> list[list[tuple[str, str]]]:
        """Per operator that may write over an operand, the pairs (operand, output)."""
        found = []
        for op in run.group:
            z = self.graph.tensors[op.writes]
            pairs = []
            for x in (self.graph.tensors[read.tensor] for read in op.reads):
                if (
                    elementwise(op)
                    and {x.name, z.name} <= around.resident
                    and (x.shape, x.stream_axis) == (z.shape, z.stream_axis)
                    and self.alike(x.name, z.name)
                    and x.name in around.last
                    and (op.name, x.name) not in run.kept
                    and run.storage[x.name] != run.storage[z.name]
                ):
                    pairs.append((x.name, z.name))
            if pairs:
                found.append(pairs)
        return found

    def alike(self, one: str, other: str) -> bool:
        """Whether elements of two tensors are of one width."""
        if self.activation_bytes is not None:
            return True
        return bits_in(self.graph, one) == bits_in(self.graph, other)

    def units_held(self, run: Line | Stripes, last: str, whole: bool) -> int:
        """Units of a storage: all, or its peak; one at least, even where none is ever needed."""
        return run.units[last] if whole else max(run.peak[last], 1)

    def hold(
        self, run: Line | Stripes, around: Around, pairs: Iterable[tuple[str, str]]
    ) -> tuple[dict[str, int], dict[str, str]]:
        """Units and storages with outputs written over operands."""
        storage = dict(run.storage)
        for x, z in pairs:
            ends_with_x = storage[x]
            for name in storage:
                if storage[name] == ends_with_x:
                    storage[name] = storage[z]
        units = {}
        for last in dict.fromkeys(storage.values()):
            inside = {name for name in storage if storage[name] == last}
            units[last] = self.units_held(run, last, bool(inside & around.resident))
        return units, storage

    def least_held(
        self, run: Line | Stripes, around: Around
    ) -> tuple[dict[str, int], dict[str, str]]:
        """The same with those overwritten that leave the least bytes, by enumeration."""
        may = self.overwritable(run, around)
        tries = []
        for chosen in product(*([None, *pairs] for pairs in may)):
            pairs = [pair for pair in chosen if pair is not None]
            if len({x for x, _ in pairs}) == len(pairs):
                tries.append(self.hold(run, around, pairs))
        return min(tries, key=lambda held: self.bytes_of(held[0]))

    def bytes_of(self, units: Mapping[str, int]) -> int:
        return sum(count * self.unit_bytes[name] for name, count in units.items())

    def run_step(
        self,
        mask: int,
        way: Way,
        around: Around = ALONE,
        overwrite: Mapping[str, str] | None = None,
    ) -> StepRun:
        """What a step holds and moves, whether or not it fits.

        ``overwrite``: resident output -> the operand that it is written over, all of them; those
        that leave the least bytes if not given.

        Raises:
            Illegal: where the step cannot run so.
        """
        weights = self.weights_of(mask)
        if way.kind == "unfusable":
            if around.resident or around.beside or mask.bit_count() != 1:
                raise Illegal("an unfusable operator is alone, with nothing resident")
            return StepRun({}, {}, 0, 0, 0, *self.crossing(mask, around), weights)
        if way.kind == "slices":
            return self.run_slices(mask, way.count, around)
        if way.kind == "line":
            run, held, fetched = self.schedule(mask), weights, weights
        else:
            run = self.schedule(mask, way.count)
            if way.stays & ~self.weighty(mask):
                raise Illegal("weights that are not of the step cannot stay")
            stays = self.weights_of(way.stays)
            held = stays + self.staging(self.weighty(mask) & ~way.stays)
            fetched = stays + way.count * (weights - stays)
        if overwrite is None:
            units, storage = self.least_held(run, around)
        else:
            pairs = [(x, z) for z, x in overwrite.items()]
            allowed = [pair for pairs_ in self.overwritable(run, around) for pair in pairs_]
            if not set(pairs) <= set(allowed) or len({x for x, _ in pairs}) < len(pairs):
                raise Illegal(f"{overwrite} cannot be written over; only {allowed}")
            units, storage = self.hold(run, around, pairs)
        read, write = self.crossing(mask, around)
        return StepRun(
            units, storage, self.bytes_of(units), held, around.beside, read, write, fetched
        )

    def run_slices(self, mask: int, count: int, around: Around) -> StepRun:
        (position,) = bits(mask)
        op, weights = self.graph.ops[position], self.weights[position]
        if not weights or not 2 <= count <= self.channels(op):
            raise Illegal(f"{op.name} does not run in {count} slices")
        if mask not in self.sliced:
            self.sliced[mask] = Line(self.apart, mask)
        run = self.sliced[mask]
        units = {n: self.units_held(run, n, n in around.resident) for n in run.tensors}
        return StepRun(
            units,
            {name: name for name in units},
            self.bytes_of(units),
            -(-weights // count),
            around.beside,
            *self.crossing(mask, around, count),
            weights,
        )

    def ways(self, mask: int) -> Iterator[Way]:
        """Every way of a step, whether or not it fits."""
        yield LINE
        for count in range(1, self.longest(mask) + 1):
            for stays in subsets(self.weighty(mask)):
                yield Way("stripes", count, stays)
        yield from self.slices(mask)

    def slices(self, mask: int) -> Iterator[Way]:
        """The ways in slices: those of an operator alone that has weights."""
        if mask.bit_count() == 1 and self.weighty(mask):
            for count in range(2, self.channels(self.graph.ops[mask.bit_length() - 1]) + 1):
                yield Way("slices", count)

    def best_way(self, mask: int, around: Around) -> tuple[Way, StepRun] | None:
        """The way with the least traffic, then the least buffer; ``None`` where none fits."""
        found: list[tuple[tuple[int, int, int, int], Way, StepRun]] = []
        sliced = False
        for way in self.ways(mask):
            if sliced:  # only the least number of slices that fits
                break
            run = self.run_step(mask, way, around)
            if run.buffer < self.buffer_bytes:
                key = (run.total, run.buffer, KINDS.index(way.kind), way.count)
                found.append((key, way, run))
                sliced = way.kind == "slices"
        return min(found, key=lambda entry: entry[0])[1:] if found else None

    # -- a plan ------------------------------------------------------------------------------------

    def lives(self, steps: Sequence[int]) -> dict[str, tuple[int, int]]:
        """First and last step at which each tensor is alive."""
        lives = {}
        for name in self.graph.tensors:
            readers, maker = self.read_by(name), self.made_by(name)
            used = [k for k, step in enumerate(steps) if step & (readers | maker)]
            if used:
                lives[name] = used[0], used[-1]
        return lives

    def around(self, steps: Sequence[int], k: int, residents: Iterable[str]) -> Around:
        """What step number ``k`` of a plan sees."""
        lives, touched = self.lives(steps), set(self.touched(steps[k]))
        alive = {n for n in residents if lives[n][0] <= k <= lives[n][1]}
        here = frozenset(alive & touched)
        return Around(
            here,
            frozenset(n for n in here if n in self.graph.inputs and lives[n][0] == k),
            frozenset(n for n in here if lives[n][1] == k),
            sum(self.whole[n] for n in alive - touched),
        )

    def connected(self, mask: int) -> bool:
        reached = mask & -mask
        while True:
            near = sum(
                1 << i
                for i in bits(mask & ~reached)
                if (self.graph.makers[i] | self.graph.readers[i]) & reached
            )
            if not near:
                return reached == mask
            reached |= near

    def run_plan(
        self, steps: Sequence[tuple[int, Way | None]], residents: Iterable[str] = ()
    ) -> list[StepRun]:
        """What each step of a plan held and moved; the best way for a step without one.

        Raises:
            Illegal: where a rule of a plan is broken.
        """
        masks, done = [mask for mask, _ in steps], 0
        residents = set(residents)
        for mask in masks:
            if not mask or mask & done:
                raise Illegal("each operator is in one step")
            if any(self.graph.predecessors[i] & ~(done | mask) for i in bits(mask)):
                raise Illegal("a step runs before something that it needs")
            if mask & self.unfusable and mask.bit_count() > 1:
                raise Illegal("an unfusable operator is a step of its own")
            if not self.connected(mask):
                raise Illegal("a step is connected")
            done |= mask
        if done != (1 << len(self.graph)) - 1:
            raise Illegal("each operator is in one step")
        lives = self.lives(masks)
        for name in residents:
            if name not in lives:
                raise Illegal(f"{name} is in no step")
            first, last = lives[name]
            if any(mask & self.unfusable for mask in masks[first : last + 1]):
                raise Illegal(f"{name} is resident while an unfusable operator runs")
        runs = []
        for k, (mask, way) in enumerate(steps):
            around = self.around(masks, k, residents)
            if mask & self.unfusable:
                if way not in (UNFUSABLE, None):
                    raise Illegal("an unfusable operator runs in no way")
                runs.append(self.run_step(mask, UNFUSABLE, around))
                continue
            if way is None:
                best = self.best_way(mask, around)
                if best is None:
                    raise Illegal(f"step {k} fits in no way")
                way = best[0]
            if way == UNFUSABLE:
                raise Illegal("a fusable operator runs in some way")
            run = self.run_step(mask, way, around)
            if run.buffer >= self.buffer_bytes:
                raise Illegal(f"step {k} holds {run.buffer} bytes, not below {self.buffer_bytes}")
            runs.append(run)
        return runs
