"""Rules of calls that are no operators: views, what does nothing in eval, and constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from torch_getfuse.backend.rules.indexing import gather_at, is_index
from torch_getfuse.backend.rules.rule import (
    Alias,
    Call,
    Operand,
    OpRule,
    Run,
    Sample,
    Spec,
    ViewForm,
    no_rule,
)
from torch_getfuse.backend.rules.view_windows import NO_AXIS, Atom, Layout

_MAP = (4, 6, 7)
Change = Callable[[Layout], Layout]


# Made by functions, so that each holds its own numbers and not those of the loop around it.
def _sliced(axis: int, start: int, size: int, step: int = 1) -> Change:
    return lambda layout: layout.slice(axis, start, size, step)


def _unsqueezed(axis: int) -> Change:
    return lambda layout: layout.unsqueeze(axis)


def _selected(axis: int) -> Change:
    return lambda layout: layout.select(axis)


def _same(call: Call) -> Alias:
    return Alias(call.operands[0], (lambda layout: layout,))


def _reshape(call: Call) -> Alias | Spec:
    operand = call.operands[0]
    if call.outputs[0].dtype != operand.info.dtype:
        return no_rule(call)  # view(dtype) looks at the bits.
    shape = call.shape
    return Alias(operand, (lambda layout: layout.reshape(shape),))


def _component(call: Call) -> Alias:
    """``real`` and ``imag``: half of each complex number, at the same position.

    Dynamo keeps no ``x.real`` of an input that is only returned: a view, like ``x.mT``.
    """
    return Alias(call.operands[0], (lambda layout: layout,))


def _view_as_real(call: Call) -> Alias:
    """Both halves of each complex number, in an axis more."""
    return Alias(call.operands[0], (lambda layout: Layout((*layout.axes, (Atom(NO_AXIS, 2, 0),))),))


def _view_as_complex(call: Call) -> Alias:
    """Pairs of numbers, all of the last axis, as one complex number each."""
    return Alias(call.operands[0], (lambda layout: Layout(layout.axes[:-1]),))


def _factory(call: Call) -> Spec:
    """Reads nothing: only the shapes and dtypes of its operands count."""
    return Spec(call.name, ())


def _expand(call: Call) -> Alias:
    shape = call.shape
    return Alias(call.operands[0], (lambda layout: layout.expand(shape),))


def _permute(call: Call) -> Alias:
    operand = call.operands[0]
    dims = [int(dim) for dim in call.args["dims"]]
    return Alias(operand, (lambda layout: layout.permute(dims),))


def _transpose(call: Call) -> Alias:
    operand = call.operands[0]
    dims = list(range(operand.rank))
    if call.name in ("t", "numpy_T"):
        dims.reverse()
    elif dims:  # a scalar has no axes to swap, though torch takes dim 0 and -1 for it
        one, two = call.get("dim0", -1), call.get("dim1", -2)
        dims[one], dims[two] = dims[two], dims[one]
    return Alias(operand, (lambda layout: layout.permute(dims),))


def _movedim(call: Call) -> Alias:
    operand = call.operands[0]

    def axes(name: str) -> list[int]:
        value = call.args[name]
        values = value if isinstance(value, (list, tuple)) else (value,)
        return [int(v) % operand.rank for v in values]

    source, target = axes("source"), axes("destination")
    left = [axis for axis in range(operand.rank) if axis not in source]
    placed = dict(zip(target, source, strict=True))
    dims = [placed[i] if i in placed else left.pop(0) for i in range(operand.rank)]
    return Alias(operand, (lambda layout: layout.permute(dims),))


def _unsqueeze(call: Call) -> Alias:
    return Alias(call.operands[0], (_unsqueezed(int(call.args["dim"])),))


def _squeeze(call: Call) -> Alias:
    dims = call.dims()
    return Alias(call.operands[0], (lambda layout: layout.squeeze(dims),))


def _select(call: Call) -> Alias:
    return Alias(call.operands[0], (_selected(int(call.args["dim"])),))


def _slice(call: Call) -> Alias | Spec:
    """``slice(dim, start, end, step)`` and ``narrow(dim, start, length)``."""
    operand = call.operands[0]
    if isinstance(call.args.get("start"), Operand):
        return no_rule(call)  # where it starts is known when it runs
    dim = int(call.get("dim", 0))
    size, kept = operand.shape[dim], call.shape[dim]
    start = int(call.get("start", 0))
    start = min(max(start + size if start < 0 else start, 0), size)
    step = int(call.get("step", 1))
    return Alias(operand, (_sliced(dim, start, kept, step),))


def _split(call: Call) -> Alias:
    """``chunk``, ``split``, ``tensor_split``: runs of one axis after each other."""
    operand = call.operands[0]
    dim = int(call.get("dim", 0)) % operand.rank
    changes: list[Change] = []
    start = 0
    for output in call.outputs:
        size = output.shape[dim]
        changes.append(_sliced(dim, start, size))
        start += size
    return Alias(operand, tuple(changes))


def _unbind(call: Call) -> Alias:
    change = _selected(int(call.get("dim", 0)))
    return Alias(call.operands[0], (change,) * len(call.outputs))


def _getitem(call: Call) -> Alias | Spec:
    """Basic indexing is a view; an index that is a tensor or a list gathers from that view."""
    operand, index = call.args["input"], call.args["index"]
    parts: Sequence[Any] = index if isinstance(index, tuple) else (index,)
    picks = [type(part) in (int, slice) for part in parts]
    gathers = [is_index(part) for part in parts]
    if not all(
        part is None or part is Ellipsis or picked or gathered
        for part, picked, gathered in zip(parts, picks, gathers, strict=True)
    ):
        return no_rule(Call("index", call.args, call.outputs))
    named = sum(picks) + sum(gathers)
    if Ellipsis not in [
        part for part, gathered in zip(parts, gathers, strict=True) if not gathered
    ]:
        parts, gathers = (*parts, Ellipsis), [*gathers, False]
    steps: list[Change] = []
    taken: dict[int, Any] = {}
    axis, old = 0, 0
    batch = None
    for part, gathered in zip(parts, gathers, strict=True):
        if operand.batch is not None and old <= operand.batch:
            batch = axis + operand.batch - old
        if gathered:
            taken[axis] = part
            axis, old = axis + 1, old + 1
        elif part is None:
            steps.append(_unsqueezed(axis))
            axis += 1
        elif part is Ellipsis:
            axis += operand.rank - named
            old += operand.rank - named
        elif isinstance(part, slice):
            positions = range(operand.shape[old])[part]
            steps.append(_sliced(axis, positions.start, len(positions), positions.step))
            axis, old = axis + 1, old + 1
        else:
            steps.append(_selected(axis))
            old += 1

    def change(layout: Layout) -> Layout:
        for step in steps:
            layout = step(layout)
        return layout

    if not taken:
        return Alias(operand, (change,))
    seen = operand.viewed(change(Layout.of(operand.shape)).shape, change) if steps else operand
    return gather_at(call, seen, taken, batch)


def _sample(function: Callable[..., Any]) -> Sample:
    return Sample(lambda: Run(function), (_MAP,))


def _shuffle(x: torch.Tensor) -> torch.Tensor:
    x = x.relu()
    y = x.view(x.shape[0], 2, 2, 6, 7).transpose(1, 2).contiguous()
    return torch.nn.functional.max_pool2d(y.view(x.shape[0], 4, 6, 7), 3)


RULES: tuple[OpRule, ...] = (
    OpRule(
        "alias",
        (
            "contiguous",
            "clone",
            "detach",
            "alias",
            "lift_fresh",
            "lift_fresh_copy",
            "positive",
            "requires_grad_",
            "cpu",
            "cuda",
            "identity",
            "view_as_real_copy",
            "resolve_conj",
            "resolve_neg",
            "lift",
        ),
        _same,
        Sample(lambda: nn.Sequential(nn.Identity(), Run(lambda x: x.clone().relu())), (_MAP,)),
    ),
    OpRule(
        "reshape",
        ("reshape", "flatten", "reshape_as", "ravel"),
        _reshape,
        _sample(lambda x: x.flatten(2).relu().transpose(1, 2).reshape(-1, 6, 7, 4)),
        ("input", "*shape"),
        view=ViewForm.RESHAPE,
    ),
    OpRule(
        "view",
        ("view", "unflatten", "view_as"),
        _reshape,
        _sample(_shuffle),
        ("input", "*shape"),
        view=ViewForm.RESHAPE,
        by_strides=True,
    ),
    OpRule(
        "component",
        ("real", "imag"),
        _component,
        _sample(lambda x: torch.complex(x, x.relu()).imag.sigmoid()),
        view=ViewForm.COMPONENT,
    ),
    OpRule(
        "view_as_real",
        ("view_as_real",),
        _view_as_real,
        _sample(lambda x: torch.view_as_real(torch.complex(x, x.relu())) + 1),
        view=ViewForm.COMPONENT,
    ),
    OpRule(
        "view_as_complex",
        ("view_as_complex",),
        _view_as_complex,
        Sample(
            lambda: Run(
                lambda x: torch.view_as_complex(x.permute(0, 2, 3, 1).contiguous()).imag * 2
            ),
            ((2, 6, 7),),
        ),
        view=ViewForm.COMPONENT,
        by_strides=True,
    ),
    OpRule(
        "expand",
        ("expand", "expand_as", "broadcast_to"),
        _expand,
        _sample(lambda x: x * x[:, :1].expand(-1, 4, -1, -1)),
        ("input", "*size"),
        view=ViewForm.EXPAND,
    ),
    OpRule(
        "permute",
        ("permute",),
        _permute,
        _sample(lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2) + x),
        ("input", "*dims"),
        view=ViewForm.MOVE,
    ),
    OpRule(
        "transpose",
        ("transpose", "t", "numpy_T", "mT", "mH", "matrix_H", "adjoint"),
        _transpose,
        _sample(lambda x: x.transpose(1, 2).relu() + 1),
        ("input", "dim0", "dim1"),
        view=ViewForm.MOVE,
    ),
    OpRule(
        "movedim",
        ("movedim",),
        _movedim,
        _sample(lambda x: x.movedim(1, -1).softmax(-1).movedim((3, 1), (1, 2))),
        ("input", "source", "destination"),
        view=ViewForm.MOVE,
    ),
    OpRule(
        "unsqueeze",
        ("unsqueeze",),
        _unsqueeze,
        _sample(lambda x: (x.unsqueeze(2) + 1).squeeze(2)),
        ("input", "dim"),
        view=ViewForm.RESHAPE,
    ),
    OpRule(
        "squeeze",
        ("squeeze",),
        _squeeze,
        _sample(lambda x: x.mean((2, 3), True).squeeze(-1).squeeze(2).relu()),
        ("input", "dim"),
        view=ViewForm.RESHAPE,
    ),
    OpRule(
        "select",
        ("select",),
        _select,
        _sample(lambda x: x[:, 1].relu() + x.select(1, 2) * x[:, 0, :1]),
        ("input", "dim", "index"),
        view=ViewForm.SELECT,
    ),
    OpRule(
        "slice",
        ("slice", "narrow"),
        _slice,
        _sample(lambda x: x[:, 1:3, 1:-1, ::2].relu() + x.narrow(2, 2, 4)[:, :2, :, :4]),
        ("input", "dim", "start", "length"),
        view=ViewForm.SLICE,
    ),
    OpRule(
        "split",
        ("chunk", "split", "tensor_split"),
        _split,
        _sample(lambda x: x.chunk(2, 1)[1] + x.split([2, 2], 1)[0] * x.split(3, 2)[1][:, :2, :1]),
        ("input", "sizes", "dim"),
        view=ViewForm.SPLIT,
    ),
    OpRule(
        "unbind",
        ("unbind",),
        _unbind,
        _sample(lambda x: x.unbind(1)[2] * 2),
        ("input", "dim"),
        view=ViewForm.SELECT,
    ),
    OpRule(
        "getitem",
        ("getitem",),
        _getitem,
        _sample(lambda x: x[:, None, ..., 1:, 2:5].tanh()),
        ("input", "index"),
        view=ViewForm.INDEX,
    ),
    OpRule(
        "factory",
        (
            *(f"new_{what}" for what in ("zeros", "ones", "full", "empty", "tensor")),
            *(f"{what}_like" for what in ("zeros", "ones", "full", "empty")),
            *(f"{what}_like" for what in ("rand", "randn", "randint")),
        ),
        _factory,
        _sample(lambda x: x.relu() + torch.full_like(x, 2.0) * x.new_ones(7)),
        ("input",),
        factory=True,
        by_strides=True,
    ),
)
"""Calls that alias their operand, and those that look at its shape only."""

EXTRA_SAMPLES: dict[str, Sample] = {
    "crop, convolution": Sample(
        lambda: nn.Sequential(Run(lambda x: x[:, :, 1::2, 1:]), nn.Conv2d(4, 3, 3, 2, 1)),
        ((4, 13, 12),),
    ),
    "one row": Sample(lambda: Run(lambda x: x[:, :, 2].relu() + x[:, :, -1]), (_MAP,)),
    "crop at the start": Sample(lambda: Run(lambda x: x[:, :, :4, :5] * 2), (_MAP,)),
    "crop, pool": Sample(
        lambda: nn.Sequential(Run(lambda x: x[..., 2:-2, 1:-1]), nn.MaxPool2d(2)), ((3, 12, 12),)
    ),
    "rows into columns": Sample(
        lambda: Run(lambda x: x.view(x.shape[0], 4, 3, 14).relu() + 1), (_MAP,)
    ),
    "tokens and back": Sample(
        lambda: Run(
            lambda x: x.flatten(2).transpose(1, 2).reshape(-1, 6, 7, 4).permute(0, 3, 1, 2).relu()
        ),
        (_MAP,),
    ),
    "map to tokens": Sample(
        lambda: nn.Sequential(Run(lambda x: x.relu().flatten(2).transpose(1, 2)), nn.LayerNorm(4)),
        (_MAP,),
    ),
    "tokens to map": Sample(
        lambda: nn.Sequential(
            nn.Linear(4, 4),
            Run(lambda x: x[:, 1:].transpose(1, 2).reshape(-1, 4, 6, 7)),
            nn.Conv2d(4, 3, 3, 2, 1),
        ),
        ((43, 4),),
    ),
    "tokens as rows": Sample(
        lambda: nn.Sequential(Run(lambda x: x.relu().flatten(2)), nn.Conv1d(4, 3, 3, padding=1)),
        (_MAP,),
    ),
    "tokens pooled": Sample(
        lambda: nn.Sequential(Run(lambda x: x.relu().flatten(2)), nn.AvgPool1d(4, 4)), ((4, 3, 8),)
    ),
    "rows of tokens pooled": Sample(
        lambda: nn.Sequential(Run(lambda x: x.relu().flatten(2)), nn.MaxPool1d(14, 14)), (_MAP,)
    ),
    "blocks into channels": Sample(
        lambda: nn.Sequential(
            Run(
                lambda x: x.view(-1, 4, 3, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(-1, 16, 3, 4)
            ),
            nn.Conv2d(16, 2, 1),
        ),
        ((4, 6, 8),),
    ),
    "channels into blocks": Sample(
        lambda: nn.Sequential(
            Run(
                lambda x: x.view(-1, 1, 2, 2, 6, 7).permute(0, 1, 4, 2, 5, 3).reshape(-1, 1, 12, 14)
            ),
            nn.MaxPool2d(3, 1, 1),
        ),
        (_MAP,),
    ),
    "samples behind tokens": Sample(
        lambda: nn.Sequential(
            Run(lambda x: x.transpose(0, 1)), nn.Linear(4, 4), Run(lambda x: x.tanh())
        ),
        ((6, 4),),
    ),
    "windows": Sample(
        lambda: Run(lambda x: x.view(-1, 4, 3, 2, 7, 1).permute(0, 2, 4, 3, 5, 1).softmax(-1)),
        (_MAP,),
    ),
}
"""Further variants, for the conformance test."""
