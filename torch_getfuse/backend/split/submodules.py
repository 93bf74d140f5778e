"""Partition plan -> one FX submodule per fusion group, computing exactly what the graph did.

``torch.fx.passes.split_module`` follows data edges only, so it moves an in-place operator past
a reader of the same storage without a word. Here every order that matters is an edge
(:mod:`torch_getfuse.backend.fx_nodes.effects`). A grouping that these edges make cyclic is refused.
Otherwise the groups are sorted, the nodes of no group (views, shape arithmetic, ...) go to a
child next to them, and the children are built in executed order.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torch_getfuse import ordering
from torch_getfuse.backend.fx_nodes.autocast import OUTSIDE, Mode, Switches, is_switch, modes_of
from torch_getfuse.backend.fx_nodes.effects import attribute, is_barrier, order_edges
from torch_getfuse.backend.fx_nodes.values import traced_value
from torch_getfuse.backend.torch_private import codegen_of, keep_source
from torch_getfuse.errors import PlanError


def split_graph_module(
    gm: fx.GraphModule, groups: Sequence[Sequence[fx.Node]], names: Sequence[str]
) -> fx.GraphModule:
    """``gm`` with the nodes of ``groups[k]`` moved to a child module called ``names[k]``.

    Nodes of no group are placed by their neighbours: with the child that produces what they
    read (``getitem``, views), else with the first child that reads them (computations on
    parameters and shapes), else, where nothing reads them, with the nearest child. Barriers,
    calls of leaf modules, sizes computed from sizes, and nodes that only the output reads stay at
    the top. Attributes (``get_attr``) are fetched where they are used, so they never cross a
    border. Autocast and grad mode are changed where they are needed, within each child for itself.

    Args:
        gm: a graph from Dynamo, ``torch.export`` or ``symbolic_trace``; it is not changed.
            Aliases are read from ``meta["example_value"]`` or ``meta["val"]``; values without
            either are taken to alias each other.
        groups: disjoint, not empty; nodes of ``gm.graph`` other than its inputs and output, and
            the calls that change autocast or grad mode.
        names: one Python identifier per group.

    Returns:
        A module that takes the inputs of ``gm`` and returns equal outputs in the same
        structure, with the same effects on parameters, buffers, inputs and random numbers.
        Its children are in executed order: the order given, as far as the graph allows it. A
        child returns its one result bare and several as a tuple. Parameters, buffers and leaf
        modules are those of ``gm``; nothing else is shared.

    Raises:
        PlanError: where groups overlap, are empty or hold nodes of another graph; where names
            clash; and where two groups need each other's results or effects, so that no
            order of them keeps the meaning of the graph.
    """
    owner = _owners(gm, groups, names)
    nodes = [
        node
        for node in gm.graph.nodes
        if node.op not in ("placeholder", "output")
        and (node.op != "get_attr" or node in owner)
        and not is_switch(node)
    ]
    before = order_edges(gm, nodes)
    blocks = _place(nodes, before, [owner.get(node, -1) for node in nodes], names)
    return _build(gm, blocks, names)


def _owners(
    gm: fx.GraphModule, groups: Sequence[Sequence[fx.Node]], names: Sequence[str]
) -> dict[fx.Node, int]:
    """Node -> group, after checking what the caller gave."""
    if len(groups) != len(names):
        raise PlanError(f"{len(groups)} groups but {len(names)} names: give one name per group")
    taken = {str(node.target).partition(".")[0] for node in gm.graph.nodes if _is_attr(node)}
    for name in names:
        if not name.isidentifier() or name in taken:
            raise PlanError(f"{name!r} cannot name a child: it is taken or not an identifier")
        taken.add(name)
    owner: dict[fx.Node, int] = {}
    for k, group in enumerate(groups):
        if not group:
            raise PlanError(f"{names[k]} has no nodes: leave it out")
        for node in group:
            outside = node.graph is not gm.graph or node.op in ("placeholder", "output")
            if outside or is_switch(node):
                raise PlanError(
                    f"{names[k]}: {node.op} {node.name!r} is no operator of this graph; "
                    "capture and split the same graph"
                )
            if owner.setdefault(node, k) != k:
                raise PlanError(f"{node.name!r} is in {names[owner[node]]} and in {names[k]}")
    return owner


def _is_attr(node: fx.Node) -> bool:
    """True where the target of ``node`` is the path of an attribute of the graph's module."""
    return node.op in ("get_attr", "call_module")


