"""The settings of torch.compile that the backend must hold in, and how one of them is checked.

The product is {eval, train} x {static, batch, size} x {fp32, bf16 autocast} x {eager, inductor}
over ten networks and a small one: 256 combinations, for a network of :data:`ONE_SIZE` refuses
other sizes itself. "batch" marks the first dimension of the input as dynamic; "size" is
``dynamic=True``, for which every dimension is, and the second call changes all but the channels.
``make test`` runs :data:`AFFORDABLE`, and ``make matrix`` (``benchmarks/matrix.py``) all of it.

A combination holds where outputs, gradients and buffers equal eager's: to the last bit with inner
eager. Inductor computes in other steps; with it inside, no tensor may be farther from the same step
in double precision than :data:`TOLERANCE` of its size plus :data:`FARTHER` times eager's distance.
Two exceptions: a tensor of less than :data:`SHARE` of all tensors of its kind together counts as
that large, for what cancels out leaves roundings of what it was made of; and where luck decides how
far eager is, it is :data:`FARTHER_BY_LUCK` times: a tensor of at most :data:`FEW` values, or one
that eager gets more than half wrong, like a gradient through the batch norm of two values that
follows DeepLab's image pooling. Rounding can also turn a maximum or the sign of a ReLU, which
changes gradients by whole steps; so a combination in fp32 holds as well where it does in double
precision, compiled anew. One in bf16 does where eager's distance counts as the largest of
:data:`NEARBY` further runs of eager, whose inputs are off by at most what rounding them to bf16
takes: what eager computes for a neighbour of an input is no worse than what it computes for it.

Inputs are 64x64, for "size" 64x96 and 96x64, which reaches the smallest maps of each network.
Batch norms give values of mean :data:`NORM_MEAN` and deviation :data:`NORM_STD`: a ReLU still cuts
off one value in fifty. With a mean of zero, as they begin, it cuts off half, each layer amplifies
what the last one rounded, and after fifty of them a gradient in bf16 has nothing in common with
itself rounded otherwise: any result would have held. Running statistics are those of a calibrating
pass, so that outputs depend on inputs.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import torch_getfuse
from torch_getfuse.models import calibrate_batch_norm, import_torchvision

MODES = ("eval", "train")
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "static": [(2, 3, 64, 64)],
    "batch": [(2, 3, 64, 64), (3, 3, 64, 64)],
    "size": [(2, 3, 64, 96), (3, 3, 96, 64)],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INNER = ("eager", "inductor")
# Cheap ones first.
NETWORKS = (
    "small",
    "mobilenet_v2",
    "shufflenet_v2_x1_0",
    "resnet50",
    "convnext_tiny",
    "efficientnet_b0",
    "googlenet",
    "deeplabv3_mobilenet_v3_large",
    "vit_b_16",
    "densenet121",
    "swin_t",
)
ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "deeplabv3_mobilenet_v3_large": {"weights_backbone": None},
    "vit_b_16": {"image_size": 64},  # its position embedding is made for one size
}
ONE_SIZE = ("vit_b_16",)
OPTIONS: dict[str, dict[str, Any]] = {
    "eager": {"strict": True},
    # Fewer and larger groups: each is a compile of its own.
    "inductor": {"strict": True, "inner": "inductor", "buffer": "8MB"},
}
TOLERANCE = {"fp32": 1e-4, "bf16": 1.6e-2, "double": 1e-10}
FARTHER, FARTHER_BY_LUCK, FEW = 3, 10, 500
SHARE = 1 / 16
NEARBY, NEAR = 8, 2**-9
NORM_MEAN, NORM_STD = 1.0, 0.5


@dataclass(frozen=True)
class Combination:
    """One cell of the product."""

    network: str
    mode: str
    shapes: str
    dtype: str
    inner: str

    def __str__(self) -> str:
        return "-".join((self.network, self.mode, self.shapes, self.dtype, self.inner))


#: Inner eager before inductor, then fixed before dynamic shapes, then cheap networks first.
PRODUCT = [
    Combination(network, mode, shapes, dtype, inner)
    for inner in INNER
    for shapes in SHAPES
    for network in NETWORKS
    for mode in MODES
    for dtype in DTYPES
    if not (shapes == "size" and network in ONE_SIZE)
]


def _affordable(c: Combination) -> bool:
    setting = (c.mode, c.shapes, c.dtype)
    if c.inner == "inductor":
        return c.network == "small" and setting == ("train", "size", "fp32")
    if c.network == "small":
        return True
    if c.network == "mobilenet_v2":  # every pair of values
        return setting in {
            ("eval", "static", "fp32"),
            ("train", "static", "bf16"),
            ("eval", "batch", "bf16"),
            ("train", "batch", "fp32"),
            ("train", "size", "fp32"),
            ("eval", "size", "bf16"),
        }
    if c.network == "swin_t":  # at dynamic shapes its compile takes minutes
        return setting in {("train", "static", "fp32"), ("eval", "static", "bf16")}
    if c.network == "vit_b_16":  # one size; its batch is the other dynamic one
        return setting in {
            ("train", "static", "fp32"),
            ("eval", "batch", "bf16"),
            ("train", "batch", "fp32"),
        }
    return setting in {  # every value
        ("train", "static", "fp32"),
        ("eval", "batch", "bf16"),
        ("train", "size", "fp32"),
    }


AFFORDABLE = [combination for combination in PRODUCT if _affordable(combination)]


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


def build(name: str) -> nn.Module:
    """A network with random weights of seed 0."""
    torch.manual_seed(0)
    if name == "small":
        return calibrate_batch_norm(Small(), torch.randn(2, 3, 64, 64))
    models = import_torchvision().models
    make = getattr(models, name, None) or getattr(models.segmentation, name)
    model: nn.Module = make(weights=None, **ARGUMENTS.get(name, {}))
    for module in model.modules():  # ViT's head begins at zero, and all gradients with it
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, NORM_STD)
            nn.init.constant_(module.bias, NORM_MEAN)
    return calibrate_batch_norm(model, torch.randn(2, 3, 64, 64))


Results = dict[str, list[torch.Tensor]]
"""``outputs``, ``gradients`` and ``buffers`` of one step.

