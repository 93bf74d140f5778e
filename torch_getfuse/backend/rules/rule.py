"""The records in which operator rules speak: what goes into a rule, and what comes out."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from torch_getfuse.backend.rules.view_windows import Access, All, Along, Layout


@dataclass(frozen=True)
class TensorInfo:
    """Shape (with the batch, symbolic sizes as their hints) and dtype of a traced tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Stored:
    """How much of something there is: elements, and bytes at their own widths."""

    elements: int = 0
    bytes: int = 0

    def __add__(self, other: Stored) -> Stored:
        return Stored(self.elements + other.elements, self.bytes + other.bytes)

    def __sub__(self, other: Stored) -> Stored:
        return Stored(self.elements - other.elements, self.bytes - other.bytes)

    @classmethod
    def sum(cls, parts: Iterable[Stored]) -> Stored:
        return functools.reduce(operator.add, parts, cls())


NOTHING = Stored()


@dataclass(frozen=True)
class Operand:
    """A tensor argument of a call.

    Attributes:
        node: the FX node that gives it.
        info: its shape and dtype.
        weight: a parameter, a buffer, a constant, or something computed from these alone.
        stored: the parameters and buffers behind a weight; nothing for an activation.
        batch: the axis of the operand that the batch is in, if that is known.
        value: capture's own record of the tensor; rules do not look at it.
    """

    node: fx.Node
    info: TensorInfo
    weight: bool = False
    stored: Stored = NOTHING
    batch: int | None = None
    value: Any = field(default=None, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def rank(self) -> int:
        return len(self.info.shape)


@dataclass(frozen=True)
class Call:
    """An invocation whose tensors are :class:`Operand` and whose symbolic sizes are hints."""

    name: str
    args: Mapping[str, Any]
    outputs: tuple[TensorInfo, ...]
    overload: bool = False
    hidden: str = ""
    """Class of an argument that holds tensors which a trace does not show (packed weights)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return self.outputs[0].shape

    @property
    def rank(self) -> int:
        return len(self.outputs[0].shape)

    @property
    def operands(self) -> list[Operand]:
        """All tensor arguments in order."""
        return operands_in(tuple(self.args.values()))

    @property
    def activations(self) -> list[Operand]:
        """The tensor arguments that are feature maps."""
        return [operand for operand in self.operands if not operand.weight]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument; ``default`` where it is absent or ``None``."""
        value = self.args.get(name)
        return default if value is None else value

    def dims(self, name: str = "dim") -> tuple[int, ...]:
        """An argument of axes, as non-negative axes of ``input``; all axes where absent.

        A scalar has none, though torch lets ``dim=0`` and ``dim=-1`` through for it.
        """
        rank = self.args["input"].rank
        value = self.args.get(name)
        if rank == 0 or value is None or (isinstance(value, (list, tuple)) and not value):
            return tuple(range(rank))
        axes = value if isinstance(value, (list, tuple)) else (value,)
        return tuple(int(axis) % rank for axis in axes)


def operands_in(value: Any) -> list[Operand]:
    """The tensors in an argument, in order."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        return [operand for item in value for operand in operands_in(item)]
    return [value] if isinstance(value, Operand) else []


@dataclass(frozen=True)
class Reading:
    """How one operand is read: one access per axis, or ``None`` for all of it, held."""

    operand: Operand
    accesses: tuple[Access, ...] | None


@dataclass(frozen=True)
class Spec:
    """What a rule says about an operator.

    Attributes:
        kind: the name that people use.
        reads: feature-map operands.
        in_place: elementwise; capture still checks that it is unary and keeps shape and dtype.
        mixes_channels, groups: as in :class:`torch_getfuse.ir.Op`.
        weights: ``None`` for all weights among the arguments.
        bias: the bias, of an operator that can take up a batch norm.
        stream_axis: axis of the output whose positions are rows; ``None`` to follow an operand.
        reason: why the windows are wider than the operator's own.
    """

    kind: str
    reads: tuple[Reading, ...]
    in_place: bool = False
    mixes_channels: bool = False
    groups: int = 1
    weights: Stored | None = None
    bias: Stored | None = None
    stream_axis: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Alias:
    """The outputs of a call as views of one operand, one layout change per output."""

    operand: Operand
    changes: tuple[Callable[[Layout], Layout], ...]


RuleFunction = Callable[[Call], Spec | Alias]


@dataclass(frozen=True)
class Sample:
    """A module that runs the operator, and the per-sample shapes of its inputs."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class OpRule:
    """One operator kind.

    Attributes:
        kind: the name in ``Op.kind``.
        targets: plain ATen names that it answers to (see ``normalise``).
        rule: from a call to its windows.
        sample: for the conformance test.
        params: names of positional arguments of builtins and methods.
    """

    kind: str
    targets: tuple[str, ...]
    rule: RuleFunction
    sample: Sample
    params: tuple[str, ...] = field(default=("input", "other"))


class Run(nn.Module):
    """A module out of a function, for samples; ``weights`` are given to it as parameters."""

    def __init__(self, function: Callable[..., Any], *weights: Sequence[int]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([torch.rand(tuple(shape)) + 0.5 for shape in weights])

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs, *self.weights)


def pointwise_accesses(operand: Operand, rank: int) -> tuple[Access, ...]:
    """Of an operand that is broadcast to an output of ``rank`` axes."""
    shift = rank - operand.rank
    return tuple(Along(axis + shift) for axis in range(operand.rank))


def whole(call: Call, kind: str, reason: str = "", *, mixes: bool = False) -> Spec:
    """Reads all of its operands and holds them."""
    reads = tuple(Reading(operand, None) for operand in call.activations)
    return Spec(kind, reads, mixes_channels=mixes, reason=reason)


def no_rule(call: Call) -> Spec:
    """The answer for an operator that nobody has described."""
    reason = f"no rule for {call.name}: it reads its whole inputs"
    if call.hidden:
        reason += f"; the weights in its {call.hidden} cannot be seen, and are not counted"
    return whole(call, call.name, reason)


def held_axes(call: Call, kind: str, held: Sequence[int], *, in_place: bool = False) -> Spec:
    """Output of the input's shape; along ``held`` axes each position needs all of the input's."""
    operand: Operand = call.args["input"]
    accesses: list[Access] = [Along(axis) for axis in range(operand.rank)]
    for axis in held:
        accesses[axis] = All()
    reads = () if operand.weight else (Reading(operand, tuple(accesses)),)
    others = tuple(Reading(o, None) for o in call.activations if o is not operand)
    return Spec(kind, reads + others, in_place=in_place)


def spread(value: Any, count: int) -> tuple[int, ...]:
    """``3`` or ``(3,)`` or ``(3, 5)`` as ``count`` integers."""
    if isinstance(value, (list, tuple)):
        values = tuple(int(item) for item in value)
        return values * count if len(values) == 1 else values
    return (int(value),) * count
