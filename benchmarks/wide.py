"""Wide graphs: what is proved of their plans, and how fast.

    python benchmarks/wide.py                         # timm's networks, then generated graphs
    python benchmarks/wide.py --networks inception_v4 --buffers 256
    python benchmarks/wide.py --generated 64x5000 16x1000 --seconds 60

Per graph and buffer: local search (5 % of the time at most), then the dynamic program (10 %), then,
where that gives up, the cover by groups. The goal: within 60 s proved optimal or a proved gap of
at most 5 %, below 4 GB. LBDF by lines, 1 byte. CPU seconds tell how busy the machine was. Each
case runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from random import Random

from tabulate import tabulate

from torch_getfuse.ir import Op, OpGraph, Read, Tensor, Window
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.exact.down_sets import Limits, TooWide, exact
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.search.local import local_search
from torch_getfuse.partition.wide.group_cover import cover

NETWORKS = (
    "inception_v4",
    "hrnet_w18",
    "nasnetalarge",
    "pnasnet5large",
    "densenet201",
    "dla60",
    "skresnet50",
)
GENERATED = ("16x300", "32x1000", "64x1000", "8x5000", "16x5000", "64x5000")
GOAL = 0.05


def generated(width: int, operators: int, seed: int = 0) -> OpGraph:
    """Modules of ``width`` parallel chains of one to four convolutions, about ``operators`` in all.

    Each module stands between a 1x1 convolution and a concatenation.
    """
    rng = Random(seed)
    size, channels = 56, 8
    tensors = {"x": Tensor.of("x", (1, channels, size, size))}
    ops: list[Op] = []

    def add(kind: str, reads: list[tuple[str, Window]], c: int, weights: int) -> str:
        name = f"{kind}{len(ops)}"
        tensors[name] = Tensor.of(name, (1, c, size, size))
        made = tuple(Read(tensor, window) for tensor, window in reads)
        ops.append(Op(name, kind, made, name, weight_elements=weights, mixes_channels=weights > 0))
        return name

    at = "x"
    while len(ops) < operators:
        before = tensors[at].shape[1]
        fork = add("conv", [(at, Window.identity())], channels, before * channels)
        ends = []
        for _ in range(width):
            end = fork
            for _ in range(rng.randint(1, 4)):
                k = rng.choice((1, 3, 3, 5))
                window = Window.sliding((k, k), padding=(k // 2, k // 2))
                end = add("conv", [(end, window)], channels, channels * channels * k * k)
            ends.append((end, Window.identity()))
        at = add("concat", ends, channels * width, 0)
    return OpGraph(("x",), (at,), tuple(ops), tensors)


def load(name: str) -> OpGraph:
    """``WIDTHxOPERATORS``, or a network of timm at its own input size."""
    if name[0].isdigit():
        width, operators = map(int, name.split("x"))
        return generated(width, operators)
    import torch

    from torch_getfuse.backend.capture.capture import capture_model
    from torch_getfuse.models import default_input, load_model

    spec = f"timm:{name}"
    return capture_model(load_model(spec), (torch.zeros(default_input(spec)),)).graph


def measure(name: str, kilobytes: int, seconds: float) -> list[object]:
    graph = load(name)
    started, worked = time.perf_counter(), time.process_time()
    problem = FusionProblem(Evaluator(make_scheme("lbdf", graph, "line", 1, 1), kilobytes * 1024))
    best = local_search(problem, 2000, 0, time_limit=0.05 * seconds)
    try:
        limits = Limits(seconds=0.1 * seconds)
        found, method = exact(problem, best.dram_bytes, limits), "exact"
    except TooWide:
        left = seconds - (time.perf_counter() - started)
        found, method = cover(problem, best, left), "cover"
    took = time.perf_counter() - started
    worked = time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    gap = found.dram_bytes / found.lower_bound_bytes - 1
    misses = [
        *(["gap"] if gap > GOAL else []),
        *(["time"] if took > seconds else []),
        *(["memory"] if peak > 4096 else []),
    ]
    peak = round(peak)
    row = [name, len(graph), kilobytes, method, best.dram_bytes, found.dram_bytes]
    shown = "optimal" if gap == 0 else f"{100 * gap:.2f} %"
    return [
        *row,
        found.lower_bound_bytes,
        shown,
        f"{took:.1f}",
        f"{worked:.1f}",
        peak,
        ", ".join(misses),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--generated", nargs="*", default=GENERATED, help="WIDTHxOPERATORS")
    parser.add_argument("--buffers", nargs="*", type=int, default=(128, 256), help="KB")
    parser.add_argument("--seconds", type=float, default=60.0, help="per graph and buffer")
    args = parser.parse_args()
    rows = []
    for name in [*args.networks, *args.generated]:
        for kilobytes in args.buffers:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measure, (name, kilobytes, args.seconds)))
            print(*rows[-1], flush=True)
    heads = ["graph", "ops", "KB", "method", "local", "plan", "bound", "gap", "s", "CPU s", "MB"]
    heads.append("misses")
    print(tabulate(rows, heads, intfmt=",", disable_numparse=[7, 8, 9]))


if __name__ == "__main__":
    main()
