"""The command line's options: flags from :class:`~torch_getfuse.options.Options`, and models."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch_getfuse.accelerator import format_size
from torch_getfuse.errors import GetfuseError
from torch_getfuse.options import CHOICES, Options

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

OPTION = "option_"
RUNNING = ("inner", "backward", "cache", "strict")
"""Options of torch.compile alone: the commands check them and have no other use for them."""
LISTS = {"keep": "extend", "split_before": "extend", "together": "append"}
"""Options that are lists -> what argparse does with their names; ``--together`` is one set."""
MODEL_HELP = (
    "torchvision:NAME, timm:NAME, transformers:NAME, package.module:callable, or a .pt2 file of "
    "torch.export"
)


class UsageError(GetfuseError):
    """The command line itself, or a file that it names, cannot be used."""


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand.

    Attributes:
        name, help, example: what ``--help`` shows.
        arguments: adds its arguments to its parser.
        run: does the work and returns the exit code.
    """

    name: str
    help: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def planning_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, its input, where the result goes, and the options."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--input", metavar="SHAPE", help="input shape like 1x3x224x224 (default: the model's usual)"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="write the result to FILE (a plan: JSON; else by suffix)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    option_arguments(parser)


def option_arguments(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """One flag per option of planning, but for those in ``without``."""
    planning = parser.add_argument_group("options of planning")
    running = parser.add_argument_group(
        "options of torch.compile",
        "checked, so that one set of options serves both; no effect here",
    )
    hints = typing.get_type_hints(Options)
    help_of = _option_help()
    defaults = Options()
    for option in dataclasses.fields(Options):
        if option.name in without:
            continue
        flag = "--" + option.name.replace("_", "-")
        text = help_of.get(option.name, "").replace("%", "%%")
        if option.name in CHOICES:
            text += f" ({', '.join(str(choice) for choice in CHOICES[option.name])})"
        group = running if option.name in RUNNING else planning
        default = getattr(defaults, option.name)
        if option.name == "buffer":
            default = format_size(defaults.buffer_bytes).replace(" ", "")  # as people type it
        if default is not None and option.name not in LISTS:
            text += f" (default {default})"
        if option.name in LISTS:
            group.add_argument(
                flag,
                metavar="NAME",
                nargs="+",
                action=LISTS[option.name],
                dest=OPTION + option.name,
                default=argparse.SUPPRESS,
                help=text.strip(),
            )
        elif hints[option.name] is bool:
            group.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                dest=OPTION + option.name,
                default=argparse.SUPPRESS,
                help=text.strip(),
            )
        else:
            group.add_argument(
                flag,
                metavar="VALUE",
                dest=OPTION + option.name,
                default=argparse.SUPPRESS,
                help=text.strip(),
            )


def _option_help() -> dict[str, str]:
    """Option -> its text in the docstring of ``Options``, where each is described once."""
    text = inspect.getdoc(Options) or ""
    _, _, attributes = text.partition("Attributes:\n")
    found = {}
    for names, told in re.findall(r"^    ([a-z_, ]+): (.+(?:\n      +.+)*)", attributes, re.M):
        for name in names.split(", "):
            found[name] = " ".join(told.replace("``", "").split()).rstrip(".")
    return found


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as values; :class:`Options` judges them."""
    hints = typing.get_type_hints(Options)
    given = {
        name.removeprefix(OPTION): value
        for name, value in vars(args).items()
        if name.startswith(OPTION)
    }
    options = {name: _value(value, hints[name]) for name, value in given.items()}
    Options.of(options)
    return options


def _value(text: str | bool | list[Any], hint: Any) -> Any:
    """``text`` as the most specific type that ``hint`` allows, else as it stands."""
    if isinstance(text, (bool, list)):
        return text
    members = typing.get_args(hint) or (hint,)
    if type(None) in members and text.lower() == "none":
        return None
    if bool in members and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if int in members and re.fullmatch(r"[+-]?[0-9]+", text):
        return int(text)
    if float in members and re.fullmatch(r"[+-]?[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?", text):
        return float(text)
    return text


def with_model(
    args: argparse.Namespace,
    work: Callable[[torch.nn.Module | ExportedProgram, torch.Tensor, Mapping[str, Any]], Any],
) -> Any:
    """``work(model, input, options)`` for what the command line names.

    Raises:
        UsageError: where the model itself does not run on the input.
    """
    options = given_options(args)  # before torch is imported: mistakes are told at once

    import torch

    from torch_getfuse import models

    shape = models.parse_input(args.input) if args.input is not None else None
    model = models.load_model(args.model)
    x = torch.zeros(shape or models.default_input(args.model))
    if shape is not None and not isinstance(model, torch.nn.Module):
        # Planning takes an exported program's own shapes and would not look at this one.
        check_runs(model, x, args.model)
    try:
        return work(model, x, options)
    except Exception:
        # A model that does not take this input fails in its own code, by any exception. If it
        # runs, the error stands: for the user if it is ours on purpose, else with its traceback.
        check_runs(model, x, args.model)
        raise


def check_runs(model: torch.nn.Module | ExportedProgram, x: torch.Tensor, name: str) -> None:
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


def write(path: str, save: Callable[[str], None]) -> None:
    """``save(path)``; raises :class:`UsageError` where the file cannot be written."""
    try:
        save(path)
    except OSError as error:
        raise UsageError(
            f"cannot write {path!r}: {error.strerror}; name another file with -o"
        ) from error
