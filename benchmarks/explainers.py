"""How good the validity predictor and the explainers are.

    python benchmarks/explainers.py accuracy    # test part, and networks never trained on
    python benchmarks/explainers.py quality     # fidelity, sparsity, seconds per explanation
    python benchmarks/explainers.py thresholds  # how the thresholds of solution edges were chosen
    python benchmarks/explainers.py rectify     # MobileNetV2, LBDF, 128 KB, as in Table V
    python benchmarks/explainers.py direct      # gap of the direct method to the optimum
    python benchmarks/explainers.py searches    # every search, repaired by every explainer

Each prints a table; ``--json FILE`` writes the rows as well. ``accuracy`` needs the data set and
makes it where it is missing (``--data``, minutes). ``searches`` keeps its runs in
``searches.jsonl`` of that folder and goes on from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from torch_getfuse.explain.dataset import PackedGroups
from torch_getfuse.explain.explainers import EXPLAINERS, ExplanationRanker, make_ranker
from torch_getfuse.explain.metrics import measure
from torch_getfuse.explain.sampling import GroupSampler, sample_groups
from torch_getfuse.explain.trained_weights import weights_path
from torch_getfuse.explain.training.data import (
    SYNTHETIC,
    TABLE_1,
    UNSEEN,
    build,
    capture_network,
    default_side,
)
from torch_getfuse.explain.validity import Scores, evaluate, load_model
from torch_getfuse.ir import OpGraph
from torch_getfuse.models import import_torchvision
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.exact.down_sets import exact
from torch_getfuse.partition.problem import FusionProblem, SearchResult
from torch_getfuse.partition.search.edge_cuts import Edge
from torch_getfuse.partition.search.local import local_search
from torch_getfuse.partition.search.nsga2 import nsga2_search
from torch_getfuse.partition.search.random import random_search
from torch_getfuse.partition.search.recursive_split import (
    RULES,
    EdgeRanker,
    RecursiveSplit,
    all_edges,
    group_edges,
    random_edges,
)

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
SEARCHES: dict[str, Callable[..., SearchResult]] = {
    "random": random_search,
    "local": local_search,
    "nsga2": nsga2_search,
}
LEARNT = EXPLAINERS[:4]  # all but the controls
THRESHOLD_GRID = (0.7, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.0)
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
        # The split is by group, so the paper's networks keep their test part without the others.
        for what, synthetic in (("test part", 0), ("test part, random networks too", SYNTHETIC)):
            packed, _ = build(scheme, granularity, given.data, synthetic=synthetic)
            test = packed.part("test")
            yield scored(what, scheme, granularity, evaluate(model, packed, test))
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


def network_graph(
    name: str, rewrite: Callable[[torch.nn.Module], torch.nn.Module] | None = None
) -> OpGraph:
    """A network's operator graph at the size the paper uses; of the rewritten model, if given."""
    if rewrite is None and not name.startswith("deeplab"):
        return capture_network(name)
    from torch_getfuse.backend.capture.capture import capture_model

    models = import_torchvision().models
    with torch.device("meta"):
        if name.startswith("deeplab"):
            make, side = getattr(models.segmentation, name), 513
            model = make(weights=None, weights_backbone=None).eval()
        else:
            model, side = models.get_model(name, weights=None).eval(), default_side(name)
        if rewrite is not None:
            model = rewrite(model)
        return capture_model(model, (torch.empty(1, 3, side, side),)).graph


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
                ranker = make_ranker(name, graph, scheme, 256 * KB, granularity=granularity)
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


class Asked:
    """A repair that remembers the invalid groups that a search gave it."""

    def __init__(self, split: RecursiveSplit, valid: Callable[[int], bool]) -> None:
        self.name = split.name
        self.groups: dict[int, None] = {}
        self._split = split
        self._valid = valid

    def __call__(self, group: int, rng: Random) -> list[int] | None:
        if not self._valid(group):
            self.groups[group] = None
        return self._split(group, rng)


def shuffled(problem: FusionProblem, group: int, count: int, seed: int) -> list[Edge]:
    """The random control with as many edges as an explainer has."""
    edges = random_edges(problem.graph, 1.0, seed)(group)
    return [edge for edge, _ in edges[:count]]


