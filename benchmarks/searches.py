"""How far each search ends above the optimum, in percent, and how fast it is.

    python benchmarks/searches.py [--quick] [--picture FILE]

LBDF, lines, 1 byte for activations and weights; the optimum is proved by the exact search. Each
search runs with five seeds (``--quick``: one, with a tenth of the plans): median, least and
greatest gap. "merged": over blocks of operators that some optimum keeps together; "single": over
single operators, the paper's protocol. Groups that do not fit are split at random. A picture (.svg
or .png) shows the best plan so far against the plans tried, over single operators, first seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from tabulate import tabulate

from torch_getfuse.accelerator import format_size
from torch_getfuse.backend.capture.capture import capture_model
from torch_getfuse.ir import OpGraph
from torch_getfuse.models import import_torchvision
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.exact.down_sets import exact
from torch_getfuse.partition.problem import FusionProblem, SearchResult
from torch_getfuse.partition.search.local import local_search
from torch_getfuse.partition.search.nsga2 import nsga2_search
from torch_getfuse.partition.search.random import random_search
from torch_getfuse.reporting.figure import save_figure
from torch_getfuse.reporting.search_picture import Panel, Searched, search_figure
from torch_getfuse.reporting.suffixes import known_suffix

KB = 1024
# name, side of the input, buffer, plans (those of the paper's tables)
CASES = (
    ("mobilenet_v2", 224, 128 * KB, 2000),
    ("squeezenet1_0", 224, 128 * KB, 2000),
    ("resnet50", 224, 128 * KB, 2000),
    ("efficientnet_b3", 300, 256 * KB, 5000),
)
SEARCHES: tuple[tuple[str, Callable[..., SearchResult]], ...] = (
    ("local", local_search),
    ("random", random_search),
    ("nsga2", nsga2_search),
)


def capture(name: str, side: int) -> OpGraph:
    torchvision = import_torchvision()
    model = torchvision.models.get_model(name, weights=None).eval()
    return capture_model(model, (torch.zeros(1, 3, side, side),)).graph


def problem(graph: OpGraph, buffer_bytes: int, merge: bool) -> FusionProblem:
    return FusionProblem(Evaluator(Lbdf(graph, "line", 1, 1), buffer_bytes), merge)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, a tenth of the plans")
    parser.add_argument("--picture", metavar="FILE", help="draw the histories as well")
    args = parser.parse_args()
    quick = args.quick
    if args.picture is not None:
        known_suffix(args.picture, "a picture", (".svg", ".png"))
    torch.set_num_threads(1)
    seeds = range(1 if quick else 5)
    rows, panels = [], []
    for name, side, buffer_bytes, budget in CASES:
        graph = capture(name, side)
        plans = budget // 10 if quick else budget
        optimum = exact(problem(graph, buffer_bytes, merge=True)).dram_bytes
        for merge in (True, False):
            histories = []
            for label, search in SEARCHES:
                # A problem of its own for each run: no memo is shared, so the speed is honest.
                found = [search(problem(graph, buffer_bytes, merge), plans, s) for s in seeds]
                first = found[0]
                end = (first.plans, first.dram_bytes)
                histories.append(Searched(label, [*first.history, end]))
                gaps = [100 * (result.dram_bytes / optimum - 1) for result in found]
                speed = sum(r.plans for r in found) / sum(r.seconds for r in found)
                rows.append(
                    (
                        f"{name} {side}",
                        format_size(buffer_bytes),
                        "merged" if merge else "single",
                        label,
                        plans,
                        median(gaps),
                        min(gaps),
                        max(gaps),
                        round(speed),
                    )
                )
                print(f"{name} {rows[-1][2]} {label}: {median(gaps):.2f} %", flush=True)
        title = f"{name}, buffer {format_size(buffer_bytes)}"
        panels.append(Panel(title, histories, optimum, optimal=True))
    if args.picture is not None:
        save_figure(search_figure(panels), args.picture, dpi=110)
    headers = ("network", "buffer", "operators", "search", "plans")
    headers += ("median %", "least %", "most %", "plans/s")
    print(tabulate(rows, headers=headers, floatfmt=".2f"))


if __name__ == "__main__":
    main()
