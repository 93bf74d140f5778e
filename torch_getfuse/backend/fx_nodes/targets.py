"""What the target of an FX call is: an operator with a schema, a function of torch's, a stranger.

A bare name says nothing: ``mylib::relu`` need not be ReLU, and ``operator.and_`` writes nothing
although its name ends like those that do. Names count only within torch's own namespaces.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

_ROOTS = frozenset({"torch", "_operator", "operator", "builtins", "math", "torch_getfuse"})
_NAMESPACES = frozenset({"aten", "prims", "prim", "_c10d_functional", "inductor", "profiler"})


@dataclass(frozen=True, slots=True)
class Target:
    """What is known of a call's target.

    Attributes:
        name: the bare name of a function, method or operator of torch's own; else empty.
        overloads: the operators that it may call, with their schemas; empty where none has
            torch's name for it.
        known: ``False`` for a Python function from elsewhere, which may do anything.
        plain: a function of Python's own (:mod:`operator`, :mod:`math`, builtins).
    """

    name: str
    overloads: tuple[OpOverload, ...]
    known: bool = True
    plain: bool = False


def target_of(node: fx.Node) -> Target:
    """The target of a ``call_function`` or ``call_method`` node."""
    return resolve(node.target)


@functools.lru_cache(maxsize=4096)
def resolve(target: Any) -> Target:
    """What a target is: a method's name, an operator, a function."""
    if isinstance(target, str):  # a method of tensors
        return Target(target, _aten(target))
    if isinstance(target, OpOverload):
        own = target.namespace in _NAMESPACES
        return Target(target._schema.name.rpartition("::")[2] if own else "", (target,))
    if isinstance(target, OpOverloadPacket):
        namespace, _, name = target._qualified_op_name.rpartition("::")
        return Target(name if namespace in _NAMESPACES else "", _overloads(target))
    root = _module(target).partition(".")[0]
    if root not in _ROOTS or isinstance(target, torch._ops.OperatorBase):
        return Target("", (), known=False)
    name = getattr(target, "__name__", "")
    if root != "torch":
        return Target(name, (), plain=True)
    return Target(name, _aten(name))


def _module(target: Any) -> str:
    owner = getattr(target, "__objclass__", None)  # of an unbound method
    return getattr(target if owner is None else owner, "__module__", None) or ""


def _aten(name: str) -> tuple[OpOverload, ...]:
    """The operators that a method or function of torch's of that name calls.

    TorchScript alone knows others: ``sort``, ``copy`` and ``append`` of lists, which write them.
    """
    found = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    overloads = _overloads(found) if isinstance(found, OpOverloadPacket) else ()
    return tuple(one for one in overloads if torch._C._dispatch_has_kernel(one.name()))


def _overloads(packet: OpOverloadPacket) -> tuple[OpOverload, ...]:
    return tuple(getattr(packet, name) for name in packet.overloads())
