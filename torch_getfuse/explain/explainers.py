"""Which edges make a fusion group invalid: six explainers behind one interface.

:func:`make_ranker` returns a function from a group to its *solution edges*, best first. Four
explain the validity predictor: GNNExplainer and PGExplainer of torch_geometric, our RG-Explainer,
and saliency; ``"random"`` and ``"all"`` are the baselines of
:mod:`torch_getfuse.partition.search.recursive_split`. All answer the same question, "why is this
group invalid?": the target is class 0, because a group is explained only after the cost model has
found it invalid.

Scores are per directed edge, summed over both directions of message passing. Solution edges are
those above a threshold (docs/method.md, section 6). The ranges of scores differ between explainers,
so the scores of a group are first scaled to 0 for its least and 1 for its best edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import torch

from torch_getfuse import plugins
from torch_getfuse.errors import OptionError, nearest
from torch_getfuse.explain.features import FeatureTable, GroupTensors, directed_scores
from torch_getfuse.explain.geometric import (
    Explainer,
    GNNExplainer,
    ModelConfig,
    PGExplainer,
    get_embeddings,
)
from torch_getfuse.explain.rg_explainer import RGExplainer
from torch_getfuse.explain.trained_weights import load_weights, save_weights, weights_path
from torch_getfuse.explain.validity import ValidityModel, load_model, model_fingerprint
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.search.edge_cuts import Edge
from torch_getfuse.partition.search.recursive_split import EdgeRanker, all_edges, random_edges
from torch_getfuse.widths import Width

EXPLAINERS = plugins.EXPLAINERS.built_in

INVALID = 0  # the class of groups that do not fit

THRESHOLDS: Mapping[str, float] = {
    "rgexplainer": 0.3,
    "gnnexplainer": 0.2,
    "pgexplainer": 0.15,
    "saliency": 0.05,
}
"""Threshold of solution edges, between the least (0) and the best (1) edge of the group.

Chosen on the networks of the training data by ``benchmarks/explainers.py thresholds``: the largest
value at which the rectify rate meets the project's target (RG 95, GNNE 90, PG 85 %; saliency as
GNNE) over all of them and on MobileNetV2 alone, under both searches.
"""

GNN_EPOCHS = 10
_GNN_RATE = 0.2  # few epochs need large steps; with PyG's 0.01 it takes hundreds of epochs

EdgeScorer = Callable[[GroupTensors, int], torch.Tensor]
"""Scores ``(E,)`` of a group's directed edges from its tensors and a seed."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread.

    A group is a tensor of a few hundred rows at most. On two busy cores, synchronisation of
    threads made GNNExplainer take 39 s instead of 0.1 s.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ExplanationRanker:
    """An explainer as an :class:`EdgeRanker`: group -> solution edges, best first.

    Args:
        name: name of the explainer, for reports.
        table: features of the graph's operators.
        buffer_bytes: the on-chip buffer.
        scorer: the explainer itself.
        threshold: of solution edges, between 0 for the least and 1 for the best edge of a group.
        seed: explanations depend only on it and on the group, not on earlier calls.
    """

    def __init__(
        self,
        name: str,
        table: FeatureTable,
        buffer_bytes: int,
        scorer: EdgeScorer,
        threshold: float,
        seed: int = 0,
    ) -> None:
        self.name = name
        self._table = table
        self._buffer_bytes = buffer_bytes
        self._scorer = scorer
        self._threshold = threshold
        self._seed = seed

    def scores(self, group: int) -> dict[Edge, float]:
        """Scores of all directed edges of a group, as (producer position, consumer position).

        Between 0 for the least and 1 for the best; all 1 if they are equal.
        """
        tensors = self._table.group(group, self._buffer_bytes)
        if not tensors.edges:
            return {}
        with one_thread():
            raw = self._scorer(tensors, Random(f"{self._seed}-{group}").getrandbits(62))
        span = raw.max() - raw.min()
        scaled = (raw - raw.min()) / span if span > 0 else torch.ones_like(raw)
        return dict(zip(tensors.edges, scaled.tolist(), strict=True))

    def __call__(self, group: int) -> list[tuple[Edge, float]]:
        """Solution edges with their scores, best first; at least one if the group has an edge."""
        # Ties go by position, so that the order of equal scores is deterministic.
        ranked = sorted(self.scores(group).items(), key=lambda item: (-item[1], item[0]))
        kept = [item for item in ranked if item[1] > self._threshold]
        return kept or ranked[:1]


def make_ranker(
    name: str,
    graph: OpGraph,
    scheme: str,
    buffer_bytes: int,
    *,
    granularity: str = "line",
    activation_bytes: Width | None = 1,
    weight_bytes: Width | None = 1,
    threshold: float | None = None,
    seed: int = 0,
    model: ValidityModel | None = None,
    folder: Path | None = None,
) -> EdgeRanker:
    """The ranker of a named explainer for one graph and one buffer.

    Args:
        name: one of :data:`EXPLAINERS`.
        graph: the operator graph.
        scheme, granularity: the cost model that the explained predictor was trained on.
        buffer_bytes: the on-chip buffer.
        activation_bytes, weight_bytes: element widths in bytes; ``None``: as stored.
        threshold: of solution edges; ``None`` for the explainer's default. The baselines have
            none.
        seed: the same seed and group give the same edges.
        model: the validity model; ``None`` for the one in the package.
        folder: folder of the weights; ``None`` for the package's.

    Raises:
        OptionError: for an unknown name.
        WeightsError: if an explainer's weights are missing or made for another model.
    """
    if name not in EXPLAINERS:
        raise OptionError(
            f"explainer={name!r} is not one of {', '.join(map(repr, EXPLAINERS))}"
            f"{nearest(name, EXPLAINERS)}"
        )
    if name == "random":
        return random_edges(graph, seed=seed)
    if name == "all":
        return all_edges(graph)
    model = model or _shipped(scheme, granularity, folder)
    return ExplanationRanker(
        name,
        FeatureTable(graph, granularity, activation_bytes, weight_bytes),
        buffer_bytes,
        _make_scorer(name, model, scheme, granularity, folder),
        THRESHOLDS[name] if threshold is None else threshold,
        seed,
    )