def rectify(given: argparse.Namespace) -> Iterator[Row]:
    """Share of the invalid groups that a search met and the repair's own edges rectified.

    "random, as many": of the same groups, what random edges rectify if they are as many.
    """
    graph = capture_network("mobilenet_v2")
    for label in ("local", "random"):
        for name in given.explainers:
            rates, control, counts, shares, seconds = [], [], [], [], 0.0
            met = 0
            for seed in range(given.seeds):
                problem = problem_of(graph, "lbdf", given.granularity, 128, merge=False)
                ranker = make_ranker(
                    name, graph, "lbdf", 128 * KB, granularity=given.granularity, seed=seed
                )
                split = RecursiveSplit(problem, ranker)
                repair = Asked(split, problem.evaluator.valid)
                started = time.perf_counter()
                SEARCHES[label](problem, given.budget, seed, repair)
                seconds += time.perf_counter() - started
                rates.append(100 * split.rectify_rate)
                met += split.attempts
                solved = 0
                for group in repair.groups:
                    count = len(ranker(group))
                    counts.append(count)
                    shares.append(count / len(group_edges(graph, group)))
                    chance = shuffled(problem, group, count, seed)
                    solved += split.cut(group, chance) is not None
                control.append(100 * solved / max(1, len(repair.groups)))
            yield {
                "search": label,
                "explainer": name,
                "invalid groups": met,
                "rectify rate %": round(statistics.mean(rates), 1),
                "least": round(min(rates), 1),
                "greatest": round(max(rates), 1),
                "random, as many %": round(statistics.mean(control), 1),
                "edges": round(statistics.mean(counts), 1),
                "of the group's %": round(100 * statistics.mean(shares), 1),
                "s per search": round(seconds / given.seeds, 1),
            }


