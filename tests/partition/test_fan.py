"""The tables of a fan against the general rule, on whatever regions random graphs have."""

from __future__ import annotations

from itertools import pairwise, permutations
from random import Random

import pytest

from tests.graphs import Builder, grown_group, random_graph
from tests.simulator import Simulator
from torch_getfuse.ir import OpGraph, Window
from torch_getfuse.partition.cost.lbdf import branch_peak
from torch_getfuse.partition.cost.lbdf.axis_maps import Edge, axis_map
from torch_getfuse.partition.cost.lbdf.branch_lag import Clock, Region, join
from torch_getfuse.partition.cost.lbdf.branch_peak import FanTables
from torch_getfuse.partition.cost.lbdf.model import Lbdf


def regions_of(monkeypatch: pytest.MonkeyPatch, rng: Random, graphs: int) -> dict[Region, None]:
    """The regions of random groups of random graphs, at both granularities."""
    met: dict[Region, None] = {}

    def note(self: FanTables, region: Region) -> int | None:
        met[region] = None
        return None

    with monkeypatch.context() as patch:
        patch.setattr(FanTables, "peak", note)
        for _ in range(graphs):
            graph = random_graph(rng, rng.randint(3, 12), rng.choice((4, 9, 14)))
            scheme = Lbdf(graph, rng.choice(("line", "pixel")))
            for _ in range(6):
                scheme.buffer(grown_group(rng, graph, rng.randint(2, len(graph))))
    return met


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_general_rule(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    tables = FanTables()
    found = [
        (tables.peak(region), region.peak())
        for region in regions_of(monkeypatch, Random(6000 + seed), 150)
    ]
    assert tables.size
    fans = [pair for pair in found if pair[0] is not None]
    assert len(fans) > 100
    assert all(fan == general for fan, general in fans)


def test_many_branches_against_the_schedule() -> None:
    rng = Random(6100)
    for _ in range(12):
        build = Builder()
        fork = build.conv(build.input((1, 2, 12, 12)), 2)
        ends = []
        for _ in range(rng.randint(2, 7)):
            end = fork
            for _ in range(rng.randint(0, 3)):
                end = build.conv(end, 2, rng.choice((1, 3, 5)))
            ends.append((end, Window.identity()))
        build.op("concat", list(dict.fromkeys(ends)), (1, 2 * len(set(ends)), 12, 12))
        graph = build.graph()
        everything = (1 << len(graph)) - 1
        assert Lbdf(graph).buffer(everything) == Simulator(graph, everything).buffer_bytes()


def test_tables_are_forgotten_when_they_get_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    regions = list(regions_of(monkeypatch, Random(6200), 60))
    free = FanTables()
    expected = [free.peak(region) for region in regions]
    monkeypatch.setattr(branch_peak, "MOST_REMEMBERED", 500)
    bound = FanTables()
    sizes = []
    for region, peak in zip(regions, expected, strict=True):
        assert bound.peak(region) == peak
        sizes.append(bound.size)
    units = [edge.units_out for region in regions for _, edge in region.consumers]
    largest = max(*units, *(region.steps for region in regions))
    assert max(sizes) < 500 + 5 * (largest + 1) < free.size
    assert any(later < earlier for earlier, later in pairwise(sizes))


def _chain_of_branches(depth: int) -> OpGraph:
    """A tensor that is added to what a chain of residual blocks makes of it."""
    build = Builder()
    fork = end = build.conv(build.input((1, 2, 12, 12)), 2)
    for _ in range(depth):
        inner = build.add(build.conv(end, 2, 3), build.conv(end, 2, 5))
        end = build.add(end, build.conv(inner, 2, 3))
    build.add(end, fork)
    return build.graph()


@pytest.mark.parametrize("granularity", ["line", "pixel"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_chain_of_branches_against_the_schedule(depth: int, granularity: str) -> None:
    graph = _chain_of_branches(depth)
    whole = (1 << len(graph)) - 1
    expected = Simulator(graph, whole, granularity == "pixel").buffer_bytes()
    assert Lbdf(graph, granularity).buffer(whole) == expected


def test_a_chain_of_branches_does_not_double_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    peak = Region.peak

    def note(self: Region) -> int:
        asked.append(self.questions)
        return peak(self)

    monkeypatch.setattr(Region, "peak", note)
    graph = _chain_of_branches(16)
    assert Lbdf(graph, "line").buffer((1 << len(graph)) - 1)
    assert 0 < max(asked) < 16 * 30


def test_parallel_paths_are_equal_in_whatever_order_they_come() -> None:
    """Else a region is worked out again or not as memory has it, and steps are counted with it."""

    def edge(kernel: int) -> Edge:
        window = Window.sliding((kernel, 1), (1, 1), (1, 1), (kernel // 2, 0))
        return Edge(axis_map(window, 0, 16, 16), None, True)

    three, five, seven = edge(3), edge(5), edge(7)
    inner = [(three, seven, three), (five, three), (seven,)]
    whole = [(five, *join(inner)), (Clock(16, 16, 32, 16), seven), (three, three, three, three)]
    found = {join([path[:1] + path[1:] for path in order]) for order in permutations(whole)}
    assert len(found) == 1
    assert len({join(order) for order in permutations(inner)}) == 1
    ((only,),) = found
    assert len(only.paths) == 3
