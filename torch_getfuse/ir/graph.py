"""The operator graph: tensors, the windows through which operators read them, operators.

No torch here. Everything the cost models, searches and reports know about a model
is in these frozen records. An operator is described by *how it reads* (its windows), never
by its name: fusion code does not look at ``Op.kind``.

Sizes are per sample: the batch axis has been divided out at capture, so a shape's first
entry is 1 for an ordinary model (docs/method.md, section 1).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch_getfuse.errors import GraphError
from torch_getfuse.ir.window import Window, WindowKind
from torch_getfuse.json_fields import MOST, MOST_POSITIONS, Fields, as_integer, as_text

MOST_OPERATORS = 20_000
"""Most operators that a plan file may have; sets of operators are bit masks of that length."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A feature map, as the raster stream of units that crosses the on-chip buffer.

    Attributes:
        name: unique in its graph.
        shape: elements per axis, batch first and divided out (``(1, C, H, W)``).
        stream_axis: the axis whose positions are the rows of the stream; ``None`` for a
            tensor that is one unit. A tensor of rank 4 streams over axis 2 by default.
    """

    name: str
    shape: tuple[int, ...]
    stream_axis: int | None = None

    @staticmethod
    def default_axis(shape: Sequence[int]) -> int | None:
        """Axis 2 for ``(1, C, H, W)``; anything else is one unit unless capture knows better."""
        return 2 if len(shape) == 4 and shape[0] == 1 else None

    @classmethod
    def of(cls, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor with the default stream axis of its shape."""
        return cls(name, tuple(shape), cls.default_axis(shape))

    @property
    def elements(self) -> int:
        """Elements per sample."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Units at ``line`` granularity."""
        return 1 if self.stream_axis is None else self.shape[self.stream_axis]

    @property
    def cols(self) -> int:
        """Units of one row at ``pixel`` granularity: the axis after the rows, of a rank-4 map."""
        if self.stream_axis is None or len(self.shape) != 4:
            return 1
        return self.shape[self.stream_axis + 1]

    def extent(self, axis: int) -> int:
        """Rows (axis 0) or columns (axis 1)."""
        return self.cols if axis else self.rows


@dataclass(frozen=True, slots=True)
class Read:
    """One operand: a tensor and the window through which it is read."""

    tensor: str
    window: Window


