"""``torch-getfuse sweep``: plan models for many buffers, schemes and methods."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch_getfuse.cli.command import Command, UsageError, until_interrupted
from torch_getfuse.cli.completers import completed_by, name_list
from torch_getfuse.cli.model_argument import add_model, quiet_torch
from torch_getfuse.cli.options import add_options, given_options, note_unused
from torch_getfuse.cli.output import Destination, add_output, print_result
from torch_getfuse.options import CHOICES, REFUSED_BY_SWEEP, SWEPT
from torch_getfuse.reporting.suffixes import SWEEP

if TYPE_CHECKING:
    import torch

    from torch_getfuse.reporting.sweep_result import Sweep

_EXAMPLES = {
    "buffer": "64KB,128KB,1MB",
    "scheme": "lbdf,brr",
    "granularity": "line,pixel",
    "method": "auto,local",
}
_PICTURE = ".svg"


def run(args: argparse.Namespace) -> int:
    """Plan every point, print and write the table.

    Returns:
        1 where a point failed, else 0.
    """
    _check_models(args.model)
    options = given_options(args)
    destination = Destination(args, "a sweep", SWEEP, opens=_PICTURE)
    inputs: tuple[torch.Tensor, ...] = ()
    lists: dict[str, Any] = {
        name: _listed(getattr(args, name)) for name in SWEPT.values() if getattr(args, name)
    }
    note_unused(args)

    from torch_getfuse.sweeps import sweep

    if args.input is not None:
        import torch

        from torch_getfuse import models

        inputs = (torch.zeros(models.parse_input(args.input)),)
    asked = {model: (model, inputs) for model in args.model}
    made: Sweep
    code: int

    def plan_all(path: str | None) -> None:
        nonlocal made, code
        with quiet_torch():
            made, code = until_interrupted(
                lambda: sweep(
                    asked, n_jobs=args.jobs, path=path, within=args.within, **lists, **options
                ),
                "sweep",
            )

    if destination.suffix == ".jsonl":
        destination.write(plan_all)  # kept point by point
    else:
        plan_all(None)
        destination.write(made.save)
    print_result(made, args)
    return code or (1 if made.errors else 0)


def _check_models(models: Sequence[str]) -> None:
    """Refuse what is a value of a list: of ``--schemes lbdf brr MODEL`` the second is a MODEL."""
    values = {choice for one in SWEPT for choice in CHOICES.get(one, ())}
    for model in models:
        if model in values or re.fullmatch(r"[0-9.]+ ?([KMG]i?)?B?", model, re.IGNORECASE):
            raise UsageError(
                f"{model!r} stands for a MODEL here; several values of one option have commas "
                f"between them, as in --buffers {_EXAMPLES['buffer']}"
            )


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, several=True)
    group = parser.add_argument_group("what is swept", "each takes values with commas between them")
    for one, several in SWEPT.items():
        flag = group.add_argument(
            f"--{several}", f"--{one}", metavar="LIST", help=f"such as {_EXAMPLES[one]}"
        )
        if one in CHOICES:
            completed_by(flag, name_list(name for name in CHOICES[one] if name))
    group.add_argument(
        "--within",
        type=float,
        metavar="PERCENT",
        help="search the smallest buffer too, to the KB, whose plan is at most so far above the "
        "floor (inputs, outputs and weights once)",
    )
    parser.add_argument(
        "-j", "--jobs", type=int, default=-1, metavar="N", help="processes (default: one per core)"
    )
    kept = "; a .jsonl is kept point by point, and taken up again after a stop"
    add_output(parser, SWEEP, kept, opens=_PICTURE)
    add_options(parser, without=(*SWEPT, *REFUSED_BY_SWEEP))
    parser.set_defaults(
        refused={f"--{name}": why for name, why in REFUSED_BY_SWEEP.items()},
        comma_lists=[f"--{name}" for name in (*SWEPT, *SWEPT.values())],
    )


COMMAND = Command(
    "sweep",
    "plan models for many buffers, schemes and methods",
    "sweep torchvision:mobilenet_v2 --buffers 64KB,128KB,1MB --schemes lbdf,brr -o sweep.jsonl",
    _arguments,
    run,
)
