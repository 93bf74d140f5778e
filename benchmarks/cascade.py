"""Cascade on 13 networks from 64 KB to 2 MB: traffic, proof, time, beside LBDF, BRR and Vela.

    python -m benchmarks.cascade [--networks resnet18 ...] [--buffers 64 256 ...] [--counted]

One byte per element, method "exact". For each network and buffer: DRAM access of the whole network
under the optimal plans of cascade, of LBDF at ``line`` and of BRR (unfusable operators at their
least), the floor that no plan goes below (inputs, outputs and weights once), steps, proof, seconds
of CPU of planning from the operator graph, and those of LBDF. Then what Arm's Vela 5.2.0 does with
the same buffer (figures of ../shared/method.md, section 12, measured once: int8, dedicated SRAM;
Vela's weights are of its encoded stream). ``--counted`` runs every step of every network at 256 KB
and compares the counted bytes and the outputs instead.

Exits with 1 where cascade is above LBDF although LBDF has no unfusable operator, where a larger
buffer costs more, or where fewer than 12 of 13 plans are proved at a buffer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import nn

from tests.networks import SIZES, network, operator_graph
from torch_getfuse import run_counted
from torch_getfuse.backend.capture.capture import capture_model
from torch_getfuse.ir import OpGraph
from torch_getfuse.models import import_torchvision
from torch_getfuse.options import Options
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.planner import plan_graph
from torch_getfuse.reporting.section import Section

BUFFERS_KB = (64, 128, 256, 512, 1024, 2048)
TIME_LIMIT = 120.0  # so that a slow point is told by its time, not by a missing proof


class Planned(NamedTuple):
    """A plan of the whole network, in bytes and seconds of CPU."""

    plan: PartitionPlan
    features: int
    weights: int
    seconds: float

    @property
    def total(self) -> int:
        return self.features + self.weights


def planned(graph: OpGraph, scheme: str, kilobytes: int) -> Planned:
    """The optimal plan of a scheme, with the unfusable operators."""
    options = Options(
        buffer=kilobytes * 1024,
        scheme=scheme,
        activation_bytes=1,
        weight_bytes=1,
        method="exact",
        time_limit=TIME_LIMIT,
    )
    started = time.process_time()
    plan = plan_graph(graph, options)
    seconds = time.process_time() - started
    dram = Section(plan).network_planned
    return Planned(plan, dram.read + dram.write, dram.weight, seconds)


def floor_of(graph: OpGraph) -> int:
    """Bytes of inputs, outputs and weights, once each."""
    names = (*graph.inputs, *dict.fromkeys(graph.outputs))
    return sum(graph.tensors[name].elements for name in names) + graph.weight_elements


def table(networks: Sequence[str], buffers: Sequence[int]) -> bool:
    """Print the comparison; whether all that must hold does."""
    rows: list[list[object]] = []
    faults: list[str] = []
    proved = dict.fromkeys(buffers, 0)
    for name in networks:
        graph = operator_graph(name)
        floor = floor_of(graph)
        before: Planned | None = None
        for kilobytes in buffers:
            ours, lbdf, brr = (planned(graph, s, kilobytes) for s in ("cascade", "lbdf", "brr"))
            plan = ours.plan
            proved[kilobytes] += plan.proof == "optimal"
            if ours.total > lbdf.total and not lbdf.plan.unfusable:
                faults.append(f"{name} at {kilobytes} KB: above LBDF")
            smaller = before is not None and not before.plan.unfusable
            if smaller and before is not None and ours.total > before.total:
                faults.append(f"{name} at {kilobytes} KB: above a smaller buffer")
            before = ours
            rows.append(
                [
                    name,
                    kilobytes,
                    *(n / 1e3 for n in (ours.total, ours.features, ours.weights)),
                    len(plan.groups),
                    len(plan.unfusable) or "",
                    "proved" if plan.proof == "optimal" else f"{plan.gap:.1%}",
                    _unfusable(lbdf),
                    _unfusable(brr),
                    floor / 1e3,
                    f"{ours.total / floor - 1:.1%}",
                    ours.seconds,
                    lbdf.seconds,
                ]
            )
            print(*rows[-1][:6], f"{ours.seconds:.2f} s", file=sys.stderr, flush=True)
    heads = ["network", "KB", "cascade kB", "features", "weights", "steps", "unfusable", "gap"]
    heads += ["LBDF kB", "BRR kB", "floor kB", "above floor", "s", "LBDF s"]
    print(tabulate(rows, heads, floatfmt=",.2f", intfmt=","))
    print("(n): with n unfusable operators, whose traffic is a lower bound")
    if len(networks) == len(SIZES):
        faults += [f"{kb} KB: {n} of {len(SIZES)} proved" for kb, n in proved.items() if n < 12]
    print("\n".join(faults) or "holds: never above LBDF, monotone, proved")
    return not faults


def _unfusable(found: Planned) -> str:
    count = len(found.plan.unfusable)
    return f"{found.total / 1e3:,.0f}" + (f" ({count})" if count else "")


# -- Vela -------------------------------------------------------------------------------------


def mobilenet_v1() -> nn.Module:
    """MobileNetV1 1.0 (arXiv 1704.04861, table 1)."""

    def block(channels: int, out: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU6(),
            nn.Conv2d(channels, out, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU6(),
        ]

    layers = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    widths = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5]
    at = 32
    for out, stride in (*widths, (1024, 2), (1024, 1)):
        layers += block(at, out, stride)
        at = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(at, 1000))


def resnet50_v1() -> nn.Module:
    """ResNet-50 with the strides in its 1x1 convolutions, as first published."""
    model: nn.Module = import_torchvision().models.resnet50(weights=None)
    for module in model.modules():
        if type(module).__name__ == "Bottleneck":
            module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)
    return model


def of_torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(import_torchvision().models, name)(weights=None)


# Network, buffer in KB, Vela's features and weights in kB.
VELA: Sequence[tuple[str, Callable[[], nn.Module], int, int, int]] = (
    ("mobilenet_v1", mobilenet_v1, 512, 954, 4354),
    ("mobilenet_v2", of_torchvision("mobilenet_v2"), 256, 1807, 3670),
    ("mobilenet_v3_small", of_torchvision("mobilenet_v3_small"), 512, 152, 2576),
    ("mobilenet_v3_large", of_torchvision("mobilenet_v3_large"), 1024, 152, 5285),
    ("resnet50_v1", resnet50_v1, 512, 19477, 34600),
)


def vela() -> None:
    """Print Vela's figures beside ours."""
    rows = []
    for name, build, kilobytes, features, weights in VELA:
        with torch.device("meta"):
            graph = capture_model(build().eval(), (torch.empty(1, 3, 224, 224),)).graph
        ours, lbdf = (planned(graph, scheme, kilobytes) for scheme in ("cascade", "lbdf"))
        both, theirs = ours.total / 1e3, features + weights
        rows.append(
            [
                *(name, kilobytes, features, weights, theirs),
                *(lbdf.features / 1e3, lbdf.weights / 1e3),
                *(ours.features / 1e3, ours.weights / 1e3, both, floor_of(graph) / 1e3),
                "below" if both < theirs else f"{both / theirs - 1:.1%} above",
            ]
        )
    heads = ["network", "KB", "Vela features", "weights", "both", "LBDF features", "weights"]
    heads += ["cascade features", "weights", "both", "floor", "cascade is"]
    print(tabulate(rows, heads, floatfmt=",.0f", intfmt=","))


