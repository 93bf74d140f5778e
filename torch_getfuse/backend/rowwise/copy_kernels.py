"""Row kernels of copies along the rows: ``x.unfold`` and ``repeat_interleave``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.fx_nodes.normalize import normalise
from torch_getfuse.backend.rowwise.calls import Values
from torch_getfuse.backend.rowwise.kernels import RowKernel, Site
from torch_getfuse.backend.rowwise.operand_views import Operand
from torch_getfuse.backend.rowwise.sliding import SlidingKernel, SpatialKernel
from torch_getfuse.backend.rules.registry import positional


class UnfoldKernel(SlidingKernel):
    """Output row ``r`` is rows ``r*step`` to ``r*step + size - 1``, in an axis of their own."""

    def __init__(self, site: Site, axes: int) -> None:
        super().__init__(site, axes)
        self.kernel, self.stride = int(self.args["size"]), int(self.args["step"])
        self.dilation, self.padding = 1, 0

    def compute(
        self, values: Values, blocks: Mapping[fx.Node, torch.Tensor], low: int, high: int
    ) -> Any:
        """The windows of the block."""
        return self._block(blocks).unfold(self.axis, self.kernel, self.stride)


class InterleaveKernel(SpatialKernel):
    """Output row ``r`` is row ``r // repeats``."""

    def __init__(self, site: Site, axes: int) -> None:
        super().__init__(site, axes)
        self.repeats = int(self.args["repeats"])

    def operand_rows(self, operand: Operand, low: int, high: int) -> tuple[int, int]:
        """The rows that are repeated."""
        begin = low // self.repeats
        return begin, max(begin, -(-high // self.repeats))

    def compute(
        self, values: Values, blocks: Mapping[fx.Node, torch.Tensor], low: int, high: int
    ) -> Any:
        """The block's rows several times each, without those before ``low``."""
        made = self._block(blocks).repeat_interleave(self.repeats, self.axis)
        return made.narrow(self.axis, low % self.repeats, high - low)


def copy_kernel(site: Site, name: str) -> RowKernel | None:
    """The kernel of a call; ``None`` where it goes along another axis than that of the rows."""
    along = {"unfold": "dimension", "repeat_interleave": "dim"}[name]
    axis = normalise(site.core.node, positional).args.get(along)
    rank = len(site.core.operands[0][1].layout.axes)
    stream = site.target.stream_axis
    if stream is None or not isinstance(axis, int) or axis % rank != stream:
        return None
    make = UnfoldKernel if name == "unfold" else InterleaveKernel
    return make(site, site.rank - stream)
