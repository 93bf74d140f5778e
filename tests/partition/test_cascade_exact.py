"""The exact search over sequences of steps against enumeration by the oracle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from tests.cascade_both import model_of, tensor_names
from tests.cascade_brute import Brute, optimum_of_steps, random_cascade, random_sequence
from tests.cascade_simulator import LINE
from tests.cascade_simulator import Cascade as Oracle
from tests.graphs import IDENTITY, Builder, cascade_graph, heavy_between, with_order, with_pools
from tests.networks import operator_graph
from torch_getfuse.ir import OpGraph, Tensor, Window
from torch_getfuse.options import Options
from torch_getfuse.partition.cost.cascade.model import Cascade
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.steps import lattice
from torch_getfuse.partition.steps import optimum as windows
from torch_getfuse.partition.steps.lattice import Lattice
from torch_getfuse.partition.steps.optimum import improved, optimum, with_residents
from torch_getfuse.partition.steps.problem import Found, StepProblem
from torch_getfuse.planner import plan_graph


def problem_of(oracle: Oracle, residency: bool = True) -> StepProblem:
    problem = StepProblem(model_of(oracle), oracle.buffer_bytes, residency)
    assert problem.unfusable == oracle.unfusable
    return problem


def residents_of(problem: StepProblem, found: Found) -> frozenset[str]:
    """What is resident between steps, and in one step alone."""
    steps = problem.priced(found.masks, problem.lives(found.masks, found.residents))
    mask = found.residents
    for step in steps:
        assert step is not None
        mask |= step.priced.kept if step.priced is not None else 0
    return tensor_names(problem.graph, mask)


def assert_plan(oracle: Oracle, problem: StepProblem, found: Found) -> None:
    """The oracle runs the plan, and each of its steps moves what is said."""
    lives = problem.lives(found.masks, found.residents)
    steps = problem.priced(found.masks, lives)
    residents = residents_of(problem, found)
    assert problem.residency or not residents
    runs = oracle.run_plan([(mask, None) for mask in found.masks], residents)
    for step, run in zip(steps, runs, strict=True):
        assert step is not None
        assert step.dram == (run.read, run.write, run.weight)
        assert step.priced is None or step.priced.buffer == run.buffer
    assert sum(run.total for run in runs) == found.dram_bytes


def assert_optimum(oracle: Oracle, residency: bool = True) -> tuple[StepProblem, Found]:
    best = Brute(oracle).optimum(residency)
    problem = problem_of(oracle, residency)
    solved = optimum(problem)
    assert solved.found is not None
    assert not solved.stopped
    assert (solved.found.dram_bytes, solved.bound) == (best.total, best.total)
    assert_plan(oracle, problem, solved.found)
    return problem, solved.found


# -- the optimum -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chunk", [*range(4), *(pytest.param(k, marks=pytest.mark.exhaustive) for k in range(4, 10))]
)
def test_exact_equals_enumeration(chunk: int) -> None:
    """2,000 graphs in all."""
    seen: Counter[str] = Counter()
    for seed in range(200 * chunk, 200 * (chunk + 1)):
        oracle = random_cascade(Random(seed))
        problem, found = assert_optimum(oracle)
        note(seen, problem, found)
    assert all(seen[what] for what in WANTED), seen


WANTED = (
    "line",
    "stripes",
    "slices",
    "input of several steps stays",
    "unfusable between residents",
    "output stays to be read",
)


def note(seen: Counter[str], problem: StepProblem, found: Found) -> None:
    """Count what a plan shows."""
    facts, masks = problem.facts, found.masks
    lives = problem.lives(masks, found.residents)
    for k, step in enumerate(problem.priced(masks, lives)):
        assert step is not None
        if step.priced is not None:
            seen[step.priced.kind] += 1
        else:
            before = any(life.last < k for life in lives.values())
            after = any(life.first > k for life in lives.values())
            seen["unfusable between residents"] += before or after
    for tensor in lives:
        readers = facts.readers[tensor]
        if facts.inputs >> tensor & 1:
            reading = sum(bool(mask & readers) for mask in masks)
            seen["input of several steps stays"] += reading > 1
        seen["output stays to be read"] += facts.outputs >> tensor & 1


def more_orders(rng: Random, graph: OpGraph) -> OpGraph:
    return with_order(rng, graph, 0.6)


def more_outputs(rng: Random, graph: OpGraph) -> OpGraph:
    """Some tensors are outputs as well, inputs of the graph among them."""
    more = [name for name in graph.tensors if name not in graph.outputs and rng.random() < 0.4]
    return replace(graph, outputs=(*graph.outputs, *more))


def other_inputs(rng: Random, graph: OpGraph) -> OpGraph:
    """An input that nothing reads, and operators that read nothing."""
    unread = Tensor.of("unread", (1, 2, 4, 4))
    ops = [replace(op, reads=(), in_place=False) if rng.random() < 0.2 else op for op in graph]
    return replace(
        graph,
        ops=tuple(ops),
        inputs=("unread", *graph.inputs),
        tensors={"unread": unread, **graph.tensors},
    )


def stored_widths(rng: Random, graph: OpGraph) -> OpGraph:
    """Weights of several widths, of none, and operators without."""
    ops = []
    for op in graph:
        count = op.weight_elements if rng.random() < 0.8 else 0
        width = rng.choice((None, 0, 1, 2, 4))
        stored = None if width is None else count * width
        ops.append(replace(op, weight_elements=count, weight_bytes=stored))
    return replace(graph, ops=tuple(ops))


def pools(rng: Random, graph: OpGraph) -> OpGraph:
    return with_pools(rng, graph, 0.5)


@pytest.mark.parametrize("change", [more_orders, more_outputs, other_inputs, pools, stored_widths])
def test_exact_on_other_graphs(change: Callable[[Random, OpGraph], OpGraph]) -> None:
    for seed in range(3000, 3150):
        rng = Random(seed)
        oracle = random_cascade(rng, rng.choice((4, 5, 6)))
        width = None if change is stored_widths else oracle.weight_bytes
        oracle = Oracle(
            change(rng, oracle.graph),
            oracle.buffer_bytes,
            oracle.activation_bytes,
            width,
            oracle.slice_channels,
        )
        assert_optimum(oracle)


def test_exact_without_residency() -> None:
    worse = 0
    for seed in range(300):
        oracle = random_cascade(Random(seed))
        _, found = assert_optimum(oracle, residency=False)
        assert not found.residents
        worse += optimum(problem_of(oracle)).bound < found.dram_bytes
    assert worse >= 100


def test_without_residency_no_input_stays_for_slices_either() -> None:
    """x is read once if it stays for the only step, else once per slice."""
    build = Builder()
    build.conv(build.input((1, 1, 2, 2)), 4, kernel=3)
    oracle = Oracle(build.graph(), 33)
    for residency, read in ((True, 4), (False, 8)):
        _, found = assert_optimum(oracle, residency)
        assert found.dram_bytes == read + 16 + 40


def test_an_operator_that_fits_only_over_its_operand_is_unfusable() -> None:
    """Nothing stays across it, though it would fit over its operand beside what is to stay.

    With a byte more it fits by lines, and then it may run over its operand beside that.
    """
    build = Builder()
    x, y = build.input((1, 1, 1, 1)), build.input((1, 1, 1, 8))
    first = build.conv(x, 1)
    build.op("neg", [(y, IDENTITY)], (1, 1, 1, 8))
    build.conv(first, 1)
    graph = build.graph()
    ops = [replace(op, weight_elements=0) for op in graph]
    ops[1] = replace(ops[1], after=(ops[0].name,))
    ops[2] = replace(ops[2], after=(ops[1].name,))
    graph = replace(graph, ops=tuple(ops))
    for buffer_bytes, total in ((16, 2 + 16 + 2), (17, 1 + 16 + 1)):
        _, found = assert_optimum(Oracle(graph, buffer_bytes))
        assert found.dram_bytes == total


def test_an_operator_in_place_may_be_a_step_apart() -> None:
    """It leaves a map that stays for the slices, for which the sums before it have no room."""
    build = Builder()
    shape, window = (1, 24, 5, 15), Window.sliding((3, 3), padding=(1, 1))
    x = build.input(shape)
    first = build.op("neg", [(x, IDENTITY)], shape)
    middle = build.op("conv", [(first, window)], shape, weights=592, mixes=True)
    total = build.add(build.add(middle, x, first), middle, first)
    build.op("conv", [(build.act(total), window)], shape, weights=1616, mixes=True)
    _, found = assert_optimum(Oracle(build.graph(), 2425))
    assert found.dram_bytes == 18408
    assert found.masks[-2:] == (0b010000, 0b100000)


def test_an_input_that_nothing_reads_is_planned() -> None:
    build = Builder()
    x = build.input((1, 2, 4, 4))
    build.add(build.conv(build.conv(x, 2, 3), 2, 3), x)
    graph = other_inputs(Random(0), build.graph())
    for buffer_bytes in (80, 100, 1000):
        plan = plan_graph(graph, Options(scheme="cascade", buffer=buffer_bytes, weight_bytes=1))
        assert "unread" not in [resident.tensor for resident in plan.resident]


def test_searches_over_groups_count_unfusable_operators_too() -> None:
    """The stages of a plan are totals, as its bound is."""
    graph = heavy_between()
    for residency in (True, False):
        plan = plan_graph(
            graph,
            Options(
                scheme="cascade",
                buffer=100,
                activation_bytes=1,
                weight_bytes=1,
                method="random",
                explainer=None,
                residency=residency,
            ),
        )
        assert plan.unfusable == (graph.ops[1].name,)
        assert plan.dram_bytes == 34 + 1032 + 48
        assert [stage.dram_bytes for stage in plan.stages] == [plan.dram_bytes] * len(plan.stages)


def test_what_an_unfusable_operator_makes_for_nobody_is_not_written() -> None:
    """Its output is neither read nor returned, so no plan moves it; the bound must not either."""
    build = Builder()
    x, y = build.input((1, 1, 4, 4)), build.input((1, 1, 2, 2))
    dead = build.op("conv", [(x, IDENTITY)], (1, 1, 4, 4), weights=100, mixes=True)
    build.conv(build.conv(y, 1), 1)
    graph = build.graph()
    graph = replace(graph, outputs=tuple(name for name in graph.outputs if name != dead))
    problem, found = assert_optimum(Oracle(graph, 40))
    assert problem.unfusable == 0b001
    assert found.dram_bytes == problem.unavoidable == (16 + 100) + (4 + 2 + 2 + 4)


# -- bounds ----------------------------------------------------------------------------------------


def left_by_brute(brute: Brute, residents: int) -> dict[int, int]:
    """The least that is left after each down-set, with certain tensors resident."""
    left = {brute.everything: 0}
    for done in sorted(brute.moves, key=int.bit_count, reverse=True):
        for move in brute.moves[done]:
            price, rest = brute.price(move, residents), left.get(done | move.step)
            if price is not None and rest is not None:
                left[done] = min(left.get(done, price + rest), price + rest)
    return left


def test_bounds_are_never_above_what_is_left() -> None:
    """For every down-set that some plan reaches, whatever is resident at it."""
    met = 0
    for seed in range(60):
        oracle = random_cascade(Random(seed), 5)
        brute, problem = Brute(oracle), problem_of(oracle)
        lattice = Lattice(problem).build()
        size = problem.facts.size
        for residents in range(1 << len(brute.names)):
            if residents & ~problem.may_stay:
                continue
            for done, rest in left_by_brute(brute, residents).items():
                owed = sum(size[t] for t in bits(problem.handed(done).to_read & ~residents))
                least = lattice.left[done]
                assert max(least.moved, least.owing + owed) <= rest
                assert problem.rest(done) <= rest
                met += least.moved == rest
        assert lattice.bound <= brute.optimum().total
        assert problem.unavoidable <= lattice.bound
    assert met >= 1000


def test_what_is_left_after_a_step_is_what_is_left_after_the_down_set() -> None:
    for seed in range(40):
        oracle = random_cascade(Random(900 + seed), 7)
        problem, fresh = problem_of(oracle), problem_of(oracle)
        for done, edges in Lattice(problem).build().edges.items():
            for edge in edges:
                assert problem.rest(done, edge.mask) == fresh.rest(edge.next)
                assert problem.handed(done, edge.mask) == fresh.handed(edge.next)


# -- plans that are given, and windows -------------------------------------------------------------


def test_the_best_residents_of_given_steps() -> None:
    """Also where the steps fit beside no residents, or only if some are written over."""
    seen: Counter[str] = Counter()
    for seed in range(300):
        rng = Random(seed)
        oracle = random_cascade(rng, 5)
        brute, problem = Brute(oracle), problem_of(oracle)
        steps = random_sequence(rng, brute)
        best = optimum_of_steps(brute, steps)
        found = with_residents(problem, steps)
        seen["unfit"] += best is None
        if best is None:
            assert found is None
            continue
        assert found is not None
        assert list(found.masks) == steps
        assert found.dram_bytes == best
        assert_plan(oracle, problem, found)
        seen["residents"] += bool(found.residents)
    assert min(seen["unfit"], seen["residents"]) >= 30, seen


def larger_cascade(rng: Random, operators: int) -> Oracle:
    """Under a buffer that holds each operator by lines, and not many more."""
    free = Oracle(cascade_graph(rng, operators), 1)
    alone = max(free.run_step(1 << i, LINE).buffer for i in range(operators))
    return Oracle(free.graph, alone + rng.randint(1, alone))


@pytest.mark.parametrize("operators", [6, 10])
def test_windows_improve_a_plan(monkeypatch: pytest.MonkeyPatch, operators: int) -> None:
    """A plan is legal whatever the windows, and the optimum where one window has everything."""
    better = missed = 0
    for seed in range(60):
        oracle = larger_cascade(Random(seed), operators)
        best = optimum(problem_of(oracle))
        assert best.found is not None
        assert not best.stopped
        assert_plan(oracle, problem_of(oracle), best.found)
        for size in (3, 24):
            monkeypatch.setattr(windows, "_WINDOWS", (size,))
            problem = problem_of(oracle)
            start = with_residents(problem, problem.one_by_one())
            assert start is not None
            found = improved(problem, start).found
            assert found is not None
            assert best.bound <= found.dram_bytes <= start.dram_bytes
            assert_plan(oracle, problem, found)
            if size == 24:
                assert found.dram_bytes == best.bound
            better += found.dram_bytes < start.dram_bytes
            missed += found.dram_bytes > best.bound
    assert better >= 40
    assert missed or operators == 6


def test_a_search_that_is_cut_short_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bound holds, and its plan is legal."""
    stopped = 0
    for seed in range(40):
        oracle = larger_cascade(Random(seed), 8)
        monkeypatch.setattr(windows, "MOST_GROUPS", 60_000)
        whole = optimum(problem_of(oracle))
        monkeypatch.setattr(windows, "MOST_GROUPS", 8)
        problem = problem_of(oracle)
        short = optimum(problem)
        assert short.found is not None
        assert short.bound <= whole.bound <= short.found.dram_bytes
        assert short.stopped or short.bound == whole.bound
        assert_plan(oracle, problem, short.found)
        stopped += bool(short.stopped)
    assert stopped >= 4


