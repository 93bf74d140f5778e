"""Row kernels of resizing: nearest, nearest-exact, linear and bilinear, corners aligned or not.

Between rows the positions and weights are computed here, as torch computes them (in float32);
between columns torch resizes the rows that were found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from torch_getfuse.backend.rowwise.calls import Values
from torch_getfuse.backend.rowwise.kernels import RowKernel, Site
from torch_getfuse.backend.rowwise.operand_views import Operand
from torch_getfuse.backend.rowwise.sliding import SpatialKernel
from torch_getfuse.backend.rules.rule import Call
from torch_getfuse.backend.rules.spatial import given_scale, resize_mode

_MODES = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear")


class ResizeKernel(SpatialKernel):
    """Each output row from one input row (nearest) or two, weighed (linear).

    Attributes:
        mode: torch's name of it.
        align: whether the corners are aligned.
        step: input rows per output row.
        scales: per axis the scale factor that torch was given instead of a size, else ``None``;
            rows first.
    """

    def __init__(self, site: Site, mode: str, align: bool, scales: tuple[float | None, ...]):
        super().__init__(site, len(scales))
        self.mode, self.align, self.scales = mode, align, self.ordered(scales)
        rows = self.target.rows
        self.out = self.ordered(self.target.shape[self.axis :])
        if align:
            self.step = (self.size - 1) / (rows - 1) if rows > 1 else 0.0
        else:
            scale = self.scales[0]
            self.step = self.size / rows if scale is None else 1.0 / scale

    def _source(self, row: int) -> tuple[int, int, float]:
        """The two input rows of an output row, and the share of the second."""
        step, last = self.step, self.size - 1
        if self.mode == "nearest":
            at = min(math.floor(row * step), last)
            return at, at, 0.0
        if self.mode == "nearest-exact":
            at = min(math.floor((row + 0.5) * step), last)
            return at, at, 0.0
        place = row * step if self.align else max(0.0, (row + 0.5) * step - 0.5)
        at = min(math.floor(place), last)
        share = min(max(place - at, 0.0), 1.0)
        # A map that keeps its size is read row by row: the window then holds no second row.
        return at, min(at + 1, last) if share else at, share

    def operand_rows(self, operand: Operand, low: int, high: int) -> tuple[int, int]:
        """From the first output row's first to the last one's second."""
        return self._source(low)[0], self._source(high - 1)[1] + 1

    def compute(
        self, values: Values, blocks: Mapping[fx.Node, torch.Tensor], low: int, high: int
    ) -> Any:
        """The columns of all input rows by torch, then the rows weighed."""
        block = self._block(blocks)
        first = self._source(low)[0]
        wide = self._columns(block)
        made = []
        for row in range(low, high):
            one, two, share = self._source(row)
            found = wide.narrow(self.axis, one - first, 1)
            if share:
                below = wide.narrow(self.axis, two - first, 1)
                found = torch.lerp(found.float(), below.float(), share)
            made.append(found)
        found = (
            made[0] if len(made) == 1 else torch.cat([m.to(made[0].dtype) for m in made], self.axis)
        )
        return found.to(block.dtype)

    def _columns(self, block: torch.Tensor) -> torch.Tensor:
        if self.axes == 1:
            return block
        linear = self.mode in ("bilinear", "trilinear")
        corners = self.align if linear else None
        rows = block.shape[self.axis]
        if self.scales[1] is None:
            return F.interpolate(
                block, size=(rows, *self.out[1:]), mode=self.mode, align_corners=corners
            )
        return F.interpolate(
            block,
            scale_factor=(1.0, *(scale or 1.0 for scale in self.scales[1:])),
            mode=self.mode,
            align_corners=corners,
        )


def make(site: Site, call: Call) -> RowKernel | None:
    """The kernel of a resizing; ``None`` for a mode that is computed whole."""
    mode, align = resize_mode(call)
    axes = site.rank - 2
    if mode not in _MODES or call.get("antialias", False) or axes > 3:
        return None
    return ResizeKernel(site, mode, align, tuple(given_scale(call, a, axes) for a in range(axes)))
