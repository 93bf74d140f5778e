"""The fast evaluator against the simulator of its schedule: uncached group evaluations per second.

    python -m benchmarks.evaluator [--line 3000] [--pixel 400] [--random 60]

Both price the same groups of EfficientNet-B3 at 300x300 in the same run. No group is priced
twice. The evaluator starts from nothing, so its per-graph tables and whatever it learns about a
network's regions on the way are part of its time. Two sets of groups: a sample of those that the
exact search meets at the paper's five buffers, and connected groups of 1 to 30 operators grown at
random, which are rarely convex and share few regions (the hard case; no search asks for them).

Then the rate at 224x224 beside 896x896, for the same groups by operator name.

CPU time of this process; figures of a machine, unlike everything else that the project prints.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from random import Random

from tabulate import tabulate

from tests.graphs import grown_group
from tests.networks import operator_graph
from tests.simulator import Simulator
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.lbdf import axis_maps as stream
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.exact.down_sets import exact
from torch_getfuse.partition.problem import FusionProblem

KILOBYTES = (128, 256, 512, 1024, 2048)


class Recorder(Lbdf):
    """LBDF that keeps the groups whose buffer was asked for."""

    def __init__(self, graph: OpGraph, granularity: str) -> None:
        super().__init__(graph, granularity)
        self.met: dict[int, None] = {}

    def buffer(self, mask: int, buffer_bytes: int = 0) -> int:
        self.met[mask] = None
        return super().buffer(mask, buffer_bytes)


def met_by_the_exact_search(graph: OpGraph, buffers: Sequence[int]) -> list[int]:
    """Every group of which the exact search asks whether it is valid, in a fixed random order."""
    found: dict[int, None] = {}
    for kilobytes in buffers:
        scheme = Recorder(graph, "line")
        exact(FusionProblem(Evaluator(scheme, kilobytes * 1024)))
        found |= scheme.met
    groups = list(found)
    Random(0).shuffle(groups)
    return groups


def grown_at_random(graph: OpGraph, count: int) -> list[int]:
    rng = Random(0)
    found: dict[int, None] = {}
    while len(found) < count:
        found[grown_group(rng, graph, rng.randint(1, 30))] = None
    return list(found)


def timed(
    work: Callable[[OpGraph, str, Sequence[int]], list[int]],
    graph: OpGraph,
    granularity: str,
    groups: Sequence[int],
) -> tuple[list[int], float]:
    started = time.process_time()
    found = work(graph, granularity, groups)
    return found, time.process_time() - started


def price(graph: OpGraph, granularity: str, groups: Sequence[int]) -> list[int]:
    stream._widest.cache_clear()  # the only memo that outlives an evaluator
    lbdf = Lbdf(graph, granularity)
    return [lbdf.buffer(group) for group in groups]


def simulate(graph: OpGraph, granularity: str, groups: Sequence[int]) -> list[int]:
    return [Simulator(graph, group, granularity == "pixel").buffer_bytes() for group in groups]


def compare(graph: OpGraph, counts: dict[str, int], random: int) -> list[list[object]]:
    rows: list[list[object]] = []
    searched = met_by_the_exact_search(graph, KILOBYTES)
    for granularity, count in counts.items():
        sets = {"exact search": searched[:count], "random": grown_at_random(graph, random)}
        for name, groups in sets.items():
            if not groups:
                continue
            expected, slow = timed(simulate, graph, granularity, groups)
            runs = [timed(price, graph, granularity, groups) for _ in range(3)]
            assert all(found == expected for found, _ in runs), "the evaluator is wrong"
            fast = min(took for _, took in runs)
            size = sum(group.bit_count() for group in groups) / len(groups)
            rates = len(groups) / fast, len(groups) / slow
            rows.append([granularity, name, len(groups), size, *rates, slow / fast])
    return rows


def scale(name: str, granularity: str, count: int) -> list[object]:
    small, large = operator_graph(name, 224), operator_graph(name, 896)
    assert [op.name for op in small] == [op.name for op in large]
    groups = met_by_the_exact_search(small, (1024,))[:count]
    best = {224: float("inf"), 896: float("inf")}
    for _ in range(5):  # in turns, so that a busy machine slows both
        for size, graph in ((224, small), (896, large)):
            best[size] = min(best[size], timed(price, graph, granularity, groups)[1])
    rates = {size: len(groups) / took for size, took in best.items()}
    return [name, granularity, len(groups), rates[224], rates[896], rates[896] / rates[224]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--line", type=int, default=3000, help="groups at line granularity")
    parser.add_argument("--pixel", type=int, default=400, help="groups at pixel granularity")
    parser.add_argument("--random", type=int, default=60, help="random groups; 0 for none")
    args = parser.parse_args()
    rows = [
        scale(name, granularity, args.line)
        for name in ("mobilenet_v2", "resnet50", "efficientnet_b3")
        for granularity in ("line", "pixel")
    ]
    headers = ["network", "granularity", "groups", "per s at 224", "per s at 896", "ratio"]
    print(tabulate(rows, headers, floatfmt=("", "", "", ".0f", ".0f", ".2f")), flush=True)
    print()
    counts = {"line": args.line, "pixel": args.pixel}
    rows = compare(operator_graph("efficientnet_b3"), counts, args.random)
    headers = [
        "granularity",
        "groups of",
        "groups",
        "operators",
        "fast per s",
        "simulator",
        "ratio",
    ]
    print(tabulate(rows, headers, floatfmt=("", "", "", ".1f", ".0f", ".1f", ".0f")))


if __name__ == "__main__":
    main()
