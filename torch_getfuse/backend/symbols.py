"""Dynamic shapes of fusion groups: each group is given the sizes that its shapes are made of.

A graph with dynamic shapes has its symbolic sizes among its inputs: ``s53`` for the height of an
image. After a stride the height of a map is ``(s53 - 1)//2 + 1``, so a group in the middle of a
network has shapes made of ``s53`` and no input to read it from, which compilers such as inductor
refuse. Here such a group gets the size itself as one more input.
"""

from __future__ import annotations

from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree

from torch_getfuse.backend.fx_values import traced_value


def bind_symbols(split: fx.GraphModule) -> None:
    """Add to each child, in place, the sizes that its shapes are made of and its inputs lack.

    A size that the graph around the children does not have either (one that depends on data
    inside another child) is left out.

    Args:
        split: its children are FX modules; nodes carry traced values.
    """
    known = _sources(split.graph)
    changed = False
    for call in split.graph.find_nodes(op="call_module"):
        child = split.get_submodule(str(call.target))
        if not isinstance(child, fx.GraphModule):
            continue
        inputs = child.graph.find_nodes(op="placeholder")
        # Inductor reads a size from no tensor's shape where scalars become tensors.
        sizes = [v for node in inputs if isinstance(v := traced_value(node), torch.SymInt)]
        given = {symbol for size in sizes for symbol in bare_symbols(size)}
        used: set[sympy.Symbol] = set()
        for node in child.graph.nodes:
            used |= _free(traced_value(node))
        missing = sorted((s for s in used - given if s in known), key=str)
        for symbol in missing:
            source = _source(split.graph, known, symbol)
            if source > call:
                continue
            with child.graph.inserting_before(_first_call(child.graph)):
                size = child.graph.placeholder(f"size_{symbol}")
            size.meta["val"] = traced_value(source)
            call.args = (*call.args, source)
            changed = True
        if missing:
            child.recompile()
    if changed:
        split.recompile()


_Source = tuple[fx.Node, int | None]
"""A node that is a size (``None``), or a tensor and the number of a dimension of that size."""


def _sources(graph: fx.Graph) -> dict[sympy.Symbol, _Source]:
    """Where the symbols of a graph can be read: the first node, sizes before tensors."""
    sizes: dict[sympy.Symbol, _Source] = {}
    dims: dict[sympy.Symbol, _Source] = {}
    for node in graph.nodes:
        value = traced_value(node)
        if isinstance(value, torch.SymInt) or node.op == "placeholder":
            for symbol, dim in bare_symbols(value).items():
                (sizes if dim is None else dims).setdefault(symbol, (node, dim))
    return {**dims, **sizes}


def _source(graph: fx.Graph, known: dict[sympy.Symbol, _Source], symbol: sympy.Symbol) -> fx.Node:
    """The node that is a size, made of a dimension of an input where there is none yet."""
    node, dim = known[symbol]
    if dim is None:
        return node
    with graph.inserting_before(_first_call(graph)):
        size = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
    size.meta["val"] = traced_value(node).shape[dim]
    known[symbol] = (size, None)
    return size


def _first_call(graph: fx.Graph) -> fx.Node:
    first: fx.Node = next(node for node in graph.nodes if node.op != "placeholder")
    return first


def bare_symbols(value: Any) -> dict[sympy.Symbol, int | None]:
    """The symbols that can be read from a value without solving for them.

    Each with the dimension of a tensor that it is, or ``None`` for a value that is a size.
    """
    is_tensor = isinstance(value, torch.Tensor)
    found: dict[sympy.Symbol, int | None] = {}
    for dim, size in enumerate(value.shape if is_tensor else (value,)):
        expr = size.node.expr if isinstance(size, torch.SymInt) else None
        if isinstance(expr, sympy.Symbol):
            found.setdefault(expr, dim if is_tensor else None)
    return found


def _free(value: Any) -> set[sympy.Symbol]:
    """All symbols in the sizes and strides of a value."""
    found: set[sympy.Symbol] = set()
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, (torch.Tensor, torch.SymInt)):
            found |= set(free_symbols(leaf))
    return found
