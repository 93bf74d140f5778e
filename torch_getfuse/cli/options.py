"""The command line's options: flags from :class:`~torch_getfuse.options.Options`, in groups."""

from __future__ import annotations

import argparse
import functools
import inspect
import re
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch_getfuse.accelerator import ACCELERATORS, format_size
from torch_getfuse.cli.command import notice
from torch_getfuse.cli.completers import Completer, accelerators, completed_by, files, names
from torch_getfuse.options import CHOICES, Options

OPTION = "option_"
HARDWARE = ("buffer", "accelerator", "activation_bytes", "weight_bytes", "align_channels")
COST_MODEL = ("scheme", "granularity", "residency", "slice_channels")
PINS = ("keep", "split_before", "together")
SEARCH = (
    *("method", "explainer", "split_rule", "budget", "seed", "time_limit"),
    *("plan", "progress"),
)
PLANNING: Mapping[str, Sequence[str]] = {
    "hardware": HARDWARE,
    "cost model": COST_MODEL,
    "pins": PINS,
    "search": SEARCH,
}
"""Titles of ``--help`` -> the options below them, of a command that plans."""
RUNNING = ("inner", "backward", "cache", "strict")
"""Options of torch.compile alone. The commands that plan take and check them, so that one set of
options serves both, and say that they have no effect; their help does not show them."""
LISTS = {"keep": "extend", "split_before": "extend", "together": "append"}
"""Options that are lists -> what argparse does with their names; ``--together`` is one set."""
_METAVARS = {
    "buffer": "SIZE",
    "accelerator": "NAME",
    "activation_bytes": "BYTES",
    "weight_bytes": "BYTES",
    "align_channels": "N",
    "slice_channels": "N",
    "scheme": "NAME",
    "method": "NAME",
    "explainer": "NAME",
    "split_rule": "NAME",
    "granularity": "NAME",
    "budget": "PLANS",
    "seed": "N",
    "time_limit": "SECONDS",
    "plan": "FILE",
    "progress": "WHEN",
}
_TEXTS = {
    "accelerator": "a preset of buffer, element widths and alignment, where these are not given: "
    f"{', '.join(ACCELERATORS)}; or chips.toml:name for one of a TOML file (chips.toml for its "
    "only one)",
    "activation_bytes": "of an element of a feature map, in steps of 1/8: 0.5 for 4 bits",
    "weight_bytes": "of a weight, in steps of 1/8; 0: weights are read where they are stored "
    "(flash), and cost neither DRAM access nor buffer",
    "align_channels": "channels of stored feature maps are padded to a multiple of this, as on "
    "Ethos-U to 16",
    "scheme": "the cost model",
    "method": "the search",
    "explainer": "says which edges make a group too big; none: split at random",
    "together": "operators, or modules, that must share one group; given again for another set",
    "plan": "a saved plan to use instead of searching",
    "progress": "show a bar: true, false, or auto: on a terminal, after 2 s",
}
"""Help where the text of ``Options`` has what Python alone can give, or several options in one."""
_PLAIN = Options()
_DEFAULTS = {
    "buffer": f"the accelerator's, or {format_size(_PLAIN.buffer_bytes).replace(' ', '')}",
    "activation_bytes": "the accelerator's, or as each tensor is stored",
    "weight_bytes": "the accelerator's, or as stored",
    "align_channels": "the accelerator's, or 1",
    "time_limit": f"{_PLAIN.time_limit:g}",
}
"""Defaults that are no single value, or are typed in another way."""
_COMPLETERS: Mapping[str, Completer] = {
    "accelerator": accelerators,
    "plan": files(".json"),
    "progress": names(("auto", "true", "false")),
}


def add_options(
    parser: argparse.ArgumentParser,
    groups: Mapping[str, Sequence[str]] = PLANNING,
    without: Collection[str] = (),
    hidden: Collection[str] = RUNNING,
    choices: Mapping[str, Sequence[str | None]] = CHOICES,
) -> None:
    """One flag per option of planning.

    Args:
        groups: titles of argument groups -> their options.
        without: options that the command does not take.
        hidden: options that it takes, and does not show in its help.
        choices: names that the help tells of an option.
    """
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for name in options:
            if name not in without:
                _add_option(group.add_argument, name, name in hidden, choices.get(name, ()))
    for name in hidden:
        if name not in without and not any(name in options for options in groups.values()):
            _add_option(parser.add_argument, name, True, ())


def _add_option(
    add: Callable[..., argparse.Action], name: str, hidden: bool, choices: Sequence[str | None]
) -> None:
    text = argparse.SUPPRESS if hidden else _help_text(name, choices)
    flag, dest = "--" + name.replace("_", "-"), OPTION + name
    if _hints()[name] is bool:
        add(
            flag,
            action=argparse.BooleanOptionalAction,
            dest=dest,
            default=argparse.SUPPRESS,
            help=text,
        )
        return
    repeated: dict[str, Any] = {"nargs": "+", "action": LISTS[name]} if name in LISTS else {}
    flagged = add(
        flag,
        metavar="NAME" if name in LISTS else _METAVARS.get(name, "VALUE"),
        dest=dest,
        default=argparse.SUPPRESS,
        help=text,
        **repeated,
    )
    if name in CHOICES:
        completed_by(flagged, names(map(_typed, CHOICES[name])))
    elif name in _COMPLETERS:
        completed_by(flagged, _COMPLETERS[name])


def _help_text(name: str, choices: Sequence[str | None]) -> str:
    text = _TEXTS.get(name) or _option_help()[name]
    told = [", ".join(map(_typed, choices))] if choices else []
    default = _DEFAULTS.get(name, getattr(_PLAIN, name))
    if default is not None and name not in LISTS:
        told.append(f"default: {default}")
    return (f"{text} ({'; '.join(told)})" if told else text).replace("%", "%%")


def _typed(choice: str | None) -> str:
    """A value as people type it."""
    return "none" if choice is None else choice


def note_unused(args: argparse.Namespace) -> None:
    """Say of the options that were given and have no effect that they have none."""
    given = [f"--{name}" for name in RUNNING if hasattr(args, OPTION + name)]
    if given:
        verb = "is an option" if len(given) == 1 else "are options"
        notice(f"{', '.join(given)} {verb} of torch.compile, and without effect on {args.command}")


@functools.cache
def _option_help() -> dict[str, str]:
    """Option -> its text in the docstring of ``Options``, where each is described once."""
    text = inspect.getdoc(Options) or ""
    _, _, attributes = text.partition("Attributes:\n")
    found = {}
    for listed, told in re.findall(r"^    ([a-z_, ]+): (.+(?:\n      +.+)*)", attributes, re.M):
        for name in listed.split(", "):
            found[name] = " ".join(told.replace("``", "").split()).rstrip(".")
    return found


@functools.cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(Options)


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as values; :class:`Options` judges them."""
    given = {
        name.removeprefix(OPTION): value
        for name, value in vars(args).items()
        if name.startswith(OPTION)
    }
    options = {name: _value(value, _hints()[name]) for name, value in given.items()}
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
