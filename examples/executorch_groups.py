"""Hand the fusion groups on to ExecuTorch: one ``.pte`` program per group, loaded and run.

    pip install executorch
    python examples/executorch_groups.py [FOLDER]

ExecuTorch gives whole pieces of a model to a *delegate*, the compiler of one accelerator. Here the
plan says what the pieces are: :func:`hand_on` lowers one group, and ``partitioner`` is where the
delegate goes, such as ``XnnpackPartitioner()``; each ``.pte`` then holds one call of it. The rest
is ``round_trip`` of ``export_groups.py``. Without ExecuTorch the groups are left as ``.pt2`` files
of ``torch.export``, which is what it takes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from export_groups import load_and_run, round_trip


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


if __name__ == "__main__":
    if importlib.util.find_spec("executorch"):
        round_trip(".pte", hand_on, run_executorch)
    else:
        print("pip install executorch: without it the groups stay files of torch.export")
        round_trip(".pt2", torch.export.save, load_and_run)
