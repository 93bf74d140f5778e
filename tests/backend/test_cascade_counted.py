"""Cascade plans that are run: every way and resident tensors, counted; figures worked by hand.

The net most tests take, on 8 x 8 with one byte an element: input 3 channels (24 a row, 192 in all),
``a`` 4 (32, 256), ``b`` 4, ``add`` and ``relu`` 4, ``c`` 2 (16, 128); weights of ``a`` 112, of
``b`` 148 (with a 1 x 1 kernel 20), of ``c`` 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_getfuse
from tests.backend.hand_cascade import Step, layouts_by_hand, plan_by_hand, random_steps
from tests.backend.test_depth_first import ALWAYS, BATCHED, MODELS, SAMPLES, distance
from torch_getfuse import Ledger
from torch_getfuse.backend.rowwise import depth_first
from torch_getfuse.backend.rowwise.execution import Execution
from torch_getfuse.backend.rowwise.group import DepthFirstGroup
from torch_getfuse.errors import PlanError
from torch_getfuse.ir import Op, OpGraph, Read, Tensor, Window
from torch_getfuse.partition.cost.cascade.stripe_schedule import Turn, make_stripes
from torch_getfuse.partition.cost.cascade.way import Resident, Way
from torch_getfuse.partition.plan import PartitionPlan

pytestmark = pytest.mark.usefixtures("by_hand")
LINE = Way("line")
UNFUSABLE = Way("unfusable")


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are taken as they are, and laid out by plain counting."""
    monkeypatch.setattr(depth_first, "layouts_of", layouts_by_hand)


class Residual(nn.Module):
    """Convolution, convolution, add, activation, convolution."""

    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, kernel, padding=kernel // 2)
        self.c = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.c(F.relu(self.b(y) + y))


def run(
    model: nn.Module,
    steps: Sequence[Step],
    residents: Sequence[Resident] = (),
    shape: tuple[int, ...] = (3, 8, 8),
    batch: int = 1,
    **options: object,
) -> Ledger:
    """Run a plan made by hand and compare the outputs with eager's."""
    torch.manual_seed(0)
    model = model.eval()
    x = torch.randn(batch, *shape)
    plan = plan_by_hand(model, (x,), steps, residents, **options)
    with torch.no_grad():
        expected = model(x)
    got, ledger = torch_getfuse.run_counted(model, (x,), plan)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    return ledger


def counts(ledger: Ledger) -> list[tuple[int | None, ...]]:
    """Per step: read, written, in rings, weights, resident; all counted as planned."""
    assert [group.fallback for group in ledger.groups] == [""] * len(ledger.groups)
    assert ledger.agrees, str(ledger)
    return [
        (
            group.counted_read_bytes,
            group.counted_write_bytes,
            group.counted_ring_bytes,
            group.counted_weight_bytes,
            group.counted_resident_bytes,
        )
        for group in ledger.groups
    ]


# -- lines, and tensors that stay ---------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_resident_tensors_are_neither_read_nor_written(batch: int) -> None:
    ledger = run(
        Residual(),
        [
            ("a", LINE, (192, 0, 112)),
            ("b add relu", LINE, (0, 0, 148)),
            ("c", LINE, (0, 128, 10)),
        ],
        [Resident("a", 0, 1), Resident("relu", 1, 2)],
        batch=batch,
    )
    # Rings: 3 rows of the input; a row of b; a row of c. On chip: a; a and relu; relu.
    assert counts(ledger) == [
        (192, 0, 72, 112, 256),
        (0, 0, 32, 148, 512),
        (0, 128, 16, 10, 256),
    ]


def test_without_residents_everything_crosses_dram() -> None:
    ledger = run(
        Residual(),
        [("a", LINE, (192, 256, 112)), ("b add relu c", LINE, (256, 128, 158))],
    )
    # The second step: 3 rows of a, a row of b, of add and relu together, of c.
    assert counts(ledger) == [
        (192, 256, 72 + 32, 112, 0),
        (256, 128, 96 + 32 + 32 + 16, 158, 0),
    ]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_sum_is_written_over_a_resident_operand(batch: int) -> None:
    ledger = run(
        Residual(kernel=1),
        [
            ("a", LINE, (192, 0, 112)),
            ("b add relu", LINE, (0, 0, 20)),
            ("c", LINE, (0, 128, 10)),
        ],
        [Resident("a", 0, 1), Resident("add", 1, 1), Resident("relu", 1, 2)],
        batch=batch,
    )
    # a, add and relu are one storage of 256 in the second step.
    assert counts(ledger) == [
        (192, 0, 72, 112, 256),
        (0, 0, 32, 20, 256),
        (0, 128, 16, 10, 256),
    ]


