"""``torch-getfuse explain``: why operators do not fit the buffer together."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch_getfuse.cli.command import Command
from torch_getfuse.cli.completers import completed_by, names
from torch_getfuse.cli.model_argument import add_model, with_model
from torch_getfuse.cli.options import COST_MODEL, HARDWARE, PINS, SEARCH, add_options
from torch_getfuse.cli.output import Destination, add_output, print_result
from torch_getfuse.cli.report_command import tell_origin
from torch_getfuse.plugins import ASKED_EXPLAINERS, EXPLAINERS, check_explainers
from torch_getfuse.reporting.suffixes import EXPLANATION

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from torch_getfuse.reporting.explanation import Explanation
    from torch_getfuse.reporting.report import Report

_PAGE = ".html"
_CUT = ("explainer", "split_rule", "seed")


def run(args: argparse.Namespace) -> int:
    """Explain, print and write the explanation; returns the exit code."""
    check_explainers(args.explainers or ())
    destination = Destination(args, "an explanation", EXPLANATION, opens=_PAGE)

    def make(
        model: torch.nn.Module | ExportedProgram, x: torch.Tensor, options: Mapping[str, Any]
    ) -> tuple[Explanation, Any]:
        from torch_getfuse import api

        why = api.explain(model, (x,), args.operators, args.explainers, **options)
        return why, why.report() if why.report and destination.suffix == _PAGE else None

    made: Explanation
    report: Report | None
    made, report = with_model(args, make)
    made = dataclasses.replace(made, model=args.model)
    if report is not None:
        from torch_getfuse.atomic_files import replace_text

        tell_origin(report, args)
        text = report.to_html(made)
        destination.write(lambda path: replace_text(path, text))
    else:
        destination.write(made.save)
    print_result(made, args)
    return 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--operators",
        nargs="+",
        metavar="NAME",
        help="operators, or modules that hold them (default: all that fit alone)",
    )
    asked = parser.add_argument(
        "--explainers",
        nargs="+",
        metavar="NAME",
        help="explainers that score the edges, side by side (--explainer is the one whose edges "
        f"are cut): {', '.join(EXPLAINERS.built_in)}, or of installed packages "
        f"(default: {' '.join(ASKED_EXPLAINERS)})",
    )
    completed_by(asked, names(EXPLAINERS.built_in))
    add_output(parser, EXPLANATION, opens=_PAGE)
    add_options(
        parser,
        {
            "hardware": HARDWARE,
            "cost model": [name for name in COST_MODEL if name != "residency"],
            "the cut": _CUT,
            "the plan beside it, of .html pages": [
                *("residency", *PINS),
                *(name for name in SEARCH if name not in _CUT),
            ],
        },
    )


COMMAND = Command(
    "explain",
    "say why operators do not fit the buffer together, and where to cut them",
    "explain torchvision:mobilenet_v2 --operators features.1 features.2 --buffer 64KB",
    _arguments,
    run,
)
