"""What is learnt of borders: a GNN over the operator graph, and a logistic regression beside it.

Both give each edge the logit of being a border of the optimum. The GNN passes messages along the
edges and against them, so that it sees the operators within :data:`LAYERS` steps; the regression
sees the features of the edge alone (:data:`EDGE_FEATURES`). All sizes are shares of the buffer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch_geometric.nn import GINEConv

from benchmarks.border_ranking.data import free_edges
from torch_getfuse.explain.features import FEATURES, FEATURES_ID, FeatureTable
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.search.edge_cuts import Edge
from torch_getfuse.partition.search.recursive_split import group_edges

HIDDEN, LAYERS = 48, 8
EDGE_FEATURES = (
    *("log_tensor", "tensor", "readers", "length", "between", "output"),
    *("weights_producer", "weights_consumer", "alone_producer", "alone_consumer"),
)
MODEL_ID = hashlib.sha256(f"{FEATURES_ID} {EDGE_FEATURES} {HIDDEN} {LAYERS}".encode()).hexdigest()[
    :16
]
"""Weights of another model are refused by it."""

_FLOOR, _CEILING = 2.0**-16, 4.0  # of a size, as a share of the buffer


@dataclass(frozen=True, slots=True)
class EdgeTensors:
    """The fusable part of a graph under a buffer, as the input of both models.

    Attributes:
        x: ``(n, FEATURES)`` fusable operators in topological order.
        edge_index: ``(2, E)`` rows of producer and consumer of every edge between them.
        edge_attr: ``(E, len(EDGE_FEATURES))``.
        free: ``(F,)`` which of the E edges a plan may cut (:func:`~.data.free_edges`).
        edges: these F edges as positions in the graph.
    """

    x: torch.Tensor
    edge_index: torch.Tensor
    edge_attr: torch.Tensor
    free: torch.Tensor
    edges: tuple[Edge, ...]

    @classmethod
    def of(cls, problem: FusionProblem) -> EdgeTensors:
        """The tensors of a problem, one byte per element."""
        table = FeatureTable(problem.graph, "line", 1, 1)
        buffer = problem.evaluator.buffer_bytes
        group = table.group(problem.fusable, buffer)
        row = {position: k for k, position in enumerate(group.operators)}
        edges = group_edges(problem.graph, problem.fusable)
        known = {edge: k for k, edge in enumerate(edges)}
        free = free_edges(problem)
        ends = [[row[i] for i, _ in edges], [row[j] for _, j in edges]]
        return cls(
            group.x,
            torch.tensor(ends, dtype=torch.int64),
            torch.from_numpy(_edge_features(problem, table, edges)),
            torch.tensor([known[edge] for edge in free], dtype=torch.int64),
            tuple(free),
        )


def _edge_features(
    problem: FusionProblem, table: FeatureTable, edges: Sequence[Edge]
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    graph, buffer = problem.graph, problem.evaluator.buffer_bytes
    weights = table.alone[:, 1] - table.alone[:, 0]
    rows = np.zeros((len(edges), len(EDGE_FEATURES)), np.float32)
    for k, (i, j) in enumerate(edges):
        name = graph.ops[i].writes
        share = graph.tensor_bytes[name] / buffer
        between = (problem.below[i] & problem.above[j]).bit_count()
        sizes = (weights[i], weights[j], table.alone[i, 1], table.alone[j, 1])
        rows[k] = [
            np.log2(share + _FLOOR) / 8,
            min(share, _CEILING),
            np.log2(graph.readers[i].bit_count()),
            np.log2(j - i) / 4,
            np.log2(1 + between) / 4,
            name in graph.outputs,
            *(min(size / buffer, _CEILING) for size in sizes),
        ]
    return rows


class BorderModel(nn.Module):
    """The GNN: residual GINE layers (Hu et al., ICLR 2020) in both directions, and an edge head.

    Args:
        hidden: width of the embeddings.
        layers: message passing steps.
    """

    def __init__(self, hidden: int = HIDDEN, layers: int = LAYERS) -> None:
        super().__init__()
        width = len(EDGE_FEATURES)
        self.enter = nn.Linear(FEATURES, hidden)
        self.down = nn.ModuleList(
            GINEConv(nn.Linear(hidden, hidden), edge_dim=width) for _ in range(layers)
        )
        self.up = nn.ModuleList(
            GINEConv(nn.Linear(hidden, hidden), edge_dim=width) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(layers))
        self.head = nn.Sequential(
            nn.Linear(2 * hidden + width, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(
        self, x: torch.Tensor, edge_index: torch.Tensor, edge_attr: torch.Tensor
    ) -> torch.Tensor:
        """``(E,)`` logits, positive for a border; arguments as in :class:`EdgeTensors`."""
        h = self.enter(x).relu()
        back = edge_index.flip(0)
        for down, up, norm in zip(self.down, self.up, self.norms, strict=True):
            h = h + norm(down(h, edge_index, edge_attr) + up(h, back, edge_attr)).relu()
        ends = torch.cat([h[edge_index[0]], h[edge_index[1]], edge_attr], dim=1)
        logits: torch.Tensor = self.head(ends).squeeze(-1)
        return logits


class EdgeModel(nn.Module):
    """The baseline: logistic regression on the features of the edge alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(len(EDGE_FEATURES), 1)

    def forward(
        self, x: torch.Tensor, edge_index: torch.Tensor, edge_attr: torch.Tensor
    ) -> torch.Tensor:
        """As :meth:`BorderModel.forward`."""
        logits: torch.Tensor = self.head(edge_attr).squeeze(-1)
        return logits


