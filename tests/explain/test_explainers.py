"""Six explainers behind one interface."""

from __future__ import annotations

from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.graphs import Builder
from torch_getfuse.errors import OptionError
from torch_getfuse.explain import metrics
from torch_getfuse.explain.explainers import (
    EXPLAINERS,
    INVALID,
    ExplanationRanker,
    PGScorer,
    SaliencyScorer,
    make_explainer,
    make_pg,
    make_ranker,
    save_explainer,
)
from torch_getfuse.explain.features import FeatureTable, GroupTensors, directed_scores
from torch_getfuse.explain.metrics import measure, split_at
from torch_getfuse.explain.rg_explainer import RGExplainer
from torch_getfuse.explain.trained_weights import WeightsError
from torch_getfuse.explain.validity import ValidityModel
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.search.edge_cuts import Edge
from torch_getfuse.partition.search.recursive_split import (
    RANDOM_SHARE,
    EdgeRanker,
    RecursiveSplit,
    group_edges,
)

BUFFER = 16_000


def blocks(count: int = 3) -> OpGraph:
    """Inverted residuals: chains with a skip over each."""
    build = Builder()
    x = build.conv(build.input((1, 3, 32, 32)), 8, kernel=3, stride=2)
    for _ in range(count):
        a = build.act(build.conv(x, 48))
        b = build.act(build.conv(a, 48, kernel=3, depthwise=True))
        x = build.add(build.conv(b, 8), x)
    return build.graph()


