"""Operators by the names that people type: as reports show them, or paths of modules."""

from __future__ import annotations

from torch_getfuse.errors import nearest, some_of
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.node_set import mask_of

_NAMED = 6  # operators and modules that an error names


def selected(graph: OpGraph, name: str) -> int:
    """Mask of the operator of this name; else of all operators of the module of this path.

    0 where there is neither. A module that is called several times makes several operators, of
    which the first has its name: that means the first alone.
    """
    if not name:
        return 0
    if name in graph.index:
        return 1 << graph.index[name]
    return mask_of(i for i, op in enumerate(graph.ops) if f"{op.module}.".startswith(f"{name}."))


def no_operator(graph: OpGraph, name: object) -> str:
    """Why :func:`selected` finds nothing, with the nearest name that it would find."""
    known = dict.fromkeys(op.name for op in graph.ops)
    for op in graph.ops:
        path = op.module.split(".")
        known.update(dict.fromkeys(".".join(path[:k]) for k in range(1, len(path) + 1)))
    known.pop("", None)  # operators outside of any module
    hint = nearest(str(name), known) or f"; there are {some_of(list(known), _NAMED)}"
    return (
        f"{name!r} is neither an operator nor a module that contains one{hint} "
        "(batch norm is part of its convolution; views and dropout are not operators)"
    )
