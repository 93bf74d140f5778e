"""``torch-getfuse run``: run a model as its plan says, and hold the counts to the plan's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch_getfuse.atomic_files import replace_text
from torch_getfuse.cli.options import planning_arguments, with_model, write

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from torch_getfuse.backend.rowwise.ledger import Ledger

TOLERANCE = 1e-4
"""Largest difference from eager, as a fraction of the largest value of an output."""


def run(args: argparse.Namespace) -> int:
    """Plan, run depth-first on random input, compare with eager, print the ledger.

    Returns:
        1 where a group counted other bytes than planned, or an output is not eager's; else 0.
    """
    ledger, difference = with_model(args, _run)
    close = difference <= TOLERANCE
    told = {**ledger.to_dict(), "difference_from_eager": difference, "equals_eager": close}
    if args.output is not None:
        write(args.output, lambda path: _save(path, told))
    if args.json:
        print(json.dumps(told, indent=1))
    else:
        ledger.show()
        print(f"largest difference from eager: {difference:.1e} of the largest value")
    return 0 if close and all(g.agrees or g.fallback for g in ledger.groups) else 1


def arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and the options of planning."""
    planning_arguments(parser)


def _save(path: str, told: dict[str, Any]) -> None:
    replace_text(path, json.dumps(told, indent=1) + "\n")


def _run(
    model: torch.nn.Module | ExportedProgram, x: torch.Tensor, options: Mapping[str, Any]
) -> tuple[Ledger, float]:
    import torch

    from torch_getfuse import api
    from torch_getfuse.backend.torch_private import tree_leaves

    plan = api.plan(model, (x,), **options)
    x = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    got, ledger = api.run_counted(model, (x,), plan)
    with torch.no_grad():
        call = model if isinstance(model, torch.nn.Module) else model.module()
        expected = call(x)
    worst = 0.0
    for one, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if isinstance(one, torch.Tensor):
            gap = (one.double() - other.double()).abs().max()
            worst = max(worst, float(gap / other.double().abs().max().clamp_min(1e-300)))
    return ledger, worst
