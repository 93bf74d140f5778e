"""A fusion problem as blocks and the tensors between them, ordered to keep few tensors open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Protocol

import numpy as np
import numpy.typing as npt

from torch_getfuse.errors import OptionError
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.wide.hold_levels import Levels
from torch_getfuse.partition.work import Work

_STREAM, _CHOSEN, _TRIED = 60, 20, 6
"""Steps counted per stream, per block placed in the order, and per block tried for a place."""

MOST_READERS = 8  # pairs of readers are examined only for tensors with at most so many


@dataclass(frozen=True)
class Stream:
    """A tensor that at least two blocks read or write.

    Attributes:
        size, unit_bytes: bytes of the tensor and of one unit.
        maker: the block that writes it; -1 for an input of the graph.
        blocks: all blocks that read or write it.
        readers: the blocks that read it and can be in a group.
        levels: how much of it these readers hold in the buffer.
        forced: whether it must be written to DRAM whichever blocks are in the group.
        overwritten: whether its only reader overwrites it, so that only one of the two is held.
    """

    size: int
    unit_bytes: int
    maker: int
    blocks: frozenset[int]
    readers: frozenset[int]
    levels: Levels
    forced: bool
    overwritten: bool


@dataclass(frozen=True)
class Skeleton:
    """Blocks, then the unfusable operators as blocks that join no group, and their streams.

    Attributes:
        streams: tensors between blocks.
        touches: per block, the numbers of its streams.
        room: per fusable block, buffer bytes that it needs in any group: weights and inner tensors.
        traffic: per fusable block, DRAM bytes that it moves in any group.
        order: all blocks, at first each after those that make what it reads, ordered so that few
            streams are open (some of their blocks come before, some after) at a time.
    """

    streams: tuple[Stream, ...]
    touches: tuple[tuple[int, ...], ...]
    room: tuple[int, ...]
    traffic: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, problem: FusionProblem) -> Skeleton:
        """The skeleton of a problem.

        Raises:
            OptionError: for a scheme other than LBDF.
        """
        graph, scheme = problem.graph, problem.evaluator.scheme
        if not isinstance(scheme, Lbdf):
            raise OptionError(f"no bound for scheme {scheme.name!r}; it exists for 'lbdf'")
        fusable = len(problem.blocks)
        masks = [*problem.blocks, *(1 << i for i in bits(problem.unfusable))]
        home = {i: k for k, mask in enumerate(masks) for i in bits(mask)}
        room, traffic = [0] * fusable, [0] * fusable
        for k, mask in enumerate(problem.blocks):
            room[k] = traffic[k] = sum(scheme.weights[i] for i in bits(mask))
        streams: list[Stream] = []
        touches: list[list[int]] = [[] for _ in masks]
        for number, (name, size) in enumerate(graph.tensor_bytes.items()):
            problem.evaluator.work.add(_STREAM)
            unit = scheme.unit_bytes[number]
            maker = home[graph.producer[name]] if name in graph.producer else -1
            readers = graph.consumers[name]
            widths: dict[int, int] = {}
            for i in readers:
                if home[i] < fusable:
                    width = max(1, scheme.alone_floor[number, i])
                    widths[home[i]] = max(widths.get(home[i], 1), width)
            inside = maker if maker < fusable else -1
            blocks = frozenset([*(home[i] for i in readers), *([maker] if maker >= 0 else [])])
            outer = any(home[i] >= fusable for i in readers)
            forced = inside >= 0 and (name in graph.outputs or outer)
            over = any(graph.overwrites[i] and home[i] < fusable for i in readers)
            if len(blocks) == 1:
                (only,) = blocks
                if only < fusable:
                    room[only] += 0 if over else unit * widths.get(only, 1)
                    traffic[only] += size if inside < 0 or forced else 0
                continue
            for b in blocks:
                touches[b].append(len(streams))
            levels = Levels(widths, _together(scheme, number, readers, home, fusable))
            streams.append(
                Stream(size, unit, maker, blocks, frozenset(widths), levels, forced, over)
            )
        first = [
            (stream.maker, reader)
            for stream in streams
            for reader in stream.blocks
            if 0 <= stream.maker != reader
        ]
        together = [stream.blocks for stream in streams]
        order = narrow_order(together, touches, first, problem.evaluator.work)
        return cls(tuple(streams), tuple(map(tuple, touches)), tuple(room), tuple(traffic), order)

    def in_any_order(self, work: Work) -> Skeleton:
        """The same in an order that keeps fewer streams open, whichever block comes first."""
        order = narrow_order([stream.blocks for stream in self.streams], self.touches, (), work)
        return replace(self, order=order)

    def classes(self, radius: int) -> npt.NDArray[np.int64]:
        """Per fusable block its class: blocks with equal surroundings up to ``radius`` share one.

        Equal at radius 0: the same room, traffic, and sizes and windows of streams; at each
        larger radius, the neighbours are also equal at the radius before.
        """
        fusable = len(self.room)
        features: list[object] = []
        for block, numbers in enumerate(self.touches):
            streams = sorted(
                (s.size, s.maker == block, int(s.levels.units[s.levels.joined(block)[0]]), s.forced)
                for s in (self.streams[number] for number in numbers)
            )
            constants = (self.room[block], self.traffic[block]) if block < fusable else ()
            features.append((constants, tuple(streams)))
        numbering = classes_of(features, self.streams, self.touches, radius)
        return np.unique(np.array(numbering[:fusable], np.int64), return_inverse=True)[1]


def _together(
    scheme: Lbdf, tensor: int, readers: Sequence[int], home: Mapping[int, int], fusable: int
) -> dict[frozenset[int], int]:
    """Units of a tensor that two blocks hold because one of them depends on the other."""
    units_together: dict[frozenset[int], int] = {}
    readers_in_blocks = sorted(i for i in readers if home[i] < fusable)
    if len(readers_in_blocks) <= MOST_READERS:
        for first, last in combinations(readers_in_blocks, 2):
            blocks = frozenset((home[first], home[last]))
            _, units = scheme.demanded_ahead(tensor, first, last)
            units_together[blocks] = max(units, units_together.get(blocks, 0))
    return units_together


class Between(Protocol):
    """A tensor, the block that writes it, or -1, and all blocks that read or write it."""

    @property
    def maker(self) -> int: ...

    @property
    def blocks(self) -> frozenset[int]: ...


def classes_of(
    features: Sequence[object],
    streams: Sequence[Between],
    touches: Sequence[Sequence[int]],
    radius: int,
) -> list[int]:
    """Classes of the first blocks, of equal features at radius 0.

    At each larger radius, the neighbours among them are also equal at the radius before.
    """
    count = len(features)
    numbering = _numbered(features)
    for _ in range(radius):
        around = [
            sorted(
                (stream.maker == block, numbering[other])
                for stream in (streams[number] for number in numbers)
                for other in (stream.blocks if stream.maker == block else [stream.maker])
                if other != block and 0 <= other < count
            )
            for block, numbers in enumerate(touches[:count])
        ]
        numbering = _numbered(list(zip(numbering, map(tuple, around), strict=True)))
    return numbering


def _numbered(objects: Sequence[object]) -> list[int]:
    """Number the objects by first occurrence; equal objects get equal numbers."""
    numbers: dict[object, int] = {}
    return [numbers.setdefault(item, len(numbers)) for item in objects]


def narrow_order(
    streams: Sequence[Collection[int]],
    touches: Sequence[Sequence[int]],
    first: Iterable[tuple[int, int]],
    work: Work,
) -> tuple[int, ...]:
    """Order all blocks greedily: next comes the block that leaves the fewest undecided facts.

    These are what a state of the automaton must distinguish: an open tensor of which only one
    block is ordered yet is determined by that block, so several tensors of one block count once.

    Args:
        streams: per tensor, its blocks.
        touches: per block, the numbers of its tensors.
        first: pairs of blocks of which the former comes first.
        work: counts the steps.
    """
    undecided_blocks = [set(blocks) for blocks in streams]
    behind: list[list[int]] = [[] for _ in streams]
    signatures: Counter[int] = Counter()  # open tensors: their only block, or -1 - tensor
    front: set[int] = set()
    waiting = dict.fromkeys(range(len(touches)))
    order: list[int] = []

    def look(tensor: int) -> int:
        return behind[tensor][0] if len(behind[tensor]) == 1 else -1 - tensor

    def undecided(block: int) -> int:
        count, closed = len(signatures), Counter[int]()
        new = False
        for t in touches[block]:
            if behind[t]:
                closed[look(t)] += 1
                count += len(undecided_blocks[t]) > 1
            else:
                new = True
        return count + new - sum(signatures[one] == times for one, times in closed.items())

    waits_for = [0] * len(touches)  # blocks that have to come before it
    releases: list[list[int]] = [[] for _ in touches]
    for one, other in first:
        waits_for[other] += 1
        releases[one].append(other)
    while waiting:
        ready = [block for block in front if not waits_for[block]]
        ready = ready or [next(block for block in waiting if not waits_for[block])]
        block = min(ready, key=lambda b: (undecided(b), b))
        work.add(_CHOSEN + _TRIED * len(ready))
        order.append(block)
        del waiting[block]
        front.discard(block)
        for other in releases[block]:
            waits_for[other] -= 1
        for t in touches[block]:
            if behind[t]:
                signatures[look(t)] -= 1
                if not signatures[look(t)]:
                    del signatures[look(t)]
            undecided_blocks[t].discard(block)
            behind[t].append(block)
            if undecided_blocks[t]:
                signatures[look(t)] += 1
                front |= undecided_blocks[t]
    return tuple(order)
