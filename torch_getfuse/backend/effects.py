"""What the nodes of an FX graph do besides computing a value, as edges of order.

Data edges alone allow orders that compute something else. The others are:

* mutation: a write to a storage runs after all earlier readers of it, and before all later
  ones; aliases are found through the storages of the traced fake tensors;
* random numbers: nodes that draw from the generator keep their order among themselves;
* global state (grad mode, autocast): a barrier that nothing crosses.

Where torch does not say what a target does, the worst is assumed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils import _pytree as pytree

from torch_getfuse.backend.fx_values import is_plain
from torch_getfuse.backend.modes import OUTSIDE, is_switch, modes_of

_UNKNOWN = "unknown"  # the one storage of all values that carry no fake tensor
_GENERATOR = "generator"  # the state of the random-number generator

# Changes of which storage a tensor has, which the fake tensors show only as they end, and of the
# seed may not be reordered with anything.
_BARRIERS = frozenset({"set_", "resize_", "resize_as_", "manual_seed"})
# Nor may changes of how all that follows is computed, vmap and the like, but for the switches of
# autocast and grad mode that modes.py knows.
_MODES = tuple(
    f"_{name}_" for name in ("set", "enter", "exit", "saved_tensors_hooks", "vmap", "grad")
)

_IN_PLACE_OPERATORS = frozenset(
    {"setitem", "delitem", "iconcat"}
    | {f"i{name}" for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod")}
    | {f"i{name}" for name in ("pow", "and", "or", "xor", "lshift", "rshift")}
)
_IN_PLACE_DUNDERS = frozenset(f"__{name}__" for name in _IN_PLACE_OPERATORS)
# Python functions from elsewhere (allow_in_graph) may do anything to their arguments.
_KNOWN_ROOTS = frozenset({"torch", "_operator", "operator", "builtins", "math"})
_TRAINING_FLAGS = ("training", "train", "use_input_stats")
_DROPOUTS = frozenset(
    {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"}
    | {"feature_dropout", "feature_alpha_dropout"}
)
_RANDOM_FUNCTIONS = frozenset({"dropout1d", "dropout2d", "dropout3d", "gumbel_softmax"})
_RANDOM_MODULES = (torch.nn.modules.dropout._DropoutNd, torch.nn.RReLU, torch.nn.RNNBase)


def order_edges(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> list[set[int]]:
    """For each node, the positions of earlier nodes that must run before it.

    Args:
        gm: the module that the attributes of its graph belong to.
        nodes: nodes of ``gm.graph`` in their order there.

    Returns:
        Enough edges that their transitive closure is the whole order.
    """
    index = {node: i for i, node in enumerate(nodes)}
    before = [{index[s] for s in node.all_input_nodes if s in index} for node in nodes]
    storages = _Storages(gm)
    writes = [storages.written(node) for node in nodes]
    watched = frozenset[Hashable]().union(*writes)
    last_write: dict[Hashable, int] = {}
    reads_since: dict[Hashable, list[int]] = {}
    barrier = -1
    for i, node in enumerate(nodes):
        earlier = before[i]
        if barrier >= 0:
            earlier.add(barrier)
        if is_barrier(node):
            earlier.update(range(max(barrier, 0), i))
            barrier = i
        read = storages.of_all(node.all_input_nodes) & watched if watched else ()
        for storage in (*read, *writes[i]):
            if storage in last_write:
                earlier.add(last_write[storage])
        for storage in writes[i]:
            earlier.update(reads_since.pop(storage, ()))
            last_write[storage] = i
        for storage in read:
            if storage not in writes[i]:
                reads_since.setdefault(storage, []).append(i)
    return before


def changes_state(gm: fx.GraphModule) -> bool:
    """Whether running a graph leaves something changed: an input, an attribute, random numbers.

    Of modes, see :func:`changes_mode`.
    """
    nodes = list(gm.graph.nodes)
    storages = _Storages(gm)
    kept = storages.of_all([node for node in nodes if node.op in ("placeholder", "get_attr")])
    return any(is_barrier(node) or storages.written(node) & (kept | {_GENERATOR}) for node in nodes)


def results_share(gm: fx.GraphModule) -> bool:
    """Whether two results of a graph, or a result and an input, may have memory in common."""
    storages = _Storages(gm)
    kept = storages.of_all([node for node in gm.graph.nodes if node.op == "placeholder"])
    for node in gm.graph.output_node().all_input_nodes:
        own = storages.of_all([node])
        if node.op != "placeholder" and own & kept:
            return True
        kept |= own
    return False


def writers(gm: fx.GraphModule, value: fx.Node) -> list[fx.Node]:
    """The nodes of ``gm`` that may write to a storage of ``value``, in their order."""
    storages = _Storages(gm)
    own = storages.of_all([value])
    return [node for node in gm.graph.nodes if storages.written(node) & own]


def written_at(gm: fx.GraphModule) -> dict[fx.Node, list[int]]:
    """Value -> positions of the nodes that may write to a storage of it; left out for none."""
    storages = _Storages(gm)
    at: dict[Hashable, list[int]] = {}
    for i, node in enumerate(gm.graph.nodes):
        for storage in storages.written(node):
            at.setdefault(storage, []).append(i)
    found = {
        node: sorted(i for storage in storages.of_all([node]) for i in at.get(storage, ()))
        for node in (gm.graph.nodes if at else ())
        if node.op != "output"
    }
    return {node: positions for node, positions in found.items() if positions}


def effects_in_words(gm: fx.GraphModule, calls: Container[fx.Node]) -> dict[fx.Node, str]:
    """What running a node does, or depends on, besides its value; the others are left out.

    Args:
        gm: a graph with traced values.
        calls: may be computed out of place where they write over their first argument, if nobody
            can tell: it is no input or attribute of the graph, and neither it nor a view of it is
            read later under an older name.
    """
    nodes = list(gm.graph.nodes)
    at = {node: i for i, node in enumerate(nodes)}
    storages = _Storages(gm)
    shown: dict[Hashable, list[fx.Node]] = {}
    for node in nodes[:-1]:
        for storage in storages.of_all([node]):
            shown.setdefault(storage, []).append(node)
    modes, _ = modes_of(gm.graph)
    changes = [i for i, node in enumerate(nodes) if _changes_mode(node)]

    def effect(i: int, node: fx.Node) -> str:
        if changes and changes[0] <= i <= changes[-1]:
            return "runs inside of a transform of functions (vmap or the like)"
        if modes[node] != OUTSIDE:
            return "runs under an autocast or a grad mode of its own"
        if is_barrier(node):
            return "changes what all that follows depends on"
        written = storages.written(node)
        if _GENERATOR in written:
            return "draws random numbers"
        aliases = dict.fromkeys(other for storage in written for other in shown.get(storage, ()))
        for other in aliases:
            if other.op in ("placeholder", "get_attr"):
                return f"changes {other.name}, an input or attribute of the model, in place"
        for other in aliases:
            late = [user for user in other.users if at[user] > i]
            if at[other] < i and late:
                reads = "is returned" if late[0].op == "output" else f"{late[0].name} reads"
                return f"writes over {other.name}, which {reads} afterwards"
        if written and (node not in calls or _mutated(node) != node.all_input_nodes[:1]):
            return "writes into one of its arguments"
        told = isinstance(node.target, OpOverload) and node.target._schema.is_mutable
        impure = not told and node.is_impure(impure_random=False)
        return "has an effect of its own" if impure and not written else ""

    inside = ("call_function", "call_method", "call_module")
    found = {
        node: effect(i, node)
        for i, node in enumerate(nodes)
        if node.op in inside and not is_switch(node)
    }
    return {node: words for node, words in found.items() if words}


def attribute(gm: fx.GraphModule, path: str) -> Any:
    """The module, parameter, buffer or object at ``path`` of ``gm``."""
    return functools.reduce(getattr, path.split("."), gm)


class _Storages:
    """The storages of each value of a graph, and those that a node writes."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._found: dict[fx.Node, frozenset[Hashable]] = {}

    def of_all(self, values: Sequence[fx.Node]) -> frozenset[Hashable]:
        """The storages of ``values``; two values with one in common may alias."""
        return frozenset[Hashable]().union(*map(self._of, values))

    def _of(self, node: fx.Node) -> frozenset[Hashable]:
        found = self._found.get(node)
        if found is None:
            found = self._found[node] = frozenset(self._find(node))
        return found

    def _find(self, node: fx.Node) -> Iterator[Hashable]:
        known = False
        for key in ("example_value", "val"):
            if key in node.meta:
                known = True
                for value in pytree.tree_leaves(node.meta[key]):
                    if isinstance(value, torch.Tensor):
                        yield _storage(value)
        if node.op == "get_attr":
            value = attribute(self._gm, str(node.target))
            if isinstance(value, torch.Tensor):
                # Not the fake storage above, but the same for every path to this attribute.
                yield ("attribute", _storage(value))
        if not known:
            yield _UNKNOWN

    def written(self, node: fx.Node) -> frozenset[Hashable]:
        """The storages that ``node`` writes, and ``_GENERATOR`` where it draws from it."""
        if node.op == "call_module":
            return self._written_by_module(node)
        if node.op not in ("call_function", "call_method"):
            return frozenset()
        written = self.of_all(_mutated(node))
        return written | {_GENERATOR} if _is_random(node) else written

    def _written_by_module(self, node: fx.Node) -> frozenset[Hashable]:
        """A leaf module may write its own buffers when training, and its inputs if in place."""
        module = attribute(self._gm, str(node.target))
        parts = list(module.modules())
        known = all(type(part).__module__.startswith("torch.nn.") for part in parts)
        written: frozenset[Hashable] = frozenset()
        if not known or any(getattr(part, "inplace", False) for part in parts):
            written |= self.of_all(node.all_input_nodes)
        if any(part.training for part in parts):
            written |= {("attribute", _storage(buffer)) for buffer in module.buffers()}
            if not known or any(isinstance(part, _RANDOM_MODULES) for part in parts):
                written |= {_GENERATOR}
        return written


