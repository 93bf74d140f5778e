"""Time of planning against torch.export of the same model, for 13 networks and 15 targets each.

    python benchmarks/planning.py [--quick] [--networks resnet152 ...] [--repeat N]

Planning is what the torch.compile backend does with the FX graph that it is given: operator graph
(``capture_fx``) and plan (``plan_graph``), by method "exact" and by "auto", 1 byte per element.
Beside it ``torch.export.export`` of the same model in the same process: the median of three, after
one that warms up. Both are seconds of CPU: single-threaded work, and what else the machine does
counts in neither. The aim: every ratio below 1, the median below 0.3, every plan proved optimal.
``--quick`` takes three networks, ``--networks`` those named. Exits with 1 where the aim is missed.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import fx, nn

from torch_getfuse.backend.capture.capture import capture_fx
from torch_getfuse.options import Options
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.planner import plan_graph

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the networks are the tests'

from tests.networks import SIZES, network

QUICK = ("squeezenet1_0", "mobilenet_v2", "resnet18")
MODELS = (("lbdf", "line"), ("lbdf", "pixel"), ("brr", "line"))
BUFFERS_KB = (128, 256, 512, 1024, 2048)
METHODS = ("exact", "auto")
TIME_LIMIT = 60.0  # so that a slow point is told by its time, not by a missing proof
MOST, MEDIAN = 1.0, 0.3


class Traced(Exception):
    """Leaves the model as soon as Dynamo has its graph."""


@dataclass(frozen=True)
class Point:
    """One plan: seconds by method, and what export takes."""

    network: str
    scheme: str
    buffer_kb: int
    export: float
    seconds: dict[str, float]
    plans: dict[str, PartitionPlan]

    def ratio(self, method: str) -> float:
        return self.seconds[method] / self.export

    def row(self) -> list[Any]:
        times = [
            figure
            for method in METHODS
            for figure in (
                self.seconds[method],
                self.ratio(method),
                self.plans[method].proof,
            )
        ]
        return [self.network, self.scheme, self.buffer_kb, self.export, *times]


def traced(model: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    """What Dynamo hands to a backend."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        raise Traced

    torch.compiler.reset()
    with torch.no_grad():
        try:
            torch.compile(model, backend=backend, fullgraph=True)(x)
        except Exception as error:
            if not graphs:
                raise error
    return graphs[0]


def clock(work: Callable[[], Any], repeat: int) -> tuple[float, Any]:
    """Median seconds of CPU, and the last result."""
    seconds = []
    for _ in range(repeat):
        gc.collect()  # or a sweep of the whole process, half a second, falls on whoever is next
        started = time.process_time()
        result = work()
        seconds.append(time.process_time() - started)
    return median(seconds), result


def measure(name: str, repeat: int) -> list[Point]:
    model, x = network(name)
    gm = traced(model, x)
    torch.export.export(model, (x,))
    export, _ = clock(lambda: torch.export.export(model, (x,)), 3)
    points = []
    for scheme, granularity in MODELS:
        for buffer_kb in BUFFERS_KB:
            seconds, plans = {}, {}
            for method in METHODS:
                options = Options(
                    buffer=buffer_kb * 1024,
                    scheme=scheme,
                    granularity=granularity,
                    activation_bytes=1,
                    weight_bytes=1,
                    method=method,
                    time_limit=TIME_LIMIT,
                    progress=False,
                )
                seconds[method], plans[method] = clock(
                    lambda chosen=options: plan_graph(capture_fx(gm).graph, chosen), repeat
                )
            label = f"{scheme} {granularity}" if scheme == "lbdf" else scheme
            point = Point(name, label, buffer_kb, export, seconds, plans)
            print(
                f"{name} {label} {buffer_kb} KB: export {export:.2f} s, "
                + ", ".join(
                    f"{m} {seconds[m]:.2f} s ({plans[m].proof}, {plans[m].dram_bytes} B)"
                    for m in METHODS
                ),
                flush=True,
            )
            points.append(point)
    return points


def verdict(points: Sequence[Point], method: str) -> bool:
    """Print the summary of a method; whether the aim is reached."""
    ratios = [point.ratio(method) for point in points]
    worst = max(points, key=lambda point: point.ratio(method))
    proved = sum(point.plans[method].proof == "optimal" for point in points)
    over = sum(ratio >= MOST for ratio in ratios)
    print(
        f"{method}: {proved} of {len(points)} proved optimal; ratio to torch.export: median "
        f"{median(ratios):.3f}, maximum {max(ratios):.3f} ({worst.network}, {worst.scheme}, "
        f"{worst.buffer_kb} KB); {over} at {MOST:g} or above"
    )
    return proved == len(points) and not over and median(ratios) < MEDIAN


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three networks")
    parser.add_argument("--networks", nargs="+", choices=list(SIZES), metavar="NAME")
    parser.add_argument("--repeat", type=int, default=1, help="plans per point; median (1)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = given.networks or (QUICK if given.quick else tuple(SIZES))
    measure(QUICK[0], 1)  # what is imported and compiled at first use is not planning
    print("warmed up", flush=True)
    points = [point for name in names for point in measure(name, given.repeat)]
    headers = ["network", "scheme", "buffer KB", "export s"]
    for method in METHODS:
        headers += [f"{method} s", "ratio", "proof"]
    print(tabulate([point.row() for point in points], headers=headers, floatfmt=".2f"))
    reached = [verdict(points, method) for method in METHODS]
    differ = [p for p in points if len({plan.dram_bytes for plan in p.plans.values()}) > 1]
    for point in differ:
        print(f"{point.network} {point.scheme} {point.buffer_kb} KB: the methods differ")
    return 0 if all(reached) and not differ else 1


if __name__ == "__main__":
    raise SystemExit(main())
