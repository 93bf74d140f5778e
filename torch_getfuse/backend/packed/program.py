"""An inference graph as packed convolutions, some of them strip by strip (``inner="auto"``).

The program computes what the graph computes, to rounding: batch norms are folded into weights and
maps are ``channels_last``. Everything that it has no step for runs as the FX node it is, in the
graph's order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx

from torch_getfuse.backend.fx_nodes.effects import attribute
from torch_getfuse.backend.fx_nodes.values import traced_value
from torch_getfuse.backend.packed.live_conv import LiveConv
from torch_getfuse.backend.packed.packed_conv import NotFinite, PackedConv
from torch_getfuse.backend.packed.snapshots import Kept
from torch_getfuse.backend.packed.steps import Step, as_traced
from torch_getfuse.backend.packed.straight_line import Weights, Writer
from torch_getfuse.backend.packed.strips import Segment, StripPlan, last_reads, run_strips
from torch_getfuse.backend.packed.weight_store import ConvSlots, ConvStore, prepare
from torch_getfuse.backend.torch_private import is_parameter_freezing

_LAST = torch.channels_last


@dataclass(frozen=True)
class Choice:
    """Consecutive steps ``first`` to ``end - 1`` that run as so many strips."""

    first: int
    end: int
    strips: int


class FastProgram:
    """A callable with the signature of a graph, which returns a tuple.

    Args:
        gm: an inference graph that returns a tuple.
        steps: its steps (:func:`build_steps`).
        choices: what runs strip by strip, in order and disjoint.
        threads: how many threads share the strips of a segment.
        live: positions of steps that read their weights where these lie.
        kept: weights made ready, shared with programs of the same graph for other sizes; left out,
            it has its own.

    Raises:
        NotFinite: where frozen weights hold infinities or NaN.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        steps: Sequence[Step],
        choices: Sequence[Choice],
        threads: int,
        live: Collection[int] = (),
        kept: Kept | None = None,
    ) -> None:
        nodes = {
            op: [node for node in gm.graph.nodes if node.op == op]
            for op in ("placeholder", "get_attr")
        }
        self._constants = [attribute(gm, str(node.target)) for node in nodes["get_attr"]]
        known = (*nodes["placeholder"], *nodes["get_attr"])
        self._slots = {node: slot for slot, node in enumerate(known)}
        self._inputs = len(nodes["placeholder"])
        self._steps, self._choices, self._threads = steps, choices, threads
        self._live = frozenset(live)
        self._plain = gm.forward
        self._results: Any = gm.graph.output_node().args[0]
        self._returned = gm.graph.output_node().all_input_nodes
        self._watched = _hidden_by_activations(gm, steps)
        self._kept = kept or kept_for(gm)
        self._stored: list[ConvSlots] = []
        self._weights = [self._weights_of(at, step) for at, step in enumerate(steps)]
        self._store = ConvStore(self._stored, self._kept)
        self._run = self._written(timed=False)

    def _weights_of(self, at: int, step: Step) -> Weights | None:
        """Where the weights of a step come from; ``None`` where it is no convolution."""
        conv = step.live if at in self._live else step.conv
        if conv is None:
            return None
        if any(node not in self._slots for node in step.weights):
            return Weights(computed=partial(prepare, conv))
        if self._kept.frozen and all(node.op == "get_attr" for node in step.weights):
            return Weights(constant=self._frozen(conv, step.weights))
        weight, *vectors = (self._slots[node] for node in step.weights)
        channels = int(traced_value(step.weights[0]).shape[0])
        self._stored.append(ConvSlots(conv, weight, tuple(vectors), channels))
        return Weights(position=len(self._stored) - 1)

    def _frozen(self, conv: PackedConv | LiveConv, weights: Sequence[fx.Node]) -> Any:
        """The weights of a convolution made ready once and for all."""
        made = self._kept.constants
        name = (conv.made_of, *(node.name for node in weights))
        if name not in made:
            values = [self._constants[self._slots[node] - self._inputs] for node in weights]
            weight, *vectors = (value.detach() for value in values)
            made[name] = prepare(conv, weight, vectors)
        return made[name]

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """Run the graph; inputs as the graph takes them.

        By its FX nodes, where inputs or weights hold infinities or NaN.
        """
        try:
            return self.compute(*args)
        except NotFinite:
            return tuple(self._plain(*args))

    def compute(self, *args: Any) -> tuple[Any, ...]:
        """Run the graph in the fast way, and no other.

        Raises:
            NotFinite: where inputs or weights hold infinities or NaN.
        """
        values = (*args, *self._constants)
        return self._found(self._run(values, self._store.ready(values)))

    def timed(self, *args: Any) -> dict[int, float]:
        """Run the graph for its times: seconds by the position of a step, or a segment's first.

        Those of looking at inputs and weights stand at :data:`PROOF`.
        """
        run = self._timed  # written before the clock starts
        seconds: dict[int, float] = {}
        started = time.perf_counter()
        values = (*args, *self._constants)
        with suppress(NotFinite):  # it has run then, and taken its time
            run(values, self._store.ready(values), seconds, started)
        return seconds

    def _found(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """The results, from the values of the nodes that are returned."""
        pairs = zip(self._returned, values, strict=True)
        made = {node: as_traced(value, node) for node, value in pairs}  # one, returned twice or not
        return tuple(fx.node.map_arg(self._results, made.__getitem__))

    @cached_property
    def _timed(self) -> Callable[..., Any]:
        return self._written(timed=True)

    def _written(self, timed: bool) -> Callable[..., tuple[Any, ...]]:
        """The program as one function (:meth:`Writer.function`)."""
        steps, returned = self._steps, set(self._returned)
        last = last_reads(steps)
        writer = Writer(self._slots, self._watched, timed)
        starts = {choice.first: choice for choice in self._choices}
        at = 0
        while at < len(steps):
            choice, step, weights = starts.get(at), steps[at], self._weights[at]
            end = at + 1 if choice is None else choice.end
            if choice is not None:
                self._write_strips(writer, Segment.part(steps, at, end, returned, last), choice)
            elif weights is None:
                writer.node(step)
            elif at in self._live:
                writer.live(step, weights)
            else:
                writer.packed(step, weights)
            gone = (node for node, when in last.items() if at <= when < end)
            writer.release(node for node in gone if node not in returned)
            writer.took(at)
            at = end
        return writer.function(self._returned)

    def _write_strips(self, writer: Writer, segment: Segment, choice: Choice) -> None:
        run = _Strips(segment, segment.plan(choice.strips), self._threads)
        outputs = [segment.steps[k].node for k in run.plan.outputs]
        weights = self._weights[choice.first : choice.end]
        writer.strips(segment.steps, weights, run, run.plan.outside, outputs)


_KEPT = ("placeholder", "get_attr")


def kept_for(gm: fx.GraphModule) -> Kept:
    """A place for the weights of a graph's programs.

    Dynamo guards shapes, layouts and types of inputs, but not of constants. Constants are frozen
    where Dynamo made them so because ``torch._inductor.config.freezing`` is on: with it the user
    says that weights do not change, and inductor bakes them in.
    """
    constants = any(node.op == "get_attr" for node in gm.graph.nodes)
    return Kept(guarded=not constants, frozen=constants and is_parameter_freezing())


def _hidden_by_activations(gm: fx.GraphModule, steps: Sequence[Step]) -> list[fx.Node]:
    """Inputs and constants that a fused activation reads something of, other than as weights.

    oneDNN's activations turn NaN into numbers, so those of the inputs have to be seen before.
    """
    read: set[fx.Node] = set()
    for step in reversed(steps):
        if step.node in read or (step.conv is not None and step.conv.activation.name != "none"):
            read.update(step.maps)
    found = []
    for node in gm.graph.nodes:
        if node in read and node.op in _KEPT:
            is_constant = node.op == "get_attr"
            value = attribute(gm, str(node.target)) if is_constant else traced_value(node)
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                found.append(node)
    return found


class _Strips:
    """A segment in strips, image by image, shared among threads by bands of strips."""

    def __init__(self, segment: Segment, plan: StripPlan, threads: int) -> None:
        self.segment, self.plan = segment, plan
        self.threads = min(threads, len(plan.strips))
        count = len(plan.strips)
        self.bands = [
            range(t * count // self.threads, (t + 1) * count // self.threads)
            for t in range(self.threads)
        ]

    def __call__(self, ready: Sequence[Any], given: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, from weights made ready, one per step, and maps, ``channels_last``."""
        steps = self.segment.steps
        calls: list[Any] = [
            partial(step.conv.rows, made) if step.conv else step.rows
            for step, made in zip(steps, ready, strict=True)
        ]
        batch = given[0].shape[0]
        results: list[Tensor | None] = [None] * len(steps)
        outputs = []
        for k in self.plan.outputs:
            value = traced_value(steps[k].node)
            outputs.append(torch.empty(value.shape, dtype=value.dtype, memory_format=_LAST))
            results[k] = outputs[-1]
        for image in range(batch):
            one = [value[image : image + 1] if len(value) > 1 else value for value in given]
            into = [None if value is None else value[image : image + 1] for value in results]
            if self.threads == 1:
                run_strips(self.segment, self.plan, one, calls, into, self.bands[0])
                continue
            _in_threads(
                [
                    partial(run_strips, self.segment, self.plan, one, calls, into, band)
                    for band in self.bands
                ]
            )
        return outputs


# -- threads ----------------------------------------------------------------------------------

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def _in_threads(tasks: Sequence[Callable[[], None]]) -> None:
    """Run tasks at once, each on one thread of torch's; raises what a task raises."""
    pool = _pool(len(tasks))
    inference = torch.is_inference_mode_enabled()
    futures: list[Future[None]] = [pool.submit(_in_mode, inference, task) for task in tasks]
    for future in futures:
        future.result()


def _in_mode(inference: bool, task: Callable[[], None]) -> None:
    # Modes are each thread's own; what is made in inference mode can be written there only.
    with torch.inference_mode(inference), torch.no_grad():
        task()


def _pool(workers: int) -> ThreadPoolExecutor:
    with _lock:
        if workers not in _pools:
            outer = torch.get_num_threads()
            pool = ThreadPoolExecutor(workers, "getfuse", torch.set_num_threads, (1,))
            barrier = threading.Barrier(workers)
            list(pool.map(lambda _: barrier.wait(), range(workers)))  # all have started
            # torch takes the last number set for that of threads still to come.
            torch.set_num_threads(outer)
            _pools[workers] = pool
        return _pools[workers]
