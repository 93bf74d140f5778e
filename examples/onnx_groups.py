"""Hand the fusion groups on to ONNX: one ``.onnx`` file per group, checked and run.

    pip install onnx onnxscript
    python examples/onnx_groups.py [FOLDER]

Many compilers for accelerators read ONNX. Here each group is a model of its own, so the compiler
sees exactly the operators that the plan runs together in the on-chip buffer. :func:`hand_on` is
all that is particular to ONNX. Without the two packages the groups are left as ``.pt2`` files of
``torch.export``, from which the same function goes on where they are installed.
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

NEEDED = ("onnx", "onnxscript")


def hand_on(program: torch.export.ExportedProgram, file: Path) -> None:
    """Write one group as an ONNX model, and have ONNX check it."""
    import onnx

    lowered = torch.onnx.export(program, dynamo=True, verbose=False)
    assert lowered is not None
    lowered.save(str(file))
    onnx.checker.check_model(str(file), full_check=True)


def run_onnx(file: Path, args: tuple[torch.Tensor, ...]) -> Any:
    """Run one group from its file by ONNX's reference implementation, which is slow and exact."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(str(file))
    feeds = {i.name: a.numpy() for i, a in zip(model.graph.input, args, strict=True)}
    results = [torch.from_numpy(y) for y in ReferenceEvaluator(model).run(None, feeds)]
    return results[0] if len(results) == 1 else tuple(results)


def main() -> None:
    """Plan, split, hand on, run from the files, compare."""
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(1, 3, 32, 32)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="onnx-groups-"))
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]

    def lower(name: str, program: torch.export.ExportedProgram) -> None:
        torch.export.save(program, folder / f"{name}.pt2")
        if not missing:
            hand_on(program, folder / f"{name}.onnx")

    def run(name: str, args: tuple[Any, ...]) -> Any:
        if missing:
            return torch.export.load(folder / f"{name}.pt2").module()(*args)
        return run_onnx(folder / f"{name}.onnx", args)

    plan = torch_getfuse.plan(model, (x,), buffer="12KB")
    split = torch_getfuse.split(model, (x,), plan)
    with torch.no_grad():
        Lowerer(split, lower).run(x)
        result, expected = run_lowered(split.graph, run, x), model(x)
    if missing:
        print(f"pip install {' '.join(missing)}: without it the groups stay files of torch.export")
    suffix = ".pt2" if missing else ".onnx"
    for file in sorted(folder.glob(f"*{suffix}")):
        print(f"{file.name}: {file.stat().st_size:,} bytes")
    error = float((result - expected).abs().max() / expected.abs().max())
    assert error < 1e-5, f"the groups are off by {error:.1e} of what the model computes"
    print(
        f"{len(plan.groups)} fusion groups and {len(plan.unfusable)} unfusable operators run from "
        f"their files; off eager by {error:.1e} at most"
    )


if __name__ == "__main__":
    main()
