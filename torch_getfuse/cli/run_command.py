"""``torch-getfuse run``: run a model as its plan says, and hold the counts to the plan's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch_getfuse.cli.command import Command, print_json
from torch_getfuse.cli.model_argument import add_model, with_model
from torch_getfuse.cli.options import RUNNING, add_options
from torch_getfuse.cli.output import Destination, add_output
from torch_getfuse.options import CHOICES

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from torch_getfuse.backend.rowwise.ledger import Ledger

_SUFFIXES = (".json",)
TOLERANCE = 1e-4
"""Largest difference from eager, as a fraction of the largest value of an output."""


def run(args: argparse.Namespace) -> int:
    """Plan, run depth-first on random input, compare with eager, print the ledger.

    Returns:
        1 where a group counted other bytes than planned, or an output is not eager's; else 0.
    """
    destination = Destination(args, "a ledger", _SUFFIXES)
    ledger, difference = with_model(args, _run)
    close = difference <= TOLERANCE
    told = {**ledger.to_dict(), "difference_from_eager": difference, "equals_eager": close}
    from torch_getfuse.atomic_files import replace_text

    destination.write(lambda path: replace_text(path, json.dumps(told, indent=1) + "\n"))
    if args.json:
        print_json(told)
    else:
        ledger.show()
        print(f"largest difference from eager: {difference:.1e} of the largest value")
    return 0 if close and all(g.agrees or g.fallback for g in ledger.groups) else 1


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


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_output(parser, _SUFFIXES)
    add_options(
        parser,
        # Plans in rows alone can run: of LBDF those in lines.
        hidden=("granularity", *RUNNING),
        choices={**CHOICES, "scheme": ("lbdf", "cascade")},
    )


COMMAND = Command(
    "run",
    "run a model depth-first as its plan says, and count the bytes that move",
    "run torchvision:mobilenet_v2 --buffer 256KB --activation-bytes 1 --weight-bytes 1",
    _arguments,
    run,
)
