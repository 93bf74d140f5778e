"""From FX nodes to operators: what is a weight, an alias, a mutation, and what each op reads."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.capture.graph_inputs import is_for_all_samples
from torch_getfuse.backend.capture.graph_values import (
    Base,
    Draft,
    Feature,
    Role,
    Value,
    Weight,
    covers,
    fits,
    input_stream,
    only_pick,
)
from torch_getfuse.backend.fx_nodes.effects import attribute
from torch_getfuse.backend.fx_nodes.normalize import Invocation, full_name, normalise
from torch_getfuse.backend.fx_nodes.values import (
    flat_tensors,
    module_path,
    size_hint,
    stored,
    tensor_info,
    traced_value,
)
from torch_getfuse.backend.rules.registry import FACTORIES, apply_rule, positional
from torch_getfuse.backend.rules.rule import (
    NOTHING,
    Alias,
    Call,
    Operand,
    Reading,
    Spec,
    Stored,
    TensorInfo,
)
from torch_getfuse.backend.rules.view_windows import Along, Layout, read_window
from torch_getfuse.backend.torch_private import FakeScriptObject, script_class
from torch_getfuse.ir import Tensor, Window, WindowKind

log = logging.getLogger(__name__)


@dataclass
class GraphBuilder:
    """Walks an FX graph once, in order.

    Attributes:
        batch: samples in the traced inputs; shapes are divided by it.
        values: what each node gives, for nodes that give tensors.
        roles: what each placeholder is.
        owner: the graph's module, which holds its attributes.
        kept_outputs: positions of what the model itself returns; ``None`` for all.
        drafts: operators so far; some may turn out to be dead.
        bases: tensors so far.
        inputs: base of each user input, by placeholder.
    """

    batch: int
    roles: Callable[[fx.Node], Role]
    owner: fx.GraphModule
    kept_outputs: set[int] | None = None
    values: dict[fx.Node, Value] = field(default_factory=dict)
    drafts: list[Draft] = field(default_factory=list)
    bases: list[Base] = field(default_factory=list)
    inputs: dict[fx.Node, int] = field(default_factory=dict)
    outputs: list[int] = field(default_factory=list)
    _latest: dict[int, int] = field(default_factory=dict)
    _filled: dict[fx.Node, int] = field(default_factory=dict)
    _joined: dict[fx.Node, dict[fx.Node, Stored]] = field(default_factory=dict)

    def add(self, node: fx.Node) -> None:
        """Takes in one node."""
        if node.op == "placeholder":
            self._placeholder(node)
        elif node.op == "get_attr":
            self._attribute(node)
        elif node.op in ("call_function", "call_method", "call_module"):
            self._call(node)
        elif node.op == "output":
            self._output(node)

    # -- leaves -----------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node) -> None:
        value, role = traced_value(node), self.roles(node)
        if not isinstance(value, torch.Tensor) or role is Role.NEITHER:
            return
        info = tensor_info(value)
        # An empty tensor moves nothing: what eval batch norm saves for its backward.
        if role is Role.CONSTANT or 0 in info.shape:
            self.values[node] = Weight({}, node)
            return
        if role is Role.WEIGHT:
            self.values[node] = Weight({node: stored(value)}, node)
            return
        lead = info.shape[0] if info.shape else 1
        shared = not info.shape or lead % self.batch or is_for_all_samples(node, self.batch)
        batch = None if shared else (0, lead // self.batch)
        base = self._base(info, batch, input_stream(node, info), None)
        self.inputs[node] = base
        self.values[node] = Feature(base, Layout.of(info.shape))

    def _attribute(self, node: fx.Node) -> None:
        value = attribute(self.owner, str(node.target))
        if isinstance(value, torch.Tensor):
            self.values[node] = Weight({node: stored(value)}, node)

    def _output(self, node: fx.Node) -> None:
        returned = node.args[0]
        if self.kept_outputs is not None and isinstance(returned, (list, tuple)):
            returned = [item for i, item in enumerate(returned) if i in self.kept_outputs]
        found: list[int] = []
        fx.map_arg(returned, lambda n: found.extend(self._bases_of(self.values.get(n))))
        # What is written over an input or a buffer is seen outside, whether it is returned or not.
        for leaf, value in self.values.items():
            if leaf.op in ("placeholder", "get_attr") and not isinstance(value, tuple):
                written = self._current(value)
                if isinstance(written, Feature) and written != value:
                    found.append(written.base)
        self.outputs = list(dict.fromkeys(found))

    def _bases_of(self, value: Value | None) -> list[int]:
        if isinstance(value, tuple):
            return [base for item in value for base in self._bases_of(item)]
        current = self._current(value) if value is not None else None
        return [current.base] if isinstance(current, Feature) else []

    # -- calls ------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> None:
        invocation = self._invocation(node)
        source = node.args[0] if node.args else None
        if invocation.name == "getitem" and isinstance(source, fx.Node):
            parts = self.values.get(source)
            index = invocation.args.get("index")
            if isinstance(parts, tuple) and isinstance(index, int):
                part = parts[index]
                if part is not None:
                    self.values[node] = part
                    self._belongs(node, part)
                return
        outputs = tuple(tensor_info(t) for t in flat_tensors(traced_value(node)))
        args = {name: self._argument(value) for name, value in invocation.args.items()}
        out = args.pop("out", None)  # where the result goes; no operand
        hidden = self._hidden(node) if outputs else ""
        call = Call(invocation.name, args, outputs, invocation.overload, hidden)
        if invocation.name == "setitem" or (invocation.mutates and call.name in ("copy", "fill")):
            self._overwrite(node, call)
        elif outputs:
            into = out if isinstance(out, Operand) else None
            self._operator(node, call, invocation.mutates, into)

    def _invocation(self, node: fx.Node) -> Invocation:
        if node.op == "call_module":
            name = full_name(type(self.owner.get_submodule(str(node.target))))
            return Invocation(name, {"input": node.args}, mutates=False, overload=False)
        return normalise(node, positional)

    def _hidden(self, node: fx.Node) -> str:
        """The class of an argument that holds its tensors where nobody sees them; else empty."""
        for source in node.all_input_nodes:
            value = traced_value(source)
            if source.op == "get_attr":
                value = attribute(self.owner, str(source.target))
            if isinstance(value, (torch.ScriptObject, FakeScriptObject)):
                return script_class(value)
        return ""

    def _argument(self, value: Any) -> Any:
        """Tensors become operands, symbolic numbers their hints, other nodes ``None``."""
        if isinstance(value, fx.Node):
            held = self.values.get(value)
            if held is not None:
                return self._operand(value, held, traced_value(value))
            value = traced_value(value)
        if isinstance(value, torch.SymInt):
            return size_hint(value)
        if isinstance(value, tuple):
            return tuple(self._argument(item) for item in value)
        if isinstance(value, list):
            return [self._argument(item) for item in value]
        if isinstance(value, dict):
            return {key: self._argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(self._argument(x) for x in (value.start, value.stop, value.step)))
        return None if isinstance(value, (fx.Node, torch.Tensor)) else value

    def _operand(self, node: fx.Node, value: Value, traced: Any) -> Any:
        if isinstance(value, tuple):
            pairs = zip(value, traced, strict=True)
            return tuple(None if v is None else self._operand(node, v, t) for v, t in pairs)
        info = tensor_info(traced)
        current = self._current(value)
        if 0 in info.shape:
            current = Weight({}, node)
        if isinstance(current, Weight):
            return Operand(node, info, True, Stored.sum(current.parts.values()), value=current)
        found = self.find_batch(current)
        return Operand(node, info, batch=found[0] if found else None, value=current)

    def _current(self, value: Feature | Weight) -> Feature | Weight:
        """What a value is after the in-place operators so far."""
        if isinstance(value, Weight) and value.root in self._filled:
            base = self._filled[value.root]
            shape = self.bases[base].info.shape
            value = Feature(base, Layout.opaque(shape))
        elif isinstance(value, Weight) and value.root in self._joined:
            value = replace(value, parts={**value.parts, **self._joined[value.root]})
        if isinstance(value, Feature):
            base = value.base
            while base in self._latest:
                base = self._latest[base]
            return replace(value, base=base)
        return value

    def _operator(
        self, node: fx.Node, call: Call, mutates: bool, into: Operand | None = None
    ) -> None:
        """An operator, a view or a constant.

        Args:
            mutates: it writes over its first operand.
            into: the operand that ``out=`` names.
        """
        if call.name in FACTORIES or not call.activations:
            self.values[node] = self._constant(node, call, mutates)
            return
        if all(0 in output.shape for output in call.outputs):
            # Nothing crosses DRAM for a tensor without elements, and nothing has to be made.
            self.values[node] = _mirror(traced_value(node), [Weight({}, node)] * len(call.outputs))
            return
        result = apply_rule(call)
        first = call.operands[0]
        if isinstance(result, Alias):
            value = self._alias(result, node)
            self.values[node] = value
            if mutates and first.node is not node:
                # squeeze_ and its like change the view, not the elements.
                self.values[first.node] = value
            return
        results = len(call.outputs)
        picked = only_pick(node) if results > 1 else None
        if picked is not None:
            picked = _position(node, picked)
            call = replace(call, outputs=(call.outputs[picked],))
            result = apply_rule(call)
            assert isinstance(result, Spec)
        target = into if into is not None else first if mutates else None
        written = None if target is None else target.value
        if isinstance(written, Feature) and not covers(
            written.layout, self.bases[written.base].info.shape
        ):
            # One operator, which makes the whole tensor anew: a call belongs to one alone.
            sources = [operand.value.base for operand in call.activations]
            weights = _weights(call, result)
            whole = self._partial_write(node, written.base, sources, result.kind, weights)
            self.values[node] = Feature(whole, written.layout)
            return
        base, draft = self._draft(node, call, result)
        parts: list[Value | None] = [None] * results
        if len(call.outputs) > 1:
            parts = [Feature(base, Layout.opaque(output.shape)) for output in call.outputs]
        else:
            parts[picked or 0] = Feature(base, Layout.of(call.shape))
        self.values[node] = _mirror(traced_value(node), parts)
        if target is not None:
            self._mutate(target, base, draft, node)

    def _constant(self, node: fx.Node, call: Call, mutates: bool) -> Value:
        """The result of a call that no feature map goes into."""
        parts: dict[fx.Node, Stored] = {}
        root = node
        if call.name not in FACTORIES:
            for operand in call.operands:
                parts.update(operand.value.parts)
            views = call.operands and isinstance(apply_rule(call), Alias)
            root = call.operands[0].value.root if views or mutates else node
            if mutates:
                self._join(root, parts)
        return _mirror(traced_value(node), [Weight(parts, root)] * len(call.outputs))

    def _join(self, root: fx.Node, parts: Mapping[fx.Node, Stored]) -> None:
        """Weights that are written into a constant are behind it from now on."""
        self._joined.setdefault(root, {}).update(parts)

    def _alias(self, alias: Alias, node: fx.Node) -> Value:
        value = alias.operand.value
        if isinstance(value, Feature):
            views: list[Value] = [
                Feature(value.base, change(value.layout)) for change in alias.changes
            ]
        else:
            views = [value] * len(alias.changes)
        self._belongs(node, value)
        return _mirror(traced_value(node), views)

    def _belongs(self, node: fx.Node, value: Value) -> None:
        """An alias is listed with the operator that wrote its base tensor."""
        current = value if isinstance(value, tuple) else self._current(value)
        if isinstance(current, Feature) and (op := self.bases[current.base].op) is not None:
            self.drafts[op].nodes.append(node)

    # -- operators --------------------------------------------------------------------------

    def _draft(self, node: fx.Node, call: Call, spec: Spec) -> tuple[int, Draft]:
        if len(call.outputs) == 1:
            info = call.outputs[0]
        else:
            # Several results are one tensor of all their elements.
            total = sum(math.prod(output.shape) for output in call.outputs)
            whole = -(-total // self.batch) * self.batch
            info = TensorInfo((self.batch, whole // self.batch), call.outputs[0].dtype)
        batch = self._batch_of(spec, info)
        stream = self._stream_of(spec, info) if len(call.outputs) == 1 else None
        base = self._base(info, batch, stream, len(self.drafts))
        reads, reason = self._reads(spec, self.bases[base].tensor)
        features = [reading.operand for reading in spec.reads]
        direct = len(features) == 1 and features[0].value.layout == Layout.of(
            self.bases[features[0].value.base].info.shape
        )
        draft = Draft(
            kind=spec.kind,
            target=str(node.target) if isinstance(node.target, str) else call.name,
            module=module_path(node),
            reads=reads,
            writes=base,
            nodes=[node],
            spec=spec,
            weights=_weights(call, spec),
            in_place=spec.in_place and len(features) == 1 and self._keeps(reads, base),
            reason=reason,
            direct=direct,
            calls=[(node, [(o.node, o.value) for o in call.activations])],
        )
        self.drafts.append(draft)
        return base, draft

    def _reads(self, spec: Spec, target: Tensor) -> tuple[list[tuple[int, Window]], str]:
        reads: dict[int, Window] = {}
        reason = spec.reason
        for reading in spec.reads:
            feature: Feature = reading.operand.value
            source = self.bases[feature.base]
            window = self._window(reading, source, target)
            if not fits(window, source.tensor, target):
                reason = f"{window} of {source.tensor.shape} does not give {target.shape}"
                log.warning("%s: %s; it is taken to read its whole input", spec.kind, reason)
                window = Window.whole()
            if feature.base in reads and reads[feature.base] != window:
                # One tensor through two windows: no single window says both.
                window = Window.whole()
            reads[feature.base] = window
        return list(reads.items()), reason

    def _window(self, reading: Reading, source: Base, target: Tensor) -> Window:
        if reading.accesses is None:
            return Window.whole()
        pure = source.batch is not None and source.tensor.shape[source.batch[0]] == 1
        axis = source.batch[0] if source.batch is not None and pure else None
        layout = reading.operand.value.layout
        return read_window(source.tensor, layout, reading.accesses, target, axis)

    def _keeps(self, reads: Sequence[tuple[int, Window]], base: int) -> bool:
        """True where the result can take the place of the one operand."""
        if len(reads) != 1 or reads[0][1].kind is not WindowKind.IDENTITY:
            return False
        source, target = self.bases[reads[0][0]], self.bases[base]
        same_units = source.tensor.elements == target.tensor.elements
        return (
            same_units
            and source.info.dtype == target.info.dtype
            and (source.tensor.rows == target.tensor.rows)
        )

    def _mutate(self, operand: Operand, base: int, draft: Draft, node: fx.Node) -> None:
        """Later reads of the operand's storage see what an in-place operator wrote."""
        value = operand.value
        if isinstance(value, Weight):
            self._filled[value.root] = base
            return
        old = self.bases[value.base]
        if value.layout == Layout.of(old.info.shape):
            self._latest[value.base] = base
        else:
            for other, held in self.values.items():
                if isinstance(held, Feature) and self._current(held) == replace(
                    held, base=value.base
                ):
                    same = held.layout == value.layout
                    shape = held.layout.shape
                    self.values[other] = Feature(
                        base, Layout.of(shape) if same else Layout.opaque(shape)
                    )

    def _overwrite(self, node: fx.Node, call: Call) -> None:
        """``x[index] = value``, ``fill_`` and ``copy_``: new elements in an existing tensor."""
        operands = call.operands
        if not operands:
            return
        target, sources = operands[0].value, [o.value for o in operands[1:]]
        bases = [s.base for s in sources if isinstance(s, Feature)]
        if isinstance(target, Feature) and [_part(call, target)] == sources:
            # ``x[index] += value`` ends with a copy of the part to where it is.
            self.values[node] = target
            self._belongs(node, target)
        elif isinstance(target, Feature):
            whole = self._partial_write(node, target.base, bases)
            self.values[node] = Feature(whole, target.layout)
        elif not bases:
            for source in operands[1:]:
                self._join(target.root, source.value.parts)
            self.values[node] = target
        else:
            # A constant that is filled with feature maps becomes one.
            info = tensor_info(traced_value(target.root))
            written = self._copy(node, info, bases)
            self._filled[target.root] = written
            self.values[node] = Feature(written, Layout.opaque(operands[0].shape))

    def _partial_write(
        self,
        node: fx.Node,
        base: int,
        sources: list[int],
        kind: str = "copy",
        weights: Stored = NOTHING,
    ) -> int:
        written = self._copy(node, self.bases[base].info, [base, *sources], kind, weights)
        self._latest[base] = written
        return written

    def _copy(
        self,
        node: fx.Node,
        info: TensorInfo,
        sources: list[int],
        kind: str = "copy",
        weights: Stored = NOTHING,
    ) -> int:
        reason = "writes into a part of a tensor in place: it reads its whole inputs"
        spec = Spec(kind, (), reason=reason)
        like = self.bases[sources[0]]
        same = like.info.shape == info.shape
        batch = like.batch if same else self._guess_batch(info)
        base = self._base(info, batch, like.tensor.stream_axis if same else None, len(self.drafts))
        reads = [(source, Window.whole()) for source in dict.fromkeys(sources)]
        self.drafts.append(
            Draft(kind, kind, module_path(node), reads, base, [node], spec, weights, False, reason)
        )
        return base

    # -- batch and rows ---------------------------------------------------------------------

    def _base(
        self, info: TensorInfo, batch: tuple[int, int] | None, stream: int | None, op: int | None
    ) -> int:
        shape = list(info.shape)
        if batch is not None:
            shape[batch[0]] //= self.batch
        if stream is None:
            stream = Tensor.default_axis(shape)
        elif not 0 < stream < len(shape) or (len(shape) == 4 and stream == 3):
            stream = None
        self.bases.append(Base(info, batch, Tensor("", tuple(shape), stream), op))
        return len(self.bases) - 1

    def find_batch(self, feature: Feature) -> tuple[int, int] | None:
        """Axis of a view that the batch is in, and the product of the sizes inside of it."""
        batch = self.bases[feature.base].batch
        if batch is None:
            return None
        axis, inner = batch
        for place, atoms in enumerate(feature.layout.axes):
            inside = 1
            for atom in reversed(atoms):
                holds = atom.stride <= inner and inner * self.batch <= atom.stride * atom.size
                if atom.axis == axis and holds and atom.start == 0:
                    return place, inside * (inner // atom.stride)
                inside *= atom.size
        return None

    def _batch_of(self, spec: Spec, info: TensorInfo) -> tuple[int, int] | None:
        """The batch of the output lies along the axis that runs along the operand's batch."""
        for reading in spec.reads:
            found = self.find_batch(reading.operand.value)
            if found is None:
                continue
            place, inner = found
            if reading.accesses is None:
                shape = reading.operand.shape
                if len(shape) == len(info.shape) and shape[place] == info.shape[place]:
                    return place, inner
                continue
            access = reading.accesses[place]
            if isinstance(access, Along):
                if info.shape[access.axis] == reading.operand.shape[place]:
                    return access.axis, inner
            elif access.reduce:
                return None
        return self._guess_batch(info)

    def _guess_batch(self, info: TensorInfo) -> tuple[int, int] | None:
        if info.shape and info.shape[0] % self.batch == 0:
            return 0, info.shape[0] // self.batch
        return (info.shape.index(self.batch), 1) if self.batch in info.shape else None

    def _stream_of(self, spec: Spec, info: TensorInfo) -> int | None:
        """The axis of the output that runs along the rows of an operand."""
        if spec.stream_axis is not None:
            return spec.stream_axis
        rank = len(info.shape)
        rows = {id(r): self.bases[r.operand.value.base].tensor.rows for r in spec.reads}
        for reading in sorted(spec.reads, key=lambda r: -rows[id(r)]):
            feature: Feature = reading.operand.value
            source = self.bases[feature.base].tensor
            hits = [] if source.stream_axis is None else feature.layout.find(source.stream_axis)
            if len(hits) != 1:
                continue
            axis: int | None = hits[0][0]
            if reading.accesses is not None:
                access = reading.accesses[hits[0][0]]
                axis = access.axis if isinstance(access, Along) else None
            elif reading.operand.shape != info.shape:
                axis = None
            if axis is not None and 0 < axis < rank and (rank, axis) != (4, 3):
                return axis
        return None


def _part(call: Call, target: Feature) -> Feature | None:
    """What ``setitem``, ``copy_`` or ``fill_`` writes; ``None`` where an index is no view."""
    if call.name != "setitem":
        return target
    index, _ = call.args["*"]
    view = apply_rule(Call("getitem", {"input": call.args["input"], "index": index}, ()))
    return (
        replace(target, layout=view.changes[0](target.layout)) if isinstance(view, Alias) else None
    )


def _position(node: fx.Node, index: int) -> int:
    """Where item ``index`` of a result stands among its tensors; a backward leaves some out."""
    return len(flat_tensors(list(traced_value(node))[:index]))


def _mirror(traced: Any, parts: Sequence[Value | None]) -> Value:
    """``parts``, one per tensor of a result, in the result's own (perhaps nested) structure."""
    left = iter(parts)

    def place(item: Any) -> Value | None:
        if isinstance(item, torch.Tensor):
            return next(left)
        return tuple(map(place, item)) if isinstance(item, (list, tuple)) else None

    found = place(traced)
    assert found is not None, "a call with tensor results has one"
    return found


def _weights(call: Call, spec: Spec) -> Stored:
    """The weights that an operator reads, each once."""
    if spec.weights is not None:
        return spec.weights
    parts: dict[fx.Node, Stored] = {}
    for operand in call.operands:
        if operand.weight:
            parts.update(operand.value.parts)
    return Stored.sum(parts.values())
