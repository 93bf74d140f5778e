"""One name and one set of arguments for an operator, however it was traced.

Dynamo records ``torch.conv2d``, ``F.batch_norm``, ``operator.iadd`` and method calls;
``torch.export`` records ATen overloads, in place or not. :func:`normalise` turns each into a
plain ATen name (``"conv2d"``, ``"add"``) with arguments by their ATen names (``self`` is called
``input`` throughout) and in their ATen order, so there is one rule per operator.

Only what is torch's own goes by a plain name. A custom operator, or a function of somebody else's,
keeps its full name (``"mylib::relu"``, ``"mymodule.relu"``), whatever torch has of the same name.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from torch_getfuse.backend.fx_nodes.per_target import PerTarget
from torch_getfuse.backend.torch_private import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    nn_functions,
    plain_pooling,
    qualified_name,
    schema_of,
    variable_functions,
)

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
    **{f"dropout{rank}d": "feature_dropout" for rank in (1, 2, 3)},
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "_unsafe_view": "view",
    "_to_copy": "to",
    "split_with_sizes": "split",
    "__eq__": "eq",  # how Dynamo wrote it before torch 2.13
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
}
_NOT_IN_PLACE = {"requires_grad_"}
_HOMES: tuple[Any, ...] = (
    *(torch, F, torch.Tensor, variable_functions(), nn_functions()),
    *(operator, math, builtins),
)
"""Where functions are that go by a plain name."""
_TORCH = str(Path(torch.__file__).parent)
# boolean_dispatch hides the name and the signature of the pooling functions behind "fn".
_DISPATCHED: dict[Callable[..., Any], tuple[str, Callable[..., Any]]] = {
    getattr(F, name): (name, plain_pooling(name))
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
        name: ATen name without overload and without the in-place underscore; the full name of
            what is not torch's own, or torch's but no operator.
        args: arguments by name; those that have none (methods with a variable number of
            arguments, functions without a known signature) are under ``"*"`` in order.
        writes: names of the arguments that it writes over, beside ``"out"``.
        overload: True for a call of an ATen overload, which is never taken apart any more.
        fresh: what it returns is none of what it writes.
    """

    name: str
    args: Mapping[str, Any]
    writes: tuple[str, ...] = ()
    overload: bool = False
    fresh: bool = False

    @property
    def mutates(self) -> bool:
        """Whether it works in place."""
        return bool(self.writes)


def normalise(node: fx.Node, positional: Callable[[str], tuple[str, ...]]) -> Invocation:
    """The invocation of a ``call_function`` or ``call_method`` node.

    Args:
        node: the call.
        positional: argument names of builtins and methods, which have no signature, by name.
    """
    target: Any = node.target
    if isinstance(target, OpOverloadPacket) and len(target.overloads()) == 1:
        target = getattr(target, target.overloads()[0])
    if isinstance(target, OpOverload):
        return _overload(node, target)
    if node.op == "call_method":
        raw = str(target)
        name, mutates = _plain(raw)
        args = _by_position(node, positional(name))
        return Invocation(name, _in_order(raw, name, args), _first(args, mutates))
    if not callable(target):
        return Invocation(str(target), {"*": node.args})
    if target in _DISPATCHED:
        name, twin = _DISPATCHED[target]
        return Invocation(name, _by_signature(node, twin))
    own = _own_name(target)
    if own is None:
        full, args = full_name(target), _by_signature(node, target) or {"*": node.args}
        if "*" in args:
            args.update(node.kwargs)
        return Invocation(full, args, _first(args, full.endswith("_")))
    if own in _IN_PLACE_OPERATORS and getattr(operator, own, None) is target:
        name = _IN_PLACE_OPERATORS[own]
        args = _by_position(node, positional(name))
        return Invocation(name, args, _first(args, True))
    if getattr(operator, own, None) is target:
        name = _OPERATORS.get(own, own)
        args = _by_position(node, positional(name))
        return Invocation(name, args, _first(args, name == "setitem"))
    name, mutates = _plain(own)
    args = _by_signature(node, target) or _by_position(node, positional(name))
    writes = _first(args, mutates or args.get("inplace") is True)
    return Invocation(name, _in_order(own, name, args), writes)


