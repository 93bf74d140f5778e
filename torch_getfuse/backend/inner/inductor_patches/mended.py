"""Inductor, less what it gets wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from torch_getfuse.backend.inner.inductor_patches.replaced import replaced
from torch_getfuse.backend.inner.inductor_patches.scatters import sum_scatters
from torch_getfuse.backend.inner.inductor_patches.strides import STRIDES
from torch_getfuse.backend.torch_private import inductor_compile

log = logging.getLogger(__name__)


def mended(inductor: Callable[..., Any], gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
    """What ``inductor(gm, example_inputs)`` returns, with the workarounds of this folder.

    They are in force for each graph that inductor compiles for ``gm``. A backward graph at dynamic
    shapes is one that it compiles later, when the backward runs.
    """
    return inductor(gm, example_inputs, inner_compile=_compile)


def _compile(gm: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Any:
    """One ATen graph."""
    count = sum_scatters(gm)
    if count:
        log.info("%d scatters to axes of size one are sums", count)
    with replaced(STRIDES):
        return inductor_compile(gm, example_inputs, **settings)
