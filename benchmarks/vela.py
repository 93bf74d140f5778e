"""Arm's Vela beside us: its figures, its cascades under our cost models, and our plans.

    python -m venv vela && vela/bin/pip install ethos-u-vela
    python benchmarks/vela.py --vela vela/bin/python

For each network an int8 TFLite file is made from the operator graph (``_tflite.py``), so that both
see the same network. Vela compiles it for a dedicated SRAM of each size; its schedule is imported
and priced (``torch_getfuse.price``). Prints the table; writes ``docs/vela.md`` with ``--write``.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate

import torch_getfuse
from torch_getfuse.importers.names import with_fused
from torch_getfuse.importers.vela import VelaOperation, cascades, read_schedule
from torch_getfuse.ir import OpGraph
from torch_getfuse.models import load_model
from torch_getfuse.partition.cost.scheme import boundary
from torch_getfuse.partition.node_set import mask_of
from torch_getfuse.price_graph import price_graph
from torch_getfuse.reporting.appraisal import Appraisal

NETWORKS = {
    "MobileNetV1": ("timm:mobilenetv1_100", "ethos-u65-256"),
    "MobileNetV2": ("torchvision:mobilenet_v2", "ethos-u65-256"),
    "MobileNetV3-S": ("torchvision:mobilenet_v3_small", "ethos-u65-256"),
    "MobileNetV3-L": ("torchvision:mobilenet_v3_large", "ethos-u65-256"),
    "ResNet-50": ("torchvision:resnet50", "ethos-u85-256"),
}
KILOBYTES = (128, 256, 512, 1024)
FOLDER = Path(__file__).resolve().parent

# Constants and feature maps in DRAM, and all of the SRAM as a cache of the NPU's own. Clocks and
# latencies are those of Ethos_U65_Mid_End in Arm's vela.ini.
CONFIG = """
[System_Config.Bench]
core_clock=500e6
axi0_port=Sram
axi1_port=Dram
Sram_clock_scale=1.0
Sram_burst_length=32
Sram_read_latency=32
Sram_write_latency=32
Dram_clock_scale=0.46875
Dram_burst_length=128
Dram_read_latency=500
Dram_write_latency=250
[Memory_Mode.Dedicated]
const_mem_area=Axi1
arena_mem_area=Axi1
cache_mem_area=Axi0
"""

NOTES = """
**Networks.** torchvision's (MobileNetV1: timm's) operator graphs, 224x224, as int8 TFLite files of
random weights (normal, standard deviation 32 of 127). ReLU and ReLU6 are fused into what they
follow, as TFLite has it; a hard sigmoid, which TFLite has not, is a sigmoid. Padding is TFLite's
SAME, which pads strided convolutions below and to the right only: sizes are the same.

**Vela.** Dedicated SRAM of each size, constants and feature maps in DRAM, optimised for performance
(the default). *fetched*: its own estimate in `*_summary_*.csv`, feature maps read and written and
weights read; it counts a map as often as blocks of output channels fetch it again. *once*: every
tensor that its schedule has in DRAM, written once and read once by each operation that reads it,
and the network's input. Its weights are of its encoded stream, which compresses them or, with its
scales, exceeds them.

**Priced.** The cascades of its schedule as groups (an operation outside of cascades is one by
itself) under our models, at 1 byte per activation and per weight, in a buffer of the same size:
under *cascade* with the best ways and resident tensors for its sequence of steps, under *LBDF* with
the weights of a group held. *k too big*: so many of its groups do not fit by that model, so that
the plan has no price there.

**Ours.** The best plan of the whole network by our model, in {seconds:g} s of search; with a star
where it is proved to be the optimum. Under LBDF operators that do not fit alone are counted at the
least that any method moves, so that its figures can be below cascade's. kB are 1000 bytes,
features / weights.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vela", metavar="PYTHON", help="a Python that has ethos-u-vela")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--kilobytes", nargs="+", type=int, default=list(KILOBYTES))
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds for each plan")
    parser.add_argument("--write", action="store_true", help="write docs/vela.md")
    args = parser.parse_args()
    python = args.vela or sys.executable
    if args.vela is None and importlib.util.find_spec("ethosu") is None:
        raise SystemExit(
            "ethos-u-vela is not installed here: pip install torch-getfuse[vela], or give "
            "--vela PYTHON of an environment that has it"
        )
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for network in args.networks:
            rows += measure(network, python, Path(folder), args.kilobytes, args.time_limit)
            print("\n".join(table(rows[-len(args.kilobytes) :]).splitlines()), flush=True)
    text = page(rows, python, args.time_limit)
    print("\n" + text)
    if args.write:
        (FOLDER.parent / "docs" / "vela.md").write_text(text + "\n", encoding="utf-8")


class CannotCompile(Exception):
    """Vela finds no place for a network's tensors in so small an SRAM."""


