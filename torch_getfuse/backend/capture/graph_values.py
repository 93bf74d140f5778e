"""What capture knows of tensors and operators before they have names."""

from __future__ import annotations

import enum
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.fx_nodes.values import traced_value
from torch_getfuse.backend.rules.rule import Spec, Stored, TensorInfo
from torch_getfuse.backend.rules.view_windows import Layout
from torch_getfuse.ir import Tensor, Window, WindowKind


class Role(enum.Enum):
    """What a placeholder is to the operator graph."""

    INPUT = "input"
    WEIGHT = "weight"
    CONSTANT = "constant"
    NEITHER = "neither"


@dataclass(frozen=True)
class Feature:
    """A feature map, or a view of one: a base tensor and the layout over it."""

    base: int
    layout: Layout


@dataclass(frozen=True)
class Weight:
    """A parameter, a buffer, a constant, or something computed from these alone.

    Attributes:
        parts: each parameter and buffer behind it, as it is stored; a constant that the program
            makes itself has none.
        root: whose storage it is, for writes through a view: a node, and which of its tensors.
        info: of the root.
        layout: of this view over the root.
    """

    parts: Mapping[fx.Node, Stored]
    root: tuple[fx.Node, int]
    info: TensorInfo
    layout: Layout

    @classmethod
    def of(
        cls, node: fx.Node, info: TensorInfo, parts: Mapping[fx.Node, Stored], place: int = 0
    ) -> Weight:
        """A tensor of a node's own."""
        return cls(parts, (node, place), info, Layout.of(info.shape))

    def view(
        self,
        change: Callable[[Layout], Layout],
        parts: Mapping[fx.Node, Stored],
        shape: Sequence[int],
    ) -> Weight:
        """A view of it, which has ``shape``."""
        layout = Layout.opaque(shape) if 0 in self.layout.shape else change(self.layout)
        return replace(self, parts=parts, layout=layout)


Value = Feature | Weight | tuple["Value | None", ...]


@dataclass(frozen=True)
class View:
    """What an FX node shows of a tensor of the operator graph.

    Attributes:
        tensor: its name in the operator graph.
        layout: the node's axes over those of the tensor (the batch is in both).
        batch: the node's axis that the batch is in, if that is known.
    """

    tensor: str
    layout: Layout
    batch: int | None


@dataclass(frozen=True)
class CoreCall:
    """The call that computes an operator (or the batch norm folded into one), and its operands.

    Attributes:
        node: the call.
        operands: its feature maps in order: the argument, and what it shows at that moment. A
            folded batch norm reads the tensor of its own operator.
    """

    node: fx.Node
    operands: tuple[tuple[fx.Node, View], ...]


@dataclass(frozen=True)
class Base:
    """A tensor of the operator graph before it has a name.

    Attributes:
        info: traced shape, with the batch, and dtype.
        batch: axis that the batch is in, and the product of the sizes inside of it there.
        tensor: the per-sample tensor, still without its name.
        op: position of the operator that writes it; ``None`` for a graph input.
    """

    info: TensorInfo
    batch: tuple[int, int] | None
    tensor: Tensor
    op: int | None


@dataclass
class Draft:
    """An operator whose tensors are bases; :mod:`capture` prunes, folds and names them.

    Its windows are whole until :mod:`streams` has found them.
    """

    kind: str
    target: str
    module: str
    reads: list[tuple[int, Window]]
    writes: int
    nodes: list[fx.Node]
    spec: Spec
    weights: Stored
    in_place: bool
    reason: str
    direct: bool = False
    """Reads one tensor, and that itself rather than a view of it."""
    joint: bool = False
    """Writes several tensors, which are one of all their elements."""
    calls: list[tuple[fx.Node, list[tuple[fx.Node, Feature]]]] = field(default_factory=list)
    """The call, and that of a folded batch norm, each with its feature maps."""
    dequantizes: list[fx.Node] = field(default_factory=list)
    """What lies between the integers that it reads and the call: dequantizes, and their views."""
    macs: int | None = 0
    """Multiply-accumulates per sample; ``None`` where not known."""


def only_pick(node: fx.Node) -> int | None:
    """Which of several results is the only one that is used; ``None`` where it is not one.

    ``torch.export`` records maximum pooling with its indices where Dynamo records it without.
    """
    picks: set[Any] = set()
    for user in node.users:
        if user.target is not operator.getitem:
            return None
        if user.users:
            picks.add(user.args[1])
    only = picks.pop() if len(picks) == 1 else None
    if not isinstance(only, int) or only < 0:
        return None
    return only if isinstance(traced_value(node)[only], torch.Tensor) else None


def covers(layout: Layout, shape: Sequence[int]) -> bool:
    """True where a view shows every element of its base."""
    atoms = [atom for axis in layout.axes for atom in axis if atom.size > 1]
    return all(atom.axis >= 0 and atom.start == 0 for atom in atoms) and math.prod(
        layout.shape
    ) == math.prod(shape)


def fits(window: Window, source: Tensor, target: Tensor) -> bool:
    """True where a window implies the sizes that torch gave, as ``OpGraph.verify`` demands."""
    for axis in (0, 1):
        size_in, size_out = source.extent(axis), target.extent(axis)
        implied = window.output_size(axis, size_in)
        if implied is not None and implied != size_out:
            return False
        if window.kind is WindowKind.IDENTITY and size_in not in (1, size_out):
            return False
    return True


def mirrored(traced: Any, parts: Sequence[Value | None]) -> Value:
    """``parts``, one per tensor of a result, in the result's own (perhaps nested) structure."""
    left = iter(parts)

    def place(item: Any) -> Value | None:
        if isinstance(item, torch.Tensor):
            return next(left)
        return tuple(map(place, item)) if isinstance(item, (list, tuple)) else None

    found = place(traced)
    assert found is not None, "a call with tensor results has one"
    return found
