"""The command line ``torch-getfuse``.

A subcommand is a :class:`Command`: its name, help, example, arguments and a function that runs it
and returns the exit code. Options of planning come from :class:`~torch_getfuse.options.Options`,
so a new option there is a new flag here. torch is imported by the commands that need it, so that
``--help`` and mistakes in the options are answered at once.

Exit codes: 0 done; 1 a check failed; 2 wrong use, with one line that says what to type instead;
130 interrupted, with what was known by then written and printed.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch_getfuse.accelerator import format_size
from torch_getfuse.atomic_files import replace_text
from torch_getfuse.cli import accelerators_command, run_command
from torch_getfuse.cli.options import (
    MODEL_HELP,
    Command,
    UsageError,
    given_options,
    option_arguments,
    planning_arguments,
    with_model,
    write,
)
from torch_getfuse.errors import GetfuseError, Interrupted, PlanError, nearest
from torch_getfuse.explain_graph import DEFAULT as DEFAULT_EXPLAINERS
from torch_getfuse.explain_graph import check_explainers
from torch_getfuse.json_fields import read_json
from torch_getfuse.options import Options
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.plugins import EXPLAINERS
from torch_getfuse.reporting.appraisal import Appraisal
from torch_getfuse.reporting.explanation import Explanation
from torch_getfuse.reporting.report import Report
from torch_getfuse.reporting.section import Section
from torch_getfuse.reporting.sweep_result import Sweep
from torch_getfuse.sweeps import NOT_SWEPT, SINGLE, SWEPT, sweep
from torch_getfuse.version import __version__

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

PROGRAM = "torch-getfuse"
INTERRUPTED = 130  # exit code, as of a program that Ctrl-C ends


# -- interrupts ---------------------------------------------------------------------------


def _made(make: Callable[[], Any], what: str) -> tuple[Any, int]:
    """What ``make`` makes, with exit code 0; or what was known when it was interrupted, with 130.

    Args:
        make: calls the API.
        what: which attribute of :class:`Interrupted` is the same kind of thing.

    Raises:
        KeyboardInterrupt: where nothing was known yet.
    """
    try:
        return make(), 0
    except Interrupted as error:
        known = getattr(error, what)
        if known is None:
            raise
        print(f"{PROGRAM}: interrupted; this is the best {what} by then", file=sys.stderr)
        return known, INTERRUPTED


# -- report and plan ----------------------------------------------------------------------


def _report(args: argparse.Namespace) -> int:
    if args.output is not None:
        options = given_options(args)
        steps = options.get("scheme") == "cascade" or "plan" in options
        Report.check_suffix(args.output, pictures=steps, by=args.by)
    elif args.by != "group":
        raise UsageError(f"--by {args.by} is for -o FILE.csv, and there is no -o")
    made, code = _made(lambda: with_model(args, _make_report), "report")
    _tell_origin(made, args)
    detail = {"full": args.full, "by_kind": args.by_kind, "modules": args.modules}
    if args.output is not None:
        write(args.output, lambda path: made.save(path, args.by, **detail))
    if args.json:
        print(made.to_json())
    else:
        made.show(**detail)
    return code


def _report_arguments(parser: argparse.ArgumentParser) -> None:
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
    planning_arguments(parser)


def _depth(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no depth of modules; give 1 or more, and MODEL before --modules"
        )
    return int(text)


def _make_report(
    model: torch.nn.Module | ExportedProgram, x: torch.Tensor, options: Mapping[str, Any]
) -> Report:
    from torch_getfuse import api

    return api.report(model, x, **options)


def _tell_origin(report: Report, args: argparse.Namespace) -> None:
    """The model's name and the whole command line, for the page of a report."""
    report.origin = dataclasses.replace(report.origin, model=args.model, command=args.line)


def _plan(args: argparse.Namespace) -> int:
    made, code = _made(lambda: with_model(args, _make_plan), "plan")
    if args.output is not None:
        write(args.output, made.save)
    if args.json:
        print(json.dumps(made.to_dict(), indent=1))
    elif args.output is not None:
        print(f"{args.output}: {_figures(made)}{', interrupted' if code else ''}")
    else:
        print(made)
    return code


