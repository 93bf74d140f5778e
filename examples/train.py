"""Train a compiled model: the same losses and weights as eager, to the last bit.

    python examples/train.py

``model.compile`` compiles in place, so the model keeps its class and the names of its weights. The
forward is split into fusion groups for the buffer; gradients, batch norm, dropout and the optimizer
work as without the backend. ``docs/training.md`` shows Hugging Face Trainer, Accelerate, Lightning,
timm and PEFT.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import torch_getfuse

STEPS = 5


class Classifier(nn.Module):
    """Four classes of 16x16 images; with the same weights each time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores, ``(N, 4)``."""
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(x + self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def train(model: nn.Module) -> list[float]:
    """The loss of each step; the data are drawn anew, the same for every model."""
    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        images = torch.randn(8, 3, 16, 16, generator=draw)
        labels = torch.randint(0, 4, (8,), generator=draw)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


eager, model = Classifier(), Classifier()
model.compile(backend="getfuse", options={"buffer": "16KB"})
expected, got = train(eager), train(model)

for step, (one, other) in enumerate(zip(expected, got, strict=True)):
    print(f"step {step}: loss {one:.6f} eager, {other:.6f} compiled")
assert got == expected, "the compiled model trains otherwise than eager"
for name, weight in eager.state_dict().items():
    assert torch.equal(weight, model.state_dict()[name]), name
print("losses and weights are equal, to the last bit\n")
print(torch_getfuse.report(model))
