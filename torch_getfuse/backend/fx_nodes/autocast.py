"""Autocast and grad mode that change within a graph, as what they are to each of its nodes.

Dynamo records ``with torch.autocast(...)`` as a call that enters and one that exits. All between
depends on them without an edge, and an operator whose views are used on both sides of such a call,
as in EfficientViT's attention, would have to run before it and after it. So nodes are not kept
between these calls: each keeps the mode that it ran in, and whoever runs it switches there and
back. Autocast that is turned off where it is off already is no switch at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.fx_nodes.values import traced_value
from torch_getfuse.backend.torch_private import enter_autocast, exit_autocast, set_grad_enabled


@dataclass(frozen=True)
class Autocast:
    """The state of autocast on a device; arguments of ``torch.amp.autocast``."""

    dtype: torch.dtype
    enabled: bool
    cache_enabled: bool | None

    def equals(self, other: Autocast) -> bool:
        """Whether both compute alike."""
        if not self.enabled:
            return not other.enabled
        return other.enabled and self.dtype is other.dtype


@dataclass(frozen=True)
class Mode:
    """What a node runs in, where that is not what the graph is called in.

    Attributes:
        grad: grad mode; ``None`` where it is the caller's.
        autocast: of the devices whose autocast is not the caller's.
    """

    grad: bool | None = None
    autocast: tuple[tuple[str, Autocast], ...] = ()


OUTSIDE = Mode()


def enter_grad_mode(enabled: bool) -> bool:
    """Sets grad mode, and returns what it was."""
    before = torch.is_grad_enabled()
    set_grad_enabled(enabled)
    return before


def exit_grad_mode(before: bool) -> None:
    """Sets grad mode to what :func:`enter_grad_mode` returned."""
    set_grad_enabled(before)


def is_switch(node: fx.Node) -> bool:
    """Whether a node changes autocast or grad mode, by values known in the graph."""
    if node.op != "call_function" or node.kwargs:
        return False
    if node.target in (exit_autocast, exit_grad_mode):
        (entered,) = node.args
        return isinstance(entered, fx.Node) and is_switch(entered)
    known = not any(isinstance(value, fx.Node) for value in node.args)
    return known and node.target in (
        enter_autocast,
        enter_grad_mode,
        set_grad_enabled,  # Dynamo's, which guards on what is around
    )


def modes_of(graph: fx.Graph) -> tuple[Mapping[fx.Node, Mode], Mode]:
    """The mode of each node that is no switch, and the one at the end of the graph.

    The caller's autocast is that which this is called in: Dynamo guards on it.
    """
    grad: bool | None = None
    around: dict[str, Autocast] = {}
    now: dict[str, Autocast] = {}
    before: dict[fx.Node, Any] = {}
    found: dict[fx.Node, Mode] = {}
    mode = OUTSIDE
    for node in graph.nodes:
        if not is_switch(node):
            found[node] = mode
            continue
        if node.target is enter_autocast:
            device, dtype, enabled, cache = (*node.args, None, True, None)[:4]
            if device not in around:
                around[device] = now[device] = _current(device)
            before[node] = device, now[device]
            now[device] = Autocast(dtype or now[device].dtype, enabled, cache)
        elif node.target is exit_autocast:
            device, state = before[node.args[0]]
            now[device] = state
        elif node.target is enter_grad_mode:
            before[node] = grad
            (grad,) = node.args
        elif node.target is exit_grad_mode:
            grad = before[node.args[0]]
        else:
            (grad,) = node.args
            if grad == torch.is_grad_enabled():
                grad = None
        mode = Mode(
            grad,
            tuple((device, s) for device, s in now.items() if not s.equals(around[device])),
        )
    return found, mode


def _current(device: str) -> Autocast:
    return Autocast(
        torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=None
    )


class Switches:
    """Writes the calls that change the mode at the end of a graph under construction."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._mode = OUTSIDE
        self._entered: list[tuple[Callable[..., Any], fx.Node]] = []

    def to(self, mode: Mode) -> None:
        """What is added to the graph from now on runs in ``mode``."""
        if mode == self._mode:
            return
        while self._entered:
            leave, entered = self._entered.pop()
            self._graph.call_function(leave, (entered,))
        if mode.grad is not None:
            entered = self._graph.call_function(enter_grad_mode, (mode.grad,))
            self._entered.append((exit_grad_mode, entered))
        for device, state in mode.autocast:
            arguments = (device, state.dtype, state.enabled, state.cache_enabled)
            entered = self._graph.call_function(enter_autocast, arguments)
            self._entered.append((exit_autocast, entered))
        self._mode = mode


def cast_apart(gm: fx.GraphModule, children: Mapping[str, Sequence[fx.Node]]) -> str:
    """A weight that several children read under an autocast of the graph's own; else empty.

    Each casts it for itself, where autocast in one piece casts it once; parts of its gradient are
    then added up after the cast instead of before it.
    """
    modes, _ = modes_of(gm.graph)
    readers: dict[fx.Node, set[str]] = {}
    for name, nodes in children.items():
        for node in nodes:
            if any(state.enabled for _, state in modes[node].autocast):
                for source in node.all_input_nodes:
                    value = traced_value(source)
                    leaf = source.op in ("placeholder", "get_attr")
                    if leaf and isinstance(value, torch.Tensor) and value.requires_grad:
                        readers.setdefault(source, set()).add(name)
    shared = (source.name for source, names in readers.items() if len(names) > 1)
    return next(shared, "")