def measure(
    network: str, python: str, folder: Path, kilobytes: Sequence[int], seconds: float
) -> list[list[str]]:
    """The rows of one network."""
    name, accelerator = NETWORKS[network]
    model, x = load_model(name), torch.zeros(1, 3, 224, 224)
    plan = torch_getfuse.plan(
        model, (x,), method="random", budget=1, explainer=None, activation_bytes=1, weight_bytes=1
    )
    saved, lite = folder / f"{network}.json", folder / f"{network}.tflite"
    plan.save(saved)
    subprocess.run([python, FOLDER / "_tflite.py", saved, lite], check=True)
    rows = []
    for size in kilobytes:
        try:
            operations, fetched = compiled(python, lite, accelerator, size, folder)
        except CannotCompile as reason:
            rows.append([network, str(size), str(reason), *[""] * (len(HEADERS) - 3)])
            continue
        rows.append(
            [
                network,
                str(size),
                figures(*fetched),
                figures(once(plan.graph, operations), fetched[1]),
                str(len(cascades(plan.graph, operations))),
                *priced(plan.graph, operations, size, seconds),
            ]
        )
    return rows


def compiled(
    python: str, lite: Path, accelerator: str, kilobytes: int, folder: Path
) -> tuple[list[VelaOperation], tuple[int, int]]:
    """Vela's schedule, and the bytes of features and weights that it estimates."""
    config, out = folder / "vela.ini", folder / f"{lite.stem}-{kilobytes}"
    config.write_text(CONFIG, encoding="utf-8")
    command = [python, "-m", "ethosu.vela", lite, "--output-dir", out, "--config", config]
    command += ["--accelerator-config", accelerator, "--system-config", "Bench"]
    command += ["--memory-mode", "Dedicated", "--arena-cache-size", str(1024 * kilobytes)]
    command += ["--verbose-schedule", "--verbose-performance"]
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
    if run.returncode:
        reason = re.search(r"Failed to allocate tensors.*", run.stderr + run.stdout)
        if reason is None:
            raise SystemExit(f"Vela fails on {lite.stem} at {kilobytes} KB:\n{run.stderr[-2000:]}")
        raise CannotCompile(reason[0].rstrip(")"))
    per_layer = (out / f"{lite.stem}_per-layer.csv").read_text(encoding="utf-8")
    with open(out / f"{lite.stem}_summary_Bench.csv", encoding="utf-8") as file:
        (summary,) = csv.DictReader(file)
    dram = {
        what: int(float(summary[f"dram_{what}_bytes"]))
        for what in ("feature_map_read", "feature_map_write", "weight_read")
    }
    features = dram["feature_map_read"] + dram["feature_map_write"]
    return read_schedule(run.stdout, per_layer), (features, dram["weight_read"])


def once(graph: OpGraph, operations: Sequence[VelaOperation]) -> int:
    """Bytes of the tensors in DRAM: each written once, and read once by each operation."""
    dram = {operation.name for operation in operations if operation.memory == "Dram"}
    dram |= set(graph.inputs)
    total = 0
    for operation in with_fused(graph, [[operation.name] for operation in operations]):
        reads, writes = boundary(graph, mask_of(graph.index[name] for name in operation))
        moved = [*(name for name in reads if name in dram), *(n for n in writes if n in dram)]
        total += sum(graph.tensors[name].elements for name in moved)
    return total


def priced(
    graph: OpGraph, operations: list[VelaOperation], kilobytes: int, seconds: float
) -> list[str]:
    """Vela's cascades and our plan, under cascade and under LBDF."""
    found = []
    groups = cascades(graph, operations)
    for scheme in ("cascade", "lbdf"):
        made = price_graph(
            graph,
            {
                "buffer": 1024 * kilobytes,
                "scheme": scheme,
                "activation_bytes": 1,
                "weight_bytes": 1,
                "time_limit": seconds,
            },
            groups,
        )
        found += [theirs(made), ours(made)]
    return found


def theirs(made: Appraisal) -> str:
    """The price of its groups, or what keeps them from having one."""
    if made.network is None:
        wrong = sum(not group.legal for group in made.groups)
        return f"{wrong} of {len(made.groups)} too big"
    return figures(made.network.read + made.network.write, made.network.weight)


def ours(made: Appraisal) -> str:
    """Our plan."""
    star = " *" if made.best.proof == "optimal" else ""
    return figures(made.ours.read + made.ours.write, made.ours.weight) + star


def figures(features: int, weights: int) -> str:
    """``"954 / 4354"``: features and weights in kB."""
    return f"{features / 1000:.0f} / {weights / 1000:.0f}"


HEADERS = (
    "network",
    "KB",
    "Vela, fetched",
    "Vela, once",
    "groups",
    "its groups, cascade",
    "ours, cascade",
    "its groups, LBDF",
    "ours, LBDF",
)


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a pipe table."""
    return tabulate(rows, HEADERS, "pipe", disable_numparse=True)


def page(rows: Sequence[Sequence[str]], python: str, seconds: float) -> str:
    """The whole page, with versions."""
    ask = "import importlib.metadata as m; print(m.version('ethos-u-vela'))"
    vela = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout
    versions = f"ethos-u-vela {vela.strip()}, torch {torch.__version__}, " + ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torchvision", "timm")
    )
    accelerators = ", ".join(f"{name}: {how}" for name, (_, how) in NETWORKS.items())
    return "\n".join(
        [
            "# Beside Arm's Vela",
            "",
            "Printed by `python benchmarks/vela.py --vela PYTHON --write`; DRAM access of one "
            "inference in kB, features / weights.",
            "",
            table(rows),
            NOTES.format(seconds=seconds).rstrip(),
            "",
            f"**Versions.** {versions}; {accelerators}.",
        ]
    )


if __name__ == "__main__":
    main()