Gradients of a module's own parameters are one tensor: that of a bias before a batch norm is zero
but for rounding, and tells something only beside its weight's.
"""


def run(model: Callable[..., Any], owner: nn.Module, x: torch.Tensor, dtype: str) -> Results:
    """One forward and backward of ``model``, whose parameters and buffers are ``owner``'s."""
    torch.manual_seed(1)
    with torch.amp.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
        outputs = pytree.tree_leaves(model(x))
    owner.zero_grad()
    wide = (y.to(torch.promote_types(y.dtype, torch.float32)) for y in outputs)
    sum(y.square().mean() for y in wide).backward()
    gradients = []
    for module in owner.modules():
        found = [p.grad.flatten() for p in module.parameters(recurse=False) if p.grad is not None]
        gradients += [torch.cat(found)] if found else []
    assert gradients
    assert any(gradient.any() for gradient in gradients), "nothing to compare"
    return {
        "outputs": [y.detach() for y in outputs],
        "gradients": gradients,
        "buffers": [buffer.clone() for buffer in owner.buffers()],
    }


@dataclass(frozen=True)
class Difference:
    """How far one kind of result is from eager's.

    Attributes:
        equal: whether all tensors are equal to the last bit.
        relative: ``norm(ours - eager) / norm(eager)`` of all tensors taken together.
        own: ``norm(eager - exact) / norm(exact)`` likewise; of nearby runs the largest per tensor.
        excess: the largest ratio of a tensor's distance from the exact one to what is allowed;
            above 1 fails.
    """

    equal: bool
    relative: float
    own: float
    excess: float


def check(combination: Combination) -> dict[str, Any]:
    """Run a combination and compare it with eager.

    Returns:
        ``holds``; for ``outputs``, ``gradients`` and ``buffers`` a :class:`Difference` as a
        mapping, the largest over the calls; ``double`` or ``nearby``, where it holds in double
        precision or with eager's nearby runs only, or not even so: the same there;
        ``first_call_seconds``, one per shape; and of the report ``sections``, ``groups`` and
        ``notes``.

    Raises:
        Exception: whatever the backend raises: ``strict`` is on.
    """
    found = compare(combination, combination.dtype)
    if not found["holds"] and combination.inner != "eager":
        if combination.dtype == "fp32":
            key, again = "double", compare(combination, "double")
        else:
            key, again = "nearby", compare(combination, combination.dtype, nearby=NEARBY)
        found["holds"] = again.pop("holds")
        found[key] = again
    return found


