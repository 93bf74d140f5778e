"""Rules of operators that take in whole axes: reductions, softmax, norms, linear, attention."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from torch_getfuse.backend.rules.macs import attention_macs, matmul_macs, product_macs
from torch_getfuse.backend.rules.pointwise import pointwise
from torch_getfuse.backend.rules.rule import (
    Call,
    Operand,
    OpRule,
    Reading,
    Run,
    Sample,
    Spec,
    held_axes,
    pointwise_accesses,
    whole,
)
from torch_getfuse.backend.rules.view_windows import Access, All, Along

_MAP = (4, 6, 7)


def reduction(call: Call) -> Spec:
    """Over some axes; each position is taken in as it arrives."""
    operand: Operand = call.args["input"]
    if isinstance(call.args.get("dim"), bool):  # var(x, unbiased) has no axes, so it takes all
        call = replace(call, args={**call.args, "dim": None})
    gone = set(call.dims())
    keep = bool(call.get("keepdim", False))
    accesses: list[Access] = []
    place = 0
    for axis in range(operand.rank):
        if axis in gone:
            accesses.append(All(reduce=True))
            place += keep
        else:
            accesses.append(Along(place))
            place += 1
    kind = {"linalg_vector_norm": "norm"}.get(call.name, call.name)
    return Spec(kind, (Reading(operand, tuple(accesses)),))


def _extremum(call: Call) -> Spec:
    """``torch.max`` of two tensors; with a dimension it is a reduction."""
    other = call.args.get("other", call.args.get("dim"))
    if isinstance(other, Operand):
        kind = "maximum" if call.name == "max" else "minimum"
        return Spec(kind, pointwise(call).reads, in_place=True)
    return reduction(call)


def _softmax(call: Call) -> Spec:
    if call.get("dim") is None:  # F.softmax's own choice of axis, of which it warns
        call = replace(call, args={**call.args, "dim": 0 if call.rank in (0, 1, 3) else 1})
    return held_axes(call, call.name, call.dims())


def _scan(call: Call) -> Spec:
    """A running sum needs all positions before its own; no window says that."""
    return held_axes(call, call.name, call.dims())


def _layer_norm(call: Call) -> Spec:
    operand: Operand = call.args["input"]
    over = call.args.get("normalized_shape", (0,))
    axes = len(over) if isinstance(over, (list, tuple)) else 1
    inner = Call(call.name, {"input": operand}, call.outputs)
    spec = held_axes(inner, call.name, range(operand.rank - axes, operand.rank))
    return spec


def _channel_norm(call: Call) -> Spec:
    """Group and instance norm: statistics over the whole map of a group of channels."""
    operand: Operand = call.args["input"]
    inner = Call(call.name, {"input": operand}, call.outputs)
    return held_axes(inner, call.name, range(1, operand.rank))


def _linear(call: Call) -> Spec:
    """A linear layer takes in the last axis as it arrives."""
    operand, weight = call.args["input"], call.args["weight"]
    macs = matmul_macs(call, operand)
    if operand.weight or not weight.weight:
        return whole(call, "linear", mixes=True, macs=macs)
    accesses: list[Access] = [Along(axis) for axis in range(operand.rank)]
    accesses[-1] = All(reduce=True)
    reads = (Reading(operand, tuple(accesses)),)
    return Spec("linear", reads, mixes_channels=True, channel_axis=call.rank - 1, macs=macs)


def _matmul(call: Call) -> Spec:
    """With a matrix of weights on the right like a linear layer; of two maps a row of the left
    one needs all of the right one.
    """
    left, right = call.args.get("input"), call.args.get("other", call.args.get("mat2"))
    if not isinstance(left, Operand) or not isinstance(right, Operand):
        return whole(call, call.name, mixes=True, macs=None)
    macs = matmul_macs(call, left)
    if not left.weight and right.weight and right.rank == 2 and left.rank > 1:
        accesses: list[Access] = [Along(axis) for axis in range(left.rank)]
        accesses[-1] = All(reduce=True)
        return Spec(
            call.name,
            (Reading(left, tuple(accesses)),),
            mixes_channels=True,
            channel_axis=call.rank - 1,
            macs=macs,
        )
    if min(left.rank, right.rank) < 2:
        return whole(call, call.name, mixes=True, macs=macs)
    rows, columns = _aligned(left, call.rank), _aligned(right, call.rank)
    rows[-1] = columns[-2] = All()
    reads = ((left, rows), (right, columns))
    return Spec(
        call.name,
        tuple(Reading(o, tuple(accesses)) for o, accesses in reads if not o.weight),
        mixes_channels=True,
        macs=macs,
    )


def _aligned(operand: Operand, rank: int) -> list[Access]:
    """Accesses of an operand that is aligned with the last axes of an output of ``rank`` axes."""
    return list(pointwise_accesses(operand, rank))


def _attention(call: Call) -> Spec:
    """A row of the queries, and of a mask, needs all keys and values."""
    query = call.args["query"]
    if query.rank != call.rank:
        return whole(call, call.name, mixes=True, macs=attention_macs(call))
    reads = []
    for operand in call.activations:
        accesses = _aligned(operand, call.rank)
        held = (-1,) if operand is query or operand is call.args.get("attn_mask") else (-2, -1)
        for axis in held:
            accesses[axis] = All()
        reads.append(Reading(operand, tuple(accesses)))
    return Spec(call.name, tuple(reads), mixes_channels=True, macs=attention_macs(call))


def _everything(call: Call) -> Spec:
    """Products of whole operands."""
    return whole(call, call.name, mixes=True, macs=product_macs(call))


def _reduce_channels(name: str) -> Run:
    """A sample; ``any`` and ``all`` want truth values."""
    logical = name in ("any", "all")
    return Run(lambda x: getattr(torch, name)((x > 0) if logical else x, 1))


_REDUCTIONS = (
    *("mean", "sum", "amax", "amin", "prod", "any", "all", "logsumexp", "var", "std"),
    *("argmax", "argmin", "nansum", "count_nonzero"),
)

RULES: tuple[OpRule, ...] = (
    *(
        OpRule(
            name,
            (name,),
            reduction,
            Sample(partial(_reduce_channels, name), (_MAP,)),
            ("input", "dim", *(("unbiased",) if name in ("var", "std") else ()), "keepdim"),
        )
        for name in _REDUCTIONS
    ),
    OpRule(
        "norm",
        ("norm", "linalg_vector_norm"),
        reduction,
        Sample(lambda: Run(lambda x: F.normalize(x, dim=1)), (_MAP,)),
        ("input", "ord", "dim", "keepdim"),
    ),
    OpRule(
        "std_mean",
        ("std_mean", "var_mean"),
        reduction,
        Sample(lambda: Run(lambda x: torch.std_mean(x, (2, 3), keepdim=True)[1] + x), (_MAP,)),
        ("input", "dim", "correction", "keepdim"),
    ),
    OpRule(
        "maximum, minimum",
        ("max", "min"),
        _extremum,
        Sample(lambda: Run(lambda x, y: torch.max(x, y) + x.amax((2, 3), True)), (_MAP, _MAP)),
        ("input", "dim", "keepdim"),
        aligns=True,
    ),
    OpRule(
        "softmax",
        ("softmax", "log_softmax"),
        _softmax,
        Sample(lambda: nn.Sequential(nn.Softmax(1), nn.LogSoftmax(1)), (_MAP,)),
        ("input", "dim"),
    ),
    OpRule(
        "cumsum",
        ("cumsum", "cumprod", "cummax", "sort", "logcumsumexp"),
        _scan,
        Sample(lambda: Run(lambda x: x.cumsum(1) + x.cumprod(2)), (_MAP,)),
        ("input", "dim"),
    ),
    OpRule(
        "layer_norm",
        ("layer_norm", "rms_norm", "native_layer_norm"),
        _layer_norm,
        Sample(
            lambda: Run(
                lambda x, w, b: F.layer_norm(x.permute(0, 2, 3, 1), (4,), w, b), (4,), (4,)
            ),
            (_MAP,),
        ),
        ("input", "normalized_shape", "weight", "bias"),
        weights=("weight", "bias"),
    ),
    OpRule(
        "group_norm",
        ("group_norm", "instance_norm", "native_group_norm"),
        _channel_norm,
        Sample(lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)), (_MAP,)),
        ("input", "num_groups", "weight", "bias"),
        weights=("weight", "bias", "running_mean", "running_var"),
        by_strides=True,
    ),
    OpRule(
        "linear",
        ("linear",),
        _linear,
        Sample(lambda: Run(lambda x, w: F.linear(x.permute(0, 2, 3, 1), w), (5, 4)), (_MAP,)),
        ("input", "weight", "bias"),
        weights=("weight", "bias"),
    ),
    OpRule(
        "matmul",
        ("matmul", "mm", "bmm", "_int_mm"),
        _matmul,
        Sample(
            lambda: Run(lambda x, w: (x.permute(0, 2, 3, 1) @ w) @ x.new_ones(1, 5, 3), (4, 5)),
            (_MAP,),
        ),
        ("input", "other"),
        product=True,
        batched=True,
    ),
    OpRule(
        "attention",
        ("scaled_dot_product_attention",),
        _attention,
        Sample(
            lambda: Run(lambda x: F.scaled_dot_product_attention(x, x * 2, x + 1)), ((2, 6, 4),)
        ),
        ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
        product=True,
        batched=True,
    ),
    OpRule(
        "product",
        (
            *("einsum", "baddbmm", "addmm", "addbmm", "bilinear"),
            *("_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
        ),
        _everything,
        Sample(lambda: Run(lambda x: torch.einsum("bij,bkj->bik", x, x * 2)), ((6, 4),)),
        ("input", "mat1", "mat2"),
        product=True,
    ),
)
"""Operators that need whole axes of their inputs."""

EXTRA_SAMPLES: dict[str, Sample] = {
    "mean of the map": Sample(lambda: Run(lambda x: x.mean((2, 3))), (_MAP,)),
    "variance of all": Sample(lambda: Run(lambda x: torch.var(x, True) + x.std(False)), (_MAP,)),
    "variance, by position": Sample(
        lambda: Run(lambda x: x.var(1, False, True) + x.std((2, 3), True)[:, :, None, None]),
        (_MAP,),
    ),
    "mean of all": Sample(lambda: Run(lambda x: x.mean() + x), (_MAP,)),
    "sum of columns": Sample(lambda: Run(lambda x: x.sum(-1)), (_MAP,)),
    "sum of rows": Sample(lambda: Run(lambda x: x.sum(2)), (_MAP,)),
    "max of columns": Sample(lambda: Run(lambda x: x.max(3)[0]), (_MAP,)),
    "softmax of columns": Sample(lambda: nn.Softmax(3), (_MAP,)),
    "softmax of the map": Sample(lambda: Run(lambda x: x.flatten(2).softmax(-1)), (_MAP,)),
    "layer norm of the map": Sample(lambda: nn.LayerNorm(_MAP), (_MAP,)),
    "linear of columns": Sample(lambda: nn.Linear(7, 5), (_MAP,)),
    "flatten, linear": Sample(lambda: nn.Sequential(nn.Flatten(), nn.Linear(168, 5)), (_MAP,)),
    "linear, softmax": Sample(lambda: nn.Sequential(nn.Linear(8, 5), nn.Softmax(-1)), ((8,),)),
    "response norm": Sample(lambda: nn.LocalResponseNorm(3), (_MAP,)),
    "attention by rows": Sample(
        lambda: Run(
            lambda x, y, m: F.scaled_dot_product_attention(x.tanh(), y, y * 2, attn_mask=m), (6, 5)
        ),
        ((2, 6, 4), (2, 5, 4)),
    ),
    "causal attention": Sample(
        lambda: Run(
            lambda x, y: F.scaled_dot_product_attention(x.tanh(), y, y * 2, is_causal=True)
        ),
        ((2, 6, 4), (2, 6, 4)),
    ),
    "matmul of maps": Sample(
        lambda: Run(lambda x, y: (x.tanh() @ y.transpose(1, 2)).softmax(-1) @ y),
        ((6, 4), (5, 4)),
    ),
    "norms of a signal": Sample(
        lambda: nn.Sequential(
            nn.Conv1d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.GELU(), nn.InstanceNorm1d(4)
        ),
        ((4, 12),),
    ),
    "mean of tokens": Sample(
        lambda: Run(lambda x: x.relu().flatten(2).transpose(1, 2).mean(1)), (_MAP,)
    ),
    "attention": Sample(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), ((5, 8),)
    ),
}
"""Further variants, for the conformance test."""