@dataclass(frozen=True, slots=True)
class _Block:
    """Nodes that run together, in order: a child (``group`` >= 0) or one node at the top."""

    group: int
    nodes: list[fx.Node]


def _place(
    nodes: Sequence[fx.Node],
    before: Sequence[set[int]],
    owner: Sequence[int],
    names: Sequence[str],
) -> list[_Block]:
    """Blocks in executed order, each node in exactly one of them."""
    count = len(names)
    # Blocks 0..count-1 are the groups; node i of no group is block count + i at first.
    block = [k if k >= 0 else count + i for i, k in enumerate(owner)]
    _absorb(nodes, before, block, names)

    waits: list[set[int]] = [set() for _ in range(count + len(nodes))]
    for i, earlier in enumerate(before):
        waits[block[i]].update(block[j] for j in earlier)
    # Single nodes as soon as they can run, groups as numbered.
    order = ordering.topological_order(waits, lambda b: (b < count, b))
    assert order is not None, "_absorb leaves no cycle"
    position = {b: p for p, b in enumerate(order)}
    after: list[list[int]] = [[] for _ in nodes]
    for i, earlier in enumerate(before):
        for j in earlier:
            after[j].append(i)

    def low(i: int) -> int:
        return max((position[block[j]] for j in before[i]), default=-1)

    def high(i: int) -> int:
        return min((position[block[j]] for j in after[i]), default=len(position))

    at = {p: b for b, p in position.items()}
    free = [i for i, b in enumerate(block) if b >= count and not _stays(nodes[i])]
    # Moving a node to the last block that it waits for keeps every edge pointing forward, and
    # so does moving it to the first block that waits for it.
    for i in free:
        if low(i) >= 0 and at[low(i)] < count:
            block[i] = at[low(i)]
    for i in reversed(free):
        if block[i] >= count and high(i) < len(position) and at[high(i)] < count:
            block[i] = at[high(i)]
    for i in free:
        if block[i] >= count and not nodes[i].users:
            near = (*range(i + 1, len(nodes)), *range(i - 1, -1, -1))
            at_groups = (position[block[j]] for j in near if block[j] < count)
            p = next((p for p in at_groups if low(i) <= p <= high(i)), None)
            if p is not None:
                block[i] = at[p]

    members: dict[int, list[fx.Node]] = {}
    for i, node in enumerate(nodes):
        members.setdefault(block[i], []).append(node)
    return [_Block(b if b < count else -1, members[b]) for b in order if b in members]


def _stays(node: fx.Node) -> bool:
    """Nodes that are better off at the top.

    They change or check the world around a child, or compute a size from sizes, which a child that
    is compiled takes for a number.
    """
    sizes = (node, *node.all_input_nodes)
    is_size = len(sizes) > 1 and all(isinstance(traced_value(n), torch.SymInt) for n in sizes)
    return is_barrier(node) or node.op == "call_module" or is_size


def _absorb(
    nodes: Sequence[fx.Node], before: Sequence[set[int]], block: list[int], names: Sequence[str]
) -> None:
    """Give every free node on a path from a group back to it to that group, in place.

    Raises:
        PlanError: where such a path runs through another group.
    """
    edges: list[dict[int, tuple[int, int]]] = [{} for _ in range(len(names) + len(nodes))]
    for i, earlier in enumerate(before):
        for j in earlier:
            if block[i] != block[j]:
                edges[block[j]].setdefault(block[i], (j, i))
    home: dict[int, int] = {}
    for component in ordering.cycles(edges):
        held = [b for b in component if b < len(names)]
        if len(held) > 1:
            raise PlanError(_describe_cycle(nodes, edges, set(component), held, names))
        home.update(dict.fromkeys(component, component[0]))
    block[:] = [home.get(b, b) for b in block]


