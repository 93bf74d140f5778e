"""``torch-getfuse price``: price a plan from outside."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch_getfuse.cli.command import Command
from torch_getfuse.cli.completers import completed_by, files
from torch_getfuse.cli.model_argument import add_model, with_model
from torch_getfuse.cli.options import add_options
from torch_getfuse.cli.output import Destination, add_output, print_result
from torch_getfuse.reporting.suffixes import APPRAISAL

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from torch_getfuse.reporting.appraisal import Appraisal


def run(args: argparse.Namespace) -> int:
    """Price, print and write the appraisal.

    Returns:
        1 where the plan is not legal, else 0.
    """
    destination = Destination(args, "an appraisal", APPRAISAL)

    def make(
        model: torch.nn.Module | ExportedProgram, x: torch.Tensor, options: Mapping[str, Any]
    ) -> Appraisal:
        from torch_getfuse import api

        return api.price(model, (x,), args.groups, **options)

    made: Appraisal = dataclasses.replace(with_model(args, make), model=args.model)
    destination.write(made.save)
    print_result(made, args)
    return 0 if made.legal else 1


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    groups = parser.add_argument(
        "--groups",
        required=True,
        metavar="FILE",
        help='JSON: lists of operators or modules, [["features.0"], ...], or a plan.json, which is '
        "judged by its own options where none are given",
    )
    completed_by(groups, files(".json"))
    add_output(parser, APPRAISAL)
    add_options(parser)


COMMAND = Command(
    "price",
    "price a plan from outside: what is wrong with it, and how far it is from the optimum",
    "price torchvision:mobilenet_v2 --groups groups.json --buffer 256KB",
    _arguments,
    run,
)
