"""Reading JSON objects of plan files strictly: nothing is coerced, every number has a range.

A plan file may come from anyone. ``true`` is no integer here, ``"3"`` and ``3.0`` are none, text
holds no control characters, and sizes are bounded so that no file can make a check run for ever.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_getfuse.errors import GraphError, PlanError, shown
from torch_getfuse.limits import MOST, MOST_POSITIONS, MOST_WIDTH
from torch_getfuse.widths import Width, as_width

_LARGEST_FILE = 64 * 2**20
"""Bytes of the largest file that is read."""


def escaped(text: str) -> str:
    """``text`` with what a terminal acts on (control characters, text direction) as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Fields:
    """A JSON object and where it stands in its file.

    Every method raises :class:`GraphError`, with the place and the value, where the object does
    not have what is asked for.
    """

    form: Mapping[str, Any]
    where: str

    @classmethod
    def of(cls, value: object, where: str) -> Fields:
        """``value`` as an object."""
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        return cls(value, where)

    def __contains__(self, name: str) -> bool:
        return name in self.form

    def value(self, name: str) -> Any:
        """Whatever stands under ``name``."""
        if name not in self.form:
            raise GraphError(f"{self.where or 'the file'} has no {name!r}")
        return self.form[name]

    def integer(self, name: str, least: int = 0, most: int = MOST) -> int:
        """An integer from ``least`` to ``most``."""
        return as_integer(self.value(name), self._at(name), least, most)

    def number(self, name: str) -> float:
        """A finite number that is not negative."""
        value = self.value(name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not 0 <= value <= MOST:
            raise _wrong(self._at(name), value, "a number that is not negative")
        return float(value)

    def width(self, name: str, zero: bool = False) -> Width:
        """Bytes of an element, a multiple of 1/8; above 0, but for ``zero``."""
        value, at = self.value(name), self._at(name)
        width = as_width(value)
        whole = isinstance(value, float) and isinstance(width, int)  # 1.0 is no integer
        if width is None or whole or (not width and not zero) or width > MOST_WIDTH:
            least = "0" if zero else "1/8"
            raise _wrong(at, value, f"a number of bytes from {least} to {MOST_WIDTH} in eighths")
        return width

    def text(self, name: str) -> str:
        """A printable string."""
        return as_text(self.value(name), self._at(name))

    def flag(self, name: str) -> bool:
        """``true`` or ``false``."""
        value = self.value(name)
        if not isinstance(value, bool):
            raise _wrong(self._at(name), value, "true or false")
        return value

    def items(self, name: str) -> list[Any]:
        """A list."""
        return as_list(self.value(name), self._at(name))

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of printable strings."""
        at = self._at(name)
        return tuple(as_text(item, f"{at}[{k}]") for k, item in enumerate(self.items(name)))

    def pair(self, name: str, least: int) -> tuple[int, int]:
        """Two integers, of rows and of columns."""
        items, at = self.items(name), self._at(name)
        if len(items) != 2:
            raise _wrong(at, items, "two integers")
        one, two = (as_integer(item, at, least, MOST_POSITIONS) for item in items)
        return one, two

    def objects(self, name: str) -> list[Fields]:
        """A list of objects."""
        at = self._at(name)
        return [Fields.of(item, f"{at}[{k}]") for k, item in enumerate(self.items(name))]

    def child(self, name: str) -> Fields:
        """An object."""
        return Fields.of(self.value(name), self._at(name))

    def _at(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name


def as_integer(value: object, where: str, least: int, most: int) -> int:
    """An integer of JSON in a range; ``true`` is none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(where, value, "an integer")
    if not least <= value <= most:
        raise _wrong(where, value, f"from {least} to {most}")
    return value


def as_scale(value: object, where: str) -> float:
    """A finite number above zero."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not 0 < value <= MOST_POSITIONS or not math.isfinite(value):  # type: ignore[operator, arg-type]
        raise _wrong(where, value, "a number above zero")
    return float(value)  # type: ignore[arg-type]


def as_list(value: object, where: str) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise _wrong(where, value, "a list")
    return value


def as_text(value: object, where: str) -> str:
    """A string without control characters and the like."""
    if not isinstance(value, str):
        raise _wrong(where, value, "a string")
    if not value.isprintable():
        raise GraphError(f"{where} holds characters that are not printable: {shown(value)}")
    return value


def _wrong(where: str, value: object, wanted: str) -> GraphError:
    return GraphError(f"{where} is {shown(value)}, not {wanted}")


def read_regular(path: str | Path, most: int) -> bytes:
    """The first ``most + 1`` bytes of a regular file; one byte too many tells that it is larger.

    Raises:
        OSError: where it cannot be opened, or is a pipe, a device or the like.
    """
    # A pipe would be waited for; what is none is asked of the open file.
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(file, "rb") as stream:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return stream.read(most + 1)


def read_json(path: str | Path) -> Any:
    """The JSON value of a file that may come from anyone.

    Raises:
        PlanError: where it cannot be read (a pipe, a device, larger than 64 MB, ...), or is no
            JSON in UTF-8, or an object of it has a key twice.
    """
    try:
        data = read_regular(path, _LARGEST_FILE)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise PlanError(f"it cannot be read: {reason}; check the path") from error
    if len(data) > _LARGEST_FILE:
        raise PlanError(f"it is larger than {_LARGEST_FILE} B, the most that is read")
    try:
        return json.loads(
            data.decode(), object_pairs_hook=_unique_keys, parse_constant=_no_constant
        )
    except json.JSONDecodeError as error:
        raise PlanError(
            f"it is damaged or truncated: {error.msg} at line {error.lineno}; write it again"
        ) from error
    except UnicodeDecodeError as error:
        raise PlanError("it is not a text file; it must be JSON in UTF-8") from error
    except RecursionError as error:
        raise PlanError("it is damaged: its objects are nested too deep") from error
    except ValueError as error:
        raise PlanError(f"it is damaged: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {ascii(name)[:60]} stands twice in one object")
        found[name] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
