"""Rules of operators that copy elements to other places, by a fixed pattern.

Along the axes that the pattern goes over an output position may need any input position; along all
others it needs that of the same number, so that a flip of the columns or a shuffle of the channels
goes row by row. Patterns that a window says keep it: ``unfold``, ``im2col`` and
``repeat_interleave`` slide, ``col2im`` is transposed. Copies to or from where an index says are in
``indexing.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torch_getfuse.backend.rules.rule import (
    FLATTENED,
    MIXES_SAMPLES,
    Call,
    Operand,
    OpRule,
    Reading,
    Run,
    Sample,
    Spec,
    StoredAs,
    spread,
    whole,
)
from torch_getfuse.backend.rules.view_windows import Access, All, Along
from torch_getfuse.ir import WindowKind
from torch_getfuse.ir.window import size_slid

_MAP = (4, 6, 7)


def _over(call: Call, axes: Iterable[int], reason: str) -> Spec:
    """Output of the input's axes, in which the positions along ``axes`` change places."""
    operand: Operand = call.args["input"]
    shift = call.rank - operand.rank
    accesses: list[Access] = [Along(axis + shift) for axis in range(operand.rank)]
    for axis in axes:
        if axis == operand.batch:
            return whole(call, call.name, f"{call.name} along the batch {MIXES_SAMPLES}")
        accesses[axis] = All()
    reads = () if operand.weight else (Reading(operand, tuple(accesses)),)
    return Spec(call.name, reads, reason_if_whole=reason)


def _roll(call: Call) -> Spec:
    operand: Operand = call.args["input"]
    if call.args.get("dims") in (None, (), []):
        return whole(call, "roll", f"roll without axes shifts {FLATTENED}")
    axes = call.dims("dims")
    shifts = spread(call.args["shifts"], len(axes))
    moved = [a for a, by in zip(axes, shifts, strict=True) if by % operand.shape[a]]
    return _over(call, moved, "roll along the rows wraps around: the first row needs the last ones")


def _flip(call: Call) -> Spec:
    operand: Operand = call.args["input"]
    if call.name == "flip":
        axes = call.dims("dims") if call.args["dims"] else ()
    else:
        axes = (1,) if call.name == "fliplr" else (0,)
    moved = [axis for axis in axes if operand.shape[axis] > 1]
    spec = _over(call, moved, "flip along the rows: the first row needs the last one")
    return replace(spec, kind="flip")


def _repeat(call: Call) -> Spec:
    """``repeat`` and ``tile``: copies of the whole tensor one after another along each axis."""
    operand: Operand = call.args["input"]
    shift = call.rank - operand.rank
    # An axis of size one is broadcast: each copy is of its one position.
    copied = [
        axis
        for axis, size in enumerate(operand.shape)
        if size > 1 and call.shape[axis + shift] != size
    ]
    return _over(call, copied, f"{call.name} along the rows starts again from the first row")


def _repeat_interleave(call: Call) -> Spec:
    """Each position several times in a row: one of its output rows needs one input row."""
    operand: Operand = call.args["input"]
    repeats = call.args["repeats"]
    if call.args.get("dim") is None or not isinstance(repeats, int):
        how = "by a tensor" if isinstance(repeats, Operand) else "without an axis"
        return whole(call, "repeat_interleave", f"repeat_interleave {how} has no fixed pattern")
    (axis,) = call.dims()
    accesses: list[Access] = [Along(a) for a in range(operand.rank)]
    accesses[axis] = Along(axis, repeats, repeats, kind=WindowKind.TRANSPOSED)
    reads = () if operand.weight else (Reading(operand, tuple(accesses)),)
    return Spec("repeat_interleave", reads)


def _channel_shuffle(call: Call) -> Spec:
    return replace(_over(call, (1,), ""), kind="channel_shuffle")


