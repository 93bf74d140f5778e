"""``torch-getfuse plan``: plan a model, and save the partition plan."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch_getfuse.accelerator import format_size
from torch_getfuse.cli.command import Command, print_json, until_interrupted
from torch_getfuse.cli.model_argument import add_model, with_model
from torch_getfuse.cli.options import add_options
from torch_getfuse.cli.output import Destination, add_output

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from torch_getfuse.partition.plan import PartitionPlan

_SUFFIXES = (".json",)


def run(args: argparse.Namespace) -> int:
    """Plan, write the plan, and print it or its figures in one line; returns the exit code."""
    destination = Destination(args, "a plan", _SUFFIXES)
    made: PartitionPlan
    made, code = until_interrupted(lambda: with_model(args, _make), "plan")
    destination.write(made.save)
    if args.json:
        print_json(made.to_dict())
    elif args.output is not None:
        print(f"{args.output}: {figures(made)}{', interrupted' if code else ''}")
    else:
        print(made)
    return code


def figures(plan: PartitionPlan) -> str:
    """What a plan costs, and what is known of its optimum, in one line."""
    from torch_getfuse.reporting.section import Section

    proof = {
        "optimal": f"optimal ({plan.standing})",
        "bound": f"at most {plan.gap:.1%} above the optimum ({plan.standing})",
    }.get(plan.proof or "", "no bound proved")
    unfusable = f", {len(plan.unfusable)} unfusable operators" if plan.unfusable else ""
    network = ""
    if plan.apart:
        network = f"; {format_size(Section(plan).network_planned.total)} with the unfusable ones"
    elif plan.unfusable:
        network = "; unfusable ones at the least that they move"
    groups = "steps" if any(group.way for group in plan.groups) else "fusion groups"
    stay = f", {len(plan.resident)} tensors stay on chip" if plan.resident else ""
    return (
        f"{len(plan.groups)} {groups}{unfusable}, {plan.dram_bytes} B of DRAM access "
        f"({format_size(plan.dram_bytes)}{network}), {proof}, buffer {plan.max_buffer_bytes} of "
        f"{plan.buffer_bytes} B{stay}"
    )


def _make(
    model: torch.nn.Module | ExportedProgram, x: torch.Tensor, options: Mapping[str, Any]
) -> PartitionPlan:
    from torch_getfuse import api

    return api.plan(model, (x,), **options)


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_output(parser, _SUFFIXES)
    add_options(parser)


COMMAND = Command(
    "plan",
    "plan a model and save the partition plan",
    "plan torchvision:mobilenet_v2 --buffer 256KB --activation-bytes 1 -o plan.json",
    _arguments,
    run,
)
