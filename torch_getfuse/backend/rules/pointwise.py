"""Rules of operators whose output position needs the operands' position of the same number."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torch_getfuse.backend.rules.rule import (
    Alias,
    Call,
    Operand,
    OpRule,
    Reading,
    Run,
    Sample,
    Spec,
    Stored,
    held_axes,
    operands_in,
    pointwise_accesses,
    whole,
)
from torch_getfuse.backend.rules.view_windows import Access, Along

_MAP = (4, 6, 7)


def pointwise(call: Call) -> Spec:
    """Elementwise, operands broadcast to each other."""
    reads = tuple(Reading(o, pointwise_accesses(o, call.rank)) for o in call.activations)
    return Spec(call.name, reads, in_place=True)


def _kind(kind: str) -> Callable[[Call], Spec]:
    def rule(call: Call) -> Spec:
        spec = pointwise(call)
        return Spec(kind, spec.reads, in_place=True)

    return rule


def _hardtanh(call: Call) -> Spec:
    """ReLU6 is a hardtanh from 0 to 6."""
    limits = (call.get("min_val", -1.0), call.get("max_val", 1.0))
    kind = "relu6" if limits == (0, 6) else "hardtanh"
    return Spec(kind, pointwise(call).reads, in_place=True)


def _prelu(call: Call) -> Spec:
    operand: Operand = call.args["input"]
    weight: Operand = call.args["weight"]
    if not weight.weight:
        return whole(call, "prelu")
    return Spec("prelu", (Reading(operand, pointwise_accesses(operand, call.rank)),), in_place=True)


def _dropout(call: Call) -> Spec | Alias:
    """Nothing in eval; in training a random mask."""
    operand: Operand = call.args["input"]
    if not call.get("training", False) or call.get("p", 0.5) == 0:
        return Alias(operand, (lambda layout: layout,))
    return Spec(call.name, pointwise(call).reads, in_place=True)


def _to(call: Call) -> Spec | Alias:
    """A change of dtype is an operator; of device or layout, or none at all, is not."""
    operand = call.operands[0]
    if call.outputs[0].dtype == operand.info.dtype and call.shape == operand.shape:
        return Alias(operand, (lambda layout: layout,))
    return Spec("to", (Reading(operand, pointwise_accesses(operand, call.rank)),))


def _batch_norm(call: Call) -> Spec:
    """In eval a scale and a shift per channel; in training statistics of the whole map."""
    operand: Operand = call.args["input"]
    channels = operand.shape[1] if operand.rank > 1 else 1
    width = max((o.info.dtype.itemsize for o in call.operands if o.weight), default=0)
    weights = Stored(2 * channels, 2 * channels * (width or operand.info.dtype.itemsize))
    if call.get("training", False) or call.args.get("running_mean") is None:
        held = [axis for axis in range(operand.rank) if axis != 1]
        spec = held_axes(Call(call.name, {"input": operand}, call.outputs), "batch_norm", held)
        return Spec(spec.kind, spec.reads, weights=weights)
    reads = (Reading(operand, pointwise_accesses(operand, call.rank)),)
    return Spec("batch_norm", reads, in_place=True, weights=weights)


def _cat(call: Call) -> Spec:
    """Each operand is read at the places where it goes; along the batch as a whole."""
    dim = int(call.get("dim", 0)) % call.rank
    reads = []
    before, behind = 0, call.shape[dim]
    for operand in operands_in(call.args["tensors"]):
        if operand.rank != call.rank:  # torch lets an empty vector through
            continue
        behind -= operand.shape[dim]
        accesses: list[Access] = [Along(axis) for axis in range(operand.rank)]
        accesses[dim] = Along(dim, padding=before, padding_end=behind)
        before += operand.shape[dim]
        if not operand.weight:
            reads.append(Reading(operand, None if operand.batch == dim else tuple(accesses)))
    return Spec("cat", tuple(reads))


def _stack(call: Call) -> Spec:
    dim = int(call.get("dim", 0)) % call.rank
    reads = []
    for operand in call.activations:
        accesses = tuple(Along(axis + (axis >= dim)) for axis in range(operand.rank))
        reads.append(Reading(operand, accesses))
    return Spec("stack", tuple(reads))


def _glu(call: Call) -> Spec:
    operand: Operand = call.args["input"]
    return held_axes(call, "glu", [int(call.get("dim", -1)) % operand.rank])


def _embedding(call: Call) -> Spec:
    """The table is the weight, the indices are the input."""
    index = next((o for o in call.operands if not o.weight), None)
    table: Operand = call.args["weight"]
    if index is None or not table.weight:
        return whole(call, "embedding")
    accesses = tuple(Along(axis) for axis in range(index.rank))
    tokens = index.rank - 1 if index.rank > 1 else None
    return Spec("embedding", (Reading(index, accesses),), weights=table.stored, stream_axis=tokens)


_ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "relu": F.relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "mish": F.mish,
    "softplus": F.softplus,
    "threshold": lambda x: F.threshold(x, 0.1, 2.0),
    "log_sigmoid": F.logsigmoid,
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "rrelu": F.rrelu,
}
_UNARY: dict[str, Callable[..., Any]] = {
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "log": lambda x: torch.log(x.abs() + 1),
    "log2": lambda x: torch.log2(x.abs() + 1),
    "log10": lambda x: torch.log10(x.abs() + 1),
    "log1p": lambda x: torch.log1p(x.abs()),
    "sqrt": lambda x: (x * x).sqrt(),
    "rsqrt": lambda x: (x * x + 1).rsqrt(),
    "square": torch.square,
    "abs": torch.abs,
    "neg": torch.neg,
    "reciprocal": lambda x: 2 / (x * x + 1),
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "trunc": torch.trunc,
    "frac": torch.frac,
    "sign": torch.sign,
    "sgn": torch.sgn,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": lambda x: torch.tan(x / 10),
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "asin": lambda x: torch.asin(torch.tanh(x)),
    "acos": lambda x: torch.acos(torch.tanh(x)),
    "atan": torch.atan,
    "erf": torch.erf,
    "logit": lambda x: torch.logit(torch.sigmoid(x)),
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_max": lambda x: x.clamp_max(0),
    "nan_to_num": torch.nan_to_num,
    "logical_not": lambda x: torch.logical_not(x > 0) * x,
    "bitwise_not": lambda x: ~(x > 0) * x,
    "isnan": lambda x: torch.isnan(x) + x,
    "isinf": lambda x: torch.isinf(x) + x,
    "isfinite": lambda x: torch.isfinite(x) + x,
}
_BINARY: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: 1 - x - y,
    "mul": lambda x, y: x * y[:, :1, :1, :1],
    "div": lambda x, y: x / (y * y + 1) / 2,
    "floor_divide": lambda x, y: x // (y * y + 1),
    "remainder": lambda x, y: x % (y * y + 1),
    "fmod": lambda x, y: torch.fmod(x, y * y + 1),
    "pow": lambda x, y: (x * x + 1) ** y,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "fmax": torch.fmax,
    "fmin": torch.fmin,
    "atan2": torch.atan2,
    "hypot": torch.hypot,
    "complex": lambda x, y: torch.complex(x, y).imag,
    "eq": lambda x, y: (x == y) + x,
    "ne": lambda x, y: (x != y) * x,
    "gt": lambda x, y: (x > y) * x,
    "ge": lambda x, y: (x >= y) * x,
    "lt": lambda x, y: (x < y) * x,
    "le": lambda x, y: (x <= y) * x,
    "logical_and": lambda x, y: torch.logical_and(x > 0, y > 0) * x,
    "logical_or": lambda x, y: torch.logical_or(x > 0, y > 0) * x,
    "logical_xor": lambda x, y: torch.logical_xor(x > 0, y > 0) * x,
    "bitwise_and": lambda x, y: ((x > 0) & (y > 0)) * x,
    "bitwise_or": lambda x, y: ((x > 0) | (y > 0)) * x,
    "bitwise_xor": lambda x, y: ((x > 0) ^ (y > 0)) * x,
    "where": lambda x, y: torch.where(x > 0, x, y),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, 0.5),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    "addcdiv": lambda x, y: torch.addcdiv(x, x, y * y + 1),
    "xlogy": lambda x, y: torch.xlogy(x, y * y + 1),
}
_PARAMS = {
    "where": ("condition", "input", "other"),
    "masked_fill": ("input", "mask", "value"),
    "lerp": ("input", "end", "weight"),
    "addcmul": ("input", "tensor1", "tensor2"),
    "addcdiv": ("input", "tensor1", "tensor2"),
    "clamp": ("input", "min", "max"),
    "leaky_relu": ("input", "negative_slope"),
    "gelu": ("input", "approximate"),
}


def _functions(table: dict[str, Callable[..., Any]], inputs: int) -> list[OpRule]:
    return [
        OpRule(
            name,
            (name,),
            pointwise,
            Sample(partial(Run, function), (_MAP,) * inputs),
            _PARAMS.get(name, ("input", "other")),
            elementwise=True,
        )
        for name, function in table.items()
    ]


RULES: tuple[OpRule, ...] = (
    *_functions(_ACTIVATIONS, 1),
    *_functions(_UNARY, 1),
    *_functions(_BINARY, 2),
    OpRule(
        "logsigmoid",
        ("logsigmoid",),
        _kind("log_sigmoid"),
        Sample(nn.LogSigmoid, (_MAP,)),
        elementwise=True,
    ),
    OpRule(
        "hardtanh",
        ("hardtanh",),
        _hardtanh,
        Sample(lambda: nn.Sequential(nn.Hardtanh(), nn.Hardtanh(-2, 2, inplace=True)), (_MAP,)),
        ("input", "min_val", "max_val"),
        elementwise=True,
    ),
    OpRule(
        "relu6",
        ("relu6",),
        _kind("relu6"),
        Sample(lambda: nn.Sequential(nn.ReLU6(), Run(F.relu6)), (_MAP,)),
        elementwise=True,
    ),
    OpRule(
        "prelu",
        ("prelu",),
        _prelu,
        Sample(lambda: nn.PReLU(4), (_MAP,)),
        ("input", "weight"),
        weights=("weight",),
    ),
    OpRule(
        "dropout",
        (
            "dropout",
            "alpha_dropout",
            "feature_dropout",
            "feature_alpha_dropout",
            "native_dropout",
        ),
        _dropout,
        Sample(lambda: nn.Sequential(nn.Dropout(0.5), nn.ReLU(), nn.Dropout2d()).eval(), (_MAP,)),
        ("input", "p", "training"),
    ),
    OpRule(
        "to",
        ("to", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long", "bool"),
        _to,
        Sample(lambda: Run(lambda x: x.to(torch.float32).relu().double().to("cpu")), (_MAP,)),
    ),
    OpRule(
        "batch_norm",
        ("batch_norm", "native_batch_norm"),
        _batch_norm,
        Sample(lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)).eval(), (_MAP,)),
        ("input", "weight", "bias", "running_mean", "running_var", "training"),
        weights=("weight", "bias", "running_mean", "running_var"),
    ),
    OpRule(
        "cat",
        ("cat",),
        _cat,
        Sample(lambda: Run(lambda x, y: torch.cat((x, y, x), 1)), (_MAP, _MAP)),
        ("tensors", "dim"),
        aligns=True,
    ),
    OpRule(
        "stack",
        ("stack",),
        _stack,
        Sample(lambda: Run(lambda x, y: torch.stack([x, y]).sum(0)), (_MAP, _MAP)),
        ("tensors", "dim"),
    ),
    OpRule("glu", ("glu",), _glu, Sample(lambda: nn.GLU(1), (_MAP,)), ("input", "dim")),
    OpRule(
        "embedding",
        ("embedding",),
        _embedding,
        Sample(lambda: Run(lambda x, w: F.embedding((x > 0).long(), w).relu(), (9, 5)), ((7,),)),
        ("weight", "indices"),
        weights=("weight",),
    ),
)
"""Elementwise operators and their like."""

EXTRA_SAMPLES: dict[str, Sample] = {
    "cat over rows": Sample(lambda: Run(lambda x, y: torch.cat((x, y), 2)), (_MAP, _MAP)),
    "cat over tokens": Sample(
        lambda: Run(
            lambda x, w: torch.cat((w.expand(len(x), -1, -1), x.tanh(), x.exp()), 1), (2, 4)
        ),
        ((5, 4),),
    ),
    "batch norm of a signal": Sample(
        lambda: nn.Sequential(nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5), nn.PReLU()).eval(), ((4, 9),)
    ),
    "cat over columns": Sample(lambda: Run(lambda x, y: torch.cat((x, y), -1)), (_MAP, _MAP)),
    "glu over columns": Sample(lambda: nn.GLU(3), ((4, 6, 8),)),
    "same operand twice": Sample(lambda: Run(lambda x: x * x), (_MAP,)),
    "weight": Sample(lambda: Run(lambda x, w: x * w, (4, 1, 1)), (_MAP,)),
    "batch norm in training": Sample(lambda: nn.BatchNorm2d(4).train(), (_MAP,)),
    "dropout of nothing": Sample(lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.0)), (_MAP,)),
    "transposed operand": Sample(
        lambda: Run(lambda x: x.relu() + x.relu().transpose(2, 3)), ((4, 6, 6),)
    ),
    "row vector": Sample(lambda: Run(lambda x: x + x.mean(2, keepdim=True)), (_MAP,)),
    "column vector": Sample(lambda: Run(lambda x: x + x.mean(3, keepdim=True)), (_MAP,)),
}
"""Further variants, for the conformance test."""