class TwoOutputs(nn.Module):
    """A convolution and its activation, both returned."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.a(x)
        return y, F.relu(y)


@pytest.mark.parametrize("way", [LINE, Way("stripes", 1, ("a",))])
def test_an_output_is_in_memory_before_it_is_written_over(way: Way) -> None:
    residents = [Resident("a", 0, 0), Resident("relu", 0, 0)]
    ledger = run(TwoOutputs(), [("a relu", way, (192, 512, 112))], residents, batch=2)
    rows = 72 if way == LINE else 192
    assert counts(ledger) == [(192, 512, rows, 112, 256)]


def test_a_resident_input_is_read_once_and_a_resident_output_written_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.a(x)
            return y, self.b(y) * x

    ledger = run(
        Twice(),
        [("a", LINE, (192, 192, 12)), ("b mul", LINE, (0, 192, 12))],
        [Resident("input", 0, 1), Resident("a", 0, 1)],
    )
    assert counts(ledger) == [(192, 192, 0, 12, 384), (0, 192, 24 + 24, 12, 384)]


def test_a_tensor_stays_while_a_step_runs_that_does_not_touch_it() -> None:
    ledger = run(
        Residual(),
        [
            ("a", LINE, (192, 0, 112)),
            ("b", LINE, (0, 256, 148)),
            ("add", LINE, (256, 256, 0)),
            ("relu", LINE, (256, 256, 0)),
            ("c", LINE, (256, 128, 10)),
        ],
        [Resident("a", 0, 2)],
    )
    assert counts(ledger)[1:] == [
        (0, 256, 32, 148, 256),
        (256, 256, 64, 0, 256),
        (256, 256, 32, 0, 0),
        (256, 128, 32 + 16, 10, 0),
    ]
    ledger = run(
        Residual(),
        [
            ("a b", LINE, (192, 0, 260)),
            ("add", LINE, (0, 256, 0)),
            ("relu c", LINE, (256, 128, 10)),
        ],
        [Resident("a", 0, 1), Resident("b", 0, 1)],
    )
    assert counts(ledger)[0] == (192, 0, 72, 260, 512)


def test_a_resident_tensor_is_finished_where_a_stride_skips_its_last_rows() -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, stride=2)
            self.c = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.a(x)
            return self.b(y), self.c(y)

    steps = [("a b", LINE, (192, 64, 16 + 20)), ("c", LINE, (0, 256, 20))]
    ledger = run(Strided(), steps, [Resident("a", 0, 1)])
    assert counts(ledger) == [(192, 64, 24 + 16, 36, 256), (0, 256, 32, 20, 256)]
    steps[0] = ("a b", Way("stripes", 2), (192, 64, 2 * 36))
    ledger = run(Strided(), steps, [Resident("a", 0, 1)])
    # Stripes make b up to 2 and 4, a up to 3 and 7; the last row of a follows.
    assert counts(ledger)[0] == (192, 64, 4 * 24 + 2 * 16, 72, 256)


def test_a_reduction_takes_in_a_resident_tensor() -> None:
    class Excite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return y * self.b(y.mean((2, 3)))[:, :, None, None]

    for way in (LINE, Way("stripes", 1), Way("stripes", 8, ("b",))):
        ledger = run(
            Excite(),
            [("a", LINE, (192, 0, 112)), ("mean b mul", way, (0, 256, 20))],
            [Resident("a", 0, 1)],
        )
        product = 256 if way.count == 1 and way.kind == "stripes" else 32
        assert counts(ledger)[1] == (0, 256, 4 + 4 + product, 20, 256)


# -- stripes ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_stripes_fetch_the_weights_that_stream_in_each(batch: int) -> None:
    ledger = run(
        Residual(),
        [("a b add relu c", Way("stripes", 4, ("a",)), (192, 128, 112 + 4 * (148 + 10)))],
        batch=batch,
    )
    # Made: c, relu, add, b 2 4 6 8; a 3 5 7 8; input 4 6 8 8. Not needed after a stripe: a 1 3 5,
    # input 2 4 6. So 4 rows of input and a, 2 of the others; add and relu are one.
    assert counts(ledger) == [(192, 128, 4 * 24 + 4 * 32 + 2 * 32 + 2 * 32 + 2 * 16, 744, 0)]


def test_one_stripe_holds_whole_maps() -> None:
    ledger = run(Residual(), [("a b add relu c", Way("stripes", 1), (192, 128, 270))])
    assert counts(ledger) == [(192, 128, 192 + 256 + 256 + 256 + 128, 270, 0)]


def test_one_stripe_writes_a_sum_over_a_resident_operand_that_a_3x3_kernel_reads() -> None:
    ledger = run(
        Residual(),
        [
            ("a", LINE, (192, 0, 112)),
            ("b add relu", Way("stripes", 1), (0, 0, 148)),
            ("c", Way("stripes", 2), (0, 128, 20)),
        ],
        [Resident("a", 0, 1), Resident("add", 1, 1), Resident("relu", 1, 2)],
        batch=2,
    )
    assert counts(ledger) == [
        (192, 0, 72, 112, 256),
        (0, 0, 256, 148, 256),
        (0, 128, 4 * 16, 20, 256),
    ]


def test_turns_of_stripes() -> None:
    graph, mask = chain()
    storage = {name: name for name in graph.tensors}
    made = make_stripes(graph, mask, 2, {"x": 4, "y": 3, "z": 2}, storage)
    assert made.stripes == (
        (Turn("x", 0, 4), Turn("y", 0, 3), Turn("z", 0, 2)),
        (Turn("y", 3, 4), Turn("z", 2, 4)),
    )
    for name in graph.tensors:
        rings = {"x": 4, "y": 3, "z": 2}
        rings[name] -= 1
        with pytest.raises(PlanError, match=f"rows of '{name}'"):
            make_stripes(graph, mask, 2, rings, storage)
    with pytest.raises(PlanError, match="5 stripes"):
        make_stripes(graph, mask, 5, {"x": 4, "y": 3, "z": 2}, storage)


def chain() -> tuple[OpGraph, int]:
    """Two 3-row windows of padding 1 over 4 rows."""
    window = Window.sliding((3, 3), padding=(1, 1))
    tensors = {name: Tensor.of(name, (1, 1, 4, 4)) for name in "xyz"}
    ops = (
        Op("p", "conv2d", (Read("x", window),), "y", weight_elements=9),
        Op("q", "conv2d", (Read("y", window),), "z", weight_elements=9),
    )
    return OpGraph(("x",), ("z",), ops, tensors), 3


# -- slices -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_slices_read_the_input_for_each(count: int, batch: int) -> None:
    steps = [
        ("a", LINE, (192, 256, 112)),
        ("b", Way("slices", count), (256 * count, 256, 148)),
        ("add relu c", LINE, (512, 128, 10)),
    ]
    # 3 rows of a and one of b. Three slices take 2, 2 and none of the 4 channels.
    assert counts(run(Residual(), steps, batch=batch))[1] == (256 * count, 256, 128, 148, 0)


def test_slices_read_a_resident_input_once() -> None:
    steps = [
        ("a", Way("slices", 2), (192, 0, 112)),
        ("b", Way("slices", 4), (0, 0, 148)),
        ("add relu c", LINE, (0, 128, 10)),
    ]
    residents = [Resident("input", 0, 0), Resident("a", 0, 2), Resident("b", 1, 2)]
    assert counts(run(Residual(), steps, residents, batch=2)) == [
        (192, 0, 0, 112, 192 + 256),
        (0, 0, 0, 148, 512),
        (0, 128, 32 + 16, 10, 512),
    ]


class Grouped(nn.Module):
    """Kernels that give no single channel, a folded batch norm, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.b = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.c = nn.Linear(4 * 8 * 8, 5)
        self.d = nn.Linear(5, 7)
        with torch.no_grad():
            for given in (self.norm.weight, self.norm.running_mean, self.norm.running_var):
                given.uniform_(0.5, 1.5)  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(self.norm(self.a(x)))
        return self.d(self.c(y.flatten(1)))


