"""Connectivity by runs equals connectivity edge by edge."""

from __future__ import annotations

import copy
import pickle
from random import Random

import pytest

from tests.graphs import random_graph
from torch_getfuse.partition.node_set import (
    Neighbours,
    bits,
    components,
    is_connected,
    neighbours,
)


def flooded(mask: int, near: Neighbours) -> list[int]:
    """Components, one operator after another."""
    found = []
    while mask:
        reached, waiting = 0, [(mask & -mask).bit_length() - 1]
        while waiting:
            i = waiting.pop()
            reached |= 1 << i
            waiting += bits(near[i] & mask & ~reached)
        found.append(reached)
        mask &= ~reached
    return found


def scattered(rng: Random, count: int) -> Neighbours:
    """Edges between any operators, most of them to the next one."""
    masks = [0] * count
    for i in range(count):
        for j in range(i + 1, count):
            if rng.random() < (0.7 if j == i + 1 else 0.03):
                masks[i] |= 1 << j
                masks[j] |= 1 << i
    return Neighbours(masks)


@pytest.mark.parametrize("seed", range(20))
def test_components_are_those_of_a_flood(seed: int) -> None:
    rng = Random(seed)
    for near in (neighbours(random_graph(rng, 12)), scattered(rng, 1), scattered(rng, 90)):
        for density in (0.2, 0.5, 0.8, 0.95, 1.0):
            for _ in range(20):
                mask = sum(1 << i for i in range(len(near)) if rng.random() < density)
                expected = flooded(mask, near)
                assert components(mask, near) == expected
                if mask:
                    assert is_connected(mask, near) == (len(expected) == 1)


def test_runs_are_connected_and_cover_the_mask() -> None:
    rng = Random(7)
    near = scattered(rng, 60)
    for _ in range(200):
        mask = rng.getrandbits(60)
        runs = near.runs(mask)
        assert sum(runs) == mask
        assert all(len(flooded(run, near)) == 1 for run in runs)


def test_copies_are_whole() -> None:
    near = scattered(Random(0), 30)
    mask = 0b1011_0111_0111
    for twin in (copy.deepcopy(near), pickle.loads(pickle.dumps(near))):
        assert twin == near
        assert components(mask, twin) == components(mask, near)
