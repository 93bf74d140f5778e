"""Presets of one's own, from a TOML file: ``accelerator="chips.toml:name"``.

A file has one table per preset, with the keys of :data:`KEYS`. It may come from anyone: its size is
bounded, nothing is coerced, and messages name the file, the preset, the key and the value.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from torch_getfuse.accelerator import Accelerator, accelerator, parse_size
from torch_getfuse.errors import OptionError, nearest, shown, some_of
from torch_getfuse.json_fields import read_regular
from torch_getfuse.limits import MOST

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NEEDED = ("buffer", "activation_bytes", "weight_bytes")
KEYS = (
    *NEEDED,
    "align_channels",
    "dram_bytes_per_second",
    "dram_picojoules_per_byte",
    "macs_per_second",
    "source",
)
"""Keys of a preset: ``buffer`` as on the command line, the others as of :class:`Accelerator`."""

_LARGEST_FILE = 2**20
"""Bytes of the largest file that is read."""
_LONGEST = 60
"""Characters of the longest name, and of the longest size."""
_IN_FILE = re.compile(r"(.+?\.toml)(?::(.*))?", re.IGNORECASE | re.DOTALL)


def find_accelerator(text: str) -> Accelerator:
    """The preset that ``accelerator=`` names.

    Args:
        text: a preset of this package (``"eyeriss-v1"``), the only one of a file
            (``"chips.toml"``), or one of several (``"chips.toml:name"``).

    Raises:
        OptionError: for an unknown name, and for what is wrong with the file.
    """
    match = _IN_FILE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return accelerator(text)
    path, name = match.groups()
    presets = load_accelerators(path)
    names = some_of(list(presets), 8)
    if name is None:
        if len(presets) > 1:
            raise OptionError(
                f"{path!r} has {len(presets)} presets: {names}; name one: "
                f"{f'{path}:{next(iter(presets))}'!r}"
            )
        (name,) = presets
    if name not in presets:
        hint = nearest(name, presets) or f"; it has {names}"
        raise OptionError(f"{path!r} has no preset {name!r}{hint}")
    return presets[name]


def load_accelerators(path: str) -> dict[str, Accelerator]:
    """All presets of a TOML file, by name, in its order; there is at least one.

    Raises:
        OptionError: where the file cannot be read, is larger than 1 MB, is no TOML in UTF-8, has no
            preset, or has one with an unknown key, without a needed one or with a wrong value.
    """
    try:
        data = read_regular(path, _LARGEST_FILE)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise OptionError(
            f"accelerators {path!r} cannot be read: {reason}; check the path"
        ) from error
    if len(data) > _LARGEST_FILE:
        raise OptionError(f"{path!r} is larger than {_LARGEST_FILE} B, the most that is read")
    try:
        form = tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise OptionError(f"{path!r} is no text file; presets are TOML in UTF-8") from error
    except RecursionError as error:
        raise OptionError(f"{path!r} is no file of presets: it is nested too deep") from error
    except ValueError as error:  # TOMLDecodeError with line and column, or a number too long
        raise OptionError(f"{path!r} is no TOML: {error}") from error
    if not form:
        raise OptionError(
            f"{path!r} has no preset; write one: a line [name], then {', '.join(NEEDED)} = ..."
        )
    return {name: _preset(path, name, table) for name, table in form.items()}


def _preset(path: str, name: str, table: object) -> Accelerator:
    if not isinstance(table, Mapping):
        raise OptionError(
            f"{path!r}: {shown(name)} = {shown(table)} stands outside a preset; write a line "
            "[name] above it"
        )
    where = f"{path!r}, preset {shown(name)}"
    if not 1 <= len(name) <= _LONGEST or not name.isprintable():
        raise OptionError(f"{where}: a name has 1 to {_LONGEST} printable characters")
    for key, value in table.items():
        if key not in KEYS:
            hint = nearest(key[:_LONGEST], KEYS) or f"; known: {', '.join(KEYS)}"
            raise OptionError(f"{where}: unknown key {shown(key)} = {shown(value)}{hint}")
        if key != "source" and not _is_short(value):
            kind = "size" if key == "buffer" else "number that is taken"
            raise OptionError(f"{where}: {key} = {shown(value)} is no {kind}")
    for key in NEEDED:
        if key not in table:
            raise OptionError(f"{where} has no {key!r}; needed are {', '.join(NEEDED)}")
    given: dict[str, Any] = dict(table)
    source = given.get("source", "")
    if not isinstance(source, str) or not source.isprintable():
        raise OptionError(f"{where}: source = {shown(source)} is no text on one line")
    try:
        size = parse_size(given.pop("buffer"))
    except OptionError as error:
        raise OptionError(f"{where}: buffer={error}") from None
    try:
        return Accelerator(name, size, **given)
    except OptionError as error:
        raise OptionError(f"{path!r}: {error}") from None


def _is_short(value: object) -> bool:
    """Whether a value is a scalar that a message can repeat."""
    if isinstance(value, int):
        return abs(value) <= MOST
    return isinstance(value, float) or (isinstance(value, str) and len(value) <= _LONGEST)