def _unfold(call: Call) -> Spec:
    """``x.unfold(dimension, size, step)``, and ``F.unfold``, which Dynamo calls so as well."""
    if "kernel_size" in call.args:
        return _im2col(call)
    operand: Operand = call.args["input"]
    (axis,) = call.dims("dimension")
    if axis == operand.batch:
        return whole(call, "unfold", f"unfold along the batch {MIXES_SAMPLES}")
    accesses: list[Access] = [Along(a) for a in range(operand.rank)]
    accesses[axis] = Along(axis, int(call.args["size"]), int(call.args["step"]))
    reads = () if operand.weight else (Reading(operand, tuple(accesses)),)
    return Spec("unfold", reads)


def _taps(call: Call) -> list[tuple[int, int, int, int]]:
    """Kernel, stride, dilation and padding of ``im2col`` or ``col2im``, per axis of the map."""
    names = ("kernel_size", "stride", "dilation", "padding")
    defaults = (1, 1, 1, 0)
    found = [
        spread(call.get(name, default), 2) for name, default in zip(names, defaults, strict=True)
    ]
    return list(zip(*found, strict=True))


def _im2col(call: Call) -> Spec:
    """Each position of a map with its window as channels; stored as the map of these positions."""
    operand: Operand = call.args["input"]
    lead = operand.rank - 2
    accesses: list[Access] = [Along(axis) for axis in range(lead - 1)]
    accesses.append(All())
    positions = []
    for axis, (kernel, stride, dilation, padding) in enumerate(_taps(call), lead):
        accesses.append(Along(axis, kernel, stride, dilation, padding, padding))
        positions.append(size_slid(kernel, stride, dilation, 2 * padding, operand.shape[axis]))
    result = call.shape
    stored = StoredAs((*result[:-1], *positions), (lambda layout: layout.reshape(result),))
    reads = () if operand.weight else (Reading(operand, tuple(accesses)),)
    return Spec("im2col", reads, stream_axis=lead, stored_as=stored)


def _col2im(call: Call) -> Spec:
    """Adds windows that overlap; its input has a column for each position of a map."""
    operand: Operand = call.args["input"]
    taps = _taps(call)
    lead = call.rank - 2
    positions = [
        size_slid(kernel, stride, dilation, 2 * padding, size)
        for (kernel, stride, dilation, padding), size in zip(taps, call.shape[lead:], strict=True)
    ]
    columns = operand.viewed((*operand.shape[:-1], *positions))
    accesses: list[Access] = [Along(axis) for axis in range(lead - 1)]
    accesses.append(All())
    accesses += [
        Along(lead + axis, *tap, kind=WindowKind.TRANSPOSED) for axis, tap in enumerate(taps)
    ]
    reads = () if operand.weight else (Reading(columns, tuple(accesses)),)
    return Spec("col2im", reads, stream_axis=lead)


def _topk(call: Call) -> Spec:
    """The largest along one axis; values and positions, where both are used, side by side."""
    operand: Operand = call.args["input"]
    axis = int(call.get("dim", -1)) % max(1, operand.rank)
    spec = _over(call, (axis,) if operand.rank else (), "topk along the rows needs all of them")
    if len(call.outputs) == 1 or axis == operand.batch or not operand.rank:
        return spec
    kept = call.shape[axis]
    both = list(call.shape)
    both[axis] = 2 * kept
    views = tuple(lambda layout, at=at: layout.slice(axis, at, kept) for at in (0, kept))
    return replace(spec, stored_as=StoredAs(tuple(both), views))


def _sample(function: Any, *shapes: tuple[int, ...]) -> Sample:
    return Sample(lambda: Run(function), shapes or (_MAP,))


