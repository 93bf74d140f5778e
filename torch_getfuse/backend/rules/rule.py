"""The records in which operator rules speak: what goes into a rule, and what comes out."""

from __future__ import annotations

import enum
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

    def viewed(
        self, shape: tuple[int, ...], change: Callable[[Layout], Layout] | None = None
    ) -> Operand:
        """The operand seen through a view of ``shape``, a reshape unless ``change`` is given.

        For rules that say how an operator reads in the axes of that view.
        """
        if self.weight:
            return replace(self, info=TensorInfo(shape, self.info.dtype))
        layout = self.value.layout
        layout = layout.reshape(shape) if change is None else change(layout)
        return replace(
            self,
            info=TensorInfo(shape, self.info.dtype),
            value=replace(self.value, layout=layout),
        )


@dataclass(frozen=True)
class Call:
    """An invocation whose tensors are :class:`Operand` and whose symbolic sizes are hints."""

    name: str
    args: Mapping[str, Any]
    outputs: tuple[TensorInfo, ...]
    overload: bool = False
    hidden: str = ""
    """Class of an argument that holds tensors which a trace does not show (packed weights)."""
    picked: int = 0
    """Which of several results ``outputs`` holds, where only one is used."""

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
class StoredAs:
    """The tensor that an operator writes, where that is not its one result as torch shapes it.

    Attributes:
        shape: traced, with the batch; as many elements as the results have together.
        views: how each result shows it.
    """

    shape: tuple[int, ...]
    views: tuple[Callable[[Layout], Layout], ...]


@dataclass(frozen=True)
class Spec:
    """What a rule says about an operator.

    Attributes:
        kind: the name that people use.
        reads: feature-map operands.
        in_place: elementwise; capture still checks that it is unary and keeps shape and dtype.
        mixes_channels, groups, channel_axis: as in :class:`torch_getfuse.ir.Op`.
        weights: ``None`` for all weights among the arguments.
        bias: the bias, of an operator that can take up a batch norm.
        stream_axis: axis of the output whose positions are rows: of a map of rank 4, and of any
            other output where they do not follow an operand's.
        reason: why the windows are wider than the operator's own.
        reason_if_whole: the same, where an operand's rows lie along an axis that is held whole.
        stored_as: the tensor that it writes, if that is not its one result.
        recurrent: as in :class:`torch_getfuse.ir.Op`.
        macs: multiply-accumulates of the call, all samples together; ``None`` where not known.
    """

    kind: str
    reads: tuple[Reading, ...]
    in_place: bool = False
    mixes_channels: bool = False
    groups: int = 1
    channel_axis: int | None = None
    weights: Stored | None = None
    bias: Stored | None = None
    stream_axis: int | None = None
    reason: str = ""
    reason_if_whole: str = ""
    stored_as: StoredAs | None = None
    recurrent: bool = False
    macs: int | None = 0


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


class ViewForm(enum.Enum):
    """How a view shows its operand, for whoever puts a part of the operand through it."""

    RESHAPE = "the same elements in another shape"
    EXPAND = "broadcast to a larger shape"
    MOVE = "the axes in another order"
    COMPONENT = "numbers for complex ones, or the reverse"
    SLICE = "a run of positions of one axis"
    SPLIT = "all positions of one axis, in several runs"
    SELECT = "one position of an axis, or each of them on its own"
    INDEX = "by numbers, slices, new axes and an ellipsis"


@dataclass(frozen=True)
class OpRule:
    """One operator kind: how it reads (``rule``), and facts that no window says.

    A fact holds for all ``targets``; targets that differ in one have rules of their own.

    Attributes:
        kind: the name in ``Op.kind``.
        targets: plain ATen names that it answers to (see ``normalise``).
        rule: from a call to its windows.
        sample: for the conformance test; ``None`` of an operator that is not torch's own.
        params: names of positional arguments of builtins and methods.
        like: the operator of torch that it reads like, if it is not torch's own.
        elementwise: an output position needs the position of the same number of each operand,
            whatever the arguments; operands, weights too, are broadcast to each other.
        aligns: not elementwise, or not for all arguments, but operands, weights too, are aligned
            at their last axes all the same (``cat``, ``max`` of two tensors).
        product: sums products of operands over one of their axes, which may be that of samples.
        batched: a product that treats each index of the axes before the last two on its own, with
            the operands aligned at their last axes.
        weights: names of the arguments that are weights, whoever gives them.
        view: how it shows its operand, if it is a view that changes the layout.
        factory: its values depend on the shapes and dtypes of its operands only.
        by_strides: its result, how exact that is, or its right to run depends on the strides of its
            operands.
        recurrent: carries a state from row to row, by which a row depends on all rows before.
    """

    kind: str
    targets: tuple[str, ...]
    rule: RuleFunction
    sample: Sample | None
    params: tuple[str, ...] = ("input", "other")
    like: str = ""
    elementwise: bool = False
    aligns: bool = False
    product: bool = False
    batched: bool = False
    weights: tuple[str, ...] = ()
    view: ViewForm | None = None
    factory: bool = False
    by_strides: bool = False
    recurrent: bool = False

    @property
    def broadcasts(self) -> bool:
        """Whether operands, weights too, are aligned at the last axes of the output."""
        return self.elementwise or self.aligns

    def named(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by the names in ``params``.

        An operator that is like one of torch may have other names for them, in the same order.
        """
        if not self.like:
            return dict(args)
        names = iter([name for name in self.params if name not in args])
        return {
            name if name in self.params else next(names, name): value
            for name, value in args.items()
        }

    @property
    def is_torchs(self) -> bool:
        """Whether it is of an operator of torch, of which more is known than how it reads."""
        return self.sample is not None


class Run(nn.Module):
    """A module out of a function, for samples; ``weights`` are given to it as parameters."""

    def __init__(self, function: Callable[..., Any], *weights: Sequence[int]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([torch.rand(tuple(shape)) + 0.5 for shape in weights])

    def forward(self, *inputs: torch.Tensor) -> Any:
        # By index: Dynamo of torch 2.9 and 2.11 fails to unpack a ParameterList.
        weights = [self.weights[k] for k in range(len(self.weights))]
        return self.function(*inputs, *weights)


def pointwise_accesses(operand: Operand, rank: int) -> tuple[Access, ...]:
    """Of an operand that is broadcast to an output of ``rank`` axes."""
    shift = rank - operand.rank
    return tuple(Along(axis + shift) for axis in range(operand.rank))


MIXES_SAMPLES, FLATTENED = "mixes its samples", "the flattened tensor"
"""How a reason ends where a sample's output needs other samples of the batch."""


def whole(
    call: Call, kind: str, reason: str = "", *, mixes: bool = False, macs: int | None = 0
) -> Spec:
    """Reads all of its operands and holds them."""
    reads = tuple(Reading(operand, None) for operand in call.activations)
    return Spec(kind, reads, mixes_channels=mixes, reason=reason, macs=macs)


def no_rule(call: Call) -> Spec:
    """The answer for an operator that nobody has described."""
    reason = f"no rule for {call.name}: it reads its whole inputs"
    if call.hidden:
        reason += f"; the weights in its {call.hidden} cannot be seen, and are not counted"
    return whole(call, call.name, reason, macs=None)


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
