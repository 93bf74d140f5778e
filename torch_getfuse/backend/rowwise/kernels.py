"""How an operator computes some rows of its output from rows of its inputs.

A kernel is made once per operator, from its FX nodes (:func:`make_kernel` in ``row_rules``), and
holds no weights: ``rows`` fetches them from ``values``, the values that the group's other nodes
have in this call, so that an optimizer step or another instance of the model is right.

Three kinds:

* :class:`RowKernel` computes rows ``[low, high)`` from the rows that :meth:`RowKernel.needs` names.
* :class:`WholeKernel` is one that needs all rows of all inputs and computes all of its output.
* :class:`Accumulator` takes in one row after the other and has one output unit (``reduce``).

Blocks are tensors of one sample, with the axes of the traced tensor and so many rows along
``Tensor.stream_axis``; a tensor that is one unit is a block of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.capture.capture import Capture
from torch_getfuse.backend.capture.graph_values import CoreCall
from torch_getfuse.backend.fx_nodes.values import flat_tensors, size_hint, traced_value
from torch_getfuse.backend.rowwise.calls import NoRowKernel, Values, make_call
from torch_getfuse.backend.rowwise.operand_views import Operand, make_operand
from torch_getfuse.ir import Op, Tensor, WindowKind


@dataclass(frozen=True)
class Site:
    """An operator in its FX graph: what every kernel is made from.

    Attributes:
        capture: in whose graph the nodes are.
        op: the operator.
        core: its call.
        tail: the batch norm that is folded into it, if any.
        broadcasts: whether the call aligns its operands, weights too, at their last axes.
    """

    capture: Capture
    op: Op
    core: CoreCall
    tail: tuple[CoreCall, ...]
    broadcasts: bool

    @property
    def target(self) -> Tensor:
        """The tensor that the operator writes."""
        return self.capture.graph.tensors[self.op.writes]

    @property
    def rank(self) -> int:
        """Axes of the output."""
        return len(self.target.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the call gives."""
        return flat_tensors(traced_value(self.core.node))[0].dtype

    def source(self, read: int) -> Tensor:
        """A tensor that the operator reads."""
        return self.capture.graph.tensors[self.op.reads[read].tensor]

    def held(self, read: int) -> bool:
        """Whether the operator needs all rows of an input, and there are several."""
        everything = self.op.reads[read].window.kind in (WindowKind.WHOLE, WindowKind.REDUCE)
        return everything and self.source(read).rows > 1

    def operands(self, *, by_rows: bool | None = None, axis: int | None = None) -> list[Operand]:
        """The operands that are read; ``by_rows=None``: by rows unless the window is held."""
        reads = [read.tensor for read in self.op.reads]
        found = []
        for node, view in self.core.operands:
            if view.tensor not in reads:
                continue
            rows = not self.held(reads.index(view.tensor)) if by_rows is None else by_rows
            place = axis if rows else None
            found.append(make_operand(self.capture, self.op, node, view, by_rows=rows, axis=place))
        return found

    def others(self) -> list[fx.Node]:
        """Nodes that the calls read besides feature maps: weights, numbers."""
        found: dict[fx.Node, None] = {}
        for call in (self.core, *self.tail):
            features = {node for node, _ in call.operands}
            found.update((node, None) for node in call.node.all_input_nodes if node not in features)
        return list(found)

    def unread(self) -> dict[fx.Node, torch.Tensor]:
        """Operands of which only the type is asked (``x.type_as(y)``): what stands for them."""
        reads = {read.tensor for read in self.op.reads}
        found = {}
        for node, view in self.core.operands:
            if view.tensor not in reads:
                like = traced_value(node)
                found[node] = torch.zeros((), dtype=like.dtype, device="cpu").expand(like.shape)
        return found

    def by_sample(self) -> dict[fx.Node, int]:
        """Constants that differ from sample to sample, and the size of a sample's part."""
        samples, lead = self.capture.samples, self.target.shape[:1]
        if samples == 1 or not self.broadcasts or not lead:
            return {}
        return {
            node: lead[0]
            for node in self.others()
            if isinstance(value := traced_value(node), torch.Tensor)
            and value.dim() == self.rank
            and value.shape[0] == samples * lead[0]
        }


