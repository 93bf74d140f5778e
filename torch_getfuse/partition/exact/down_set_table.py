"""The down-sets of a problem, or of a window of it, as arrays: what backward search adds up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from torch_getfuse.partition.cost.scheme import TileRows
from torch_getfuse.partition.exact.chains import Chains
from torch_getfuse.partition.exact.down_sets import TooWide
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_WORD = (1 << 64) - 1

_LISTED = 25
"""Steps counted for each down-set of a list."""


class Window(NamedTuple):
    """Which down-sets are looked at: those between two, the two among them.

    Attributes:
        start, end: whole blocks, with the unfusable operators that can run.
        most: how many down-sets there may be.
    """

    start: int
    end: int
    most: int


class DownSets:
    """All down-sets of a window, by size, as arrays. Sums are over operators inside the window.

    Args:
        problem: graph, cost model and buffer.
        chains: of the problem.
        window: which down-sets.

    Attributes:
        masks: of each.
        index: of each mask.
        ready: of each, the blocks that can run next.
        live: bytes of ``tensors`` that each hands on or has written for good.
        weights, weighted, rows, short: sums over its fusable operators: bytes of weights, how many
            have any, and what their :class:`TileRows` say.
        pairs: of these, (first, last, bytes), and in which down-sets the last is.
        tensors: the problem's crossings that operators inside the window touch.
        read: per tensor, how many of its readers each has.
        open: per tensor, which have it, as an input or written by a member, but not all readers.

    Raises:
        TooWide: for more down-sets than the window may have.
        OutOfWork: at a limit.
    """

    def __init__(self, problem: FusionProblem, chains: Chains, window: Window) -> None:
        scheme = problem.evaluator.scheme
        after = _down_sets(problem, chains, window)
        self.masks = sorted(after, key=lambda mask: (mask.bit_count(), mask))
        self.ready = [[*_ready(chains, mask, after[mask])] for mask in self.masks]
        self.index = {mask: k for k, mask in enumerate(self.masks)}
        count, wide = len(problem.graph), -(-len(problem.graph) // 64)
        data = b"".join(mask.to_bytes(8 * wide, "little") for mask in self.masks)
        packed = np.frombuffer(data, np.dtype("<u8")).reshape(len(self.masks), wide)
        self._words = np.ascontiguousarray(packed.T)
        member = np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little")[:, :count]
        inside = window.end & ~window.start
        nothing = [0] * count
        tiles = scheme.tile_rows or TileRows(nothing, nothing, ())
        more = list(tiles.least)
        self.pairs = []
        for first, last, size in tiles.pairs:
            if problem.fusable >> first & (problem.fusable & inside) >> last & 1:
                more[last] += size
                self.pairs.append((first, last, size, member[:, last].astype(bool)))
        per_operator = np.zeros((count, 4), np.int64)
        for i in bits(problem.fusable & inside):
            weights = scheme.weights[i]
            per_operator[i] = weights, bool(weights), more[i], tiles.short[i]
        self.weights, self.weighted, self.rows, self.short = (
            member.astype(np.int64) @ per_operator
        ).T.copy()
        self.tensors = [
            tensor for tensor in problem.crossings if (tensor.maker | tensor.readers) & inside
        ]
        self.read = np.zeros((len(self.tensors), len(self.masks)), np.int16)
        self.open = np.zeros((len(self.tensors), len(self.masks)), bool)
        self.live = np.zeros(len(self.masks), np.int64)
        for k, tensor in enumerate(self.tensors):
            self.read[k] = member[:, list(bits(tensor.readers))].sum(axis=1, dtype=np.int16)
            waiting = self.read[k] < tensor.readers.bit_count()
            self.open[k] = waiting
            if tensor.maker:
                made = member[:, tensor.maker.bit_length() - 1] > 0
                self.live += tensor.size * (made & (tensor.forced | waiting))
                self.open[k] &= made

    def led_to(self, at: int, first: int, barred: int) -> Ints:
        """The down-sets from index ``first`` on that contain another and nothing of ``barred``."""
        mask = self.masks[at]
        found = np.ones(len(self.masks) - first, bool)
        for k, words in enumerate(self._words):
            if asked := _word(mask | barred, k):
                found &= words[first:] & asked == _word(mask, k)
        return first + np.flatnonzero(found)

    def contain(self, which: Ints, part: int) -> Flags:
        """Of some down-sets, which contain a set."""
        found = np.ones(len(which), bool)
        for k, words in enumerate(self._words):
            if word := _word(part, k):
                found &= words[which] & word == word
        return found


def _word(mask: int, k: int) -> np.uint64:
    """The 64-bit word number ``k`` of a mask."""
    word: np.uint64 = np.uint64(mask >> 64 * k & _WORD)
    return word


def _down_sets(problem: FusionProblem, chains: Chains, window: Window) -> dict[int, int]:
    """The down-sets of a window, of whole blocks and all unfusable operators that can run.

    Returns:
        By each, the operators in the window that wait for a member or for nothing.
    """
    start, end = window.start, window.end
    found = {start: (chains.sources | chains.after(start)) & end & ~start}
    waiting = [start]
    while waiting:
        done = waiting.pop()
        for block in _ready(chains, done, found[done]):
            larger = chains.absorb(done | block, chains.after(block))
            if larger not in found:
                after = chains.after(larger & ~done)
                found[larger] = (found[done] | after) & end & ~larger
                waiting.append(larger)
                problem.evaluator.work.add(_LISTED)
        if len(found) > window.most:
            raise TooWide(f"more than {window.most} down-sets")
    if end not in found:
        raise TooWide("blocks that wait for each other")
    return found


def _ready(chains: Chains, done: int, after: int) -> Iterator[int]:
    """The blocks of fusable operators that can run next: of those that begin in ``after``."""
    for i in bits(after & ~chains.unfusable):
        block = chains.block[i]
        if block & -block == 1 << i and not chains.ideal[i] & ~done & ~block:
            yield block
