"""BRR's optimum beside a layer-by-layer run, 2 bytes per element, in MiB per sample.

    python -m benchmarks.brr

Layer by layer: every operator a group of its own, so each input comes from DRAM and each output
goes back there, and weights are read once per tile of rows that fits the buffer. A public run of
Optimus on mobilenet_v2 states 7.532 / 7.191 / 6.928 at 128 / 256 / 512 KB; it counts neither
depthwise weights nor biases (another 0.157 MiB) and does not round passes up.
"""

from __future__ import annotations

import time

from tabulate import tabulate

from tests.networks import operator_graph
from torch_getfuse.partition.cost.brr.model import Brr
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.exact.down_sets import Limits, exact
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem

RUNS = {
    "mobilenet_v2": (128, 256, 512),
    "resnet18": (128,),
    "squeezenet1_0": (128, 256, 512),
    "resnet50": (128, 256, 512),
}
WIDTH = 2


def main() -> None:
    rows = []
    for name, buffers in RUNS.items():
        graph = operator_graph(name)
        for kilobytes in buffers:
            started = time.perf_counter()
            evaluator = Evaluator(Brr(graph, WIDTH, WIDTH), kilobytes * 1024)
            problem = FusionProblem(evaluator)
            found = exact(problem, limits=Limits(steps=1 << 40))
            alone = problem.cost([1 << i for i in bits(problem.fusable)])
            rows.append(
                [
                    name,
                    kilobytes,
                    alone / 2**20,
                    found.dram_bytes / 2**20,
                    found.dram_bytes / alone,
                    len(found.groups),
                    problem.unfusable.bit_count(),
                    time.perf_counter() - started,
                ]
            )
    headers = [
        *("network", "buffer KB", "layer by layer", "optimum", "ratio"),
        *("groups", "unfusable", "seconds"),
    ]
    print(tabulate(rows, headers, floatfmt=("", "", ".3f", ".3f", ".3f", "", "", ".1f")))


if __name__ == "__main__":
    main()
