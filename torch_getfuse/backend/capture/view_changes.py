"""Changes of a tensor's shape in place, as views.

After ``y.squeeze_(0)`` every name of ``y`` is another view of the same memory, and the traced value
of ``y``, one object for all its nodes, has the last shape from the start. So in a copy of the graph
``y.squeeze_(0)`` becomes ``y.squeeze(0)``, which all that comes later reads in the place of ``y``,
and every node has the shape that it gives.

Dynamo lets no input of a graph be changed so by its own name, but by another one (``x.mul_(2)``
returns ``x``) it does. What is left of that for the caller is done after the graph
(:func:`changing_inputs`).

A dropout that drops nothing returns its input, but traces take the two for two tensors. What a
change of one does to the other's shape, and to all that is computed from it, is worked out here.
An exported graph changes its inputs so by their own names as well, and ends with these changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.fx_nodes.effects import (
    CHANGES_OF_SHAPE,
    Storages,
    returns_input,
    storage_of,
)
from torch_getfuse.backend.fx_nodes.targets import target_of
from torch_getfuse.backend.fx_nodes.values import (
    fake_mode_of,
    has_value,
    result_of,
    traced_value,
)
from torch_getfuse.backend.torch_private import (
    OpOverload,
    codegen_of,
    keep_source,
    schema_of,
    tracing,
    tree_leaves,
    tree_map,
)
from torch_getfuse.errors import CaptureError


def without_view_changes(
    gm: fx.GraphModule, example_inputs: Sequence[object] | None = None
) -> fx.GraphModule:
    """``gm`` itself, or a copy of a Dynamo graph in which no value changes its shape in place.

    Args:
        gm: the graph; it is not changed.
        example_inputs: one value per placeholder, with the shapes of a call; needed only where
            an input changes its shape.

    Raises:
        CaptureError: where it is needed and missing.
    """
    if not any(map(_changes_view, gm.graph.nodes)):
        return gm
    objects = _objects(gm.graph)
    changed = {objects[node] for node in gm.graph.nodes if _changes_view(node)}
    examples = iter(example_inputs or ())

    def first_shown(node: fx.Node, new: fx.Node) -> Any:
        """The last shape of an object is its traced value's from the start."""
        value = traced_value(node)
        if node.op == "placeholder":
            example = next(examples, None)
            return _as_given(node, example) if objects[node] in changed else value
        if any(id(leaf) in changed for leaf in tree_leaves(value)):
            return _first_shown(new, value)
        return value

    return _with_views(gm, objects, "example_value", first_shown)


def exported_without_view_changes(gm: fx.GraphModule, *, ending: bool = False) -> fx.GraphModule:
    """``gm`` itself, or a copy of an exported graph in which no value changes its shape in place.

    Args:
        gm: the graph; it is not changed.
        ending: whether the copy ends with these changes of its inputs and attributes. Nothing
            reads them by then.
    """
    if not any(map(_changes_view, gm.graph.nodes)):
        return gm
    objects = _objects(gm.graph)
    copied = _with_views(gm, objects, "val", lambda node, new: traced_value(node))
    if ending:
        _end_alike(copied, gm, objects)
    return copied


def _end_alike(copied: fx.GraphModule, gm: fx.GraphModule, objects: Mapping[fx.Node, int]) -> None:
    """Give the inputs and attributes of a graph the shapes that they have after ``gm``."""
    given = {node.name: node for node in copied.graph.nodes}
    leaves = {
        objects[node]: given[node.name]
        for node in gm.graph.nodes
        if node.op in ("placeholder", "get_attr")
    }
    with copied.graph.inserting_before(copied.graph.output_node()):
        for node in filter(_changes_view, gm.graph.nodes):
            if (leaf := leaves.get(objects[node])) is not None:
                rest, named = fx.map_arg((node.args[1:], node.kwargs), lambda n: given[n.name])
                new = copied.graph.call_method(str(target_of(node).name), (leaf, *rest), named)
                new.meta["val"] = traced_value(leaf)
    copied.recompile()


def _with_views(
    gm: fx.GraphModule,
    objects: Mapping[fx.Node, int],
    key: str,
    first: Callable[[fx.Node, fx.Node], Any],
) -> fx.GraphModule:
    """A copy of a graph with views in the place of changes.

    Args:
        objects: which tensor each node gives.
        key: of the traced values, in the nodes' metadata.
        first: what a node gives that shows no tensor that has changed by then; called with it and
            with its copy.
    """
    changed = {objects[node] for node in gm.graph.nodes if _changes_view(node)}
    doubled = {objects[node] for node in gm.graph.nodes if returns_input(node)}
    graph = fx.Graph()
    graph.set_codegen(codegen_of(gm.graph))
    placed: dict[fx.Node, fx.Node] = {}
    latest: dict[int, fx.Node] = {}  # by object: the node that shows it as it is by now
    untold: set[fx.Node] = set()  # what the trace saw in another shape than it has

    def now(node: fx.Node) -> fx.Node:
        return latest.get(objects[node], placed[node])

    def is_untold(node: fx.Node) -> bool:
        return node in untold or (objects[node] in latest and objects[node] in doubled)

    for node in gm.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], now)).meta = dict(node.meta)
            break
        ours = objects[node] in changed
        if (ours and returns_input(node)) or any(map(is_untold, node.all_input_nodes)):
            untold.add(node)
        if _changes_view(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), now)
            name = str(target_of(node).name)[:-1]
            new = graph.create_node("call_method", name, args, kwargs, name=node.name)
            new.meta = {**node.meta, key: _run(new)}
        else:
            new = graph.node_copy(node, now)
            if ours and objects[node] in latest:
                new.meta[key] = traced_value(latest[objects[node]])
            elif node in untold:
                new.meta[key] = _run(new)
            elif has_value(node):
                new.meta[key] = first(node, new)
        placed[node] = new
        if ours:
            latest[objects[node]] = new
        keep_source(node, new)
    copied = fx.GraphModule(gm, graph)
    copied.meta.update(gm.meta)
    return copied


