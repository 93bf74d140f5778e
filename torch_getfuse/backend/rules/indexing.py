"""Rules of operators that copy from, or to, where an index says.

Along the axis of the index an output position may need any input position: which one is known when
the model runs. Along all others it needs that of the same number, so that a choice of channels
goes row by row and a choice of rows reads the whole map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

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
    no_rule,
    whole,
)
from torch_getfuse.backend.rules.view_windows import Access, All, Along

_MAP = (4, 6, 7)
_MASKS = (torch.bool, torch.uint8)


def is_index(part: Any) -> bool:
    """Whether a part of an index gathers: positions in a tensor, or in (nested) lists."""
    if isinstance(part, list):
        return all(
            type(item) is int or (isinstance(item, list) and is_index(item)) for item in part
        )
    return isinstance(part, Operand) and part.info.dtype not in _MASKS


def _index_rank(part: Any) -> int:
    if isinstance(part, Operand):
        return part.rank
    return 1 + max((_index_rank(item) for item in part if isinstance(item, list)), default=0)


def gather_at(call: Call, operand: Operand, taken: Mapping[int, Any], batch: int | None) -> Spec:
    """``x[..., index, ...]``: the axes of the indices give way to those of the indices together.

    Args:
        call: whose output it is.
        operand: what is indexed, after its slices and numbers.
        taken: axis of the operand -> index of its positions, broadcast to each other.
        batch: axis of the operand that the batch is in.
    """
    axes = sorted(taken)
    if batch in taken:
        return whole(call, "index", f"an index along the batch {MIXES_SAMPLES}")
    together = max(_index_rank(part) for part in taken.values())
    # Indices side by side keep their place; others go to the front.
    first = axes[0] if axes == list(range(axes[0], axes[-1] + 1)) else 0
    if operand.rank - len(axes) + together != call.rank:
        return no_rule(call)
    accesses: list[Access] = []
    for axis in range(operand.rank):
        before = sum(other < axis for other in range(axis) if other not in taken)
        place = before if before < first else before + together
        accesses.append(All() if axis in taken else Along(place))
    reads = [] if operand.weight else [Reading(operand, tuple(accesses))]
    for part in taken.values():
        if isinstance(part, Operand) and not part.weight:
            shift = first + together - part.rank
            reads.append(Reading(part, tuple(Along(a + shift) for a in range(part.rank))))
    return Spec("index", tuple(reads), reason_if_whole=_reason("an index"))


def _reason(what: str) -> str:
    return f"{what} along the rows reads rows that are known only when it runs"


def _index(call: Call) -> Spec:
    """ATen's ``index``: ``None`` for each axis that is left as it is."""
    operand: Operand = call.args["input"]
    taken = {a: part for a, part in enumerate(call.args["indices"]) if part is not None}
    if not all(map(is_index, taken.values())):
        return whole(call, "index", "how much a mask picks is known only when it runs")
    return gather_at(call, operand, taken, operand.batch)


def _along(call: Call, operand: Operand, axis: int) -> Reading:
    """An operand of which any position along one axis may be needed."""
    accesses: list[Access] = [Along(a) for a in range(operand.rank)]
    if accesses:
        accesses[axis] = All()
    return Reading(operand, tuple(accesses))


def _pick(call: Call) -> Spec:
    """``index_select``, ``gather`` and ``take_along_dim``."""
    operand: Operand = call.args["input"]
    index = call.args.get("index", call.args.get("indices"))
    if call.args.get("dim") is None or operand.rank != call.rank or not operand.rank:
        return whole(call, call.name, f"{call.name} without an axis reads {FLATTENED}")
    (axis,) = call.dims()
    if axis == operand.batch:
        return whole(call, call.name, f"{call.name} along the batch {MIXES_SAMPLES}")
    reads = [] if operand.weight else [_along(call, operand, axis)]
    if isinstance(index, Operand) and not index.weight:
        # A row of positions for index_select, else one for each element of the output.
        shift = axis if index.rank == 1 else 0
        reads.append(Reading(index, tuple(Along(a + shift) for a in range(index.rank))))
    return Spec(call.name, tuple(reads), reason_if_whole=_reason(call.name))


def _put(call: Call) -> Spec:
    """``scatter``, ``scatter_add``, ``index_add`` and the like: the input with other elements.

    An element of the source may go to any position along the axis, and stays at its own along all
    others; a row of positions (``index_add``) is for all of them.
    """
    operand: Operand = call.args["input"]
    (axis,) = call.dims() or (0,)
    reads = []
    for part in call.activations:
        if part is operand:
            reads.append(Reading(part, tuple(Along(a) for a in range(part.rank))))
        elif part.rank == call.rank and axis != operand.batch:
            reads.append(_along(call, part, axis))
        else:
            reads.append(Reading(part, None))
    reason = f"{call.name} along the rows writes rows that are known only when it runs"
    return Spec(call.name, tuple(reads), reason_if_whole=reason)


