"""``torch-getfuse train``: the explainers of a scheme, from nothing."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from torch_getfuse.cli.command import Command, UsageError, print_json
from torch_getfuse.cli.completers import completed_by, names
from torch_getfuse.options import GRANULARITIES, Options

TRAINED = ("lbdf", "brr")
"""Cost models that explainers can be trained for."""


def run(args: argparse.Namespace) -> int:
    """Train, write the weights and print the scores; returns the exit code."""
    Options.of({"scheme": args.scheme, "granularity": args.granularity})  # before torch is there
    if args.scheme not in TRAINED:
        raise UsageError(
            f"--scheme {args.scheme}: explainers are trained for {' and '.join(TRAINED)} alone"
        )
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
        print_json(dataclasses.asdict(made))
    else:
        print(
            f"{made.scheme} {made.granularity}: {made.test.accuracy:.2%} of {made.test.samples} "
            f"test samples judged right (F1 {made.test.f1:.3f}), {made.seconds:.0f} s"
        )
        print("\n".join(made.files))
    return 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    scheme = parser.add_argument(
        "--scheme", default="lbdf", metavar="NAME", help="lbdf (default) or brr"
    )
    completed_by(scheme, names(TRAINED))
    granularity = parser.add_argument(
        "--granularity", default="line", metavar="NAME", help="of LBDF: line (default) or pixel"
    )
    completed_by(granularity, names(GRANULARITIES))
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same weights")
    data = parser.add_argument_group("data and length")
    data.add_argument("--data", metavar="DIR", help="working folder; a stopped run goes on there")
    data.add_argument("--groups", type=int, metavar="N", help="of the paper's networks, to learn")
    data.add_argument(
        "--synthetic", type=int, metavar="N", help="random networks, half as many groups again"
    )
    data.add_argument("--epochs", type=int, metavar="N", help="of the validity predictor, at most")
    data.add_argument("--jobs", type=int, metavar="N", help="processes that make the data")
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="folder for the weights, .safetensors (default: the package's own)",
    )
    output.add_argument("--json", action="store_true", help="print JSON instead of text")


COMMAND = Command(
    "train",
    "train the explainers of a scheme from nothing",
    "train --scheme lbdf --granularity line --output weights",
    _arguments,
    run,
)