def _storage(value: torch.Tensor) -> Hashable:
    while torch._C._functorch.is_functorch_wrapped_tensor(value):  # inside of vmap or grad
        value = torch._C._functorch.get_unwrapped(value)
    return int(value.untyped_storage()._cdata) if is_plain(value) else _UNKNOWN


def _name(node: fx.Node) -> str:
    """The bare name of a function or method: ``add_``, whichever way it is called."""
    target = node.target
    if isinstance(target, OpOverload):
        return target._schema.name.rpartition("::")[2]
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def is_barrier(node: fx.Node) -> bool:
    """True where ``node`` may not be reordered with anything (vmap, a change of storage, ...).

    Switches of autocast and grad mode are none: the nodes between them know their mode.
    """
    called = node.op in ("call_function", "call_method")
    return called and (_name(node) in _BARRIERS or _changes_mode(node))


def _changes_mode(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and not isinstance(node.target, OpOverload | OpOverloadPacket)
        and (_name(node).startswith(_MODES) or _name(node) == "set_grad_enabled")
        and not is_switch(node)
    )


def changes_mode(gm: fx.GraphModule) -> bool:
    """Whether a graph changes how its operators are computed: autocast, grad mode, vmap, ..."""
    modes, last = modes_of(gm.graph)
    return any(mode != OUTSIDE for mode in (last, *modes.values())) or any(
        map(_changes_mode, gm.graph.nodes)
    )


