"""Versions of torch: which were tried, what each lacks, and what people are told of it.

This is the one place that compares versions. ``torch_private.py`` says for each private name where
older versions have it; what no name can stand in for is an entry of :data:`FEATURES`, of which
reports have a note (:meth:`Feature.missing`), and tests that need it are skipped with
the entry's own words (the marker ``needs_torch``). ``make test-torch V=2.9.1`` tries a version.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch

TRIED = ("2.9", "2.11", "2.13", "2.14")
"""Versions of torch, as far as the minor number, that the tests were run with, oldest first.

Those in between are taken to work alike.
"""


class UntriedTorchWarning(UserWarning):
    """The installed torch is newer or older than those that the tests were run with."""


def torch_version() -> str:
    """The version of torch as far as the minor number: ``"2.13"``."""
    return ".".join(torch.__version__.split(".")[:2])


def _number(version: str) -> tuple[int, ...]:
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split("."))


_told: set[str] = set()


def warn_if_untried() -> None:
    """Warn once in a process where torch is newer or older than what was tried.

    Warns:
        UntriedTorchWarning: it is used all the same.
    """
    version = torch_version()
    if _number(TRIED[0]) <= _number(version) <= _number(TRIED[-1]) or version in _told:
        return
    _told.add(version)
    age = "newer" if _number(version) > _number(TRIED[-1]) else "older"
    warnings.warn(
        f"torch_getfuse was tried on torch {TRIED[0]} to {TRIED[-1]}; torch {torch.__version__} is "
        f"{age} and is used as it is. Compare with eager, or pip install 'torch=={TRIED[-1]}.*'",
        UntriedTorchWarning,
        stacklevel=3,
    )


@dataclass(frozen=True)
class Feature:
    """Something that works from one version of torch on.

    Attributes:
        name: what it is, as the subject of a sentence.
        since: the first version of torch, as far as the minor number, that it works on.
        why: what earlier versions lack, as a clause.
        instead: what happens there, as a clause.
    """

    name: str
    since: str
    why: str
    instead: str

    def missing(self) -> str:
        """A sentence that says why it does not work on the installed torch; empty where it does."""
        if _number(torch_version()) >= _number(self.since):
            return ""
        return (
            f"{self.name} needs torch {self.since} or newer, this is {torch.__version__}: "
            f"{self.why}; {self.instead}"
        )


FEATURES: Mapping[str, Feature] = {
    "attention": Feature(
        "inference of nn.MultiheadAttention as the operators that it consists of",
        "2.11",
        "Dynamo calls its fast path, one operator",
        "it is one unfusable operator of the plan",
    ),
    "observers": Feature(
        "a model that torch.ao.quantization has prepared and not converted yet",
        "2.11",
        "Dynamo does not trace its observers",
        "plan() raises a CaptureError that says so",
    ),
    "strides": Feature(
        "inner='inductor' as quick for any size as for one",
        "2.13",
        "inductor asks about strides in places where nothing can answer for it",
        "it is as slow there as without torch_getfuse, or fails for a group, which then runs eager",
    ),
}
"""Key, which tests give to ``needs_torch`` -> what older versions of torch cannot do."""
