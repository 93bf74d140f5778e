"""Row kernel of ``x.unfold(dimension, size, step)`` along the rows: the rows of each window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.rowwise.calls import Values
from torch_getfuse.backend.rowwise.kernels import Site
from torch_getfuse.backend.rowwise.sliding import SlidingKernel


class UnfoldKernel(SlidingKernel):
    """Output row ``r`` is rows ``r*step`` to ``r*step + size - 1``, in an axis of their own."""

    def __init__(self, site: Site) -> None:
        assert site.target.stream_axis is not None
        super().__init__(site, site.rank - site.target.stream_axis)
        self.kernel, self.stride = int(self.args["size"]), int(self.args["step"])
        self.dilation, self.padding = 1, 0

    def compute(
        self, values: Values, blocks: Mapping[fx.Node, torch.Tensor], low: int, high: int
    ) -> Any:
        """The windows of the block."""
        return self._block(blocks).unfold(self.axis, self.kernel, self.stride)


def unfold_kernel(site: Site, args: Mapping[str, Any]) -> UnfoldKernel | None:
    """The kernel of a call; ``None`` where it goes along another axis than that of the rows."""
    dimension = args.get("dimension")
    along = isinstance(dimension, int) and dimension % (site.rank - 1) == site.target.stream_axis
    return UnfoldKernel(site) if along else None
