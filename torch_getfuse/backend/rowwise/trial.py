"""A trial of a group's rows at compile time: they must give what its FX nodes give.

Row kernels know their operators by rules, and rules have gaps. So each group runs once by rows and
once by its FX nodes, on random values of the traced shapes, strides and types, and a group that
raises or differs is refused with the first operator that does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.fx_nodes.values import flat_tensors, size_hint, traced_value
from torch_getfuse.backend.rowwise.calls import NoRowKernel
from torch_getfuse.backend.rowwise.group import DepthFirstGroup, strides_of
from torch_getfuse.backend.torch_private import tree_leaves, unset_fake_temporarily, was_written

_TOLERANCE = {torch.float64: 1e-9, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference, relative to the largest value, that rounding explains; else 1e-3."""

_FLIPS = 10_000
"""One element in so many may differ more: a threshold or a maximum may turn with the last bit."""


def try_rows(group: DepthFirstGroup, like: Sequence[Any] = ()) -> None:
    """Run a group that has no effects by rows and by its FX nodes, and compare.

    Nothing that exists is written to, and no random numbers are drawn from torch's generator.

    Args:
        group: its ``layouts`` take in how the results of the FX nodes lie in memory.
        like: inputs of a call, whose strides are tried; if empty, those of the trace.

    Raises:
        NoRowKernel: where they differ, where a row cannot be computed, or where the FX nodes do
            not run on random values either.
    """
    with torch.inference_mode(False), torch.no_grad(), unset_fake_temporarily():
        inputs, kept, expected = _reference(group, like)
        given = [_copy(value) for value in inputs]
        try:
            got, _ = group.run_rows(given)
        except Exception as error:
            raise NoRowKernel(str(error)) from error
        if difference := _difference(expected, got):
            raise NoRowKernel(_first_wrong(group, inputs) or f"the group gives {difference}")
        same = [value for value, old in zip(given, kept, strict=True) if old is not None]
        if _memory([*same, got]) != _memory([[old for old in kept if old is not None], expected]):
            raise NoRowKernel("its results share memory with each other or with an input")


def _reference(group: DepthFirstGroup, like: Sequence[Any]) -> tuple[list[Any], list[Any], Any]:
    """Random inputs, these as the FX nodes had them, and the results: if possible, finite numbers.

    ``None`` for an input that was written over, whose memory rows never share.
    """
    layouts: dict[fx.Node, tuple[list[int], list[int]]] = {}

    def note(node: fx.Node, result: torch.Tensor) -> None:
        layouts[node] = list(result.shape), list(result.stride())

    failure: Exception | None = None
    found: tuple[list[Any], list[Any], Any] | None = None
    for inputs in _draws(group, like):
        given = [_copy(value) for value in inputs]
        try:
            expected = _Watched(group, note).run(*given)
        except Exception as error:
            failure = error
            continue
        kept = [
            value if isinstance(value, torch.Tensor) and not was_written(value) else None
            for value in given
        ]
        found = inputs, kept, expected
        if all(_finite(tensor) for tensor in _tensors(expected)):
            break
    if found is None:
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
        raise NoRowKernel(f"it cannot be tried on random values: {reason}") from failure
    group.layouts[strides_of(inputs)] = {
        name: layouts[node] for name, node in group.nodes.items() if node in layouts
    }
    return found


class _Watched(fx.Interpreter):
    """Runs a group's FX nodes, and shows each tensor of the operator graph as it is made."""

    def __init__(
        self, group: DepthFirstGroup, show: Callable[[fx.Node, torch.Tensor], None]
    ) -> None:
        super().__init__(group.child)
        self.watched = set(group.nodes.values())
        self.show = show

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.watched:
            self.show(n, flat_tensors(result)[0])
        return result


def _draws(group: DepthFirstGroup, given: Sequence[Any]) -> Iterator[list[Any]]:
    """Inputs to try, one set after another, the most telling first."""
    first = _inputs(group, given, -1, False)
    yield first
    if any(_is_whole(value) and value.dtype.is_signed for value in _tensors(first)):
        yield _inputs(group, given, 0, False)
    yield _inputs(group, given, 0, True)


