"""Pins: what must share a group, what must not, and what must stay on chip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from tests.brute import brute_force
from tests.cascade_brute import Brute, Move, random_cascade
from tests.cascade_simulator import Cascade as Oracle
from tests.graphs import Builder, random_graph
from tests.partition.test_cascade_exact import model_of
from torch_getfuse.errors import OptionError, PlanError
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.exact.down_sets import NoPlan, exact
from torch_getfuse.partition.node_set import bits, mask_of
from torch_getfuse.partition.pins import pins_of
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.search.local import local_search
from torch_getfuse.partition.search.random import random_search
from torch_getfuse.partition.search.recursive_split import all_edges, direct
from torch_getfuse.partition.steps.check import check_step_pins
from torch_getfuse.partition.steps.optimum import optimum
from torch_getfuse.partition.steps.problem import StepProblem
from torch_getfuse.planner import plan_graph

NONE = 1 << 62

Named = dict[str, list[str]]


class Drawn:
    """Random pins of a graph, and what they mean, told without the code that is tested."""

    def __init__(self, rng: Random, graph: OpGraph, chances: float = 0.5) -> None:
        names = [op.name for op in graph]
        self.graph = graph
        self.split = [
            rng.choice(names) for _ in range(2) if rng.random() < chances and len(names) > 1
        ]
        self.split = [n for n in self.split if graph.makers[graph.index[n]]]
        self.sets = [
            rng.sample(names, rng.choice((2, 2, 3)))
            for _ in range(2)
            if rng.random() < chances and len(names) > 3
        ]
        read = [t for t in graph.tensors if graph.consumers[t]]
        self.kept = [rng.choice(read)] if rng.random() < chances else []

    def users(self, tensor: str) -> int:
        users = mask_of(self.graph.consumers[tensor])
        return users | mask_of(i for i, op in enumerate(self.graph) if op.writes == tensor)

    def wholes(self, sequential: bool) -> list[int]:
        found = [mask_of(self.graph.index[n] for n in names) for names in self.sets]
        return found if sequential else found + [self.users(tensor) for tensor in self.kept]

    def allowed(self, sequential: bool) -> Callable[[int], bool]:
        index, wholes = self.graph.index, self.wholes(sequential)
        heads = [index[name] for name in self.split]

        def allowed(group: int) -> bool:
            if any(group >> i & 1 and group & self.graph.makers[i] for i in heads):
                return False
            return all(group & whole in (0, whole) for whole in wholes)

        return allowed


@pytest.mark.parametrize("scheme", ["lbdf", "brr"])
@pytest.mark.parametrize("seed", range(4))
def test_exact_equals_enumeration(scheme: str, seed: int) -> None:
    rng = Random(seed)
    seen: Counter[str] = Counter()
    for _ in range(150):
        graph = random_graph(rng, rng.randint(2, 8), rng.choice((3, 6)))
        model = make_scheme(scheme, graph, "line", 1, 1)
        alone = sorted(model.buffer(1 << i, 1 << 30) or 0 for i in range(len(graph)))
        whole = model.buffer((1 << len(graph)) - 1, 1 << 30) or 2 * alone[-1]
        limit = rng.randint(max(1, alone[len(graph) // 2]), max(whole, alone[-1]) + 2)
        drawn = Drawn(rng, graph)
        free = Evaluator(model, limit)
        least, _ = brute_force(free, drawn.allowed(sequential=False))
        if any(whole & free.unfusable() for whole in drawn.wholes(sequential=False)):
            least = NONE  # no group holds an unfusable operator
        try:
            pins = pins_of(graph, drawn.kept, drawn.split, drawn.sets)
            problem = FusionProblem(Evaluator(model, limit, pins=pins))
            found = exact(problem)
        except (OptionError, NoPlan):
            assert least == NONE
            seen["none"] += 1
            continue
        assert found.dram_bytes == least
        assert problem.legal(found.groups)
        seen["found"] += 1
        seen["unready"] += problem.unready is not None
        if problem.unready is None:
            for other in (
                random_search(problem, 5, 0),
                local_search(problem, 40, 0),
                direct(problem, all_edges(graph)),
            ):
                assert problem.legal(other.groups)
                assert all(drawn.allowed(sequential=False)(group) for group in other.groups)
                assert other.dram_bytes >= least
    assert seen["found"] > 20
    assert seen["none"] > 5


class PinnedBrute(Brute):
    """Cascade by enumeration, of the plans that keep to pins."""

    def __init__(self, oracle: Oracle, drawn: Drawn) -> None:
        self.allowed = drawn.allowed(sequential=True)
        self.pinned = [(drawn.graph, tensor, drawn.users(tensor)) for tensor in drawn.kept]
        super().__init__(oracle)

    def may_be_step(self, mask: int) -> bool:
        return self.allowed(mask) and super().may_be_step(mask)

    def price(self, move: Move, residents: int) -> int | None:
        for _, tensor, users in self.pinned:
            passes = users & move.step and users & ~move.step
            if passes and not residents & self.number[tensor]:
                return None
        return super().price(move, residents)


@pytest.mark.parametrize("seed", range(3))
def test_cascade_equals_enumeration(seed: int) -> None:
    rng = Random(seed)
    seen: Counter[str] = Counter()
    for _ in range(60):
        oracle = random_cascade(rng, rng.randint(2, 6))
        drawn = Drawn(rng, oracle.graph)
        least = PinnedBrute(oracle, drawn).optimum().total
        model = model_of(oracle)
        try:
            pins = pins_of(oracle.graph, drawn.kept, drawn.split, drawn.sets, sequential=True)
            problem = StepProblem(model, oracle.buffer_bytes, pins=pins)
        except OptionError:
            assert least == NONE
            seen["none"] += 1
            continue
        solved = optimum(problem)
        assert not solved.stopped
        if solved.found is None:
            assert least == NONE
            seen["none"] += 1
            continue
        assert (solved.found.dram_bytes, solved.bound) == (least, least)
        masks = solved.found.masks
        check_step_pins(problem, masks, problem.lives(masks, solved.found.residents), pins)
        seen["found"] += 1
    assert seen["found"] > 20
    assert seen["none"] > 2


def chain() -> OpGraph:
    """Four 3x3 convolutions, each with an activation that writes over its output."""
    build = Builder()
    tensor = build.input((1, 4, 16, 16))
    for _ in range(4):
        tensor = build.act(build.conv(tensor, 4, 3))
    return build.graph()


@pytest.mark.parametrize("scheme", ["lbdf", "brr", "cascade"])
@pytest.mark.parametrize("method", ["auto", "exact", "direct", "local", "random"])
def test_every_method_keeps_to_pins(scheme: str, method: str) -> None:
    options = Options(
        buffer=4096,
        scheme=scheme,
        method=method,
        activation_bytes=1,
        weight_bytes=1,
        budget=30,
        split_before=["act3"],
        together=[["conv4", "act5", "conv6"]],
    )
    plan = plan_graph(chain(), options)
    home = {name: k for k, group in enumerate(plan.groups) for name in group.ops}
    assert home["conv2"] != home["act3"]
    assert home["conv4"] == home["act5"] == home["conv6"]
    again = PartitionPlan.from_dict(plan.to_dict())
    assert again == plan
    again.verify()
    torn = replace(plan, split_before=(*plan.split_before, "conv6"), together=())
    with pytest.raises(PlanError, match=r"holds act5 and conv6, but a border is pinned"):
        torn.verify()


def test_cascade_keeps_a_tensor() -> None:
    graph = chain()
    free = Options(buffer=4096, scheme="cascade", activation_bytes=1, weight_bytes=1)
    pinned = replace(free, keep=["act3"], split_before=["conv4"])
    plan = plan_graph(graph, pinned)
    assert "act3" in {resident.tensor for resident in plan.resident}
    assert plan.proof == "optimal"
    lost = plan_graph(graph, replace(free, split_before=["conv4"], residency=False))
    lost = replace(lost, keep=("act3",))
    with pytest.raises(PlanError, match=r"'act3', but it goes through DRAM between step"):
        lost.verify()


@pytest.mark.parametrize(
    ("pins", "told"),
    [
        ({"split_before": ["conv9"]}, r"'conv9' is neither an operator nor .*did you mean"),
        ({"split_before": ["conv0"]}, "no operator of the graph comes before it"),
        ({"together": [["conv2"]]}, "selects one operator; name two or more"),
        ({"together": [[]]}, "selects no operator"),
        ({"together": ["conv2"]}, "is a name, not a list of names"),
        ({"keep": "act3"}, "is not a list of names"),
        ({"keep": ["nothing"]}, "is no tensor"),
        ({"keep": ["act7"]}, "nothing reads it"),
        (
            {"together": [["conv0", "conv6"]], "split_before": ["conv4"]},
            "puts act3 and conv4 into one group, and split_before= a border between them",
        ),
        (
            {"together": [["conv0", "act7"]]},
            r"together=\['conv0', 'act7'\] needs .* KB \(8 operators, 592 B of it weights\)",
        ),
    ],
)
def test_pins_that_cannot_be(pins: Named, told: str) -> None:
    graph = chain()
    with pytest.raises(OptionError, match=told):
        plan_graph(graph, Options(buffer=700, activation_bytes=1, weight_bytes=1, **pins))  # type: ignore[arg-type]


def test_a_block_that_is_pinned_is_the_union_of_what_it_touches() -> None:
    graph = chain()
    pins = pins_of(graph, together=[["conv2", "conv4"]])
    problem = FusionProblem(Evaluator(make_scheme("lbdf", graph, "line", 1, 1), 1 << 20, pins=pins))
    names = [[graph.ops[i].name for i in bits(block)] for block in problem.blocks]
    assert names == [["conv0", "act1"], ["conv2", "act3", "conv4", "act5"], ["conv6", "act7"]]
