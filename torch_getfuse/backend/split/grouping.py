"""Partition plan and capture -> the captured graph with one child per fusion group."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import fx

from torch_getfuse.backend.capture.capture import Capture
from torch_getfuse.backend.capture.graph_values import CoreCall, View
from torch_getfuse.backend.fx_nodes.effects import Storages, written_at
from torch_getfuse.backend.fx_nodes.targets import target_of
from torch_getfuse.backend.fx_nodes.values import traced_value
from torch_getfuse.backend.split.submodules import split_graph_module
from torch_getfuse.backend.torch_private import codegen_of, keep_source
from torch_getfuse.partition.plan import PartitionPlan

_BY_SIZES = {"expand_as": "expand", "reshape_as": "reshape", "view_as": "view"}
"""Views that are told their sizes by another tensor, and the same told by numbers."""


def split_capture(capture: Capture, plan: PartitionPlan) -> fx.GraphModule:
    """The captured FX graph with one child per fusion group, and one per unfusable operator.

    Raises:
        PlanError: if mutation of shared storage makes the plan's order impossible.
    """
    children = children_of(capture, plan)
    return split_graph_module(capture.graph_module, list(children.values()), list(children))


def children_of(capture: Capture, plan: PartitionPlan) -> dict[str, list[fx.Node]]:
    """Name of each child -> its nodes: the fusion groups, then the unfusable operators."""
    return {
        name: [node for op in ops for node in capture.nodes[op]]
        for name, ops in _children(plan).items()
    }


def _children(plan: PartitionPlan) -> dict[str, tuple[str, ...]]:
    """Name of each child -> its operators."""
    named = {f"fusion_group_{k}": group.ops for k, group in enumerate(plan.groups)}
    steps = {op for group in plan.groups for op in group.ops}
    alone = [op for op in plan.unfusable if op not in steps]
    return {**named, **{f"unfusable_{k}": (op,) for k, op in enumerate(alone)}}


def localise_views(capture: Capture, plan: PartitionPlan) -> Capture:
    """The capture in a copy of its graph where each child views tensors for itself.

    A view belongs to the operator that wrote its tensor, so a child would be given views of the
    tensors of another child: halves, flattened maps. In the copy, a child that reads such a view
    is given the tensor and makes the view itself, so that what crosses the border is what the
    plan counts. Not where the tensor is changed in place between the view and its reader.

    Nor does a child read a tensor whose shape alone is asked, by a view: it is given the sizes.
    """
    gm = capture.graph_module
    graph = fx.Graph()
    graph.set_codegen(copy.copy(codegen_of(gm.graph)))  # how an exported program is called
    placed: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, placed)
    graph.output(output)
    copied = fx.GraphModule(gm, graph)
    for node, new in placed.items():
        keep_source(node, new)
        _take_sizes(new)
    capture = capture.moved(copied, placed)
    owner = {op: child for child, ops in _children(plan).items() for op in ops}
    views, nodes, calls = dict(capture.views), dict(capture.nodes), dict(capture.calls)
    writer = {own[-1].node: op for op, own in capture.calls.items() if own}
    position = {node: at for at, node in enumerate(graph.nodes)}
    written, storages = written_at(copied), Storages(copied)
    clones: dict[tuple[str, fx.Node], fx.Node] = {}

    def clone(node: fx.Node, call: fx.Node, op: str) -> fx.Node:
        """The view for the child of ``op``, made before ``call``; tensors stay what they are."""
        if node.op == "placeholder" or node in writer or not node.args:
            return node
        source = node.args[0]
        if not isinstance(source, fx.Node) or (source in writer and source not in capture.views):
            return node  # one of several results
        # A reshape or a clone may be a copy of what was there before a write to its source, and
        # what is written to the copy alone, by this call too, must stay in it. A node that writes
        # itself is no view. Nor is a copy taken again where another child writes to its source
        # after the call, which may have to be before that, or where the call gives a view of it.
        made = storages.of_all([node]) - storages.of_all([source])
        source_writes = written.get(source, ())
        own = [at for at in written.get(node, ()) if at not in source_writes]
        if (
            any(position[node] <= at < position[call] for at in source_writes)
            or any(position[node] < at <= position[call] for at in own)
            or (made and any(at > position[call] for at in source_writes))
            or made & storages.of_all([call])
        ):
            return node
        key = owner[op], node
        if key not in clones:
            above = clone(source, call, op)
            with graph.inserting_before(call):
                new = graph.node_copy(node, lambda n: above if n is source else n)
            clones[key] = new
            nodes[op] = (*nodes[op], new)
            if node in views:
                views[new] = views[node]
        return clones[key]

    def localised(node: fx.Node, view: View, call: fx.Node, op: str) -> fx.Node:
        """What a call of ``op`` is given in the place of a view."""
        if owner.get(view.tensor) == owner[op]:
            return node
        new = clone(node, call, op)
        if new is not node:
            call.replace_input_with(node, new)
        return new

    for op in capture.graph:
        calls[op.name] = tuple(
            CoreCall(
                call.node,
                tuple((localised(n, view, call.node, op.name), view) for n, view in call.operands),
            )
            for call in calls.get(op.name, ())
        )
        # A write into a part of a tensor has no call; what it writes is read all the same.
        writes = () if calls[op.name] else capture.nodes[op.name]
        for write in (node for node in writes if node not in capture.views):
            for node in write.all_input_nodes:
                if node in capture.views and position[write] not in written.get(node, ()):
                    localised(node, capture.views[node], write, op.name)
    copied.recompile()
    return replace(capture, nodes=nodes, calls=calls, views=views)


def _take_sizes(node: fx.Node) -> None:
    """Give a view the sizes of the tensor that it was given for them, where they are numbers."""
    called = node.op in ("call_function", "call_method")
    view = _BY_SIZES.get(target_of(node).name) if called and len(node.args) == 2 else None
    traced = traced_value(node)
    if view is None or not isinstance(traced, torch.Tensor):
        return
    sizes = list(traced.shape)
    if all(type(size) is int for size in sizes):
        node.op, node.target, node.args = "call_method", view, (node.args[0], sizes)
