"""Which edges of an invalid fusion group are to blame: six explainers behind one interface.

:func:`make_ranker` gives a function from a group to its *solution edges*, best first. Four ask
the validity predictor: GNNExplainer and PGExplainer of torch_geometric, our RG-Explainer, and
saliency; ``"random"`` and ``"all"`` are the controls. All explain the same question, "why is this
group invalid?": the target is class 0, for a group is only ever explained once the cost model
has found it invalid.

Scores are per directed edge, the sum over both directions of message passing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch_geometric.explain import Explainer, GNNExplainer, PGExplainer
from torch_geometric.explain.config import ModelConfig

from torch_getfuse.errors import OptionError, nearest
from torch_getfuse.explain.features import FeatureTable, GroupTensors, directed_scores
from torch_getfuse.explain.rg_explainer import RGExplainer
from torch_getfuse.explain.validity import ValidityModel, load_model, model_fingerprint
from torch_getfuse.explain.weights_io import load_weights, save_weights, weights_path
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cuts import Edge

EXPLAINERS = ("rgexplainer", "gnnexplainer", "pgexplainer", "saliency", "random", "all")

INVALID = 0  # the class of groups that do not fit

GNN_EPOCHS = 25
_GNN_RATE = 0.1  # few epochs, so large steps; PyG's 0.01 needs hundreds

EdgeScorer = Callable[[GroupTensors, int], torch.Tensor]
"""Scores ``(E,)`` of a group's directed edges from its tensors and a seed."""


class ExplanationRanker:
    """An explainer as the recursive split wants it: group -> solution edges, best first.

    Args:
        name: of the explainer, for reports.
        table: features of the graph's operators.
        buffer_bytes: the on-chip buffer.
        scorer: the explainer itself.
        edges: solution edges at most; ``None`` for no limit.
        threshold: least score of a solution edge, as a share of the best one's.
        seed: explanations depend on it and on the group only, not on what was asked before.
    """

    def __init__(
        self,
        name: str,
        table: FeatureTable,
        buffer_bytes: int,
        scorer: EdgeScorer,
        edges: int | None = 6,
        threshold: float = 0.01,
        seed: int = 0,
    ) -> None:
        self.name = name
        self._table = table
        self._buffer_bytes = buffer_bytes
        self._scorer = scorer
        self._edges = edges
        self._threshold = threshold
        self._seed = seed

    def scores(self, group: int) -> dict[Edge, float]:
        """Every directed edge of a group, as (producer position, consumer position), scored."""
        tensors = self._table.group(group, self._buffer_bytes)
        if not tensors.edges:
            return {}
        found = self._scorer(tensors, Random(f"{self._seed}-{group}").getrandbits(62))
        return dict(zip(tensors.edges, found.tolist(), strict=True))

    def __call__(self, group: int) -> list[tuple[Edge, float]]:
        """Solution edges with their scores, best first; at least one where there is an edge."""
        # Ties by position, so that the order does not hang on how scores were rounded.
        ranked = sorted(self.scores(group).items(), key=lambda item: (-item[1], item[0]))
        if not ranked:
            return []
        least = self._threshold * ranked[0][1]
        kept = [item for item in ranked[: self._edges] if item[1] > least]
        return kept or ranked[:1]


def make_ranker(
    name: str,
    graph: OpGraph,
    scheme: str,
    buffer_bytes: int,
    *,
    granularity: str = "line",
    activation_bytes: int = 1,
    weight_bytes: int = 1,
    edges: int = 6,
    seed: int = 0,
    model: ValidityModel | None = None,
    folder: Path | None = None,
) -> ExplanationRanker:
    """The ranker of a named explainer for one graph and one buffer.

    Args:
        name: one of :data:`EXPLAINERS`; ``"all"`` gives every edge, whatever ``edges`` says.
        graph: the operator graph.
        scheme, granularity: the cost model that the explained predictor mimics.
        buffer_bytes: the on-chip buffer.
        activation_bytes, weight_bytes: element widths in bytes.
        edges: solution edges at most.
        seed: same seed and group, same edges.
        model: the validity model; ``None`` for the one in the package.
        folder: where the weights lie; ``None`` for the package.

    Raises:
        OptionError: for an unknown name.
        WeightsError: where an explainer's weights are missing or made for another model.
    """
    if name not in EXPLAINERS:
        raise OptionError(
            f"explainer={name!r} is not one of {', '.join(map(repr, EXPLAINERS))}"
            f"{nearest(name, EXPLAINERS)}"
        )
    table = FeatureTable(graph, granularity, activation_bytes, weight_bytes)
    scorer: EdgeScorer
    if name == "random":
        scorer = random_scores
    elif name == "all":
        scorer = _even_scores
    else:
        model = model or _shipped(scheme, granularity, folder)
        scorer = _make_scorer(name, model, scheme, granularity, folder)
    limit = None if name == "all" else edges
    return ExplanationRanker(name, table, buffer_bytes, scorer, limit, seed=seed)


