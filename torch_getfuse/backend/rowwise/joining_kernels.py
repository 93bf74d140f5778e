"""Row kernels of operators that read operands by different rows: ``cat`` along the rows, products.

An output row of a ``cat`` is a row of one of its operands. One of a product (matrix product,
attention) is that of the same number of one operand, and takes all of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.fx_nodes.normalize import normalise
from torch_getfuse.backend.fx_nodes.values import tensor_info, traced_value
from torch_getfuse.backend.rowwise.calls import NoRowKernel, Values
from torch_getfuse.backend.rowwise.kernels import CallKernel, RowKernel, Site
from torch_getfuse.backend.rowwise.operand_views import Operand
from torch_getfuse.backend.rules.registry import positional

_PRODUCTS = ("matmul", "bmm", "mm")


def make(site: Site, name: str) -> RowKernel | None:
    """The kernel of a call by its plain name; ``None`` for one that joins nothing by rows.

    Raises:
        NoRowKernel: where it joins its operands in a way that is not computed by rows.
    """
    args = normalise(site.core.node, positional).args
    held = [site.held(read) for read in range(len(site.op.reads))]
    stream = site.target.stream_axis
    if stream is None or all(held):
        return None
    if name == "cat" and int(args.get("dim") or 0) % site.rank == stream and not any(held):
        return CatKernel(site, args["tensors"])
    if name in _PRODUCTS:
        left, right = args["input"], args.get("other", args.get("mat2"))
        # A row of the output takes all of the right operand, a column all of the left one.
        last = site.rank - 1
        return ProductKernel(
            site, [*([left] if stream != last else []), *([right] if stream != last - 1 else [])]
        )
    if name == "scaled_dot_product_attention":
        if args.get("is_causal") and stream == site.rank - 2:
            raise NoRowKernel(f"{site.op.name} is causal: a row needs to know its number")
        rows = ("query", "attn_mask") if stream == site.rank - 2 else args
        return ProductKernel(site, [args[n] for n in rows if isinstance(args.get(n), fx.Node)])
    return None


class CatKernel(RowKernel):
    """``cat`` along the rows.

    Attributes:
        pieces: per argument its node, its first row in the output, and how many it has.
    """

    def __init__(self, site: Site, nodes: Sequence[fx.Node]) -> None:
        axis = site.target.stream_axis
        assert axis is not None
        super().__init__(site, site.operands(axis=axis))
        self.axis, self.pieces, first = axis, [], 0
        sizes = {operand.node: operand.size for operand in self.operands}
        if any(operand.axis != axis for operand in self.operands):
            raise NoRowKernel(f"{self.op.name}: rows of an operand lie across")
        for node in nodes:
            shape = tensor_info(traced_value(node)).shape
            if len(shape) != site.rank:
                continue
            size = sizes.get(node, shape[axis])
            self.pieces.append((node, first, size))
            first += size
        self.place = {node: (first, size) for node, first, size in self.pieces}
        if len(self.place) < len(self.pieces):
            raise NoRowKernel(f"{self.op.name} has one operand at two places")

    def operand_rows(self, operand: Operand, low: int, high: int) -> tuple[int, int]:
        """Those of its rows that are among the output's."""
        return self._part(*self.place[operand.node], low, high)

    def compute(
        self, values: Values, blocks: Mapping[fx.Node, torch.Tensor], low: int, high: int
    ) -> Any:
        """The rows of each operand, one after the other."""
        found = []
        for node, first, size in self.pieces:
            begin, end = self._part(first, size, low, high)
            if begin == end:
                continue
            if node in blocks:
                found.append(blocks[node].to(self.dtype))
            else:
                found.append(values[node].narrow(self.axis, begin, end - begin).to(self.dtype))
        return torch.cat(found, self.axis)

    def _part(self, first: int, size: int, low: int, high: int) -> tuple[int, int]:
        begin = min(max(low - first, 0), size)
        return begin, max(begin, min(high - first, size))


class ProductKernel(CallKernel):
    """A product of which a row needs that of the same number of some operands, and all of others.

    Args:
        site: the operator.
        by_number: operands, weights too, that have the output's rows where they have several.
    """

    def __init__(self, site: Site, by_number: Sequence[fx.Node]) -> None:
        super().__init__(site, site.operands())
        by_rows = {operand.node for operand in self.operands if operand.axis is not None}
        self._aligned = set(by_number) - by_rows
