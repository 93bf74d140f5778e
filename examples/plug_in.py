"""A cost model, a search and an operator of one's own, without a package around them.

    python examples/plug_in.py

An object is accepted wherever a name is: ``scheme=MyScheme``, ``method=my_search``. A package makes
names of them by entry points; ``examples/plugin/`` is one, and ``docs/extending/`` explains it.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
from torch import nn

import torch_getfuse
from torch_getfuse import FusionProblem, FusionScheme, Repair, Run, SearchResult, bits


# An operator: how it reads its input is all that a plan needs to know.
@torch.library.custom_op("demo::soft_clip", mutates_args=())
def soft_clip(x: torch.Tensor) -> torch.Tensor:
    """``tanh``, elementwise."""
    return torch.tanh(x)


soft_clip.register_fake(torch.empty_like)
torch_getfuse.register_rule("demo::soft_clip", like="tanh")


class WholeMaps(FusionScheme):
    """A chip that holds whole maps: a group needs all of its tensors and weights at once."""

    name = "whole_maps"
    additive = True  # DRAM access is a sum over tensors: bounds are proved
    monotone = True  # a group that grows needs no less: searches may give up early

    def buffer(self, mask: int, buffer_bytes: int) -> int:
        """Bytes of every tensor that the group touches, and of its weights."""
        ops = [self.graph.ops[i] for i in bits(mask)]
        held = {op.writes for op in ops} | {read.tensor for op in ops for read in op.reads}
        weights = sum(self.weights[i] for i in bits(mask))
        return weights + sum(self.graph.tensor_bytes[name] for name in held)


def shuffled_merge(
    problem: FusionProblem,
    budget: int,
    seed: int,
    repair: Repair | None,
    time_limit: float | None,
    progress: Callable[[int, int], None] | None,
) -> SearchResult:
    """Merge neighbours in a random order for as long as they fit; the best of ``budget`` tries."""
    rng = Random(seed)
    with Run(problem, budget, time_limit, progress) as run:
        while run.more():
            plan = list(problem.blocks)
            for start in rng.sample(plan, len(plan)):
                for other in list(plan):
                    joined = start | other
                    rest = [group for group in plan if group not in (start, other)]
                    merged = [*rest, joined]
                    if start in plan and start != other and problem.legal(tuple(merged)):
                        plan, start = merged, joined
            run.score(tuple(plan))
    return run.result()


class Net(nn.Module):
    """Convolutions around the operator of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape, ``(N, 4, H, W)``."""
        for conv in self.convs:
            x = soft_clip(conv(x))
        return x


torch.manual_seed(0)
model, x = Net().eval(), torch.randn(1, 4, 16, 16)
OPTIONS = {"buffer": "4KB", "activation_bytes": 1, "weight_bytes": 1, "cache": False}
for scheme in ("lbdf", WholeMaps):
    for method in ("auto", shuffled_merge):
        plan = torch_getfuse.plan(model, (x,), scheme=scheme, method=method, budget=20, **OPTIONS)
        print(f"{plan.scheme}, {plan.method}: {plan!r}")
        plan.verify()
print(plan)
