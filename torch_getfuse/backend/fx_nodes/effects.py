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
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.fx_nodes.autocast import OUTSIDE, is_switch, modes_of
from torch_getfuse.backend.fx_nodes.per_target import PerTarget
from torch_getfuse.backend.fx_nodes.targets import resolve, target_of
from torch_getfuse.backend.fx_nodes.values import STANDS_FOR, is_plain, traced_value
from torch_getfuse.backend.torch_private import (
    DropoutBase,
    OpOverload,
    OpOverloadPacket,
    schema_of,
    storage_key,
    tree_leaves,
    unwrapped,
)

_UNKNOWN = "unknown"  # the one storage of all values that carry no fake tensor
_GENERATOR = "generator"  # the state of the random-number generator

CHANGES_OF_SHAPE = frozenset(
    {"as_strided_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_", "unsqueeze_"}
)
# Changes of a tensor's shape and storage, which the fake tensors show only as they end, and of the
# seed may not be reordered with anything.
_BARRIERS = CHANGES_OF_SHAPE | {"set_", "resize_", "resize_as_", "manual_seed"}
# Nor may changes of how all that follows is computed, vmap and the like, but for the switches of
# autocast and grad mode that modes.py knows.
_MODES = tuple(
    f"_{name}_" for name in ("set", "enter", "exit", "saved_tensors_hooks", "vmap", "grad")
)

