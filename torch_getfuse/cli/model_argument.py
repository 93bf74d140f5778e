"""The argument MODEL and its input: loading, running, and what to say where it does not run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch_getfuse.cli.command import UsageError
from torch_getfuse.cli.completers import completed_by, models
from torch_getfuse.cli.options import given_options, note_unused

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

_MODEL_HELP = (
    "torchvision:NAME, timm:NAME, transformers:NAME, package.module:callable, or a .pt2 file of "
    "torch.export"
)

_LOUD = "torch._subclasses.fake_tensor"
"""Logs a traceback of torch's own where an operator refuses its input's shape, and raises then."""


def add_model(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """MODEL and ``--input``."""
    models_argument = parser.add_argument(
        "model", metavar="MODEL", nargs="+" if several else None, help=_MODEL_HELP
    )
    completed_by(models_argument, models)
    usual = "of all models (default: each model's" if several else "(default: the model's"
    parser.add_argument(
        "--input", metavar="SHAPE", help=f"input shape like 1x3x224x224 {usual} usual)"
    )


def with_model(
    args: argparse.Namespace,
    work: Callable[[torch.nn.Module | ExportedProgram, torch.Tensor, Mapping[str, Any]], Any],
) -> Any:
    """``work(model, input, options)`` for what the command line names.

    Raises:
        UsageError: where the model itself does not run on the input.
    """
    options = given_options(args)  # before torch is imported: mistakes are told at once
    note_unused(args)

    import torch

    from torch_getfuse import models

    shape = models.parse_input(args.input) if args.input is not None else None
    model = models.load_model(args.model)
    x = torch.zeros(shape or models.default_input(args.model))
    if shape is not None and not isinstance(model, torch.nn.Module):
        # Planning takes an exported program's own shapes and would not look at this one.
        _check_runs(model, x, args.model)
    try:
        with quiet_torch():
            return work(model, x, options)
    except Exception:
        # A model that does not take this input fails in its own code, by any exception. If it
        # runs, the error stands: for the user if it is ours on purpose, else with its traceback.
        _check_runs(model, x, args.model)
        raise


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Keep torch from logging what it raises as well; whoever sets ``TORCH_LOGS`` wants the log."""
    if "TORCH_LOGS" in os.environ:
        yield
        return
    import logging

    log = logging.getLogger(_LOUD)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _check_runs(model: torch.nn.Module | ExportedProgram, x: torch.Tensor, name: str) -> None:
    """Run the model; raises :class:`UsageError` with the first line of what it raises."""
    import torch

    call = model if isinstance(model, torch.nn.Module) else model.module()
    try:
        with torch.no_grad():
            call(x)
    except Exception as error:  # whatever the user's model raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        size = "x".join(map(str, x.shape))
        raise UsageError(
            f"{name} does not run on an input of {size}: {reason}; give another --input"
        ) from error