Model = BorderModel | EdgeModel


@torch.no_grad()
def border_logits(model: Model, tensors: EdgeTensors) -> torch.Tensor:
    """``(F,)`` logits of the free edges."""
    return model(tensors.x, tensors.edge_index, tensors.edge_attr)[tensors.free]


@dataclass(frozen=True, slots=True)
class Sample:
    """A graph under a buffer with the ``(F,)`` float labels of its free edges."""

    spec: str
    kb: int
    tensors: EdgeTensors
    y: torch.Tensor


def auc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Area under the ROC curve: how often a border scores above another edge, ties by half.

    NaN where one of both classes is absent.
    """
    _, where, counts = np.unique(scores.numpy(), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[where]
    positive = labels.numpy() > 0.5
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return float("nan")
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def fit_edges(samples: Sequence[Sample]) -> EdgeModel:
    """The regression of all edges of the samples; draws nothing."""
    x = torch.cat([s.tensors.edge_attr[s.tensors.free] for s in samples])
    y = torch.cat([s.y for s in samples])
    model = EdgeModel()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = model.head(x).squeeze(-1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return model.requires_grad_(False).eval()


def fit(
    train: Sequence[Sample], validation: Sequence[Sample], seed: int, epochs: int = 30
) -> tuple[BorderModel, list[float]]:
    """The GNN with the best area under the curve on the validation part, and that of each epoch."""
    torch.manual_seed(seed)
    model = BorderModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-3)
    steps = epochs * -(-len(train) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    best: Mapping[str, torch.Tensor] = {}
    curve: list[float] = []
    for epoch in range(epochs):
        model.train()
        for batch in _batches(train, np.random.default_rng((seed, epoch))):
            optimizer.zero_grad()
            x, edge_index, edge_attr, free, y = _joined(batch)
            logits = model(x, edge_index, edge_attr)[free]
            nn.functional.binary_cross_entropy_with_logits(logits, y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        curve.append(pooled(model.eval(), validation)["auc"])
        if curve[-1] == max(curve):
            best = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best)
    return model.requires_grad_(False).eval(), curve


def pooled(model: Model, samples: Sequence[Sample]) -> dict[str, float]:
    """Over all free edges of the samples: their number, share of borders, accuracy, area."""
    logits = torch.cat([border_logits(model, sample.tensors) for sample in samples])
    y = torch.cat([sample.y for sample in samples])
    return {
        "edges": len(y),
        "borders": float(y.mean()),
        "accuracy": float(((logits > 0) == (y > 0.5)).float().mean()),
        "auc": auc(logits, y),
    }


_BATCH = 12


def _batches(samples: Sequence[Sample], rng: np.random.Generator) -> Iterator[list[Sample]]:
    order = rng.permutation(len(samples))
    for first in range(0, len(order), _BATCH):
        yield [samples[k] for k in order[first : first + _BATCH]]


def _joined(samples: Sequence[Sample]) -> tuple[torch.Tensor, ...]:
    """Several graphs as one that is not connected."""
    nodes = np.cumsum([0, *(len(s.tensors.x) for s in samples)])
    edges = np.cumsum([0, *(len(s.tensors.edge_attr) for s in samples)])
    return (
        torch.cat([s.tensors.x for s in samples]),
        torch.cat([s.tensors.edge_index + int(n) for s, n in zip(samples, nodes)], dim=1),
        torch.cat([s.tensors.edge_attr for s in samples]),
        torch.cat([s.tensors.free + int(n) for s, n in zip(samples, edges)]),
        torch.cat([s.y for s in samples]),
    )
