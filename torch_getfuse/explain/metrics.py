"""Quality of explanations: fidelity, sparsity, time.

The rectify rate, the share of invalid groups that the cuts of their own explanation split into
valid ones, is counted by the split itself: ``RecursiveSplit.rectified / RecursiveSplit.attempts``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.search.edge_cuts import Edge, edge_cuts
from torch_getfuse.partition.search.recursive_split import EdgeRanker, group_edges


@dataclass(frozen=True)
class ExplanationQuality:
    """Means over invalid groups.

    Attributes:
        groups: number of groups explained.
        fidelity: share of groups whose parts are all valid once they are split at every solution
            edge.
        sparsity: share of the edges of a group that are *not* solution edges.
        seconds: time per explanation.
    """

    groups: int
    fidelity: float
    sparsity: float
    seconds: float


def measure(
    ranker: EdgeRanker, problem: FusionProblem, groups: Sequence[int]
) -> ExplanationQuality:
    """Explain and evaluate every group of at least two operators.

    Args:
        ranker: the explainer.
        problem: cost model, buffer and graph.
        groups: masks of connected invalid groups.

    Raises:
        ValueError: if no group has an edge.
    """
    judged = [group for group in groups if group & (group - 1)]
    if not judged:
        raise ValueError("no group with an edge to explain")
    solved = 0
    spared = 0.0
    seconds = 0.0
    for group in judged:
        started = time.perf_counter()
        edges = [edge for edge, _ in ranker(group)]
        seconds += time.perf_counter() - started
        parts = split_at(group, edges, problem)
        solved += all(map(problem.evaluator.valid, parts))
        spared += 1 - len(edges) / len(group_edges(problem.graph, group))
    count = len(judged)
    return ExplanationQuality(count, solved / count, spared / count, seconds / count)


def split_at(group: int, edges: Sequence[Edge], problem: FusionProblem) -> list[int]:
    """The connected parts of a group after cutting ``edges``.

    An edge is cut at its producer's topological number, together with all skips across it.
    """
    parts = [group]
    for i, j in edges:
        for part in parts:
            if part >> i & part >> j & 1:
                upper = edge_cuts(part, (i, j), problem.above, problem.below)[0]
                parts.remove(part)
                parts += problem.parts(upper) + problem.parts(part & ~upper)
                break
    return parts
