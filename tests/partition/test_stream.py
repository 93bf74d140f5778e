"""Edges against their definition: windows listed position by position."""

from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.simulator import unit_span
from torch_getfuse.ir import Op, OpGraph, Read, Tensor, Window
from torch_getfuse.partition.cost.lbdf.axis_maps import NEVER, make_edge


def random_edge(rng: Random) -> tuple[OpGraph, Read]:
    """One operator over one map, with any window of the IR."""
    high, wide = rng.randint(1, 9), rng.randint(1, 9)
    kind = rng.choice(("identity", "sliding", "sliding", "transposed", "resize", "reduce", "whole"))
    size: list[int] = [high, wide]
    if kind in ("sliding", "transposed"):
        pair = lambda low, top: (rng.randint(low, top), rng.randint(low, top))  # noqa: E731
        make = Window.sliding if kind == "sliding" else Window.transposed
        window = make(pair(1, 4), pair(1, 3), pair(1, 2), pair(0, 3), pair(0, 3))
        size = [window.output_size(axis, n) or n for axis, n in enumerate(size)]
        if window.kind.value == kind:
            size = [window.output_size(axis, n) or 0 for axis, n in enumerate((high, wide))]
    elif kind == "resize":
        scale = rng.choice((0.5, 2.0, 3.0, 1.4))
        size = [max(1, int(high * scale)), max(1, int(wide * scale))]
        window = Window.resize((scale, scale))
    elif kind == "identity":
        window = Window.identity()
        if rng.random() < 0.3:
            high = wide = 1
    else:
        window = getattr(Window, kind)()
        size = [1, 1] if rng.random() < 0.5 else size
    if min(size) < 1:
        return random_edge(rng)
    tensors = {"x": Tensor.of("x", (1, 2, high, wide)), "y": Tensor.of("y", (1, 2, *size))}
    read = Read("x", window)
    return OpGraph(("x",), ("y",), (Op("y", "op", (read,), "y"),), tensors), read


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.booleans())
def test_counts_equal_the_windows(seed: int, pixel: bool) -> None:
    graph, read = random_edge(Random(seed))
    source, target = graph.tensors["x"], graph.tensors["y"]
    edge = make_edge(graph, read, "y", pixel)
    spans = [unit_span(read, source, target, unit, pixel) for unit in range(edge.units_out)]
    for count in range(edge.units_out + 1):
        needed = max((span[-1] + 1 for span in spans[:count] if span), default=0)
        assert edge.needed(count) == needed
        later = [span.start for span in spans[count:] if span]
        assert edge.released(count) == min(later, default=edge.units_in)
    counts = np.arange(edge.units_out + 1)
    assert edge.needed_all(counts).tolist() == [edge.needed(n) for n in counts.tolist()]
    assert edge.released_all(counts).tolist() == [edge.released(n) for n in counts.tolist()]
    firsts = edge.first_all(np.array([*range(1, edge.units_in + 2), NEVER]))
    for wanted, found in enumerate(firsts.tolist(), start=1):
        first = next((n for n in range(edge.units_out + 1) if edge.needed(n) >= wanted), NEVER)
        assert found == first
    if edge.holds:
        for final in (edge.units_out, (edge.units_out + 1) // 2):
            live = (edge.needed(n + 1) - edge.released(n) for n in range(final))
            assert edge.widest(final) == max(live, default=0)


def test_cost_of_a_window_does_not_depend_on_the_map() -> None:
    """Sampled positions stay few: a map eight times as tall is not looked at row by row."""
    from torch_getfuse.partition.cost.lbdf.axis_maps import sample_positions

    assert sample_positions(10_000, 3, 2) == [0, 1, 2, 3, 4, 9997, 9998, 9999]
    assert sample_positions(7, 3, 2) == list(range(7))
