"""Rules of operators that slide over a map: convolution, pooling, resizing, padding."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import nn

from torch_getfuse.backend.rules.macs import convolution_macs
from torch_getfuse.backend.rules.rule import (
    NOTHING,
    Alias,
    Call,
    Operand,
    OpRule,
    Reading,
    Run,
    Sample,
    Spec,
    spread,
    whole,
)
from torch_getfuse.backend.rules.view_windows import Access, All, Along
from torch_getfuse.ir import WindowKind
from torch_getfuse.ir.window import first_resized

_MAP = (4, 8, 9)
_LINE = (4, 12)


def _spatial_spec(
    kind: str, operand: Operand, per_axis: list[Access], channel: Access, **more: Any
) -> Spec:
    """A spec whose last axes are the map, the one before them the channels."""
    lead = operand.rank - len(per_axis)
    accesses: tuple[Access, ...] = (
        *(Along(axis) for axis in range(lead - 1)),
        channel,
        *per_axis,
    )
    reads = () if operand.weight else (Reading(operand, accesses),)
    # Rows are the first map axis; of a volume the longer one of depth and height.
    higher = len(per_axis) == 3 and operand.shape[lead + 1] > operand.shape[lead]
    return Spec(kind, reads, stream_axis=lead + higher, **more)


def _convolution(call: Call) -> Spec:
    """``conv1d/2d/3d(input, weight, bias, stride, padding, dilation, groups)``."""
    operand, weight = call.args["input"], call.args["weight"]
    bias = call.args.get("bias")
    n = weight.rank - 2
    transposed = bool(call.get("transposed", False)) or call.name.startswith("conv_transpose")
    stride = spread(call.get("stride", 1), n)
    dilation = spread(call.get("dilation", 1), n)
    kernel = weight.shape[2:]
    kind = f"conv_transpose{n}d" if transposed else f"conv{n}d"
    macs = convolution_macs(call, transposed)
    if operand.weight or not weight.weight or (bias is not None and not bias.weight):
        # A kernel that is itself a feature map must be complete before the first output.
        return whole(call, kind, mixes=True, macs=macs)
    padding = call.get("padding", 0)
    per_axis: list[Access] = []
    lead = operand.rank - n
    for axis in range(n):
        reach = dilation[axis] * (kernel[axis] - 1)
        if padding == "same":
            begin, end = reach // 2, reach - reach // 2
        else:
            begin = end = 0 if padding == "valid" else spread(padding, n)[axis]
        if transposed:
            end -= spread(call.get("output_padding", 0), n)[axis]
        per_axis.append(
            Along(
                lead + axis,
                kernel[axis],
                stride[axis],
                dilation[axis],
                begin,
                end,
                WindowKind.TRANSPOSED if transposed else WindowKind.SLIDING,
            )
        )
    own_bias = NOTHING if bias is None else bias.stored
    return _spatial_spec(
        kind,
        operand,
        per_axis,
        All(),
        mixes_channels=True,
        groups=int(call.get("groups", 1)),
        channel_axis=lead - 1,
        weights=weight.stored + own_bias,
        bias=own_bias,
        macs=macs,
    )


def _axes(name: str) -> int:
    """2 for ``max_pool2d_with_indices``."""
    return int(name[name.index("d", name.index("pool")) - 1])


def _pool(call: Call) -> Spec:
    """Max and average pooling, ceil mode included."""
    operand: Operand = call.args["input"]
    n, kind = _axes(call.name), call.name.removesuffix("_with_indices")
    if len(call.outputs) > 1:
        return whole(call, kind)
    kernel = spread(call.args["kernel_size"], n)
    stride_given = call.get("stride", ())
    stride = kernel if stride_given in ((), []) else spread(stride_given, n)
    padding = spread(call.get("padding", 0), n)
    dilation = spread(call.get("dilation", 1), n)
    lead = operand.rank - n
    per_axis: list[Access] = [
        Along(lead + a, kernel[a], stride[a], dilation[a], padding[a], padding[a]) for a in range(n)
    ]
    return _spatial_spec(kind, operand, per_axis, Along(lead - 1))


def _adaptive_pool(call: Call) -> Spec | Alias:
    """Adaptive pooling; to its input's own size it is an alias (average and maximum of one)."""
    operand: Operand = call.args["input"]
    n = _axes(call.name)
    if len(call.outputs) > 1 or call.picked:
        return whole(call, call.name)  # it gives indices
    lead = operand.rank - n
    sizes = list(zip(operand.shape[lead:], call.shape[lead:], strict=True))
    if all(size_in == size_out for size_in, size_out in sizes):
        return Alias(operand, (lambda layout: layout,))
    per_axis: list[Access] = []
    reason = ""
    for axis, (size_in, size_out) in enumerate(sizes):
        access = _adaptive_axis(lead + axis, size_in, size_out)
        if access is None:
            reason = (
                f"{call.name} from {size_in} to {size_out}: its windows are of different sizes "
                "and no window of one size below the whole map covers them"
            )
        per_axis.append(access or All())
    spec = _spatial_spec(call.name, operand, per_axis, Along(lead - 1), reason=reason)
    return spec


