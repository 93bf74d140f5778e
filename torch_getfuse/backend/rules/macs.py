"""Multiply-accumulates (MACs) of the operators that sum products, of a whole call.

By the sizes alone: zeros, masks and causal attention save none, positions of the padding count, and
neither biases nor scales do. So counts PyTorch's ``FlopCounterMode``, two FLOPs for each. ``None``
where the arguments do not say.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch_getfuse.backend.rules.rule import Call, Operand, operands_in

Shape = tuple[int, ...]


def convolution_macs(call: Call, transposed: bool) -> int:
    """Each output position takes in a kernel; of a transposed one, each input position gives one.

    A kernel has the channels of one group only.
    """
    operand: Operand = call.args["input"]
    weight: Operand = call.args["weight"]
    positions = operand.shape if transposed else call.shape
    return math.prod(positions) * math.prod(weight.shape[1:])


def matmul_macs(call: Call, left: Operand) -> int:
    """Each element of the result sums over the last axis of the left operand."""
    return math.prod(call.shape) * left.shape[-1]


def attention_macs(call: Call) -> int:
    """``scaled_dot_product_attention``: queries by keys, and the weights by values."""
    query, key, value = (
        operand.shape for operand in operands_in([call.args[n] for n in ("query", "key", "value")])
    )
    return math.prod(call.shape[:-1]) * key[-2] * (query[-1] + value[-1])


def recurrent_macs(operand: Operand, params: Sequence[Any]) -> int:
    """Each step of each sample goes through all matrices, each layer and direction once."""
    matrices = [param.shape for param in params if isinstance(param, Operand) and param.rank == 2]
    return math.prod(operand.shape[:-1]) * sum(map(math.prod, matrices))


def product_macs(call: Call) -> int | None:
    """Of the operators that multiply whole operands, by name."""
    if call.name == "einsum":
        return _einsum(call)
    shapes = [operand.shape for operand in call.operands]
    if call.name == "_native_multi_head_attention":
        return _fused_attention(shapes[0], shapes[1], shapes[3:7:2])
    if call.name == "_transformer_encoder_layer_fwd":
        return _fused_attention(shapes[0], shapes[0], [*shapes[1:5:2], *shapes[9:13:2]])
    if call.name == "bilinear" and len(shapes) > 2:  # the first input by the weight, then both
        _, first, second = shapes[2]
        return math.prod(call.shape) * (first + 1) * second
    if call.name not in ("addmm", "baddbmm", "addbmm") or len(shapes) != 3:
        return None
    summed = shapes[1][0] * shapes[1][2] if call.name == "addbmm" else shapes[1][-1]
    return math.prod(call.shape) * summed


def _einsum(call: Call) -> int | None:
    """Of two operands; of more it depends on the order in which torch takes them."""
    equation, operands = _equation(tuple(call.args.values())), call.operands
    if len(operands) == 1:
        return 0
    if equation is None or len(operands) != 2:
        return None
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = [
        _axes(term, operand.rank) for term, operand in zip(left.split(","), operands, strict=True)
    ]
    sizes: dict[str | int, int] = {}
    for axes, operand in zip(terms, operands, strict=True):
        for axis, size in zip(axes, operand.shape, strict=True):
            sizes[axis] = max(size, sizes.get(axis, 1))
    told = Counter(axis for axes in terms for axis in set(axes))
    out = _axes(right, len(call.shape)) if arrow else [a for a in told if told[a] == 1]
    # What one operand alone has, and the result has not, is summed before they meet.
    return math.prod(size for axis, size in sizes.items() if told[axis] == 2 or axis in out)


def _equation(arguments: Any) -> str | None:
    """The text among the arguments; ``None`` where axes are given as lists of numbers."""
    if isinstance(arguments, (list, tuple)):
        return next(filter(None, map(_equation, arguments)), None)
    return arguments if isinstance(arguments, str) else None


def _axes(term: str, rank: int) -> list[str | int]:
    """Letters of a term, and for an ellipsis numbers that count its axes from the last."""
    before, ellipsis, after = term.partition("...")
    axes = rank - len(before) - len(after) if ellipsis else 0
    return [*before, *range(-axes, 0), *after]


def _fused_attention(query: Shape, key: Shape, weights: Sequence[Shape]) -> int:
    """Three projections, attention, and the layers of matrices that its result goes through."""
    rows, stored = math.prod(query[:-1]), math.prod(key[:-1])
    joint, *further = weights
    return (
        (rows + 2 * stored) * (math.prod(joint) // 3)
        + 2 * rows * key[-2] * query[-1]
        + rows * sum(map(math.prod, further))
    )