@dataclass(frozen=True, slots=True)
class _Signature:
    """Parameters of a call target: their defaults in order, and which of them it writes."""

    defaults: Mapping[str, Any]
    written: frozenset[str]

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def of(cls, target: Any) -> _Signature | None:
        """Of a function, operator or method name; builtins show that of the ATen operator."""
        if not isinstance(target, str | OpOverload | OpOverloadPacket):
            try:
                parameters = inspect.signature(target).parameters
                return cls({name: p.default for name, p in parameters.items()}, frozenset())
            except (TypeError, ValueError):
                target = getattr(target, "__name__", "")
        if isinstance(target, str):
            target = _aten(target)
        if target is None:
            return None
        schemas = [overload._schema for overload in _overloads(target)]
        return cls(
            {a.name: a.default_value for a in schemas[0].arguments},
            frozenset(
                a.name
                for schema in schemas
                for a in schema.arguments
                if a.alias_info is not None and a.alias_info.is_write
            ),
        )

    def bind(self, node: fx.Node) -> dict[str, Any]:
        """Parameter name -> argument, or its default."""
        return {**self.defaults, **dict(zip(self.defaults, node.args)), **node.kwargs}


def _overloads(target: OpOverload | OpOverloadPacket) -> list[OpOverload]:
    if isinstance(target, OpOverload):
        return [target]
    return [getattr(target, name) for name in target.overloads()]