def compare(c: Combination, dtype: str, nearby: int = 0) -> dict[str, Any]:
    """As :func:`check`, in one way of computing: a key of :data:`TOLERANCE`.

    ``nearby``: of how many runs of eager at neighbours of the input the distance counts as well.
    """
    torch._dynamo.reset()
    wide = torch.float64 if dtype == "double" else torch.float32
    model = build(c.network).to(wide).train(c.mode == "train")
    other = copy.deepcopy(model)
    # What is equal to the last bit, or double itself, needs nothing finer beside it.
    double = None if c.inner == "eager" or dtype == "double" else copy.deepcopy(model).double()
    dynamic = c.shapes == "size" or None
    compiled = torch.compile(other, backend="getfuse", options=OPTIONS[c.inner], dynamic=dynamic)
    torch.manual_seed(2)
    inputs = [torch.randn(shape).to(wide) for shape in SHAPES[c.shapes]]
    found: dict[str, list[Difference]] = {}
    seconds = []
    with _inductor_draws_as_eager():
        for x in inputs:
            if c.shapes == "batch":
                torch._dynamo.mark_dynamic(x, 0)
            started = time.perf_counter()
            ours = run(compiled, other, x, dtype)
            seconds.append(time.perf_counter() - started)
            others = [run(m, m, near, dtype) for m, near in _neighbours(model, x, nearby)]
            theirs = run(model, model, x, dtype)
            exact = run(double, double, x.double(), "double") if double is not None else theirs
            for kind in theirs:
                found.setdefault(kind, []).append(
                    _difference(
                        ours[kind],
                        theirs[kind],
                        exact[kind],
                        [results[kind] for results in others],
                        TOLERANCE[dtype],
                    )
                )
    report = torch_getfuse.report(compiled)
    assert report.sections, "nothing was compiled"
    assert not report.unplanned, report.unplanned
    worst = {
        kind: {
            "equal": all(d.equal for d in differences),
            "relative": max(d.relative for d in differences),
            "own": max(d.own for d in differences),
            "excess": max(d.excess for d in differences),
        }
        for kind, differences in found.items()
    }
    equal = c.inner == "eager"
    return {
        "holds": all(w["equal"] if equal else w["excess"] <= 1 for w in worst.values()),
        **worst,
        "first_call_seconds": [round(s, 2) for s in seconds],
        "sections": len(report.sections),
        "groups": sum(len(section.plan.groups) for section in report.sections),
        "notes": [note for section in report.sections for note in section.notes],
    }


def _neighbours(
    model: nn.Module, x: torch.Tensor, count: int
) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """Copies of a model, which a run in training changes, each with an input of its own."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        off = 2 * torch.rand(x.shape, generator=generator) - 1
        yield copy.deepcopy(model), x * (1 + NEAR * off)


def _difference(
    ours: Sequence[torch.Tensor],
    theirs: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    others: Sequence[Sequence[torch.Tensor]],
    tolerance: float,
) -> Difference:
    assert len(ours) == len(theirs) == len(exact), (len(ours), len(theirs), len(exact))
    equal, excess = True, 0.0
    all_apart = all_own = 0.0
    all_size = math.hypot(*(float(c.double().norm()) for c in exact))
    for k, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.shape == b.shape == c.shape, (a.shape, b.shape, c.shape)
        assert a.dtype == b.dtype, (a.dtype, b.dtype)
        own = max(_apart(other[k], c) for other in (theirs, *others))
        norm = float(c.double().norm())
        all_apart, all_own = math.hypot(all_apart, _apart(a, b)), math.hypot(all_own, own)
        if torch.equal(a, b):
            continue
        equal = False
        luck = c.numel() <= FEW or own > norm / 2
        allowed = tolerance * max(norm, SHARE * all_size)
        allowed += (FARTHER_BY_LUCK if luck else FARTHER) * own
        distance = _apart(a, c)
        # A distance that is no number must not pass for a small one.
        good = allowed > 0 and math.isfinite(distance)
        excess = max(excess, distance / allowed if good else math.inf)
    all_size = all_size or 1.0
    return Difference(equal, all_apart / all_size, all_own / all_size, excess)


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm())


def _inductor_draws_as_eager() -> Any:
    """Dropout would draw from inductor's own generator, and no result could be compared."""
    from torch._inductor import config

    return config.patch(fallback_random=True)
