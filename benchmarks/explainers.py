"""How good the validity predictor and the explainers are.

    python benchmarks/explainers.py accuracy   # test part, and networks never trained on
    python benchmarks/explainers.py quality    # fidelity, sparsity, seconds per explanation
    python benchmarks/explainers.py rectify    # MobileNetV2, LBDF, 128 KB, as in Table V
    python benchmarks/explainers.py direct     # gap of the direct method to the optimum

Each prints a table; ``--json FILE`` writes the rows as well. ``accuracy`` needs the data set and
makes it where it is missing (``--data``, minutes).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from torch_getfuse.explain.data import UNSEEN, build, capture_network
from torch_getfuse.explain.dataset import PackedGroups
from torch_getfuse.explain.explainers import EXPLAINERS, make_ranker
from torch_getfuse.explain.metrics import measure
from torch_getfuse.explain.sampling import GroupSampler, sample_groups
from torch_getfuse.explain.validity import Scores, evaluate, load_model
from torch_getfuse.explain.weights_io import weights_path
from torch_getfuse.ir import OpGraph
from torch_getfuse.models import import_torchvision
from torch_getfuse.partition.cost import Evaluator
from torch_getfuse.partition.exact import exact
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.schemes import make_scheme
from torch_getfuse.partition.search import local_search, random_search
from torch_getfuse.partition.split import RULES, RecursiveSplit

MODELS = (("lbdf", "line"), ("lbdf", "pixel"), ("brr", "line"))
NETWORKS = (
    "vgg16",
    "squeezenet1_0",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "resnet18",
    "resnet50",
    "resnet101",
    "resnet152",
    "efficientnet_b0",
    "efficientnet_b3",
    "alexnet",
    "deeplabv3_mobilenet_v3_large",
)
KB = 1024
Row = dict[str, Any]


def scored(what: str, scheme: str, granularity: str, found: Scores) -> Row:
    return {
        "model": f"{scheme} {granularity}",
        "on": what,
        "samples": found.samples,
        "accuracy %": round(100 * found.accuracy, 2),
        "F1 %": round(100 * found.f1, 2),
        "F1 invalid %": round(100 * found.f1_invalid, 2),
        "majority %": round(100 * found.majority, 2),
    }


def accuracy(given: argparse.Namespace) -> Iterator[Row]:
    """Accuracy and F1 on the test part, and on groups of networks never trained on."""
    for scheme, granularity in MODELS:
        model = load_model(scheme, granularity)
        packed, _ = build(scheme, granularity, given.data)
        test = packed.part("test")
        yield scored("test part", scheme, granularity, evaluate(model, packed, test))
        alone = packed.fits_alone(scheme == "lbdf")[test]
        found = evaluate(model, packed, test[alone])
        yield scored("test part, no operator unfusable", scheme, granularity, found)
        for network in UNSEEN:
            graph = capture_network(network)
            samples = sample_groups(
                graph,
                lambda a, w, s=scheme, g=graph, u=granularity: make_scheme(s, g, u, a, w),
                granularity,
                given.groups,
                seed=777,
            )
            new = PackedGroups.of([(graph, list(samples))], granularity)
            found = evaluate(model, new, np.arange(len(new)))
            yield scored(network, scheme, granularity, found)


def network_graph(name: str) -> OpGraph:
    """A network's operator graph at the size the paper uses."""
    if not name.startswith("deeplab"):
        return capture_network(name)
    from torch_getfuse.backend.capture import capture_model

    with torch.device("meta"):
        make = getattr(import_torchvision().models.segmentation, name)
        model = make(weights=None, weights_backbone=None).eval()
        return capture_model(model, (torch.empty(1, 3, 513, 513),)).graph


def problem_of(graph: OpGraph, scheme: str, granularity: str, kb: int, merge: bool):
    return FusionProblem(
        Evaluator(make_scheme(scheme, graph, granularity, 1, 1), kb * KB), merge=merge
    )


