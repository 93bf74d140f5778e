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
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from torch_getfuse.backend.fx_nodes.effects import attribute
from torch_getfuse.backend.fx_nodes.values import traced_value
from torch_getfuse.backend.packed.live_conv import LiveConv
from torch_getfuse.backend.packed.packed_conv import NotFinite, PackedConv, all_finite
from torch_getfuse.backend.packed.snapshots import Kept
from torch_getfuse.backend.packed.steps import Step, as_traced
from torch_getfuse.backend.packed.strips import Segment, StripPlan, last_reads, run_strips
from torch_getfuse.backend.packed.weight_store import ConvSlots, ConvStore, Ready

_LAST = torch.channels_last


PROOF = -1
"""Stands for the position of a step where the weights are proved."""


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
        slots: dict[fx.Node, int] = {}
        self._inputs: list[int] = []
        self._constants: list[tuple[int, Any]] = []
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                self._inputs.append(slots.setdefault(node, len(slots)))
            elif node.op == "get_attr":
                slot = slots.setdefault(node, len(slots))
                self._constants.append((slot, attribute(gm, str(node.target))))
        for step in steps:
            slots[step.node] = len(slots)
        self._slots = slots
        self._size = len(slots) + 2  # and behind them ready weights, and sums that must be finite
        self._watched = [slots[node] for node in _hidden_by_activations(gm, steps)]
        self._results: Any = gm.graph.output_node().args[0]
        self._threads = threads
        self._live = frozenset(live)
        self._plain = gm.forward
        self._stored: list[ConvSlots] = []
        self._units = self._make_units(gm, steps, choices)
        self._store = ConvStore(self._stored, kept or kept_for(gm))

    def _make_units(
        self, gm: fx.GraphModule, steps: Sequence[Step], choices: Sequence[Choice]
    ) -> list[tuple[int, Callable[[list[Any]], None]]]:
        """What is called in turn, each with the position of its first step."""
        returned = set(gm.graph.output_node().all_input_nodes)
        last = last_reads(steps)
        units: list[tuple[int, Callable[[list[Any]], None]]] = []
        starts = {choice.first: choice for choice in choices}
        at = 0
        while at < len(steps):
            choice = starts.get(at)
            end = at + 1 if choice is None else choice.end
            if choice is None:
                units.append((at, self._whole(steps[at], at in self._live)))
            else:
                segment = Segment.part(steps, at, end, returned, last)
                plan = segment.plan(choice.strips)
                ready = [
                    None if step.conv is None else self._ready(step, step.conv)
                    for step in segment.steps
                ]
                units.append((at, _Strips(segment, plan, self._slots, ready, self._threads)))
            gone = [
                self._slots[node]
                for node, when in last.items()
                if at <= when < end and node not in returned and node.op not in _KEPT
            ]
            if gone:
                units.append((at, partial(_release, tuple(gone))))
            at = end
        return units

    def _whole(self, step: Step, live: bool) -> Callable[[list[Any]], None]:
        slots, target = self._slots, self._slots[step.node]
        maps = tuple(slots[node] for node in step.maps)
        if step.conv is None:
            assert step.whole is not None
            return partial(_run_node, step.whole, maps, target)
        if live:
            assert step.live is not None
            weight = slots[step.weights[0]]
            return partial(_run_live, step.live, self._ready(step, step.live), weight, maps, target)
        return partial(_run_conv, step.conv, self._ready(step, step.conv), maps, target)

    def _ready(self, step: Step, conv: PackedConv | LiveConv) -> Ready:
        """What gives a convolution its weights."""
        weight, *vectors = step.weights
        slots = ConvSlots(
            conv,
            self._slots[weight],
            tuple(self._slots[node] for node in vectors),
            int(traced_value(weight).shape[0]),
        )
        if any(node.op not in _KEPT for node in step.weights):
            return slots.anew
        self._stored.append(slots)
        return partial(_stored, len(self._stored) - 1)

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
        env = self._filled(args)
        for _, unit in self._units:
            unit(env)
        if not all_finite(env[-1]):
            raise NotFinite
        return self._found(env)

    def timed(self, *args: Any) -> dict[int, float]:
        """Run the graph for its times: seconds by the position of a unit's first step.

        Those of proving the weights stand at :data:`PROOF`.
        """
        started = time.perf_counter()
        env = self._filled(args)
        seconds = {PROOF: time.perf_counter() - started}
        for at, unit in self._units:
            started = time.perf_counter()
            unit(env)
            seconds[at] = seconds.get(at, 0.0) + time.perf_counter() - started
        return seconds

    def _filled(self, args: Sequence[Any]) -> list[Any]:
        env: list[Any] = [None] * self._size
        for slot, value in zip(self._inputs, args, strict=True):
            env[slot] = value
        for slot, value in self._constants:
            env[slot] = value
        env[-2] = self._store.ready(env)
        env[-1] = [env[slot].sum() for slot in self._watched]
        return env

    def _found(self, env: list[Any]) -> tuple[Any, ...]:
        found = fx.node.map_arg(self._results, lambda node: as_traced(env[self._slots[node]], node))
        return tuple(found)


