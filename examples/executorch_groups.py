"""Hand the fusion groups on to ExecuTorch: one ``.pte`` program per group, loaded and run.

    pip install executorch
    python examples/executorch_groups.py [FOLDER]

ExecuTorch gives whole pieces of a model to a *delegate*, the compiler of one accelerator. Here the
plan says what the pieces are: :func:`hand_on` lowers one group, and ``partitioner`` is where the
delegate goes, such as ``XnnpackPartitioner()``; each ``.pte`` then holds one call of it. Without
ExecuTorch the groups are left as ``.pt2`` files of ``torch.export``, which is what it takes.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from export_groups import Lowerer, Net, run_lowered

import torch_getfuse


def hand_on(program: torch.export.ExportedProgram, file: Path, partitioner: Any = None) -> None:
    """Write one group as an ExecuTorch program.

    Args:
        program: the group.
        file: where to write it.
        partitioner: of the delegate that runs the group; ``None`` for ExecuTorch's own kernels.
    """
    from executorch.exir import to_edge_transform_and_lower

    delegates = None if partitioner is None else [partitioner]
    edge = to_edge_transform_and_lower(program, partitioner=delegates)
    file.write_bytes(edge.to_executorch().buffer)


def run_executorch(file: Path, args: tuple[torch.Tensor, ...]) -> Any:
    """Run one group from its file by ExecuTorch's runtime."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(file).load_method("forward")
    assert method is not None, f"{file.name} has no method forward"
    # Results are in the memory of the program, which goes with it.
    results = [y.clone() for y in method.execute([a.contiguous() for a in args])]
    return results[0] if len(results) == 1 else tuple(results)


def main() -> None:
    """Plan, split, hand on, run from the files, compare."""
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(1, 3, 32, 32)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="pte-groups-"))
    folder.mkdir(parents=True, exist_ok=True)
    there = importlib.util.find_spec("executorch") is not None

    def lower(name: str, program: torch.export.ExportedProgram) -> None:
        torch.export.save(program, folder / f"{name}.pt2")
        if there:
            hand_on(program, folder / f"{name}.pte")

    def run(name: str, args: tuple[Any, ...]) -> Any:
        if there:
            return run_executorch(folder / f"{name}.pte", args)
        return torch.export.load(folder / f"{name}.pt2").module()(*args)

    plan = torch_getfuse.plan(model, (x,), buffer="12KB")
    split = torch_getfuse.split(model, (x,), plan)
    with torch.no_grad():
        Lowerer(split, lower).run(x)
        result, expected = run_lowered(split.graph, run, x), model(x)
    if not there:
        print("pip install executorch: without it the groups stay files of torch.export")
    for file in sorted(folder.glob("*.pte" if there else "*.pt2")):
        print(f"{file.name}: {file.stat().st_size:,} bytes")
    error = float((result - expected).abs().max() / expected.abs().max())
    assert error < 1e-5, f"the groups are off by {error:.1e} of what the model computes"
    print(
        f"{len(plan.groups)} fusion groups and {len(plan.unfusable)} unfusable operators run from "
        f"their files; off eager by {error:.1e} at most"
    )


if __name__ == "__main__":
    main()
