"""Hand the fusion groups on: each one saved as a ``.pt2`` file of its own, then loaded and run.

    python examples/export_groups.py [FOLDER]

This is what a compiler for an accelerator takes: each group is an ``ExportedProgram`` that can be
lowered by itself. The groups are run in sequence from the files, and the result is compared with
eager. ``onnx_groups.py`` and ``executorch_groups.py`` hand them to ONNX and ExecuTorch.
"""

from __future__ import annotations

import operator
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import torch_getfuse


class Net(nn.Module):
    """Two residual blocks and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU())
        self.one = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores, (N, 10)."""
        y = self.stem(x)
        y = y + self.one(y)
        y = y + self.two(y)
        return self.head(y.mean((2, 3)))


class Lowerer(fx.Interpreter):
    """Runs a split model once; hands each child's name and exported program to ``lower``."""

    def __init__(
        self, split: fx.GraphModule, lower: Callable[[str, torch.export.ExportedProgram], None]
    ) -> None:
        super().__init__(split)
        self.lower = lower

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Export the child, hand it on, and go on with its result."""
        self.lower(target, torch.export.export(self.module.get_submodule(target), args))
        return super().call_module(target, args, kwargs)


def run_lowered(order: fx.Graph, run: Callable[[str, tuple[Any, ...]], Any], x: Any) -> Any:
    """Run the groups as the graph of the split model calls them; nothing else is left to compute.

    ``run`` takes a group's name and inputs; it returns one result bare, several as a tuple.
    """
    values: dict[fx.Node, Any] = {}
    for node in order.nodes:
        args = fx.map_arg(node.args, values.__getitem__)
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "call_module":
            values[node] = run(node.target, args)
        elif node.target is operator.getitem:
            values[node] = operator.getitem(*args)
        elif node.op == "output":
            return args[0][0] if isinstance(args[0], (tuple, list)) else args[0]
        else:
            raise ValueError(f"{node.name} is outside the fusion groups")
    raise ValueError("the graph returns nothing")


def load_and_run(file: Path, args: tuple[Any, ...]) -> Any:
    """Run one group from its ``.pt2`` file."""
    return torch.export.load(file).module()(*args)


def round_trip(
    suffix: str,
    hand_on: Callable[[torch.export.ExportedProgram, Path], None],
    run: Callable[[Path, tuple[torch.Tensor, ...]], Any],
) -> None:
    """Plan, split, hand each group on to its file, run the groups from there, compare.

    The files go to the folder that the command line names, or to a new one.
    """
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="groups-"))
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(1, 3, 32, 32)
    plan = torch_getfuse.plan(model, (x,), buffer="12KB")
    print(plan)
    split = torch_getfuse.split(model, (x,), plan)
    with torch.no_grad():
        Lowerer(split, lambda name, program: hand_on(program, folder / f"{name}{suffix}")).run(x)
        # From here on only the files and the order of the groups are used.
        result = run_lowered(
            split.graph, lambda name, args: run(folder / f"{name}{suffix}", args), x
        )
        expected = model(x)
    for name, _ in split.named_children():
        file = folder / f"{name}{suffix}"
        print(f"{file.name}: {file.stat().st_size:,} bytes")
    error = float((result - expected).abs().max() / expected.abs().max())
    assert error < 1e-5, f"the groups are off by {error:.1e} of what the model computes"
    print(
        f"{len(plan.groups)} fusion groups and {len(plan.unfusable)} unfusable operators run from "
        "their files; "
        + (f"off eager by {error:.1e} at most" if error else "equal to eager, to the last bit")
    )


if __name__ == "__main__":
    round_trip(".pt2", torch.export.save, load_and_run)
