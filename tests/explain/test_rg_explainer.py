"""RG-Explainer: connected subgraphs, rewards, and that the agent learns."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch

from tests.graphs import random_graph, random_group
from torch_getfuse.explain.explainers import make_explainer
from torch_getfuse.explain.features import FeatureTable
from torch_getfuse.explain.rg_explainer import RGExplainer, Rollout, closing_mask, pretrain
from torch_getfuse.explain.validity import ValidityModel
from torch_getfuse.partition.node_set import is_connected, mask_of, neighbours


@pytest.fixture(scope="module")
def model() -> ValidityModel:
    torch.manual_seed(0)
    return ValidityModel().eval().requires_grad_(False)


@pytest.mark.parametrize("seed", range(15))
def test_subgraphs_are_connected_and_small(seed: int, model: ValidityModel) -> None:
    rng = Random(seed)
    torch.manual_seed(seed)
    graph = random_graph(rng, 14)
    algorithm = RGExplainer(most=5)
    near = neighbours(graph)
    for _ in range(6):
        group = random_group(rng, graph)
        tensors = FeatureTable(graph).group(group, 1024)
        embeddings = model.embed(tensors.x, tensors.edge_index)
        for greedy in (True, False):
            grown = algorithm.rollout(embeddings, tensors.edge_index, greedy)
            chosen = mask_of(tensors.operators[k] for k in grown.nodes)
            assert chosen & ~group == 0
            assert is_connected(chosen, near)
            assert len(set(grown.nodes)) == len(grown.nodes)
            assert min(2, group.bit_count()) <= len(grown.nodes) <= 5
            assert grown.radius < len(grown.nodes)
            assert float(grown.log_prob.detach()) <= 1e-6


def test_greedy_is_deterministic_and_sampling_is_not(model: ValidityModel) -> None:
    graph = random_graph(Random(3), 14)
    tensors = FeatureTable(graph).group((1 << 14) - 1, 1024)
    algorithm = RGExplainer()
    embeddings = model.embed(tensors.x, tensors.edge_index)
    greedy = {algorithm.rollout(embeddings, tensors.edge_index, True).nodes for _ in range(5)}
    drawn = {algorithm.rollout(embeddings, tensors.edge_index, False).nodes for _ in range(10)}
    assert len(greedy) == 1
    assert len(drawn) > 1


def test_edges_score_by_when_they_were_closed() -> None:
    edge_index = torch.tensor([[0, 1, 2, 3, 1, 2, 3, 4], [1, 2, 3, 4, 0, 1, 2, 3]])
    mask = closing_mask([(2, 3, 1)], edge_index)
    torch.testing.assert_close(mask, torch.tensor([0.0, 2 / 3, 1.0, 0.0] * 2))
    # Six additions in all; 0-1 is closed by the fifth of them, 3-4 lies in no subgraph, and 1-2,
    # which is in both, counts in the first.
    mask = closing_mask([(2, 3, 1), (1, 0, 2)], edge_index)
    torch.testing.assert_close(mask, torch.tensor([1 / 2, 5 / 6, 1.0, 0.0] * 2))


@pytest.mark.parametrize("seed", range(20))
def test_subgraphs_cover_the_group(seed: int, model: ValidityModel) -> None:
    graph = random_graph(Random(seed), 20)
    near = neighbours(graph)
    group = random_group(Random(seed), graph)
    tensors = FeatureTable(graph).group(group, 1024)
    torch.manual_seed(seed)
    algorithm = RGExplainer(most=4)
    embeddings = model.embed(tensors.x, tensors.edge_index)
    found = algorithm.cover(embeddings, tensors.edge_index)
    masks = [mask_of(tensors.operators[k] for k in part) for part in found]
    covered = 0
    for part, mask in zip(found, masks, strict=True):
        assert is_connected(mask, near)
        assert not covered >> tensors.operators[part[0]] & 1, "a seed is new"
        covered |= mask
    assert covered == group
    first = algorithm.rollout(embeddings, tensors.edge_index, greedy=True)
    assert found[0] == first.nodes
    assert all(len(part) <= 4 for part in found)


def test_reward_is_loss_and_penalties_by_hand(model: ValidityModel) -> None:
    graph = random_graph(Random(4), 10)
    tensors = FeatureTable(graph).group(random_group(Random(4), graph), 1024)
    assert tensors.edges
    algorithm = RGExplainer(size_penalty=0.1, radius_penalty=0.2)
    grown = algorithm.rollout(model.embed(tensors.x, tensors.edge_index), tensors.edge_index, True)
    inside = torch.isin(tensors.edge_index, torch.tensor(grown.nodes)).all(dim=0)
    order = {node: k for k, node in enumerate(grown.nodes)}
    edges = torch.tensor([[order[int(n)] for n in row] for row in tensors.edge_index[:, inside]])
    logit = model(tensors.x[list(grown.nodes)], edges)
    loss = torch.nn.functional.softplus(logit)  # -log P(invalid)
    wanted = -(loss + 0.2 * grown.radius + 0.1 * len(grown.nodes))
    group = (tensors.x, tensors.edge_index)
    found = algorithm.reward(model, [group, group], [grown, grown], target=0.0)
    torch.testing.assert_close(found, wanted.expand(2), rtol=1e-4, atol=1e-5)


def test_a_penalty_on_size_is_learnt(model: ValidityModel) -> None:
    """With nothing but size to lose, the agent learns to stop at once."""
    graph = random_graph(Random(7), 14)
    table = FeatureTable(graph)
    rng = Random(0)
    groups = [random_group(rng, graph) for _ in range(60)]
    groups = [g for g in groups if g.bit_count() > 3][:24]
    inputs = [(t.x, t.edge_index) for t in (table.group(g, 512) for g in groups)]
    torch.manual_seed(0)
    algorithm = RGExplainer(most=8, size_penalty=2.0, radius_penalty=0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    history = pretrain(algorithm, model, inputs, epochs=12, batch=12, rollouts=4)
    assert np.mean(history[-3:]) > np.mean(history[:3]) + 0.5
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "the explained model stays as it is"


def test_as_an_algorithm_of_torch_geometric(model: ValidityModel) -> None:
    graph = random_graph(Random(9), 12)
    tensors = FeatureTable(graph).group((1 << 12) - 1, 1024)
    explainer = make_explainer(model, RGExplainer())
    explanation = explainer(tensors.x, tensors.edge_index, target=torch.tensor([0]))
    half = len(tensors.edges)
    assert explanation.edge_mask.shape == (2 * half,)
    assert torch.equal(explanation.edge_mask[:half], explanation.edge_mask[half:])
    assert explanation.edge_mask.max() == 1.0


def test_a_single_operator_needs_no_agent(model: ValidityModel) -> None:
    graph = random_graph(Random(9), 12)
    tensors = FeatureTable(graph).group(0b1, 1024)
    embeddings = model.embed(tensors.x, tensors.edge_index)
    grown = RGExplainer().rollout(embeddings, tensors.edge_index, True)
    assert isinstance(grown, Rollout)
    assert grown.nodes == (0,)
