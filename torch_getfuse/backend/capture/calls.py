"""What an FX call is called with: its arguments by name, with operands in the place of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.capture.bases import Bases
from torch_getfuse.backend.capture.graph_values import Value, Weight
from torch_getfuse.backend.capture.memory import Memory
from torch_getfuse.backend.fx_nodes.effects import attribute
from torch_getfuse.backend.fx_nodes.normalize import Invocation, full_name, normalise
from torch_getfuse.backend.fx_nodes.values import size_hint, tensor_info, traced_value
from torch_getfuse.backend.rules.registry import apply_rule, positional
from torch_getfuse.backend.rules.rule import Alias, Call, Operand, Stored
from torch_getfuse.backend.rules.view_windows import Layout
from torch_getfuse.backend.torch_private import FakeScriptObject, script_class


class Calls:
    """Reads the calls of one graph.

    Args:
        owner: the graph's module, which holds its attributes.
        values: what each node gives, of the nodes so far.
        memory: what these show after writes.
        bases: the tensors so far.
    """

    def __init__(
        self,
        owner: fx.GraphModule,
        values: Mapping[fx.Node, Value],
        memory: Memory,
        bases: Bases,
    ) -> None:
        self._owner, self._values, self._memory, self._bases = owner, values, memory, bases

    def invocation(self, node: fx.Node) -> Invocation:
        """What is called, and its arguments as they stand in the graph."""
        if node.op == "call_module":
            name = full_name(type(self._owner.get_submodule(str(node.target))))
            return Invocation(name, {"input": node.args})
        return normalise(node, positional)

    def hidden_class(self, node: fx.Node) -> str:
        """The class of an argument that holds its tensors where nobody sees them; else empty."""
        for source in node.all_input_nodes:
            value = traced_value(source)
            if source.op == "get_attr":
                value = attribute(self._owner, str(source.target))
            if isinstance(value, (torch.ScriptObject, FakeScriptObject)):
                return script_class(value)
        return ""

    def argument(self, value: Any) -> Any:
        """Tensors become operands, symbolic numbers their hints, other nodes ``None``."""
        if isinstance(value, fx.Node):
            held = self._values.get(value)
            if held is not None:
                return self.operand(value, held, traced_value(value))
            value = traced_value(value)
        if isinstance(value, torch.SymInt):
            return size_hint(value)
        if isinstance(value, tuple):
            return tuple(self.argument(item) for item in value)
        if isinstance(value, list):
            return [self.argument(item) for item in value]
        if isinstance(value, dict):
            return {key: self.argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(self.argument(x) for x in (value.start, value.stop, value.step)))
        return None if isinstance(value, (fx.Node, torch.Tensor)) else value

    def operand(self, node: fx.Node, value: Value, traced: Any) -> Any:
        """The operand, or operands in the structure of ``traced``, that a node is."""
        if isinstance(value, tuple):
            pairs = zip(value, traced, strict=True)
            return tuple(None if v is None else self.operand(node, v, t) for v, t in pairs)
        info = tensor_info(traced)
        current = self._memory.current(value)
        if 0 in info.shape:
            current = Weight.of(node, info, {})
        if isinstance(current, Weight):
            return Operand(node, info, True, Stored.sum(current.parts.values()), value=current)
        found = self._bases.find_batch(current)
        return Operand(node, info, batch=found[0] if found else None, value=current)


def overwrites(invocation: Invocation) -> bool:
    """Whether a call does nothing but put values into a tensor.

    ``torch.export`` records ``x[mask] = value`` as ``index_put_``, and with views alone in the
    index as ``copy_`` or ``fill_``.
    """
    if invocation.name == "index_put":
        return invocation.mutates and not invocation.args.get("accumulate")
    return invocation.name == "setitem" or (
        invocation.mutates and invocation.name in ("copy", "fill")
    )


def part_written(call: Call, target: Layout) -> Layout | None:
    """What an overwriting call writes of its target; ``None`` where an index is no view."""
    if call.name != "setitem":
        return None if call.name == "index_put" else target
    index, _ = call.args["*"]
    view = apply_rule(Call("getitem", {"input": call.args["input"], "index": index}, ()))
    return view.changes[0](target) if isinstance(view, Alias) else None
