"""How fusion groups run: each child of a split graph compiled on its own, or left to eager.

A child is an ordinary FX graph whose weights are inputs, so compiling one bakes nothing in: the
result is right for another instance of the class and after an optimizer step.
"""

from __future__ import annotations

import logging
import textwrap
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from torch_getfuse.backend.fx_nodes.effects import input_storages
from torch_getfuse.backend.fx_nodes.values import has_value, size_hint, traced_value
from torch_getfuse.backend.inner.dynamic.own_sizes import OwnSizes
from torch_getfuse.backend.inner.dynamic.symbols import SizeBinder
from torch_getfuse.backend.inner.inductor_patches.mended import mended
from torch_getfuse.backend.inner.layouts import TracedStrides, overlaps_itself
from torch_getfuse.backend.torch_private import (
    RestartAnalysis,
    lookup_backend,
    tracing,
    unset_fake_temporarily,
)
from torch_getfuse.errors import CaptureError, OptionError, nearest
from torch_getfuse.options import Options

log = logging.getLogger(__name__)

EAGER = ("auto", "eager")
"""Values of ``inner`` whose groups are FX modules; "auto" may take a fast program for inference."""

DEPTH_FIRST = "depth_first"
"""The value of ``inner`` that runs the groups row by row (:mod:`depth_first`)."""

OWN = (*EAGER, DEPTH_FIRST)
"""The values of ``inner`` that are no backend of torch.compile."""

_MOST_REASON = 200
_warned: set[str] = set()


def is_eager(inner: str | Callable[..., Any]) -> bool:
    """Whether groups run as they are."""
    return inner in EAGER


def inner_name(inner: str | Callable[..., Any]) -> str:
    """What people call an inner backend."""
    return inner if isinstance(inner, str) else getattr(inner, "__name__", type(inner).__name__)


def find_inner(inner: str | Callable[..., Any]) -> Callable[..., Any] | None:
    """The function that compiles a group, with a backend's signature.

    ``None`` where there is none to call: for eager and for the depth-first executor.

    Raises:
        OptionError: for a name that torch.compile does not know, and for this backend itself.
    """
    if not isinstance(inner, str):
        return inner
    if inner in OWN:
        return None
    known = [name for name in torch.compiler.list_backends(None) if name != "getfuse"]
    if inner not in known:
        # Torch lists backends that fail on purpose, for its own tests.
        others = [name for name in known if name not in OWN and "TESTING_ONLY" not in name]
        raise OptionError(
            f"inner={inner!r} is not a backend of torch.compile"
            f"{nearest(inner, [*OWN, *others])}; "
            f"known: {', '.join([*OWN, *others])}, or a callable"
        )
    backend: Callable[..., Any] = lookup_backend(inner)
    return partial(mended, backend) if inner == "inductor" else backend


def compile_children(split: fx.GraphModule, options: Options) -> list[str]:
    """Compile every child that the options' ``inner`` can compile, in place.

    A child that it cannot compile stays eager, with one warning (``strict`` raises instead).

    Args:
        split: its children are FX modules whose inputs carry traced values.
        options: ``inner`` and ``strict``.

    Returns:
        Notes for the report: what was compiled and how long it took, and what was not and why.
    """
    backend = find_inner(options.inner)
    if backend is None:
        return []
    name = inner_name(options.inner)
    notes: list[str] = []
    left: list[str] = []
    done = 0
    started = time.perf_counter()
    sizes = SizeBinder(split)
    for node in list(split.graph.nodes):
        sizes.pass_by(node)
        child_name = str(node.target)
        child = split.get_submodule(child_name) if node.op == "call_module" else None
        if not isinstance(child, fx.GraphModule):
            continue
        if why := _shared_write(child):
            left.append(f"{child_name} runs eager: it writes to {why}")
            continue
        before = time.perf_counter()
        try:
            own = sizes.bind(child, node)
            setattr(split, child_name, compile_child(child, backend, own))
        except RestartAnalysis:
            raise  # not a failure: Dynamo traces again, with fewer symbols
        except Exception as error:
            if options.strict:
                raise
            notes.append(_failed(child_name, child, name, error))
            continue
        done += 1
        log.info("inner %s: %s in %.2f s", name, child_name, time.perf_counter() - before)
    split.recompile()
    count = done + len(notes) + len(left)
    if not count:
        return []
    seconds = time.perf_counter() - started
    notes.insert(0, f"inner {name}: {done} of {count} groups compiled in {seconds:.1f} s")
    log.info("%s", notes[0])
    return notes + left


