"""What an FX node stands for: its traced value, its module, and whether it is a weight."""

from __future__ import annotations

import ast
import contextlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.rules.rule import Stored, TensorInfo
from torch_getfuse.backend.torch_private import (
    FakeTensor,
    codegen_of,
    is_traceable_wrapper_subclass,
    keep_source,
    optimization_hint,
)

_UNKNOWN_SIZE = 64
"""Stands for a size that depends on data; torch's own hint where it has one."""

_ROOT = re.compile(
    r"^(?:_export_root|L__self__"
    r"|L\['(?!self')\w+'\]\[0\](?=$|\.)"  # the first argument of a decorator's (*args, **kwargs)
    r"|[LG]\[[^\]]*\])(?=$|[.\[])\.?"
)
_GETATTR = re.compile(r"getattr\(([^()]*), '([^']*)'\)")
_NOISE = re.compile(r"@\d+|\.?__closure__\[\d+\]\.cell_contents|\.?_orig_mod\b|\.?_modules\b")
_CHILD = re.compile(r"""\._modules\[('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\]""")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_INDEX = re.compile(r"\[['\"]?([^'\"\]]+)['\"]?\]")


STANDS_FOR = "torch_getfuse_stands_for"
"""Metadata of a node that took the place of another: traced values whose storages are its too."""


def traced_value(node: fx.Node) -> Any:
    """The fake value of a node: Dynamo's ``example_value`` or export's ``val``."""
    value = node.meta.get("example_value")
    return node.meta.get("val") if value is None else value


def has_value(node: fx.Node) -> bool:
    """True where the trace recorded what the node gives (``None`` counts)."""
    return "example_value" in node.meta or "val" in node.meta


Place = Callable[[fx.Graph, fx.Node, Mapping[fx.Node, fx.Node]], fx.Node]


def copy_node(graph: fx.Graph, node: fx.Node, placed: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A copy of a node at the end of ``graph``, with what Dynamo knows of it.

    Args:
        placed: where the nodes are that it reads.
    """
    new = graph.node_copy(node, placed.__getitem__)
    keep_source(node, new)
    return new


def rewritten(gm: fx.GraphModule, place: Place) -> fx.GraphModule:
    """A copy of a graph in which ``place`` puts each node, in order.

    Args:
        place: called with the new graph, a node of ``gm`` and where those before it are; returns
            where it is.
    """
    graph = fx.Graph()
    graph.set_codegen(codegen_of(gm.graph))
    placed: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        placed[node] = place(graph, node, placed)
    copied = fx.GraphModule(gm, graph)
    copied.meta.update(gm.meta)
    return copied


def result_of(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call of a function or a method gives for these arguments."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def size_hint(size: int | torch.SymInt) -> int:
    """A size as a number, without specialising the graph to it."""
    hint = optimization_hint(size, fallback=_UNKNOWN_SIZE)
    # The length of a jagged dimension is none: torch's hint for it is a symbol that equals itself.
    return hint if isinstance(hint, int) else _UNKNOWN_SIZE


def tensor_info(tensor: torch.Tensor) -> TensorInfo:
    """Shape and dtype, symbolic sizes as hints."""
    return TensorInfo(tuple(size_hint(size) for size in tensor.shape), tensor.dtype)


def stored(tensor: torch.Tensor) -> Stored:
    """Elements and bytes that a traced tensor is stored in: a subclass's, those that it wraps."""
    outer: Any = tensor
    if is_traceable_wrapper_subclass(outer):
        inner, _ = outer.__tensor_flatten__()
        return Stored.sum(stored(getattr(tensor, name)) for name in inner)
    elements = math.prod(size_hint(size) for size in tensor.shape)
    return Stored(elements, elements * tensor.dtype.itemsize)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a traced tensor has one storage of its elements in strides.

    Wrapper subclasses (nested tensors, ...) hide theirs; sparse and opaque tensors have none.
    """
    kinds = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)
    return type(tensor) in kinds and tensor.layout is torch.strided


def flat_tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in a traced value, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in flat_tensors(item)]
    return []


def fake_mode_of(values: Iterable[Any]) -> contextlib.AbstractContextManager[Any]:
    """The mode that traced values were made in: operators on them make constants within it."""
    fakes = (value for value in values if isinstance(value, FakeTensor))
    fake = next(fakes, None)
    return contextlib.nullcontext() if fake is None else fake.fake_mode


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that a node was traced in; ``""`` for the model itself.

    Dynamo writes ``L['self'].layer1.0``, ``torch.export`` ``layer1.0``, and either may add
    ``@1`` for a second call.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    while (found := _GETATTR.search(path)) is not None:
        path = f"{path[: found.start()]}{found[1]}.{found[2]}{path[found.end() :]}"
    if path.startswith(("L[", "G[")):
        path = _unquoted(path)
    path = _NOISE.sub("", _ROOT.sub("", path))
    return _CONTROL.sub("_", _INDEX.sub(r".\1", path)).strip(".")


def _unquoted(path: str) -> str:
    """A path of Dynamo's with the names of children as they are.

    Dynamo escapes a name as in a literal, and writes one with quotes or brackets as a key.
    """
    texts = _CHILD.split(path)
    for at, text in enumerate(texts):
        if at % 2:
            texts[at] = f".{ast.literal_eval(text)}"
        elif "\\" in text:
            texts[at] = text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    return "".join(texts)
