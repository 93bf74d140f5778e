"""Hand the fusion groups on: each one saved as a ``.pt2`` file of its own, then loaded and run.

    python examples/export_groups.py [FOLDER]

This is what a compiler for an accelerator takes: the plan says which operators run together in
the on-chip buffer, and each group is an ``ExportedProgram`` that can be lowered by itself. The
groups are run in sequence from the files, and the result is compared with eager.
"""

from __future__ import annotations

import operator
import sys
import tempfile
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


class Saver(fx.Interpreter):
    """Runs a split model once; exports each child with the values that reach it."""

    def __init__(self, split: fx.GraphModule, folder: Path) -> None:
        super().__init__(split)
        self.folder = folder

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Export the child, save it, and go on with its result."""
        child = self.module.get_submodule(target)
        program = torch.export.export(child, args)
        torch.export.save(program, self.folder / f"{target}.pt2")
        return super().call_module(target, args, kwargs)


def run_saved(order: fx.Graph, folder: Path, x: torch.Tensor) -> Any:
    """Run the saved groups as the split graph calls them; nothing else is left to compute."""
    values: dict[fx.Node, Any] = {}
    for node in order.nodes:
        args = fx.map_arg(node.args, values.__getitem__)
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "call_module":
            program = torch.export.load(folder / f"{node.target}.pt2")
            values[node] = program.module()(*args)
        elif node.target is operator.getitem:
            values[node] = operator.getitem(*args)
        elif node.op == "output":
            return args[0]
        else:
            raise ValueError(f"{node.name} is outside the fusion groups")
    raise ValueError("the graph returns nothing")


def main() -> None:
    """Plan, split, save, load, run, compare."""
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(1, 3, 64, 64)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="groups-"))
    folder.mkdir(parents=True, exist_ok=True)

    plan = torch_getfuse.plan(model, (x,), buffer="16KB")
    split = torch_getfuse.split(model, (x,), plan)
    print(plan)
    with torch.no_grad():
        Saver(split, folder).run(x)
        # From here on only the files and the order of the groups are used.
        got = run_saved(split.graph, folder, x)
        expected = model(x)
    result = got[0] if isinstance(got, (tuple, list)) else got
    files = sorted(path.name for path in folder.glob("*.pt2"))
    print(f"saved and loaded {len(files)} groups: {', '.join(files)}")
    assert torch.equal(result, expected), "the groups do not compute what the model computes"
    print("equal to eager, to the last bit")


if __name__ == "__main__":
    main()
