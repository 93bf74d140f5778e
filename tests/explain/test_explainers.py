"""Six explainers behind one interface."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.graphs import Builder
from torch_getfuse.errors import OptionError
from torch_getfuse.explain.explainers import (
    EXPLAINERS,
    ExplanationRanker,
    SaliencyScorer,
    make_pg,
    make_ranker,
    save_explainer,
)
from torch_getfuse.explain.features import FeatureTable, directed_scores
from torch_getfuse.explain.metrics import measure, split_at
from torch_getfuse.explain.rg_explainer import RGExplainer
from torch_getfuse.explain.validity import ValidityModel
from torch_getfuse.explain.weights_io import WeightsError
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost import Evaluator
from torch_getfuse.partition.lbdf import Lbdf
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.split import RecursiveSplit, group_edges

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
    name: str, graph: OpGraph, model: ValidityModel, folder: Path, edges: int = 6, seed: int = 0
) -> ExplanationRanker:
    return make_ranker(
        name, graph, "lbdf", BUFFER, edges=edges, seed=seed, model=model, folder=folder
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
        else:
            assert len(edges) <= 6
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


@pytest.mark.parametrize("edges", [1, 3])
def test_number_of_solution_edges(edges: int, model: ValidityModel, folder: Path) -> None:
    graph = blocks()
    for name in ("saliency", "random", "gnnexplainer"):
        assert len(ranker(name, graph, model, folder, edges)(0b1111110)) == edges


def test_edges_below_the_threshold_are_left_out() -> None:
    graph = blocks()
    table = FeatureTable(graph)

    def scorer(tensors: object, seed: int) -> torch.Tensor:
        found = torch.zeros(len(table.group(group, 1).edges))
        found[:3] = torch.tensor([0.5, 1.0, 0.001])
        return found

    group = 0b1111110
    rank = ExplanationRanker("x", table, BUFFER, scorer)
    edges = table.group(group, 1).edges
    assert [edge for edge, _ in rank(group)] == [edges[1], edges[0]]
    nothing = ExplanationRanker("x", table, BUFFER, lambda t, s: torch.zeros(len(t.edges)))
    assert len(nothing(group)) == 1


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


def test_fidelity_of_the_controls(model: ValidityModel, folder: Path) -> None:
    graph = blocks(4)
    problem = FusionProblem(Evaluator(Lbdf(graph), 4500), merge=False)
    assert not problem.unfusable
    groups = [0b1111111 << 1, 0b1111111111111 << 1, 0b1]
    everything = measure(ranker("all", graph, model, folder), problem, groups)
    assert (everything.groups, everything.fidelity, everything.sparsity) == (2, 1.0, 0.0)
    one = measure(ranker("random", graph, model, folder, edges=1), problem, groups)
    assert 0.8 < one.sparsity < 1
    assert one.seconds > 0
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
