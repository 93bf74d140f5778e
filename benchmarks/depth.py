"""Time and memory of the exact search on deep graphs of one width.

    python benchmarks/depth.py [--operators 100 300 1000 3000 10000] [--width 2] [--buffer 16]

The graphs are modules of parallel chains (``wide.generated``), one after another. Measured is all
between the operator graph and the proved optimum: cost model, problem, search, in seconds of one
core. Each case runs in a process of its own, so that its peak memory is its own; the last column is
what it takes beyond the graph, the interpreter and its imports. The aim: seconds per ``n log n`` do
not grow. Exits with 1 where those of the deepest graph exceed twice the least of the others, for
either cost model.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import time

from tabulate import tabulate
from wide import generated

from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.exact.down_sets import exact
from torch_getfuse.partition.problem import FusionProblem

OPERATORS = (100, 300, 1000, 3000, 10_000)
MOST = 2.0


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(scheme: str, width: int, operators: int, kilobytes: int) -> list[object]:
    graph = generated(width, operators)
    before = peak_mb()
    started = time.process_time()
    problem = FusionProblem(Evaluator(make_scheme(scheme, graph, "line", 1, 1), kilobytes * 1024))
    found = exact(problem)
    took = time.process_time() - started
    n = len(graph)
    each = 1e6 * took / (n * math.log2(n))
    return [scheme, n, len(found.groups), found.plans, took, each, peak_mb() - before]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operators", nargs="*", type=int, default=OPERATORS)
    parser.add_argument("--width", type=int, default=2, help="parallel chains (2)")
    parser.add_argument("--buffer", type=int, default=16, help="KB (16)")
    given = parser.parse_args()
    rows: list[list[object]] = []
    reached = True
    for scheme in ("lbdf", "brr"):  # whose plans the exact search over groups proves
        costs = []
        for operators in sorted(given.operators):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(measure, (scheme, given.width, operators, given.buffer))
            print(*row, flush=True)
            rows.append(row)
            costs.append(float(str(row[5])))
        reached &= costs[-1] <= MOST * min(costs)
    heads = ["scheme", "operators", "groups", "priced", "s", "us per n log n", "MB"]
    print(tabulate(rows, heads, intfmt=",", floatfmt=(*[""] * 4, ".2f", ".2f", ".0f")))
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