class _Kernel:
    """What the three kinds share."""

    def __init__(self, site: Site, operands: Sequence[Operand]) -> None:
        self.op = site.op
        self.target = site.target
        self.dtype = site.dtype
        self.operands = tuple(operands)
        self.weights: tuple[fx.Node, ...] = tuple(site.others())
        """Nodes whose values ``rows`` looks up."""
        self.by_sample = site.by_sample()
        """Those of which each sample has a part of its own, and that part's size."""
        self._unread = site.unread()
        self._tail = tuple((make_call(c.node), c.operands[0][0]) for c in site.tail)
        self._pick = _picked(site)

    def _finish(self, values: Values, result: Any) -> torch.Tensor:
        """The picked result of a call, through the folded batch norm."""
        return self._through_tail(values, result if self._pick is None else result[self._pick])

    def _through_tail(self, values: Values, block: torch.Tensor) -> torch.Tensor:
        """A block through the folded batch norm."""
        for call, operand in self._tail:
            block = call(_Env(values, {operand: block}))
        return block


class RowKernel(_Kernel, ABC):
    """Computes rows of one operator.

    Attributes:
        op: the operator.
        target: the tensor that it writes.
        operands: its feature maps, in the order of the call.
        weights: the nodes whose values it looks up.
    """

    def __init__(self, site: Site, operands: Sequence[Operand]) -> None:
        super().__init__(site, operands)
        self._orders = {
            operand.node: _order_of(flat_tensors(traced_value(operand.node))[0])
            for operand in operands
            if self.op.reads[operand.read].window.kind is WindowKind.WHOLE
        }

    def needs(self, read: int, low: int, high: int) -> tuple[int, int]:
        """First row of input ``read`` (as in ``op.reads``) that output rows ``[low, high)`` need,
        and the one after the last, without padding; ``(0, 0)`` where they need none.
        """
        first, end = 0, 0
        for operand in self.operands:
            if operand.read == read:
                begin, after = operand.needs(*self.operand_rows(operand, low, high))
                if after > begin:
                    first = begin if end == 0 else min(first, begin)
                    end = max(end, after)
        return first, end

    def rows(
        self, values: Values, inputs: Sequence[torch.Tensor], low: int, high: int
    ) -> torch.Tensor:
        """Output rows ``[low, high)`` of one sample, a new tensor.

        Args:
            values: what the nodes in ``weights`` give.
            inputs: per entry of ``op.reads``, exactly the rows that :meth:`needs` names; padding
                at the true borders of the map is the kernel's own business.
            low, high: rows of the output.
        """
        blocks = {}
        for operand in self.operands:
            begin, end = self.operand_rows(operand, low, high)
            first, _ = self.needs(operand.read, low, high)
            block = operand.take(inputs[operand.read], first, begin, end)
            blocks[operand.node] = _in_order(block, self._orders.get(operand.node, ()))
        return self._finish(values, self.compute(values, blocks, low, high))

    def operand_rows(self, operand: Operand, low: int, high: int) -> tuple[int, int]:
        """Rows of an operand that output rows ``[low, high)`` need, clipped to its rows."""
        return (0, 1) if operand.size == 1 else (low, high)

    @abstractmethod
    def compute(
        self, values: Values, blocks: Mapping[fx.Node, torch.Tensor], low: int, high: int
    ) -> Any:
        """What the call gives for output rows ``[low, high)``.

        Args:
            blocks: per operand the rows of :meth:`operand_rows`, or all where it is taken whole.
        """


