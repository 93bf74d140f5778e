"""Dynamo and FX: capture, the torch.compile backend, and ways to run fusion groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx


def getfuse(
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The ``torch.compile`` backend (entry point ``getfuse``); see :mod:`.compiler`."""
    from torch_getfuse.backend.compiler import getfuse as compile_graph

    return compile_graph(gm, example_inputs, options=options, mode=mode)
