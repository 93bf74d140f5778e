"""Orders and cycles against their definitions, on random graphs."""

from __future__ import annotations

from random import Random

import pytest

from torch_getfuse.ordering import cycles, topological_order


def reachable(follows: list[set[int]]) -> list[set[int]]:
    found = []
    for start in range(len(follows)):
        seen: set[int] = set()
        front = set(follows[start])
        while front:
            seen |= front
            front = {n for k in front for n in follows[k]} - seen
        found.append(seen)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_order_and_cycles_of_random_graphs(seed: int) -> None:
    rng = Random(seed)
    count = rng.randrange(1, 9)
    waits = [{j for j in range(count) if rng.random() < 0.18} for _ in range(count)]
    reach = reachable([w - {k} for k, w in enumerate(waits)])
    on_cycle = {k for k in range(count) if k in reach[k]}
    order = topological_order(waits, lambda k: -k)
    if on_cycle:
        assert order is None
    else:
        assert order is not None
        assert sorted(order) == list(range(count))
        ready_first = max(k for k in range(count) if not waits[k] - {k})
        assert order[0] == ready_first  # the least key of those that are ready
        place = {k: at for at, k in enumerate(order)}
        assert all(place[j] < place[k] for k in range(count) for j in waits[k] - {k})
    found = cycles([w - {k} for k, w in enumerate(waits)])
    assert {k for component in found for k in component} == on_cycle
    for component in found:
        assert component == sorted(component)
        assert all(other in reach[k] for k in component for other in component)
