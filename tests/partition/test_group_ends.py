"""Why groups end: every reason, on graphs small enough to check by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from graphs import Builder

from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.cost.scheme import CostTerm, Dram, Evaluator, FusionScheme
from torch_getfuse.partition.exact.down_sets import exact
from torch_getfuse.partition.group_ends import Border, Reason, find_borders, why_ends
from torch_getfuse.partition.problem import FusionProblem


def chain(*channels: int) -> OpGraph:
    """1x1 convolutions over a 4x4 map of 4 channels."""
    build = Builder()
    at = build.input((1, 4, 4, 4))
    for width in channels:
        at = build.conv(at, width)
    return build.graph()


class Told(FusionScheme):
    """A scheme that answers what the test told it: ``F_b`` by mask, 1 B where it told nothing."""

    name = "told"

    def __init__(self, graph: OpGraph, needs: Mapping[int, int | None]) -> None:
        super().__init__(graph)
        self.needs = needs

    def buffer(self, mask: int, buffer_bytes: int) -> int | None:
        return self.needs.get(mask, 1)

    def dram(self, mask: int, buffer_bytes: int) -> Dram:
        return Lbdf(self.graph).dram(mask, buffer_bytes)

    def terms(self, mask: int, buffer_bytes: int) -> tuple[CostTerm, ...]:
        return Lbdf(self.graph).terms(mask, buffer_bytes)


def test_the_buffer_stands_against_the_next_operator() -> None:
    graph = chain(4, 8)
    # conv0 alone: weights 20, input row 16, output row 16. With conv1: weights 40 more, row of 32.
    evaluator = Evaluator(Lbdf(graph), 100)
    assert evaluator.buffer(0b01) == 52
    assert evaluator.buffer(0b11) == 124
    first, last = find_borders(evaluator, [0b01, 0b10], 0)
    assert first == Border(Reason.BUFFER, "conv1", excess_bytes=24, weight_bytes=40)
    assert str(first) == "next conv1: 24 B over the buffer, brings 40 B of weights"
    assert last == Border(Reason.OUTPUT)
    assert str(last) == "output"


def test_a_demand_of_exactly_the_buffer_is_too_much() -> None:
    border = find_borders(Evaluator(Lbdf(chain(4, 8)), 124), [0b01, 0b10], 0)[0]
    assert border == Border(Reason.BUFFER, "conv1", excess_bytes=0, weight_bytes=40)
    assert str(border) == "next conv1: fills the buffer, brings 40 B of weights"


def test_an_operator_without_weights_brings_none() -> None:
    build = Builder()
    build.act(build.conv(build.input((1, 4, 4, 4)), 4))
    evaluator = Evaluator(Told(build.graph(), {0b11: 900}), 500)
    text = why_ends(evaluator, [0b01, 0b10], 0)[0]
    assert text == "next act1: 400 B over the buffer"


def test_an_unfusable_neighbour() -> None:
    evaluator = Evaluator(Lbdf(chain(4, 64, 4)), 100)
    unfusable = evaluator.unfusable()
    assert unfusable == 0b110
    assert why_ends(evaluator, [0b001], unfusable) == ["unfusable neighbour conv1"]


def fork() -> OpGraph:
    """x -> a -> add, x -> b -> add."""
    build = Builder()
    x = build.input((1, 4, 4, 4))
    build.add(build.conv(x, 4), build.conv(x, 4))
    return build.graph()


def test_a_branch_that_has_not_run() -> None:
    border, _ = find_borders(Evaluator(Lbdf(fork()), 10_000), [0b001, 0b110], 0)
    assert border == Border(Reason.BRANCH, "add2", other="conv1")
    assert str(border) == "branch: add2 also needs conv1"


def test_an_unfusable_operator_counts_as_run_once_it_can_run() -> None:
    # conv1 is unfusable and needs nothing but the input: nothing stands between a and the add.
    scheme = Told(fork(), {0b010: 10_000})
    border, _ = find_borders(Evaluator(scheme, 5_000), [0b001, 0b100], 0b010)
    assert border.reason is Reason.UNTRIED


def test_a_plan_that_is_cheaper_without_the_next_operator() -> None:
    # Narrow - wide - narrow: to cut at the wide tensor costs more than to cut at a narrow one.
    graph = chain(4, 16, 4)
    border, _ = find_borders(Evaluator(Told(graph, {0b111: 700}), 500), [0b001, 0b110], 0)
    # Cut after conv1: its 256 B map crosses twice instead of conv0's 64 B.
    assert border == Border(Reason.CHEAPER, "conv1", excess_bytes=384, merged_bytes=200)
    assert str(border) == (
        "adding conv1 alone would cost 384 B more DRAM access; its whole group would be 200 B over "
        "the buffer"
    )


def test_cheaper_even_though_the_groups_would_fit_together() -> None:
    border, _ = find_borders(Evaluator(Told(chain(4, 16, 4), {}), 500), [0b001, 0b110], 0)
    assert str(border) == "adding conv1 would cost 384 B more DRAM access"


@pytest.mark.parametrize(
    ("groups", "needs", "expected", "text"),
    [
        ([0b001, 0b110], {}, Border(Reason.EQUAL, "conv1"), "adding conv1 would change nothing"),
        (
            [0b001, 0b010, 0b100],
            {},
            Border(Reason.UNTRIED, "conv1", excess_bytes=128),
            "not tried: adding conv1 would save 128 B of DRAM access",
        ),
        ([0b001, 0b110], {0b011: None}, Border(Reason.UNDEFINED, "conv1"), "no schedule"),
        ([0b001, 0b110], {0b100: 999}, Border(Reason.REST, "conv1"), "rest of its group would not"),
    ],
)
def test_the_remaining_reasons(
    groups: list[int], needs: Mapping[int, int | None], expected: Border, text: str
) -> None:
    border = find_borders(Evaluator(Told(chain(4, 4, 4), needs), 500), groups, 0)[0]
    assert border == expected
    assert text in str(border)


@pytest.mark.parametrize("make", [fork, lambda: chain(4, 8, 16, 8, 4)])
@pytest.mark.parametrize("size", [70, 150, 300, 10_000])
def test_optimal_plans_leave_nothing_untried(make: Callable[[], OpGraph], size: int) -> None:
    evaluator = Evaluator(Lbdf(make()), size)
    found = exact(FusionProblem(evaluator))
    borders = find_borders(evaluator, found.groups, evaluator.unfusable())
    assert len(borders) == len(found.groups)
    assert Reason.UNTRIED not in {border.reason for border in borders}