def _shared_write(child: fx.GraphModule) -> str:
    """What a child writes to that is more than one element, or one input; else empty.

    AOTAutograd writes such an input anew as a whole in the end: torch refuses that for a view that
    shows one place twice, and two inputs of one memory it takes apart by how they were made.
    """
    storages, written = input_storages(child)
    inputs = child.graph.find_nodes(op="placeholder")
    seen: dict[int, str] = {}
    for position, storage in storages.items():
        if storage not in written:
            continue
        node = inputs[position]
        value = traced_value(node)
        shape, strides = (tuple(map(size_hint, sizes)) for sizes in (value.shape, value.stride()))
        if overlaps_itself(shape, strides):
            return f"{node.name}, whose elements share memory"
        if storage in seen:
            return f"memory that is both {seen[storage]} and {node.name}"
        seen[storage] = node.name
    return ""


class CompiledChild(nn.Module):
    """A compiled group under the name of the child that it replaces.

    Attributes:
        name: of the child, for errors.
        compiled: takes the child's inputs and returns a tuple.
        bare: whether the child returned its only result bare.
        strides: of the child's results.
    """

    def __init__(
        self, name: str, compiled: Callable[..., Any], bare: bool, strides: TracedStrides
    ) -> None:
        super().__init__()
        self.name = name
        self.compiled = compiled
        self.bare = bare
        self.strides = strides

    def forward(self, *args: Any) -> Any:
        """The child's results, in the child's form and layout.

        Raises:
            OptionError: where the compiled child does not return a tuple of them.
        """
        results = self.compiled(*args)
        if not isinstance(results, (tuple, list)) or len(results) != len(self.strides):
            found = type(results).__name__
            found += f" of {len(results)}" if isinstance(results, (tuple, list)) else ""
            raise OptionError(
                f"what the inner backend made of {self.name} returned a {found}; it must return a "
                f"tuple of {len(self.strides)}, as torch.compile asks of every backend"
            )
        results = self.strides.restore(results, args)
        return results[0] if self.bare else tuple(results)


def compile_child(
    child: fx.GraphModule, backend: Callable[..., Any], sizes: OwnSizes | None = None
) -> CompiledChild:
    """One child through a torch.compile backend, which gets the traced values of its inputs.

    With sizes of its own, those traced anew.

    Raises:
        CaptureError: where an input has no traced value.
        OptionError: where the backend returns no callable.
        Exception: whatever the backend raises.
    """
    for node in child.graph.find_nodes(op="placeholder"):
        if not has_value(node):
            raise CaptureError(f"the trace records no value for {node.name!r}")
    bare = not isinstance(child.graph.output_node().args[0], tuple)
    # torch.compile promises its backends a graph that returns a tuple; the child itself is kept.
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(child.graph, env)
    graph.output((result,) if bare else result)
    module = fx.GraphModule(child, graph)
    fake_mode: AbstractContextManager[Any] = nullcontext()
    if sizes is None:
        inputs = [traced_value(node) for node in graph.find_nodes(op="placeholder")]
    else:
        sizes.trace(module, sizes.inputs(child))
        inputs = sizes.inputs(child)  # the trace may have changed the others
        # AOTAutograd compiles the graph around the child with its own fake mode on.
        fake_mode = unset_fake_temporarily()
    strides = TracedStrides(module)
    # The context of the graph around it holds facts about that graph's inputs, which AOTAutograd
    # would take for, and overwrite with, those of the child.
    with tracing(None), fake_mode:
        compiled = backend(module, inputs)
    if not callable(compiled):
        raise OptionError(
            f"the inner backend returned a {type(compiled).__name__} for {type(child).__name__}; "
            "it must return a callable, as torch.compile asks of every backend"
        )
    if sizes is not None:
        sizes.ask_around()
    return CompiledChild(type(child).__name__, compiled, bare, strides)


def _failed(child_name: str, child: fx.GraphModule, inner: str, error: Exception) -> str:
    """One sentence, which is also the warning; the same failure is warned of once."""
    reason = f"{type(error).__name__}: {_first_line(str(error))}"
    sentence = f"{child_name} runs eager: inner {inner} failed: {reason}"
    log.info("%s\n%s", sentence, child.code)
    if sentence not in _warned:
        _warned.add(sentence)
        warnings.warn(
            f"torch_getfuse: {sentence} (options={{'strict': True}} raises instead)", stacklevel=2
        )
    return sentence


def _first_line(text: str) -> str:
    lines = (line.strip() for line in text.splitlines())
    return textwrap.shorten(next((line for line in lines if line), ""), _MOST_REASON)
