"""A graph for any size as a program per size: packed weights are shared, strips each size's own.

Under dynamic shapes one graph serves all sizes. A program needs numbers: it is built from a copy of
the graph in which the sizes of one call are constants. Building one costs some tens of runs, so a
size has to have been called a few times, and building may take only a share of the time that the
graph has run: sizes that come once, as from a loader of random crops, run by the FX nodes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from torch_getfuse.backend.fx_nodes.fake_run import FakeRun
from torch_getfuse.backend.fx_nodes.values import (
    copy_node,
    flat_tensors,
    rewritten,
    size_hint,
    traced_value,
)
from torch_getfuse.backend.packed.program import FastProgram, kept_for
from torch_getfuse.backend.packed.snapshots import Kept
from torch_getfuse.backend.packed.steps import Unfit
from torch_getfuse.backend.torch_private import (
    FakeTensorMode,
    enable_python_dispatcher,
)

log = logging.getLogger(__name__)

KEPT = 8
"""Sizes of a graph that are decided at a time: by a program, or by FX nodes where faster."""

CALLS = 3
"""The call of a size from which on it may be decided."""

FREE, SHARE = 4, 0.1
"""So many sizes are decided however long it takes; later ones only while deciding has taken at most
this share of the seconds that calls of the graph have."""

_COUNTED = 64
"""Sizes whose calls are counted at most, besides those decided."""

_MOST = 32
"""Calls that a decided size is credited with at most. A new size takes the place of the one with
the least once it has been called more than twice as often, so sizes that take turns stay."""

Build = Callable[[fx.GraphModule, Sequence[Any], Kept], tuple[FastProgram | None, str]]
"""From a graph of constant sizes, inputs, and where weights are kept, to a program and a note.

Raises :class:`Unfit`."""

Key = tuple[Any, ...]

_lock = threading.Lock()
"""Held while a size is decided, of whatever graph: to time is to be alone."""


def is_any_size(gm: fx.GraphModule) -> bool:
    """Whether sizes are among the inputs of a graph, or in the shapes of its values."""
    return any(
        isinstance(value, torch.SymInt)
        or any(not isinstance(size, int) for tensor in flat_tensors(value) for size in tensor.shape)
        for value in map(traced_value, gm.graph.nodes)
    )


class _Inputs:
    """What of a graph's inputs its sizes are made of."""

    def __init__(self, gm: fx.GraphModule) -> None:
        nodes = gm.graph.find_nodes(op="placeholder")
        values = list(map(traced_value, nodes))
        self._scalars = [k for k, value in enumerate(values) if not isinstance(value, Tensor)]
        # Dynamo makes numbers of the model's, such as an epsilon, tensors that only item() reads.
        self._read = [
            k for k, node in enumerate(nodes) if isinstance(values[k], Tensor) and _is_number(node)
        ]
        self._maps = [
            k
            for k, value in enumerate(values)
            if isinstance(value, Tensor)
            and any(not isinstance(size, int) for size in (*value.shape, *value.stride()))
        ]
        self._named = [
            (str(value), k) for k, value in enumerate(values) if isinstance(value, torch.SymInt)
        ]
        self._readers = [(user, k) for k in self._read for user in nodes[k].users]

    def key(self, args: Sequence[Any]) -> Key:
        """What tells the sizes of one call from those of another; the rest Dynamo guards."""
        maps = [args[k] for k in self._maps]
        return (
            *(args[k] for k in self._scalars),
            *(args[k].item() for k in self._read),
            *(x.shape for x in maps),
            *(x.stride() for x in maps),
        )

    def known(self, args: Sequence[Any]) -> dict[fx.Node, Any]:
        """Nodes that read a number out of an input, each with that of a call."""
        return {node: args[k].item() for node, k in self._readers}

    def words(self, args: Sequence[Any]) -> str:
        """The sizes of a call: ``"s53 = 224"``."""
        return ", ".join(f"{name} = {args[k]}" for name, k in self._named) or "the traced sizes"


def _is_number(node: fx.Node) -> bool:
    return (
        bool(node.users)
        and traced_value(node).dim() == 0
        and all(user.op == "call_method" and user.target == "item" for user in node.users)
    )


