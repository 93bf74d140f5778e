"""The operator graph: operators in topological order, verified, with a fingerprint.

No torch here. Everything the cost models, searches and reports know about a model
is in these frozen records. An operator is described by *how it reads* (its windows), never
by its name: fusion code does not look at ``Op.kind``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch_getfuse.errors import GraphError
from torch_getfuse.ir.op import Op, Tensor, default_channels
from torch_getfuse.ir.window import WindowKind
from torch_getfuse.json_fields import Fields, as_integer, as_text
from torch_getfuse.limits import MOST, MOST_POSITIONS
from torch_getfuse.widths import Width, bits_of, packed, width_of

MOST_OPERATORS = 20_000
"""Most operators that a plan file may have; sets of operators are bit masks of that length."""


_BY_WIDTH = ("activation_width", "row_bytes", "pixel_bytes", "tensor_bytes", "overwrites")
"""What a graph has worked out that depends on how its tensors are stored."""


@dataclass(frozen=True)
class OpGraph:
    """A DAG of operators in topological order; verified on construction.

    Attributes:
        inputs: names of the tensors that come from outside the model.
        outputs: names of the tensors that the model returns.
        ops: operators, each after all producers of what it reads.
        tensors: every tensor by name.
        activation_bytes: bytes of an element of tensors that do not state their bits: that of the
            first input as traced.
        weight_bytes: element width of the weights of operators that do not state their bytes.
        align_channels: the channels of stored tensors are padded to a multiple of it. No part of
            the graph's identity, as all widths.

    Raises:
        GraphError: where a rule of :meth:`verify` is broken.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: tuple[Op, ...]
    tensors: Mapping[str, Tensor]
    activation_bytes: Width = field(default=4, compare=False)
    weight_bytes: Width = field(default=4, compare=False)
    align_channels: int = field(default=1, compare=False)

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

        A unary elementwise operator whose input has no other consumer in the whole graph, is no
        graph output, and takes the same bytes. A graph input may be written over: it is loaded,
        not owned.
        """
        return tuple(
            op.in_place
            and len(self.consumers[op.reads[0].tensor]) == 1
            and op.reads[0].tensor not in self.outputs
            and self.stored_alike(op.reads[0].tensor, op.writes)
            for op in self.ops
        )

    # -- bytes of tensors -----------------------------------------------------------------

    def stored_as(
        self, activation_bytes: Width | None = None, align_channels: int | None = None
    ) -> OpGraph:
        """The graph with its tensors stored otherwise; all bytes are asked of the result.

        Args:
            activation_bytes: width of all elements; ``None``: each tensor keeps its own.
            align_channels: ``None`` for the graph's.
        """
        width = self.activation_width if activation_bytes is None else activation_bytes
        align = self.align_channels if align_channels is None else align_channels
        if (width, align) == (self.activation_width, self.align_channels):
            return self
        # Names, shapes and windows stay, so nothing is verified or worked out again but bytes.
        found = copy.copy(self)
        for name in _BY_WIDTH:
            found.__dict__.pop(name, None)
        found.__dict__["align_channels"] = align
        if activation_bytes is not None:
            found.__dict__["activation_bytes"] = activation_bytes
            found.__dict__["tensors"] = {
                name: tensor if tensor.bits is None else replace(tensor, bits=None)
                for name, tensor in self.tensors.items()
            }
        return found

    def width(self, tensor: str) -> Width:
        """Bytes of an element of a tensor."""
        bits = self.tensors[tensor].bits
        return self.activation_bytes if bits is None else width_of(bits)

    @cached_property
    def activation_width(self) -> Width | None:
        """Bytes of an element of every tensor; ``None`` where widths differ."""
        widths = {self.width(name) for name in self.tensors}
        return widths.pop() if len(widths) == 1 else None if widths else self.activation_bytes

    @cached_property
    def row_bytes(self) -> dict[str, int]:
        """Bytes of a row of each tensor: its elements packed, filled up to a whole byte."""
        align = self.align_channels
        return {
            name: packed(tensor.padded(tensor.rows, align), self.width(name))
            for name, tensor in self.tensors.items()
        }

    @cached_property
    def pixel_bytes(self) -> dict[str, int]:
        """Bytes of a pixel of each tensor that a buffer of pixels holds, whole ones."""
        align = self.align_channels
        return {
            name: packed(tensor.padded(tensor.rows * tensor.cols, align), self.width(name))
            for name, tensor in self.tensors.items()
        }

    @cached_property
    def tensor_bytes(self) -> dict[str, int]:
        """Bytes of each tensor where it is stored: of all its rows."""
        return {name: self.tensors[name].rows * size for name, size in self.row_bytes.items()}

    def stored_alike(self, one: str, other: str) -> bool:
        """Whether two tensors take the same bytes, in all and an element."""
        return self.width(one) == self.width(other) and (
            self.tensor_bytes[one] == self.tensor_bytes[other]
        )

    # -- identity -------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that plans depend on; equal however the model was captured."""
        form = self.to_dict()
        for op in form["ops"]:
            op.pop("weight_bytes", None)
            op.pop("macs", None)
        for tensor in form["tensors"].values():
            tensor.pop("bytes", None)
        text = json.dumps(form, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def channel_axis(self, op: Op) -> int | None:
        """The axis of an operator's output that its channels are on; ``None`` for a scalar."""
        rank = len(self.tensors[op.writes].shape)
        axis = default_channels(rank) if op.channel_axis is None else op.channel_axis
        return axis if rank else None

    def channels(self, op: Op) -> int:
        """Output channels of an operator."""
        axis = self.channel_axis(op)
        return 1 if axis is None else self.tensors[op.writes].shape[axis]

    @property
    def weight_elements(self) -> int:
        """Elements of all weights."""
        return sum(op.weight_elements for op in self.ops)

    def stored_bytes(self, op: Op) -> int:
        """Bytes of an operator's weights as the model stores them."""
        if op.weight_bytes is None:
            return packed(op.weight_elements, self.weight_bytes)
        return op.weight_bytes

    @cached_property
    def weight_width(self) -> Width | None:
        """Bytes of every weight element as stored; ``None`` where widths differ.

        A width that is no number of whole bytes is less than one: others are means of several.
        """
        weighty = [op for op in self.ops if op.weight_elements]
        if not weighty:
            return self.weight_bytes
        most = max(weighty, key=lambda op: op.weight_elements)
        bits = 8 * self.stored_bytes(most) // most.weight_elements
        width = width_of(bits)
        same = all(self.stored_bytes(op) == packed(op.weight_elements, width) for op in weighty)
        return width if same and (bits < 8 or bits % 8 == 0) else None

    def verify(self) -> None:
        """Hold every rule of a well-formed graph, else raise :class:`GraphError`."""
        if bits_of(self.activation_bytes) < 1 or self.align_channels < 1:
            raise GraphError(
                f"the graph has elements of {self.activation_bytes} B, channels in multiples of "
                f"{self.align_channels}; both are above zero"
            )
        names = [op.name for op in self.ops]
        if len(set(names)) != len(names):
            twice = max(names, key=names.count)
            raise GraphError(f"two operators are named {twice!r}; names must be unique")
        for name, tensor in self.tensors.items():
            if name != tensor.name:
                raise GraphError(f"tensor {tensor.name!r} is filed under {name!r}")
            if any(size < 1 for size in tensor.shape):
                raise GraphError(f"tensor {name!r} has an empty shape {tensor.shape}")
            if tensor.bits is not None and tensor.bits < 1:
                raise GraphError(f"tensor {name!r} has elements of {tensor.bits} bits")
            axis = tensor.stream_axis
            if axis is not None and not 0 <= axis < len(tensor.shape):
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
            if op.macs is not None and op.macs < 0:
                raise GraphError(f"{op.name} ({op.kind}) has {op.macs} multiply-accumulates")
            if len({r.tensor for r in op.reads}) != len(op.reads):
                raise GraphError(
                    f"{op.name} ({op.kind}) reads a tensor twice; list it once, through one window"
                )
            if op.in_place and len(op.reads) != 1:
                raise GraphError(f"{op.name} ({op.kind}) is marked in place but is not unary")
            if op.channel_axis is not None:
                rank = len(self.tensors[op.writes].shape)
                if not 0 <= op.channel_axis < rank:
                    raise GraphError(
                        f"{op.name} ({op.kind}) has its channels on axis {op.channel_axis} of a "
                        f"tensor of rank {rank}"
                    )
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
            if self.width(name) != self.activation_bytes:
                tensors[name]["bytes"] = self.width(name)
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
            bits = bits_of(entry.width("bytes")) if "bytes" in entry else None
            tensors[as_text(name, "the name of a tensor")] = Tensor(name, shape, axis, bits)
        if len(ops := fields.items("ops")) > MOST_OPERATORS:
            raise GraphError(f"graph.ops holds {len(ops)} operators, more than {MOST_OPERATORS}")
        return cls(
            inputs=fields.texts("inputs"),
            outputs=fields.texts("outputs"),
            ops=tuple(map(Op.from_dict, ops)),
            tensors=tensors,
        )