@dataclass(frozen=True, slots=True)
class Op:
    """One operator (after folding batch norm and dropping aliases).

    Attributes:
        name: unique, readable and stable: module path plus kind.
        kind: what people call it ("conv2d"); for reports only, never looked at by cost code.
        module: path of the module it came from, ``""`` at the top.
        reads: feature-map operands in order; weights are not among them.
        writes: the tensor it produces.
        weight_elements: elements of weights, biases and whatever else of the model it reads.
        weight_bytes: their bytes as the model stores them, in all; ``None`` where that is not
            known. No part of the graph's identity: one plan fits a model in every width.
        in_place: a unary elementwise operator, which may write over its input.
        mixes_channels: every output channel may need every input channel (convolution,
            linear, matmul); ``False`` for the "local" operators of BRR (docs/method.md, section 4).
        groups: channel groups of a convolution.
        reason: why there is no better rule for it; empty for operators that have one.
        after: names of operators that must run before it although it reads nothing of theirs:
            both draw random numbers, or one writes where the other reads. Only what does not
            follow from the other edges of the graph.
    """

    name: str
    kind: str
    reads: tuple[Read, ...]
    writes: str
    module: str = ""
    weight_elements: int = 0
    in_place: bool = False
    mixes_channels: bool = False
    groups: int = 1
    reason: str = ""
    after: tuple[str, ...] = ()
    weight_bytes: int | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The form of plan.json; keys that hold their default and are optional are left out."""
        form: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "module": self.module,
            "reads": [{"tensor": r.tensor, "window": r.window.to_json()} for r in self.reads],
            "writes": self.writes,
            "weight_elements": self.weight_elements,
            "in_place": self.in_place,
        }
        if self.weight_bytes is not None:
            form["weight_bytes"] = self.weight_bytes
        if self.mixes_channels:
            form["mixes_channels"] = True
        if self.groups != 1:
            form["groups"] = self.groups
        if self.reason:
            form["reason"] = self.reason
        if self.after:
            form["after"] = list(self.after)
        return form

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> Op:
        """The inverse of :meth:`to_dict`; raises :class:`GraphError` for anything else."""
        name = form.get("name") if isinstance(form, Mapping) else None
        fields = Fields.of(form, f"operator {ascii(name)[:60]}")
        return cls(
            name=fields.text("name"),
            kind=fields.text("kind"),
            reads=tuple(
                Read(read.text("tensor"), Window.from_json(read.value("window")))
                for read in fields.objects("reads")
            ),
            writes=fields.text("writes"),
            module=fields.text("module") if "module" in fields else "",
            weight_elements=fields.integer("weight_elements"),
            in_place=fields.flag("in_place"),
            mixes_channels="mixes_channels" in fields and fields.flag("mixes_channels"),
            groups=fields.integer("groups", 1) if "groups" in fields else 1,
            reason=fields.text("reason") if "reason" in fields else "",
            after=fields.texts("after") if "after" in fields else (),
            weight_bytes=fields.integer("weight_bytes") if "weight_bytes" in fields else None,
        )


@dataclass(frozen=True)
class OpGraph:
    """A DAG of operators in topological order; verified on construction.

    Attributes:
        inputs: names of the tensors that come from outside the model.
        outputs: names of the tensors that the model returns.
        ops: operators, each after all producers of what it reads.
        tensors: every tensor by name.
        activation_bytes: traced element width, the default of the option.
        weight_bytes: element width of the weights of operators that do not state their bytes.

    Raises:
        GraphError: where a rule of :meth:`verify` is broken.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: tuple[Op, ...]
    tensors: Mapping[str, Tensor]
    activation_bytes: int = field(default=4, compare=False)
    weight_bytes: int = field(default=4, compare=False)

    def __post_init__(self) -> None:
        self.verify()

    def __len__(self) -> int:
        return len(self.ops)

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    @cached_property
    def index(self) -> dict[str, int]:
        """Operator name -> position."""
        return {op.name: i for i, op in enumerate(self.ops)}

    @cached_property
    def producer(self) -> dict[str, int]:
        """Tensor name -> position of the operator that writes it; graph inputs are absent."""
        return {op.writes: i for i, op in enumerate(self.ops)}

    @cached_property
    def consumers(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> positions of the operators that read it, each once, in order."""
        found: dict[str, list[int]] = {name: [] for name in self.tensors}
        for i, op in enumerate(self.ops):
            for tensor in dict.fromkeys(r.tensor for r in op.reads):
                found[tensor].append(i)
        return {name: tuple(readers) for name, readers in found.items()}

    @cached_property
    def makers(self) -> tuple[int, ...]:
        """Per operator, the bit mask of the operators whose tensors it reads."""
        masks = []
        for op in self.ops:
            mask = 0
            for read in op.reads:
                if read.tensor in self.producer:
                    mask |= 1 << self.producer[read.tensor]
            masks.append(mask)
        return tuple(masks)

    @cached_property
    def readers(self) -> tuple[int, ...]:
        """Per operator, the bit mask of the operators that read its tensor."""
        return tuple(sum(1 << c for c in self.consumers[op.writes]) for op in self.ops)

    @cached_property
    def ordered(self) -> bool:
        """Whether some operator must run after one of whose tensors it reads nothing."""
        return any(op.after for op in self.ops)

    @cached_property
    def predecessors(self) -> tuple[int, ...]:
        """Per operator, the bit mask of those that must run before it: makers, and ``after``."""
        if not self.ordered:
            return self.makers
        return tuple(
            makers | sum(1 << self.index[name] for name in op.after)
            for op, makers in zip(self.ops, self.makers, strict=True)
        )

    @cached_property
    def successors(self) -> tuple[int, ...]:
        """Per operator, the bit mask of those that must run after it."""
        if not self.ordered:
            return self.readers
        masks = list(self.readers)
        for i, op in enumerate(self.ops):
            for name in op.after:
                masks[self.index[name]] |= 1 << i
        return tuple(masks)

    @cached_property
    def overwrites(self) -> tuple[bool, ...]:
        """Per operator, whether it writes over its input (docs/method.md, section 3, "in place").

        A unary elementwise operator whose input has no other consumer in the whole graph and
        is no graph output. A graph input may be written over: it is loaded, not owned.
        """
        return tuple(
            op.in_place
            and len(self.consumers[op.reads[0].tensor]) == 1
            and op.reads[0].tensor not in self.outputs
            for op in self.ops
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that plans depend on; equal however the model was captured."""
        form = self.to_dict()
        for op in form["ops"]:
            op.pop("weight_bytes", None)
        text = json.dumps(form, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def weight_elements(self) -> int:
        """Elements of all weights."""
        return sum(op.weight_elements for op in self.ops)

    def stored_bytes(self, op: Op) -> int:
        """Bytes of an operator's weights as the model stores them."""
        if op.weight_bytes is None:
            return op.weight_elements * self.weight_bytes
        return op.weight_bytes

    @cached_property
    def weight_width(self) -> int | None:
        """Bytes of every weight element as stored; ``None`` where widths differ."""
        weighty = [op for op in self.ops if op.weight_elements]
        if not weighty:
            return self.weight_bytes
        width = self.stored_bytes(weighty[0]) // weighty[0].weight_elements
        same = all(self.stored_bytes(op) == op.weight_elements * width for op in weighty)
        return width if same else None

    def verify(self) -> None:
        """Hold every rule of a well-formed graph, else raise :class:`GraphError`."""
        names = [op.name for op in self.ops]
        if len(set(names)) != len(names):
            twice = max(names, key=names.count)
            raise GraphError(f"two operators are named {twice!r}; names must be unique")
        for name, tensor in self.tensors.items():
            if name != tensor.name:
                raise GraphError(f"tensor {tensor.name!r} is filed under {name!r}")
            if any(size < 1 for size in tensor.shape):
                raise GraphError(f"tensor {name!r} has an empty shape {tensor.shape}")
            axis = tensor.stream_axis
            if axis is not None and not 0 < axis < len(tensor.shape):
                raise GraphError(f"tensor {name!r} of rank {len(tensor.shape)} has no axis {axis}")
            if axis is not None and len(tensor.shape) == 4 and axis == 3:
                raise GraphError(f"tensor {name!r} streams over its last axis: no columns are left")
        known = set()
        seen: set[str] = set()
        for name in self.inputs:
            if name not in self.tensors:
                raise GraphError(f"graph input {name!r} is not among the tensors")
            known.add(name)
        for op in self.ops:
            for read in op.reads:
                if read.tensor not in known:
                    raise GraphError(
                        f"{op.name} ({op.kind}) reads {read.tensor!r} before it is written; "
                        "operators must stand in topological order"
                    )
            if len(set(op.after)) != len(op.after) or not seen.issuperset(op.after):
                raise GraphError(
                    f"{op.name} ({op.kind}) must run after {', '.join(op.after)}: each an operator "
                    "that stands before it, named once"
                )
            seen.add(op.name)
            if op.writes not in self.tensors:
                raise GraphError(f"{op.name} ({op.kind}) writes the unknown tensor {op.writes!r}")
            if op.writes in known:
                raise GraphError(f"{op.name} ({op.kind}) writes {op.writes!r} a second time")
            if op.weight_elements < 0:
                raise GraphError(f"{op.name} ({op.kind}) has {op.weight_elements} weight elements")
            if op.weight_bytes is not None and op.weight_bytes < 0:
                raise GraphError(f"{op.name} ({op.kind}) has {op.weight_bytes} bytes of weights")
            if len({r.tensor for r in op.reads}) != len(op.reads):
                raise GraphError(
                    f"{op.name} ({op.kind}) reads a tensor twice; list it once, through one window"
                )
            if op.in_place and len(op.reads) != 1:
                raise GraphError(f"{op.name} ({op.kind}) is marked in place but is not unary")
            known.add(op.writes)
            self._verify_windows(op)
        for name in self.outputs:
            if name not in known:
                raise GraphError(f"graph output {name!r} is never written")
        if len(known) != len(self.tensors):
            stray = sorted(set(self.tensors) - known)[0]
            raise GraphError(f"tensor {stray!r} belongs to no operator and is no input")

    def _verify_windows(self, op: Op) -> None:
        out = self.tensors[op.writes]
        for read in op.reads:
            source = self.tensors[read.tensor]
            for axis in (0, 1):
                size_in, size_out = source.extent(axis), out.extent(axis)
                implied = read.window.output_size(axis, size_in)
                wrong = implied is not None and implied != size_out
                if read.window.kind is WindowKind.IDENTITY:
                    wrong = size_in not in (1, size_out)
                if wrong:
                    raise GraphError(
                        f"{op.name} ({op.kind}): window {read.window} over {read.tensor!r} "
                        f"{source.shape} does not give {op.writes!r} {out.shape}: "
                        f"{'columns' if axis else 'rows'} {implied or size_in} != {size_out}"
                    )

    def to_dict(self) -> dict[str, Any]:
        """The ``graph`` object of plan.json, without its fingerprint."""
        tensors: dict[str, Any] = {}
        for name, tensor in self.tensors.items():
            tensors[name] = {"shape": list(tensor.shape)}
            if tensor.stream_axis != Tensor.default_axis(tensor.shape):
                tensors[name]["stream_axis"] = tensor.stream_axis
        return {
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "tensors": tensors,
            "ops": [op.to_dict() for op in self.ops],
        }

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> OpGraph:
        """The inverse of :meth:`to_dict`; raises :class:`GraphError` for anything else."""
        fields = Fields.of(form, "graph")
        tensors = {}
        for name, value in fields.child("tensors").form.items():
            entry = Fields.of(value, f"tensor {ascii(name)[:60]}")
            shape = tuple(
                as_integer(size, f"{entry.where}.shape", 1, MOST_POSITIONS)
                for size in entry.items("shape")
            )
            if math.prod(shape) > MOST:
                raise GraphError(f"{entry.where} has more than {MOST} elements")
            axis = Tensor.default_axis(shape)
            if "stream_axis" in entry:
                axis = None if entry.value("stream_axis") is None else entry.integer("stream_axis")
            tensors[as_text(name, "the name of a tensor")] = Tensor(name, shape, axis)
        if len(ops := fields.items("ops")) > MOST_OPERATORS:
            raise GraphError(f"graph.ops holds {len(ops)} operators, more than {MOST_OPERATORS}")
        return cls(
            inputs=fields.texts("inputs"),
            outputs=fields.texts("outputs"),
            ops=tuple(map(Op.from_dict, ops)),
            tensors=tensors,
        )