def at_sizes(gm: fx.GraphModule, args: Sequence[Any], known: dict[fx.Node, Any]) -> fx.GraphModule:
    """A copy of a graph in which everything that follows from the sizes of a call is a constant.

    Its inputs are those of ``gm``, sizes included, which it does not read.

    Args:
        gm: with traced values, in any sizes; it draws no random numbers.
        args: of the call.
        known: numbers that nodes read out of tensors.

    Raises:
        Unfit: where shapes depend on more than the sizes.
    """
    mode = FakeTensorMode()
    given = [mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x for x in args]
    run = FakeRun(gm, mode, known)
    try:
        with torch.no_grad(), mode, enable_python_dispatcher():
            run.run(*given)
    except Exception as error:
        raise Unfit(f"its shapes do not follow from the sizes: {_line(error)}") from error
    copied = rewritten(gm, copy_node)
    for node, new in list(zip(gm.graph.nodes, copied.graph.nodes, strict=True)):
        if node.op == "output":
            continue
        value = run.values[node]
        new.meta["example_value" if "example_value" in new.meta else "val"] = value
        if isinstance(value, (int, float)):
            new.replace_all_uses_with(value)
            if new.op != "placeholder":
                copied.graph.erase_node(new)
    copied.recompile()
    return copied


def _line(error: Exception) -> str:
    """What an error says in its first line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class _Size(NamedTuple):
    """What was decided for one size.

    Attributes:
        run: a program, or the FX nodes.
        note: for the report.
        calls: one number, of the calls that were served.
    """

    run: Callable[..., Any]
    note: str
    calls: list[int]


class AnySize:
    """A callable with the signature of a graph for any size, which returns a tuple.

    Safe to call from several threads: while one decides a size, the others run FX nodes.

    Args:
        gm: an inference graph that returns a tuple.
        plain: the same computation by FX nodes.
        build: makes a program for one size.
        tell: takes notes for the report, in place of those that it was given before.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        plain: Callable[..., Any],
        build: Build,
        tell: Callable[[Collection[str], Sequence[str]], None],
    ) -> None:
        self._gm = gm
        self._plain = plain
        self._build = build
        self._tell = tell
        self._inputs = _Inputs(gm)
        self._weights = kept_for(gm)
        self._sizes: dict[Key, _Size] = {}
        self._counted: dict[Key, int] = {}
        self._told: list[str] = []
        self._decisions = 0
        self._deciding = 0.0
        self._running = 0.0

    def decide_first(self, example_inputs: Sequence[Any]) -> None:
        """Decide the size that the graph is compiled for.

        Raises:
            Unfit: where the graph has no program, at this size.
        """
        args = [
            size_hint(value) if isinstance(value, torch.SymInt) else value
            for value in example_inputs
        ]
        with _lock:
            self._decide(self._inputs.key(args), args)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """Run the graph; inputs as the graph takes them."""
        key = self._inputs.key(args)
        size = self._sizes.get(key) or self._counts(key, args)
        started = time.perf_counter()
        if size is None:
            result = self._plain(*args)
        else:
            size.calls[0] = min(size.calls[0] + 1, _MOST)
            result = size.run(*args)
        self._running += time.perf_counter() - started
        return tuple(result)

    def _counts(self, key: Key, args: Sequence[Any]) -> _Size | None:
        """Count a call of a size that is not decided, and decide it if its time has come."""
        if not _lock.acquire(blocking=False):
            return None
        try:
            if key in self._sizes:
                return self._sizes[key]
            calls = self._counted[key] = self._counted.get(key, 0) + 1
            if self._may_decide(calls):
                try:
                    self._decide(key, args)
                except Exception as error:  # the call is right without a program
                    reason = str(error) if isinstance(error, Unfit) else _line(error)
                    log.warning("torch_getfuse: a size has no program: %s", reason)
                    self._add(key, args, self._plain, f"runs by FX nodes: {reason}")
                return self._sizes[key]
            if len(self._counted) > _COUNTED:
                self._counted = {each: n // 2 for each, n in self._counted.items() if n > 1}
            return None
        finally:
            _lock.release()

    def _may_decide(self, calls: int) -> bool:
        if calls < CALLS:
            return False
        if len(self._sizes) >= KEPT and calls <= 2 * min(s.calls[0] for s in self._sizes.values()):
            return False
        return self._decisions < FREE or self._deciding <= SHARE * self._running

    def _decide(self, key: Key, args: Sequence[Any]) -> None:
        started = time.perf_counter()
        self._decisions += 1
        try:
            copied = at_sizes(self._gm, args, self._inputs.known(args))
            program, note = self._build(copied, args, self._weights)
        finally:
            self._deciding += time.perf_counter() - started
        self._add(key, args, program or self._plain, note)

    def _add(self, key: Key, args: Sequence[Any], run: Callable[..., Any], note: str) -> None:
        sizes = dict(self._sizes)  # other threads read the one that is there
        if len(sizes) >= KEPT:
            del sizes[min(sizes, key=lambda each: sizes[each].calls[0])]
        note = f"inner auto: at {self._inputs.words(args)}: {note}"
        before = max(0, self._counted.pop(key, 0) - 1)  # the call of now will be counted
        sizes[key] = _Size(run, note, [min(before, _MOST)])
        self._sizes = sizes
        notes = [size.note for size in sizes.values()]
        self._tell(self._told, notes)
        self._told = notes