class CallKernel(RowKernel):
    """An operator whose output row needs the operands' rows of the same number.

    The call itself on blocks of rows. Operands of one row, and weights, are broadcast to the
    rows; those that have a row for each output row are cut to the same rows, if the call
    broadcasts.
    """

    def __init__(self, site: Site, operands: Sequence[Operand]) -> None:
        super().__init__(site, operands)
        self._call = make_call(site.core.node)
        self._rank = site.rank
        for operand in operands:
            if operand.axis is not None and operand.size not in (1, self.target.rows):
                raise NoRowKernel(
                    f"{self.op.name}: {operand.node.name} has {operand.size} rows, the output "
                    f"{self.target.rows}"
                )
        whole = {operand.node for operand in operands if operand.axis is None}
        self._aligned = whole | set(self.weights) if site.broadcasts else set()

    def compute(
        self, values: Values, blocks: Mapping[fx.Node, torch.Tensor], low: int, high: int
    ) -> Any:
        """The call on blocks."""
        env = {**self._unread, **blocks}
        for node in self._aligned:
            env[node] = self._cut(blocks[node] if node in blocks else values[node], low, high)
        return self._call(_Env(values, env))

    def _cut(self, value: Any, low: int, high: int) -> Any:
        axis, rows = self.target.stream_axis, self.target.rows
        if axis is None or rows == 1 or not isinstance(value, torch.Tensor):
            return value
        place = axis - (self._rank - value.dim())
        if place < 0 or value.shape[place] != rows:
            return value
        return value.narrow(place, low, high - low)


class WholeKernel(RowKernel):
    """An operator that is computed at once from all of its inputs, and then handed out by rows."""

    def __init__(self, site: Site) -> None:
        super().__init__(site, site.operands(by_rows=False))
        self._call = make_call(site.core.node)

    def compute(
        self, values: Values, blocks: Mapping[fx.Node, torch.Tensor], low: int, high: int
    ) -> Any:
        """All of the output; ``rows`` must be asked for all of it.

        Raises:
            ValueError: where it is asked for some of it.
        """
        if (low, high) != (0, self.target.rows):
            raise ValueError(f"{self.op.name} is computed whole, not rows {low} to {high}")
        return self._call(_Env(values, {**self._unread, **blocks}))


def _order_of(value: torch.Tensor) -> Sequence[int]:
    """The axes of a tensor from the outermost in memory to the innermost; of expanded ones none."""
    strides = [size_hint(stride) for stride in value.stride()]
    return sorted(range(len(strides)), key=lambda axis: -strides[axis]) if all(strides) else ()


def _in_order(block: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """A block whose axes lie in memory as those of the traced operand; itself where they do.

    Torch chooses kernels by that: of maps in channels last, its group norm computes the variance as
    a difference of means, and loses where the mean is large all that it has of it elsewhere.
    """
    if not order or _order_of(block) == order:
        return block
    back = [order.index(axis) for axis in range(len(order))]
    return block.permute(*order).clone(memory_format=torch.contiguous_format).permute(*back)


class Accumulator(_Kernel, ABC):
    """An operator with one output unit that takes in each row of its one input as it arrives."""

    @abstractmethod
    def take(self, values: Values, state: Any, block: torch.Tensor, row: int) -> Any:
        """The state with row ``row`` in it; ``state`` is ``None`` before the first row."""

    @abstractmethod
    def finish(self, values: Values, state: Any) -> torch.Tensor:
        """The output unit, once all rows are in."""


class _Env(Mapping[fx.Node, Any]):
    """Values of a call: blocks in front of weights."""

    def __init__(self, values: Values, blocks: Mapping[fx.Node, Any]) -> None:
        self._values = values
        self._blocks = blocks

    def __getitem__(self, node: fx.Node) -> Any:
        return self._blocks[node] if node in self._blocks else self._values[node]

    def __iter__(self) -> Any:
        return iter({**self._values, **self._blocks})

    def __len__(self) -> int:
        return len({**self._values, **self._blocks})


def _picked(site: Site) -> int | None:
    """Which of several results of a call the operator is."""
    node = site.core.node
    if not isinstance(traced_value(node), (tuple, list)):
        return None
    picks = {
        user.args[1] for user in node.users if user in site.capture.views and len(user.args) == 2
    }
    if len(picks) != 1 or not isinstance(index := picks.pop(), int):
        raise NoRowKernel(f"{site.op.name} gives several tensors, which are one unit together")
    return index