@pytest.mark.parametrize("weight_bytes", [1, None])
def test_slices_of_other_kernels(weight_bytes: int | None) -> None:
    width = weight_bytes or 4
    # 4 x 4: input 64, a 6 channels (24 a row, 96), b 4 on 8 x 8 (32 a row, 256).
    weights = [6 * 2 * 9 + 6, 6 * 4 * 4 + 4, 256 * 5 + 5, 5 * 7 + 7]
    ledger = run(
        Grouped(),
        [
            ("a", Way("slices", 4), (4 * 64, 96, weights[0] * width)),
            ("b", Way("slices", 3), (3 * 96, 256, weights[1] * width)),
            ("c", Way("slices", 2), (2 * 256, 5, weights[2] * width)),
            ("d", Way("slices", 7), (7 * 5, 7, weights[3] * width)),
        ],
        shape=(4, 4, 4),
        batch=2,
        weight_bytes=weight_bytes,
    )
    assert [group.unseen for group in ledger.groups] == [()] * 4
    assert counts(ledger) == [
        (4 * 64, 96, 3 * 16 + 24, weights[0] * width, 0),
        (3 * 96, 256, 24 + 32, weights[1] * width, 0),
        (2 * 256, 5, 32 + 5, weights[2] * width, 0),
        (7 * 5, 7, 5 + 7, weights[3] * width, 0),
    ]


