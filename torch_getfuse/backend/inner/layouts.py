"""Results of compiled groups in the layout that the trace promises.

A group is compiled for the strides that its inputs have in the trace. Compilers keep those of what
they return only in part: inductor keeps the order of a view's strides, so that half the channels of
a map, a view with gaps in eager, may come back without the gaps. The group that reads it then
refuses it ("expected size 2==2, stride 256==512"), or would read from the wrong places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from torch_getfuse.backend.fx_nodes.values import traced_value
from torch_getfuse.backend.inner.dynamic.symbols import bare_symbols, size_function

Strides = tuple[int, ...]
Size: TypeAlias = int | sympy.Expr


class TracedStrides:
    """The strides that the results of a child have in the trace.

    Args:
        child: its nodes carry traced values.
    """

    def __init__(self, child: fx.GraphModule) -> None:
        returned = child.graph.output_node().args[0]
        results = returned if isinstance(returned, tuple) else (returned,)
        inputs = child.graph.find_nodes(op="placeholder")
        places: dict[sympy.Symbol, tuple[int, int | None]] = {}
        for position, node in enumerate(inputs):
            for symbol, dim in bare_symbols(traced_value(node)).items():
                places.setdefault(symbol, (position, dim))
        traced = [(strides, _symbols(strides)) for strides in map(_traced, results)]
        # A size that depends on data is in no input, and what is made of it goes unchecked.
        needed = set().union(*(used for _, used in traced))
        read = {symbol: place for symbol, place in places.items() if symbol in needed}
        self._places = list(read.values())
        self._strides = [
            [size_function(sympy.sympify(size), list(read)) for size in strides]
            if strides is not None and used <= places.keys()
            else None
            for strides, used in traced
        ]
        self._known: tuple[Sequence[int], list[Strides | None]] | None = None

    def __len__(self) -> int:
        return len(self._strides)

    def restore(self, results: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """The results of a call, those with other strides copied.

        Sizes of at most one have any stride. A tensor whose elements would share memory otherwise
        than by an expansion is left as it is.

        Args:
            results: of the compiled child.
            args: that it was called with.
        """
        return [
            result if strides is None else _with_strides(result, strides)
            for result, strides in zip(results, self._at(args), strict=True)
        ]

    def _at(self, args: Sequence[Any]) -> list[Strides | None]:
        sizes = [
            args[position] if dim is None else args[position].shape[dim]
            for position, dim in self._places
        ]
        known = self._known  # read once: another thread may be writing it
        if known is None or known[0] != sizes:
            known = self._known = (
                sizes,
                [
                    None if strides is None else tuple(stride(*sizes) for stride in strides)
                    for strides in self._strides
                ],
            )
        return known[1]


def _traced(node: Any) -> tuple[Size, ...] | None:
    value = traced_value(node) if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    # As they are now: a symbolic size becomes another when a compiler finds it equal to that.
    strides: Sequence[int | torch.SymInt] = value.stride()
    return tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in strides)


def _symbols(strides: Sequence[Size] | None) -> set[sympy.Symbol]:
    made = (stride for stride in strides or () if isinstance(stride, sympy.Expr))
    return set().union(*(stride.free_symbols for stride in made))


def _with_strides(result: Any, strides: Strides) -> Any:
    found = result.stride()
    if found == strides or all(
        size <= 1 or a == b for size, a, b in zip(result.shape, found, strides, strict=True)
    ):
        return result
    one = result
    for dim, stride in enumerate(strides):
        if not stride:
            one = one.narrow(dim, 0, min(1, one.shape[dim]))
    if overlaps_itself(one.shape, strides):
        return result
    wanted = torch.empty_strided(one.shape, strides, dtype=result.dtype, device=result.device)
    return wanted.copy_(one).expand(result.shape)


def overlaps_itself(shape: Sequence[int], strides: Strides) -> bool:
    """Whether two elements of a tensor may be one place of memory."""
    reach = 0
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
