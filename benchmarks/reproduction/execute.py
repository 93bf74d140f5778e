"""Carries out one run and returns its figures."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.explainers import accuracy, network_graph, problem_of
from benchmarks.reproduction import provenance
from benchmarks.reproduction.onnx_operators import SUFFIX, write_out
from benchmarks.reproduction.plain import EDITS, plain_local_search
from benchmarks.reproduction.requests import RULE, Request
from torch_getfuse.accelerator import KB
from torch_getfuse.explain.sampling import BUFFERS
from torch_getfuse.explain.training.data import GROUPS, TABLE_1, build, load_samples, requests
from torch_getfuse.explain_graph import explain_graph
from torch_getfuse.group_planner import ranker_of
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options
from torch_getfuse.partition.exact.down_sets import Limits, exact
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem, SearchResult
from torch_getfuse.partition.search.local import local_search
from torch_getfuse.partition.search.nsga2 import max_buffer, nsga2_search
from torch_getfuse.partition.search.random import random_search
from torch_getfuse.partition.search.recursive_split import RecursiveSplit
from torch_getfuse.planner import plan_graph
from torch_getfuse.plugins import ASKED_EXPLAINERS

Figures = dict[str, Any]

EXPLAINED = ("features.2", "features.3")
"""Two inverted residuals of MobileNetV2: the invalid group of Fig. 4."""
_DRAWN = 120  # groups of each network that no predictor was trained on

_SEARCHES: Mapping[str, Callable[..., SearchResult]] = {
    "plain": plain_local_search,
    "plain-edits": partial(plain_local_search, edits=EDITS),
    "local": local_search,
    "local-merged": local_search,
    "random": random_search,
    "nsga2": nsga2_search,
}


@cache
def graph_of(network: str, folder: Path) -> OpGraph:
    """The network's operator graph, captured once and kept while the capture is as it is."""
    modules = ["torch_getfuse.backend.capture.capture"]
    if network.endswith(SUFFIX):
        modules.append("benchmarks.reproduction.onnx_operators")
    capture = provenance.code_digest(*modules)
    library = provenance.versions("torch").replace(" ", "-")
    path = folder / "graphs" / f"{network}-{capture}-{library}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        rewrite = write_out if network.endswith(SUFFIX) else None
        graph = network_graph(network.removesuffix(SUFFIX), rewrite)
        part.write_text(json.dumps(graph.to_dict()), encoding="utf-8")
        part.replace(path)
    return OpGraph.from_dict(json.loads(path.read_text(encoding="utf-8")))


def execute(request: Request, folder: Path) -> Figures:
    """The figures of a run, with its ``seconds`` and the ``wall`` time with all preparations.

    Args:
        request: the run.
        folder: where operator graphs and data are kept between runs.
    """
    torch.set_num_threads(1)
    started = time.perf_counter()
    found = _KINDS[request.kind](request, folder)
    wall = time.perf_counter() - started
    return {"seconds": wall, **found, "wall": wall}


def machine() -> str:
    """Cores and processor, as the tables name it."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{os.cpu_count()} cores of {model}"


def _problem(request: Request, folder: Path, merge: bool = False) -> FusionProblem:
    """A problem with an empty memo, so that the seconds of a run are its own."""
    graph = graph_of(request.network, folder)
    return problem_of(graph, request.scheme, request.granularity, request.buffer_kb, merge)


def _options(request: Request) -> Options:
    return Options(
        buffer=request.buffer_kb * KB,
        scheme=request.scheme,
        granularity=request.granularity,
        activation_bytes=1,
        weight_bytes=1,
        seed=request.seed,
        progress=False,
    )


def _search(request: Request, folder: Path) -> Figures:
    problem = _problem(request, folder, merge=request.search == "local-merged")
    split = None
    if request.explainer != "none":
        ranker = ranker_of(request.explainer, problem, _options(request))
        split = RecursiveSplit(problem, ranker, RULE)
    found = _SEARCHES[request.search](problem, request.budget, request.seed, split)
    return {
        **_plan(problem, found),
        "plans": found.plans,
        "history": found.history,
        "attempts": split.attempts if split else 0,
        "rectified": split.rectified if split else 0,
        "queries": split.queries if split else 0,
    }


def _plan(problem: FusionProblem, found: SearchResult) -> Figures:
    return {
        "dram_bytes": found.dram_bytes,
        "max_buffer_bytes": max_buffer(problem, found.groups),
        "groups": len(found.groups),
        "seconds": found.seconds,
    }


def _optimum(request: Request, folder: Path) -> Figures:
    problem = _problem(request, folder, merge=True)
    found = exact(problem, limits=Limits(steps=1 << 40))
    alone = [1 << i for i in bits(problem.fusable)]
    return {
        **_plan(problem, found),
        "unfused_bytes": problem.cost(alone),
        "operators": len(problem.graph),
        "unfusable": problem.unfusable.bit_count(),
    }


def _auto(request: Request, folder: Path) -> Figures:
    graph = graph_of(request.network, folder)
    started = time.perf_counter()
    plan = plan_graph(graph, _options(request))
    return {
        "dram_bytes": plan.dram_bytes,
        "proof": plan.proof,
        "method": plan.method,
        "seconds": time.perf_counter() - started,
    }


def _samples(request: Request, folder: Path) -> Figures:
    """Distinct groups of the paper's networks, and the share of valid ones per buffer."""
    build(request.scheme, request.granularity, _data(folder), jobs=1, progress=False)
    counts: dict[str, int] = {}
    valid = [0] * len(BUFFERS)
    for shard in requests(request.scheme, request.granularity, GROUPS, seed=0):
        if shard.network not in TABLE_1:
            continue
        samples = load_samples(shard, _data(folder))
        counts[shard.network] = counts.get(shard.network, 0) + len(samples)
        for sample in samples:
            for k, fits in enumerate(sample.valid):
                valid[k] += fits
    return {
        "groups": counts,
        "buffers": BUFFERS,
        "valid": [count / sum(counts.values()) for count in valid],
    }


def _predictors(request: Request, folder: Path) -> Figures:
    """Accuracy and F1 of all predictors, by the explainers' own benchmark."""
    return {"scores": list(accuracy(Namespace(data=_data(folder), groups=_DRAWN)))}


def _data(folder: Path) -> Path:
    """Where the training keeps its data set, so that it is not made twice."""
    return folder.parent / "explain"


def _explanation(request: Request, folder: Path) -> Figures:
    """Fig. 4: a group that does not fit, the edges that each explainer blames, and a picture."""
    import matplotlib

    graph = graph_of(request.network, folder)
    why = explain_graph(graph, _options(request), EXPLAINED, ASKED_EXPLAINERS)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "group.svg"
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "getfuse"}):
            why.save(path)
        picture = path.read_text(encoding="utf-8")
    return {"why": why.to_dict(), "picture": picture}


_KINDS: Mapping[str, Callable[[Request, Path], Figures]] = {
    "search": _search,
    "optimum": _optimum,
    "auto": _auto,
    "samples": _samples,
    "predictors": _predictors,
    "explanation": _explanation,
}