# -- more buffer -----------------------------------------------------------------------------------


def test_more_buffer_never_costs_more() -> None:
    less = 0
    for seed in range(150):
        oracle = larger_cascade(Random(seed), 8)
        model, low = model_of(oracle), oracle.buffer_bytes
        totals = []
        for buffer_bytes in (low, low + 1, low + low // 8 + 2, low + low // 2 + 3, 2 * low + 4):
            problem = StepProblem(model, buffer_bytes)
            assert not problem.unfusable
            totals.append(optimum(problem).bound)
        assert totals == sorted(totals, reverse=True)
        less += totals[0] > totals[-1]
    assert less >= 50


@pytest.mark.parametrize(
    "name", ["squeezenet1_0", "mobilenet_v2", "mobilenet_v3_small", "resnet18"]
)
def test_more_buffer_never_costs_more_on_networks(name: str) -> None:
    """From where no operator is unfusable on; what moves at least is reached in the end."""
    model = Cascade(operator_graph(name))
    problems = [StepProblem(model, kb * 1024) for kb in (64, 128, 256, 512, 1024, 2048)]
    fusable = [problem for problem in problems if not problem.unfusable]
    assert len(fusable) >= 3
    found = [optimum(problem) for problem in fusable]
    assert not any(solved.stopped for solved in found)
    totals = [solved.bound for solved in found]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1] >= fusable[-1].unavoidable


