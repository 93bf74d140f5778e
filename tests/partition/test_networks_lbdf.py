"""LBDF against its schedule on random groups of real networks, on shrunk maps."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

from tests.graphs import grown_group
from tests.networks import SIZES, operator_graph
from tests.simulator import Simulator
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.node_set import bits, components, neighbours

GROUPS = 500


def groups(rng: Random, graph: OpGraph, lbdf: Lbdf) -> Iterator[int]:
    """Connected groups of 1 to 30 operators: every other one grown at random, the rest stretches
    of the program that end where a buffer is full, as plans have them.
    """
    near = neighbours(graph)
    while True:
        yield grown_group(rng, graph, rng.randint(1, 30))
        buffer_bytes = 1 << rng.randint(10, 20)
        start, mask = rng.randrange(len(graph)), 0
        for i in range(start, min(start + 30, len(graph))):
            mask |= 1 << i
            if lbdf.buffer(mask) >= buffer_bytes:
                break
        yield rng.choice(components(mask, near))


@pytest.mark.parametrize("granularity", ["line", "pixel"])
@pytest.mark.parametrize("name", SIZES)
def test_equals_the_schedule(name: str, granularity: str) -> None:
    pixel = granularity == "pixel"
    # AlexNet's third pooling needs a map of at least 63 pixels; Dynamo traces each size anew.
    graph = operator_graph(name, 64)
    lbdf = Lbdf(graph, granularity, 1, 1)
    rng = Random(f"{name} {granularity}")
    drawn = groups(rng, graph, lbdf)
    for _ in range(GROUPS):
        mask = next(drawn)
        expected = Simulator(graph, mask, pixel).buffer_bytes()
        assert lbdf.buffer(mask) == expected, [graph.ops[i].name for i in bits(mask)]
