"""A program as one Python function: an operator per line, its constants bound, nothing looked up.

Networks of small maps spend as long between their operators as in some of them: on MobileNetV2 at
224 pixels, a loop over step objects costs 5 % of a call more than the function that is written
here. A map is kept in the form that the next operator takes: ``(N, C, H, W)``, or flat,
``(N * H * W, C)``, which is what oneDNN's linear operators take without reshaping it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from torch_getfuse.backend.fx_nodes.values import traced_value
from torch_getfuse.backend.packed.packed_conv import NotFinite, all_finite
from torch_getfuse.backend.packed.steps import Step

_LAST = torch.channels_last

PROOF = -1
"""Stands for the position of a step where the weights are proved."""


class Weights(NamedTuple):
    """Where a convolution's weights, made ready, come from: one of these is not ``None``.

    Attributes:
        position: among those that each call looks up.
        constant: they themselves.
        computed: what makes them ready in each call, of a weight and vectors that the graph
            computes.
    """

    position: int | None = None
    constant: Any = None
    computed: Callable[[Tensor, Sequence[Tensor]], Any] | None = None


class Writer:
    """Writes the function step by step.

    Args:
        slots: where a call's values hold inputs and constants of the graph.
        watched: nodes of values in which infinities and NaN are looked for.
        timed: whether it takes the time of each step.
    """

    def __init__(
        self, slots: Mapping[fx.Node, int], watched: Sequence[fx.Node], timed: bool
    ) -> None:
        self._slots = slots
        self._timed = timed
        self._names: dict[str, Any] = {
            "clock": time.perf_counter,
            "all_finite": all_finite,
            "NotFinite": NotFinite,
        }
        self._lines: list[str] = []
        self._maps: dict[fx.Node, str] = {}
        self._flats: dict[fx.Node, str] = {}
        self._dense: set[fx.Node] = set()  # maps that are known to be channels_last
        self._sums = bool(watched)
        if watched:
            sums = ", ".join(f"{self.map(node)}.sum()" for node in watched)
            self._line(f"sums = [{sums}]")
        else:
            self._line("sums = []")
        if timed:
            self.took(PROOF)

    def _line(self, text: str) -> None:
        self._lines.append(f"    {text}")

    def _constant(self, value: Any) -> str:
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        name = f"c{len(self._names)}"
        self._names[name] = value
        return name

    def _constants(self, values: Iterable[Any]) -> str:
        return "".join(f", {self._constant(value)}" for value in values)

    def _new(self, names: dict[fx.Node, str], node: fx.Node, prefix: str) -> str:
        name = names[node] = f"{prefix}{len(self._lines)}"
        return name

    # -- values -----------------------------------------------------------------------------------

    def map(self, node: fx.Node) -> str:
        """The name of a node's value as the graph has it, a map as ``(N, C, H, W)``."""
        if node in self._maps:
            return self._maps[node]
        if node in self._slots:
            name = self._new(self._maps, node, "v")
            self._line(f"{name} = values[{self._slots[node]}]")
            return name
        batch, channels, rows, cols = traced_value(node).shape
        size = (batch, channels, rows, cols)
        stride = (rows * cols * channels, 1, cols * channels, channels)
        name = self._new(self._maps, node, "m")
        self._line(f"{name} = {self._flats[node]}.as_strided({size}, {stride})")
        self._dense.add(node)
        return name

    def flat(self, node: fx.Node) -> str:
        """The name of a map as a matrix of positions by channels."""
        if node in self._flats:
            return self._flats[node]
        found = self.map(node)
        batch, channels, rows, cols = traced_value(node).shape
        size = (batch * rows * cols, channels)
        name = self._new(self._flats, node, "f")
        if node in self._dense:
            self._line(f"{name} = {found}.as_strided({size}, {(channels, 1)})")
        else:
            self._line(f"{name} = {found}.permute(0, 2, 3, 1).reshape{size}")
        return name

    def _dense_map(self, node: fx.Node) -> str:
        found = self.map(node)
        if node in self._dense:
            return found
        return f"{found}.contiguous(memory_format={self._constant(_LAST)})"

    def _ready(self, step: Step, weights: Weights) -> str:
        if weights.computed is not None:
            weight, *vectors = map(self.map, step.weights)
            made = self._constant(weights.computed)
            return f"{made}({weight}, [{', '.join(vectors)}])"
        if weights.position is not None:
            return f"ready[{weights.position}]"
        return self._constant(weights.constant)

    # -- steps ------------------------------------------------------------------------------------

    def node(self, step: Step) -> None:
        """A step that is no convolution."""
        given = ", ".join(map(self.map, step.maps))
        run = self._constant(step.whole)
        self._line(f"{self._new(self._maps, step.node, 'm')} = {run}({given})")

    def packed(self, step: Step, weights: Weights) -> None:
        """A convolution on packed weights."""
        conv = step.conv
        assert conv is not None
        if conv.linear:
            operands = [self.flat(node) for node in step.maps]
        else:
            x, *others = step.maps
            operands = [self.map(x), *map(self._dense_map, others)]
        if weights.constant is not None:
            ready = [self._constant(value) for value in weights.constant]
        else:
            self._line(f"weight, bias = {self._ready(step, weights)}")
            ready = ["weight", "bias"]
        operator, rest = conv.operator()
        call = (
            f"{self._constant(operator)}({', '.join((*operands, *ready))}{self._constants(rest)})"
        )
        if conv.linear:
            self._line(f"{self._new(self._flats, step.node, 'f')} = {call}")
        else:
            self._line(f"{self._new(self._maps, step.node, 'm')} = {call}")
            self._dense.add(step.node)

    def live(self, step: Step, weights: Weights) -> None:
        """A convolution on its weight as it lies."""
        conv = step.live
        assert conv is not None
        x, *others = step.maps
        operands = [
            self.map(step.weights[0]),
            self._ready(step, weights),
            self.flat(x) if conv.shape.is_linear else self.map(x),
            self.flat(others[0]) if others else "None",
        ]
        call = f"{self._constant(conv.product)}({', '.join(operands)}, sums)"
        self._line(f"{self._new(self._flats, step.node, 'f')} = {call}")
        self._sums = True

    def strips(
        self,
        steps: Sequence[Step],
        weights: Sequence[Weights | None],
        run: Callable[..., Sequence[Tensor]],
        given: Sequence[fx.Node],
        outputs: Sequence[fx.Node],
    ) -> None:
        """A segment strip by strip.

        Args:
            steps: of the segment.
            weights: of those that are convolutions.
            run: from weights made ready, one value per step, and maps to the results, which are
                ``channels_last``.
            given: the maps.
            outputs: whose values the results are.
        """
        ready = ", ".join(
            "None" if made is None else self._ready(step, made)
            for step, made in zip(steps, weights, strict=True)
        )
        maps = ", ".join(map(self._dense_map, given))
        call = f"{self._constant(run)}(({ready},), ({maps},))"
        names = ", ".join(f"m{len(self._lines)}_{k}" for k in range(len(outputs)))
        self._line(f"{names}, = {call}")
        self._maps.update(zip(outputs, names.split(", "), strict=True))
        self._dense.update(outputs)

    def release(self, nodes: Iterable[fx.Node]) -> None:
        """Forget values that nothing reads any more."""
        gone = []
        for node in nodes:
            if node not in self._slots:  # the caller holds inputs and constants
                gone += [name for name in (self._maps.get(node),) if name]
            gone += [name for name in (self._flats.get(node),) if name]
        if gone:
            self._line(f"del {', '.join(gone)}")

    def took(self, at: int) -> None:
        """Where times are taken, that of the step at a position ends here."""
        if self._timed:
            self._line("now = clock()")
            self._line(f"seconds[{at}] = seconds.get({at}, 0.0) + now - started")
            self._line("started = now")

    # -- the function -----------------------------------------------------------------------------

    def function(self, returned: Sequence[fx.Node]) -> Callable[..., tuple[Any, ...]]:
        """The function, which returns the values of some nodes.

        It takes the values of a call by slot and weights made ready; where times are taken, also
        seconds by position, which it adds to, and the time at which the first of them began. It
        raises :class:`NotFinite` where inputs or weights hold infinities or NaN.
        """
        results = ", ".join(map(self.map, returned))
        if self._sums:
            self._line("if not all_finite(sums): raise NotFinite")
        self._line(f"return ({results}{',' if results else ''})")
        more = ", seconds, started" if self._timed else ""
        text = "\n".join([f"def program(values, ready{more}):", *self._lines])
        names = self._names
        exec(compile(text, "<torch_getfuse program>", "exec"), names)
        found: Callable[..., tuple[Any, ...]] = names["program"]
        return found
