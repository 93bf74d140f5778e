"""Running a graph on tensors without memory, to learn what its nodes give for other inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.torch_private import FakeTensorMode


class FakeRun(fx.Interpreter):
    """Runs a graph on fake inputs; ``values`` are those of its nodes.

    Args:
        gm: what to run.
        mode: that the inputs were made in, and which is on.
        known: values of nodes that cannot be worked out without memory.
    """

    def __init__(
        self, gm: fx.GraphModule, mode: FakeTensorMode, known: Mapping[fx.Node, Any] | None = None
    ) -> None:
        super().__init__(gm)
        self.values: dict[fx.Node, Any] = {}
        self._mode = mode
        self._known = known or {}

    def run_node(self, n: fx.Node) -> Any:
        value = self._known[n] if n in self._known else super().run_node(n)
        if n.op != "output":
            self.values[n] = value
        return value

    def get_attr(self, *args: Any) -> Any:
        value = super().get_attr(*args)
        if isinstance(value, torch.Tensor):
            return self._mode.from_tensor(value, static_shapes=True)
        return value
