"""Functions of inductor that are replaced while a group is compiled, and only for that thread.

Inductor finds these functions by name in its modules, so replacing one is seen by every thread of
the process. What is put there hands the calls of other threads on to the original, and the last
thread to leave puts the original back.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch_getfuse.backend.torch_private import InductorFunction
from torch_getfuse.backend.torch_versions import torch_version


@dataclass(frozen=True)
class Replacement:
    """What a function of inductor is replaced by.

    Attributes:
        function: the one replaced.
        make: gets the original, and returns what is called instead.
    """

    function: InductorFunction
    make: Callable[[Callable[..., Any]], Callable[..., Any]]

    @property
    def needed(self) -> bool:
        """Whether the installed version of torch is known to have the fault."""
        return torch_version() in self.function.faulty


_lock = threading.Lock()
_inside: dict[Replacement, int] = {}
_originals: dict[Replacement, Any] = {}
_thread = threading.local()


@contextmanager
def replaced(replacements: Sequence[Replacement]) -> Iterator[None]:
    """Replace functions of inductor for what this thread does while the context lasts.

    Contexts may be nested, and several threads may be in one at once.
    """
    needed = [replacement for replacement in replacements if replacement.needed]
    entered: list[Replacement] = []
    try:
        for replacement in needed:
            _enter(replacement)
            entered.append(replacement)
        yield
    finally:
        for replacement in reversed(entered):
            _leave(replacement)


def _enter(replacement: Replacement) -> None:
    owner, name = replacement.function.place()
    with _lock:
        if not _inside.get(replacement):
            # As the owner holds it: a static method is no plain function there.
            held = inspect.getattr_static(owner, name)
            setattr(owner, name, _for_its_threads(replacement, held, getattr(owner, name)))
            _originals[replacement] = held
        _inside[replacement] = _inside.get(replacement, 0) + 1
    _depths()[replacement] = _depths().get(replacement, 0) + 1


def _leave(replacement: Replacement) -> None:
    _depths()[replacement] -= 1
    with _lock:
        _inside[replacement] -= 1
        if not _inside[replacement]:
            owner, name = replacement.function.place()
            setattr(owner, name, _originals.pop(replacement))
            del _inside[replacement]


def _depths() -> dict[Replacement, int]:
    """How many contexts this thread is in, by what they replace."""
    if not hasattr(_thread, "depths"):
        _thread.depths = {}
    depths: dict[Replacement, int] = _thread.depths
    return depths


def _for_its_threads(replacement: Replacement, held: Any, original: Callable[..., Any]) -> Any:
    made = replacement.make(original)

    @functools.wraps(original)
    def choose(*args: Any, **kwargs: Any) -> Any:
        return (made if _depths().get(replacement) else original)(*args, **kwargs)

    return staticmethod(choose) if isinstance(held, staticmethod) else choose
