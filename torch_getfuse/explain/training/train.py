"""Train the shipped weights from scratch: data, validity predictor, PGExplainer, RG-Explainer.

``python -m torch_getfuse.explain.training.train --scheme lbdf --granularity line`` builds the data
set, trains the predictor of one scheme and then the two explainers that need training, and writes
three ``.safetensors`` files. The same seed, data and number of threads give the same weights. An
interrupted run resumes: the data at the next shard, the predictor at the next epoch.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from torch_getfuse import plugins
from torch_getfuse.explain import rg_explainer
from torch_getfuse.explain.dataset import Batch, PackedGroups
from torch_getfuse.explain.explainers import INVALID, make_explainer, make_pg, save_explainer
from torch_getfuse.explain.features import Ints
from torch_getfuse.explain.geometric import get_embeddings
from torch_getfuse.explain.rg_explainer import RGExplainer
from torch_getfuse.explain.trained_weights import WEIGHTS, weights_path
from torch_getfuse.explain.training.data import GROUPS, SYNTHETIC, build
from torch_getfuse.explain.validity import FitOptions, Scores, ValidityModel, evaluate, fit
from torch_getfuse.explain.validity import save_model as save_validity
from torch_getfuse.partition.cost.lbdf.model import GRANULARITIES
from torch_getfuse.partition.cost.registry import effective_granularity

log = logging.getLogger(__name__)

PG_EPOCHS, RG_EPOCHS = 25, 10
_PG_GROUPS, _RG_GROUPS = 800, 600
_PG_BATCH = 25
# At PyG's 0.003 every mask saturates at zeros or ones within an epoch, and ranks edges no better
# than chance; at this rate it learns to rank them before it saturates.
_PG_RATE = 6e-5
_LARGEST = 64  # operators of a group that explainers are trained on


@dataclass(frozen=True)
class TrainResult:
    """Result of a training run.

    Attributes:
        scheme, granularity: the cost model.
        groups, samples: size of the data set.
        test: scores on the test part.
        fusable: the same on the samples whose operators all fit alone, as in a search.
        seconds: wall time of this run.
        files: the files written.
    """

    scheme: str
    granularity: str
    groups: int
    samples: int
    test: Scores
    fusable: Scores
    seconds: float
    files: tuple[str, ...]


def train(
    scheme: str = "lbdf",
    granularity: str = "line",
    output: Path | str | None = None,
    seed: int = 0,
    *,
    data: Path | str = Path("runs/explain"),
    groups: int = GROUPS,
    epochs: int = FitOptions.epochs,
    jobs: int = 2,
    threads: int = 1,
    progress: bool = True,
    synthetic: int = SYNTHETIC,
) -> TrainResult:
    """Train all models of one scheme from scratch.

    Args:
        scheme, granularity: the cost model to mimic.
        output: folder for the weights; ``None`` for the package's own.
        seed: seed of data, initialisation and order.
        data: folder for the data set and the state of an interrupted run.
        groups: distinct fusion groups of the paper's networks; times five buffers.
        epochs: maximum number of epochs of the validity predictor.
        jobs: processes that build the data.
        threads: threads of torch; more than one changes the last bits of the result.
        progress: show progress bars.
        synthetic: random networks in addition to the paper's; they add half as many groups.
    """
    started = time.perf_counter()
    torch.set_num_threads(threads)
    granularity = effective_granularity(scheme, granularity)
    folder = WEIGHTS if output is None else Path(output)
    packed, fingerprint = build(
        scheme, granularity, Path(data), groups, seed, jobs, progress, synthetic
    )
    options = FitOptions(epochs=epochs, seed=seed)
    checkpoint = Path(data) / f"{scheme}-{granularity}" / "fit.pt"
    model = fit(packed, options, checkpoint, progress)
    test = packed.part("test")
    test_scores = evaluate(model, packed, test)
    fusable = evaluate(model, packed, test[packed.fits_alone(_holds_weights(scheme))[test]])
    path = weights_path("validity", scheme, granularity, folder)
    save_validity(model, path, scheme, granularity, fingerprint, test_scores)
    files = [path]
    model.requires_grad_(False)
    for kind, learn in (("pg", train_pg), ("rg", train_rg)):
        state = learn(model, packed, scheme, seed, progress)
        files.append(save_explainer(kind, state, model, scheme, granularity, folder))
    return TrainResult(
        scheme=scheme,
        granularity=granularity,
        groups=len(packed.keys),
        samples=len(packed),
        test=test_scores,
        fusable=fusable,
        seconds=time.perf_counter() - started,
        files=tuple(map(str, files)),
    )


def explained_samples(data: PackedGroups, scheme: str, count: int, seed: int) -> Ints:
    """Invalid samples of the training part, like those that a search explains."""
    sizes = data.group_sizes()
    wanted = (
        ~data.labels & data.fits_alone(_holds_weights(scheme)) & (sizes > 2) & (sizes <= _LARGEST)
    )
    train_part = data.part("train")
    candidates = train_part[wanted[train_part]]
    return np.random.default_rng(seed).permutation(candidates)[:count]


def _holds_weights(scheme: str) -> bool:
    return bool(plugins.fact(plugins.SCHEMES.load(scheme), "holds_weights", False))


def _trained() -> list[str]:
    """The schemes whose predictors come with this package."""
    schemes = plugins.SCHEMES
    return [n for n in schemes.built_in if plugins.fact(schemes.load(n), "has_predictor", False)]


def train_pg(
    model: ValidityModel,
    data: PackedGroups,
    scheme: str,
    seed: int,
    progress: bool = True,
    epochs: int = PG_EPOCHS,
    count: int = _PG_GROUPS,
) -> dict[str, torch.Tensor]:
    """The weights of PGExplainer's MLP after training on invalid groups."""
    samples = explained_samples(data, scheme, count, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # PyG sums the mask over all groups of a batch, but averages their losses.
        algorithm = make_pg(epochs, _PG_RATE, edge_size=0.05 / _PG_BATCH)
        make_explainer(model, algorithm)
        _scale_first_layer(algorithm.mlp, model, data.batch(samples[: 4 * _PG_BATCH]))
        for epoch in tqdm(range(epochs), desc="pg", unit="epoch", disable=not progress):
            rng = np.random.default_rng((seed, epoch))
            losses = [
                algorithm.train(
                    epoch,
                    model,
                    batch.x,
                    batch.edge_index,
                    target=torch.full((len(batch.y),), INVALID),
                    batch=batch.batch,
                )
                for batch in data.batches(samples, _PG_BATCH, rng)
            ]
            log.info("pg epoch %d: loss %.4f", epoch + 1, np.mean(losses))
    state: dict[str, torch.Tensor] = algorithm.mlp.state_dict()
    return state


def _scale_first_layer(mlp: Any, model: ValidityModel, batch: Batch) -> None:
    """Scale the inputs to about one: embeddings are sums over neighbours and thus larger, and
    would saturate the mask from the start.
    """
    embeddings = get_embeddings(model, batch.x, batch.edge_index, batch=batch.batch)[-1]
    mlp(torch.cat([embeddings[:1]] * 2, dim=1))  # PyG's layer infers its width from its first input
    with torch.no_grad():
        mlp[0].weight.div_(embeddings.square().mean().sqrt())


def train_rg(
    model: ValidityModel,
    data: PackedGroups,
    scheme: str,
    seed: int,
    progress: bool = True,
    epochs: int = RG_EPOCHS,
    count: int = _RG_GROUPS,
) -> dict[str, torch.Tensor]:
    """The weights of RG-Explainer after training on invalid groups."""
    samples = explained_samples(data, scheme, count, seed)
    batches = [data.batch(samples[k : k + 1]) for k in range(len(samples))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        algorithm = RGExplainer()
    history = rg_explainer.pretrain(
        algorithm,
        model,
        [(batch.x, batch.edge_index) for batch in batches],
        epochs=epochs,
        seed=seed,
        progress=progress,
    )
    log.info("rg rewards by epoch: %s", ", ".join(f"{reward:.3f}" for reward in history))
    state: dict[str, torch.Tensor] = algorithm.state_dict()
    return state


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; prints the result as JSON."""
    parser = argparse.ArgumentParser(
        prog="torch_getfuse.explain.training.train", description=__doc__
    )
    parser.add_argument("--scheme", choices=_trained(), default="lbdf")
    parser.add_argument("--granularity", choices=GRANULARITIES, default="line")
    parser.add_argument("--output", type=Path, help="folder for the weights (the package's own)")
    parser.add_argument("--data", type=Path, default=Path("runs/explain"), help="working folder")
    parser.add_argument("--groups", type=int, default=GROUPS, help="groups of the paper's networks")
    parser.add_argument("--synthetic", type=int, default=SYNTHETIC, help="further, random networks")
    parser.add_argument("--epochs", type=int, default=FitOptions.epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes that build the data")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING if args.quiet else logging.INFO)
    result = train(
        args.scheme,
        args.granularity,
        args.output,
        args.seed,
        data=args.data,
        groups=args.groups,
        epochs=args.epochs,
        jobs=args.jobs,
        threads=args.threads,
        progress=not args.quiet,
        synthetic=args.synthetic,
    )
    print(json.dumps(asdict(result), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
