"""The validity predictor: a GNN that mimics ``F_b(group) < B`` (docs/method.md, section 5).

Four GraphConv layers (Morris et al., AAAI 2019) with hidden width 128, ReLU and sum aggregation
over both directions of the edges, a sum over the operators, a linear head. It is only the subject
of explanations: whether a group is valid is always decided by the cost model.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from torch_getfuse.explain.dataset import PackedGroups
from torch_getfuse.explain.features import FEATURES, FEATURES_ID, Ints
from torch_getfuse.explain.geometric import GraphConv, global_add_pool
from torch_getfuse.explain.trained_weights import (
    fingerprint,
    load_weights,
    save_weights,
    weights_path,
)
from torch_getfuse.partition.cost.registry import effective_granularity

log = logging.getLogger(__name__)

HIDDEN = 128
LAYERS = 4


class _SymmetricProduct(torch.autograd.Function):
    """``A @ x`` for a sparse symmetric ``A`` without gradient: the backward is ``A @ grad``."""

    @staticmethod
    def forward(ctx: Any, adjacency: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(adjacency)
        with torch.autocast("cpu", enabled=False):  # sparse products exist in float32 only
            return adjacency @ x.float()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        (adjacency,) = ctx.saved_tensors
        return None, adjacency @ gradients[0].float()


class _Conv(GraphConv):
    """GraphConv that takes a symmetric sparse adjacency instead of edges, which is faster."""

    def message_and_aggregate(
        self, edge_index: torch.Tensor, x: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        product: torch.Tensor = _SymmetricProduct.apply(edge_index, x[0])  # type: ignore[no-untyped-call]
        return product


class ValidityModel(nn.Module):
    """Predicts whether a fusion group fits into the buffer.

    Args:
        hidden: width of the node embeddings.
        layers: message passing steps.
    """

    def __init__(self, hidden: int = HIDDEN, layers: int = LAYERS) -> None:
        super().__init__()
        widths = [FEATURES] + [hidden] * layers
        self.layers = nn.ModuleList(
            _Conv(before, after, aggr="add") for before, after in pairwise(widths)
        )
        self.head = nn.Linear(hidden, 1)

    def embed(
        self,
        x: torch.Tensor,
        edge_index: torch.Tensor,
        edge_weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``(n, FEATURES)`` to node embeddings ``(n, hidden)``."""
        for layer in self.layers:
            x = layer(x, edge_index, edge_weight).relu()
        return x

    def forward(
        self,
        x: torch.Tensor,
        edge_index: torch.Tensor,
        batch: torch.Tensor | None = None,
        edge_weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits, one per group, positive for valid.

        Args:
            x: ``(n, FEATURES)`` operators.
            edge_index: ``(2, 2 * E)`` edges in both directions, or the symmetric ``(n, n)``
                sparse matrix of their counts.
            batch: ``(n,)`` group of each operator; ``None`` for a single group.
            edge_weight: ``(2 * E,)`` factors of the messages; ``None`` for ones.
        """
        size = None if batch is not None else 1
        pooled = global_add_pool(self.embed(x, edge_index, edge_weight), batch, size)
        logits: torch.Tensor = self.head(pooled)
        return logits.squeeze(-1)


@dataclass(frozen=True)
class Scores:
    """How well a model separates valid groups from invalid ones.

    Attributes:
        samples: groups x buffers evaluated.
        accuracy: share predicted correctly.
        f1: F1 of the valid class.
        f1_invalid: F1 of the invalid class.
        majority: accuracy of always predicting the more frequent class.
    """

    samples: int
    accuracy: float
    f1: float
    f1_invalid: float
    majority: float


def scores(predicted: torch.Tensor, actual: torch.Tensor) -> Scores:
    """Scores of boolean predictions against boolean labels; neither may be empty."""
    right = int((predicted & actual).sum())
    rejected = int((~predicted & ~actual).sum())
    wrong = len(actual) - right - rejected
    share = float(actual.float().mean())
    return Scores(
        samples=len(actual),
        accuracy=(right + rejected) / len(actual),
        f1=2 * right / max(1, 2 * right + wrong),
        f1_invalid=2 * rejected / max(1, 2 * rejected + wrong),
        majority=max(share, 1 - share),
    )


@torch.no_grad()
def evaluate(model: ValidityModel, data: PackedGroups, samples: Ints) -> Scores:
    """Scores of a model on ``samples``."""
    model.eval()
    predicted, actual = [], []
    for batch in data.batches(samples, 1024):
        predicted.append(model(batch.x, batch.edge_index, batch.batch) > 0)
        actual.append(batch.y > 0.5)
    return scores(torch.cat(predicted), torch.cat(actual))


@dataclass(frozen=True)
class FitOptions:
    """How to train the predictor.

    Attributes:
        epochs: maximum number of passes over the training part.
        batch: samples per step.
        rate: peak of the learning rate, which rises for a tenth of the steps and then falls.
        patience: epochs without a better validation accuracy after which training ends.
        seed: seed of initialisation and order.
    """

    epochs: int = 50
    batch: int = 256
    rate: float = 2e-3
    patience: int = 20
    seed: int = 0


def fit(
    data: PackedGroups,
    options: FitOptions | None = None,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> ValidityModel:
    """Train on the training part; returns the weights with the best validation accuracy.

    Args:
        data: the samples.
        options: epochs, rate, seed.
        checkpoint: a file for the state after each epoch; a run with the same options and data
            resumes from it, with the same result.
        progress: show a progress bar.
    """
    options = options or FitOptions()
    train, validation = data.part("train"), data.part("validation")
    torch.manual_seed(options.seed)
    model = ValidityModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=options.rate,
        total_steps=options.epochs * -(-len(train) // options.batch),
        pct_start=0.1,
    )
    run = {"options": asdict(options), "data": _digest(data)}
    state = _Progress(weights=_copy(model))
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["run"] == run:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            state = _Progress(**saved["state"])
            log.info("going on after epoch %d of %s", state.epoch, checkpoint)
    bar = tqdm(total=options.epochs, initial=state.epoch, disable=not progress, unit="epoch")
    while state.epoch < options.epochs and state.epoch - state.best_epoch < options.patience:
        model.train()
        # A generator per epoch: a resumed run has the same order.
        rng = np.random.default_rng((options.seed, state.epoch))
        for batch in data.batches(train, options.batch, rng):
            optimizer.zero_grad()
            # Products in bfloat16 halve the time; weights, sums and gradients remain float32.
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch.x, batch.adjacency(), batch.batch)
            loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), batch.y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        state.epoch += 1
        validated = evaluate(model, data, validation)
        if validated.accuracy > state.best:
            state.best, state.best_epoch = validated.accuracy, state.epoch
            state.weights = _copy(model)
        log.info("epoch %d: validation accuracy %.4f", state.epoch, validated.accuracy)
        bar.update()
        bar.set_postfix(accuracy=f"{validated.accuracy:.4f}", best=f"{state.best:.4f}")
        if checkpoint is not None:
            _save_checkpoint(checkpoint, run, model, optimizer, schedule, state)
    bar.close()
    model.load_state_dict(state.weights)
    return model.eval()


@dataclass
class _Progress:
    weights: Mapping[str, torch.Tensor]
    epoch: int = 0
    best: float = -1.0
    best_epoch: int = 0


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _digest(data: PackedGroups) -> str:
    digest = hashlib.sha256(",".join(data.keys).encode())
    digest.update(data.labels.tobytes())
    return digest.hexdigest()


def _save_checkpoint(
    path: Path,
    run: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    state: _Progress,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    saved = {
        "run": run,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "state": vars(state),
    }
    torch.save(saved, part)
    part.replace(path)


def save_model(
    model: ValidityModel,
    path: Path,
    scheme: str,
    granularity: str,
    data_fingerprint: str,
    test: Scores | None = None,
) -> None:
    """Write a model with metadata on its scheme, features and data.

    Args:
        model: the trained model.
        path: a ``.safetensors`` file.
        scheme, granularity: the cost model that it mimics.
        data_fingerprint: fingerprint of the data that it was trained on.
        test: its scores on the test part.
    """
    save_weights(
        path,
        model.state_dict(),
        {
            **_expected(scheme, granularity),
            "data": data_fingerprint,
            "test": json.dumps(asdict(test) if test else None),
        },
    )


def load_model(
    scheme: str,
    granularity: str = "line",
    path: Path | None = None,
    data_fingerprint: str | None = None,
) -> ValidityModel:
    """The model of a scheme, from ``path`` or from the package.

    Raises:
        WeightsError: if the file is missing, or was made for another scheme, granularity or set
            of features, or from other data than ``data_fingerprint``.
    """
    expected = _expected(scheme, granularity)
    if data_fingerprint is not None:
        expected["data"] = data_fingerprint
    state, _ = load_weights(path or weights_path("validity", scheme, granularity), expected)
    model = ValidityModel()
    model.load_state_dict(state)
    return model.eval()


def model_fingerprint(model: ValidityModel) -> str:
    """Identifies a trained model; explainers trained for another one are rejected."""
    return fingerprint(model.state_dict())


def _expected(scheme: str, granularity: str) -> dict[str, str]:
    return {
        "model": "validity",
        "scheme": scheme,
        "granularity": effective_granularity(scheme, granularity),
        "features": FEATURES_ID,
    }