def test_one_cost_model_serves_several_buffers() -> None:
    """What a cost model remembers of groups is of one buffer each."""
    graph = operator_graph("squeezenet1_0")
    scheme = Cascade(graph)
    for kilobytes in (64, 128):
        shared = optimum(StepProblem(scheme, 1024 * kilobytes))
        fresh = optimum(StepProblem(Cascade(graph), 1024 * kilobytes))
        assert replace(shared, seconds=0) == replace(fresh, seconds=0)


def test_a_window_that_takes_too_long_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """No window may use up the time of all: it is tried with fewer operators, then left."""
    problem = StepProblem(Cascade(operator_graph("squeezenet1_0")), 64 * 1024)
    start = with_residents(problem, problem.one_by_one())
    assert start is not None
    monkeypatch.setattr(windows, "_MANY_WINDOWS", 1 << 40)
    left = improved(problem, start, 10)
    assert (left.found, left.groups, left.stopped) == (start, 0, "")
    monkeypatch.setattr(windows, "_MANY_WINDOWS", 40)
    some = improved(problem, start, 10)
    assert some.found is not None
    assert some.found.dram_bytes < start.dram_bytes


def test_merged_plans_where_nothing_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = Random(77)
    better = worse = 0
    for _ in range(60):
        oracle = random_cascade(rng, rng.randint(4, 8))
        problem = problem_of(oracle)
        least = optimum(problem_of(oracle)).found
        assert least is not None
        windows.good_plan(problem, 1e-4)  # too short for any window
        known = problem.best
        assert known is not None
        found = windows.merged_plan(problem).found
        assert found is not None
        assert problem.best == min(known, found, key=Found.rank)
        assert least.dram_bytes <= found.dram_bytes
        steps = problem.priced(found.masks, problem.lives(found.masks, found.residents))
        assert sum(step.dram.total for step in steps if step is not None) == found.dram_bytes
        better += found.dram_bytes < known.dram_bytes
        worse += found.dram_bytes > known.dram_bytes
    assert better > 10
    assert worse > 0


