"""``torch-getfuse report``: plan a model, and print what its fusion groups cost and save."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_getfuse.cli.command import Command, UsageError, until_interrupted
from torch_getfuse.cli.model_argument import add_model, with_model
from torch_getfuse.cli.options import add_options, given_options
from torch_getfuse.cli.output import Destination, add_output, print_result
from torch_getfuse.reporting.suffixes import PICTURES, REPORT

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from torch_getfuse.reporting.report import Report

_PAGE = ".html"


def run(args: argparse.Namespace) -> int:
    """Plan, print and write the report; returns the exit code."""
    options = given_options(args)
    steps = options.get("scheme") == "cascade" or "plan" in options
    if args.output is not None and not steps and Path(args.output).suffix.lower() in PICTURES:
        raise UsageError(
            f"{args.output}: pictures of a report show the steps of --scheme cascade; "
            "-o FILE.html writes a page with the graph of any plan"
        )
    suffixes = REPORT if steps else [suffix for suffix in REPORT if suffix not in PICTURES]
    destination = Destination(args, "a report", suffixes, opens=_PAGE)
    if args.by != "group" and destination.suffix != ".csv":
        raise UsageError(f"--by {args.by} is for -o FILE.csv")
    made: Report
    made, code = until_interrupted(lambda: with_model(args, _make), "report")
    tell_origin(made, args)
    detail = {"full": args.full, "by_kind": args.by_kind, "modules": args.modules}
    destination.write(lambda path: made.save(path, args.by, **detail))
    print_result(made, args, **detail)
    return code


def tell_origin(report: Report, args: argparse.Namespace) -> None:
    """The model's name and the whole command line, for the page of a report."""
    report.origin = dataclasses.replace(report.origin, model=args.model, command=args.line)


def _make(
    model: torch.nn.Module | ExportedProgram, x: torch.Tensor, options: Mapping[str, Any]
) -> Report:
    from torch_getfuse import api

    return api.report(model, x, **options)


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_output(parser, REPORT, " (pictures of --scheme cascade alone)", opens=_PAGE)
    parser.add_argument(
        "--by",
        choices=("group", "operator"),
        default="group",
        help="rows of -o FILE.csv (default: group)",
    )
    text = parser.add_argument_group("the text", "on the terminal and in .txt files")
    text.add_argument(
        "--full", action="store_true", help="a row for each group, also for those that are alike"
    )
    text.add_argument(
        "--by-kind",
        action="store_true",
        help="also operators by kind: fused, alone, unfusable, MACs, weights (JSON has them)",
    )
    text.add_argument(
        "--modules",
        nargs="?",
        type=_depth,
        const=2,
        metavar="DEPTH",
        help="also the tree of modules with their groups, down to DEPTH (2 if none is given)",
    )
    add_options(parser)


def _depth(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no depth of modules; give 1 or more, and MODEL before --modules"
        )
    return int(text)


COMMAND = Command(
    "report",
    "plan a model and print what its fusion groups cost and save",
    "report torchvision:mobilenet_v2 --buffer 256KB -o report.html",
    _arguments,
    run,
)
