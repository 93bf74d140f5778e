"""Run in a process of its own, with ``heap_peak.c`` preloaded: the heap that each group needs.

Prints one JSON object: fusion group -> [bytes at most beyond those before, planned bytes of rings
and weights as float32, bytes of its results, all in bytes].
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import torch

import torch_getfuse
from tests.networks import network
from torch_getfuse.backend.rowwise.group import DepthFirstGroup


def main(name: str) -> None:
    heap = ctypes.CDLL(None)
    for function in (heap.heap_live, heap.heap_peak):
        function.restype = ctypes.c_long
    model, x = network(name)
    options = {"buffer": "256KB", "activation_bytes": 1, "weight_bytes": 1, "cache": False}
    plan = torch_getfuse.plan(model, (x,), method="exact", time_limit=60, **options)
    found: dict[str, list[int]] = {}
    forward = DepthFirstGroup.forward

    def measured(self: DepthFirstGroup, *args: Any) -> Any:
        forward(self, *args)  # code that oneDNN makes and keeps is not the group's
        before = heap.heap_live()
        heap.heap_reset()
        result = forward(self, *args)
        entry = self.entry
        assert entry is not None
        planned = 4 * (entry.planned_ring_bytes + entry.weight_bytes)
        results = result if isinstance(result, tuple) else (result,)
        written = sum(one.numel() * one.element_size() for one in results)
        found[entry.name] = [heap.heap_peak() - before, planned, written]
        return result

    DepthFirstGroup.forward = measured  # type: ignore[method-assign]
    torch.set_num_threads(1)
    torch_getfuse.run_counted(model, (x,), plan)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