def _make_plan(
    model: torch.nn.Module | ExportedProgram, x: torch.Tensor, options: Mapping[str, Any]
) -> PartitionPlan:
    from torch_getfuse import api

    return api.plan(model, (x,), **options)


# -- explain ------------------------------------------------------------------------------


def _explain(args: argparse.Namespace) -> int:
    check_explainers(args.explainers or ())
    page = False
    if args.output is not None:
        Explanation.check_suffix(args.output)
        page = Path(args.output).suffix.lower() == ".html"

    def make(
        model: torch.nn.Module | ExportedProgram, x: torch.Tensor, options: Mapping[str, Any]
    ) -> tuple[Explanation, Report | None]:
        from torch_getfuse import api

        why = api.explain(model, (x,), args.operators, args.explainers, **options)
        return why, api.report(model, x, **options) if page else None

    made: Explanation
    report: Report | None
    made, report = with_model(args, make)
    if report is not None:
        _tell_origin(report, args)
        text = report.to_html(made)
        write(args.output, lambda path: replace_text(path, text))
    elif args.output is not None:
        write(args.output, made.save)
    if args.json:
        print(made.to_json())
    else:
        made.show()
    return 0


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--operators",
        nargs="+",
        metavar="NAME",
        help="operators, or modules that hold them (default: all that fit alone)",
    )
    parser.add_argument(
        "--explainers",
        nargs="+",
        metavar="NAME",
        help=f"explainers to ask, of {', '.join(EXPLAINERS.built_in)} or of installed packages "
        f"(default {' '.join(DEFAULT_EXPLAINERS)})",
    )
    planning_arguments(parser)


# -- price --------------------------------------------------------------------------------


def _price(args: argparse.Namespace) -> int:
    if args.output is not None:
        Appraisal.check_suffix(args.output)

    def make(
        model: torch.nn.Module | ExportedProgram, x: torch.Tensor, options: Mapping[str, Any]
    ) -> Appraisal:
        from torch_getfuse import api

        return api.price(model, (x,), args.groups, **options)

    made: Appraisal = with_model(args, make)
    if args.output is not None:
        write(args.output, made.save)
    if args.json:
        print(made.to_json())
    else:
        made.show()
    return 0 if made.legal else 1


def _price_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--groups",
        required=True,
        metavar="FILE",
        help='JSON: lists of operators or modules, [["features.0"], ...], or a plan.json, which is '
        "judged by its own options where none are given",
    )
    planning_arguments(parser)


# -- verify -------------------------------------------------------------------------------