_IN_PLACE = frozenset(
    {"setitem", "delitem", "iconcat"}
    | {f"i{name}" for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod")}
    | {f"i{name}" for name in ("pow", "and", "or", "xor", "lshift", "rshift")}
)  # of the module operator
_IN_PLACE_DUNDERS = frozenset(f"__{name}__" for name in _IN_PLACE)
_TRAINING_FLAGS = ("training", "train", "use_input_stats")
# Functions of torch's that draw, and that no operator has the name of.
_RANDOM_FUNCTIONS = frozenset(
    {"dropout1d", "dropout2d", "dropout3d", "gumbel_softmax", "multi_head_attention_forward"}
    | {"fractional_max_pool2d_with_indices", "fractional_max_pool3d_with_indices"}
    | {"svd_lowrank", "pca_lowrank", "lobpcg"}
)
_RANDOM_MODULES = (DropoutBase, torch.nn.RReLU, torch.nn.RNNBase)


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
    storages = Storages(gm)
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
    storages = Storages(gm)
    kept = storages.of_all([node for node in nodes if node.op in ("placeholder", "get_attr")])
    return any(is_barrier(node) or storages.written(node) & (kept | {_GENERATOR}) for node in nodes)


def input_storages(gm: fx.GraphModule) -> tuple[dict[int, int], set[int]]:
    """The storages of a graph's inputs by position, numbered, and the numbers of those written.

    Of plain tensors with memory; equal numbers where two share a storage in the trace.
    """
    storages = Storages(gm)
    written = frozenset[Hashable]().union(*map(storages.written, gm.graph.nodes))
    found: dict[int, int] = {}
    numbers: dict[Hashable, int] = {}
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = traced_value(node)
        if isinstance(value, torch.Tensor) and is_plain(value) and value.device.type != "meta":
            found[position] = numbers.setdefault(storage_of(value), len(numbers))
    return found, {number for storage, number in numbers.items() if storage in written}


def results_share(gm: fx.GraphModule) -> bool:
    """Whether two results of a graph, or a result and an input, may have memory in common."""
    storages = Storages(gm)
    kept = storages.of_all([node for node in gm.graph.nodes if node.op == "placeholder"])
    for node in gm.graph.output_node().all_input_nodes:
        own = storages.of_all([node])
        if node.op != "placeholder" and own & kept:
            return True
        kept |= own
    return False


def written_at(gm: fx.GraphModule) -> dict[fx.Node, list[int]]:
    """Value -> positions of the nodes that may write to a storage of it; left out for none."""
    storages = Storages(gm)
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
    storages = Storages(gm)
    shown: dict[Hashable, list[fx.Node]] = {}
    for node in nodes[:-1]:
        for storage in storages.of_all([node]):
            shown.setdefault(storage, []).append(node)
    modes, _ = modes_of(gm.graph)
    changes = [i for i, node in enumerate(nodes) if _changes_mode(node)]
    into = "writes into one of its arguments"

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
            return into
        told = isinstance(node.target, OpOverload) and schema_of(node.target).is_mutable
        impure = not told and node.is_impure(impure_random=False)
        return "has an effect of its own" if impure and not written else ""

    inside = ("call_function", "call_method", "call_module")
    found = {
        node: effect(i, node)
        for i, node in enumerate(nodes)
        if node.op in inside and not is_switch(node)
    }
    # A write into a value of the graph's own is none where nothing comes of it.
    live: set[fx.Node] = set()
    pending = [nodes[-1], *(node for node, words in found.items() if words not in ("", into))]
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending += node.all_input_nodes
    return {n: words for n, words in found.items() if words and (words != into or n in live)}


def attribute(gm: fx.GraphModule, path: str) -> Any:
    """The module, parameter, buffer or object at ``path`` of ``gm``."""
    return functools.reduce(getattr, path.split("."), gm)


class Storages:
    """The storages of each value of a graph, and those that a node writes."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._found: dict[fx.Node, frozenset[Hashable]] = {}
        # The trace gives what an idle dropout returns, and so all views of that, another storage.
        self._behind: dict[Hashable, frozenset[Hashable]] = {}
        for node in filter(returns_input, gm.graph.nodes):
            own = self._of(node)
            self._behind.update((storage, own) for storage in own)

    def of_all(self, values: Sequence[fx.Node]) -> frozenset[Hashable]:
        """The storages of ``values``; two values with one in common may alias."""
        return frozenset[Hashable]().union(*map(self._of, values))

    def _of(self, node: fx.Node) -> frozenset[Hashable]:
        found = self._found.get(node)
        if found is None:
            shown = frozenset(self._find(node))
            found = shown.union(*(self._behind.get(storage, ()) for storage in shown))
            self._found[node] = found
        return found

    def _find(self, node: fx.Node) -> Iterator[Hashable]:
        known = False
        for key in ("example_value", "val"):
            if key in node.meta:
                known = True
                for value in tree_leaves(node.meta[key]):
                    if isinstance(value, torch.Tensor):
                        yield storage_of(value)
        yield from map(storage_of, node.meta.get(STANDS_FOR, ()))
        if node.op == "get_attr":
            value = attribute(self._gm, str(node.target))
            if isinstance(value, torch.Tensor):
                # Not the fake storage above, but the same for every path to this attribute.
                yield ("attribute", storage_of(value))
        if not known:
            yield _UNKNOWN
        if returns_input(node):
            yield from self._of(node.all_input_nodes[0])

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
            written |= {("attribute", storage_of(buffer)) for buffer in module.buffers()}
            if not known or any(isinstance(part, _RANDOM_MODULES) for part in parts):
                written |= {_GENERATOR}
        return written


def storage_of(value: torch.Tensor) -> Hashable:
    """What tensors that may share memory have in common; the same for all that are not plain."""
    value = unwrapped(value)
    return storage_key(value) if is_plain(value) else _UNKNOWN


def is_barrier(node: fx.Node) -> bool:
    """True where ``node`` may not be reordered with anything (vmap, a change of storage, ...).

    Switches of autocast and grad mode are none: the nodes between them know their mode.
    """
    called = node.op in ("call_function", "call_method")
    return called and (target_of(node).name in _BARRIERS or _changes_mode(node))


def _changes_mode(node: fx.Node) -> bool:
    if node.op != "call_function" or isinstance(node.target, OpOverload | OpOverloadPacket):
        return False
    name = target_of(node).name
    return (name.startswith(_MODES) or name == "set_grad_enabled") and not is_switch(node)


def changes_mode(gm: fx.GraphModule) -> bool:
    """Whether a graph changes how its operators are computed: autocast, grad mode, vmap, ..."""
    modes, last = modes_of(gm.graph)
    return any(mode != OUTSIDE for mode in (last, *modes.values())) or any(
        map(_changes_mode, gm.graph.nodes)
    )


@PerTarget
def _defaults(target: Any) -> Mapping[str, Any]:
    """Parameters of a function, operator or method in their order, with their defaults.

    Of builtins and methods, those of the operator that has their name.
    """
    if not isinstance(target, str | OpOverload | OpOverloadPacket):
        try:
            parameters = inspect.signature(target).parameters
            return {name: parameter.default for name, parameter in parameters.items()}
        except (TypeError, ValueError):
            pass
    overloads = resolve(target).overloads
    return {a.name: a.default_value for a in schema_of(overloads[0]).arguments} if overloads else {}


def _arguments(node: fx.Node) -> Mapping[str, Any]:
    """Parameter name -> argument, or its default."""
    defaults = _defaults(node.target)
    return {**defaults, **dict(zip(defaults, node.args, strict=False)), **node.kwargs}


def _nodes_in(value: object) -> list[fx.Node]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, fx.Node)]


def _mutated(node: fx.Node) -> list[fx.Node]:
    """The arguments that ``node`` writes to; all of them where that is not known."""
    target = target_of(node)
    if not target.known:
        return node.all_input_nodes
    first = node.args[:1] or list(node.kwargs.values())[:1]
    if target.plain:
        return _nodes_in(first) if target.name in _IN_PLACE else []
    written = _nodes_in(node.kwargs.get("out"))
    if _is_idle_dropout(node):
        return written
    if isinstance(node.target, OpOverload | OpOverloadPacket):
        in_place = False  # its schema says all
    else:
        in_place = target.name.endswith("_") and not target.name.endswith("__")
    if in_place or target.name in _IN_PLACE_DUNDERS:
        return written + _nodes_in(first)  # foreach operators take a list of tensors first
    arguments = _arguments(node)
    if arguments.get("inplace") or arguments.get("max_norm") is not None:
        return node.all_input_nodes  # F.relu(x, inplace=True); F.embedding rescales its weight
    names = {
        argument.name
        for overload in target.overloads
        for argument in schema_of(overload).arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    if _keeps_statistics(target.name) and _in_training(arguments):
        # Most schemas do not say that running statistics are written.
        names |= {parameter for parameter in arguments if parameter.startswith("running_")}
    return written + _nodes_in([arguments.get(parameter) for parameter in names])


def _is_idle_dropout(node: fx.Node) -> bool:
    """Dropout that is not training is the identity, also where it would be in place."""
    return "dropout" in target_of(node).name and not _in_training(_arguments(node))


def _keeps_statistics(name: str) -> bool:
    return ("batch_norm" in name or "instance_norm" in name) and "no_training" not in name


def _in_training(arguments: Mapping[str, Any]) -> bool:
    """False only where a flag says so; a flag that is computed at run time says nothing."""
    return all(arguments.get(flag) is not False for flag in _TRAINING_FLAGS)


def _is_random(node: fx.Node) -> bool:
    target = target_of(node)
    if not target.known:
        return True
    if target.name not in _RANDOM_FUNCTIONS and not any(map(_draws, target.overloads)):
        return False
    arguments = _arguments(node)
    if "dropout_p" in arguments:
        return bool(arguments["dropout_p"] != 0) and _in_training(arguments)
    return _in_training(arguments)


def returns_input(node: fx.Node) -> bool:
    """Whether a dropout that drops nothing gives the very tensor it was given: fakes are copies."""
    if node.op not in ("call_function", "call_method"):
        return False
    if "dropout" not in target_of(node).name or not node.all_input_nodes:
        return False
    arguments = _arguments(node)
    return not arguments.get("p") or not _in_training(arguments) or not _is_random(node)


def _draws(overload: OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in overload.tags
