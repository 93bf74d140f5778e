"""The same steps for the cascade model of the package and for its oracle."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from tests.cascade_simulator import LINE, Around, StepRun, Way
from tests.cascade_simulator import Cascade as Oracle
from tests.graphs import grown_group
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.cascade.layout import places
from torch_getfuse.partition.cost.cascade.model import Cascade
from torch_getfuse.partition.cost.cascade.pricing import ANY, Beside, Priced, least_reread
from torch_getfuse.partition.node_set import ancestors, bits, descendants, is_convex


def model_of(oracle: Oracle) -> Cascade:
    return Cascade(
        oracle.graph, oracle.activation_bytes, oracle.weight_bytes, oracle.slice_channels
    )


def tensor_mask(graph: OpGraph, names: Iterable[str]) -> int:
    number = {name: k for k, name in enumerate(graph.tensors)}
    return sum(1 << number[name] for name in names)


def tensor_names(graph: OpGraph, mask: int) -> frozenset[str]:
    names = list(graph.tensors)
    return frozenset(names[k] for k in bits(mask))


def beside_of(oracle: Oracle, mask: int, around: Around, free: bool = False) -> tuple[Beside, int]:
    """What the package is told of a step's residents, and which of them were alive before it."""
    graph = oracle.graph
    known = around.resident.intersection(oracle.reads_of(mask)) - around.first
    beside = Beside(
        tensor_mask(graph, around.resident),
        tensor_mask(graph, around.resident - around.last),
        around.beside,
        free,
    )
    return beside, tensor_mask(graph, known)


# -- random steps ----------------------------------------------------------------------------------


def random_step(rng: Random, graph: OpGraph, size: int) -> int:
    """A connected convex set of up to ``size`` operators."""
    above, below = ancestors(graph), descendants(graph)
    while True:
        mask = grown_group(rng, graph, rng.randint(1, size))
        if is_convex(mask, above, below):
            return mask


def random_around(rng: Random, oracle: Oracle, mask: int) -> Around:
    """Residents that some plan could have at a step."""
    graph, loads = oracle.graph, oracle.reads_of(mask)
    share = rng.choice((0.0, 0.3, 0.6, 1.0))
    resident = [name for name in oracle.touched(mask) if rng.random() < share]
    first, last = set(), set()
    for name in resident:
        elsewhere = bool(oracle.read_by(name) & ~mask)
        if not elsewhere or (name in loads and rng.random() < 0.5):
            last.add(name)
        fresh = not elsewhere or (name not in last and rng.random() < 0.5)
        if fresh and name in loads and name in graph.inputs:
            first.add(name)
    others = rng.choice(list(oracle.whole.values())) if rng.random() < 0.4 else 0
    return Around(frozenset(resident), frozenset(first), frozenset(last), others)


def random_way(rng: Random, oracle: Oracle, mask: int) -> Way:
    slices = list(oracle.slices(mask))
    kind = rng.choice(("line", "stripes", "slices") if slices else ("line", "stripes"))
    if kind == "line":
        return LINE
    if kind == "slices":
        return rng.choice(slices)
    longest = oracle.longest(mask)
    count = min(longest, rng.choice((1, 2, 3, rng.randint(1, longest))))
    stays = [i for i in bits(oracle.weighty(mask)) if rng.random() < 0.5]
    return Way("stripes", count, sum(1 << i for i in stays))


def random_buffer(rng: Random, oracle: Oracle, mask: int, around: Around) -> int:
    """A buffer that some way of a step fits barely, or just not, or easily.

    It is one that needs less than some others, or those would be chosen: they move less.
    """
    tries = [random_way(rng, oracle, mask) for _ in range(rng.choice((1, 3, 9)))]
    need = min(oracle.run_step(mask, way, around).buffer for way in tries)
    return max(1, need + rng.choice((0, 1, 1, 2, rng.randint(1, need // 8 + 1))))


# -- one step, both ways ---------------------------------------------------------------------------


def assert_step(oracle: Oracle, model: Cascade, mask: int, around: Around) -> tuple[Way, StepRun]:
    """Both choose a way that moves and holds the same; ``UNFIT`` where neither finds one."""
    expected = oracle.best_way(mask, around)
    beside, known = beside_of(oracle, mask, around)
    limit = oracle.buffer_bytes
    group = model.group(mask)
    step = model.step(mask, beside, known, limit)
    again = least_reread(group, beside, limit, ANY)
    if expected is None:
        assert step is None
        assert again is None
        return UNFIT
    way, run = expected
    assert step is not None
    assert step.priced is not None
    priced = step.priced
    assert step.dram == (run.read, run.write, run.weight)
    assert (priced.kind, priced.count, priced.buffer) == (way.kind, way.count, run.buffer)
    assert priced.reread == run.total - sum(oracle.crossing(mask, around)) - group.weights
    assert again == priced.reread
    assert least_reread(group, beside, limit, priced.reread) == priced.reread
    if priced.reread:
        assert least_reread(group, beside, limit, priced.reread - 1) is None
    if way.kind == "stripes":
        assert oracle.weights_of(priced.stay) == oracle.weights_of(way.stays)
    assert_layout(oracle, model, mask, beside, priced, run)
    return way, run


UNFIT = Way("none"), StepRun({}, {}, 0, 0, 0, 0, 0, 0)


def assert_layout(
    oracle: Oracle, model: Cascade, mask: int, beside: Beside, priced: Priced, run: StepRun
) -> None:
    """The storages hold each tensor once; with weights and others they take what is said."""
    found = places(model.group(mask), beside, priced)
    assert sorted(t for place in found for t in place.tensors) == list(
        bits(tensor_mask(oracle.graph, oracle.touched(mask)))
    )
    assert sum(place.bytes for place in found) == run.features
    assert run.features + run.weights + beside.others == priced.buffer
    assert sum(term.bytes for term in model.terms_of(mask, beside, priced)) == priced.buffer
    stays = beside.touched | priced.kept
    for place in found:
        if place.resident:
            assert place.bytes == model.facts.size[place.tensors[-1]]
        assert place.resident == any(stays >> t & 1 for t in place.tensors)
