"""Samples from proved plans, the trained models, and how well they tell borders."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.border_ranking.data import Row, labels, problem_of
from benchmarks.border_ranking.graphs import load
from benchmarks.border_ranking.model import (
    EDGE_FEATURES,
    MODEL_ID,
    BorderModel,
    EdgeModel,
    EdgeTensors,
    Model,
    Sample,
    auc,
    fit,
    fit_edges,
    pooled,
)
from benchmarks.json_lines import rows_in
from torch_getfuse.explain.trained_weights import load_weights, save_weights

SEEDS = (0, 1, 2)
PARTS = ("train", "validation", "test")
FAMILIES = ("generated", "densenet", "inception", "shufflenet")
"""Of the test part."""


def optimal_rows(plans: Path) -> list[Row]:
    """The rows whose plan is proved optimal; of a graph one after another."""
    rows = [row for row in rows_in(plans) if row["proof"] == "optimal"]
    return sorted(rows, key=lambda row: (row["graph"], row["kb"]))


def samples_of(rows: Sequence[Row]) -> dict[str, list[Sample]]:
    """Samples by part, one for each row; those without an edge that may be cut are left out.

    Raises:
        ValueError: where a graph is not that of the row any more.
    """
    found: dict[str, list[Sample]] = {part: [] for part in PARTS}
    spec, graph = "", None
    for row in rows:
        if row["graph"] != spec:
            spec, graph = row["graph"], load(row["graph"])
        if graph is None or len(graph) != row["operators"]:
            raise ValueError(f"{spec}: not the graph that was planned; remove its rows")
        tensors = EdgeTensors.of(problem_of(graph, row["kb"]))
        if tensors.edges:
            y = torch.tensor(labels(tensors.edges, row["groups"]), dtype=torch.float32)
            found[row["part"]].append(Sample(spec, row["kb"], tensors, y))
    return found


def digest(plans: Path) -> str:
    """Of the labels that models are trained on."""
    used = [row for row in optimal_rows(plans) if row["part"] != "test"]
    told = "\n".join(f"{row['graph']} {row['kb']} {row['groups']}" for row in used)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _weights(folder: Path, seed: int) -> Path:
    return folder / f"gnn-{seed}.safetensors"


def train(folder: Path, epochs: int = 30) -> list[Row]:
    """Train all models on the ``plans.jsonl`` of a folder, write them there and score them.

    Returns:
        Rows of ``ranker``, ``seed``, ``part`` or family, and the scores of
        :func:`~.model.pooled`; of ``size`` and ``majority`` too.
    """
    plans = folder / "plans.jsonl"
    optimal = optimal_rows(plans)
    found = samples_of(optimal)
    about = {"model": MODEL_ID, "data": digest(plans), "epochs": str(epochs)}
    started = time.process_time()
    edges = fit_edges(found["train"])
    save_weights(folder / "edges.safetensors", edges.state_dict(), about)
    models: list[tuple[str, int, Model]] = [("edge", 0, edges)]
    rows: list[Row] = [
        {"asked": len(list(rows_in(plans))), "optimal": len(optimal)},
        {"trained": "edge", "seconds": time.process_time() - started},
    ]
    for seed in SEEDS:
        started = time.process_time()
        path = _weights(folder, seed)
        model, curve = fit(found["train"], found["validation"], seed, epochs)
        save_weights(path, model.state_dict(), about)
        models.append(("gnn", seed, model))
        seconds = time.process_time() - started
        rows.append({"trained": "gnn", "seed": seed, "seconds": seconds, "curve": curve})
        rows[-1]["torch"] = torch.__version__
        print(rows[-1], flush=True)
    rows += [
        {"part": part, "graphs": len({s.spec for s in samples}), "samples": len(samples)}
        for part, samples in found.items()
    ]
    for part, samples in _parts(found).items():
        for ranker, seed, model in models:
            rows.append({"ranker": ranker, "seed": seed, "on": part, **pooled(model, samples)})
        rows += _without_model(part, samples, _threshold(found["train"]))
    return rows


def _parts(found: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
    """The parts, and the families of the test part by the names of their graphs."""
    families: dict[str, list[Sample]] = {}
    for sample in found["test"]:
        families.setdefault(family(sample.spec), []).append(sample)
    return {part: samples for part, samples in {**found, **families}.items() if samples}


def family(spec: str) -> str:
    """What a network's name begins with; of test specs one of :data:`FAMILIES`."""
    if spec[0].isdigit():
        return "generated"
    name = spec.partition(":")[2] or spec
    return "inception" if name == "googlenet" else name.split("_")[0].rstrip("0123456789")


_TENSOR = EDGE_FEATURES.index("log_tensor")


def _sizes(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores by size, the smallest tensor first, and labels."""
    scores = torch.cat([-s.tensors.edge_attr[s.tensors.free, _TENSOR] for s in samples])
    return scores, torch.cat([s.y for s in samples])


def _threshold(samples: Sequence[Sample]) -> float:
    """The score by size that tells most edges of the samples right."""
    scores, y = _sizes(samples)
    order = torch.argsort(scores, descending=True)
    right = torch.cumsum(2 * y[order] - 1, 0)  # edges up to here called borders, against none
    return float(scores[order][int(right.argmax())])


def _without_model(part: str, samples: Sequence[Sample], threshold: float) -> list[Row]:
    scores, y = _sizes(samples)
    about = {"seed": 0, "on": part, "edges": len(y), "borders": float(y.mean())}
    accuracy = float(((scores >= threshold) == (y > 0.5)).float().mean())
    majority = max(about["borders"], 1 - about["borders"])
    return [
        {"ranker": "size", **about, "accuracy": accuracy, "auc": auc(scores, y)},
        {"ranker": "majority", **about, "accuracy": majority, "auc": 0.5},
    ]


def load_gnn(folder: Path, seed: int) -> BorderModel:
    """The trained GNN of a seed; raises ``WeightsError`` where it is missing or another's."""
    state, _ = load_weights(_weights(folder, seed), {"model": MODEL_ID})
    model = BorderModel()
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


def load_edges(folder: Path) -> EdgeModel:
    """The regression of the folder, as :func:`load_gnn`."""
    state, _ = load_weights(folder / "edges.safetensors", {"model": MODEL_ID})
    model = EdgeModel()
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()
