"""One name and one set of arguments for an operator, however it was traced.

Dynamo records ``torch.conv2d``, ``F.batch_norm``, ``operator.iadd`` and method calls;
``torch.export`` records ATen overloads, in place or not. :func:`normalise` turns each into a
plain ATen name (``"conv2d"``, ``"add"``) with arguments by their ATen names (``self`` is called
``input`` throughout), so there is one rule per operator.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

_OPERATORS = {
    "truediv": "div",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "and_": "bitwise_and",
    "or_": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
    "inv": "bitwise_not",
    "not_": "logical_not",
    "lshift": "bitwise_left_shift",
    "rshift": "bitwise_right_shift",
}
_IN_PLACE_OPERATORS = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "ifloordiv": "floor_divide",
    "imod": "remainder",
    "ipow": "pow",
    "iand": "bitwise_and",
    "ior": "bitwise_or",
    "ixor": "bitwise_xor",
    "imatmul": "matmul",
}
_SAME = {
    "subtract": "sub",
    "rsub": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "absolute": "abs",
    "negative": "neg",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "_unsafe_view": "view",
    "_to_copy": "to",
    "split_with_sizes": "split",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
}
_NOT_IN_PLACE = {"requires_grad_"}
# boolean_dispatch hides the name and the signature of the pooling functions behind "fn".
_DISPATCHED: dict[Callable[..., Any], tuple[str, Callable[..., Any]]] = {
    getattr(F, name): (name, getattr(F, f"_{name}"))
    for name in (
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
    )
}
_RENAMED = {
    "self": "input",
    "axis": "dim",
    "axis0": "dim0",
    "axis1": "dim1",
    "train": "training",
}


@dataclass(frozen=True)
class Invocation:
    """A call under its plain name.

    Attributes:
        name: ATen name without overload and without the in-place underscore.
        args: arguments by name; those that have none (methods with a variable number of
            arguments, functions without a known signature) are under ``"*"`` in order.
        mutates: writes over its first argument.
        overload: True for a call of an ATen overload, which is never taken apart any more.
    """

    name: str
    args: Mapping[str, Any]
    mutates: bool
    overload: bool


def normalise(node: fx.Node, positional: Callable[[str], tuple[str, ...]]) -> Invocation:
    """The invocation of a ``call_function`` or ``call_method`` node.

    Args:
        node: the call.
        positional: argument names of builtins and methods, which have no signature, by name.
    """
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name, mutates = _plain(target._schema.name.split("::")[-1])
        names = tuple(_RENAMED.get(a.name, a.name) for a in target._schema.arguments)
        given = dict(zip(names, node.args, strict=False))
        defaults = {
            _RENAMED.get(a.name, a.name): a.default_value
            for a in target._schema.arguments
            if a.has_default_value()
        }
        given.update({_RENAMED.get(key, key): value for key, value in node.kwargs.items()})
        if target._schema.name == "aten::rsub":
            given["input"], given["other"] = given["other"], given["input"]
        mutates = mutates and target._schema.is_mutable
        return Invocation(name, {**defaults, **given}, mutates, overload=True)
    if node.op == "call_method":
        name, mutates = _plain(str(target))
        return Invocation(name, _by_position(node, positional(name)), mutates, overload=False)
    if not callable(target):
        return Invocation(str(target), {"*": node.args}, mutates=False, overload=False)
    if target in _DISPATCHED:
        name, twin = _DISPATCHED[target]
        return Invocation(name, _by_signature(node, twin), mutates=False, overload=False)
    raw = getattr(target, "__name__", str(target))
    if raw in _IN_PLACE_OPERATORS and getattr(operator, raw, None) is target:
        name = _IN_PLACE_OPERATORS[raw]
        return Invocation(name, _by_position(node, positional(name)), mutates=True, overload=False)
    if getattr(operator, raw, None) is target:
        name = _OPERATORS.get(raw, raw)
        return Invocation(name, _by_position(node, positional(name)), mutates=False, overload=False)
    name, mutates = _plain(raw)
    args = _by_signature(node, target) or _by_position(node, positional(name))
    return Invocation(name, args, mutates or args.get("inplace") is True, overload=False)


def _plain(name: str) -> tuple[str, bool]:
    """The name without a trailing underscore, and whether it had one."""
    mutates = name.endswith("_") and not name.endswith("__") and name not in _NOT_IN_PLACE
    name = name[:-1] if mutates else name
    return _SAME.get(name, name), mutates


@functools.lru_cache(maxsize=512)
def _signature(target: Callable[..., Any]) -> inspect.Signature | None:
    if not inspect.isfunction(target):
        return None
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):
        return None


def _by_signature(node: fx.Node, target: Callable[..., Any]) -> dict[str, Any]:
    """Arguments of a Python function by name, defaults filled in; empty if it has no signature."""
    signature = _signature(target)
    if signature is None:
        return {}
    try:
        bound = signature.bind(*node.args, **node.kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return {_RENAMED.get(key, key): value for key, value in bound.arguments.items()}


def _by_position(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of a builtin or a method; a name with a star takes all that are left."""
    args: dict[str, Any] = {}
    rest = list(node.args)
    for name in names:
        if not rest:
            break
        if name.startswith("*"):
            only = rest[0]
            # permute(0, 2, 1) and permute((0, 2, 1)) are the same call.
            args[name[1:]] = only if len(rest) == 1 and isinstance(only, (list, tuple)) else rest
            rest = []
        else:
            args[name] = rest.pop(0)
    if rest:
        args["*"] = rest
    args.update({_RENAMED.get(key, key): value for key, value in node.kwargs.items()})
    return args