@pytest.fixture(scope="module")
def model() -> ValidityModel:
    torch.manual_seed(0)
    return ValidityModel().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(model: ValidityModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained explainers that belong to ``model``."""
    found = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    pg = make_pg(epochs=0)
    pg.mlp(torch.zeros(1, 256))
    save_explainer("pg", pg.mlp.state_dict(), model, "lbdf", "line", found)
    save_explainer("rg", RGExplainer().state_dict(), model, "lbdf", "line", found)
    return found


def ranker(
    name: str,
    graph: OpGraph,
    model: ValidityModel,
    folder: Path,
    threshold: float | None = None,
    seed: int = 0,
) -> EdgeRanker:
    return make_ranker(
        name, graph, "lbdf", BUFFER, threshold=threshold, seed=seed, model=model, folder=folder
    )


@pytest.mark.parametrize("name", EXPLAINERS)
def test_solution_edges_lie_in_the_group(name: str, model: ValidityModel, folder: Path) -> None:
    graph = blocks()
    rank = ranker(name, graph, model, folder)
    whole = (1 << len(graph)) - 1
    for group in (whole, 0b1111110, 0b110, 0b1111111 << 6):
        found = rank(group)
        edges = [edge for edge, _ in found]
        assert 1 <= len(edges) == len(set(edges))
        assert set(edges) <= set(group_edges(graph, group))
        assert [s for _, s in found] == sorted((s for _, s in found), reverse=True)
        if name == "all":
            assert set(edges) == set(group_edges(graph, group))
        if name == "random":
            assert len(edges) == max(1, round(RANDOM_SHARE * len(group_edges(graph, group))))
    assert rank(0b1) == []


@pytest.mark.parametrize("name", EXPLAINERS)
def test_the_same_answer_whatever_was_asked_before(
    name: str, model: ValidityModel, folder: Path
) -> None:
    graph = blocks()
    group = 0b1111111111110
    torch.manual_seed(5)
    first = ranker(name, graph, model, folder)
    answer = first(group)
    state = torch.random.get_rng_state()
    first(0b11111110)
    assert first(group) == answer
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's randomness is left alone"
    torch.manual_seed(6)
    assert ranker(name, graph, model, folder)(group) == answer


def test_random_edges_follow_the_seed(model: ValidityModel, folder: Path) -> None:
    graph = blocks()
    group = (1 << len(graph)) - 1
    found = {tuple(ranker("random", graph, model, folder, seed=s)(group)) for s in range(5)}
    assert len(found) == 5


@pytest.mark.parametrize("name", ["rgexplainer", "gnnexplainer", "pgexplainer", "saliency"])
def test_a_higher_threshold_leaves_fewer_edges(
    name: str, model: ValidityModel, folder: Path
) -> None:
    graph = blocks()
    group = (1 << len(graph)) - 2
    kept = [ranker(name, graph, model, folder, t)(group) for t in (0.0, 0.3, 0.6, 0.99, 1.0)]
    for more, fewer in pairwise(kept):
        assert fewer == more[: len(fewer)]
    assert len(kept[0]) > len(kept[2]) > len(kept[-1]) == 1
    assert kept[0][0][1] == 1.0
    assert [edge for edge, score in kept[0] if score > 0.6] == [edge for edge, _ in kept[2]]


def test_scores_run_from_least_to_best() -> None:
    graph = blocks()
    table = FeatureTable(graph)
    group = 0b1111110
    edges = table.group(group, 1).edges

    def rank(*scores: float, threshold: float = 0.5) -> list[tuple[Edge, float]]:
        found = torch.full((len(edges),), 3.0)
        found[: len(scores)] = torch.tensor(scores)
        return ExplanationRanker("x", table, BUFFER, lambda t, s: found, threshold)(group)

    assert rank(4.0, 5.0, 3.5) == [(edges[1], 1.0)]
    assert rank(4.5, 5.0, 3.5) == [(edges[1], 1.0), (edges[0], 0.75)]
    assert rank(4.5, 5.0, 3.5, threshold=0.2) == [
        (edges[1], 1.0),
        (edges[0], 0.75),
        (edges[2], 0.25),
    ]
    assert rank(-1e9) == [(edge, 1.0) for edge in sorted(edges) if edge != edges[0]]
    assert rank() == [(edge, 1.0) for edge in sorted(edges)], "equal scores blame every edge"


def test_explainers_run_on_one_thread() -> None:
    graph = blocks()
    threads = []

    def scorer(tensors: GroupTensors, seed: int) -> torch.Tensor:
        threads.append(torch.get_num_threads())
        if len(threads) > 1:
            raise RuntimeError
        return torch.ones(len(tensors.edges))

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        rank = ExplanationRanker("x", FeatureTable(graph), BUFFER, scorer, 0.5)
        rank(0b110)
        assert (threads, torch.get_num_threads()) == ([1], 2)
        with pytest.raises(RuntimeError):
            rank(0b110)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_pg_scores_are_the_logits_of_pygs_mask(model: ValidityModel) -> None:
    tensors = FeatureTable(blocks()).group(0b1111111110, BUFFER)
    torch.manual_seed(3)
    algorithm = make_pg(epochs=0)
    algorithm.mlp(torch.zeros(1, 256))
    explanation = make_explainer(model, algorithm)(
        tensors.x, tensors.edge_index, target=torch.tensor([INVALID])
    )
    wanted = directed_scores(torch.logit(explanation.edge_mask.detach().double()))
    found = PGScorer(model, algorithm)(tensors, 0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)


def test_saliency_is_the_gradient(model: ValidityModel) -> None:
    """Against central differences of the logit, in double precision."""
    exact = ValidityModel().double()
    exact.load_state_dict(model.state_dict())
    graph = blocks(1)
    tensors = FeatureTable(graph).group(0b1111110, BUFFER)
    found = SaliencyScorer(model).gradient(tensors)
    x = tensors.x.double()
    ones = torch.ones(tensors.edge_index.shape[1], dtype=torch.float64)
    step = 1e-5
    for k in range(len(ones)):
        up, down = ones.clone(), ones.clone()
        up[k] += step
        down[k] -= step
        with torch.no_grad():
            high = exact(x, tensors.edge_index, edge_weight=up)
            low = exact(x, tensors.edge_index, edge_weight=down)
        assert float(found[k]) == pytest.approx(float(high - low) / (2 * step), rel=1e-2, abs=1e-4)
    summed = directed_scores(found.abs())
    assert torch.equal(SaliencyScorer(model)(tensors, 0), summed)


def test_unknown_name_and_foreign_weights(model: ValidityModel, folder: Path) -> None:
    graph = blocks()
    with pytest.raises(OptionError, match="did you mean 'saliency'"):
        ranker("salience", graph, model, folder)
    for name in ("pgexplainer", "rgexplainer"):
        with pytest.raises(WeightsError, match="validity="):
            ranker(name, graph, ValidityModel(), folder)


@pytest.mark.parametrize("name", EXPLAINERS)
@pytest.mark.parametrize("granularity", ["line", "pixel"])
def test_the_shipped_explainers_repair(name: str, granularity: str) -> None:
    graph = blocks(6)
    problem = FusionProblem(Evaluator(Lbdf(graph, granularity), 4096))
    rank = make_ranker(name, graph, "lbdf", 4096, granularity=granularity)
    split = RecursiveSplit(problem, rank)
    plan = split.direct()
    assert all(map(problem.evaluator.valid, plan.groups))
    assert sum(group.bit_count() for group in plan.groups) == problem.fusable.bit_count()


def test_fidelity_of_the_controls(
    model: ValidityModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr(metrics, "time", clock)
    graph = blocks(4)
    problem = FusionProblem(Evaluator(Lbdf(graph), 4500), merge=False)
    assert not problem.unfusable
    groups = [0b1111111 << 1, 0b1111111111111 << 1, 0b1]
    everything = measure(ranker("all", graph, model, folder), problem, groups)
    assert (everything.groups, everything.fidelity, everything.sparsity) == (2, 1.0, 0.0)
    one = measure(ranker("saliency", graph, model, folder, threshold=1.0), problem, groups)
    assert 0.8 < one.sparsity < 1
    assert one.seconds == 1.0, "per explanation, by the clock above"
    with pytest.raises(ValueError, match="no group with an edge"):
        measure(ranker("all", graph, model, folder), problem, [0b1])


def test_splitting_takes_the_skips_along() -> None:
    graph = blocks(1)
    problem = FusionProblem(Evaluator(Lbdf(graph), BUFFER), merge=False)
    group = 0b1111111
    assert sorted(split_at(group, [(2, 3)], problem)) == [0b0000111, 0b1111000]
    assert sorted(split_at(group, [(2, 3), (0, 6)], problem)) == [0b0000111, 0b1111000]
    assert sorted(split_at(group, [(2, 3), (0, 1)], problem)) == [0b1, 0b0000110, 0b1111000]
    assert split_at(group, [], problem) == [group]