def thresholds(given: argparse.Namespace) -> Iterator[Row]:
    """Rectify rate by threshold on invalid groups of the training networks, LBDF at 128 KB."""
    cases: dict[str, list[tuple[str, RecursiveSplit, FusionProblem, int]]] = {}
    # The two largest would only add time: their blocks are those of the others of their family.
    for network in [name for name in TABLE_1 if name not in ("resnet101", "efficientnet_b3")]:
        problem = problem_of(capture_network(network), "lbdf", given.granularity, 128, merge=False)
        for label in ("local", "random"):
            split = RecursiveSplit(problem, all_edges(problem.graph))
            repair = Asked(split, problem.evaluator.valid)
            SEARCHES[label](problem, 100, 0, repair)
            met = list(repair.groups)
            chosen = Random(0).sample(met, min(given.groups // 4, len(met)))
            cases.setdefault(label, []).extend((network, split, problem, g) for g in chosen)
    for name in LEARNT:
        for label, found in cases.items():
            by_threshold: dict[float, list[_Judged]] = {}
            for network, split, problem, group in found:
                ranker = make_ranker(
                    name, problem.graph, "lbdf", 128 * KB, granularity=given.granularity
                )
                assert isinstance(ranker, ExplanationRanker)
                for threshold, judged in _by_threshold(ranker, split, problem, group):
                    by_threshold.setdefault(threshold, []).append((network, *judged))
            for threshold, all_judged in by_threshold.items():
                own = [solved for network, solved, *_ in all_judged if network == "mobilenet_v2"]
                _, solved, control, counts, shares = zip(*all_judged, strict=True)
                yield {
                    "explainer": name,
                    "search": label,
                    "threshold": threshold,
                    "groups": len(found),
                    "rectify rate %": round(100 * statistics.mean(solved), 1),
                    "of mobilenet_v2 %": round(100 * statistics.mean(own), 1),
                    "random, as many %": round(100 * statistics.mean(control), 1),
                    "edges": round(statistics.mean(counts), 1),
                    "of the group's %": round(100 * statistics.mean(shares), 1),
                }


_Judged = tuple[str, bool, bool, int, float]
"""Network; whether the explainer, and random edges, rectified; edges, and their share."""


def _by_threshold(
    ranker: ExplanationRanker, split: RecursiveSplit, problem: FusionProblem, group: int
) -> Iterator[tuple[float, tuple[bool, bool, int, float]]]:
    ranked = sorted(ranker.scores(group).items(), key=lambda item: (-item[1], item[0]))
    known: dict[int, tuple[bool, bool, int, float]] = {}
    for threshold in THRESHOLD_GRID:
        count = max(1, sum(score > threshold for _, score in ranked))
        if count not in known:
            edges = [edge for edge, _ in ranked[:count]]
            chance = shuffled(problem, group, count, 0)
            known[count] = (
                split.cut(group, edges) is not None,
                split.cut(group, chance) is not None,
                count,
                count / len(ranked),
            )
        yield threshold, known[count]


def direct(given: argparse.Namespace) -> Iterator[Row]:
    """How far above the optimum the direct method ends: with, and in brackets without, regrouping.

    The time is that of the whole method, its explanations included, after the optimum is known.
    """
    for network in given.networks or NETWORKS:
        graph = network_graph(network)
        for buffer in given.buffers:
            problem = problem_of(graph, "lbdf", given.granularity, buffer, merge=True)
            best = exact(problem).dram_bytes
            for rule in RULES if given.rules else RULES[:1]:
                row: Row = {"network": network, "KB": buffer, "rule": rule}
                for name in EXPLAINERS:
                    ranker = make_ranker(
                        name, graph, "lbdf", buffer * KB, granularity=given.granularity
                    )
                    fresh = problem_of(graph, "lbdf", given.granularity, buffer, merge=True)
                    found = RecursiveSplit(fresh, ranker, rule).direct()
                    row[name] = round(100 * (found.dram_bytes / best - 1), 1)
                    row[f"{name}, split only"] = round(100 * (found.history[0][1] / best - 1), 1)
                    row[f"{name}, s"] = round(found.seconds, 2)
                yield row


def direct_summary(rows: Sequence[Row]) -> list[Row]:
    """Mean, median and worst over the rows of :func:`direct`, by rule and buffer and over all."""
    found = []
    for rule in dict.fromkeys(row["rule"] for row in rows):
        alike = [row for row in rows if row["rule"] == rule]
        buffers = list(dict.fromkeys(row["KB"] for row in alike))
        for buffer in [*buffers, "all"] if len(buffers) > 1 else buffers:
            chosen = [row for row in alike if buffer in ("all", row["KB"])]
            for name in EXPLAINERS:
                gaps, split = ([row[name + end] for row in chosen] for end in ("", ", split only"))
                found.append(
                    {
                        "rule": rule,
                        "KB": buffer,
                        "explainer": name,
                        "mean gap %": round(statistics.mean(gaps), 2),
                        "median": round(statistics.median(gaps), 1),
                        "worst": max(gaps),
                        "split only: mean": round(statistics.mean(split), 2),
                        "median ": round(statistics.median(split), 1),
                        "worst ": max(split),
                        "s at most": max(row[f"{name}, s"] for row in chosen),
                    }
                )
    return found


def searches(given: argparse.Namespace) -> Iterator[Row]:
    """Every search without and with every explainer, over single operators at 128 KB."""
    kept = given.data / "searches.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    known = {tuple(run["key"]): run for run in map(json.loads, lines)}
    for network in given.networks or ("mobilenet_v2",):
        graph = network_graph(network)
        merged = problem_of(graph, "lbdf", given.granularity, 128, merge=True)
        best = exact(merged).dram_bytes  # merging loses nothing: the optimum of single ones too
        for label, search in SEARCHES.items():
            for name in ("none", *EXPLAINERS):
                runs = []
                for seed in range(given.seeds):
                    key = (network, given.granularity, label, name, seed)
                    if key not in known:
                        known[key] = _search_run(graph, key, search, given.granularity)
                        with kept.open("a", encoding="utf-8") as file:
                            file.write(json.dumps({"key": key, **known[key]}) + "\n")
                    runs.append(known[key])
                yield _search_row(network, label, name, best, runs)


def _search_run(
    graph: OpGraph, key: tuple[Any, ...], search: Callable[..., SearchResult], granularity: str
) -> Row:
    """One search of 2,000 plans: its history, of which the first 1,000 plans are a part."""
    *_, name, seed = key
    problem = problem_of(graph, "lbdf", granularity, 128, merge=False)
    repair = None
    if name != "none":
        ranker: EdgeRanker = make_ranker(
            name, graph, "lbdf", 128 * KB, granularity=granularity, seed=seed
        )
        repair = RecursiveSplit(problem, ranker)
    found = search(problem, 2000, seed, repair)
    return {"history": found.history, "seconds": round(found.seconds, 2)}


def _search_row(network: str, label: str, name: str, best: int, runs: Sequence[Row]) -> Row:
    row: Row = {"network": network, "search": label, "explainer": name}
    for budget in (1000, 2000):
        ends = [min(cost for plans, cost in run["history"] if plans <= budget) for run in runs]
        gaps = [100 * (end / best - 1) for end in ends]
        row[f"MB, {budget} plans"] = round(statistics.mean(ends) / 1e6, 3)
        row[f"gap %, {budget}"] = round(statistics.mean(gaps), 1)
        row[f"least to greatest, {budget}"] = f"{min(gaps):.1f} to {max(gaps):.1f}"
    near = [
        next((plans for plans, cost in run["history"] if cost <= 1.02 * best), None) for run in runs
    ]
    there = [plans for plans in near if plans is not None]
    row["runs within 2 %"] = f"{len(there)} of {len(near)}"
    row["plans to get there"] = round(statistics.median(there)) if there else "-"
    row["s"] = round(statistics.mean(run["seconds"] for run in runs), 1)
    return row


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    part.__name__: part for part in (accuracy, quality, thresholds, rectify, direct, searches)
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", type=Path, default=Path("runs/explain"))
    parser.add_argument("--groups", type=int, default=120, help="groups per network")
    parser.add_argument("--budget", type=int, default=2000, help="plans per search, of 'rectify'")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--buffers", type=int, nargs="+", default=(128, 256, 1024), help="KB, of 'direct'"
    )
    parser.add_argument("--rules", action="store_true", help="'direct' by the paper's rule too")
    parser.add_argument("--granularity", choices=("line", "pixel"), default="line")
    parser.add_argument("--networks", nargs="*")
    parser.add_argument(
        "--explainers", nargs="+", default=EXPLAINERS, choices=EXPLAINERS, help="of 'rectify'"
    )
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
        print(tabulate(direct_summary(rows), headers="keys"))
    if given.part == "accuracy":
        for scheme, granularity in MODELS:
            size = weights_path("validity", scheme, granularity).stat().st_size
            print(f"{scheme} {granularity}: {size} bytes of weights")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
