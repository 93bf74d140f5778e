"""Which graphs the ranking is trained on, tested on and compared on, and how each is made.

A graph is named by a spec: ``torchvision:NAME`` or ``timm:NAME``, ``synthetic-N`` (the random
networks of the validity predictor), ``cells-N`` (:func:`random_cells`) or ``WIDTHxOPERATORS``
(``wide.generated``).
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from benchmarks.wide import generated
from tests.graphs import IDENTITY, Builder
from torch_getfuse.ir import OpGraph, Window

BUFFERS_KB = (64, 128, 256, 512, 1024)

TRAIN = (
    *("alexnet", "vgg11", "vgg16", "vgg19", "squeezenet1_0", "squeezenet1_1"),
    *("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"),
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "wide_resnet50_2", "convnext_tiny", "efficientnet_v2_s"),
    *("efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3"),
)
VALIDATION = ("mnasnet0_5", "mnasnet1_0", "regnet_y_400mf", "regnet_x_800mf")
TEST = (
    *("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "googlenet", "inception_v3"),
    *("densenet121", "densenet161", "densenet169", "densenet201"),
)
"""Of torchvision. No family stands in two parts; the wide graphs' families are in none but TEST."""

NARROW = ("2x100", "4x100", "6x100")
"""Of the generator of the wide graphs, narrow enough to be proved: test only."""

SYNTHETIC, CELLS = 72, 240
"""Random networks; every eighth is for validation."""

WIDE = (
    ("timm:nasnetalarge", 256),
    ("timm:nasnetalarge", 1024),
    ("timm:pnasnet5large", 256),
    ("torchvision:raft_small", 256),
    ("torchvision:raft_large", 256),
    ("timm:hrnet_w18_small", 256),
    ("timm:crossvit_9_240", 1024),
    ("timm:inception_v4", 256),
    ("torchvision:densenet201", 1024),
    ("16x300", 128),
    ("32x1000", 128),
)
"""Graphs and buffers in KB of the comparison.

The default planner proves Inception, DenseNet and the smaller generated graph in 10 s, no other.
"""

_FLOW = (1, 3, 128, 128)


def proved_specs() -> Iterator[tuple[str, str]]:
    """Part and spec of every graph whose optimal plans are asked for."""
    for part, names in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        yield from ((part, f"torchvision:{name}") for name in names)
    yield from (("test", spec) for spec in NARROW)
    for kind, count in (("synthetic", SYNTHETIC), ("cells", CELLS)):
        for number in range(count):
            yield "validation" if number % 8 == 7 else "train", f"{kind}-{number}"


def load(spec: str) -> OpGraph | None:
    """The operator graph of a spec.

    ``None`` for a synthetic network with blocks of DenseNet's or Inception's kind: the wide graphs
    have these.
    """
    kind, dash, number = spec.partition("-")
    if dash and kind == "cells":
        return random_cells(int(number))
    if spec[0].isdigit():
        width, operators = map(int, spec.split("x"))
        return generated(width, operators)
    return _synthetic(int(number)) if dash and kind == "synthetic" else _network(spec)


def _synthetic(number: int) -> OpGraph | None:
    from torch_getfuse.explain.training.data import capture_network
    from torch_getfuse.explain.training.synthetic import synthetic_network

    of_wide = {"_Dense", "_Branches"}
    if of_wide & {type(module).__name__ for module in synthetic_network(number).modules()}:
        return None
    return capture_network(f"synthetic-{number}")


def _network(spec: str) -> OpGraph:
    """A network at its usual input; the meta device computes nothing and gives the same graph."""
    import torch

    from torch_getfuse.backend.capture.capture import capture_model
    from torch_getfuse.models import default_input, load_model

    model = load_model(spec)
    assert isinstance(model, torch.nn.Module)
    shapes = [_FLOW, _FLOW] if "raft" in spec else [default_input(spec)]
    inputs = tuple(torch.empty(shape, device="meta") for shape in shapes)
    return capture_model(model.to("meta"), inputs).graph


