"""What a fusion group costs, by hand and by the package. Read it from top to bottom, or run it.

A convolutional network is limited by DRAM: run one operator at a time and every feature map goes
out to memory and comes back. Run several operators as one *fusion group*, row by row, and only
what crosses the group's border moves; what is inside lives for a few rows in the on-chip buffer.
`best_plan.py` goes on from here: which operators to run together, so that least is moved.
"""

import torch
from torch import nn

from torch_getfuse.accelerator import format_size
from torch_getfuse.backend.capture.capture import capture_model
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.node_set import bits, mask_of


def heading(text: str) -> None:
    """Print a heading."""
    print(f"\n{text}\n{'-' * len(text)}")


# 1. A network -----------------------------------------------------------------------------
# Two inverted residuals, the block of MobileNetV2: widen, filter each channel, narrow, add.


class InvertedResidual(nn.Module):
    """Maps of ``(N, channels, H, W)`` to the same; ``wide`` channels in between."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(channels, wide, 1, bias=False)
        self.filter = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.narrow = nn.Conv2d(wide, channels, 1, bias=False)
        self.act1, self.act2 = nn.ReLU6(), nn.ReLU6()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(self.act2(self.filter(self.act1(self.widen(x)))))


torch.manual_seed(0)
model = nn.Sequential(InvertedResidual(8, 48), InvertedResidual(8, 48)).eval()
x = torch.randn(1, 8, 16, 16)


# 2. The operator graph --------------------------------------------------------------------
# An operator is described by how it reads: a window per operand. A 3x3 window needs a row above
# and a row below; "identity" needs the same row. No later step looks at what an operator is.

heading("The operator graph")
graph: OpGraph = capture_model(model, (x,)).graph
for position, op in enumerate(graph):
    reads = ", ".join(f"{read.tensor} through {read.window}" for read in op.reads)
    print(f"{position:2} {op.name:22} {graph.tensors[op.writes].shape}  reads {reads}")


# 3. What a group costs --------------------------------------------------------------------
# LBDF (line-buffer depth-first): make one output row at a time, and for each first make the
# rows that it needs. A row is kept until nothing in the group needs it any more. So a group's
# buffer is its weights and, for each tensor, the most rows that are alive at once.
# The first block by hand, one byte per element; a row is 16 columns times its channels:

heading("The first block as one group, by hand")
thin, wide = 16 * 8, 16 * 48
by_hand = {
    "x: a row for widen; it stays for the sum, one row behind": 2 * thin,
    "widened and its activation, in place: three rows for the 3x3": 3 * wide,
    "filtered and its activation, in place": 1 * wide,
    "narrowed": 1 * thin,
    "sum": 1 * thin,
}
for what, size in by_hand.items():
    print(f"{size:6} B  {what}")
print(f"{sum(by_hand.values()):6} B  of rows")
assert sum(by_hand.values()) == 3584

# The package's closed form agrees, and names the same terms. (In the tests, an executable
# simulator of the schedule must agree for thousands of random graphs.)

heading("The same by the cost model")
scheme = Lbdf(graph, "line", activation_bytes=1, weight_bytes=1)
BIG = 1 << 20
first = mask_of(i for i, op in enumerate(graph) if op.name.startswith("0."))
rows = weights = 0
for term in scheme.terms(first, BIG):
    print(f"{term.bytes:6} B  {term.kind} of {term.name} ({term.units} x {term.unit_bytes} B)")
    if term.kind == "weights":
        weights += term.bytes
    else:
        rows += term.bytes
assert rows == 3584
assert weights == 8 * 48 + 9 * 48 + 48 * 8
assert rows + weights == scheme.buffer(first, BIG)

# What the group moves: the input once, the output once, the weights once. Alone, its operators
# would move every map in between as well, out and back in.

alone = sum(scheme.dram(1 << i, BIG).total for i in bits(first))
fused = scheme.dram(first, BIG)
print(f"DRAM access of the group: {fused.total} B; of its operators one by one: {alone} B")
assert fused == (8 * 16 * 16, 8 * 16 * 16, weights)


# 4. Valid and invalid ---------------------------------------------------------------------
# A group is valid if its buffer is below the buffer that there is. With 6 KB, one block fits
# and two do not, and the terms say what is in the way.

heading("Both blocks in 6 KB")
BUFFER = 6 * 1024
evaluator = Evaluator(scheme, BUFFER)
both = mask_of(range(len(graph)))
need = evaluator.buffer(both)
assert need is not None
assert evaluator.valid(first)
assert not evaluator.valid(both)
print(f"needs {format_size(need)}, {format_size(need - BUFFER)} more than {format_size(BUFFER)}:")
for term in sorted(scheme.terms(both, BUFFER), key=lambda term: -term.bytes)[:4]:
    print(f"{term.bytes:6} B  {term.kind} of {term.name}")