def _adaptive_axis(axis: int, size_in: int, size_out: int) -> Access | None:
    """The narrowest window of one size that covers all of torch's bins; ``None`` if there is none.

    Bin i runs from floor(i*in/out) to ceil((i+1)*in/out) - 1.
    """
    if size_out == 1:
        return All(reduce=True)
    bins = [
        (i * size_in // size_out, -(-(i + 1) * size_in // size_out) - 1) for i in range(size_out)
    ]
    found: Along | None = None
    for stride in {max(1, size_in // size_out), -(-size_in // size_out)}:
        padding = max(stride * i - low for i, (low, _) in enumerate(bins))
        kernel = max(high - stride * i + padding + 1 for i, (_, high) in enumerate(bins))
        if kernel < size_in and (found is None or kernel < found.kernel):
            # The padding behind follows from the output size.
            found = Along(axis, kernel, stride, 1, padding, padding)
    return found


def _resize(call: Call) -> Spec:
    """``F.interpolate`` and ATen's ``upsample_*``."""
    operand: Operand = call.args["input"]
    mode, align = resize_mode(call)
    if mode == "area":
        result = _adaptive_pool(
            Call(f"adaptive_avg_pool{operand.rank - 2}d", call.args, call.outputs)
        )
        if isinstance(result, Spec):
            return result
        return _spatial_spec(
            "interpolate", operand, [Along(a) for a in range(2, operand.rank)], Along(1)
        )
    per_axis: list[Access] = []
    reason = ""
    for axis in range(2, operand.rank):
        size_in, size_out = operand.shape[axis], call.shape[axis]
        scale = given_scale(call, axis - 2, operand.rank - 2)
        access = _resize_axis(axis, size_in, size_out, mode, align, scale)
        if isinstance(access, All):
            corners = " with align_corners" if align else ""
            reason = f"interpolate ({mode}{corners}) reads other rows than the two nearest ones"
        per_axis.append(access)
    return _spatial_spec("interpolate", operand, per_axis, Along(1), reason=reason)


def resize_mode(call: Call) -> tuple[str, bool]:
    """The mode as ``F.interpolate`` names it, and whether corners are aligned.

    One that is antialiased is ``"antialiased bilinear"``.
    """
    align = bool(call.get("align_corners", False))
    mode, antialias = str(call.get("mode", "nearest")), bool(call.get("antialias", False))
    if call.name != "interpolate":
        mode = call.name.replace("_upsample", "upsample").removeprefix("upsample_")
        exact, antialias = "_exact" in mode, mode.endswith("_aa")
        mode = mode.replace("_exact", "").replace("_aa", "").rstrip("123d")
        mode = "nearest-exact" if exact else mode
    return (f"antialiased {mode}" if antialias else mode), align


def given_scale(call: Call, axis: int, n: int) -> float | None:
    """The scale factor that torch computes source positions with, where it was given one."""
    given = call.args.get("scale_factors", call.args.get("scale_factor"))
    if given is None or call.get("recompute_scale_factor", False):
        return None
    values = given if isinstance(given, (list, tuple)) else (given,) * n
    value = values[axis]
    return float(value) if isinstance(value, (int, float)) else None


def _resize_axis(
    axis: int, size_in: int, size_out: int, mode: str, align: bool, scale: float | None
) -> Access:
    if size_in == size_out and scale in (None, 1.0):
        plain = mode in ("nearest", "nearest-exact", "linear", "bilinear", "trilinear")
        return Along(axis) if plain else All()
    if size_in == 1:
        # One row is the nearest one to all; other modes weigh it with itself.
        return Along(axis, kind=WindowKind.RESIZE)
    if align or mode not in ("nearest", "nearest-exact", "linear", "bilinear", "trilinear"):
        return All()
    step = size_in / size_out if scale is None else 1.0 / scale
    spans = [_source_rows(r, step, size_in, mode) for r in range(size_out)]
    stride = size_in // size_out
    if (
        mode == "nearest"
        and size_in % size_out == 0
        and all(low == r * stride for r, (low, _) in enumerate(spans))
    ):
        return Along(axis, 1, stride)
    fits = all(
        low >= first and high <= first + 1
        for r, (low, high) in enumerate(spans)
        for first in [first_resized(r, size_in, size_out)]
    )
    return Along(axis, kind=WindowKind.RESIZE) if fits else All()


def _source_rows(row: int, step: float, size_in: int, mode: str) -> tuple[int, int]:
    """First and last input row that torch reads for an output row."""
    if mode == "nearest":
        at = min(math.floor(row * step), size_in - 1)
        return at, at
    if mode == "nearest-exact":
        at = min(math.floor((row + 0.5) * step), size_in - 1)
        return at, at
    at = math.floor(max(0.0, (row + 0.5) * step - 0.5))
    return min(at, size_in - 1), min(at + 1, size_in - 1)


def _pad(call: Call) -> Spec | Alias:
    """``F.pad``: pairs from the last axis on; negative ones crop."""
    operand: Operand = call.args["input"]
    pads = [int(p) for p in (call.args.get("pad") or call.args["padding"])]
    if not any(pads):
        return Alias(operand, (lambda layout: layout,))
    mode = "constant" if "constant" in call.name else str(call.get("mode", "constant"))
    if call.name.startswith(("reflection", "replication", "circular")):
        mode = call.name.split("_")[0]
    accesses: list[Access] = [Along(axis) for axis in range(operand.rank)]
    reason = ""
    for place in range(len(pads) // 2):
        axis = operand.rank - 1 - place
        begin, end = pads[2 * place : 2 * place + 2]
        if (begin, end) == (0, 0):
            continue
        if mode == "constant":
            accesses[axis] = Along(axis, padding=begin, padding_end=end)
        else:
            accesses[axis] = All()
            if axis == operand.rank - 2 or operand.rank == 3:
                reason = f"pad ({mode}) copies rows from inside the map to its border"
    return Spec("pad", (Reading(operand, tuple(accesses)),), reason=reason)


def _pixel_shuffle(call: Call) -> Spec:
    operand: Operand = call.args["input"]
    factor = call.shape[-1] // operand.shape[-1]
    lead = operand.rank - 2
    per_axis: list[Access] = [
        Along(lead + a, factor, factor, kind=WindowKind.TRANSPOSED) for a in range(2)
    ]
    return _spatial_spec("pixel_shuffle", operand, per_axis, All())


def _pixel_unshuffle(call: Call) -> Spec:
    operand: Operand = call.args["input"]
    factor = operand.shape[-1] // call.shape[-1]
    lead = operand.rank - 2
    per_axis: list[Access] = [Along(lead + a, factor, factor) for a in range(2)]
    return _spatial_spec("pixel_unshuffle", operand, per_axis, All())


def _conv_rules() -> list[OpRule]:
    params = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    transposed = (*params[:5], "output_padding", "groups", "dilation")
    aten = (*params[:6], "transposed", "output_padding", "groups")
    weights = ("weight", "bias")
    samples = {
        "conv1d": Sample(lambda: nn.Conv1d(4, 6, 3, 2, 1), (_LINE,)),
        "conv2d": Sample(
            lambda: nn.Sequential(
                nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
                nn.Conv2d(6, 6, 4, padding="same", groups=3, bias=False),
            ),
            (_MAP,),
        ),
        "conv3d": Sample(lambda: nn.Conv3d(2, 3, 3), ((2, 4, 5, 6),)),
        "conv_transpose1d": Sample(lambda: nn.ConvTranspose1d(4, 6, 4, 2, 1), (_LINE,)),
        "conv_transpose2d": Sample(
            lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, dilation=2), (_MAP,)
        ),
        "conv_transpose3d": Sample(lambda: nn.ConvTranspose3d(2, 3, 2), ((2, 4, 5, 6),)),
    }
    rules = [
        OpRule(
            kind,
            (kind,),
            _convolution,
            sample,
            transposed if "transp" in kind else params,
            weights=weights,
        )
        for kind, sample in samples.items()
    ]
    direct = Sample(
        lambda: Run(lambda x, w: F.conv2d(F.pad(x, (1, 0, 2, -1)), w, stride=2), (6, 4, 3, 3)),
        (_MAP,),
    )
    rules.append(
        OpRule("convolution", ("convolution",), _convolution, direct, aten, weights=weights)
    )
    return rules


def _pool_rules() -> list[OpRule]:
    shapes = {1: _LINE, 2: (4, 11, 12), 3: (2, 4, 6, 8)}
    rules = []
    for n, shape in shapes.items():
        rules += [
            OpRule(
                f"max_pool{n}d",
                (f"max_pool{n}d", f"max_pool{n}d_with_indices"),
                _pool,
                Sample(partial(getattr(nn, f"MaxPool{n}d"), 3, 2, 1, ceil_mode=True), (shape,)),
                ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode"),
            ),
            OpRule(
                f"avg_pool{n}d",
                (f"avg_pool{n}d",),
                _pool,
                Sample(partial(getattr(nn, f"AvgPool{n}d"), 2, 3, 1), (shape,)),
                ("input", "kernel_size", "stride", "padding", "ceil_mode"),
            ),
        ]
        for word, cls in (("avg", "AdaptiveAvgPool"), ("max", "AdaptiveMaxPool")):
            rules.append(
                OpRule(
                    f"adaptive_{word}_pool{n}d",
                    (f"adaptive_{word}_pool{n}d",),
                    _adaptive_pool,
                    Sample(partial(getattr(nn, f"{cls}{n}d"), 3), (shape,)),
                    ("input", "output_size"),
                )
            )
    return rules


_MODES = (
    *("nearest1d", "nearest2d", "nearest3d", "nearest_exact1d", "nearest_exact2d"),
    *("nearest_exact3d", "linear1d", "bilinear2d", "trilinear3d", "bicubic2d"),
    *("bilinear2d_aa", "bicubic2d_aa"),
)
UPSAMPLES = tuple(f"{lead}upsample_{mode}" for lead in ("", "_") for mode in _MODES)

RULES: tuple[OpRule, ...] = (
    *_conv_rules(),
    *_pool_rules(),
    OpRule(
        "interpolate",
        ("interpolate", *UPSAMPLES),
        _resize,
        Sample(lambda: Run(lambda x: F.interpolate(x, size=(13, 21), mode="bilinear")), (_MAP,)),
        ("input", "output_size", "align_corners", "scale_factors"),
    ),
    OpRule(
        "pad",
        (
            "pad",
            "constant_pad_nd",
            "reflection_pad1d",
            "reflection_pad2d",
            "replication_pad1d",
            "replication_pad2d",
            "replication_pad3d",
            "reflection_pad3d",
        ),
        _pad,
        Sample(lambda: Run(lambda x: F.pad(x, (1, -1, 2, 1))), (_MAP,)),
        ("input", "pad", "mode", "value"),
    ),
    OpRule(
        "pixel_shuffle",
        ("pixel_shuffle",),
        _pixel_shuffle,
        Sample(lambda: nn.PixelShuffle(2), (_MAP,)),
        ("input", "upscale_factor"),
    ),
    OpRule(
        "pixel_unshuffle",
        ("pixel_unshuffle",),
        _pixel_unshuffle,
        Sample(lambda: nn.PixelUnshuffle(2), ((2, 8, 6),)),
        ("input", "downscale_factor"),
    ),
)
"""Operators that slide, resize or move rows."""

EXTRA_SAMPLES: dict[str, Sample] = {
    "max_pool2d stride": Sample(lambda: nn.MaxPool2d(2), (_MAP,)),
    "avg_pool2d ceil": Sample(
        lambda: nn.AvgPool2d(3, 2, ceil_mode=True, count_include_pad=False), ((3, 8, 10),)
    ),
    "adaptive same": Sample(
        lambda: nn.Sequential(nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d((8, 9))), (_MAP,)
    ),
    "adaptive global": Sample(lambda: nn.AdaptiveAvgPool2d(1), (_MAP,)),
    "adaptive divides": Sample(lambda: nn.AdaptiveAvgPool2d((4, 3)), (_MAP,)),
    "nearest up": Sample(lambda: nn.Upsample(scale_factor=2), (_MAP,)),
    "nearest down": Sample(lambda: Run(lambda x: F.interpolate(x, size=(4, 3))), (_MAP,)),
    "nearest uneven": Sample(lambda: Run(lambda x: F.interpolate(x, size=(3, 5))), (_MAP,)),
    "nearest-exact": Sample(
        lambda: Run(lambda x: F.interpolate(x, size=(3, 20), mode="nearest-exact")), (_MAP,)
    ),
    "bilinear down": Sample(
        lambda: Run(lambda x: F.interpolate(x, size=(5, 4), mode="bilinear")), (_MAP,)
    ),
    "bilinear corners": Sample(
        lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), (_MAP,)
    ),
    "bilinear odd scale": Sample(
        lambda: nn.Upsample(scale_factor=1.5, mode="bilinear"), ((2, 5, 7),)
    ),
    "bicubic": Sample(lambda: nn.Upsample(scale_factor=2, mode="bicubic"), (_MAP,)),
    "area": Sample(lambda: Run(lambda x: F.interpolate(x, size=(4, 3), mode="area")), (_MAP,)),
    "reflect columns": Sample(lambda: nn.ReflectionPad2d((1, 2, 0, 0)), (_MAP,)),
    "reflect rows": Sample(lambda: nn.Conv2d(4, 2, 3, 1, 1, padding_mode="reflect"), (_MAP,)),
    "replicate": Sample(lambda: nn.ReplicationPad2d(1), (_MAP,)),
    "no padding": Sample(lambda: Run(lambda x: F.pad(x + 1, (0, 0, 0, 0))), (_MAP,)),
    "transposed, plain": Sample(lambda: nn.ConvTranspose2d(4, 4, 2, 2, groups=2), (_MAP,)),
    "max_pool2d, values": Sample(
        lambda: Run(lambda x: F.max_pool2d(x, 2, return_indices=True)[0]), (_MAP,)
    ),
    "conv3d along depth": Sample(
        lambda: nn.Sequential(nn.Conv3d(2, 4, (3, 2, 1), (2, 1, 1), (1, 0, 0)), nn.ReLU()),
        ((2, 7, 4, 3),),
    ),
    "conv3d along height": Sample(
        lambda: nn.Conv3d(2, 4, (3, 2, 1), (2, 1, 2), (1, 1, 0), (1, 2, 1), 2), ((2, 4, 7, 3),)
    ),
    "volume": Sample(
        lambda: nn.Sequential(
            nn.ReplicationPad3d((1, 1, 0, 0, 1, 1)),
            nn.AvgPool3d((3, 2, 3), (1, 2, 1), (1, 1, 1)),
            nn.Upsample(scale_factor=2, mode="trilinear"),
        ),
        ((2, 4, 7, 3),),
    ),
    "volume, global": Sample(lambda: nn.AdaptiveAvgPool3d(1), ((2, 4, 7, 3),)),
    "max_pool2d, both": Sample(
        lambda: Run(lambda x: sum(F.max_pool2d(x, 2, return_indices=True))), (_MAP,)
    ),
}
"""Further variants of the operators above, for the conformance test."""