# -- counted runs -----------------------------------------------------------------------------


def counted(networks: Sequence[str], kilobytes: int = 256) -> bool:
    """Run every step of every network, and compare bytes and outputs."""
    rows = []
    for name in networks:
        model, x = network(name)
        plan = plan_graph(
            capture_model(model, (x,)).graph,
            Options(buffer=kilobytes * 1024, scheme="cascade", activation_bytes=1, weight_bytes=1),
        )
        started = time.perf_counter()
        y, ledger = run_counted(model, (x,), plan)
        seconds = time.perf_counter() - started
        with torch.no_grad():
            wanted = model(x)
        outputs, right = (v["out"] if isinstance(v, dict) else v for v in (y, wanted))
        kinds = [group.way.kind for group in plan.groups if group.way is not None]
        rows.append(
            [
                name,
                *(kinds.count(kind) for kind in ("line", "stripes", "slices")),
                len(plan.resident),
                "equal" if ledger.agrees else "DIFFER",
                "allclose" if torch.allclose(outputs, right, 1e-3, 1e-3) else "DIFFER",
                seconds,
            ]
        )
        print(*rows[-1], file=sys.stderr, flush=True)
    heads = ["network", "line", "stripes", "slices", "residents", "bytes", "outputs", "s"]
    print(f"{kilobytes} KB, every step run and counted")
    print(tabulate(rows, heads, floatfmt=".1f"))
    return all(row[5:7] == ["equal", "allclose"] for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--buffers", nargs="*", type=int, default=BUFFERS_KB, help="KB")
    parser.add_argument("--counted", action="store_true", help="run the plans at 256 KB instead")
    given = parser.parse_args()
    if given.counted:
        return 0 if counted(given.networks) else 1
    holds = table(given.networks, given.buffers)
    print()
    vela()
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
