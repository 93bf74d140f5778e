"""RG-Explainer: explanations grown by a reinforcement-learning agent.

Shan et al., "Reinforcement Learning Enhanced Explainer for Graph Neural Networks", NeurIPS 2021,
for graph classification, as one more ``ExplainerAlgorithm`` of torch_geometric:

- a *seed* operator is chosen by an MLP over each node embedding concatenated with the graph's;
- an *agent* then adds one neighbour at a time or stops, so every explanation is connected;
- both learn by policy gradient from the reward
  ``-CE(f(subgraph), target) - radius_penalty * radius - size_penalty * |subgraph|``,
  with the mean reward of the step's rollouts as baseline.

The embeddings are those of the explained model, which is not changed. A subgraph means: these
operators alone suffice for the predicted class of the group. But a large group is too large in
several places, and one connected subgraph of ten operators shows only one of them. So the agent
starts again from the locator's next best seed outside all subgraphs so far, until they cover the
group. An edge scores higher the earlier the agent closed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from torch_getfuse.explain.geometric import (
    ExplainerAlgorithm,
    Explanation,
    ExplanationType,
    ModelMode,
    ModelTaskLevel,
)
from torch_getfuse.explain.validity import HIDDEN, ValidityModel


@dataclass(frozen=True)
class Rollout:
    """One subgraph that the agent grew.

    Attributes:
        nodes: rows of the group's operators in the order in which they were added, seed first.
        log_prob: log-probability of all choices, differentiable.
        radius: hops from the seed to the farthest node, along edges inside the subgraph.
    """

    nodes: tuple[int, ...]
    log_prob: torch.Tensor
    radius: int


class RGExplainer(ExplainerAlgorithm):
    """Seed locator and growing agent over the node embeddings of a :class:`ValidityModel`.

    Args:
        most: maximum number of operators of a subgraph.
        width: hidden width of the agent.
        size_penalty: cost of each operator of a subgraph.
        radius_penalty: cost of each hop of its radius.
    """

    def __init__(
        self,
        most: int = 10,
        width: int = 64,
        size_penalty: float = 0.05,
        radius_penalty: float = 0.05,
    ) -> None:
        super().__init__()
        self.most = most
        self.size_penalty = size_penalty
        self.radius_penalty = radius_penalty
        self.project = nn.Linear(HIDDEN, width)
        self.seed_head = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))
        self.grow_head = nn.Sequential(nn.Linear(4 * width, width), nn.ReLU(), nn.Linear(width, 1))
        self.stop_head = nn.Sequential(
            nn.Linear(2 * width + 1, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def supports(self) -> bool:
        """Graph-level binary classification, explained by an edge mask for a given target."""
        config: Any = self.explainer_config
        return bool(
            config.explanation_type == ExplanationType.phenomenon
            and config.node_mask_type is None
            and self.model_config.task_level == ModelTaskLevel.graph
            and self.model_config.mode == ModelMode.binary_classification
        )

    def forward(
        self,
        model: ValidityModel,
        x: torch.Tensor,
        edge_index: torch.Tensor,
        *,
        target: torch.Tensor,
        index: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Explanation:
        """An explanation whose ``edge_mask`` is :func:`closing_mask` of the subgraphs grown.

        Args:
            model: the model to explain.
            x: ``(n, FEATURES)`` operators of one group.
            edge_index: ``(2, 2 * E)`` in both directions.
            target: the class to explain; not used after training.
            index: must be ``None``: there is one graph.
            kwargs: further arguments of the model; not used.
        """
        with torch.no_grad():
            grown = self.cover(model.embed(x, edge_index), edge_index)
        return Explanation(edge_mask=closing_mask(grown, edge_index))

    def rollout(self, embeddings: torch.Tensor, edge_index: torch.Tensor, greedy: bool) -> Rollout:
        """Grow one subgraph from ``(n, HIDDEN)`` embeddings by sampled or most likely choices.

        At least two operators if the group has an edge, so that the subgraph has an edge.
        """
        hidden, whole, seeds = self._read(embeddings)
        near = _adjacency(edge_index, len(embeddings))
        seed, log_prob = _choose(seeds, greedy)
        nodes = [seed]
        hops = {seed: 0}
        front = dict.fromkeys(near[seed])
        while front and len(nodes) < self.most:
            choices = list(front)
            inside = hidden[nodes].mean(dim=0)
            context = torch.cat([inside, whole, hidden[seed]])
            wanted = torch.cat([hidden[choices], context.expand(len(choices), len(context))], dim=1)
            logits = self.grow_head(wanted).squeeze(1)
            if len(nodes) > 1:
                share = hidden.new_tensor([len(nodes) / self.most])
                stop = self.stop_head(torch.cat([inside, whole, share]))
                logits = torch.cat([logits, stop])
            chosen, step = _choose(logits, greedy)
            log_prob = log_prob + step
            if chosen == len(choices):
                break
            added = choices[chosen]
            hops[added] = 1 + min(hops[k] for k in near[added] if k in hops)
            nodes.append(added)
            del front[added]
            front.update((k, None) for k in near[added] if k not in hops)
        return Rollout(tuple(nodes), log_prob, max(hops.values()))

    @torch.no_grad()
    def cover(self, embeddings: torch.Tensor, edge_index: torch.Tensor) -> list[tuple[int, ...]]:
        """Most likely subgraphs from ``(n, HIDDEN)`` embeddings, until every operator is in one.

        Each starts from the most likely seed outside the previous ones; they may overlap.
        Operators are rows, in the order in which they were added.
        """
        hidden, whole, seeds = self._read(embeddings)
        agent = _GreedyAgent(self, hidden, whole)
        near = _adjacency(edge_index, len(embeddings))
        covered: set[int] = set()
        subgraphs = []
        for seed in seeds.argsort(descending=True, stable=True).tolist():
            if seed not in covered:
                subgraphs.append(agent.grow(seed, near))
                covered.update(subgraphs[-1])
        return subgraphs

    def _read(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The agent's view: ``(n, width)`` operators, ``(width,)`` group; ``(n,)`` seed logits."""
        hidden = torch.log1p(embeddings)  # sums over many operators: large, and never negative
        hidden = self.project(hidden).relu()
        whole = hidden.mean(dim=0)
        seeds = self.seed_head(torch.cat([hidden, whole.expand_as(hidden)], dim=1)).squeeze(1)
        return hidden, whole, seeds

    def reward(
        self,
        model: ValidityModel,
        groups: Sequence[tuple[torch.Tensor, torch.Tensor]],
        rollouts: Sequence[Rollout],
        target: float,
    ) -> torch.Tensor:
        """``(rollouts,)`` rewards of subgraphs of the given ``(x, edge_index)`` groups."""
        xs, edges, owner, start = [], [], [], 0
        for k, ((x, edge_index), rollout) in enumerate(zip(groups, rollouts, strict=True)):
            row = torch.full((len(x),), -1)
            nodes = torch.tensor(rollout.nodes)
            row[nodes] = torch.arange(len(nodes)) + start
            inner = row[edge_index]
            xs.append(x[nodes])
            edges.append(inner[:, (inner >= 0).all(dim=0)])
            owner.append(torch.full((len(nodes),), k))
            start += len(nodes)
        with torch.no_grad():
            logits = model(torch.cat(xs), torch.cat(edges, dim=1), torch.cat(owner))
        loss = nn.functional.binary_cross_entropy_with_logits(
            logits, torch.full_like(logits, target), reduction="none"
        )
        # An unbounded loss would dominate everything else in the first epochs.
        loss = loss.clamp(max=5.0)
        radius = torch.tensor([float(r.radius) for r in rollouts])
        size = torch.tensor([float(len(r.nodes)) for r in rollouts])
        return -(loss + self.radius_penalty * radius + self.size_penalty * size)


