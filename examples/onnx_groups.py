"""Hand the fusion groups on to ONNX: one ``.onnx`` file per group, checked and run.

    pip install onnx onnxscript
    python examples/onnx_groups.py [FOLDER]

Many compilers for accelerators read ONNX. Here each group is a model of its own, so the compiler
sees exactly the operators that the plan runs together in the on-chip buffer. :func:`hand_on` is
all that is particular to ONNX; planning, splitting and running the groups in order is
``round_trip`` of ``export_groups.py``. Without the two packages the groups are left as ``.pt2``
files of ``torch.export``, from which the same function goes on where they are installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from export_groups import load_and_run, round_trip


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


if __name__ == "__main__":
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        round_trip(".onnx", hand_on, run_onnx)
    else:
        print("pip install onnx onnxscript: without it the groups stay files of torch.export")
        round_trip(".pt2", torch.export.save, load_and_run)
