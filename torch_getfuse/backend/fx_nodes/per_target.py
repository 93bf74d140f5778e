"""What is known of a call's target, worked out once for as long as the target lives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

Known = TypeVar("Known")

_MOST_NAMES = 4096


class PerTarget(Generic[Known]):
    """A function of a call's target that remembers its answers.

    A target may be a closure of one model, and a cache that kept it would keep the model. So
    functions and operators are known by weak references; names of methods are texts, of which
    the last 4096 are kept.
    """

    def __init__(self, work_out: Callable[[Any], Known]) -> None:
        functools.update_wrapper(self, work_out)
        self._work_out = work_out
        self._by_name = functools.lru_cache(maxsize=_MOST_NAMES)(work_out)
        self._by_target: WeakKeyDictionary[Any, Known] = WeakKeyDictionary()

    def __call__(self, target: Any) -> Known:
        if isinstance(target, str):
            return self._by_name(target)
        try:
            return self._by_target[target]
        except KeyError:
            found = self._by_target[target] = self._work_out(target)
            return found
        except TypeError:  # a target that has no weak references
            return self._work_out(target)

    def __len__(self) -> int:
        """How many answers are remembered."""
        return self._by_name.cache_info().currsize + len(self._by_target)
