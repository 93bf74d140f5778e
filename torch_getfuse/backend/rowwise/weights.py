"""The weights of an operator: what a fetch of them moves, and how they are cut into slices.

A batch norm that is folded into a convolution counts as the convolution's bias, and one of its own
as a scale and a shift, as in the operator graph; the executor calls torch's batch norm all the
same. Weights that are computed from others, or that a call hides, cannot be counted where they are
taken: a fetch of them counts as what the operator graph says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.capture.capture import Capture
from torch_getfuse.backend.fx_nodes.normalize import normalise
from torch_getfuse.backend.fx_nodes.values import traced_value
from torch_getfuse.backend.rowwise.kernels import Accumulator, RowKernel
from torch_getfuse.backend.rowwise.rings import Part
from torch_getfuse.backend.rowwise.spatial_kernels import ConvKernel, TransposedConvKernel
from torch_getfuse.backend.rules.registry import positional
from torch_getfuse.widths import Width, packed


@dataclass(frozen=True)
class Weights:
    """What an operator fetches.

    Attributes:
        op: its name.
        elements: of all weights, by the operator graph.
        bytes: of all weights, by the plan.
        width: bytes of an element; ``None`` for those of each tensor. One that is no number of
            whole bytes packs all elements of the operator.
        counted: the nodes whose tensors are counted when they are fetched; ``None`` where they
            cannot be seen.
        cuts: node -> axis of output channels, of weights that a slice takes a part of.
        by_slices: whether the operator gives some channels from these parts alone; else all of its
            output is computed and the slice is kept.
        axis: the output's axis of channels; ``None`` where that is the axis of rows.
        channels: output channels.
    """

    op: str
    elements: int
    bytes: int
    width: Width | None
    counted: tuple[fx.Node, ...] | None
    cuts: Mapping[fx.Node, int]
    by_slices: bool
    axis: int | None
    channels: int

    def part(self, number: int, count: int) -> Part | None:
        """Channels of slice ``number`` of ``count``; of size zero for those after the last.

        ``None``: all channels, where they lie along the rows.
        """
        if self.axis is None:
            return None
        size = -(-self.channels // count)
        start = min(number * size, self.channels)
        return Part(self.axis, start, min(size, self.channels - start))

    def cut(self, values: Mapping[fx.Node, Any], part: Part) -> dict[fx.Node, Any]:
        """The weights of some channels."""
        return {node: _narrow(values[node], axis, part) for node, axis in self.cuts.items()}

    def fetched(self, values: Mapping[fx.Node, Any], part: Part | None = None) -> int:
        """Bytes of a fetch: of all weights, or of those of some channels.

        Args:
            values: what the nodes give in this call; :meth:`cut` where the operator runs by slices.
            part: the channels.
        """
        if self.counted is None:
            return self._share(self.bytes, part)
        taken = [values[node] for node in self.counted]
        if part is not None and not self.by_slices and self.cuts:
            axes = [self.cuts[node] for node in self.counted]
            taken = [_narrow(one, axis, part) for one, axis in zip(taken, axes, strict=True)]
        if self.width is None:
            total = sum(one.nbytes for one in taken)
        else:
            elements = sum(one.numel() for one in taken)
            if part is not None and part.size and self.cuts:
                # Slices of elements that are no whole bytes add up to all of them.
                start, each = part.start, elements // part.size
                before, until = each * start, each * (start + part.size)
                return packed(until, self.width) - packed(before, self.width)
            total = packed(elements, self.width)
        return total if self.cuts else self._share(total, part)

    def _share(self, total: int, part: Part | None) -> int:
        """Of weights in which the output channels cannot be told apart, the share of some."""
        if part is None:
            return total
        end = part.start + part.size
        return total * end // self.channels - total * part.start // self.channels


def make_weights(
    capture: Capture, kernel: RowKernel | Accumulator, weight_bytes: Width | None
) -> Weights:
    """The weights of the operator of a kernel.

    Args:
        capture: that the kernel was made from.
        kernel: of the operator.
        weight_bytes: the plan's width of a weight; ``None`` for the widths that are stored.
    """
    op, target = kernel.op, kernel.target
    core, *tail = capture.calls[op.name]
    args = dict(normalise(core.node, positional).args)
    counted = _stored(kernel, args, bool(tail))
    elements = sum(traced_value(node).numel() for node in counted)
    stored = sum(traced_value(node).nbytes for node in counted)
    total = capture.graph.stored_bytes(op)
    seen = elements == op.weight_elements and (weight_bytes is not None or stored == total)
    axis = capture.graph.channel_axis(op)
    cuts: dict[fx.Node, int] = {}
    by_slices = False
    name = normalise(core.node, positional).name
    if isinstance(kernel, (ConvKernel, TransposedConvKernel)):
        transposed = isinstance(kernel, TransposedConvKernel)
        by_slices = kernel.groups == 1
        if by_slices or not transposed:
            cuts[kernel.weight] = int(transposed)
    elif name == "linear":
        by_slices = args["weight"] in kernel.weights
        if by_slices:
            cuts[args["weight"]] = 0
    channels = capture.graph.channels(op)
    if cuts:
        norms = {node for call in tail for node in _vectors(call.node)}
        cuts.update((node, 0) for node in (args.get("bias"), *norms) if isinstance(node, fx.Node))
        by_slices = by_slices and all(
            traced_value(node).shape[place] == channels for node, place in cuts.items()
        )
    return Weights(
        op.name,
        op.weight_elements,
        total if weight_bytes is None else packed(op.weight_elements, weight_bytes),
        weight_bytes,
        counted if seen and (not cuts or cuts.keys() >= set(counted)) else None,
        cuts,
        by_slices,
        None if axis == target.stream_axis else axis,
        channels,
    )


def _stored(
    kernel: RowKernel | Accumulator, args: Mapping[str, Any], folds: bool
) -> tuple[fx.Node, ...]:
    """Nodes that stand for the weights of the operator graph, each once.

    One vector of a folded batch norm stands for the bias, two of another for scale and shift.
    """
    given = {
        node: None
        for node in kernel.weights
        if node.op in ("placeholder", "get_attr") and isinstance(traced_value(node), torch.Tensor)
    }
    own = [node for node in given if any(node is value for value in args.values())]
    if folds:
        bias = args.get("bias")
        vectors = [node for node in given if node not in own]
        return (*(node for node in own if node is not bias), *vectors[:1])
    if "running_mean" in args:
        return tuple(own[:2])
    return tuple(own)


def _vectors(norm: fx.Node) -> list[fx.Node]:
    """The vectors of a batch norm: all tensors that it reads but its map."""
    return [
        node
        for node in norm.all_input_nodes
        if isinstance(traced_value(node), torch.Tensor) and traced_value(node).dim() == 1
    ]


def _narrow(value: torch.Tensor, axis: int, part: Part) -> torch.Tensor:
    """The part of a weight that some output channels need."""
    return value.narrow(axis, part.start, part.size)
