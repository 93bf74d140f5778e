"""Audio, video and token networks: DRAM access with every operator alone, and as planned.

    python -m benchmarks.streams                                   # all networks, 256 KB
    python -m benchmarks.streams --networks tcn r3d_18 --schemes lbdf --buffer 512KB

Signals ``(1, C, L)`` stream over their length, volumes ``(1, C, D, H, W)`` over depth or height and
tokens ``(1, N, C)`` over ``N`` (docs/method.md, section 2). 1 byte per element. Totals are of the
whole network, operators that do not fit alone included. CPU seconds are of tracing and planning.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

import torch_getfuse
from torch_getfuse.models import import_torchvision


class Separator(nn.Module):
    """A block of Conv-TasNet (arXiv 1809.07454): 1x1, depthwise and dilated, 1x1, and a skip."""

    def __init__(self, channels: int, hidden: int, dilation: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(channels, hidden, 1),
            nn.PReLU(),
            nn.GroupNorm(1, hidden),
            nn.Conv1d(hidden, hidden, 3, padding=dilation, dilation=dilation, groups=hidden),
            nn.PReLU(),
            nn.GroupNorm(1, hidden),
            nn.Conv1d(hidden, channels, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.layers(x)
        return y


class ConvTasNet(nn.Module):
    """Separates two speakers: encoder, masks out of 8 blocks, decoder."""

    def __init__(self, filters: int = 256, channels: int = 128) -> None:
        super().__init__()
        self.filters = filters
        self.encoder = nn.Conv1d(1, filters, 16, 8)
        self.head = nn.Sequential(nn.GroupNorm(1, filters), nn.Conv1d(filters, channels, 1))
        self.blocks = nn.Sequential(*[Separator(channels, 256, 2 ** (k % 4)) for k in range(8)])
        self.mask = nn.Conv1d(channels, 2 * filters, 1)
        self.decoder = nn.ConvTranspose1d(filters, 1, 16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.encoder(x))
        masks = torch.sigmoid(self.mask(self.blocks(self.head(y)))).chunk(2, 1)
        return torch.cat([self.decoder(y * mask) for mask in masks], 1)


class Causal(nn.Module):
    """A temporal convolutional network (arXiv 1803.01271) over 40 features of 1000 frames."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.first = nn.Conv1d(40, channels, 1)
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.ZeroPad1d((2 * 2**k, 0)),
                nn.Conv1d(channels, channels, 3, dilation=2**k),
                nn.BatchNorm1d(channels),
                nn.ReLU(),
            )
            for k in range(6)
        )
        self.last = nn.Conv1d(channels, 12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for level in self.levels:
            x = x + level(x)
        found: torch.Tensor = self.last(x).mean(-1)
        return found


def _wav2vec2(norm: str) -> nn.Module:
    import_torchvision()  # transformers imports it
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(feat_extract_norm=norm, num_hidden_layers=1)
    encoder: nn.Module = Wav2Vec2Model(config).feature_extractor
    return encoder


def _video(name: str) -> nn.Module:
    model: nn.Module = getattr(import_torchvision().models.video, name)(weights=None)
    return model


def _image(name: str) -> nn.Module:
    import_torchvision()
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


_CLIP, _IMAGE = (1, 3, 16, 112, 112), (1, 3, 224, 224)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "wav2vec2 encoder": (lambda: _wav2vec2("group"), (1, 16000)),
    "wav2vec2 encoder, layer norm": (lambda: _wav2vec2("layer"), (1, 16000)),
    "conv_tasnet": (ConvTasNet, (1, 1, 16000)),
    "tcn": (Causal, (1, 40, 1000)),
    "r3d_18": (lambda: _video("r3d_18"), _CLIP),
    "mc3_18": (lambda: _video("mc3_18"), _CLIP),
    "s3d": (lambda: _video("s3d"), (1, 3, 16, 224, 224)),
    "swin3d_t": (lambda: _video("swin3d_t"), _CLIP),
    "vit_b_16": (
        lambda: import_torchvision().models.vit_b_16(weights=None),
        _IMAGE,
    ),
    "deit_tiny_patch16_224": (lambda: _image("deit_tiny_patch16_224"), _IMAGE),
    "mixer_s16_224": (lambda: _image("mixer_s16_224"), _IMAGE),
    "convmixer_768_32": (lambda: _image("convmixer_768_32"), _IMAGE),
}


def row(name: str, scheme: str, buffer: str, seconds: float) -> list[object]:
    """Unfused and planned MB, groups, operators that do not fit, proof or gap, CPU seconds."""
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    begun = time.process_time()
    plan = torch_getfuse.plan(
        model,
        (x,),
        buffer=buffer,
        activation_bytes=1,
        weight_bytes=1,
        scheme=scheme,
        time_limit=seconds,
        cache=False,
    )
    took = time.process_time() - begun
    graph = plan.graph
    sizes = {name: tensor.elements for name, tensor in graph.tensors.items()}
    alone = {
        op.name: sum(sizes[r.tensor] for r in op.reads) + sizes[op.writes] + op.weight_elements
        for op in graph
    }
    planned = plan.dram_bytes + sum(alone[op] for op in plan.apart)
    proof = "optimal" if plan.proof == "optimal" else f"gap {plan.gap:.1%}"
    return [
        name,
        scheme,
        sum(alone.values()) / 2**20,
        planned / 2**20,
        len(plan.groups),
        f"{len(plan.unfusable)} of {len(graph)}",
        proof,
        took,
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--schemes", nargs="+", default=["lbdf", "cascade"])
    parser.add_argument("--buffer", default="256KB")
    parser.add_argument("--seconds", type=float, default=20.0, help="time limit of each plan")
    chosen = parser.parse_args()
    heads = ["network", "scheme", "unfused MB", "planned MB", "groups", "unfusable", "proof", "s"]
    rows = []
    for name in chosen.networks:
        for scheme in chosen.schemes:
            rows.append(row(name, scheme, chosen.buffer, chosen.seconds))
            print(*rows[-1], sep="  ", flush=True)
    print(tabulate(rows, heads, tablefmt="pipe", floatfmt=".2f"))


if __name__ == "__main__":
    main()
