"""How operators of networks are read: without a rule, as a whole, or by rows; and what fits.

    python -m benchmarks.operators [--network NAME ...] [--buffer 1MB]

One line of a Markdown table per network: its operators; those without a rule; those that hold a
whole map of several rows; those with a row stream in or out that read it by rows; those that fit
the buffer alone (LBDF by lines, one byte per element). Random weights, nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torch_getfuse.accelerator import parse_size
from torch_getfuse.backend.capture.capture import capture_model
from torch_getfuse.ir import Op, OpGraph, WindowKind
from torch_getfuse.models import import_torchvision, load_model
from torch_getfuse.partition.cost.lbdf.model import Lbdf

Made = tuple[nn.Module, tuple[torch.Tensor, ...]]


def _timm(name: str, side: int = 224) -> Callable[[], Made]:
    return lambda: (load_model(f"timm:{name}"), (torch.randn(1, 3, side, side),))


def _raft() -> Made:
    import_torchvision()
    from torchvision.models.optical_flow import raft_small

    class Raft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raft = raft_small()

        def forward(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.raft(one, two, num_flow_updates=2)[-1]
            return found

    return Raft(), (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))


def _deberta() -> Made:
    """Two layers with relative positions, which are gathered."""
    from transformers import DebertaV2Config, DebertaV2Model

    class Deberta(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = DebertaV2Config(
                hidden_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=512,
                relative_attention=True,
                pos_att_type=["p2c", "c2p"],
            )
            self.encoder = DebertaV2Model(config)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.encoder(tokens).last_hidden_state
            return found

    return Deberta(), (torch.randint(0, 1000, (1, 64)),)


class _Speech(nn.Module):
    """Convolutions over a spectrogram, two recurrent layers, a classifier for each step."""

    def __init__(self, layer: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv1d(80, 128, 3, 2, 1), nn.ReLU(), nn.Conv1d(128, 128, 3, 2, 1), nn.ReLU()
        )
        self.layers = layer(128, 128, 2, batch_first=True)
        self.head = nn.Linear(128, 29)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.layers(self.front(x).transpose(1, 2))[0])
        return out.log_softmax(-1)


NETWORKS: dict[str, Callable[[], Made]] = {
    "timm swin_tiny_patch4_window7_224": _timm("swin_tiny_patch4_window7_224"),
    "torchvision shufflenet_v2_x1_0": lambda: (
        load_model("torchvision:shufflenet_v2_x1_0"),
        (torch.randn(1, 3, 224, 224),),
    ),
    "timm volo_d1_224": _timm("volo_d1_224"),
    "timm halonet26t": _timm("halonet26t", 256),
    "torchvision raft_small, 2 updates": _raft,
    "transformers DeBERTa-v2, 2 layers": _deberta,
    "spectrogram, convolutions, GRU": lambda: (_Speech(nn.GRU), (torch.randn(1, 80, 200),)),
    "spectrogram, convolutions, LSTM": lambda: (_Speech(nn.LSTM), (torch.randn(1, 80, 200),)),
}


def _holds(graph: OpGraph, op: Op) -> bool:
    return any(
        read.window.kind is WindowKind.WHOLE and graph.tensors[read.tensor].rows > 1
        for read in op.reads
    )


def _by_rows(graph: OpGraph, op: Op) -> bool:
    rows = [graph.tensors[read.tensor].rows for read in op.reads]
    return max(rows, default=1) > 1 and not _holds(graph, op)


def measure(make: Callable[[], Made], buffer_bytes: int) -> list[Any]:
    """Operators, those without a rule, held, by rows, and those that fit alone."""
    torch.manual_seed(0)
    model, inputs = make()
    captured = capture_model(model.eval(), inputs)
    graph = captured.graph
    model_of_cost = Lbdf(graph, "line", 1, 1)
    fit = sum(model_of_cost.buffer(1 << i) < buffer_bytes for i in range(len(graph)))
    return [
        len(graph),
        sum(captured.unsupported.values()),
        sum(_holds(graph, op) for op in graph),
        sum(_by_rows(graph, op) for op in graph),
        fit,
        ", ".join(f"{kind} {n}" for kind, n in sorted(captured.unsupported.items())),
    ]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--buffer", default="1MB")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = parse_size(args.buffer)
    print(
        "| network | operators | no rule | hold a map | by rows "
        f"| fit {args.buffer} alone | without a rule |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in args.network:
        begun = time.perf_counter()
        row = measure(NETWORKS[name], size)
        print(f"| {name} | {' | '.join(map(str, row))} |", flush=True)
        print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
