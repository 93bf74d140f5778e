"""Ten networks in the settings of torch.compile: everything equal to eager, to the last bit.

The one exception are gradients of deeplab, equal to a tolerance: its five parallel branches run in
another order, and AOTAutograd, which would keep the order of their sum, rounds resizing otherwise.

Of {eval, train} x {static, batch, size} x {fp32, bf16 autocast}, mobilenet_v2 runs every pair of
values, the others every value; a small network of the same operators runs the whole product.
googlenet and deeplab run at fixed shapes only: where parallel branches go through AOTAutograd, its
trace of dynamic shapes takes minutes; swin_t as well, whose
dynamic windows take long. Inputs are 64x64, which reaches the smallest maps of each.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import torch_getfuse
from torch_getfuse.models import calibrate_batch_norm, import_torchvision

Setting = tuple[str, str, str]
PRODUCT: list[Setting] = [
    (mode, shapes, dtype)
    for mode in ("eval", "train")
    for shapes in ("static", "batch", "size")
    for dtype in ("fp32", "bf16")
]
PAIRS: list[Setting] = [
    ("eval", "static", "fp32"),
    ("train", "static", "bf16"),
    ("eval", "batch", "bf16"),
    ("train", "batch", "fp32"),
    ("train", "size", "fp32"),
    ("eval", "size", "bf16"),
]
EACH: list[Setting] = [
    ("train", "static", "fp32"),
    ("eval", "batch", "bf16"),
    ("train", "size", "fp32"),
]
FIXED_SIZE: list[Setting] = [
    ("train", "static", "fp32"),
    ("eval", "batch", "bf16"),
    ("train", "batch", "fp32"),
]
STATIC: list[Setting] = [("train", "static", "fp32"), ("eval", "static", "bf16")]
NETWORKS: dict[str, list[Setting]] = {
    "small": PRODUCT,
    "mobilenet_v2": PAIRS,
    "shufflenet_v2_x1_0": EACH,
    "efficientnet_b0": EACH,
    "resnet50": EACH,
    "googlenet": STATIC,
    "densenet121": EACH,
    "deeplabv3_mobilenet_v3_large": STATIC,
    "convnext_tiny": EACH,
    "swin_t": STATIC,
    "vit_b_16": FIXED_SIZE,
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "deeplabv3_mobilenet_v3_large": {"weights_backbone": None},
    "vit_b_16": {"image_size": 64},
}
LAST_BIT = ("deeplabv3_mobilenet_v3_large",)
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}
SHAPES = {
    "static": [(2, 3, 64, 64)],
    "batch": [(2, 3, 64, 64), (3, 3, 64, 64)],
    "size": [(2, 3, 64, 64), (2, 3, 96, 64)],
}


class Small(nn.Module):
    """Squeeze-and-excitation, depthwise convolution, in-place activations, branches, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(True))
        self.wide = nn.Sequential(
            nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU(True),
            nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), nn.Hardswish(),
        )  # fmt: skip
        self.gate = nn.Sequential(nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1))
        self.narrow = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.Dropout2d(0.2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.stem(x)
        y = self.wide(x)
        y = y * torch.sigmoid(self.gate(nn.functional.adaptive_avg_pool2d(y, 1)))
        z = self.narrow(y) + x
        up = nn.functional.interpolate(z, scale_factor=2, mode="bilinear", align_corners=False)
        return {"classes": self.head(torch.cat([z, x], 1).mean((2, 3))), "map": up}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name: str) -> nn.Module:
    models = import_torchvision().models
    if name == "small":
        torch.manual_seed(0)
        return calibrate_batch_norm(Small(), torch.randn(2, 3, 64, 64))
    make = getattr(models, name, None) or getattr(models.segmentation, name)
    torch.manual_seed(0)
    model: nn.Module = make(weights=None, **ARGUMENTS.get(name, {}))
    return calibrate_batch_norm(model, torch.randn(2, 3, 64, 64))


def run(model: nn.Module, x: torch.Tensor, dtype: str) -> list[torch.Tensor]:
    """Outputs, gradients and buffers."""
    torch.manual_seed(1)
    with torch.amp.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
        outputs = pytree.tree_leaves(model(x))
    model.zero_grad()
    sum(y.float().square().mean() for y in outputs).backward()  # type: ignore[union-attr]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    return [*outputs, *grads, *model.buffers()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "setting"),
    [(name, setting) for name, settings in NETWORKS.items() for setting in settings],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bit_equal_to_eager(name: str, setting: Setting) -> None:
    mode, shapes, dtype = setting
    model = build(name).train(mode == "train")
    other = copy.deepcopy(model)
    compiled = torch.compile(
        other, backend="getfuse", options={"strict": True}, dynamic=shapes != "static"
    )
    for shape in SHAPES[shapes]:
        x = torch.randn(shape)
        ours, theirs = run(compiled, x, dtype), run(model, x, dtype)
        assert len(ours) == len(theirs)
        grads = {id(p.grad) for p in other.parameters() if name in LAST_BIT}
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if id(a) in grads:
                assert (a - b).norm() <= TOLERANCE[dtype] * b.norm() + 1e-7, (
                    f"gradient {k} at {shape}"
                )
            else:
                assert torch.equal(a, b), f"result {k} of shape {tuple(a.shape)} at {shape}"
    report = torch_getfuse.report(compiled)
    assert report.sections
    assert not report.unplanned


@pytest.mark.slow
def test_inductor_inside_on_mobilenet_v2() -> None:
    """One group at a time through inductor takes about a minute; small maps, inference only."""
    model = build("mobilenet_v2").eval()
    options = {"strict": True, "inner": "inductor", "buffer": "8MB"}
    compiled = torch.compile(model, backend="getfuse", options=options)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)
    (section,) = torch_getfuse.report(compiled).sections
    assert any("groups compiled in" in note for note in section.notes)
