"""Plans of the oracle of cascade against arithmetic by hand, its optimum against enumeration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from random import Random

import pytest

from tests.cascade_brute import optimum, random_cascade
from tests.cascade_simulator import LINE, UNFUSABLE, Cascade, Illegal, Way
from tests.graphs import IDENTITY, Builder, cascade_graph, heavy_between
from torch_getfuse.ir import WindowKind
from torch_getfuse.partition.node_set import bits

AMPLE = 1 << 20


def test_a_plan_of_two_steps_with_residents() -> None:
    """conv | add of the residual block: the map between stays, and so does x."""
    build = Builder()
    x = build.input((1, 4, 8, 8))
    build.add(build.conv(x, 4, kernel=3), x)
    cascade = Cascade(build.graph(), AMPLE)
    plan = [(0b01, LINE), (0b10, LINE)]
    runs = cascade.run_plan(plan)
    # x 3 rows, the map 1; then one row of each operand and the sum.
    assert [run.features for run in runs] == [4 * 32, 3 * 32]
    assert [run.total for run in runs] == [256 + 256 + 148, 3 * 256]
    runs = cascade.run_plan(plan, ["x0", "conv0"])
    assert [run.features for run in runs] == [2 * 256, 2 * 256 + 32]
    assert [(run.read, run.write, run.weight) for run in runs] == [(256, 0, 148), (0, 256, 0)]
    # The sum resident too is written over one of them: it costs no row more.
    runs = cascade.run_plan(plan, ["x0", "conv0", "add1"])
    assert [run.features for run in runs] == [2 * 256, 2 * 256]
    assert [run.write for run in runs] == [0, 256]
    # x alone is held over the first step and read in it, once.
    runs = cascade.run_plan(plan, ["x0"])
    assert [run.features for run in runs] == [256 + 32, 256 + 32 + 32]
    assert [(run.read, run.write) for run in runs] == [(256, 256), (256, 256)]


def test_a_resident_that_a_step_does_not_touch_is_beside_it() -> None:
    """x is read by the first and the last of three convolutions."""
    build = Builder()
    x = build.input((1, 1, 4, 4))
    middle = build.conv(build.conv(x, 1), 1)
    build.add(middle, x)
    cascade = Cascade(build.graph(), AMPLE, weight_bytes=0)
    plan = [(0b001, LINE), (0b010, LINE), (0b100, LINE)]
    runs = cascade.run_plan(plan, ["x0"])
    assert [(run.features, run.beside) for run in runs] == [(16 + 4, 0), (8, 16), (16 + 4 + 4, 0)]
    assert [run.read for run in runs] == [16, 16, 16]


def test_an_unfusable_operator_is_a_step_of_its_own() -> None:
    """1,000 bytes of weights of one channel can neither be held, nor streamed, nor sliced."""
    cascade = Cascade(heavy_between(), 100)
    assert cascade.unfusable == 0b010
    plan = [(0b001, LINE), (0b010, UNFUSABLE), (0b100, LINE)]
    runs = cascade.run_plan(plan)
    assert [run.total for run in runs] == [16 + 16 + 2, 16 + 16 + 1000, 3 * 16]
    assert runs[1].buffer == 0
    assert cascade.run_plan(plan, ["x0", "add2"])[0].buffer == 16 + 4 + 2
    for resident in ("conv0", "conv1"):
        with pytest.raises(Illegal, match=f"{resident} is resident while an unfusable"):
            cascade.run_plan(plan, [resident])
    assert optimum(cascade).total == sum(run.total for run in runs)


@pytest.mark.parametrize(
    ("plan", "residents", "reason"),
    [
        ([(0b111, LINE)], [], "an unfusable operator is a step of its own"),
        ([(0b001, LINE), (0b010, LINE), (0b100, LINE)], [], "unfusable operator runs in no way"),
        ([(0b001, UNFUSABLE), (0b010, None), (0b100, None)], [], "fusable operator runs in some"),
        ([(0b010, None), (0b001, None), (0b100, None)], [], "before something that it needs"),
        ([(0b001, None), (0b010, None)], [], "each operator is in one step"),
        ([(0b001, None), (0b001, None), (0b010, None), (0b100, None)], [], "in one step"),
        ([(0b001, None), (0b010, None), (0b100, None)], ["nothing"], "nothing is in no step"),
        ([(0b001, Way("slices", 2)), (0b010, None), (0b100, None)], [], "not run in 2 slices"),
    ],
)
def test_plans_that_break_a_rule(
    plan: list[tuple[int, Way | None]], residents: list[str], reason: str
) -> None:
    with pytest.raises(Illegal, match=reason):
        Cascade(heavy_between(), 100).run_plan(plan, residents)


def test_the_buffer_is_a_strict_limit_and_steps_are_connected() -> None:
    build = Builder()
    x = build.input((1, 1, 4, 4))
    build.op("neg", [(x, IDENTITY)], (1, 1, 4, 4))
    build.op("abs", [(x, IDENTITY)], (1, 1, 4, 4))
    graph = build.graph()
    plan = [(0b01, LINE), (0b10, LINE)]
    assert Cascade(graph, 9).run_plan(plan)[0].buffer == 8
    # x resident: 16 + 4 in both steps; read once.
    assert sum(run.total for run in Cascade(graph, 21).run_plan(plan, ["x0"])) == 3 * 16
    with pytest.raises(Illegal, match="step 0 holds 20 bytes, not below 20"):
        Cascade(graph, 20).run_plan(plan, ["x0"])
    with pytest.raises(Illegal, match="step 0 fits in no way"):
        Cascade(graph, 20).run_plan([(0b01, None), (0b10, None)], ["x0"])
    with pytest.raises(Illegal, match="a step is connected"):
        Cascade(graph, 99).run_plan([(0b11, LINE)])
    # Two operators that only share their input are no group, so the input is read once only if
    # it stays.
    assert optimum(Cascade(graph, 20)).total == 4 * 16
    assert optimum(Cascade(graph, 21)).total == 3 * 16


def test_an_input_that_stays_for_one_step_in_slices_is_read_once() -> None:
    """The life of x is one step. A 3x3 window holds both of its rows anyway, so to stay is free.

    By lines 4 + 8 + 40 bytes are needed; in two slices of 20 bytes 32. Staging for stripes is as
    much as all weights, for there are fewer than 16 channels.
    """
    build = Builder()
    build.conv(build.input((1, 1, 2, 2)), 4, kernel=3)
    cascade = Cascade(build.graph(), 33)
    (apart,) = cascade.run_plan([(1, None)])
    (stays,) = cascade.run_plan([(1, None)], ["x0"])
    assert apart.buffer == stays.buffer == 4 + 8 + 20
    assert (apart.read, stays.read) == (2 * 4, 4)
    assert optimum(cascade).total == stays.total == 4 + 16 + 40


# -- the optimum -----------------------------------------------------------------------------------


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