def _is_whole(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _inputs(group: DepthFirstGroup, given: Sequence[Any], least: int, positive: bool) -> list[Any]:
    """One value per input of the group.

    Maps are normal, or positive (for roots and logarithms). Weights keep maps of that size: vectors
    are around one, so that they may be variances. Whole numbers are small enough for an index: from
    ``least`` to one, or zero if positive. (With -1 among them a comparison with zero differs.)
    """
    generator = torch.Generator("cpu").manual_seed(0)
    maps = {group.nodes[name] for name in (*group.program.layout.loads, *group.stay.held)}
    found = []
    placeholders = group.child.graph.find_nodes(op="placeholder")
    likes = given or [traced_value(node) for node in placeholders]
    for node, like in zip(placeholders, likes, strict=True):
        if not isinstance(like, torch.Tensor):
            found.append(size_hint(like) if isinstance(like, torch.SymInt) else like)
            continue
        shape = [size_hint(size) for size in like.shape]
        strides = [size_hint(stride) for stride in like.stride()]
        spread = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
        if 0 in shape:
            spread = 0
        flat = torch.empty(spread, dtype=torch.float32, device="cpu")
        if _is_whole(like):
            high = 1 if positive and like.dtype != torch.bool else 2
            low = least if like.dtype.is_signed else 0
            flat = torch.randint(low, high, (spread,), generator=generator, device="cpu")
        elif positive or (node not in maps and len(shape) < 2):
            flat.uniform_(0.5, 1.5, generator=generator)
        else:
            flat.normal_(generator=generator)
            if like.dtype.is_complex:
                imaginary = torch.empty_like(flat).normal_(generator=generator)
                flat = torch.complex(flat, imaginary)
        if node not in maps and len(shape) > 1 and like.dtype.is_floating_point:
            flat /= max(1, like.numel() // max(1, shape[0])) ** (1.0 if positive else 0.5)
        found.append(flat.to(like.dtype).as_strided(shape, strides))
    return found


def _copy(value: Any) -> Any:
    """A tensor of the same strides: in-place operators of the FX nodes write to their inputs."""
    if not isinstance(value, torch.Tensor):
        return value
    flat = value.as_strided((value.untyped_storage().nbytes() // value.itemsize,), (1,)).clone()
    return flat.as_strided(value.shape, value.stride())


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _finite(tensor: torch.Tensor) -> bool:
    if _is_whole(tensor):
        return True
    return bool(torch.isfinite(tensor).all())


def _memory(values: Any) -> list[int]:
    """For each tensor, the first one that lies in the same storage."""
    places = [tensor.untyped_storage().data_ptr() for tensor in _tensors(values)]
    return [places.index(place) if place else k for k, place in enumerate(places)]


def _difference(expected: Any, got: Any) -> str:
    """In what two results differ by more than rounding; empty where they do not."""
    right, ours = _tensors(expected), _tensors(got)
    if len(right) != len(ours):
        return f"{len(ours)} tensors instead of {len(right)}"
    for one, other in zip(right, ours, strict=True):
        found = _apart(one, other)
        if not found and one.stride() != other.stride():
            found = f"strides {other.stride()} instead of {one.stride()}"
        if found:
            return found
    return ""


def _apart(right: torch.Tensor, ours: torch.Tensor) -> str:
    if right.shape != ours.shape or right.dtype != ours.dtype:
        return f"{tuple(ours.shape)} {ours.dtype} instead of {tuple(right.shape)} {right.dtype}"
    if not right.numel():
        return ""
    if _is_whole(right):
        wrong = int((right != ours).sum())
        return f"{wrong} other values" if wrong > right.numel() // _FLIPS else ""
    exact = torch.complex128 if right.is_complex() else torch.float64
    wide, other = right.to(exact), ours.to(exact)
    sizes = wide.abs().nan_to_num(nan=0.0, posinf=0.0)
    scale = float(sizes.max())
    gap = (wide - other).abs()
    alike = (wide == other) | (wide.isnan() & other.isnan())
    far = ~alike & ~(gap <= _TOLERANCE.get(right.dtype, 1e-3) * scale)
    if int(far.sum()) <= right.numel() // _FLIPS:
        return ""
    return f"values that differ by up to {float(gap[far].max()):.3g}, of {scale:.3g} at most"


def _first_wrong(group: DepthFirstGroup, inputs: Sequence[Any]) -> str:
    """The first operator, in the order of the schedule, whose rows are not its FX nodes'."""
    right: dict[fx.Node, torch.Tensor] = {}

    def keep(node: fx.Node, result: torch.Tensor) -> None:
        right[node] = result.clone()

    _Watched(group, keep).run(*map(_copy, inputs))
    rows: dict[str, dict[tuple[int, int], torch.Tensor]] = {}

    def tap(name: str, sample: int, unit: int, block: torch.Tensor) -> None:
        rows.setdefault(name, {})[sample, unit] = block.clone()

    group.run_rows([_copy(value) for value in inputs], tap)
    for op in group.ops:
        found = _wrong_rows(group, op.writes, right[group.nodes[op.writes]], rows.get(op.writes))
        if found:
            return f"{op.name} ({op.kind}) by rows gives {found}"
    return ""


def _wrong_rows(
    group: DepthFirstGroup,
    name: str,
    right: torch.Tensor,
    rows: dict[tuple[int, int], torch.Tensor] | None,
) -> str:
    """In what the rows of a tensor that were computed differ."""
    tensor = group.tensors[name]
    for (sample, unit), block in (rows or {}).items():
        part = right
        if group.samples > 1:
            part = right.narrow(0, sample * tensor.shape[0], tensor.shape[0])
        if tensor.stream_axis is not None:
            part = part.narrow(tensor.stream_axis, unit, 1)
        if found := _apart(part, block):
            return f"{found}, in row {unit}"
    return ""
