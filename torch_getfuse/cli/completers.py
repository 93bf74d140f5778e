"""What a shell offers for an argument, by argcomplete (an extra); nothing here imports torch.

A completer gets the word so far and returns what it may become. Names of models are read from the
sources of torchvision and timm, for importing these takes seconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch_getfuse.accelerator import ACCELERATORS

Completer = Callable[..., list[str]]

_REGISTERED = re.compile(
    r"^@register_model(?:\((?:name=\"(?P<given>\w+)\")?\))?\s*\n(?:[@ )].*\n)*def (?P<name>\w+)\(",
    re.MULTILINE,
)
"""A model of torchvision or timm: ``@register_model`` with or without a name, and its function."""


def completed_by(argument: argparse.Action, completer: Completer) -> None:
    """Have argcomplete ask ``completer`` for an argument."""
    argument.completer = completer  # type: ignore[attr-defined]


def names(known: Iterable[str]) -> Completer:
    """Offers some names."""
    known = sorted(known)
    return lambda prefix, **_: [name for name in known if name.startswith(prefix)]


def name_list(known: Iterable[str]) -> Completer:
    """Offers names for the last part of a list with commas."""
    known = sorted(known)

    def complete(prefix: str, **_: Any) -> list[str]:
        before, comma, last = prefix.rpartition(",")
        left = [name for name in known if name not in before.split(",")]
        return [f"{before}{comma}{name}" for name in left if name.startswith(last)]

    return complete


def files(*suffixes: str) -> Completer:
    """Offers folders, and files of some suffixes."""

    def complete(prefix: str, **_: Any) -> list[str]:
        folder, slash, start = prefix.rpartition("/")
        found = []
        for path in Path(f"{folder}{slash}" or ".").glob("*"):
            if path.name.startswith(start) and (start or not path.name.startswith(".")):
                if path.is_dir():
                    found.append(f"{folder}{slash}{path.name}/")
                elif path.suffix.lower() in suffixes:
                    found.append(f"{folder}{slash}{path.name}")
        return sorted(found)

    return complete


def models(prefix: str, **_: Any) -> list[str]:
    """Offers the libraries, then the models of torchvision or timm, and ``.pt2`` files."""
    library, colon = prefix.partition(":")[:2]
    if not colon:
        libraries = names(["torchvision:", "timm:", "transformers:"])
        return [*libraries(prefix), *files(".pt2")(prefix)]
    if library not in ("torchvision", "timm"):
        return []
    return names(f"{library}:{name}" for name in registered_models(library))(prefix)


def registered_models(library: str) -> set[str]:
    """Names of the models that a library registers, read from its sources; empty without it."""
    spec = importlib.util.find_spec(library)
    found = set()
    for location in (spec and spec.submodule_search_locations) or ():
        for path in sorted((Path(location) / "models").rglob("*.py")):
            for match in _REGISTERED.finditer(path.read_text(encoding="utf-8")):
                found.add(match["given"] or match["name"])
    return found


def accelerators(prefix: str, **_: Any) -> list[str]:
    """Offers the presets, and TOML files."""
    return [*names(ACCELERATORS)(prefix), *files(".toml")(prefix)]