def quality(given: argparse.Namespace) -> Iterator[Row]:
    """Fidelity, sparsity and time on invalid groups of networks seen and unseen."""
    for scheme, granularity in MODELS:
        for network in ("mobilenet_v2", "resnet50", "googlenet"):
            graph = capture_network(network)
            problem = problem_of(graph, scheme, granularity, 256, merge=False)
            sampler = GroupSampler(graph, given.rng)
            drawn = (sampler.draw(problem.evaluator.scheme) & problem.fusable for _ in range(10**6))
            groups: list[int] = []
            for group in drawn:
                if len(groups) == given.groups:
                    break
                if group & (group - 1) and not problem.evaluator.valid(group):
                    groups.append(group)
            for name in EXPLAINERS:
                ranker = make_ranker(
                    name, graph, scheme, 256 * KB, granularity=granularity, edges=given.edges
                )
                found = measure(ranker, problem, groups)
                yield {
                    "model": f"{scheme} {granularity}",
                    "network": network,
                    "explainer": name,
                    "groups": found.groups,
                    "operators": round(statistics.mean(g.bit_count() for g in groups), 1),
                    "fidelity %": round(100 * found.fidelity, 1),
                    "sparsity %": round(100 * found.sparsity, 1),
                    "ms": round(1000 * found.seconds, 2),
                }


def rectify(given: argparse.Namespace) -> Iterator[Row]:
    """Share of the invalid groups that a search met and its repair rectified."""
    graph = capture_network("mobilenet_v2")
    for label, search in (("local", local_search), ("random", random_search)):
        for name in EXPLAINERS:
            attempts = rectified = 0
            seconds, drams = 0.0, []
            for seed in range(given.seeds):
                problem = problem_of(graph, "lbdf", given.granularity, 128, merge=False)
                ranker = make_ranker(
                    name,
                    graph,
                    "lbdf",
                    128 * KB,
                    granularity=given.granularity,
                    edges=given.edges,
                    seed=seed,
                )
                split = RecursiveSplit(problem, ranker)
                started = time.perf_counter()
                found = search(problem, given.budget, seed, split)
                seconds += time.perf_counter() - started
                attempts += split.attempts
                rectified += split.rectified
                drams.append(found.dram_bytes / 1e6)
            yield {
                "search": label,
                "explainer": name,
                "invalid groups": attempts,
                "rectify rate %": round(100 * rectified / max(1, attempts), 1),
                "DRAM MB": round(statistics.mean(drams), 3),
                "s per seed": round(seconds / given.seeds, 1),
            }


def direct(given: argparse.Namespace) -> Iterator[Row]:
    """How far above the optimum the direct method ends."""
    for network in given.networks or NETWORKS:
        graph = network_graph(network)
        problem = problem_of(graph, "lbdf", given.granularity, given.buffer, merge=True)
        best = exact(problem).dram_bytes
        for rule in RULES:
            row: Row = {"network": network, "rule": rule}
            for name in EXPLAINERS:
                ranker = make_ranker(
                    name,
                    graph,
                    "lbdf",
                    given.buffer * KB,
                    granularity=given.granularity,
                    edges=given.edges,
                )
                found = RecursiveSplit(problem, ranker, rule).direct().dram_bytes
                row[name] = round(100 * (found / best - 1), 1)
            yield row


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    part.__name__: part for part in (accuracy, quality, rectify, direct)
}


def main() -> None:
    from random import Random

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", type=Path, default=Path("runs/explain"))
    parser.add_argument("--groups", type=int, default=120, help="groups per network")
    parser.add_argument("--edges", type=int, default=6, help="solution edges at most")
    parser.add_argument("--budget", type=int, default=300, help="plans per search")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--buffer", type=int, default=256, help="KB, of the part 'direct'")
    parser.add_argument("--granularity", choices=("line", "pixel"), default="line")
    parser.add_argument("--networks", nargs="*")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.rng = Random(0)
    torch.set_num_threads(1)
    rows = []
    for row in PARTS[given.part](given):
        rows.append(row)
        print(json.dumps(row), flush=True)
    print(tabulate(rows, headers="keys"))
    if given.part == "direct":
        means = {name: statistics.mean(row[name] for row in rows) for name in EXPLAINERS}
        print("mean gap %:", {name: round(value, 1) for name, value in means.items()})
    for scheme, granularity in MODELS:
        size = weights_path("validity", scheme, granularity).stat().st_size
        print(f"{scheme} {granularity}: {size} bytes of weights")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
