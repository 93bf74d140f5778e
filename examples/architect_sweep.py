"""How much on-chip memory does a network need? A sweep of buffers for somebody who designs a chip.

    python examples/architect_sweep.py [PICTURE]

Plans ResNet-18 for each buffer with 8-bit activations and weights: under LBDF, where every group
goes out to DRAM, and under cascade, where tensors stay on chip and weights stream. The knee of a
curve is where more memory stops paying; the smallest buffer at the floor (inputs, outputs and
weights once) is all that the network can use. PICTURE is an .svg or .png file; it needs matplotlib.
"""

from __future__ import annotations

import sys

import torch_getfuse
from torch_getfuse.accelerator import format_size

BUFFERS = ["64KB", "256KB", "512KB", "1MB"]

curve = torch_getfuse.sweep(
    "torchvision:resnet18",
    buffers=BUFFERS,
    schemes=["lbdf", "cascade"],
    activation_bytes=1,
    weight_bytes=1,
    n_jobs=1,
)
print(curve)

print("\nWhere more memory stops paying:")
for knee in curve.knees():
    print(
        f"  {knee.scheme}: {format_size(knee.buffer_bytes)}, with {knee.share:.0%} of all that "
        f"the largest buffer saves over the smallest ({format_size(knee.dram_bytes)} of DRAM "
        "access left)"
    )

print("\nWhat is enough, within 5 % of the floor:")
for found in curve.smallest(percent=5):
    print(f"  {found}")

if len(sys.argv) > 1:
    curve.save(sys.argv[1])
    print(f"\n{sys.argv[1]}: the picture")

# Every figure is in the records, in bytes; curve.to_pandas() has them as a table.
best = min(curve.records, key=lambda record: (record["dram_bytes"], record["buffer_bytes"]))
assert best["dram_bytes"] == best["floor_bytes"], "some plan reaches the floor"
print(
    f"\nat the floor first: {best['scheme']} with {format_size(best['buffer_bytes'])}, "
    f"{best['groups']} steps, {best['proof']}"
)