def changing_inputs(gm: fx.GraphModule, planned: Callable[..., Any]) -> Callable[..., Any]:
    """``planned``, which runs :func:`without_view_changes`, or a callable that ends as ``gm`` does.

    Each input that ``gm`` gives another shape in place has that shape after a call.

    Raises:
        CaptureError: where the shape depends on a size that is known at run time only.
    """
    nodes = [node for node in gm.graph.nodes if _changes_view(node)]
    objects = _objects(gm.graph) if nodes else {}
    inputs = {objects.get(n): i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
    changes: list[tuple[int, str, tuple[Any, ...], dict[str, Any]]] = []
    for node in nodes:
        if objects[node] in inputs:
            if len(node.all_input_nodes) > 1:
                raise CaptureError(
                    f"{node.name} changes the shape of an input in place, by sizes that are "
                    "known at run time only"
                )
            name = str(target_of(node).name)
            changes.append((inputs[objects[node]], name, node.args[1:], dict(node.kwargs)))
    if not changes:
        return planned

    def run(*args: Any) -> Any:
        results = planned(*args)
        for position, name, rest, named in changes:
            getattr(args[position], name)(*rest, **named)
        return results

    return run


def recorded_otherwise(gm: fx.GraphModule) -> list[fx.Node]:
    """Changes of shape in ``gm`` that autograd records otherwise than the views in their place.

    It records a change as a step of the tensor, so that other views of its memory follow from it.
    A view in its place is one more beside them: after a write each is derived anew from the tensor
    by itself, and gradients of three readers add up in another order.
    """
    nodes = list(gm.graph.nodes)
    if not any(map(_changes_view, nodes)):
        return []
    objects, storages = _objects(gm.graph), Storages(gm)
    found = []
    for i, node in enumerate(nodes):
        if _changes_view(node):
            memory = storages.of_all([node])
            viewed = any(
                objects[other] != objects[node] and storages.of_all([other]) & memory
                for other in nodes[:i]
            )
            if viewed or any(storages.written(other) & memory for other in nodes[i + 1 :]):
                found.append(node)
    return found


def _objects(graph: fx.Graph) -> dict[fx.Node, int]:
    """A number for each node; equal where two give one tensor, under two names."""
    same: dict[int, int] = {}
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        value = id(traced_value(node))
        # Traced values are copies: of what a dropout returns, and in an exported graph all.
        source = node.all_input_nodes[0] if returns_input(node) else _returned(node)
        if source is not None:
            same[value] = found[source]
        found[node] = same.get(value, value)
    return found


def _returned(node: fx.Node) -> fx.Node | None:
    """The argument that an operator of an exported graph returns itself."""
    if not isinstance(node.target, OpOverload):
        return None
    schema = schema_of(node.target)
    writes = [r.alias_info is not None and r.alias_info.is_write for r in schema.returns]
    if writes == [True]:
        given = {
            **dict(zip((a.name for a in schema.arguments), node.args, strict=False)),
            **node.kwargs,
        }
        written = (
            a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
        )
        source = given.get(next(written))
        return source if isinstance(source, fx.Node) else None
    return _passed_on(node) if not any(writes) else None


def _passed_on(node: fx.Node) -> fx.Node | None:
    """The argument that an operator returns as it is, and not as a view: ``to`` its own type."""
    value = traced_value(node)
    for source in node.all_input_nodes:
        given = traced_value(source)
        both = isinstance(value, torch.Tensor) and isinstance(given, torch.Tensor)
        if both and storage_of(given) == storage_of(value):
            return source if _run(node) is given else None
    return None


def _changes_view(node: fx.Node) -> bool:
    if (
        node.op not in ("call_function", "call_method")
        or target_of(node).name not in CHANGES_OF_SHAPE
    ):
        return False
    if isinstance(node.target, OpOverload):
        return True
    source = node.args[0]
    return isinstance(source, fx.Node) and traced_value(source) is traced_value(node)


def _as_given(node: fx.Node, example: object) -> torch.Tensor:
    """What an input is before the graph, in the storage of its traced value."""
    if not isinstance(example, torch.Tensor):
        raise CaptureError(
            f"the graph changes the shape of its input {node.name} in place: give capture_fx the "
            "example inputs as well"
        )
    return _in_storage(traced_value(node), example)


def _in_storage(old: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A view of the storage of ``old`` with the sizes and strides of ``like``."""
    with tracing(None), torch.no_grad():
        return old.as_strided(like.size(), like.stride(), like.storage_offset())


def _run(node: fx.Node) -> Any:
    """What a node gives by the traced values of its operands."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), traced_value)
    with tracing(None), torch.no_grad(), fake_mode_of(tree_leaves((args, kwargs))):
        return result_of(node, args, kwargs)


def _first_shown(node: fx.Node, traced: Any) -> Any:
    """What a node gives, in the storages that its traced value has by now."""

    def like(found: Any, old: Any) -> Any:
        return _in_storage(old, found) if isinstance(found, torch.Tensor) else found

    return tree_map(like, _run(node), traced)
