"""Regions of an exported program: ``torch.export`` puts what runs under an autocast, or another
grad mode, into a graph of its own. Here it comes back into the graph around it, as Dynamo has it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.fx_nodes.autocast import enter_grad_mode, exit_grad_mode
from torch_getfuse.backend.torch_private import codegen_of, enter_autocast, exit_autocast

_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled


def inline_regions(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` itself, or a copy of it without regions; nodes outside of them keep their names."""
    if not any(map(_is_region, gm.graph.nodes)):
        return gm
    graph = fx.Graph()
    graph.set_codegen(codegen_of(gm.graph))
    returned = _inline(gm, "", graph, {})
    graph.output(returned).meta = dict(gm.graph.output_node().meta)
    inlined = fx.GraphModule(gm, graph)
    inlined.meta.update(gm.meta)
    return inlined


def _inline(
    gm: fx.GraphModule, path: str, graph: fx.Graph, placed: dict[fx.Node, Any]
) -> Sequence[Any]:
    """Add the nodes of ``gm`` at the end of ``graph``.

    Args:
        path: where ``gm`` is in the module that ``graph`` will belong to, with a dot at the end.
        placed: what has been placed already: the inputs of a region.

    Returns:
        What ``gm`` returns, in ``graph``.
    """
    for node in gm.graph.nodes:
        if node in placed:
            continue
        if node.op == "output":
            break
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(gm)
            if isinstance(value, fx.GraphModule) and all(map(_is_region, node.users)):
                continue
            placed[node] = graph.node_copy(node)
            placed[node].target = f"{path}{node.target}"
        elif _is_region(node):
            placed[node] = _region(gm, path, graph, node, placed)
        elif node.target is operator.getitem and isinstance(placed[node.args[0]], (tuple, list)):
            placed[node] = placed[node.args[0]][node.args[1]]
        else:
            placed[node] = graph.node_copy(node, placed.__getitem__)
    returned: Any = gm.graph.output_node().args[0]
    results: Sequence[Any] = fx.map_arg(returned, placed.__getitem__)
    return results


def _is_region(node: fx.Node) -> bool:
    return node.target in (_AUTOCAST, _GRAD_MODE)


def _region(
    gm: fx.GraphModule, path: str, graph: fx.Graph, node: fx.Node, placed: dict[fx.Node, Any]
) -> Sequence[Any]:
    at = next(k for k, value in enumerate(node.args) if isinstance(value, fx.Node))
    mode, body, inputs = node.args[:at], node.args[at], node.args[at + 1 :]
    assert isinstance(body, fx.Node)
    inside = getattr(gm, str(body.target))
    given = dict(zip(inside.graph.find_nodes(op="placeholder"), inputs, strict=True))
    env = {inner: fx.map_arg(value, placed.__getitem__) for inner, value in given.items()}
    autocast = node.target is _AUTOCAST
    entered = graph.call_function(enter_autocast if autocast else enter_grad_mode, mode)
    results = _inline(inside, f"{path}{body.target}.", graph, env)
    graph.call_function(exit_autocast if autocast else exit_grad_mode, (entered,))
    return results
