"""Calls of an FX graph on other values than they were traced with: blocks of rows.

A block of rows lies in a buffer that others read, so a call that was written in place is made
out of place here.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.fx_nodes.normalize import normalise
from torch_getfuse.backend.rules.registry import positional
from torch_getfuse.backend.torch_private import OpOverload, overload_name, schema_of
from torch_getfuse.errors import GetfuseError

Values = Mapping[fx.Node, Any]
"""What nodes outside the schedule give in this call: weights, and outside tensors in full."""


class NoRowKernel(GetfuseError):
    """An operator that cannot be computed by rows; says which and why."""


def make_call(node: fx.Node) -> Callable[[Values], Any]:
    """The call of a node as a function of the values of the nodes that it reads.

    Raises:
        NoRowKernel: for a call of a module, and for one that is only there in place.
    """
    if node.op == "call_method":
        name = str(node.target)
        if name.endswith("_") and not name.endswith("__"):
            name = name[:-1]
        if not hasattr(torch.Tensor, name):
            raise NoRowKernel(f"{node.name} calls {node.target}, which is only there in place")

        def method(values: Values) -> Any:
            args, kwargs = _filled(node, values)
            return getattr(args[0], name)(*args[1:], **kwargs)

        return method
    if node.op != "call_function" or not callable(node.target):
        raise NoRowKernel(f"{node.name} is a {node.op} of {node.target}, not a function")
    target = _out_of_place(node)
    signature = _signature(target)
    if signature is None or "inplace" not in signature.parameters:

        def function(values: Values) -> Any:
            args, kwargs = _filled(node, values)
            return target(*args, **kwargs)

        return function

    def with_flag(values: Values) -> Any:
        args, kwargs = _filled(node, values)
        bound = signature.bind(*args, **kwargs)
        bound.arguments["inplace"] = False
        return target(*bound.args, **bound.kwargs)

    return with_flag


def _filled(node: fx.Node, values: Values) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = fx.map_arg(node.args, values.__getitem__)
    return args, fx.map_arg(node.kwargs, values.__getitem__)


def fill(value: Any, values: Values) -> Any:
    """An argument with the nodes in it replaced by what they give."""
    return fx.map_arg(value, values.__getitem__)


def _signature(target: Callable[..., Any]) -> inspect.Signature | None:
    return inspect.signature(target) if inspect.isfunction(target) else None


def _out_of_place(node: fx.Node) -> Callable[..., Any]:
    target: Any = node.target
    if not normalise(node, positional).mutates:
        return target  # type: ignore[no-any-return]
    if isinstance(target, OpOverload):
        space, _, raw = schema_of(target).name.partition("::")
        packet = getattr(getattr(torch.ops, space), raw.removesuffix("_"), None)
        found = getattr(packet, overload_name(target), None)
    else:
        raw = target.__name__
        if getattr(operator, raw, None) is target:
            found = getattr(operator, raw.removeprefix("i"), None)
        elif raw.endswith("_"):
            plain = raw[:-1]
            homes = (torch.nn.functional, torch)
            found = next((getattr(home, plain) for home in homes if hasattr(home, plain)), None)
        else:
            found = target  # its argument "inplace" says so
    if found is None:
        raise NoRowKernel(f"{node.name} calls {target}, which is only there in place")
    return found  # type: ignore[no-any-return]
