"""An explainer: a group that does not fit is cut where the smallest tensors cross."""

from __future__ import annotations

from torch_getfuse import FusionProblem, bits


class SmallestTensor:
    """An :class:`torch_getfuse.EdgeRanker`, made as ``SmallestTensor(problem, seed)``."""

    name = "smallest_tensor"
    steps = 0  # of work that an answer counts, beside what counts by size

    def __init__(self, problem: FusionProblem, seed: int) -> None:
        self._graph = problem.graph

    def __call__(self, group: int) -> list[tuple[tuple[int, int], float]]:
        """The half of the group's edges with the smallest tensors, best first."""
        graph = self._graph
        sizes = {
            (i, j): graph.tensors[graph.ops[i].writes].elements
            for i in bits(group)
            for j in bits(graph.readers[i] & group)
        }
        ranked = sorted(sizes, key=lambda edge: (sizes[edge], edge))
        return [(edge, 1 / sizes[edge]) for edge in ranked[: len(ranked) // 2 + 1]]