def _describe_cycle(
    nodes: Sequence[fx.Node],
    edges: Sequence[Mapping[int, tuple[int, int]]],
    component: set[int],
    held: Sequence[int],
    names: Sequence[str],
) -> str:
    """The shortest way out of the first group and back that meets another one, in words."""
    first = min(held)
    came: dict[tuple[int, bool], tuple[int, bool]] = {}
    queue = [(first, False)]  # a block, and whether another group was met on the way to it
    for b, met in queue:
        for c in edges[b]:
            state = (c, met or (c < len(names) and c != first))
            if c in component and state not in came:
                came[state] = (b, met)
                queue.append(state)
        if (first, True) in came:
            break
    path = [(first, True)]
    while path[-1] != (first, False):
        path.append(came[path[-1]])
    blocks = [b for b, _ in reversed(path)]
    other = next(b for b in blocks if b < len(names) and b != first)
    there, back = edges[blocks[0]][blocks[1]], edges[blocks[-2]][blocks[-1]]

    def words(edge: tuple[int, int]) -> str:
        a, b = (nodes[i] for i in edge)
        return f"{b.name!r} must run after {a.name!r}" + (
            "" if a in b.all_input_nodes else " (mutation or random-number order)"
        )

    return (
        f"{names[first]} and {names[other]} need each other: {words(there)}, and later "
        f"{words(back)}; put these nodes in one group or cut {names[first]} between them"
    )


def _build(gm: fx.GraphModule, blocks: Sequence[_Block], names: Sequence[str]) -> fx.GraphModule:
    modes, last = modes_of(gm.graph)
    root = _GraphCopy()
    root.graph.set_codegen(copy.copy(codegen_of(gm.graph)))
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            root.add(node)
    targets: dict[str, Any] = {}
    for block in blocks:
        if block.group < 0:
            root.switches.to(modes[block.nodes[0]])
            root.add(block.nodes[0])
        else:
            root.switches.to(OUTSIDE)
            name = names[block.group]
            targets[name] = _add_child(gm, root, name, block.nodes, modes)
    root.switches.to(last)
    root.add(gm.graph.output_node())
    for node in root.graph.nodes:
        if _is_attr(node) and node.target not in targets:
            targets[str(node.target)] = attribute(gm, str(node.target))
    result = fx.GraphModule(targets, root.graph, class_name="SplitModule")
    result.training = gm.training
    result.meta.update(gm.meta)
    return result


def _add_child(
    gm: fx.GraphModule,
    root: _GraphCopy,
    name: str,
    members: Sequence[fx.Node],
    modes: Mapping[fx.Node, Mode],
) -> fx.GraphModule:
    """Build the child that holds ``members`` and call it in ``root``."""
    inside = set(members)
    inputs = dict.fromkeys(
        source
        for node in members
        for source in node.all_input_nodes
        if source not in inside and source.op != "get_attr"
    )
    outputs = [
        node
        for node in members
        if node.op != "get_attr" and any(user not in inside for user in node.users)
    ]
    child = _GraphCopy()
    for source in inputs:
        child.add_placeholder(source)
    for node in members:
        child.switches.to(modes[node])
        child.add(node)
    child.switches.to(OUTSIDE)
    single = len(outputs) == 1
    results = tuple(child.env[node] for node in outputs)
    child.graph.output(results[0] if single else results)

    call = root.graph.call_module(name, tuple(root.env[source] for source in inputs))
    for key in ("example_value", "val"):
        if any(key in node.meta for node in outputs):
            values = tuple(node.meta.get(key) for node in outputs)
            call.meta[key] = values[0] if single else values
    for i, node in enumerate(outputs):
        if single:
            root.env[node] = call
        else:
            root.env[node] = root.graph.call_function(operator.getitem, (call, i))
            root.env[node].meta = copy.copy(node.meta)
    return fx.GraphModule(gm, child.graph, class_name=name)


class _GraphCopy:
    """A graph under construction and where the nodes of the original went."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.switches = Switches(self.graph)
        self.env: dict[fx.Node, fx.Node] = {}

    def add(self, node: fx.Node) -> None:
        """Copy ``node`` with its metas, and first any attribute that it is the first to use."""
        if node in self.env:
            return
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                self.add(source)
        self._keep(node, self.graph.node_copy(node, self.env.__getitem__))

    def add_placeholder(self, node: fx.Node) -> None:
        """An input that stands for ``node``, which is computed elsewhere."""
        # Graph.placeholder() would spell the name in lower case, and nobody would know the node.
        new = self.graph.create_node("placeholder", node.name, type_expr=node.type, name=node.name)
        new.meta = copy.copy(node.meta)
        self._keep(node, new)

    def _keep(self, node: fx.Node, new: fx.Node) -> None:
        keep_source(node, new)
        self.env[node] = new