def _first(args: Mapping[str, Any], mutates: bool) -> tuple[str, ...]:
    """What a call writes that works in place: its first argument."""
    return tuple(args)[:1] if mutates else ()


def _overload(node: fx.Node, target: OpOverload) -> Invocation:
    """The invocation of an operator that torch or a library has registered."""
    schema = schema_of(target)
    names = [_RENAMED.get(argument.name, argument.name) for argument in schema.arguments]
    given = dict(zip(names, node.args, strict=False))
    given.update({_RENAMED.get(key, key): value for key, value in node.kwargs.items()})
    args = {
        name: given.get(name, argument.default_value)
        for name, argument in zip(names, schema.arguments, strict=True)
        if name in given or argument.has_default_value()
    }
    space, _, raw = schema.name.partition("::")
    if space != "aten":
        aliases = {name: a.alias_info for name, a in zip(names, schema.arguments, strict=True)}
        writes = tuple(name for name, alias in aliases.items() if alias and alias.is_write)
        fresh = all(value.alias_info is None for value in schema.returns)
        return Invocation(schema.name, args, writes, overload=True, fresh=fresh)
    # sort(x, values=v, indices=i) is sort(x, out=(v, i)) to Python.
    outs = [name for name, argument in zip(names, schema.arguments) if argument.is_out]
    if outs:
        results = [args.pop(name) for name in outs]
        args["out"] = results[0] if len(results) == 1 else results
    name, mutates = _plain(raw)
    writes = _first(args, mutates and schema.is_mutable and not outs)
    return Invocation(name, _in_order(raw, name, args), writes, overload=True)


@PerTarget
def _own_name(target: Any) -> str | None:
    """The name of a function of torch, ``operator``, ``math`` or Python; ``None`` of any other."""
    if isinstance(target, OpOverloadPacket):
        space, _, name = qualified_name(target).partition("::")
        return name if space == "aten" else None
    name = str(getattr(target, "__name__", ""))
    # Equal, not identical: a static method of torch._C is another object whenever it is looked up.
    return name if any(getattr(home, name, None) == target for home in _HOMES) else None


def full_name(target: Any) -> str:
    """How a function, class or operator is called where it is not known by a plain name."""
    if isinstance(target, OpOverloadPacket):
        return str(qualified_name(target))
    if isinstance(target, HigherOrderOperator):
        return f"higher_order::{target.name()}"
    name = getattr(target, "__qualname__", None) or type(target).__qualname__
    return f"{getattr(target, '__module__', None) or type(target).__module__}.{name}"


def is_torchs(target: Any) -> bool:
    """Whether a call's target is code of torch: a method of tensors, or one of its functions.

    By the file that it was compiled from: what wraps a function of torch has its name and module.
    """
    if isinstance(target, str) or _own_name(target) is not None:
        return True
    code = getattr(target, "__code__", None)
    if code is not None:
        return str(code.co_filename).startswith(_TORCH)
    home = sys.modules.get(getattr(target, "__module__", None) or "")
    return inspect.isbuiltin(target) and getattr(home, "__name__", "").startswith("torch._C")


def _in_order(raw: str, name: str, args: dict[str, Any]) -> dict[str, Any]:
    """Arguments in the order of the ATen operator, however they were given."""
    if raw == "rsub":
        args["input"], args["other"] = args["other"], args["input"]
    places = _places(name)
    return dict(sorted(args.items(), key=lambda item: places.get(item[0], len(places))))


@functools.lru_cache(maxsize=1024)
def _places(name: str) -> Mapping[str, int]:
    """Where the arguments of an ATen operator stand, those of its overloads together."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    places: dict[str, int] = {}
    # Methods such as "__eq__" are those of the namespace itself.
    for overload in packet.overloads() if isinstance(packet, OpOverloadPacket) else ():
        for argument in schema_of(getattr(packet, overload)).arguments:
            places.setdefault(_RENAMED.get(argument.name, argument.name), len(places))
    return places


def _plain(name: str) -> tuple[str, bool]:
    """The name without a trailing underscore, and whether it had one."""
    mutates = name.endswith("_") and not name.endswith("__") and name not in _NOT_IN_PLACE
    name = name[:-1] if mutates else name
    return _SAME.get(name, name), mutates


@PerTarget
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
