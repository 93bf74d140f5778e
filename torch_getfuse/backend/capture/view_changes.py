"""Changes of a tensor's shape in place, as views.

After ``y.squeeze_(0)`` every name of ``y`` is another view of the same memory, and the traced value
of ``y``, one object for all its nodes, has the last shape from the start. So in a copy of the graph
``y.squeeze_(0)`` becomes ``y.squeeze(0)``, which all that comes later reads in the place of ``y``,
and every node has the shape that it gives. Dynamo lets no input of a graph be changed so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.fx_nodes.targets import target_of
from torch_getfuse.backend.fx_nodes.values import traced_value
from torch_getfuse.backend.torch_private import (
    codegen_of,
    keep_source,
    tracing,
    tree_leaves,
    tree_map,
)

_VIEWS = frozenset(
    {"as_strided_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_", "unsqueeze_"}
)


def without_view_changes(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` itself, or a copy of a Dynamo graph in which no value changes its shape in place."""
    changed = {id(traced_value(node)) for node in gm.graph.nodes if _changes_view(node)}
    if not changed:
        return gm
    graph = fx.Graph()
    graph.set_codegen(codegen_of(gm.graph))
    placed: dict[fx.Node, fx.Node] = {}
    latest: dict[int, fx.Node] = {}  # by object: the node that shows it as it is by now

    def now(node: fx.Node) -> fx.Node:
        return latest.get(id(traced_value(node)), placed[node])

    for node in gm.graph.nodes:
        value = traced_value(node)
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], now)).meta = dict(node.meta)
            break
        if _changes_view(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), now)
            name = str(target_of(node).name)[:-1]
            new = graph.create_node("call_method", name, args, kwargs, name=node.name)
            new.meta = {**node.meta, "example_value": _run(new)}
        else:
            new = graph.node_copy(node, now)
            if any(id(leaf) in changed for leaf in tree_leaves(value)):
                known = latest.get(id(value))
                shown = _first_shown(new, value) if known is None else traced_value(known)
                new.meta["example_value"] = shown
        placed[node] = new
        if id(value) in changed:
            latest[id(value)] = new
        keep_source(node, new)
    copied = fx.GraphModule(gm, graph)
    copied.meta.update(gm.meta)
    return copied


def _changes_view(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or target_of(node).name not in _VIEWS:
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and traced_value(source) is traced_value(node)


def _run(node: fx.Node) -> Any:
    """What a node gives by the traced values of its operands."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), traced_value)
    with tracing(None), torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _first_shown(node: fx.Node, traced: Any) -> Any:
    """What a node gives, in the storages that its traced value has by now."""

    def like(found: Any, old: Any) -> Any:
        if not isinstance(found, torch.Tensor):
            return found
        with torch.no_grad():
            return old.as_strided(found.size(), found.stride(), found.storage_offset())

    return tree_map(like, _run(node), traced)