_KEPT = ("placeholder", "get_attr")


def kept_for(gm: fx.GraphModule) -> Kept:
    """A place for the weights of a graph's programs.

    Dynamo guards shapes, layouts and types of inputs, but not of constants.
    """
    return Kept(guarded=not any(node.op == "get_attr" for node in gm.graph.nodes))


def _release(slots: tuple[int, ...], env: list[Any]) -> None:
    for slot in slots:
        env[slot] = None


def _run_node(
    whole: Callable[..., Any], maps: tuple[int, ...], target: int, env: list[Any]
) -> None:
    env[target] = whole(*(env[slot] for slot in maps))


def _stored(position: int, env: Sequence[Any]) -> Any:
    return env[-2][position]


def _run_conv(
    conv: PackedConv, ready: Ready, maps: tuple[int, ...], target: int, env: list[Any]
) -> None:
    x = env[maps[0]]
    other = env[maps[1]].contiguous(memory_format=_LAST) if conv.adds else None
    env[target] = conv.whole(ready(env), x, other)


def _run_live(
    conv: LiveConv,
    ready: Ready,
    weight: int,
    maps: tuple[int, ...],
    target: int,
    env: list[Any],
) -> None:
    other = env[maps[1]] if len(maps) > 1 else None
    env[target] = conv.whole(env[weight], ready(env), env[maps[0]], other, env[-1])


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

    def __init__(
        self,
        segment: Segment,
        plan: StripPlan,
        slots: dict[fx.Node, int],
        ready: Sequence[Ready | None],
        threads: int,
    ) -> None:
        self.segment, self.plan, self.ready = segment, plan, ready
        self.given = tuple(slots[node] for node in plan.outside)
        self.targets = [
            (slots[segment.steps[k].node], k, segment.steps[k].node) for k in plan.outputs
        ]
        self.threads = min(threads, len(plan.strips))
        count = len(plan.strips)
        self.bands = [
            range(t * count // self.threads, (t + 1) * count // self.threads)
            for t in range(self.threads)
        ]

    def __call__(self, env: list[Any]) -> None:
        given = [env[slot].contiguous(memory_format=_LAST) for slot in self.given]
        calls: list[Any] = [
            partial(step.conv.rows, ready(env)) if step.conv and ready else step.rows
            for step, ready in zip(self.segment.steps, self.ready, strict=True)
        ]
        batch = given[0].shape[0]
        results: list[Tensor | None] = [None] * len(self.segment.steps)
        for slot, k, node in self.targets:
            value = traced_value(node)
            results[k] = torch.empty(value.shape, dtype=value.dtype, memory_format=_LAST)
            env[slot] = results[k]
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
