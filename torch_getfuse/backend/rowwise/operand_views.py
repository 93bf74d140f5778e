"""Operands by rows: which rows of a tensor a row of an operand is, and the views in between.

An operator reads a tensor of the graph through views (reshape, permute, slices, ...). To compute
some of its rows, the rows of the tensor that they need are put through the same views, with the
number of rows there is now in place of the number there was in the trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.capture.capture import Capture
from torch_getfuse.backend.capture.graph_values import View
from torch_getfuse.backend.fx_nodes.normalize import normalise
from torch_getfuse.backend.rowwise.calls import NoRowKernel, make_call
from torch_getfuse.backend.rules.registry import facts_of, positional
from torch_getfuse.backend.rules.rule import ViewForm
from torch_getfuse.backend.rules.view_windows import Layout, is_run
from torch_getfuse.ir import Op

Step = Callable[[Any, int], Any]
"""A view of a block of so many rows."""


@dataclass(frozen=True)
class Operand:
    """One feature map that a call reads.

    Attributes:
        read: which of the operator's ``reads`` it is.
        node: the argument of the call.
        shape: of the operand, one sample.
        axis: its axis of rows; ``None`` where it is taken whole.
        size: its rows, of which row ``i`` is row ``start + stride * i`` of the tensor; the rows
            of the tensor where it is taken whole.
        block: rows of the tensor in one of its rows, that one and those after it, where a view
            has cut the rows up (``stride`` is the same then).
        within: its rows in one row of the tensor, where a view has joined other axes to them.
        source_axis: axis of rows of the tensor.
        steps: the views from the tensor to the operand.
    """

    read: int
    node: fx.Node
    shape: tuple[int, ...]
    axis: int | None
    size: int
    start: int
    stride: int
    block: int
    within: int
    source_axis: int | None
    steps: tuple[Step, ...]

    def needs(self, low: int, high: int) -> tuple[int, int]:
        """First row of the tensor that rows ``[low, high)`` of the operand need, and the one
        after the last; ``(0, 0)`` for no rows.
        """
        if self.axis is None:
            return 0, self.size
        if high <= low:
            return 0, 0
        if self.within > 1:
            return low // self.within, (high - 1) // self.within + 1
        return self.start + self.stride * low, self.start + self.stride * (high - 1) + self.block

    def take(self, block: torch.Tensor, first: int, low: int, high: int) -> torch.Tensor:
        """Rows ``[low, high)`` of the operand out of a block that starts at row ``first``.

        Where it is taken whole, the block holds the whole tensor, and so does the result.
        """
        rows = self.size if self.axis is None else max(0, high - low)
        begin = 0
        if self.axis is not None and self.source_axis is not None:
            begin, end = self.needs(low, high)
            rows = end - begin
            if rows and (begin - first, rows) != (0, block.shape[self.source_axis]):
                block = block.narrow(self.source_axis, begin - first, rows)
            elif not rows:
                block = block.narrow(self.source_axis, 0, 0)
            if self.stride > self.block:
                rows = high - low
                index = [slice(None)] * block.dim()
                index[self.source_axis] = slice(None, None, self.stride)
                block = block[tuple(index)]
        for step in self.steps:
            block = step(block, rows)
        if self.axis is not None and self.within > 1 and rows * self.within != high - low:
            block = block.narrow(self.axis, low - begin * self.within, high - low)
        return block


def make_operand(
    capture: Capture, op: Op, node: fx.Node, view: View, *, by_rows: bool, axis: int | None = None
) -> Operand:
    """How an operator reads one argument.

    Args:
        capture: in whose graph the nodes are.
        op: the operator.
        node, view: the argument and what it shows.
        by_rows: whether it is read by rows; else whole.
        axis: the axis of rows where the operand has one row only, so that none can be seen.

    Raises:
        NoRowKernel: where the views cannot be followed.
    """
    reads = [read.tensor for read in op.reads]
    tensor = capture.graph.tensors[view.tensor]
    follow = _Follower(capture, op, tensor.stream_axis, tensor.rows, by_rows)
    chain = follow.chain(node, view)
    place = follow.place(view.layout) if by_rows else None
    shape = follow.resized(view, None)
    found = place or _Place(0, tensor.rows, 0, 1, 1, 1)
    if place is not None:
        axis = place.axis
    elif by_rows and tensor.rows > 1:
        raise NoRowKernel(f"{op.name}: {node.name} has lost the rows of {view.tensor!r}")
    elif axis is not None and -len(shape) <= axis < len(shape) and shape[axis] != 1:
        raise NoRowKernel(f"{op.name}: {node.name} has {shape[axis]} rows made out of one")
    steps: list[Step] = []
    before = View(view.tensor, Layout.of(_traced_shape(capture, view)), None)
    for step_node in chain:
        after = capture.views.get(step_node)
        step = follow.step(step_node, before, after)
        if step is not None:
            steps.append(step)
        before = after or before
    return Operand(
        reads.index(view.tensor),
        node,
        shape,
        axis,
        found.size * found.within,
        found.start,
        found.stride,
        found.block,
        found.within,
        tensor.stream_axis,
        tuple(steps),
    )


def is_base(capture: Capture, view: View) -> bool:
    """Whether a view is the tensor itself."""
    return view.layout == Layout.of(_traced_shape(capture, view))


def _traced_shape(capture: Capture, view: View) -> list[int]:
    shape = list(capture.graph.tensors[view.tensor].shape)
    batch = capture.batch_axes[view.tensor]
    if batch is not None:
        shape[batch[0]] *= capture.samples
    return shape


@dataclass(frozen=True)
class _Follower:
    """Makes the views of one operand."""

    capture: Capture
    op: Op
    stream: int | None
    rows: int
    by_rows: bool

    def chain(self, node: fx.Node, view: View) -> list[fx.Node]:
        """The view nodes from a tensor to an argument, in order."""
        cores = {calls[-1].node for calls in self.capture.calls.values() if calls}
        found: list[fx.Node] = []
        while node.op != "placeholder" and node not in cores:
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node):
                raise NoRowKernel(f"{self.op.name}: {node.name} is no view of {view.tensor!r}")
            if source in cores and node in self.capture.views:
                picked = self.capture.views[node]
                if source not in self.capture.views and picked.tensor == view.tensor:
                    return found[::-1]  # one of several results
            found.append(node)
            node = source
        shown = self.capture.views.get(node)
        if shown is None or shown.tensor != view.tensor:
            raise NoRowKernel(
                f"{self.op.name} reads {view.tensor!r} under the name {node.name}, which it had "
                "before it was changed in place"
            )
        return found[::-1]

    def place(self, layout: Layout) -> _Place | None:
        """Where a view has the rows of the tensor, and which of them."""
        if self.stream is None:
            return None
        found = layout.find(self.stream)
        hits = [(place, atom) for place, atom in found if atom.size > 1]
        if not hits and self.rows > 1:
            hits = found  # one row of several
        if not hits:
            return None
        axis, atom = max(hits, key=lambda hit: hit[1].stride)
        start = sum(one.start for _, one in found)
        if len(hits) > 1:
            inside = sorted((one for _, one in hits if one is not atom), key=lambda one: one.stride)
            if len(layout.axes[axis]) > 1 or not is_run(inside, atom.stride):
                raise NoRowKernel(f"{self.op.name} reads rows that a view has cut up")
            return _Place(axis, atom.size, start, atom.stride, atom.stride, 1)
        along = layout.axes[axis]
        number = along.index(atom)
        before = math.prod(one.size for one in along[:number])
        # With other axes before the rows, these are not in one piece: as a linear layer reads them.
        joined = before in (1, self.capture.samples)
        within = math.prod(one.size for one in along[number + 1 :]) if joined else 1
        if within > 1 and (start, atom.stride, atom.size) != (0, 1, self.rows):
            raise NoRowKernel(f"{self.op.name} reads some of the rows, joined to other axes")
        return _Place(axis, atom.size, start, atom.stride, 1, within)

    def resized(self, view: View, rows: int | None) -> tuple[int, ...]:
        """The shape of a view of one sample with so many rows (``None``: all)."""
        shape = list(view.layout.shape)
        if rows is not None and (place := self.place(view.layout)) is not None:
            shape[place.axis] = shape[place.axis] // place.size * (rows // place.block)
        samples = self.capture.samples
        if samples > 1 and self.capture.batch_axes[view.tensor] is not None:
            batch = view.batch
            if batch is None or shape[batch] % samples:
                raise NoRowKernel(f"{self.op.name}: a view of {view.tensor!r} hides the batch")
            shape[batch] //= samples
        return tuple(shape)

    def step(self, node: fx.Node, before: View, after: View | None) -> Step | None:
        """One view on a block; ``None`` where it changes nothing."""
        invocation = normalise(node, positional)
        name, args = invocation.name, invocation.args
        form = facts_of(name).view
        source = node.args[0]
        part = form is ViewForm.INDEX and source not in self.capture.views  # of a split
        if form is ViewForm.COMPONENT:
            half = make_call(node)
            return lambda block, rows: half({source: block})  # type: ignore[dict-item]
        if after is not None and after.layout == before.layout and not part:
            return None
        rank = len(before.layout.axes)
        place = self.place(before.layout) if self.by_rows else None
        if form in (ViewForm.RESHAPE, ViewForm.EXPAND):
            if after is None:
                raise NoRowKernel(f"{self.op.name}: {node.name} gives several tensors")
            shown = after
            if form is ViewForm.EXPAND:
                return lambda block, rows: block.expand(self._shape(shown, rows))
            return lambda block, rows: block.reshape(self._shape(shown, rows))
        call = make_call(node)

        def replay(block: Any, rows: int) -> Any:
            return call({source: block})  # type: ignore[dict-item]

        if form is ViewForm.MOVE:
            return replay
        if form is ViewForm.INDEX:
            index = args["index"]
            if part:
                return lambda block, rows: block[index]
            if place is not None:
                index = _without(index, place.axis, rank)
            return lambda block, rows: block[index]
        dim = args.get("dim")
        axis = (0 if dim is None else int(dim)) % rank
        if form in (ViewForm.SLICE, ViewForm.SPLIT, ViewForm.SELECT):
            if place is None or place.axis != axis:
                return replay
            if form is ViewForm.SLICE:
                return None  # the rows were picked out of the tensor
            if form is ViewForm.SPLIT:
                return lambda block, rows: _Same(block)
        raise NoRowKernel(f"{self.op.name} reads a view by {name}, which has no rule for rows")

    def _shape(self, view: View, rows: int) -> tuple[int, ...]:
        return self.resized(view, rows if self.by_rows else None)


@dataclass(frozen=True)
class _Place:
    """Where the rows of a tensor are in a view of it; fields as those of :class:`Operand`."""

    axis: int
    size: int
    start: int
    stride: int
    block: int
    within: int


class _Same:
    """The parts of a map that is split over its rows: the rows were picked out of the tensor."""

    def __init__(self, block: torch.Tensor) -> None:
        self.block = block

    def __getitem__(self, part: int) -> torch.Tensor:
        return self.block


def _without(index: Any, place: int, rank: int) -> tuple[Any, ...]:
    """An index that leaves one axis as it is."""
    parts: Sequence[Any] = index if isinstance(index, tuple) else (index,)
    named = sum(type(part) in (int, slice) for part in parts)
    found: list[Any] = []
    axis = 0
    for part in parts:
        if part is None:
            found.append(part)
        elif part is Ellipsis:
            axis += rank - named
            found.append(part)
        else:
            found.append(slice(None) if axis == place else part)
            axis += 1
    return tuple(found)
