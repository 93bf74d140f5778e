"""The optimum of cascade by enumeration: that it is one, and what the random graphs ask of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from random import Random

from tests.cascade_brute import optimum, random_cascade
from tests.cascade_simulator import Cascade, Illegal
from tests.graphs import cascade_graph
from torch_getfuse.ir import WindowKind
from torch_getfuse.partition.node_set import bits


def sequences(cascade: Cascade, done: int = 0) -> Iterator[list[int]]:
    """Every order of disjoint steps that covers the graph and runs nothing too early."""
    graph = cascade.graph
    everything = (1 << len(graph)) - 1
    if done == everything:
        yield []
    for step in range(1, everything + 1):
        before = done | step
        if not step & done and all(not graph.predecessors[i] & ~before for i in bits(step)):
            for rest in sequences(cascade, before):
                yield [step, *rest]


def least_total(cascade: Cascade) -> int:
    """The optimum without any memo: every sequence with every set of residents."""
    names, totals = list(cascade.graph.tensors), []
    plans = list(sequences(cascade))
    for count in range(len(names) + 1):
        for residents in combinations(names, count):
            for plan in plans:
                try:
                    runs = cascade.run_plan([(step, None) for step in plan], residents)
                except Illegal:
                    continue
                totals.append(sum(run.total for run in runs))
    return min(totals)


def test_optimum_equals_plain_enumeration() -> None:
    for seed in range(40):
        rng = Random(seed)
        cascade = random_cascade(rng, rng.choice((1, 2, 3)))
        assert optimum(cascade).total == least_total(cascade), seed


def test_the_plan_found_runs_and_costs_what_is_said() -> None:
    for seed in range(40):
        cascade = random_cascade(Random(seed))
        best = optimum(cascade)
        runs = cascade.run_plan(best.steps, best.residents)
        assert sum(run.total for run in runs) == best.total, seed
        assert all(run.buffer < cascade.buffer_bytes for run in runs)


def test_the_graphs_have_everything() -> None:
    seen: Counter[str] = Counter()
    for seed in range(2000):
        graph = cascade_graph(Random(seed))
        seen["read twice"] += any(len(readers) > 1 for readers in graph.consumers.values())
        seen["in place"] += any(graph.overwrites)
        seen["sums"] += any(len(op.reads) > 1 and not op.mixes_channels for op in graph)
        seen["outputs"] += len(graph.outputs) > 1
        seen["inputs"] += len(graph.inputs) > 1
        seen["outputs that are read"] += any(graph.consumers[name] for name in graph.outputs)
        seen["further orders"] += graph.ordered
        for kind in WindowKind:
            seen[kind] += any(r.window.kind is kind for op in graph for r in op.reads)
    assert min(seen.values()) > 50, seen


def test_the_buffers_decide_something() -> None:
    """Optima take every way, hold residents over other steps and write over them."""
    seen: Counter[str] = Counter()
    for seed in range(150):
        cascade = random_cascade(Random(seed))
        best = optimum(cascade)
        masks = [step for step, _ in best.steps]
        for k, (step, way) in enumerate(best.steps):
            around = cascade.around(masks, k, best.residents)
            run = cascade.run_step(step, way, around)
            seen[way.kind] += 1
            seen["several stripes"] += way.kind == "stripes" and way.count > 1
            seen["beside"] += around.beside > 0
            if way.kind in ("line", "stripes"):
                alone = cascade.run_step(step, way, around, {})
                seen["written over"] += run.features < alone.features
    expected = ("line", "stripes", "slices", "unfusable", "several stripes", "beside")
    assert all(seen[what] >= 3 for what in (*expected, "written over")), seen
