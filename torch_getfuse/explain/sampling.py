"""Fusion groups like those of a random search, drawn from one operator graph.

All are legal: weakly connected and convex. The mixture has three distributions: growth by random
neighbours until the group needs a buffer drawn log-uniformly (so that, over the buffers of the
data, valid and invalid groups balance); an interval of the topological order that ends the same
way (as left by cuts of a whole network); and growth to a size drawn log-uniformly between one
operator and the whole graph.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import numpy as np

from torch_getfuse.explain.features import FeatureTable
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.scheme import FusionScheme
from torch_getfuse.partition.node_set import (
    ancestors,
    bits,
    components,
    convex_hull,
    descendants,
    neighbours,
)

SAMPLER_VERSION = 1

BUFFERS = tuple(size * 1024 for size in (128, 256, 512, 1024, 2048))
"""Buffers of the data in bytes (docs/method.md, section 5)."""

WIDTHS = ((1, 1),) * 7 + ((2, 2), (4, 4), (2, 1))
"""Element widths (activations, weights) in bytes, drawn uniformly: mostly one byte."""

_LEAST_LOG, _MOST_LOG = 13.5, 22.0  # 12 KB to 4 MB around the buffers
_MOST_OPERATORS = 64  # in the first two distributions; whole networks come from the third
_GROWN, _INTERVAL = 0.65, 0.95  # cumulative shares of the mixture
_PATIENCE = 400  # draws without a new group after which the graph counts as exhausted


@dataclass(frozen=True, slots=True)
class Sample:
    """A fusion group with its labels.

    Attributes:
        mask: the group.
        activation_bytes, weight_bytes: element widths.
        valid: per buffer of :data:`BUFFERS`, whether ``F_b < B``.
        key: equal for groups with the same tensors, at any position in any network.
    """

    mask: int
    activation_bytes: int
    weight_bytes: int
    valid: tuple[bool, ...]
    key: str


class GroupSampler:
    """Draws legal groups of one graph.

    Args:
        graph: the operator graph.
        rng: the only source of randomness.
    """

    def __init__(self, graph: OpGraph, rng: Random) -> None:
        self.graph = graph
        self.rng = rng
        self._near = neighbours(graph)
        self._above = ancestors(graph)
        self._below = descendants(graph)

    def draw(self, scheme: FusionScheme) -> int:
        """One group; ``scheme`` decides when a growing group has reached its target demand."""
        target = 2 ** self.rng.uniform(_LEAST_LOG, _MOST_LOG)
        last_size = 0

        def enough(mask: int) -> bool:
            nonlocal last_size
            size = mask.bit_count()
            if size >= _MOST_OPERATORS:
                return True
            # Costs are expensive: evaluate a large group only after it has grown by a fifth.
            if size < 1.2 * last_size:
                return False
            last_size = size
            need = scheme.buffer(mask, BUFFERS[-1])
            return need is None or need >= target

        draw = self.rng.random()
        if draw < _GROWN:
            return self._grow(enough)
        if draw < _INTERVAL:
            return self._interval(enough)
        size = math.exp(self.rng.uniform(0, math.log(len(self.graph))))
        return self._grow(lambda mask: mask.bit_count() >= size)

    def _grow(self, enough: Callable[[int], bool]) -> int:
        mask = 1 << self.rng.randrange(len(self.graph))
        while not enough(mask):
            front = 0
            for i in bits(mask):
                front |= self._near[i]
            front &= ~mask
            if not front:
                break
            grown = mask | 1 << self.rng.choice(list(bits(front)))
            mask = convex_hull(grown, self._above, self._below)
        return mask

    def _interval(self, enough: Callable[[int], bool]) -> int:
        first = self.rng.randrange(len(self.graph))
        mask = 0
        for i in range(first, len(self.graph)):
            mask |= 1 << i
            if enough(mask):
                break
        return self.rng.choice(components(mask, self._near))


def sample_groups(
    graph: OpGraph,
    make_scheme: Callable[[int, int], FusionScheme],
    granularity: str,
    count: int,
    seed: int,
) -> Iterator[Sample]:
    """Up to ``count`` distinct groups of a graph with their labels.

    Args:
        graph: the operator graph.
        make_scheme: the cost model for element widths (activations, weights) in bytes.
        granularity: granularity of the features.
        count: number of groups; fewer if the graph has no more.
        seed: the same seed gives the same groups.
    """
    rng = Random(seed)
    sampler = GroupSampler(graph, rng)
    schemes = {widths: make_scheme(*widths) for widths in set(WIDTHS)}
    table = FeatureTable(graph, granularity)
    seen: set[int] = set()
    idle = 0
    while len(seen) < count and idle < _PATIENCE:
        widths = rng.choice(WIDTHS)
        mask = sampler.draw(schemes[widths])
        if mask in seen:
            idle += 1
            continue
        idle = 0
        seen.add(mask)
        needs = [schemes[widths].buffer(mask, size) for size in BUFFERS]
        valid = tuple(
            need is not None and need < size for need, size in zip(needs, BUFFERS, strict=True)
        )
        yield Sample(mask, *widths, valid, group_key(table, mask))


def group_key(table: FeatureTable, mask: int) -> str:
    """A digest of the tensors of a group; equal for isomorphic copies of a block."""
    plain, sizes, edges, _ = table.parts(mask)
    digest = hashlib.blake2b(digest_size=8)
    for part in (plain, sizes, edges):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
