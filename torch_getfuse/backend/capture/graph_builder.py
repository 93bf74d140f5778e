"""From FX nodes to operators: what is a weight, an alias, a mutation, and what each op reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from torch_getfuse.backend.capture.bases import Bases
from torch_getfuse.backend.capture.calls import Calls, overwrites, part_written
from torch_getfuse.backend.capture.chosen_scales import scales_waited_for
from torch_getfuse.backend.capture.graph_inputs import batch_axis, is_for_all_samples
from torch_getfuse.backend.capture.graph_values import (
    Draft,
    Feature,
    Role,
    Value,
    Weight,
    covers,
    mirrored,
    only_pick,
)
from torch_getfuse.backend.capture.memory import Memory, place_of
from torch_getfuse.backend.capture.quantisation import kept_as_operators, quantisation
from torch_getfuse.backend.capture.streams import settle_streams
from torch_getfuse.backend.fx_nodes.effects import attribute
from torch_getfuse.backend.fx_nodes.values import (
    flat_tensors,
    module_path,
    stored,
    tensor_info,
    traced_value,
)
from torch_getfuse.backend.rules.pointwise import pointwise
from torch_getfuse.backend.rules.quantisation import Quantisation, by_rows, quantisation_of
from torch_getfuse.backend.rules.registry import apply_rule, facts_of
from torch_getfuse.backend.rules.rule import (
    NOTHING,
    Alias,
    Call,
    Operand,
    Spec,
    Stored,
    TensorInfo,
    operands_in,
    whole,
)
from torch_getfuse.backend.rules.view_windows import Layout
from torch_getfuse.ir import Window


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
        returned: the nodes that are returned.
        scales: quantising call that is folded -> the scales and zero points that it reads.
    """

    batch: int
    roles: Callable[[fx.Node], Role]
    owner: fx.GraphModule
    kept_outputs: set[int] | None = None
    values: dict[fx.Node, Value] = field(default_factory=dict)
    drafts: list[Draft] = field(default_factory=list)
    bases: Bases = field(init=False)
    inputs: dict[fx.Node, int] = field(default_factory=dict)
    outputs: list[int] = field(default_factory=list)
    returned: list[fx.Node] = field(default_factory=list)
    scales: dict[fx.Node, dict[fx.Node, Stored]] = field(default_factory=dict)
    _unfolded: frozenset[fx.Node] = frozenset()
    _memory: Memory = field(default_factory=Memory)
    _calls: Calls = field(init=False)

    def __post_init__(self) -> None:
        self.bases = Bases(self.batch)
        self._calls = Calls(self.owner, self.values, self._memory, self.bases)
        self._unfolded = kept_as_operators(self.owner)

    def build(self) -> GraphBuilder:
        """Takes in all nodes of the graph."""
        for node in self.owner.graph.nodes:
            self._add(node)
        settle_streams(self.bases, self.live(), list(self.inputs.values()))
        return self

    def live(self) -> list[Draft]:
        """The operators that something returned depends on."""
        needed = set(self.outputs)
        live = []
        for draft in reversed(self.drafts):
            if draft.writes in needed:
                needed.update(base for base, _ in draft.reads)
                live.append(draft)
        return live[::-1]

    def read_inputs(self) -> dict[fx.Node, int]:
        """The inputs that live operators read, and their bases.

        In the order in which they are first read, which is the same in every trace of a program.
        """
        nodes = {base: node for node, base in self.inputs.items()}
        read = dict.fromkeys(base for draft in self.live() for base, _ in draft.reads)
        return {nodes[base]: base for base in read if base in nodes}

    def _add(self, node: fx.Node) -> None:
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
            self.values[node] = Weight.of(node, info, {})
            return
        if role is Role.WEIGHT:
            self.values[node] = Weight.of(node, info, {node: stored(value)})
            return
        axis = batch_axis(node)
        lead = info.shape[axis] if info.shape else 1
        shared = not info.shape or lead % self.batch or is_for_all_samples(node, self.batch)
        batch = None if shared else (axis, lead // self.batch)
        base = self.bases.add(info, batch, None)
        self.inputs[node] = base
        self.values[node] = Feature(base, Layout.of(info.shape))

    def _attribute(self, node: fx.Node) -> None:
        value = attribute(self.owner, str(node.target))
        if isinstance(value, torch.Tensor):
            self.values[node] = Weight.of(node, tensor_info(value), {node: stored(value)})

    def _output(self, node: fx.Node) -> None:
        returned = node.args[0]
        if self.kept_outputs is not None and isinstance(returned, (list, tuple)):
            returned = [item for i, item in enumerate(returned) if i in self.kept_outputs]
        found: list[int] = []
        fx.map_arg(returned, self.returned.append)
        for item in self.returned:
            found.extend(self._bases_of(self.values.get(item)))
        # What is written over an input or a buffer is seen outside, whether it is returned or not;
        # a constant is copied before.
        for leaf, value in self.values.items():
            given = leaf.op in ("placeholder", "get_attr") and self.roles(leaf) is not Role.CONSTANT
            if given and not isinstance(value, tuple):
                written = self._memory.current(value)
                if isinstance(written, Feature) and written != value:
                    found.append(written.base)
        self.outputs = list(dict.fromkeys(found))

    def _bases_of(self, value: Value | None) -> list[int]:
        if isinstance(value, tuple):
            return [base for item in value for base in self._bases_of(item)]
        current = self._memory.current(value) if value is not None else None
        return [current.base] if isinstance(current, Feature) else []

    # -- calls ------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> None:
        invocation = self._calls.invocation(node)
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
        outputs = [tensor_info(t) for t in flat_tensors(traced_value(node))]
        args = {name: self._calls.argument(value) for name, value in invocation.args.items()}
        out = args.pop("out", None)  # where the result goes; no operand
        written = operands_in([out, *(args.get(name) for name in invocation.writes)])
        targets = [target for target in written if 0 not in target.shape]
        if invocation.fresh or not outputs:
            outputs += [target.info for target in written]
        hidden = self._calls.hidden_class(node) if outputs else ""
        call = Call(invocation.name, args, tuple(outputs), invocation.overload, hidden)
        if overwrites(invocation):
            self._overwrite(node, call)
        elif outputs:
            self._operator(node, call, targets, in_place=out is None)

    def _operator(
        self, node: fx.Node, call: Call, targets: Sequence[Operand], *, in_place: bool
    ) -> None:
        """An operator, a view or a constant.

        Args:
            targets: the operands that it writes.
            in_place: they are its own; else those that ``out=`` names.
        """
        written = any(isinstance(target.value, Feature) for target in targets)
        if facts_of(call.name).factory or not (call.activations or written):
            self._constant(node, call, targets)
            return
        if all(0 in output.shape for output in call.outputs):
            # Nothing crosses DRAM for a tensor without elements, and nothing has to be made.
            self._give(node, [Weight.of(node, output, {}) for output in call.outputs])
            return
        result = self._quantising(node, call) or apply_rule(call)
        if isinstance(result, tuple):
            self._give(node, result)
            return
        if isinstance(result, Alias) and not in_place and targets:
            result = whole(call, call.name)  # torch.positive(x, out=y) copies
        if others := scales_waited_for(call, result, self.drafts, self._calls):
            # Scales that were chosen from values: they are waited for.
            kind = quantisation_of(call.name)
            kept = pointwise(call) if isinstance(result, Alias) else result
            name = kept.kind if kind is None else kind.value
            result = replace(kept, kind=name, reads=(*kept.reads, *others), in_place=False)
        if isinstance(result, Spec) and not self._are_features(result):
            # weight.type_as(x): the values are a weight's, and x only says of what type.
            result = whole(call, call.name)
        if isinstance(result, Spec) and targets:
            result = replace(result, stored_as=None)  # it is stored as what it is written to
        results, picked = len(call.outputs), None
        if isinstance(result, Spec) and results > 1 and not targets:
            picked = only_pick(node)
        if picked is not None:
            picked = _position(node, picked)
            call = replace(call, outputs=(call.outputs[picked],), picked=picked)
            result = apply_rule(call)  # a view too: the maxima of single elements are these
        if isinstance(result, Alias):
            value = self._alias(result, node, call.outputs, picked or 0)
            self.values[node] = value
            if targets and targets[0].node is not node:
                # squeeze_ and its like change the view, not the elements.
                self.values[targets[0].node] = value
            return
        if not (call.activations and self._are_tensors(targets)):
            weights = _weights(call, result)
            self._anew(node, targets, call.activations, result.kind, weights, result.macs)
            return
        base = self._draft(node, call, result)
        parts: list[Value | None] = [None] * results
        if result.stored_as is not None:
            stored_shape = Layout.of(result.stored_as.shape)
            shown: list[Value | None] = [
                Feature(base, view(stored_shape)) for view in result.stored_as.views
            ]
            parts[picked or 0 : (picked or 0) + len(shown)] = shown
        elif len(call.outputs) > 1:
            parts = [Feature(base, Layout.opaque(output.shape)) for output in call.outputs]
        else:
            parts[picked or 0] = Feature(base, Layout.of(call.shape))
        self._give(node, parts)
        for target in targets:
            itself = target.value.layout == Layout.of(self._info(target.value).shape)
            alone = len(call.outputs) == 1
            self._memory.write(target.value, base, whole=itself, alone=alone)

    def _quantising(
        self, node: fx.Node, call: Call
    ) -> Alias | Spec | tuple[Value | None, ...] | None:
        """What a quantising call is: a view, or an operator where its memory is written.

        Scales that are chosen from values are numbers that stay on chip; ``None`` for other calls.
        """
        kind = quantisation_of(call.name)
        if kind is None:
            return None
        if kind is Quantisation.CHOOSE and _is_returned(node):
            return whole(call, call.name.partition("::")[2])
        if kind is Quantisation.CHOOSE:
            marked = {node: NOTHING}
            return tuple(Weight.of(node, info, marked, k) for k, info in enumerate(call.outputs))
        operand, *scales = call.operands
        computed = any(not scale.weight for scale in scales)  # by operators of the network
        if node in self._unfolded or operand.weight or computed:
            return replace(pointwise(call), kind=kind.value, in_place=False)
        parts: dict[fx.Node, Stored] = {}
        for scale in scales:
            parts.update(scale.value.parts if scale.weight else {})
        self.scales[node] = {part: stored for part, stored in parts.items() if stored.bytes}
        chosen = any(quantisation(part) is Quantisation.CHOOSE for part in parts)
        if chosen and kind is Quantisation.QUANTIZE:
            if by_rows(call.name, call.args):
                return Alias(operand, (lambda layout: layout.mixed(-1),))
            return Alias(operand, (lambda layout: Layout.opaque(layout.shape),))
        return Alias(operand, (lambda layout: layout,))

    def _give(self, node: fx.Node, parts: Sequence[Value | None]) -> None:
        """``parts`` are the tensors that a node gives, and others that it only writes."""
        traced = traced_value(node)
        if flat_tensors(traced):
            self.values[node] = mirrored(traced, parts)

    def _constant(self, node: fx.Node, call: Call, targets: Sequence[Operand]) -> None:
        """The result of a call that no feature map goes into."""
        parts: dict[fx.Node, Stored] = {}
        if not facts_of(call.name).factory:
            for operand in call.operands:
                parts.update(operand.value.parts)
        if call.name == "export::access_subclass_inner_tensor" and len(parts) == 1:
            # torch.export takes a tensor of a class of torchao's apart: each part for itself.
            parts = {node: stored(traced_value(node))}
        made = [Weight.of(node, info, parts, k) for k, info in enumerate(call.outputs)]
        quantises = quantisation_of(call.name) is not None
        result = apply_rule(call) if call.operands and not quantises else None
        if isinstance(result, Alias):
            value = result.operand.value
            views = zip(result.changes, call.outputs, strict=True)
            made = [value.view(change, parts, info.shape) for change, info in views]
        elif len(targets) == len(call.outputs):
            made = [replace(target.value, parts=parts) for target in targets]
        for target in targets:
            self._memory.join(target.value, parts)
        self._give(node, made)

    def _alias(self, alias: Alias, node: fx.Node, shown: Sequence[TensorInfo], first: int) -> Value:
        """What a node gives whose results from number ``first`` on are views, ``shown``."""
        value = alias.operand.value
        if isinstance(value, Feature):
            views: list[Value] = [
                Feature(value.base, change(value.layout)) for change in alias.changes
            ]
        else:
            views = [
                value.view(change, value.parts, info.shape)
                for change, info in zip(alias.changes, shown, strict=True)
            ]
        self._belongs(node, value)
        traced = traced_value(node)
        others = len(flat_tensors(traced)) - first - len(views)
        return mirrored(traced, [None] * first + views + [None] * others)

    def _belongs(self, node: fx.Node, value: Value) -> None:
        """An alias is listed with the operator that wrote its base tensor."""
        current = value if isinstance(value, tuple) else self._memory.current(value)
        if isinstance(current, Feature) and (op := self.bases[current.base].op) is not None:
            self.drafts[op].nodes.append(node)

    # -- operators --------------------------------------------------------------------------

    def _are_features(self, spec: Spec) -> bool:
        return all(isinstance(reading.operand.value, Feature) for reading in spec.reads)

    def _draft(self, node: fx.Node, call: Call, spec: Spec) -> int:
        several = len(call.outputs) > 1
        joint = several and spec.stored_as is None
        info, bits = self.bases.joint(call.outputs) if several else (call.outputs[0], None)
        if spec.stored_as is not None:
            info = TensorInfo(spec.stored_as.shape, info.dtype)
        base = self.bases.add(info, self.bases.batch_of(spec, info), len(self.drafts), bits)
        features = [reading.operand for reading in spec.reads]
        direct = len(features) == 1 and features[0].value.layout == Layout.of(
            self.bases[features[0].value.base].info.shape
        )
        draft = Draft(
            kind=spec.kind,
            target=str(node.target) if isinstance(node.target, str) else call.name,
            module=module_path(node),
            reads=[(o, Window.whole()) for o in dict.fromkeys(f.value.base for f in features)],
            writes=base,
            nodes=[node],
            spec=spec,
            weights=_weights(call, spec),
            in_place=False,
            reason=spec.reason,
            direct=direct,
            joint=joint,
            calls=[(node, [(o.node, o.value) for o in call.activations])],
            macs=self.bases.per_sample(base, spec.macs),
        )
        self.drafts.append(draft)
        return base

    # -- writes -----------------------------------------------------------------------------

    def _info(self, value: Feature | Weight) -> TensorInfo:
        """The tensor that a value is a view of."""
        return self.bases[value.base].info if isinstance(value, Feature) else value.info

    def _are_tensors(self, targets: Sequence[Operand]) -> bool:
        """Whether all that a call writes are tensors, each of them another, and no parts of any."""
        places = {place_of(target.value) for target in targets}
        return len(places) == len(targets) and all(
            covers(target.value.layout, (old := self._info(target.value)).shape)
            and old.dtype == target.info.dtype  # x.real shows half of each element
            for target in targets
        )

    def _overwrite(self, node: fx.Node, call: Call) -> None:
        """``x[index] = value``, ``fill_`` and ``copy_``: new elements in an existing tensor."""
        operands = call.operands
        if not operands:
            return
        target, *sources = operands
        value = target.value
        part = part_written(call, value.layout)
        if 0 in (value.layout if part is None else part).shape:
            self._give(node, [value])  # nothing is written
        elif isinstance(value, Feature) and [s.value for s in sources] == [
            part and replace(value, layout=part)
        ]:
            # ``x[index] += value`` ends with a copy of the part to where it is.
            self._give(node, [value])
            self._belongs(node, value)
        elif isinstance(value, Weight) and all(source.weight for source in sources):
            for source in sources:
                self._memory.join(value, source.value.parts)
            self._give(node, [value])
        else:
            # A constant that is filled with feature maps becomes one.
            parts: dict[fx.Node, Stored] = {}
            for operand in operands:
                parts.update(operand.value.parts if operand.weight else {})
            if isinstance(value, Weight):
                parts.pop(value.root[0], None)  # what it overwrites it does not read
            features = [source for source in sources if not source.weight]
            self._anew(node, [target], features, "copy", Stored.sum(parts.values()))

    def _anew(
        self,
        node: fx.Node,
        targets: Sequence[Operand],
        sources: Sequence[Operand],
        kind: str,
        weights: Stored,
        macs: int | None = 0,
    ) -> None:
        """Makes the tensors, parts of which a call writes, by one operator: a call has one."""
        written = {place_of(target.value): target.value for target in targets}
        infos = [self._info(value) for value in written.values()]
        info, bits = (infos[0], None) if len(infos) == 1 else self.bases.joint(infos)
        old = [value for value in written.values() if isinstance(value, Feature)]
        features = [*old, *(source.value for source in sources)]
        read = [feature.base for feature in features]
        base = self._copy(node, info, read, kind, weights, bits, macs)
        for value in written.values():
            self._memory.write(value, base, whole=True, alone=len(written) == 1)
        results = flat_tensors(traced_value(node))
        parts: list[Value | None] = [self._memory.current(target.value) for target in targets]
        if len(parts) != len(results):
            parts = [Feature(base, Layout.opaque(tensor_info(r).shape)) for r in results]
        self._give(node, parts)

    def _copy(
        self,
        node: fx.Node,
        info: TensorInfo,
        sources: list[int],
        kind: str,
        weights: Stored,
        bits: int | None,
        macs: int | None,
    ) -> int:
        reason = "writes into a part of a tensor in place: it reads its whole inputs"
        spec = Spec(kind, (), reason=reason)
        like = self.bases[sources[0]]
        same = like.info.shape == info.shape
        batch = like.batch if same else self.bases.guess_batch(info)
        base = self.bases.add(info, batch, len(self.drafts), bits)
        reads = [(source, Window.whole()) for source in dict.fromkeys(sources)]
        draft = Draft(
            kind, kind, module_path(node), reads, base, [node], spec, weights, False, reason
        )
        draft.macs = self.bases.per_sample(base, macs)
        self.drafts.append(draft)
        return base


def _is_returned(node: fx.Node) -> bool:
    """Whether something of a call's result is a result of the network."""
    return any(
        user.op == "output" or any(item.op == "output" for item in user.users)
        for user in node.users
    )


def _position(node: fx.Node, index: int) -> int:
    """Where item ``index`` of a result stands among its tensors; a backward leaves some out."""
    return len(flat_tensors(list(traced_value(node))[:index]))


def _weights(call: Call, spec: Spec) -> Stored:
    """The weights that an operator reads, each once."""
    if spec.weights is not None:
        return spec.weights
    parts: dict[fx.Node, Stored] = {}
    for operand in call.operands:
        if operand.weight:
            parts.update(operand.value.parts)
    return Stored.sum(parts.values())
