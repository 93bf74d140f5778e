"""The referee: a plan made by hand, what is wrong with it, and how far it is from the optimum.

    python examples/referee.py

A plan can come from anywhere: a compiler, a paper, a colleague. ``torch_getfuse.price`` says of
each group whether it is legal and what it moves, and of the whole how far it is from the optimum.
"""

from __future__ import annotations

import torch

import torch_getfuse
from torch_getfuse.models import load_model

OPTIONS = {"buffer": "256KB", "activation_bytes": 1, "weight_bytes": 1}

model = load_model("torchvision:mobilenet_v2")
x = torch.zeros(1, 3, 224, 224)

# By hand: the stages of the paper's table, one group each, names of modules for all below them.
STAGES = [(0, 1), (2, 3), (4, 6), (7, 10), (11, 13), (14, 16), (17, 18)]
groups = [[f"features.{k}" for k in range(first, last + 1)] for first, last in STAGES]
groups.append(["classifier"])

priced = torch_getfuse.price(model, (x,), groups, **OPTIONS)
print(priced, "\n")

# The referee has found an operator in no group, and stages with more weights than fit. So each
# block of these stages becomes a group, the two largest one before and one after their expansion;
# what does not fit even alone stands in none.
wrong = [k for k, group in enumerate(priced.groups) if not group.legal]
mended = [list(group.ops) for group in priced.groups if group.legal]
blocks: dict[tuple[str, bool], list[str]] = {}
for name in (name for k in wrong for name in priced.groups[k].ops):
    block = ".".join(name.split(".")[:2])
    expands = block in ("features.15", "features.16") and ".conv.0." in name
    if name not in priced.best.unfusable:
        blocks.setdefault((block, expands), []).append(name)
mended += [*blocks.values(), ["adaptive_avg_pool2d"]]

again = torch_getfuse.price(model, (x,), mended, **OPTIONS)
print(again, "\n")

# What one pinned border costs: the optimum among the plans that end a group before features.3.
pinned = torch_getfuse.plan(model, (x,), split_before=["features.3"], **OPTIONS)
print(f"a border before features.3 costs {pinned.dram_bytes - again.best.dram_bytes} B")
