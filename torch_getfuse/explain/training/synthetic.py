"""Random convolutional networks: topologies that the paper's networks lack.

The paper's nine networks have no dense concatenation, no channel shuffle and, under BRR, no
Squeeze-and-Excite, so a predictor trained on them alone cannot generalise to these. The networks
here stack blocks of known families with random widths, depths, kernels and strides. They are
modules, captured like any other model, so that their graphs have the structure of real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import nn


def synthetic_network(number: int) -> nn.Sequential:
    """The random classifier number ``number``; the same number gives the same network.

    Every fourth network uses one kind of block, as real networks do; the others mix kinds.
    """
    rng = Random(f"synthetic network {number}")
    kinds = list(_BLOCKS)
    width = rng.choice((16, 24, 32, 48, 64, 96))
    layers: list[nn.Module] = [_conv(3, width, rng.choice((3, 5, 7)), 2)]
    if rng.random() < 0.6:
        layers.append(nn.MaxPool2d(3, 2, 1))
    only = kinds[number // 4 % len(kinds)] if number % 4 == 0 else None
    for stage in range(rng.choice((3, 4))):
        kind = only or rng.choice(kinds)
        for block in range(rng.randint(2, 5)):
            stride = 2 if stage and not block else 1
            grown = round(width * rng.uniform(1.4, 2.2) / 8) * 8 if stride == 2 else width
            module, width = _BLOCKS[kind](rng, width, min(grown, 640), stride)
            layers.append(module)
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000)]
    return nn.Sequential(*layers)


def _conv(
    before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    layers = [
        nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(after),
    ]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


class _Excite(nn.Module):
    """Squeeze-and-Excite: scales every channel by a factor computed from the whole map."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, inner, 1),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale: torch.Tensor = self.layers(x)
        return scale * x


class _Residual(nn.Module):
    def __init__(self, body: nn.Module, skip: nn.Module, relu: bool) -> None:
        super().__init__()
        self.body, self.skip = body, skip
        self.last = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.last(self.skip(x) + self.body(x))
        return output


class _Branches(nn.Module):
    """Parallel branches of one map, concatenated: Inception, Fire."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class _Dense(nn.Module):
    """Every layer reads the concatenation of all maps before it, as DenseNet does."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [x]
        for layer in self.layers:
            maps.append(layer(torch.cat(maps, 1)))
        return torch.cat(maps, 1)


class _Shuffle(nn.Module):
    """The body joined with half of the channels or with a second branch, then shuffled."""

    def __init__(self, body: nn.Module, beside: nn.Module | None) -> None:
        super().__init__()
        self.body, self.beside = body, beside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.beside is None:
            first, second = x.chunk(2, dim=1)
            joined = torch.cat([first, self.body(second)], 1)
        else:
            joined = torch.cat([self.beside(x), self.body(x)], 1)
        batch, channels, rows, cols = joined.shape
        halves = joined.view(batch, 2, channels // 2, rows, cols).transpose(1, 2).contiguous()
        return halves.view(batch, channels, rows, cols)


def _plain(rng: Random, before: int, after: int, stride: int) -> tuple[nn.Module, int]:
    return _conv(before, after, rng.choice((1, 3, 3, 5)), stride), after


def _bottleneck(rng: Random, before: int, after: int, stride: int) -> tuple[nn.Module, int]:
    inner = max(8, after // rng.choice((1, 2, 4)) // 8 * 8)
    groups = inner // 8 if rng.random() < 0.4 else 1
    excite = rng.random() < 0.5
    body = nn.Sequential(
        _conv(before, inner),
        _conv(inner, inner, 3, stride, groups),
        _Excite(inner, max(8, before // 4)) if excite else nn.Identity(),
        _conv(inner, after, relu=False),
    )
    same = before == after and stride == 1
    skip = nn.Identity() if same else _conv(before, after, 1, stride, relu=False)
    return _Residual(body, skip, relu=True), after


def _inverted(rng: Random, before: int, after: int, stride: int) -> tuple[nn.Module, int]:
    inner = before * rng.choice((1, 3, 4, 6))
    excite = rng.random() < 0.5
    body = nn.Sequential(
        _conv(before, inner),
        _conv(inner, inner, rng.choice((3, 5)), stride, inner),
        _Excite(inner, max(8, inner // 4)) if excite else nn.Identity(),
        _conv(inner, after, relu=False),
    )
    if before != after or stride != 1:
        return body, after
    return _Residual(body, nn.Identity(), relu=False), after


def _inception(rng: Random, before: int, after: int, stride: int) -> tuple[nn.Module, int]:
    part = max(8, after // 32 * 8)
    branches: list[nn.Module] = [
        nn.Sequential(_conv(before, max(8, part // 2)), _conv(max(8, part // 2), part, k, stride))
        for k in rng.sample((3, 3, 5), rng.choice((1, 2)))
    ]
    branches.append(_conv(before, part, 1, stride))
    if rng.random() < 0.7:
        pool = nn.MaxPool2d(3, stride, 1, ceil_mode=rng.random() < 0.5 and stride == 1)
        branches.append(nn.Sequential(pool, _conv(before, part)))
    rng.shuffle(branches)
    return _Branches(*branches), part * len(branches)


def _dense(rng: Random, before: int, after: int, stride: int) -> tuple[nn.Module, int]:
    growth, count = rng.choice((12, 16, 24, 32, 48)), rng.randint(2, 10)
    inner = growth * rng.choice((1, 2, 4))
    layers = []
    for k in range(count):
        width = before + k * growth
        layers.append(
            nn.Sequential(
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                _conv(width, inner),
                nn.Conv2d(inner, growth, 3, 1, 1, bias=False),
            )
        )
    width = before + count * growth
    if stride == 1 and rng.random() < 0.5:
        return _Dense(layers), width
    modules = [_Dense(layers), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    modules.append(nn.Conv2d(width, after, 1, bias=False))
    if stride == 2:
        modules.append(nn.AvgPool2d(2, 2))
    return nn.Sequential(*modules), after


def _shuffle(rng: Random, before: int, after: int, stride: int) -> tuple[nn.Module, int]:
    split = stride == 1 and before % 2 == 0
    half = before // 2 if split else after // 2
    source = half if split else before
    kernel = rng.choice((3, 5))

    def tail(width: int) -> list[nn.Module]:
        return [_conv(width, width, kernel, stride, width, relu=False), _conv(width, half)]

    body = nn.Sequential(_conv(source, half), *tail(half))
    beside = None if split else nn.Sequential(*tail(before))
    return _Shuffle(body, beside), 2 * half


_BLOCKS = {
    "dense": _dense,
    "shuffle": _shuffle,
    "inception": _inception,
    "bottleneck": _bottleneck,
    "inverted": _inverted,
    "plain": _plain,
}
