"""What programs run in: without torch's complaints, its measurements and one crash of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from torch_getfuse.backend.packed import fast


class TorchFailure(Exception):
    """What torch itself does not do."""


class NoCrash(TorchFunctionMode):
    """Stops where torch's own backward ends the process: torch 2.13's of GroupNorm writes the
    gradient of its input, in channels last, even where nothing asks for it.
    """

    def __torch_function__(  # type: ignore[no-untyped-def]
        self, function, types, args=(), kwargs=None
    ):
        if getattr(function, "__name__", "") == "group_norm":
            given = args[0]
            # Of one place by place, both layouts are contiguous, and torch goes by the strides.
            last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(given.dim())
            in_last = last is not None and given.is_contiguous(memory_format=last)
            if not given.requires_grad and (in_last or not given.is_contiguous()):
                raise TorchFailure(
                    "GroupNorm's backward, of an input in channels last without gradient"
                )
        return function(*args, **kwargs or {})


@contextmanager
def memory_filled() -> Iterator[None]:
    """What torch.empty returns is NaN or the largest integer: the same for us as for eager."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def guards_unmeasured() -> Iterator[None]:
    """Dynamo flushes the processor's caches, to time its guards for a log: a third of all time."""
    with mock.patch.object(torch._dynamo.guards, "profile_guard_manager", return_value=0.0):
        yield


@contextmanager
def fast_program_wins() -> Iterator[None]:
    """The fast program is taken whatever the clock says."""
    with mock.patch.object(fast, "_times", return_value=(0.001, 0.002)):
        yield


@contextmanager
def quietly() -> Iterator[None]:
    """Without torch's own complaints of programs that it does not compile."""
    loggers = [logging.getLogger(name) for name in ("torch._subclasses", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