def _make_scorer(
    name: str, model: ValidityModel, scheme: str, granularity: str, folder: Path | None
) -> EdgeScorer:
    if name == "saliency":
        return SaliencyScorer(model)
    if name == "gnnexplainer":
        return AlgorithmScorer(model, GNNExplainer(epochs=GNN_EPOCHS, lr=_GNN_RATE))
    if name == "pgexplainer":
        state = _explainer_weights("pg", model, scheme, granularity, folder)
        # Already trained: with 0 epochs PyG does not demand training before it explains.
        pg = make_pg(epochs=0)
        pg.mlp.load_state_dict(state)
        return PGScorer(model, pg)
    state = _explainer_weights("rg", model, scheme, granularity, folder)
    rg = RGExplainer()
    rg.load_state_dict(state)
    return AlgorithmScorer(model, rg)


@lru_cache(maxsize=8)
def _shipped(scheme: str, granularity: str, folder: Path | None) -> ValidityModel:
    path = weights_path("validity", scheme, granularity, folder)
    # Explanations need gradients of masks only; gradients of the weights would only cost time.
    return load_model(scheme, granularity, path).requires_grad_(False)


@dataclass(frozen=True)
class LearntExplainer:
    """Value of ``explainer=``: a factory of the ranker of a problem.

    Attributes:
        name: name of the explainer in options.
        steps: work counted per explanation, in addition to that by the size of the group.
        asks_predictor: whether it needs the validity predictor, which not every scheme has.
    """

    name: str
    steps: int
    asks_predictor: ClassVar[bool] = True

    def __call__(self, problem: FusionProblem, seed: int) -> EdgeRanker:
        """The ranker of a problem.

        Raises:
            OptionError: if the scheme has no validity predictor.
            WeightsError: if weights are missing or made for another model.
        """
        scheme = problem.evaluator.scheme
        if not scheme.has_predictor:
            raise OptionError(
                f"explainer={self.name!r} asks a validity predictor, and scheme {scheme.name!r} "
                "has none; use explainer='all', 'random', None or an edge ranker of your own"
            )
        return make_ranker(
            self.name,
            problem.graph,
            scheme.name,
            problem.evaluator.buffer_bytes,
            granularity=scheme.granularity,
            activation_bytes=scheme.activation_bytes,
            weight_bytes=scheme.weight_bytes,
            seed=seed,
        )


SALIENCY = LearntExplainer("saliency", 10_000)
PG = LearntExplainer("pgexplainer", 10_000)
RG = LearntExplainer("rgexplainer", 50_000)
GNN = LearntExplainer("gnnexplainer", 500_000)


class SaliencyScorer:
    """How sensitive the validity of a group is to each edge, by one backward pass.

    The score of an edge is the absolute gradient of the validity logit with respect to the weight
    of its messages, at one: ``|d logit / d w_ij| + |d logit / d w_ji|``.
    """

    def __init__(self, model: ValidityModel) -> None:
        self._model = model

    def __call__(self, tensors: GroupTensors, seed: int) -> torch.Tensor:
        return directed_scores(self.gradient(tensors).abs())

    def gradient(self, tensors: GroupTensors) -> torch.Tensor:
        """``(2 * E,)`` derivatives of the validity logit by the edge weights, at one."""
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


class PGScorer:
    """PGExplainer, scored by the logits of its mask.

    The mask is the sigmoid of its MLP on the embeddings of an edge's two ends, and most of it
    saturates at exactly 1.0; the logits still rank such edges.
    """

    def __init__(self, model: ValidityModel, algorithm: PGExplainer) -> None:
        self._model = model
        self._mlp = algorithm.mlp

    @torch.no_grad()
    def __call__(self, tensors: GroupTensors, seed: int) -> torch.Tensor:
        embeddings = get_embeddings(self._model, tensors.x, tensors.edge_index)[-1]
        first, second = tensors.edge_index
        logits: torch.Tensor = self._mlp(torch.cat([embeddings[first], embeddings[second]], dim=1))
        return directed_scores(logits.view(-1))


def make_explainer(model: ValidityModel, algorithm: Any) -> Any:
    """torch_geometric's ``Explainer`` of a validity model: why does this graph have that class?"""
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
    """A PGExplainer with coefficients per instance: PyG shares them between all instances."""
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
    """Write the weights of a trained explainer (``"pg"``, ``"rg"``) next to those of its model."""
    path = weights_path(kind, scheme, granularity, folder)
    save_weights(path, state, {"model": kind, "validity": model_fingerprint(model)})
    return path


def _explainer_weights(
    kind: str, model: ValidityModel, scheme: str, granularity: str, folder: Path | None
) -> dict[str, torch.Tensor]:
    path = weights_path(kind, scheme, granularity, folder)
    state, _ = load_weights(path, {"model": kind, "validity": model_fingerprint(model)})
    return state
