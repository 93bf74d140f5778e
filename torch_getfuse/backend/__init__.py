"""From an FX graph to an operator graph, and from a plan back to FX: the torch.compile backend.

In pipeline order: ``rules/`` (how each operator reads), ``fx_nodes/`` (what a node is and does),
``capture/`` (FX graph -> operator graph), ``split/`` (plan -> FX submodules), then three ways to
run them: ``rowwise/`` (counted, in line buffers), ``packed/`` (fast, on a CPU) and ``inner/`` (an
inner backend). ``compiler.py`` is the backend itself: open it first. ``training.py`` plans the
backward graph, ``plan_cache.py`` keeps plans, ``compiled_models.py`` lets ``report(model)`` find
what was compiled. ``torch_private.py`` has every private name of torch that any of them needs,
``torch_versions.py`` what versions of torch lack.
"""

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
    """The ``torch.compile`` backend (entry point ``getfuse``); see ``compiler.py``."""
    from torch_getfuse.backend.compiler import getfuse as compile_graph

    return compile_graph(gm, example_inputs, options=options, mode=mode)
