"""Orders of edges: what the searches are handed, and the plan that an order gives by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

from benchmarks.border_ranking.model import EdgeTensors, Model, border_logits
from benchmarks.border_ranking.train import load_edges, load_gnn
from torch_getfuse.partition.merging import path_around
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.search.edge_cuts import Edge
from torch_getfuse.partition.search.merge_resplit import regroup
from torch_getfuse.partition.search.recursive_split import (
    EdgeRanker,
    all_edges,
    group_edges,
    random_edges,
)
from torch_getfuse.partition.work import OutOfWork

SPLITTERS = ("all", "random", "edge", "gnn")
"""Rankers of the recursive split; ``edge`` is the regression."""

ORDERS = ("random", "size", "saved", "edge", "gnn")
"""Orders that a plan is built from; ``saved`` is none: the pair that saves most comes first."""


def scores_by(model: Model, problem: FusionProblem) -> dict[Edge, float]:
    """Per edge that may be cut, the logit of being a border; one pass over the whole graph."""
    tensors = EdgeTensors.of(problem)
    logits = border_logits(model, tensors).tolist()
    return dict(zip(tensors.edges, logits, strict=True))


class ScoreRanker:
    """The likeliest borders of a group: a share of its edges, at least one.

    Edges without a score (inside a block) come last. Ties go by position.
    """

    def __init__(self, problem: FusionProblem, scores: Mapping[Edge, float], share: float) -> None:
        self._graph = problem.graph
        self._scores = scores
        self._share = share

    def __call__(self, group: int) -> list[tuple[Edge, float]]:
        """As :class:`EdgeRanker`."""
        least = float("-inf")
        scored = [(edge, self._scores.get(edge, least)) for edge in group_edges(self._graph, group)]
        scored.sort(key=lambda entry: (-entry[1], entry[0]))
        return scored[: max(1, round(self._share * len(scored)))]


class Models:
    """The trained models of a folder, loaded before any clock runs."""

    def __init__(self, folder: Path, seeds: Sequence[int]) -> None:
        self._models: dict[tuple[str, int], Model] = {}
        for seed in seeds:
            self._models["gnn", seed] = load_gnn(folder, seed)
            self._models["edge", seed] = load_edges(folder)

    def ranker(self, name: str, problem: FusionProblem, seed: int, share: float) -> EdgeRanker:
        """One of :data:`SPLITTERS`; the features and the inference of a model are made here."""
        if name == "all":
            return all_edges(problem.graph)
        if name == "random":
            return random_edges(problem.graph, share, seed)
        return ScoreRanker(problem, scores_by(self._models[name, seed], problem), share)

    def order(self, name: str, problem: FusionProblem, seed: int) -> list[Edge]:
        """The edges that may be cut by one of :data:`ORDERS`, the likeliest border first."""
        if name in ("gnn", "edge"):
            scores = scores_by(self._models[name, seed], problem)
            return sorted(scores, key=lambda edge: (-scores[edge], edge))
        if name == "saved":
            return []
        edges = group_edges(problem.graph, problem.fusable)
        if name == "random":
            Random(seed).shuffle(edges)
            return edges
        graph = problem.graph
        return sorted(edges, key=lambda e: (graph.tensor_bytes[graph.ops[e[0]].writes], e))


def built(problem: FusionProblem, order: Sequence[Edge]) -> list[int]:
    """The legal plan that an order of edges gives without a search.

    The edges are gone through from the least likely border to the likeliest, and the groups at
    both ends of each become one where that is valid and closes no cycle: what is left cut are the
    likeliest borders, and those that earlier merges left no room for. Then any two neighbours that
    fit together are merged, the pair that saves most first. Where the work is out, the plan by
    then is returned.
    """
    home = {i: block for block in problem.blocks for i in bits(block)}
    work, valid = problem.evaluator.work, problem.evaluator.valid
    plan: list[int] = []
    try:
        for i, j in reversed(order):
            one, other = home[i], home[j]
            work.add(len(home) // 8)
            if one == other or not valid(one | other) or path_around(problem, home, one, other):
                continue
            for k in bits(one | other):
                home[k] = one | other
        plan = list(dict.fromkeys(home.values()))
        for better in regroup(problem, plan, lambda union: [union] if valid(union) else None):
            plan = list(better)
    except OutOfWork:
        pass  # what is there by then is a plan
    return plan or list(dict.fromkeys(home.values()))
