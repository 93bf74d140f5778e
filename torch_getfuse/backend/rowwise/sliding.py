"""What row kernels of sliding operators share: the axis of rows, and rows beyond the map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import fx

from torch_getfuse.backend.fx_nodes.normalize import normalise
from torch_getfuse.backend.fx_nodes.values import tensor_info, traced_value
from torch_getfuse.backend.rowwise.calls import NoRowKernel, Values
from torch_getfuse.backend.rowwise.kernels import RowKernel, Site
from torch_getfuse.backend.rowwise.operand_views import Operand
from torch_getfuse.backend.rules.registry import positional
from torch_getfuse.backend.rules.rule import spread
from torch_getfuse.ir.window import positions_needed

_T = TypeVar("_T")


class SpatialKernel(RowKernel):
    """One feature map, whose last ``axes`` axes slide; one of them is that of rows.

    Kernels compute with the axis of rows in front of the other ones, whichever it is in the map.

    Attributes:
        args: the call's arguments by name; weights are nodes.
        axes: axes of the map.
        axis: the axis of rows, as kernels see it.
        size: rows of the operand.
        columns: its sizes along the other axes.
    """

    def __init__(self, site: Site, axes: int) -> None:
        node, _ = site.core.operands[0]
        self.args = dict(normalise(site.core.node, positional).args)
        self.axes = axes
        self.axis = site.rank - axes
        stream = site.target.stream_axis
        self.row_axis = self.axis if stream is None else stream
        if self.row_axis < self.axis:
            raise NoRowKernel(f"{site.op.name} ({site.op.kind}): its rows are no axis of the map")
        try:
            operands = site.operands(axis=self.row_axis)
        except NoRowKernel:
            if site.source(0).rows > 1:
                raise
            operands = site.operands(by_rows=False)
        super().__init__(site, operands)
        if len(operands) != 1 or operands[0].axis not in (None, self.row_axis):
            raise NoRowKernel(
                f"{self.op.name} ({self.op.kind}): the rows of {node.name} lie across"
            )
        self.operand = operands[0]
        self.size, *self.columns = self.ordered(self.operand.shape[self.axis :])

    def ordered(self, values: Sequence[_T]) -> tuple[_T, ...]:
        """Values, one per axis of the map, in the order in which kernels see the axes."""
        rest = list(values)
        return (rest.pop(self.row_axis - self.axis), *rest)

    def per_axis(self, name: str, default: int) -> tuple[int, ...]:
        """An argument of one number, or one per axis of the map, in that order."""
        return self.ordered(spread(or_default(self.args.get(name), default), self.axes))

    def rows(
        self, values: Values, inputs: Sequence[torch.Tensor], low: int, high: int
    ) -> torch.Tensor:
        """As :meth:`RowKernel.rows`; an operand taken whole is cut to the rows needed."""
        begin, end = self.operand_rows(self.operand, low, high)
        first, _ = self.needs(0, low, high)
        block = self.operand.take(inputs[0], first, begin, end)
        if self.operand.axis is None:
            block = block.narrow(self.row_axis, begin, end - begin)
        block = block.movedim(self.row_axis, self.axis)
        found = self.compute(values, {self.operand.node: block}, low, high)
        made: torch.Tensor = found if self._pick is None else found[self._pick]
        return self._through_tail(values, made.movedim(self.axis, self.row_axis))

    def _block(self, blocks: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor:
        return blocks[self.operand.node]

    def _pad_rows(
        self, block: torch.Tensor, above: int, below: int, value: float = 0.0
    ) -> torch.Tensor:
        if not above and not below:
            return block
        return F.pad(block, (0, 0) * (self.axes - 1) + (above, below), value=value)


class SlidingKernel(SpatialKernel):
    """Output row ``r`` needs rows ``r*stride - padding`` and on, ``dilation`` apart."""

    kernel: int
    stride: int
    dilation: int
    padding: int

    def _span(self, low: int, high: int) -> tuple[int, int]:
        return positions_needed(self.kernel, self.stride, self.dilation, self.padding, low, high)

    def operand_rows(self, operand: Operand, low: int, high: int) -> tuple[int, int]:
        """The window, clipped to the map."""
        begin, end = self._span(low, high)
        begin = min(max(0, begin), self.size)
        return begin, max(begin, min(end, self.size))

    def padded(self, block: torch.Tensor, low: int, high: int, value: float = 0.0) -> torch.Tensor:
        """The rows of the window with those above and below the map."""
        begin, end = self._span(low, high)
        have, until = self.operand_rows(self.operand, low, high)
        if until == have:
            return self._pad_rows(block, 0, end - begin, value)
        return self._pad_rows(block, have - begin, end - until, value)


def or_default(value: Any, default: Any) -> Any:
    """``value``, or ``default`` where an argument is left out."""
    return default if value is None else value


def node_shape(node: fx.Node) -> tuple[int, ...]:
    """The traced shape of a weight."""
    return tensor_info(traced_value(node)).shape
