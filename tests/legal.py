"""Random fusion problems, and what makes a plan of one legal (docs/method.md, section 1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random

import numpy as np

from tests.brute import brute_force
from tests.graphs import random_graph, with_order
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.node_set import bits, is_connected, topological_order
from torch_getfuse.partition.problem import FusionProblem, SearchResult
from torch_getfuse.partition.wide.legal_groups import list_groups
from torch_getfuse.partition.wide.relaxation import FINE


def random_problem(
    rng: Random, operators: int, scheme: str = "lbdf", merge: bool = True, order: float = 0.0
) -> FusionProblem:
    """A random graph under a buffer that makes some groups, and mostly some operators, invalid.

    ``order``: how many operators, as a share, must run after one whose tensors they do not read.
    """
    graph = random_graph(rng, operators, rng.choice((3, 6, 10)))
    if order:
        graph = with_order(rng, graph, order)
    model = make_scheme(scheme, graph, rng.choice(("line", "pixel")), 1, 1)
    alone = sorted(model.buffer(1 << i, 1 << 30) or 0 for i in range(operators))
    whole = model.buffer((1 << operators) - 1, 1 << 30) or 2 * alone[-1]
    low = max(1, alone[operators // 3])
    return FusionProblem(Evaluator(model, rng.randint(low, max(low, whole) + 1)), merge)


def with_optima(
    rng: Random, count: int, fewest: int, most: int
) -> Iterator[tuple[FusionProblem, int]]:
    """So many random problems, but those with nothing to fuse, and the optimum of each in bytes."""
    for _ in range(count):
        problem = random_problem(rng, rng.randint(fewest, most))
        if problem.blocks:
            yield problem, brute_force(problem.evaluator)[0]


def assert_brackets(problem: FusionProblem, found: SearchResult, optimum: int) -> None:
    """A legal plan and a bound with the optimum between them."""
    assert problem.unavoidable <= found.lower_bound_bytes <= optimum <= found.dram_bytes
    assert_legal(problem, found.groups)


def least_reduced(
    problem: FusionProblem,
    prices: np.ndarray,
    order: Sequence[int],
    groups: Sequence[int] | None = None,
) -> dict[int, int]:
    """Per block the least reduced cost of the legal groups, or some, that begin with it; or 0."""
    least = dict.fromkeys(range(len(problem.blocks)), 0)
    for group in list_groups(problem).groups if groups is None else groups:
        members = [k for k, block in enumerate(problem.blocks) if block & group]
        home = min(members, key=order.index)
        reduced = FINE * problem.evaluator.dram(group) - int(prices[members].sum())
        least[home] = min(least[home], reduced)
    return least


def random_prices(rng: Random, problem: FusionProblem) -> np.ndarray:
    """Per block a tenth of what it costs alone to a fifth more, in 1/FINE bytes."""
    alone = [problem.evaluator.dram(block) for block in problem.blocks]
    return np.array([int(FINE * cost * rng.uniform(0.1, 1.2)) for cost in alone], dtype=np.int64)


def assert_none_undercuts(shortfall: Sequence[int], least: Mapping[int, int]) -> int:
    """No legal group costs less than a shortfall says; of how many first blocks all cost more."""
    assert all(shortfall[k] <= value for k, value in least.items())
    return sum(bool(shortfall[k] < value) for k, value in least.items())


def legal_plans(problem: FusionProblem) -> Iterator[list[int]]:
    """All of them, by enumeration; about ten operators at most."""
    groups = list_groups(problem).groups
    alone = [1 << i for i in bits(problem.unfusable)]

    def extended(left: int, plan: list[int]) -> Iterator[list[int]]:
        if not left:
            if topological_order([*plan, *alone], problem.graph) is not None:
                yield plan
            return
        for group in groups:
            if group & left & -left and not group & ~left:
                yield from extended(left & ~group, [*plan, group])

    yield from extended(problem.fusable, [])


def single(problem: FusionProblem) -> SearchResult:
    """The plan of single blocks."""
    return SearchResult(problem.blocks, problem.cost(problem.blocks), 0, 0.0)


def assert_legal(problem: FusionProblem, groups: Sequence[int], valid: bool = True) -> None:
    """Disjoint connected groups of whole blocks that cover everything fusable, and no cycle."""
    covered = 0
    for group in groups:
        assert group
        assert not group & covered
        covered |= group
        assert is_connected(group, problem.near)
        assert problem.evaluator.valid(group) or not valid
    assert covered == problem.fusable
    assert all(any(block & ~group == 0 for group in groups) for block in problem.blocks)
    alone = [1 << i for i in bits(problem.unfusable)]
    assert topological_order([*groups, *alone], problem.graph) is not None


def assert_runs_in_order(problem: FusionProblem, groups: Sequence[int]) -> None:
    """The groups run one after another, unfusable operators as soon as they can."""
    before, done = problem.graph.predecessors, 0
    for group in [*groups, 0]:
        for i in bits(problem.unfusable & ~done):
            if not before[i] & ~done:
                done |= 1 << i
        assert all(not before[i] & ~(done | group) for i in bits(group))
        done |= group
    assert done == (1 << len(problem.graph)) - 1