def _make_scorer(
    name: str, model: ValidityModel, scheme: str, granularity: str, folder: Path | None
) -> EdgeScorer:
    if name == "saliency":
        return SaliencyScorer(model)
    if name == "gnnexplainer":
        return AlgorithmScorer(model, GNNExplainer(epochs=GNN_EPOCHS, lr=_GNN_RATE))
    if name == "pgexplainer":
        state = _explainer_weights("pg", model, scheme, granularity, folder)
        # Trained already: with 0 epochs PyG asks for no training before it explains.
        pg = make_pg(epochs=0)
        pg.mlp.load_state_dict(state)
        return AlgorithmScorer(model, pg)
    state = _explainer_weights("rg", model, scheme, granularity, folder)
    rg = RGExplainer()
    rg.load_state_dict(state)
    return AlgorithmScorer(model, rg)


@lru_cache(maxsize=8)
def _shipped(scheme: str, granularity: str, folder: Path | None) -> ValidityModel:
    path = weights_path("validity", scheme, granularity, folder)
    # Explanations differentiate by masks; gradients of the weights would only cost time.
    return load_model(scheme, granularity, path).requires_grad_(False)


class SaliencyScorer:
    """How much the invalidity of a group hangs on each edge, by one backward pass.

    The score of an edge is the absolute gradient of the validity logit with respect to a weight
    of one on its messages, ``|d logit / d w_ij| + |d logit / d w_ji|``.
    """

    def __init__(self, model: ValidityModel) -> None:
        self._model = model

    def __call__(self, tensors: GroupTensors, seed: int) -> torch.Tensor:
        return directed_scores(self.gradient(tensors).abs())

    def gradient(self, tensors: GroupTensors) -> torch.Tensor:
        """``(2 * E,)`` derivative of the validity logit by each edge weight, at one."""
        weights = torch.ones(tensors.edge_index.shape[1], requires_grad=True)
        logit = self._model(tensors.x, tensors.edge_index, edge_weight=weights)
        (gradient,) = torch.autograd.grad(logit.sum(), weights)
        return gradient


class AlgorithmScorer:
    """An ``ExplainerAlgorithm`` of torch_geometric, run through its ``Explainer``."""

    def __init__(self, model: ValidityModel, algorithm: Any) -> None:
        self._explainer = make_explainer(model, algorithm)

    def __call__(self, tensors: GroupTensors, seed: int) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            explanation = self._explainer(
                tensors.x, tensors.edge_index, target=torch.tensor([INVALID])
            )
        mask: torch.Tensor = explanation.edge_mask
        return directed_scores(mask.detach())


def random_scores(tensors: GroupTensors, seed: int) -> torch.Tensor:
    """The control: scores that know nothing."""
    return torch.rand(len(tensors.edges), generator=torch.Generator().manual_seed(seed))


def _even_scores(tensors: GroupTensors, seed: int) -> torch.Tensor:
    return torch.ones(len(tensors.edges))


def make_explainer(model: ValidityModel, algorithm: Any) -> Any:
    """torch_geometric's ``Explainer`` around a validity model: why is this graph of that class?"""
    return Explainer(
        model=model,
        algorithm=algorithm,
        explanation_type="phenomenon",
        edge_mask_type="object",
        model_config=ModelConfig(
            mode="binary_classification", task_level="graph", return_type="raw"
        ),
    )


def make_pg(epochs: int, rate: float = 0.003, **coefficients: float) -> Any:
    """A PGExplainer whose coefficients are its own: PyG's are shared by all instances."""
    algorithm = PGExplainer(epochs=epochs, lr=rate)
    algorithm.coeffs = {**PGExplainer.coeffs, **coefficients}
    return algorithm


def save_explainer(
    kind: str,
    state: Mapping[str, torch.Tensor],
    model: ValidityModel,
    scheme: str,
    granularity: str,
    folder: Path | None = None,
) -> Path:
    """Write the weights of a trained explainer (``"pg"``, ``"rg"``) beside those of its model."""
    path = weights_path(kind, scheme, granularity, folder)
    save_weights(path, state, {"model": kind, "validity": model_fingerprint(model)})
    return path


def _explainer_weights(
    kind: str, model: ValidityModel, scheme: str, granularity: str, folder: Path | None
) -> dict[str, torch.Tensor]:
    path = weights_path(kind, scheme, granularity, folder)
    state, _ = load_weights(path, {"model": kind, "validity": model_fingerprint(model)})
    return state