def _index_put(call: Call) -> Spec:
    """The input with some elements replaced, or added to; where is known when it runs."""
    operand: Operand = call.args["input"]
    reads = [
        Reading(part, tuple(Along(a) for a in range(part.rank)) if part is operand else None)
        for part in call.activations
    ]
    reason = "index_put writes where its indices say: it needs all of its values and indices"
    return Spec("index_put", tuple(reads), reason_if_whole=reason)


def _grid_sampler(call: Call) -> Spec:
    """Reads a map where a grid says: all of the map, and the grid's own row."""
    operand, grid = call.args["input"], call.args["grid"]
    axes = operand.rank - 2
    reads = []
    if not operand.weight:
        reads.append(Reading(operand, (Along(0), Along(1), *(All() for _ in range(axes)))))
    if not grid.weight:
        reads.append(Reading(grid, (Along(0), *(Along(2 + a) for a in range(axes)), All())))
    reason = "grid_sample reads where its grid says: it needs the whole map before its first row"
    return Spec("grid_sample", tuple(reads), reason_if_whole=reason)


def _sample(function: Any, *shapes: tuple[int, ...]) -> Sample:
    return Sample(lambda: Run(function), shapes or (_MAP,))


_CHOICE = [2, 0, 3]

RULES: tuple[OpRule, ...] = (
    OpRule(
        "index",
        ("index",),
        _index,
        _sample(lambda x: x[:, _CHOICE]),
        ("input", "indices"),
    ),
    OpRule(
        "index_select",
        ("index_select",),
        _pick,
        _sample(lambda x: x.index_select(1, torch.tensor(_CHOICE))),
        ("input", "dim", "index"),
    ),
    OpRule(
        "gather",
        ("gather", "take_along_dim"),
        _pick,
        _sample(lambda y, x: x.gather(1, (y > 0).long()), (3, 6, 7), _MAP),
        ("input", "dim", "index"),
    ),
    OpRule(
        "scatter",
        ("scatter", "scatter_add", "scatter_reduce"),
        _put,
        _sample(lambda y, x: x.scatter(1, (y > 0).long(), y), (3, 6, 7), _MAP),
        ("input", "dim", "index", "src"),
    ),
    OpRule(
        "index_add",
        ("index_add", "index_copy", "index_fill"),
        _put,
        _sample(lambda x, y: x.index_add(1, torch.tensor(_CHOICE), y), _MAP, (3, 6, 7)),
        ("input", "dim", "index", "source"),
    ),
    OpRule(
        "index_put",
        ("index_put",),
        _index_put,
        _sample(
            lambda x: torch.index_put(
                x, (torch.tensor([0]), torch.tensor([1])), torch.tensor(2.0, dtype=x.dtype)
            )
        ),
        ("input", "indices", "values", "accumulate"),
    ),
    OpRule(
        "grid_sample",
        ("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"),
        _grid_sampler,
        _sample(
            lambda x, g: F.grid_sample(x, g.permute(0, 2, 3, 1), align_corners=False),
            _MAP,
            (2, 5, 4),
        ),
        ("input", "grid", "interpolation_mode", "padding_mode", "align_corners"),
    ),
)
"""Operators that copy from, or to, where an index says."""

EXTRA_SAMPLES: dict[str, Sample] = {
    "index of rows": _sample(lambda x: x[:, :, _CHOICE]),
    "index of columns": _sample(lambda x: x[..., torch.tensor([[0, 5], [6, 1]])]),
    "index beside a slice": _sample(lambda x: x[:, _CHOICE, 1:, ::2].relu()),
    "index, apart": _sample(lambda x: x[:, _CHOICE, :, [0, 1, 2]]),
    "index by a map": _sample(
        lambda y, x: x.transpose(1, 2)[:, :, (y > 0).long()[0, 0, 0]], _MAP, _MAP
    ),
    "index_select of rows": _sample(lambda x: x.index_select(2, torch.tensor(_CHOICE))),
    "gather of rows": _sample(lambda y, x: x.gather(2, (y > 0).long()), (4, 3, 7), _MAP),
    "gather of columns": _sample(lambda y, x: x.gather(-1, (y > 0).long()), (4, 6, 3), _MAP),
    "scatter over rows": _sample(lambda y, x: x.scatter(2, (y > 0).long(), 2.0), _MAP, _MAP),
    "scatter_add": _sample(lambda y, x: x.scatter_add(1, (y > 0).long(), y), (4, 6, 7), _MAP),
    "scatter_reduce": _sample(
        lambda y, x: x.scatter_reduce(-1, (y > 0).long(), y, "amax"), (4, 6, 3), _MAP
    ),
    "index_fill": _sample(lambda x: x.index_fill(3, torch.tensor(_CHOICE), 0.5)),
    "index_put, added": _sample(
        lambda x, y: x.index_put(
            (torch.tensor(_CHOICE)[:1] * 0, torch.tensor([1])), y[0, 0, 0, 0], accumulate=True
        ),
        _MAP,
        _MAP,
    ),
}
"""Further variants, for the conformance test."""
