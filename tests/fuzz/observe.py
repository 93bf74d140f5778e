"""What can be seen of a call: results, what it left in inputs and module, memory in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_TOLERANCE = {
    torch.float16: 1e-2,
    torch.complex32: 1e-2,
    torch.bfloat16: 5e-2,
    torch.float64: 1e-7,
}
"""Of values computed in another order, relative to the largest; else 1e-4."""

ROUNDINGS = range(6)
"""Neighbours of the inputs and weights that eager is run at, to learn what rounding can do."""

_SUMS = frozenset(
    {
        *("mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot", "linear", "convolution"),
        *("sum", "mean", "prod", "var", "std", "norm", "linalg_vector_norm", "cumsum"),
        *("avg_pool2d", "_adaptive_avg_pool2d", "native_layer_norm", "native_group_norm"),
        *("_softmax", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"),
        "upsample_bicubic2d",
    }
)
"""Operators that add up, by their ATen names."""


@dataclass(frozen=True)
class Observation:
    """A call, as its caller sees it.

    Attributes:
        tensors: copies by name: results, then inputs and the module's state afterwards.
        layout: of each tensor its shape, dtype and strides.
        rest: results that are no tensors, and the structure of all.
        shared: for each result, the first tensor whose memory it lies in, and how far from there.
        generator: the state of the random-number generator afterwards.
    """

    tensors: dict[str, Tensor]
    layout: dict[str, tuple[Any, ...]]
    rest: tuple[Any, ...]
    shared: dict[str, tuple[str, int]]
    generator: Tensor


def observe(
    call: Callable[..., Any], model: nn.Module, inputs: Sequence[Any], seed: int = 0
) -> Observation:
    """Call ``call``, which runs ``model``, and look at everything that it may have changed."""
    torch.manual_seed(seed)
    results = call(*inputs)
    generator = torch.get_rng_state()
    leaves, structure = pytree.tree_flatten(results)
    live: dict[str, Tensor] = {
        f"input {i}": value for i, value in enumerate(inputs) if isinstance(value, Tensor)
    }
    live.update((name, value.detach()) for name, value in model.named_parameters())
    live.update(model.named_buffers())
    live.update((f"result {i}", v) for i, v in enumerate(leaves) if isinstance(v, Tensor))
    shared: dict[str, tuple[str, int]] = {}
    first: dict[int, str] = {}
    for name, value in live.items():
        where = value.untyped_storage().data_ptr()
        owner = first.setdefault(where, name) if where else name
        if name.startswith("result"):
            shared[name] = owner, _start(value) - _start(live[owner])
    return Observation(
        {name: value.detach().clone() for name, value in live.items()},
        {name: (tuple(v.shape), v.dtype, v.stride()) for name, v in live.items()},
        (structure, *(v for v in leaves if not isinstance(v, Tensor))),
        shared,
        generator,
    )


def _start(value: Tensor) -> int:
    """Where a tensor begins in its memory, in bytes."""
    return value.storage_offset() * value.element_size()


def difference(
    right: Observation, ours: Observation, *, exact: bool, unsure: Callable[[], Any] | None = None
) -> str:
    """Where a call differs from eager's; empty where it does not.

    Args:
        exact: whether values must be equal to the last bit.
        unsure: gives observations of eager at neighbours of the inputs; asked only where values
            differ by more than the tolerance, for a comparison may have turned with the last bit.
    """
    if right.rest != ours.rest:
        return f"structure: {ours.rest} instead of {right.rest}"
    for name, layout in right.layout.items():
        found = ours.layout.get(name)
        if found is None or found[:2] != layout[:2]:
            return f"shape or dtype ({name}): {found} instead of {layout}"
    far = [name for name, value in right.tensors.items() if _far(value, ours.tensors[name], exact)]
    if far and unsure is not None:
        near = list(unsure())
        far = [name for name in far if not _within(right, ours, name, near)]
    if far:
        name = far[0]
        return f"values ({name}): {_first(ours.tensors[name], right.tensors[name])}"
    if right.shared != ours.shared:
        return f"memory in common: {ours.shared} instead of {right.shared}"
    for name, layout in right.layout.items():
        if right.tensors[name].numel() and ours.layout[name] != layout:
            return f"strides ({name}): {ours.layout[name][2]} instead of {layout[2]}"
    if not torch.equal(right.generator, ours.generator):
        return "random: the generator is left in another state"
    return ""


def _far(a: Tensor, b: Tensor, exact: bool) -> bool:
    limit = _TOLERANCE.get(a.dtype, 1e-4)
    a, b = _parts(a), _parts(b)
    if not a.is_floating_point():
        return not torch.equal(a, b)
    if exact:
        return not torch.equal(a.isnan(), b.isnan()) or not torch.equal(
            a.nan_to_num(), b.nan_to_num()
        )
    finite = a[a.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return not torch.allclose(a, b, rtol=limit, atol=limit * scale + 1e-6, equal_nan=True)


def _parts(a: Tensor) -> Tensor:
    """Real and imaginary parts: of complex numbers of halves torch computes next to nothing."""
    return torch.view_as_real(a.resolve_conj()) if a.is_complex() else a


def _within(right: Observation, ours: Observation, name: str, near: Sequence[Observation]) -> bool:
    """Whether eager's own neighbours are as far from it as we are, element by element."""
    a, b = (o.tensors[name] for o in (right, ours))
    apart = [_distance(a, other.tensors[name]) for other in near]
    if not apart:
        return False
    most = torch.stack(apart).amax(0)
    # One that turned in any neighbour may have turned in ours; a rounding may be spread anywhere.
    return bool((_distance(a, b) <= 10 * most + 10 * most.mean()).all())


