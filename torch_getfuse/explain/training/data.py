"""The training data: fusion groups of torchvision and random networks, built by one command.

None of it is committed. A shard holds the groups of one network at one input size; shards are
built in parallel, each written atomically, and an interrupted run resumes with the missing ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import torch
from tqdm import tqdm

from torch_getfuse.atomic_files import replace_text
from torch_getfuse.backend.capture.capture import capture_model
from torch_getfuse.explain.dataset import PackedGroups
from torch_getfuse.explain.features import FEATURES_ID
from torch_getfuse.explain.sampling import SAMPLER_VERSION, Sample, sample_groups
from torch_getfuse.explain.training.synthetic import synthetic_network
from torch_getfuse.ir import OpGraph
from torch_getfuse.models import import_torchvision
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import FusionScheme

log = logging.getLogger(__name__)

TABLE_1: Mapping[str, int] = {
    "vgg16": 715,
    "squeezenet1_0": 795,
    "mobilenet_v2": 1100,
    "mobilenet_v3_small": 203,
    "mobilenet_v3_large": 251,
    "resnet18": 715,
    "resnet101": 3476,
    "efficientnet_b0": 1364,
    "efficientnet_b3": 2247,
}
"""Fusion groups per network in the paper's Table I; ours are proportional."""

LEFT_OUT = {
    "brr": ("mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "efficientnet_b3")
}
"""Networks that the paper leaves out: in BRR, Squeeze-and-Excite inside a group has no rate."""

UNSEEN = (
    "resnet50",
    "densenet121",
    "googlenet",
    "shufflenet_v2_x1_0",
    "mnasnet1_0",
    "regnet_y_400mf",
)
"""Networks that are not used for training."""

GROUPS = 12_500
SYNTHETIC = 32
"""Random networks (:mod:`synthetic`) added to the paper's; they add half as many groups."""

_SYNTHETIC = "synthetic-"
_SIDE = 224
_SIDES = {"efficientnet_b3": 300}
# Half of the groups at the network's usual input size; the others keep the model from memorising
# sizes, and give a plain chain such as VGG16, with its 666 intervals, enough distinct groups.
_SHARES = ((1.0, 0.5), (0.75, 0.25), (1.25, 0.25))
_SYNTHETIC_SIDES = (224, 160, 224, 288)


def default_side(network: str) -> int:
    """Pixels per side of a network's usual input."""
    return _SIDES.get(network, _SIDE)


def capture_network(network: str, side: int | None = None) -> OpGraph:
    """The operator graph of a classifier for one square image.

    Args:
        network: a name of torchvision's, or ``"synthetic-N"``.
        side: pixels per side; ``None`` for the network's usual input.
    """
    side = default_side(network) if side is None else side
    if network.startswith(_SYNTHETIC):
        model: torch.nn.Module = synthetic_network(int(network.removeprefix(_SYNTHETIC)))
    else:
        # googlenet warns of its slow initialisation unless init_weights is set.
        extra = {"init_weights": False} if network == "googlenet" else {}
        model = import_torchvision().models.get_model(network, weights=None, **extra)
    # The meta device computes nothing and gives the same graph.
    model = model.eval().to("meta")
    return capture_model(model, (torch.empty(1, 3, side, side, device="meta"),)).graph


@dataclass(frozen=True)
class ShardRequest:
    """Which groups to draw from which network.

    Attributes:
        scheme, granularity: the cost model that labels the groups.
        network, side: as :func:`capture_network` takes them.
        groups: number of distinct groups.
        seed: seed of the whole data set.
    """

    scheme: str
    granularity: str
    network: str
    side: int
    groups: int
    seed: int

    def recipe(self) -> dict[str, Any]:
        """Everything that the content of the shard depends on."""
        return {**vars(self), "features": FEATURES_ID, "sampler": SAMPLER_VERSION}


def requests(
    scheme: str, granularity: str, groups: int, seed: int, synthetic: int = SYNTHETIC
) -> list[ShardRequest]:
    """The shards of a data set, large ones first.

    Args:
        scheme, granularity: the cost model that labels the groups.
        groups: approximate number of distinct groups of the paper's networks.
        seed: seed of the whole data set.
        synthetic: random networks, which together add half as many groups.
    """
    apart = LEFT_OUT.get(scheme, ())
    chosen = {name: count for name, count in TABLE_1.items() if name not in apart}
    scale = groups / sum(chosen.values())
    shards = [
        ShardRequest(
            scheme,
            granularity,
            name,
            round(default_side(name) * stretch / 4) * 4,
            round(count * share * scale),
            seed,
        )
        for name, count in chosen.items()
        for stretch, share in _SHARES
    ]
    shards += [
        ShardRequest(
            scheme,
            granularity,
            f"{_SYNTHETIC}{number}",
            _SYNTHETIC_SIDES[number % len(_SYNTHETIC_SIDES)],
            round(groups / 2 / synthetic),
            seed,
        )
        for number in range(synthetic)
    ]
    return sorted(shards, key=lambda request: -request.groups)


def build(
    scheme: str,
    granularity: str,
    folder: Path,
    groups: int = GROUPS,
    seed: int = 0,
    jobs: int = 2,
    progress: bool = True,
    synthetic: int = SYNTHETIC,
) -> tuple[PackedGroups, str]:
    """The data set of a scheme, with missing shards built, and its fingerprint.

    Args:
        scheme, granularity: the cost model that labels the groups.
        folder: folder in which graphs and shards are kept between runs.
        groups: distinct groups of the paper's networks; times five buffers.
        seed: the same seed gives the same data.
        jobs: number of processes.
        progress: show a progress bar.
        synthetic: random networks in addition to the paper's; 0 gives the paper's groups alone,
            each in the same part of the split.
    """
    shards = requests(scheme, granularity, groups, seed, synthetic)
    folder.mkdir(parents=True, exist_ok=True)
    work = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(
        joblib.delayed(_make_shard)(request, folder) for request in shards
    )
    for _ in tqdm(work, total=len(shards), desc="groups", unit="shard", disable=not progress):
        pass
    digest = hashlib.sha256()
    loaded = []
    for request in sorted(shards, key=lambda r: (r.network, r.side)):
        text = _shard_path(request, folder).read_text(encoding="utf-8")
        digest.update(text.encode())
        loaded.append((load_graph(request.network, request.side, folder), _samples(text)))
    packed = PackedGroups.of(loaded, granularity)
    log.info("%d groups, %d samples", len(packed.keys), len(packed))
    return packed, digest.hexdigest()


def load_samples(request: ShardRequest, folder: Path) -> list[Sample]:
    """The samples of a shard that :func:`build` has written to the folder."""
    return _samples(_shard_path(request, folder).read_text(encoding="utf-8"))


def load_graph(network: str, side: int, folder: Path) -> OpGraph:
    """The operator graph of a network, captured once and cached under ``folder``."""
    path = folder / "graphs" / f"{network}-{side}.json"
    if not path.exists():
        _write(path, json.dumps(capture_network(network, side).to_dict()))
    return OpGraph.from_dict(json.loads(path.read_text(encoding="utf-8")))


def _make_shard(request: ShardRequest, folder: Path) -> None:
    path = _shard_path(request, folder)
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))["recipe"]
        if known == request.recipe():
            return
    torch.set_num_threads(1)
    graph = load_graph(request.network, request.side, folder)

    def scheme(activation_bytes: int, weight_bytes: int) -> FusionScheme:
        return make_scheme(
            request.scheme, graph, request.granularity, activation_bytes, weight_bytes
        )

    # crc32, not hash(): the same in every process.
    seed = zlib.crc32(f"{request.network}-{request.side}-{request.seed}".encode())
    rows = [
        [hex(s.mask), s.activation_bytes, s.weight_bytes, [int(v) for v in s.valid], s.key]
        for s in sample_groups(graph, scheme, request.granularity, request.groups, seed)
    ]
    if len(rows) < request.groups:
        log.info("%s has only %d of %d groups", path.stem, len(rows), request.groups)
    _write(path, json.dumps({"recipe": request.recipe(), "groups": rows}))


def _samples(text: str) -> list[Sample]:
    return [
        Sample(int(mask, 16), act, weight, tuple(bool(v) for v in valid), key)
        for mask, act, weight, valid, key in json.loads(text)["groups"]
    ]


def _shard_path(request: ShardRequest, folder: Path) -> Path:
    name = f"{request.scheme}-{request.granularity}"
    return folder / name / f"{request.network}-{request.side}.json"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)