class _GreedyAgent:
    """The most likely choices of a trained agent, without gradients.

    The first layer of a head is a sum over parts of its input, most of which do not change while
    a subgraph grows; computing these once reduces a step to a fifth.
    """

    def __init__(self, agent: RGExplainer, hidden: torch.Tensor, whole: torch.Tensor) -> None:
        width = hidden.shape[1]
        grow, _, grown = cast(tuple[nn.Linear, nn.ReLU, nn.Linear], tuple(agent.grow_head))
        stop, _, stopped = cast(tuple[nn.Linear, nn.ReLU, nn.Linear], tuple(agent.stop_head))
        choice, inside, around, seed = grow.weight.split(width, dim=1)
        self._most = agent.most
        self._hidden = hidden.numpy()
        self._choice = (hidden @ choice.t() + around @ whole + grow.bias).numpy()
        self._inside = inside.numpy()
        self._seed = (hidden @ seed.t()).numpy()
        self._grown, self._grown_bias = grown.weight[0].numpy(), float(grown.bias)
        inside, around, share = stop.weight.split((width, width, 1), dim=1)
        self._stop = (around @ whole + stop.bias).numpy()
        self._stop_inside, self._stop_share = inside.numpy(), share[:, 0].numpy()
        self._stopped, self._stopped_bias = stopped.weight[0].numpy(), float(stopped.bias)

    def grow(self, seed: int, near: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """One subgraph from ``seed``: the same as a greedy ``rollout`` from it."""
        nodes = {seed: None}
        front = dict.fromkeys(near[seed])
        total = self._hidden[seed].copy()
        while front and len(nodes) < self._most:
            choices = list(front)
            inside = total / len(nodes)
            seen = self._choice[choices] + (self._seed[seed] + self._inside @ inside)
            logits = np.maximum(seen, 0) @ self._grown + self._grown_bias
            best = int(logits.argmax())
            if len(nodes) > 1:
                seen = self._stop + self._stop_inside @ inside
                seen += self._stop_share * (len(nodes) / self._most)
                if np.maximum(seen, 0) @ self._stopped + self._stopped_bias > logits[best]:
                    break
            added = choices[best]
            nodes[added] = None
            total += self._hidden[added]
            del front[added]
            front.update((k, None) for k in near[added] if k not in nodes)
        return tuple(nodes)


def pretrain(
    algorithm: RGExplainer,
    model: ValidityModel,
    groups: Sequence[tuple[torch.Tensor, torch.Tensor]],
    epochs: int = 10,
    batch: int = 32,
    rollouts: int = 2,
    rate: float = 3e-3,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Train the agent on invalid groups; returns the mean reward of each epoch.

    Args:
        algorithm: changed in place.
        model: the model to explain; not changed.
        groups: ``(x, edge_index)`` of invalid groups of at least two operators.
        epochs: passes over the groups.
        batch: groups per step.
        rollouts: subgraphs grown per group and step; their mean reward is the baseline.
        rate: learning rate.
        seed: seed of the order and of the agent's choices.
        progress: show a progress bar.
    """
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=rate)
    with torch.no_grad():
        embeddings = [model.embed(x, edge_index) for x, edge_index in groups]
    history = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in tqdm(range(epochs), desc="rg", unit="epoch", disable=not progress):
            total = 0.0
            for chosen in torch.randperm(len(groups)).split(batch):
                picked = [int(k) for k in chosen for _ in range(rollouts)]
                grown = [
                    algorithm.rollout(embeddings[k], groups[k][1], greedy=False) for k in picked
                ]
                rewards = algorithm.reward(model, [groups[k] for k in picked], grown, target=0.0)
                # A baseline per group separates good choices from easy groups.
                table = rewards.view(-1, rollouts)
                advantage = (table - table.mean(dim=1, keepdim=True)).view(-1)
                log_probs = torch.stack([rollout.log_prob for rollout in grown])
                optimizer.zero_grad()
                (-(advantage * log_probs).mean()).backward()
                nn.utils.clip_grad_norm_(algorithm.parameters(), 1.0)
                optimizer.step()
                total += float(rewards.mean()) * len(chosen)
            history.append(total / len(groups))
    return history


def closing_mask(subgraphs: Sequence[Sequence[int]], edge_index: torch.Tensor) -> torch.Tensor:
    """``(2 * E,)`` scores: 1 for the first edge that the agent closed, falling to 0.

    An edge is closed when the later of its ends joins a subgraph; an edge in several subgraphs
    counts in the first, and one in none scores 0. All additions are spaced evenly, so that the
    share of edges above a threshold does not depend on the size of the group.
    """
    closed: dict[tuple[int, int], int] = {}
    edges = [(a, b) for a, b in edge_index.t().tolist()]
    steps = 0
    for nodes in subgraphs:
        order = {node: steps + k for k, node in enumerate(nodes)}
        for a, b in edges:
            if a in order and b in order:
                closed.setdefault((a, b), max(order[a], order[b]))
        steps += len(nodes)
    return torch.tensor([1 - (closed.get(edge, steps + 1) - 1) / steps for edge in edges])


def _choose(logits: torch.Tensor, greedy: bool) -> tuple[int, torch.Tensor]:
    log_probs = logits.log_softmax(dim=0)
    chosen = int(log_probs.argmax() if greedy else torch.multinomial(log_probs.exp(), 1))
    return chosen, log_probs[chosen]


def _adjacency(edge_index: torch.Tensor, count: int) -> list[list[int]]:
    near: list[list[int]] = [[] for _ in range(count)]
    for a, b in edge_index.t().tolist():
        near[a].append(b)
    return near