def _distance(a: Tensor, b: Tensor) -> Tensor:
    a, b = _parts(a), _parts(b)
    gone = (a.double() - b.double()).abs()
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, gone.nan_to_num(1e300, 1e300))


def _first(ours: Tensor, right: Tensor) -> str:
    """The first elements that differ most."""
    apart = _distance(right, ours).flatten()
    if ours.is_complex():
        apart = apart.view(-1, 2).amax(-1)
    at = int(apart.argmax())
    count = int((apart > 0).sum())
    a, b = ours.flatten()[at], right.flatten()[at]
    return f"{a.item()} instead of {b.item()} at {at}, {count} of {len(apart)} differ"


def nudged(
    build: Callable[[], nn.Module], inputs: Callable[[], tuple[Any, ...]], way: int
) -> tuple[nn.Module, tuple[Any, ...]]:
    """Module and inputs with every floating-point number off by about a rounding, in place."""
    generator = torch.Generator().manual_seed(way)
    model, given = build(), inputs()
    seen: set[int] = set()
    for value in (*given, *model.parameters(), *model.buffers()):
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            _nudge(value, generator)
    return model, given


class NudgedSums(TorchDispatchMode):
    """Puts what is added up off by about a rounding, each sum for itself.

    Sums of the same numbers are equal in one kernel, whatever the numbers, and need not be in
    another, that takes them by rows: which of them a sort puts first says nothing.
    """

    def __init__(self, way: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(way)

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, function, types, args=(), kwargs=None
    ):
        results = function(*args, **kwargs or {})
        if function.overloadpacket.__name__ in _SUMS:
            for value in pytree.tree_leaves(results):
                _nudge(value, self.generator)
        return results


def _nudge(value: object, generator: torch.Generator) -> None:
    """Put a tensor of floating-point numbers off by about a rounding, in place."""
    if isinstance(value, Tensor) and value.is_floating_point():
        size = 4 * torch.finfo(value.dtype).eps
        off = 2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 1
        if value.numel() and 0 not in value.stride():
            value.data.copy_(value.double() * (1 + size * off))
