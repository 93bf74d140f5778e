"""Levels of a tensor against the set of its readers that they stand for."""

from __future__ import annotations

from random import Random

import pytest

from torch_getfuse.partition.wide import hold_levels as levels
from torch_getfuse.partition.wide.hold_levels import Levels

Together = dict[frozenset[int], int]


def random_readers(rng: Random, count: int) -> tuple[dict[int, int], Together]:
    """Blocks 0 to ``count``, some of which read, and what some of them hold together."""
    widths = {b: rng.randint(1, 4) for b in range(count) if rng.random() < 0.8}
    together: Together = {}
    for _ in range(rng.randint(0, 3) if len(widths) > 1 else 0):
        size = rng.choice((2, 2, 3))
        together[frozenset(rng.sample(sorted(widths), min(size, len(widths))))] = rng.randint(1, 9)
    return widths, together


def held(widths: dict[int, int], together: Together, inside: set[int]) -> int:
    alone = (widths[b] for b in inside if b in widths)
    joint = (units for blocks, units in together.items() if blocks <= inside)
    return max((*alone, *joint), default=0)


def counted(found: Levels, order: list[int], inside: set[int]) -> int:
    """Units by levels, one block after the other; what is not seen any more is forgotten."""
    level = units = 0
    for k, block in enumerate(order):
        if block in inside:
            after = found.joined(block)[level]
            units += int(found.units[after] - found.units[level])
            level = after
        level = found.seen(set(order[k + 1 :]))[level]
    assert level == 0
    return units


@pytest.mark.parametrize("most", [200, 15, 4])
def test_levels_count_what_the_readers_hold(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly where the levels are enough, never more where they are not."""
    monkeypatch.setattr(levels, "MOST", most)
    rng = Random(most)
    exact = pairs = 0
    for _ in range(600):
        widths, together = random_readers(rng, rng.randint(1, 6))
        found = Levels(widths, together)
        assert len(found.units) <= most + 1
        order = sorted(range(6), key=lambda _: rng.random())
        for _ in range(6):
            inside = {b for b in order if rng.random() < 0.6}
            units, truth = counted(found, order, inside), held(widths, together, inside)
            assert units <= truth
            exact += units == truth
            pairs += units == truth > held(widths, {}, inside)
    assert exact == 3600 if most == 200 else exact < 3600
    assert pairs > {200: 400, 15: 500, 4: 30}[most]


def test_a_reader_is_seen_as_long_as_something_is_left() -> None:
    """The maker, which comes last, must know whether it is read in the set."""
    found = Levels({1: 3}, {})
    read = found.joined(1)[0]
    assert found.seen({7})[read] > 0 == found.seen({7})[0]
    assert found.seen(set())[read] == 0


def test_nobody_in_a_group_reads() -> None:
    found = Levels({}, {})
    assert found.joined(3).tolist() == [0, 1]
    assert found.units[0] == 0