def test_the_planner_looks_into_windows_only_without_a_proof(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = Options(scheme="cascade", buffer=24 * 1024, cache=False)
    graph = operator_graph("squeezenet1_0")
    proved = plan_graph(graph, options)
    assert proved.proof == "optimal"
    assert [stage.method for stage in proved.stages] == ["merging", "exact"]
    monkeypatch.setattr(windows, "MOST_GROUPS", 8)
    plan = plan_graph(graph, options)
    methods = [stage.method for stage in plan.stages]
    assert methods[:4] == ["merging", "exact", "windows", "exact"]
    assert methods[-1] == "fewer steps"
    assert methods.count("exact") == 2  # no time would do
    assert proved.dram_bytes <= plan.dram_bytes
    assert plan.lower_bound_bytes <= proved.dram_bytes


def test_a_proof_that_was_put_off_has_the_rest_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(scheme="cascade", buffer=24 * 1024, cache=False)
    graph = operator_graph("squeezenet1_0")
    proved = plan_graph(graph, options)
    monkeypatch.setattr(lattice, "_EARLY", 0.0)
    monkeypatch.setattr(lattice, "_GROWN_BY_THEN", 1.0)
    plan = plan_graph(graph, options)
    put_off = [s.stopped for s in plan.stages if "of its operators in 0%" in s.stopped]
    assert len(put_off) == 2
    assert [stage.method for stage in plan.stages][-2:] == ["exact", "fewer steps"]
    assert (plan.proof, plan.dram_bytes) == ("optimal", proved.dram_bytes)


def test_where_steps_hold_many_operators_windows_come_first() -> None:
    options = Options(scheme="cascade", buffer=64 * 1024, cache=False)
    plan = plan_graph(operator_graph("squeezenet1_0"), options)
    assert plan.proof == "optimal"
    methods = [stage.method for stage in plan.stages]
    assert methods == ["merging", "windows", "exact", "fewer steps"]


@pytest.mark.parametrize("steps", [500, 3_000])
def test_a_proof_goes_on_where_a_limit_ended_it(steps: int) -> None:
    """With a ceiling that falls in between, as often as it takes."""
    rng = Random(78)
    calls = 0
    for _ in range(30):
        oracle = random_cascade(rng, rng.randint(4, 8))
        at_once, problem = problem_of(oracle), problem_of(oracle)
        least = windows.Proof(at_once).run(shortest=True)
        assert least.found is not None
        proof = windows.Proof(problem)
        with_residents(problem, problem.one_by_one())
        for share in range(1, 200):
            with problem.work.steps_within(share * steps):
                solved = proof.run(shortest=True)
            calls += 1
            if share == 2:
                windows.good_plan(problem)
            if not solved.stopped:
                break
        assert not solved.stopped
        assert solved.found is not None
        assert solved.found.rank() == least.found.rank()
        assert solved.bound == least.bound == least.found.dram_bytes
    assert calls > 60


@pytest.mark.parametrize("width", [1, 2])
def test_few_residents_still_make_a_plan(width: int) -> None:
    """What is followed may lead nowhere; nothing on chip always goes on."""
    rng = Random(79)
    for _ in range(60):
        oracle = random_cascade(rng, rng.randint(4, 8))
        problem = problem_of(oracle)
        found = with_residents(problem, problem.one_by_one(), width)
        assert found is not None
        assert found.dram_bytes >= optimum(problem).bound


def test_no_time_at_all_is_said() -> None:
    solved = optimum(problem_of(random_cascade(Random(0), 5)), 0.0)
    assert solved.stopped
    assert solved.found is None or solved.bound <= solved.found.dram_bytes


def test_a_clock_that_strikes_within_merging_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    original = windows.with_residents
    widths = []

    def slow(problem: StepProblem, masks: list[int], width: int = 64) -> Found | None:
        widths.append(width)
        if len(widths) == 1:
            problem.work.give_up(by_clock=True)
        return original(problem, masks, width)

    monkeypatch.setattr(windows, "with_residents", slow)
    monkeypatch.setattr(windows, "MOST_GROUPS", 8)
    options = Options(scheme="cascade", buffer=24 * 1024, cache=False)
    plan = plan_graph(operator_graph("squeezenet1_0"), options)
    assert (plan.stages[0].method, plan.stages[0].stopped) == ("merging", "time limit")
    assert plan.stages[0].dram_bytes is not None
    assert widths[:2] == [64, 16]


def test_a_proof_that_will_not_end_is_given_up() -> None:
    problem = StepProblem(Cascade(operator_graph("mobilenet_v3_small")), 256 * 1024)
    assert windows.merged_plan(problem).found is not None
    before = problem.work.steps
    with problem.work.steps_within(60_000):
        proof = windows.Proof(problem)
        solved = proof.run()
    assert "of its operators in 33% of its work limit" in solved.stopped
    assert problem.work.steps - before < 50_000
    assert solved.found is not None
    assert solved.bound <= solved.found.dram_bytes
    with problem.work.steps_within(60_000):
        assert proof.run(patient=True).stopped == "work limit of 60,000 steps"
    assert not proof.too_wide


def test_merging_is_left_out_where_no_work_is_left() -> None:
    """The clock may strike in the stage before; GoogLeNet at 256 KB on a busy machine."""
    problem = StepProblem(Cascade(operator_graph("squeezenet1_0")), 64 * 1024)
    known = windows.good_plan(problem, 1e-4).found
    with problem.work.within(0.0):
        solved = windows.merged_plan(problem, 0.0)
    assert solved.found is None
    assert problem.best == known
    assert solved.stopped.startswith(("work limit", "time limit"))
