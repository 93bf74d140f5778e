"""Casts to the type of another tensor that do nothing, left out.

``x.type_as(y)`` and ``x.to(y)`` return ``x`` itself where it is of that type already. What comes
later in the program then reads ``x`` in Dynamo's graph, but the cast in that of ``torch.export``,
where it would wait for ``y``. So in a copy of the graph all of it reads ``x``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from torch_getfuse.backend.fx_nodes.normalize import normalise
from torch_getfuse.backend.fx_nodes.targets import target_of
from torch_getfuse.backend.fx_nodes.values import copy_node, rewritten, traced_value
from torch_getfuse.backend.rules.registry import positional

_CASTS = ("to", "type_as")


def without_idle_casts(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` itself, or a copy in which what an idle cast returns is what it is given."""
    if not any(_cast(node) is not None for node in gm.graph.nodes):
        return gm

    def place(graph: fx.Graph, node: fx.Node, placed: Mapping[fx.Node, fx.Node]) -> fx.Node:
        source = _cast(node)
        return copy_node(graph, node, placed) if source is None else placed[source]

    return rewritten(gm, place)


def _cast(node: fx.Node) -> fx.Node | None:
    """What an idle cast to the type of another tensor is given; ``None`` for any other node."""
    if node.op not in ("call_function", "call_method") or target_of(node).name not in _CASTS:
        return None
    call = normalise(node, positional)
    if call.args.get("copy"):
        return None
    source, other = call.args.get("input"), call.args.get("other")
    if not (isinstance(source, fx.Node) and isinstance(other, fx.Node)):
        return None
    if call.args.get("memory_format") is not None:
        return None
    pair = [traced_value(source), traced_value(other)]
    if not all(isinstance(value, torch.Tensor) for value in pair):
        return None
    kinds = {(value.dtype, value.device, value.layout) for value in pair}
    return source if len(kinds) == 1 else None
