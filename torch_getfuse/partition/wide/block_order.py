"""A fusion problem as blocks and the tensors between them, in an order that keeps few open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from torch_getfuse.errors import OptionError
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.wide.hold_levels import Levels
from torch_getfuse.partition.work import Work

_STREAM, _CHOSEN, _TRIED = 60, 20, 6
"""Steps that are counted: per stream, per block that is put in order, per block tried for it."""

MOST_READERS = 8  # of a tensor, for pairs of them to be looked at


@dataclass(frozen=True)
class Stream:
    """A tensor that at least two blocks touch.

    Attributes:
        size, unit_bytes: of the tensor and of one unit, in bytes.
        maker: the block that writes it; -1 for an input of the graph.
        blocks: all that touch it.
        readers: the blocks that read it and can be in a group.
        levels: what these make it hold.
        forced: whether it must be written whoever reads it.
        overwritten: whether its one reader writes over it, so that only one of the two is held.
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
    """Blocks, then the unfusable operators as blocks that join nothing, and their streams.

    Attributes:
        streams: tensors between blocks.
        touches: per block, the numbers of its streams.
        room: per fusable block, bytes that it needs whatever its group: weights and inner tensors.
        traffic: per fusable block, bytes that it moves whatever its group.
        order: all blocks, so that few streams are open (touched by some, not by all) at a time.
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
        for number, (name, tensor) in enumerate(graph.tensors.items()):
            problem.evaluator.work.add(_STREAM)
            size = tensor.elements * scheme.activation_bytes
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
        order = _narrow_order(streams, touches, problem.evaluator.work)
        return cls(tuple(streams), tuple(map(tuple, touches)), tuple(room), tuple(traffic), order)

    def classes(self, radius: int) -> npt.NDArray[np.int64]:
        """Per fusable block its class: blocks whose surroundings of that radius look alike.

        Alike at radius 0: the same room, traffic, and sizes and windows of streams; at each
        further one, also neighbours that are alike at the one before.
        """
        fusable = len(self.room)
        look: list[object] = []
        for block, numbers in enumerate(self.touches):
            sides = sorted(
                (s.size, s.maker == block, int(s.levels.units[s.levels.joined(block)[0]]), s.forced)
                for s in (self.streams[number] for number in numbers)
            )
            own = (self.room[block], self.traffic[block]) if block < fusable else ()
            look.append((own, tuple(sides)))
        found = _numbered(look)
        for _ in range(radius):
            look = []
            for block, numbers in enumerate(self.touches):
                beside = []
                for stream in (self.streams[number] for number in numbers):
                    if stream.maker == block:
                        beside += [(1, found[other]) for other in stream.blocks if other != block]
                    elif stream.maker >= 0:
                        beside.append((0, found[stream.maker]))
                look.append((found[block], tuple(sorted(beside))))
            found = _numbered(look)
        return np.unique(np.array(found[:fusable], np.int64), return_inverse=True)[1]


def _together(
    scheme: Lbdf, tensor: int, readers: Sequence[int], home: Mapping[int, int], fusable: int
) -> dict[frozenset[int], int]:
    """Units of a tensor that two blocks hold because one of them depends on the other."""
    found: dict[frozenset[int], int] = {}
    some = sorted(i for i in readers if home[i] < fusable)
    if len(some) <= MOST_READERS:
        for first, last in combinations(some, 2):
            blocks = frozenset((home[first], home[last]))
            _, units = scheme.demanded_ahead(tensor, first, last)
            found[blocks] = max(units, found.get(blocks, 0))
    return found


def _numbered(look: Sequence[object]) -> list[int]:
    """Equal objects as equal numbers, by their first place."""
    numbers: dict[object, int] = {}
    return [numbers.setdefault(one, len(numbers)) for one in look]


def _narrow_order(
    streams: Sequence[Stream], touches: Sequence[Sequence[int]], work: Work
) -> tuple[int, ...]:
    """All blocks, each time the one after which least is left undecided; greedy.

    What is undecided is counted as what a set can look like: an open tensor with one block
    behind it is known with that block, so several of one block count once.
    """
    left = [set(stream.blocks) for stream in streams]
    behind: list[list[int]] = [[] for _ in streams]
    looks: Counter[int] = Counter()  # of the open tensors: their one block, or -1 - tensor
    front: set[int] = set()
    waiting = dict.fromkeys(range(len(touches)))
    found: list[int] = []

    def look(tensor: int) -> int:
        return behind[tensor][0] if len(behind[tensor]) == 1 else -1 - tensor

    def undecided(block: int) -> int:
        count, gone = len(looks), Counter[int]()
        new = False
        for t in touches[block]:
            if behind[t]:
                gone[look(t)] += 1
                count += len(left[t]) > 1
            else:
                new = True
        return count + new - sum(looks[one] == times for one, times in gone.items())

    while waiting:
        block = min(front, key=lambda b: (undecided(b), b)) if front else next(iter(waiting))
        work.add(_CHOSEN + _TRIED * len(front))
        found.append(block)
        del waiting[block]
        front.discard(block)
        for t in touches[block]:
            if behind[t]:
                looks[look(t)] -= 1
                if not looks[look(t)]:
                    del looks[look(t)]
            left[t].discard(block)
            behind[t].append(block)
            if left[t]:
                looks[look(t)] += 1
                front |= left[t]
    return tuple(found)