def _nodes_in(value: object) -> list[fx.Node]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Node)]


def _aten(name: str) -> OpOverloadPacket | None:
    found = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    return found if isinstance(found, OpOverloadPacket) else None


def _mutated(node: fx.Node) -> list[fx.Node]:
    """The arguments that ``node`` writes to; all of them where that is not known."""
    name, target, everything = _name(node), node.target, node.all_input_nodes
    written = _nodes_in(node.kwargs.get("out"))
    if isinstance(target, HigherOrderOperator):
        return everything
    if _is_idle_dropout(node):
        return written
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or name in _IN_PLACE_OPERATORS or name in _IN_PLACE_DUNDERS:
        # Foreach operators take a list of tensors first.
        return written + _nodes_in(node.args[:1] or list(node.kwargs.values())[:1])
    if node.op == "call_function" and not isinstance(target, OpOverload | OpOverloadPacket):
        root = (getattr(target, "__module__", None) or "torch").partition(".")[0]
        if root not in _KNOWN_ROOTS:
            return everything
    signature = _Signature.of(target)
    if signature is None:
        return written
    arguments = signature.bind(node)
    if arguments.get("inplace") or arguments.get("max_norm") is not None:
        return everything  # F.relu(x, inplace=True); F.embedding rescales its weight
    names = set(signature.written)
    if _keeps_statistics(name) and _in_training(arguments):
        # Most schemas do not say that running statistics are written.
        names |= {parameter for parameter in arguments if parameter.startswith("running_")}
    return written + _nodes_in([arguments.get(parameter) for parameter in names])


def _is_idle_dropout(node: fx.Node) -> bool:
    """Dropout that is not training is the identity, also where it would be in place."""
    if _name(node).removesuffix("_") not in _DROPOUTS:
        return False
    signature = _Signature.of(node.target)
    return signature is not None and not _in_training(signature.bind(node))


def _keeps_statistics(name: str) -> bool:
    return ("batch_norm" in name or "instance_norm" in name) and "no_training" not in name


def _in_training(arguments: Mapping[str, Any]) -> bool:
    """False only where a flag says so; a flag that is computed at run time says nothing."""
    return all(arguments.get(flag) is not False for flag in _TRAINING_FLAGS)


def _is_random(node: fx.Node) -> bool:
    if isinstance(node.target, HigherOrderOperator):
        return True
    target, name = node.target, _name(node)
    if not (isinstance(target, OpOverload) and _draws(target)) and not _draws_by_name(name):
        return False
    signature = _Signature.of(target)
    arguments = {} if signature is None else signature.bind(node)
    if "dropout_p" in arguments:
        return bool(arguments["dropout_p"] != 0)
    return _in_training(arguments)


def _draws(overload: OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in overload.tags


@functools.lru_cache(maxsize=4096)
def _draws_by_name(name: str) -> bool:
    """True where the ATen operator of that name draws random numbers, in any overload."""
    packet = _aten(name)
    return name in _RANDOM_FUNCTIONS or (
        packet is not None and any(map(_draws, _overloads(packet)))
    )
