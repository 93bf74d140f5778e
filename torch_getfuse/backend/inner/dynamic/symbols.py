"""Dynamic shapes of fusion groups: each group is given the sizes that its shapes are made of.

A graph with dynamic shapes has its symbolic sizes among its inputs: ``s53`` for the height of an
image. After a stride the height of a map is ``(s53 - 1)//2 + 1``, so a group in the middle of a
network has shapes made of ``s53`` and no input to read it from, which compilers such as inductor
refuse. Here such a group gets the sizes that it needs as more inputs: those that it takes for
numbers of its own (:mod:`torch_getfuse.backend.inner.dynamic.own_sizes`), else ``s53`` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP, ShapeEnv, free_symbols

from torch_getfuse.backend.fx_nodes.values import traced_value
from torch_getfuse.backend.inner.dynamic.own_sizes import OwnSizes, may_own_sizes
from torch_getfuse.backend.torch_private import PythonPrinter, hint_of, tree_leaves


class SizeBinder:
    """Gives the children of a graph the sizes that they need, in the order of their calls.

    Args:
        split: its children are FX modules; nodes carry traced values.
    """

    def __init__(self, split: fx.GraphModule) -> None:
        self._graph = split.graph
        self._env: ShapeEnv | None = None
        self._nodes: dict[sympy.Expr, fx.Node] = {}
        self._dims: dict[sympy.Symbol, tuple[fx.Node, int]] = {}

    def pass_by(self, node: fx.Node) -> None:
        """From now on sizes are made before a node that comes after this one."""
        value = traced_value(node)
        if isinstance(value, torch.SymInt):
            self._env = value.node.shape_env
            if not value.node.expr.is_number:
                self._nodes.setdefault(value.node.expr, node)
        elif node.op == "placeholder":
            for symbol, dim in bare_symbols(value).items():
                assert dim is not None
                self._env = value.shape[dim].node.shape_env
                self._dims.setdefault(symbol, (node, dim))

    def bind(self, child: fx.GraphModule, call: fx.Node) -> OwnSizes | None:
        """Add to a child, and to its call, the sizes that it needs and its inputs lack.

        A size that the graph around the children cannot compute (one that depends on data inside
        another child) is left out.

        Returns:
            Where the child may have sizes of its own: their environment.
        """
        own = OwnSizes(child) if may_own_sizes(child) else None
        if own is not None:
            needed = own.sizes
        else:
            values = (traced_value(node) for node in child.graph.nodes)
            needed = sorted(set().union(*map(_free, values)), key=str)
        inputs = child.graph.find_nodes(op="placeholder")
        # Inductor reads a size from no tensor's shape where scalars become tensors.
        given = {v.node.expr for v in map(traced_value, inputs) if isinstance(v, torch.SymInt)}
        first = next(node for node in child.graph.nodes if node.op != "placeholder")
        readable = self._nodes.keys() | self._dims.keys()
        missing = [s for s in needed if s not in given and s.free_symbols <= readable]
        for size in missing:
            with self._graph.inserting_before(call):
                source = self._node(size)
            with child.graph.inserting_before(first):
                new = child.graph.placeholder(f"size_{len(inputs)}")
            inputs.append(new)
            new.meta["val"] = traced_value(source)
            call.args = (*call.args, source)
        if missing:
            child.recompile()
        return own

    def _node(self, size: sympy.Expr) -> fx.Node:
        """A node of the graph that is a size, made where the graph inserts."""
        if size in self._nodes:
            return self._nodes[size]
        assert self._env is not None
        if size.is_Symbol:
            made = self._graph.call_function(torch.ops.aten.sym_size.int, self._dims[size])
        else:
            for symbol in sorted(size.free_symbols, key=str):
                self._node(symbol)
            # Made of the largest sizes that there are already; symbols stand for them.
            known = {expr: sympy.Dummy(integer=True) for expr in self._nodes}
            short = size.xreplace(known)
            used = {mark: self._nodes[e] for e, mark in known.items() if mark in short.free_symbols}
            made = self._graph.call_function(size_function(short, list(used)), tuple(used.values()))
        hint = hint_of(self._env, size)
        made.meta["val"] = self._env.create_symintnode(size, hint=hint)
        self._nodes[size] = made
        return made


def size_function(size: sympy.Expr, symbols: Sequence[sympy.Symbol]) -> Callable[..., int]:
    """A size as a function of the values of its symbols, computed as Dynamo's guards compute it."""
    printer = PythonPrinter()
    names = ", ".join(map(printer.doprint, symbols))
    compute = eval(f"lambda {names}: {printer.doprint(size)}", dict(SYMPY_INTERP))

    def size_of(*values: int) -> int:
        return int(compute(*values))

    return size_of


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
    for leaf in tree_leaves(value):
        if isinstance(leaf, (torch.Tensor, torch.SymInt)):
            found |= set(free_symbols(leaf))
    return found
