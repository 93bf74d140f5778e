"""``torch-getfuse verify``: check that a plan file is legal and its figures are right."""

from __future__ import annotations

import argparse
import typing
from typing import Any

from torch_getfuse.cli.command import PROGRAM, Command, UsageError, notice, print_json
from torch_getfuse.cli.completers import completed_by, files, names
from torch_getfuse.cli.plan_command import figures
from torch_getfuse.errors import GetfuseError, PlanError
from torch_getfuse.json_fields import read_json
from torch_getfuse.plugins import SCHEMES


def run(args: argparse.Namespace) -> int:
    """Check a plan file and print its figures.

    Returns:
        1 where the check fails, else 0.
    """
    form = _read_plan(args.plan)

    from torch_getfuse.partition.plan import PartitionPlan

    try:
        plan = PartitionPlan.from_dict(form).verify(args.prove, args.time_limit, args.scheme)
    except GetfuseError as error:
        if args.json:
            print_json({"ok": False, "plan": args.plan, "error": str(error)})
        else:
            notice(f"{args.plan}: check failed: {error}")
        return 1
    if args.json:
        told = {
            "ok": True,
            "plan": args.plan,
            "fingerprint": plan.graph.fingerprint,
            "groups": len(plan.groups),
            "dram_bytes": plan.dram_bytes,
            "lower_bound_bytes": plan.lower_bound_bytes,
            "proof": plan.proof,
            "claimed_by": plan.claimed_by,
            "max_buffer_bytes": plan.max_buffer_bytes,
            "buffer_bytes": plan.buffer_bytes,
        }
        print_json(told)
    else:
        print(f"{args.plan}: OK, {figures(plan)}")
    return 0


def _read_plan(path: str) -> dict[str, Any]:
    """The JSON object of a plan file.

    Raises:
        UsageError: where the file cannot be read, is no JSON (truncated), or is no plan at all.
    """
    try:
        form = read_json(path)
    except PlanError as error:
        raise UsageError(
            f"plan {path!r}: {error} (make one with {PROGRAM} plan MODEL -o plan.json)"
        ) from error
    wanted = {"schema_version": int, "graph": dict, "groups": list, "unfusable": list}
    for key, kind in wanted.items():
        if not isinstance(form, dict) or not isinstance(form.get(key), kind):
            raise UsageError(
                f"{path!r} is not a plan (no {key!r}); make one with {PROGRAM} plan MODEL "
                "-o plan.json"
            )
    return typing.cast("dict[str, Any]", form)


def _arguments(parser: argparse.ArgumentParser) -> None:
    plan = parser.add_argument("plan", metavar="PLAN", help="a plan.json")
    completed_by(plan, files(".json"))
    parser.add_argument(
        "--prove",
        action="store_true",
        help="compute the lower bound again too; without it, the file's is printed as claimed",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="for --prove (default: 10)",
    )
    scheme = parser.add_argument(
        "--scheme",
        metavar="NAME",
        help="the plan's cost model, where it is installed under another name",
    )
    completed_by(scheme, names(SCHEMES.built_in))
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


COMMAND = Command(
    "verify",
    "check that a plan file is legal and that its figures are right",
    "verify plan.json",
    _arguments,
    run,
)