def test_weights_that_cannot_be_seen_count_as_the_plan_s() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU())
    plan = torch_getfuse.plan(
        model.eval(), (torch.randn(1, 3, 8, 8),), buffer="1MB", weight_bytes=1, cache=False
    )
    conv, relu = (op.name for op in plan.graph)
    fetched = 3 * plan.graph.ops[0].weight_elements
    steps = [(f"{conv} {relu}", Way("stripes", 3), (192, 144, fetched))]
    ledger = run(model, steps)
    assert counts(ledger)[0][3] == fetched
    assert ledger.groups[0].unseen == (conv,)
    assert f"weights counted as the plan's: {conv}" in str(ledger)


# -- what does not run by rows, among what does -------------------------------------------


def test_a_sum_that_is_written_over_its_operand_too_early_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(depth_first, "layouts_of", partial(layouts_by_hand, hasty=True))
    ledger = run(
        Residual(),
        [
            ("a", LINE, (192, 0, 112)),
            ("b add relu", LINE, (0, 0, 148)),
            ("c", LINE, (0, 128, 10)),
        ],
        [Resident("a", 0, 1), Resident("add", 1, 1), Resident("relu", 1, 2)],
        batch=2,
    )
    first, middle, last = ledger.groups
    assert "written over 'a' up to row 0, of which 'b' still reads row 0" in middle.fallback
    assert middle.copied == ("a", "add", "relu")
    assert middle.counted_resident_bytes is None
    assert first.agrees
    assert last.agrees
    assert not ledger.agrees
    assert "fusion_group_1: in memory as well as on chip, not counted: a, add, relu" in str(ledger)
    assert "fusion_group_1 has a, add, relu in memory as well as on chip" in ledger.notes()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_step_that_fails_in_a_call_runs_as_its_nodes(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its last row, when an operand on chip has been written over."""
    model = Residual(kernel=1).eval()
    x = torch.randn(2, 3, 8, 8)
    steps = [
        ("a", LINE, (192, 0, 112)),
        ("b add relu", LINE, (0, 0, 20)),
        ("c", LINE, (0, 128, 10)),
    ]
    residents = [
        *(Resident("input", 0, 0), Resident("a", 0, 1)),
        *(Resident("add", 1, 1), Resident("relu", 1, 2)),
    ]
    plan = plan_by_hand(model, (x,), steps, residents)
    last = ("a", "relu", "c")[failing]
    put = Execution._put
    trials: list[str] = []

    def fail(self: Execution, name: str, low: int, high: int, block: torch.Tensor) -> None:
        if name == last and low == 7 and self.sample == 1:
            trials.append(name)
            if len(trials) > 1:
                raise ValueError("made to fail")
        put(self, name, low, high, block)

    monkeypatch.setattr(Execution, "_put", fail)
    with torch.no_grad():
        expected = model(x)
    got, ledger = torch_getfuse.run_counted(model, (x,), plan)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert [bool(group.fallback) for group in ledger.groups] == [k == failing for k in range(3)]
    assert "made to fail" in ledger.groups[failing].fallback
    assert [group.agrees for group in ledger.groups] == [k != failing for k in range(3)]


def test_an_unfusable_operator_is_a_step_that_is_not_counted() -> None:
    ledger = run(
        Residual(),
        [
            ("a", LINE, (192, 256, 112)),
            ("b", UNFUSABLE, (256, 256, 148)),
            ("add relu", LINE, (512, 0, 0)),
            ("c", LINE, (0, 128, 10)),
        ],
        [Resident("relu", 2, 3)],
    )
    assert [group.agrees for group in ledger.groups] == [True, False, True, True]
    assert ledger.agrees
    assert ledger.groups[1].counted_read_bytes is None
    assert ledger.groups[1].way == "unfusable"
    assert "not counted" in str(ledger)
    assert ledger.notes() == ["inner depth_first: 3 of 3 groups run row by row"]


def test_torch_compile_runs_a_cascade_plan_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The figures of a plan made by hand are not verified: its scheme prices nothing."""
    monkeypatch.setattr(PartitionPlan, "verify", lambda plan: plan)
    model = Residual(kernel=1).eval()
    x = torch.randn(2, 3, 8, 8)
    steps = [
        ("a", LINE, (192, 0, 112)),
        ("b add relu", Way("stripes", 3), (0, 0, 60)),
        ("c", Way("slices", 2), (0, 128, 10)),
    ]
    residents = [Resident("a", 0, 1), Resident("add", 1, 1), Resident("relu", 1, 2)]
    plan = plan_by_hand(model, (x,), steps, residents)
    options = {"plan": plan, "inner": "depth_first", "strict": True}
    compiled = torch.compile(model, backend="getfuse", options=options)
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_steps_in_an_order_in_which_they_cannot_run_are_refused() -> None:
    steps = [("b add relu c", LINE, (256, 128, 158)), ("a", LINE, (192, 256, 112))]
    with pytest.raises(PlanError, match="fusion_group_0 cannot run as early"):
        run(Residual(), steps, [Resident("a", 0, 1)])


def test_what_is_no_step_finds_resident_tensors_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the caller of the split graph looked at ``a`` on its way."""
    seen: list[torch.Tensor] = []
    border = depth_first._Border.of

    def of(*args: Any) -> Any:
        return replace(border(*args), real=frozenset("a"))

    class Spy(DepthFirstGroup):
        def forward(self, *args: Any) -> Any:
            seen.extend(arg for arg in args if arg.shape == (2, 4, 8, 8))
            return super().forward(*args)

    monkeypatch.setattr(depth_first._Border, "of", of)
    monkeypatch.setattr(depth_first, "DepthFirstGroup", Spy)
    model = Residual(kernel=1)
    steps = [
        ("a", LINE, (192, 0, 112)),
        ("b add relu", LINE, (0, 0, 20)),
        ("c", LINE, (0, 128, 10)),
    ]
    ledger = run(model, steps, [Resident("a", 0, 1), Resident("relu", 1, 2)], batch=2)
    a, relu = seen
    assert relu.is_meta
    torch.manual_seed(0)
    torch.testing.assert_close(a, model.a(torch.randn(2, 3, 8, 8)), rtol=1e-4, atol=1e-5)
    assert [group.agrees for group in ledger.groups] == [False, True, True]
    assert ledger.groups[0].copied == ("a",)
    assert not ledger.groups[0].fallback


def test_the_ledger_tells_ways_and_residents() -> None:
    ledger = run(
        Residual(),
        [("a", Way("stripes", 4), (192, 0, 448)), ("b add relu c", LINE, (0, 128, 158))],
        [Resident("a", 0, 1)],
    )
    form = ledger.to_dict()["groups"][0]
    assert form["way"] == "4 stripes"
    assert (form["weight_bytes"], form["counted_weight_bytes"]) == (448, 448)
    assert (form["planned_resident_bytes"], form["counted_resident_bytes"]) == (256, 256)
    assert "4 stripes" in str(ledger)
    assert "resident" in str(ledger)


# -- plans at random ----------------------------------------------------------------------


def check_random(model: nn.Module, x: tuple[torch.Tensor, ...], seed: int) -> None:
    """Run a random plan: no step that is not unfusable falls back, all counts agree."""
    options = {"buffer": "100MB", "activation_bytes": 1, "weight_bytes": 1, "cache": False}
    graph = torch_getfuse.plan(model, x, **options).graph
    steps, residents = random_steps(graph, Random(seed))
    plan = plan_by_hand(model, x, steps, residents)
    with torch.no_grad():
        expected = model(*x)
    got, ledger = torch_getfuse.run_counted(model, x, plan)
    assert distance(got, expected) < 1e-5
    groups = [group for group in ledger.groups if group.way != "unfusable"]
    assert all(group.agrees for group in groups), (seed, steps, residents, str(ledger))


@pytest.mark.parametrize("name", MODELS)
def test_random_plans_count_what_the_definition_says(name: str) -> None:
    build, shapes = MODELS[name]
    for seed in range(4):
        torch.manual_seed(seed)
        x = tuple(torch.randn(1 + seed % 2, *shape) for shape in shapes)
        check_random(build().eval(), x, seed)


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in ALWAYS])
def test_every_rule_in_any_way(name: str) -> None:
    """Of one image and of three; tensors of other types lie over each other too."""
    sample = SAMPLES[name]
    for seed, batch in ((0, 1), (1, 3)):
        if batch == 1 or name not in BATCHED:
            torch.manual_seed(0)
            x = tuple(torch.randn(batch, *shape) for shape in sample.shapes)
            check_random(sample.build().eval(), x, seed)
