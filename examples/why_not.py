"""Why do these operators not fit together? What fills the buffer, which edges are to blame.

    python examples/why_not.py [FOLDER]

Two inverted residuals do not fit an 8 KB buffer as one group. The explanation names the terms that
fill it, the edges that explainers blame, and the cut that the recursive split takes with its price
in DRAM access. Then the question is turned round: what would make it fit? FOLDER gets the
explanation as text, and as a picture where matplotlib is installed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn

import torch_getfuse
from torch_getfuse.accelerator import format_size


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow, add: the block of MobileNetV2."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(channels, wide, 1, bias=False)
        self.filter = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.narrow = nn.Conv2d(wide, channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape, ``(N, channels, H, W)``."""
        return x + self.narrow(self.filter(self.widen(x)))


torch.manual_seed(0)
model = nn.Sequential(InvertedResidual(8, 48), InvertedResidual(8, 48)).eval()
x = torch.zeros(1, 8, 16, 16)
ONE_BYTE = {"activation_bytes": 1, "weight_bytes": 1}

# "0" and "1" are the two blocks: a path of a module stands for all operators below it. The
# explainers "saliency" and "all" need no weights of their own; the default asks four.
why = torch_getfuse.explain(
    model, (x,), ["0", "1"], explainers=["saliency", "all"], buffer="8KB", **ONE_BYTE
)
print(why, "\n")
assert not why.valid
assert why.gap_bytes is not None

largest = why.terms[0]
print(f"largest term: {largest.kind} of {largest.name}, {format_size(largest.bytes)}")
print(f"the cut costs {format_size(why.added_dram_bytes)} of DRAM access more than one group\n")

# What would make it fit? A larger buffer, narrower elements, or fewer rows in flight.
enough = why.buffer_bytes + why.gap_bytes + 1
QUESTIONS = {
    f"a buffer of {enough} B": {"buffer": enough, **ONE_BYTE},
    "4-bit weights": {"buffer": "8KB", "activation_bytes": 1, "weight_bytes": 0.5},
    "pixels instead of rows": {"buffer": "8KB", "granularity": "pixel", **ONE_BYTE},
}
for what, options in QUESTIONS.items():
    answer = torch_getfuse.explain(model, (x,), ["0", "1"], ["all"], **options)
    print(f"{what}: {answer!r}")

if len(sys.argv) > 1:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    why.save(folder / "why.md")
    why.save(folder / "why.html")  # plans the model as well, and shows the edges in its graph
    if importlib.util.find_spec("matplotlib"):
        why.save(folder / "why.svg")