def _verify(args: argparse.Namespace) -> int:
    form = _read_plan(args.plan)
    try:
        plan = PartitionPlan.from_dict(form).verify(args.prove, args.time_limit, args.scheme)
    except GetfuseError as error:
        if args.json:
            print(json.dumps({"ok": False, "plan": args.plan, "error": str(error)}, indent=1))
        else:
            print(f"{PROGRAM}: {args.plan}: check failed: {error}", file=sys.stderr)
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
        print(json.dumps(told, indent=1))
    else:
        print(f"{args.plan}: OK, {_figures(plan)}")
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
            f"plan {path!r}: {error} (make one with {PROGRAM} plan MODEL -o {path})"
        ) from error
    wanted = {"schema_version": int, "graph": dict, "groups": list, "unfusable": list}
    for key, kind in wanted.items():
        if not isinstance(form, dict) or not isinstance(form.get(key), kind):
            raise UsageError(
                f"{path!r} is not a plan (no {key!r}); make one with {PROGRAM} plan MODEL -o {path}"
            )
    return typing.cast("dict[str, Any]", form)


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="a plan.json")
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
    parser.add_argument(
        "--scheme",
        metavar="NAME",
        help="the plan's cost model, where it is installed under another name",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _figures(plan: PartitionPlan) -> str:
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


# -- sweep --------------------------------------------------------------------------------


def _sweep(args: argparse.Namespace) -> int:
    options = given_options(args)
    if args.output is not None:
        Sweep.check_suffix(args.output)
    inputs: tuple[torch.Tensor, ...] = ()
    if args.input is not None:
        import torch

        from torch_getfuse import models

        inputs = (torch.zeros(models.parse_input(args.input)),)
    asked = {model: (model, inputs) for model in args.model}
    lists: dict[str, Any] = {
        name: _listed(getattr(args, name)) for name in SWEPT if getattr(args, name)
    }
    made: Sweep
    code: int

    def plan_all(path: str | None) -> None:
        nonlocal made, code
        made, code = _made(
            lambda: sweep(
                asked, n_jobs=args.jobs, path=path, within=args.within, **lists, **options
            ),
            "sweep",
        )

    if args.output is None:
        plan_all(None)
    elif Path(args.output).suffix.lower() == ".jsonl":
        write(args.output, plan_all)  # kept point by point
    else:
        plan_all(None)
        write(args.output, made.save)
    if args.json:
        print(made.to_json())
    else:
        made.show()
    return code or (1 if made.errors else 0)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="+", help=MODEL_HELP)
    parser.add_argument(
        "--input", metavar="SHAPE", help="input shape of all models (default: each model's usual)"
    )
    for (name, example), one in zip(SWEPT.items(), SINGLE, strict=True):
        parser.add_argument(
            f"--{name}",
            f"--{one}",
            metavar="LIST",
            help=f"with commas, such as {example}",
        )
    parser.add_argument(
        "--within",
        type=float,
        metavar="PERCENT",
        help="search the smallest buffer too, to the KB, whose plan is at most so far above the "
        "floor (inputs, outputs and weights once)",
    )
    parser.add_argument(
        "-j", "--jobs", type=int, default=-1, metavar="N", help="processes (default: one per core)"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="write the result to FILE by its suffix: .jsonl (kept point by point, and taken up "
        "again after a stop), .json, .csv, .txt, .svg, .png",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    option_arguments(parser, NOT_SWEPT)


# -- train and bench ----------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    Options.of({"scheme": args.scheme, "granularity": args.granularity})  # before torch is there
    given = {
        name: value
        for name in ("data", "groups", "synthetic", "epochs", "jobs")
        if (value := getattr(args, name)) is not None
    }
    from torch_getfuse.explain.training.train import train

    made = train(
        args.scheme,
        args.granularity,
        args.output,
        args.seed,
        progress=sys.stderr.isatty(),
        **given,
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(made), indent=1))
    else:
        print(
            f"{made.scheme} {made.granularity}: {made.test.accuracy:.2%} of {made.test.samples} "
            f"test samples judged right (F1 {made.test.f1:.3f}), {made.seconds:.0f} s"
        )
        print("\n".join(made.files))
    return 0


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scheme", default="lbdf", metavar="VALUE", help="lbdf (default) or brr")
    parser.add_argument(
        "--granularity", default="line", metavar="VALUE", help="of LBDF: line (default) or pixel"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same weights")
    parser.add_argument(
        "--output", metavar="DIR", help="folder for the weights (default: the package's own)"
    )
    parser.add_argument("--data", metavar="DIR", help="working folder; a stopped run goes on there")
    parser.add_argument("--groups", type=int, metavar="N", help="of the paper's networks, to learn")
    parser.add_argument(
        "--synthetic", type=int, metavar="N", help="random networks, half as many groups again"
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="of the validity predictor, at most"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that make the data")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _bench(args: argparse.Namespace) -> int:
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    # Beside an installed package stand the folders of others.
    checkout = (folder.parent / "pyproject.toml").exists()
    found = sorted(folder.glob("*.py")) if checkout else []
    scripts = {path.stem: path for path in found if path.stem[0] != "_"}
    if not scripts:
        raise UsageError(
            "the benchmarks come with the sources, not with the installed package: run "
            f"pip install -e . in a checkout and {PROGRAM} bench again"
        )
    if args.name is None:
        told = {name: _first_line(path) for name, path in scripts.items()}
        width = max(map(len, told))
        lines = [f"{name:{width}}  {text}" for name, text in told.items()]
        print(json.dumps(told, indent=1) if args.json else "\n".join(lines))
        return 0
    if args.name not in scripts:
        hint = nearest(args.name, scripts) or f"; known: {', '.join(scripts)}"
        raise UsageError(f"there is no benchmark {args.name!r}{hint}")
    sys.stdout.flush()
    # Benchmarks use the graphs of the tests, which stand beside them.
    path = os.pathsep.join(filter(None, (str(folder.parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(scripts[args.name]), *args.arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    parser.add_argument("name", metavar="NAME", nargs="?", help="without it: list the benchmarks")
    parser.add_argument(
        "arguments", metavar="...", nargs=argparse.REMAINDER, help="arguments of the benchmark"
    )


# -- the program --------------------------------------------------------------------------

COMMANDS = (
    Command(
        "report",
        "plan a model and print what its fusion groups cost and save",
        "report torchvision:mobilenet_v2 --buffer 256KB -o report.html",
        _report_arguments,
        _report,
    ),
    Command(
        "plan",
        "plan a model and save the partition plan",
        "plan torchvision:mobilenet_v2 --buffer 256KB --activation-bytes 1 -o plan.json",
        planning_arguments,
        _plan,
    ),
    Command(
        "run",
        "run a model depth-first as its plan says, and count the bytes that move",
        "run torchvision:mobilenet_v2 --buffer 256KB --activation-bytes 1 --weight-bytes 1",
        run_command.arguments,
        run_command.run,
    ),
    Command(
        "explain",
        "say why operators do not fit the buffer together, and where to cut them",
        "explain torchvision:mobilenet_v2 --operators features.1 features.2 --buffer 64KB",
        _explain_arguments,
        _explain,
    ),
    Command(
        "price",
        "price a plan from outside: what is wrong with it, and how far it is from the optimum",
        "price torchvision:mobilenet_v2 --groups groups.json --buffer 256KB",
        _price_arguments,
        _price,
    ),
    Command(
        "verify",
        "check that a plan file is legal and that its figures are right",
        "verify plan.json",
        _verify_arguments,
        _verify,
    ),
    Command(
        "sweep",
        "plan models for many buffers, schemes and methods",
        "sweep torchvision:mobilenet_v2 --buffers 64KB,128KB,1MB --schemes lbdf,brr -o sweep.jsonl",
        _sweep_arguments,
        _sweep,
    ),
    Command(
        "accelerators",
        "list the presets of --accelerator, or those of a TOML file of your own",
        "accelerators chips.toml",
        accelerators_command.arguments,
        accelerators_command.run,
    ),
    Command(
        "train",
        "train the explainers of a scheme from nothing",
        "train --scheme lbdf --granularity line --output weights",
        _train_arguments,
        _train,
    ),
    Command(
        "bench",
        "run a benchmark, or list them; only from a checkout of the sources",
        "bench planning --quick",
        _bench_arguments,
        _bench,
    ),
)


class _Parser(argparse.ArgumentParser):
    """Raises :class:`UsageError` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)'", message)
        hint = nearest(wrong[1], [command.name for command in COMMANDS]) if wrong else ""
        raise UsageError(f"{message}{hint or f'; see {self.prog} --help'}")


def _parser() -> _Parser:
    parser = _Parser(
        prog=PROGRAM,
        description="Fusion groups that fit an on-chip buffer, and the DRAM access they save.",
        epilog=f"example: {PROGRAM} {COMMANDS[0].example}",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            epilog=f"example: {PROGRAM} {command.example}",
            allow_abbrev=False,
        )
        command.arguments(sub)
        sub.set_defaults(run=command.run, flags=sorted(sub._option_string_actions))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (``--help`` and ``--version`` exit)."""
    try:
        args, unknown = _parser().parse_known_args(argv)
        if unknown:
            name = unknown[0].partition("=")[0]
            hint = nearest(name, args.flags) or f"; see {PROGRAM} {args.command} --help"
            raise UsageError(f"{args.command} does not take {name!r}{hint}")
        args.line = shlex.join([PROGRAM, *(sys.argv[1:] if argv is None else argv)])
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except GetfuseError as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (report MODEL | head): not a mistake, and nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