def random_cells(number: int) -> OpGraph:
    """Randomly wired cells; the same number gives the same graph.

    Three stages of cells, each at half the rows of the last. A cell has three to seven nodes; a
    node reads one or two earlier ones (added) through a convolution, a depthwise convolution or a
    pooling. What no node reads is added or concatenated, and a 1x1 convolution ends the cell.
    """
    rng = Random(f"random cells {number}")
    made = _Builder((1, rng.choice((8, 16, 24, 32)), *(rng.choice((56, 80, 112)),) * 2))
    at, channels = made.name, rng.choice((24, 32, 48, 64, 96))
    at = made.conv(at, channels, 3, 1)
    for stage in range(3):
        for cell in range(rng.randint(1, 4)):
            stride = 2 if stage and not cell else 1
            if stride == 2:
                channels = round(channels * rng.uniform(1.4, 2.1) / 8) * 8
            at = _cell(made, rng, at, channels, stride)
    return made.graph(at)


def _cell(made: _Builder, rng: Random, at: str, channels: int, stride: int) -> str:
    nodes = [made.conv(at, channels, rng.choice((1, 3)), stride)]
    read: set[str] = set()
    for _ in range(rng.randint(3, 7)):
        chosen = rng.sample(nodes, min(len(nodes), rng.choice((1, 1, 2))))
        read.update(chosen)
        ways = []
        for source in chosen:
            kind, kernel = rng.choice(("conv", "depthwise", "pool", "conv")), rng.choice((1, 3, 5))
            if kind == "conv":
                ways.append(made.conv(source, channels, kernel, 1))
            elif kind == "depthwise":
                ways.append(made.conv(made.depthwise(source, kernel), channels, 1, 1))
            else:
                ways.append(made.pool(source, 3))
        nodes.append(ways[0] if len(ways) == 1 else made.join("add", ways))
    loose = [node for node in nodes if node not in read]
    if len(loose) > 1:
        loose = [made.join(rng.choice(("add", "concat")), loose)]
    return made.conv(loose[0], channels, 1, 1)


class _Builder:
    """Adds operators to a graph of one input."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self._build = Builder()
        self.name = self._build.input(shape)

    def conv(self, source: str, channels: int, kernel: int, stride: int) -> str:
        """A convolution and the activation that works in place on its output."""
        weights = channels * self._build.tensors[source].shape[1] * kernel * kernel
        made = self._windowed("conv", source, channels, kernel, stride, weights)
        shape = self._build.tensors[made].shape
        return self._build.op("relu", [(made, IDENTITY)], shape, in_place=True)

    def depthwise(self, source: str, kernel: int) -> str:
        channels = self._build.tensors[source].shape[1]
        weights = channels * kernel * kernel
        return self._windowed("depthwise", source, channels, kernel, 1, weights, channels)

    def pool(self, source: str, kernel: int) -> str:
        return self._windowed("pool", source, self._build.tensors[source].shape[1], kernel, 1, 0)

    def join(self, kind: str, sources: list[str]) -> str:
        """Sum (``add``) or concatenation of maps."""
        shape = list(self._build.tensors[sources[0]].shape)
        if kind == "concat":
            shape[1] = sum(self._build.tensors[source].shape[1] for source in sources)
        return self._build.op(kind, [(source, IDENTITY) for source in sources], shape)

    def _windowed(
        self,
        kind: str,
        source: str,
        channels: int,
        kernel: int,
        stride: int,
        weights: int,
        groups: int = 1,
    ) -> str:
        sizes = self._build.tensors[source].shape[2:]
        pad = kernel // 2
        window = Window.sliding((kernel, kernel), (stride, stride), padding=(pad, pad))
        shape = [1, channels, *((size + 2 * pad - kernel) // stride + 1 for size in sizes)]
        reads = [(source, window)]
        return self._build.op(kind, reads, shape, weights, mixes=weights > 0, groups=groups)

    def graph(self, output: str) -> OpGraph:
        return self._build.graph([output])