RULES: tuple[OpRule, ...] = (
    OpRule(
        "roll",
        ("roll",),
        _roll,
        _sample(lambda x: torch.roll(x, (2, 1), (3, 1))),
        ("input", "shifts", "dims"),
    ),
    OpRule(
        "flip",
        ("flip", "fliplr", "flipud"),
        _flip,
        _sample(lambda x: torch.flip(x, (1,))),
        ("input", "*dims"),
    ),
    OpRule(
        "repeat",
        ("repeat",),
        _repeat,
        _sample(lambda x: x.repeat(1, 2, 1, 1)),
        ("input", "*repeats"),
    ),
    OpRule(
        "tile",
        ("tile",),
        _repeat,
        _sample(lambda x: torch.tile(x[:, :1], (4, 1, 2))),
        ("input", "*dims"),
    ),
    OpRule(
        "repeat_interleave",
        ("repeat_interleave",),
        _repeat_interleave,
        _sample(lambda x: x.repeat_interleave(3, 2).repeat_interleave(2, dim=1)),
        ("input", "repeats", "dim"),
    ),
    OpRule(
        "channel_shuffle",
        ("channel_shuffle", "native_channel_shuffle"),
        _channel_shuffle,
        Sample(lambda: nn.ChannelShuffle(2), (_MAP,)),
        ("input", "groups"),
    ),
    OpRule(
        "unfold",
        ("unfold",),
        _unfold,
        _sample(lambda x: x.unfold(2, 3, 2)),
        ("input", "dimension", "size", "step"),
    ),
    OpRule(
        "im2col",
        ("im2col",),
        _im2col,
        _sample(lambda x: F.unfold(x, (3, 2), 1, (1, 0), (2, 1)).view(-1, 24, 3, 6)),
        ("input", "kernel_size", "dilation", "padding", "stride"),
    ),
    OpRule(
        "col2im",
        ("col2im",),
        _col2im,
        _sample(
            lambda x: F.fold(x.flatten(2), (12, 9), (4, 3), padding=(1, 0), stride=(2, 1)),
            (24, 6, 7),
        ),
        ("input", "output_size", "kernel_size", "dilation", "padding", "stride"),
    ),
    OpRule(
        "topk",
        ("topk",),
        _topk,
        _sample(lambda x: torch.topk(x, 2, 1)[0]),
        ("input", "k", "dim", "largest", "sorted"),
    ),
)
"""Operators that copy elements to other places."""

EXTRA_SAMPLES: dict[str, Sample] = {
    "roll over rows": _sample(lambda x: torch.roll(x, 1, 2)),
    "roll of windows": _sample(
        lambda x: torch.roll(x.permute(0, 2, 3, 1), shifts=(-2, -2), dims=(1, 2))
    ),
    "roll all the way": _sample(lambda x: x.roll((6, 2), (2, 1))),
    "roll of all": _sample(lambda x: x.roll(3) + 1, (1,)),
    "flip of columns": _sample(lambda x: x.flip(-1)),
    "flip of rows": _sample(lambda x: x.flip(2)),
    "flip left to right": _sample(lambda x: torch.fliplr(x) + 1),
    "repeat of rows": _sample(lambda x: x.repeat(1, 1, 2, 1)),
    "tile of columns": _sample(lambda x: x.tile(3)),
    "repeat_interleave of all": _sample(lambda x: x.flatten(1).repeat_interleave(2, 1)),
    "unfold of columns": _sample(lambda x: x.unfold(-1, 2, 2)),
    "unfold of both": _sample(lambda x: x.unfold(2, 3, 3).unfold(3, 2, 1)),
    "im2col, col2im": _sample(
        lambda x: F.fold(F.unfold(x, 3, padding=1, dilation=1), (6, 7), 3, padding=1)
    ),
    "topk of rows": _sample(lambda x: torch.topk(x, 2, 2)[0]),
    "topk, both": _sample(lambda x: (lambda r: r[0] + r[1])(x.topk(3, dim=1))),
    "topk of columns, both": _sample(lambda x: (lambda r: r[0] + r[1])(x.topk(3))),
}
"""Further variants, for the conformance test."""
