"""Plans that are run: counts equal the plan's to the byte, rings are exact, outputs are eager's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

import torch_getfuse
from tests.graphs import random_graph, random_group
from tests.networks import SIZES, network
from tests.simulator import Simulator
from torch_getfuse.backend.rowwise import trial
from torch_getfuse.backend.rowwise.rings import Ring, RingView
from torch_getfuse.backend.rules.registry import EXTRA_SAMPLES, RULES
from torch_getfuse.backend.rules.rule import Run
from torch_getfuse.errors import GetfuseError, PlanError
from torch_getfuse.ir import Tensor
from torch_getfuse.models import calibrate_batch_norm
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.cost.lbdf.row_schedule import make_schedule
from torch_getfuse.partition.cost.scheme import boundary
from torch_getfuse.partition.plan import PartitionPlan

SAMPLES = {**{rule.kind: rule.sample for rule in RULES}, **EXTRA_SAMPLES}

# What cannot run by rows, and for all else must: sample -> part of the reason, by batch.
_HELD = "needs all of one input"
_STATE = "carries a state from row to row"
_SEVERAL = "gives several tensors"
_SHARES = "results share memory"
ALWAYS = {
    "std_mean": "no rule that takes them",
    "causal attention": "is causal",
    **dict.fromkeys(("unfold", "unfold of columns", "unfold of both"), _SHARES),
    **dict.fromkeys(("im2col", "im2col, col2im"), "gives its rows in another shape"),
    "col2im": "has 42 rows, the output 12",
    "index beside a slice": "has 6 rows, the output 5",
    **dict.fromkeys(
        ("grid_sample", "index by a map", "gather of rows", "scatter over rows"), _HELD
    ),
    "index_put, added": _HELD,
    **dict.fromkeys(("lstm", "gru", "rnn", "lstm, two ways", "lstm, projected"), _STATE),
    **dict.fromkeys(("lstm of a signal", "lstm of a signal, two ways"), _STATE),
    "gru of a signal, last state": _STATE,
    **dict.fromkeys(("max_pool2d, both", "topk, both", "topk of columns, both"), _SEVERAL),
    **dict.fromkeys(("lstm_cell", "gru, steps and state"), _SEVERAL),
    **dict.fromkeys(("gru_cell", "rnn_cell"), "a weight is computed from"),
}
"""Samples that do not run by rows, and what the ledger says of it."""
BATCHED = {
    **dict.fromkeys(("stack", "samples behind tokens", "attention"), "batch on the first axis"),
    **dict.fromkeys(("mean of all", "variance of all"), "batch on the first axis"),
    **dict.fromkeys(("index, apart", "lstm, last state"), "batch on the first axis"),
    **dict.fromkeys(("gru, last state", "gru of a signal, last state"), "batch on the first axis"),
    "product": "multiplies whole tensors",
    "tile": "runs along the batch",
    "roll of all": "shifts the flattened tensor",
    "index_put": "gives values that differ",
}
"""The same of samples that do so for one image, and not for several."""


def plan_of(model: nn.Module, x: Sequence[torch.Tensor], **options: object) -> PartitionPlan:
    settings = {"buffer": "100MB", "activation_bytes": 1, "weight_bytes": 1, "cache": False}
    return torch_getfuse.plan(model, tuple(x), **{**settings, **options})


def distance(got: object, expected: object) -> float:
    """The largest difference, as a fraction of the largest value."""
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True)
    worst = 0.0
    for one, other in pairs:
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        gap = (one.double() - other.double()).abs().max()
        worst = max(worst, float(gap / other.double().abs().max().clamp_min(1e-30)))
    return worst


def check(
    model: nn.Module, x: Sequence[torch.Tensor], tolerance: float = 1e-5, **options: object
) -> torch_getfuse.Ledger:
    """Plan, run, compare; every group by rows and every count the plan's."""
    plan = plan_of(model, x, **options)
    with torch.no_grad():
        expected = model(*x)
    got, ledger = torch_getfuse.run_counted(model, tuple(x), plan)
    assert [g.fallback for g in ledger.groups] == [""] * len(plan.groups)
    assert ledger.agrees, str(ledger)
    for entry, group in zip(ledger.groups, plan.groups, strict=True):
        assert entry.counted_read_bytes == group.dram_read_bytes
        assert entry.counted_write_bytes == group.dram_write_bytes
        assert entry.counted_ring_bytes == group.buffer_bytes - group.dram_weight_bytes
    assert distance(got, expected) < tolerance
    return ledger


# -- every operator rule ------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SAMPLES)
def test_every_rule(name: str, batch: int) -> None:
    sample = SAMPLES[name]
    torch.manual_seed(0)
    model = sample.build().eval()
    x = tuple(torch.randn(batch, *shape) for shape in sample.shapes)
    reason = (BATCHED.get(name) if batch > 1 else None) or ALWAYS.get(name)
    if reason is None:
        check(model, x)
        return
    plan = plan_of(model, x)
    got, ledger = torch_getfuse.run_counted(model, x, plan)
    told = [group.fallback for group in ledger.groups if group.fallback]
    assert any(reason in text for text in told), told
    assert not ledger.agrees
    with torch.no_grad():
        assert distance(got, model(*x)) < 1e-5


REFUSED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int, str]] = {
    "repeat": (lambda x: (x < 0).repeat(2, 1, 1), 2, "mixes its samples"),
    "tile": (lambda x: (x < 0).tile(2, 1, 1), 2, "mixes its samples"),
    "roll": (lambda x: (x < 0).roll(3), 2, "shifts the flattened tensor"),
    "batch_norm": (
        lambda x: F.batch_norm(x.float(), None, None, training=True) < 0,
        2,
        "takes its statistics over the batch",
    ),
    "as_strided": (lambda x: torch.as_strided(x, (2, 2), (1, 1)).sum(), 1, "by strides"),
}
"""Function, batch, and why it does not run by rows (seeds 156638, 164940, 167695 of the fuzzer)."""


class Applied(nn.Module):
    """A function of one input as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_trial_need_show_is_refused_by_its_rule(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the trial's random numbers give rows that are equal by chance."""
    monkeypatch.setattr(trial, "_difference", lambda *_: "")
    function, batch, reason = REFUSED[name]
    model = Applied(function)
    x = (
        torch.randint(-4, 5, (batch, 4, 16), generator=torch.Generator().manual_seed(0))[..., ::2],
    )
    got, ledger = torch_getfuse.run_counted(model, x, plan_of(model, x))
    assert torch.equal(got, model(*x))
    assert any(reason in group.fallback for group in ledger.groups)


@pytest.mark.parametrize("function", [lambda x: x < 0, lambda x: (x > 0).sum(2)])
def test_a_trial_sees_both_answers_of_a_comparison(
    function: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    apart = trial._apart

    def watched(right: torch.Tensor, ours: torch.Tensor) -> str:
        seen.append(right.clone())
        return apart(right, ours)

    monkeypatch.setattr(trial, "_apart", watched)
    x = (torch.randint(-4, 5, (1, 4, 8)),)
    check(Applied(function), x)
    assert any(len(right.unique()) > 1 for right in seen)


# -- small models -------------------------------------------------------------------------


def norm(channels: int) -> nn.Module:
    made = nn.BatchNorm2d(channels)
    nn.init.uniform_(made.weight, 0.5, 1.5)
    nn.init.uniform_(made.bias, -0.5, 0.5)
    made.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
    made.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return made


class Excite(nn.Module):
    """Squeeze-and-Excite: the scale waits for the whole map."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)
        self.b = nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.a(x))
        scale = torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3))))))
        return self.b(y * scale[:, :, None, None])


class Skip(nn.Module):
    """A skip past a dilated and a 5x5 convolution; several sinks of different lengths."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU6(inplace))
        self.b = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.c = nn.Conv2d(8, 8, 5, padding=2)
        self.d = nn.Conv2d(8, 4, 3, stride=2)
        self.e = nn.Conv2d(8, 4, 1, stride=3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.a(x)
        z = self.c(F.relu(self.b(y), inplace=True))
        z += y
        return {"wide": z.tanh(), "half": self.d(z), "third": self.e(y)}


class Branches(nn.Module):
    """Pools of every kind, concatenated, and an upsampled branch; two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.t = nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        pools = [
            F.max_pool2d(y, 3, 2, 1),
            F.avg_pool2d(y, 3, 2, 1, count_include_pad=False),
            F.avg_pool2d(y, 2, 2, ceil_mode=True),
            F.avg_pool2d(y, 3, 2, 1, ceil_mode=True),
        ]
        size = pools[1].shape[2:]
        joined = torch.cat([p[:, :, : size[0], : size[1]] for p in pools], 1)
        up = F.interpolate(joined, scale_factor=2, mode="bilinear")[:, :4]
        return self.t(up) + z


class Shuffle(nn.Module):
    """ShuffleNet's unit: halves of the channels, and a channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 8, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = F.relu(self.a(x)).chunk(2, 1)
        y = torch.cat((left, self.b(right)), 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).relu() + 1


class Tokens(nn.Module):
    """ConvNeXt's block: layer norm and linear layers over permuted maps."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(6, 6, 7, padding=3, groups=6)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.a(x).permute(0, 2, 3, 1))
        return x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


def head() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), norm(6), nn.Hardswish(), nn.Flatten(), nn.Linear(6 * 9 * 8, 5)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "excite": (Excite, ((3, 14, 11),)),
    "skip": (lambda: Skip(False), ((3, 17, 10),)),
    "skip in place": (lambda: Skip(True), ((3, 17, 10),)),
    "branches": (Branches, ((4, 13, 12), (4, 28, 24))),
    "shuffle": (Shuffle, ((6, 10, 9),)),
    "tokens": (Tokens, ((6, 12, 9),)),
    "head": (head, ((3, 17, 16),)),
}


@pytest.mark.parametrize("buffer", [700, "3KB", "1MB"])
@pytest.mark.parametrize("name", MODELS)
def test_small_models_under_large_and_small_buffers(name: str, buffer: object) -> None:
    build, shapes = MODELS[name]
    torch.manual_seed(1)
    model = build().eval()
    check(model, [torch.randn(1, *shape) for shape in shapes], buffer=buffer)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_runs_image_by_image_in_the_same_rings(name: str) -> None:
    build, shapes = MODELS[name]
    torch.manual_seed(2)
    model = build().eval()
    one = check(model, [torch.randn(1, *shape) for shape in shapes], buffer="3KB")
    three = check(model, [torch.randn(3, *shape) for shape in shapes], buffer="3KB")
    assert three.samples == 3
    assert one.to_dict()["groups"] == three.to_dict()["groups"]


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(name: str) -> None:
    build, shapes = MODELS[name]
    torch.manual_seed(3)
    model = build().eval().bfloat16()
    x = [torch.randn(1, *shape).bfloat16() for shape in shapes]
    check(model, x, tolerance=0.03, buffer="3KB")


def test_an_exported_program_runs_too() -> None:
    model = Excite().eval()
    x = torch.randn(2, 3, 14, 11)
    program = torch.export.export(model, (x,))
    plan = plan_of(model, (x,), buffer="2KB")
    got, ledger = torch_getfuse.run_counted(program, (x,), plan)
    assert ledger.agrees
    with torch.no_grad():
        assert distance(got, model(x)) < 1e-5


def test_channels_last_and_rows_that_nobody_reads() -> None:
    """A strided 1x1 convolution skips the last row, which crosses the border all the same."""
    model = nn.Sequential(nn.Conv2d(4, 3, 1, stride=2), nn.ReLU()).eval()
    x = torch.randn(2, 4, 8, 6).to(memory_format=torch.channels_last)
    ledger = check(model, (x,))
    assert ledger.groups[0].counted_read_bytes == 4 * 8 * 6


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [1, 8])
def test_group_norm_far_from_zero_is_as_exact_as_eager(size: int, batch: int) -> None:
    """Torch's of maps in channels last, as rings lie, is not: 0.01 off here."""
    model = nn.Sequential(nn.AdaptiveMaxPool2d(size), nn.GroupNorm(2, 4)).eval()
    x = torch.randn(batch, 4, 16, 16) / 4 + 30
    check(model, (x,), 1e-4)


# -- random models and random graphs ------------------------------------------------------


class Random2d(nn.Module):
    """Operators drawn from a seed, over maps of any size, each reading earlier ones."""

    def __init__(self, seed: int, operators: int) -> None:
        super().__init__()
        draw = Random(seed)
        kinds = ("conv", "conv", "act", "add", "pool", "scale", "up", "in place")
        # Drawn now: Dynamo does not trace a generator of random numbers.
        self.drawn = [
            (draw.choice(kinds), draw.randrange(60), draw.random() < 0.15) for _ in range(operators)
        ]
        self.kernels = nn.ModuleList()
        for _ in range(operators):
            size, stride, dilation = draw.choice([1, 3, 3, 5]), draw.choice([1, 1, 2]), 1
            if size == 3:
                dilation = draw.choice([1, 2])
            groups = draw.choice([1, 4])
            padding = draw.choice([0, dilation * (size // 2)])
            kernel = nn.Conv2d(4, 4, size, stride, padding, dilation, groups)
            self.kernels.append(nn.Sequential(kernel, norm(4)) if draw.random() < 0.5 else kernel)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps, outputs = [x], []
        for kernel, (kind, drawn, returned) in zip(self.kernels, self.drawn, strict=True):
            y = maps[-1 - drawn % min(2, len(maps))]
            if kind == "conv" and min(y.shape[2:]) > 10:
                y = kernel(y)
            elif kind == "add":
                same = [m for m in maps if m.shape == y.shape]
                y = y + same[drawn % len(same)]
            elif kind == "pool" and min(y.shape[2:]) > 3:
                pool = F.max_pool2d if drawn % 2 else F.avg_pool2d
                y = pool(y, 3, 1 + drawn % 3 // 2, 1, ceil_mode=drawn % 5 > 2)
            elif kind == "scale":
                y = y * y.mean((2, 3), keepdim=True).sigmoid()
            elif kind == "up" and max(y.shape[2:]) < 20:
                y = F.interpolate(y, scale_factor=2, mode="bilinear" if drawn % 2 else "nearest")
            elif kind == "in place":
                y = F.hardswish(y * 2, inplace=True)
            else:
                y = F.silu(y)
            maps.append(y)
            if returned:
                outputs.append(y)
        return [*outputs, maps[-1]]


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 10**6),
    st.integers(2, 9),
    st.tuples(st.integers(4, 17), st.integers(4, 12)),
    st.sampled_from([300, 700, 2000, 10**6]),
    st.sampled_from([1, 2]),
)
def test_random_models(
    seed: int, operators: int, size: tuple[int, int], buffer: int, batch: int
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model = Random2d(seed, operators).eval()
    x = torch.randn(batch, 4, *size)
    check(model, (x,), tolerance=1e-4, buffer=buffer, method="random", budget=3, seed=seed)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False), st.integers(1, 9), st.booleans())
def test_the_schedule_fits_the_model_s_rings_and_no_smaller_ones(
    rng: Random, operators: int, crops: bool
) -> None:
    graph = random_graph(rng, operators, crops=crops)
    mask = random_group(rng, graph)
    terms = Lbdf(graph).terms(mask)
    rings = {term.name: term.units for term in terms if term.kind == "lines"}
    simulator = Simulator(graph, mask)
    assert rings == {name: max(rows, 1) for name, rows in simulator.peak.items()}
    _, writes = boundary(graph, mask)
    if any(simulator.made[name] < simulator.units[name] for name in writes):
        # The definition's schedule leaves rows of a result unmade; to make them may take more.
        rings_of_rest = {name: graph.tensors[name].rows for name in rings}
        schedule = make_schedule(graph, mask, rings_of_rest)
    else:
        schedule = make_schedule(graph, mask, rings)
    assert len(set(schedule.steps)) == len(schedule.steps)
    for name in (*schedule.loads, *schedule.writes):
        rows = graph.tensors[name].rows
        assert [unit for step, unit in schedule.steps if step == name] == list(range(rows))
    for name, rows in rings.items():
        if rows > 1:  # one row less is too few
            with pytest.raises(PlanError, match="the schedule holds"):
                make_schedule(graph, mask, {**rings, name: rows - 1})


# -- the rings themselves -----------------------------------------------------------------


def test_a_ring_refuses_rows_that_it_no_longer_holds() -> None:
    view = RingView(Ring(2, 6, 4), Tensor.of("t", (1, 2, 5, 3)), torch.float32)
    rows = torch.arange(30.0).view(1, 2, 5, 3)
    for unit in range(3):
        view.write(unit, unit + 1, rows[:, :, unit : unit + 1])
    assert torch.equal(view.read(1, 3), rows[:, :, 1:3])
    assert torch.equal(view.read(2, 3), rows[:, :, 2:3])
    with pytest.raises(RuntimeError, match="row 0 of 't' is not in its ring of 2 rows"):
        view.read(0, 2)
    with pytest.raises(RuntimeError, match="row 3 of 't' is not in its ring"):
        view.read(2, 4)
    with pytest.raises(RuntimeError, match="came as"):
        view.write(3, 4, rows)


# -- what is refused, and what falls back ---------------------------------------------------


def test_plans_that_are_not_in_rows_are_refused() -> None:
    model, x = Excite().eval(), torch.randn(1, 3, 14, 11)
    for options, what in (({"granularity": "pixel"}, "pixel"), ({"scheme": "brr"}, "brr")):
        plan = plan_of(model, (x,), **options)
        with pytest.raises(PlanError, match=rf"{what}.*granularity='line'"):
            torch_getfuse.run_counted(model, (x,), plan)


def test_a_plan_of_another_model_is_refused() -> None:
    plan = plan_of(Excite().eval(), (torch.randn(1, 3, 14, 11),))
    with pytest.raises(PlanError, match="belongs to another graph"):
        torch_getfuse.run_counted(Tokens().eval(), (torch.randn(1, 6, 12, 9),), plan)


def test_training_mode_falls_back_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)).train()
    x = torch.randn(2, 3, 8, 8)
    plan = plan_of(model, (x,))
    before = model[1].running_mean.clone()  # type: ignore[union-attr, operator]
    _, ledger = torch_getfuse.run_counted(model, (x,), plan)
    assert not ledger.agrees
    assert "num_batches_tracked" in ledger.groups[0].fallback
    assert ledger.to_dict()["groups"][0]["counted_read_bytes"] is None
    assert "ran as FX nodes" in " ".join(str(ledger).split())
    assert not torch.equal(model[1].running_mean, before)  # type: ignore[union-attr, arg-type]


def test_a_hidden_write_in_place_falls_back() -> None:
    """What is read under its old name after it was changed, or belongs to the caller."""

    class Old(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            y.relu_()
            return y + 1

    class Input(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1) * 2

    x = torch.randn(1, 3, 6, 6)
    for model, reason in (
        (Old(), "reads afterwards"),
        (Input(), "an input or attribute of the model, in place"),
    ):
        plan = plan_of(model, (x,))
        mine, eager = x.clone(), x.clone()
        got, ledger = torch_getfuse.run_counted(model, (mine,), plan)
        assert reason in ledger.groups[0].fallback
        assert torch.equal(got, model(eager))
        assert torch.equal(mine, eager)


def test_a_hidden_write_across_groups_is_found() -> None:
    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            z = self.b(torch.relu_(y))
            return z.sum((2, 3)) + y.sum((2, 3))

    torch.manual_seed(0)
    model, x = Across().eval(), torch.randn(1, 3, 12, 12)
    plan = plan_of(model, (x,), buffer="1KB")
    got, _ = torch_getfuse.run_counted(model, (x,), plan)
    with torch.no_grad():
        assert distance(got, model(x)) < 1e-5


# -- through torch.compile ------------------------------------------------------------------


def compiled(model: nn.Module, **options: object) -> Callable[..., object]:
    given = {"buffer": "3KB", "inner": "depth_first", "strict": True, "cache": False, **options}
    return torch.compile(model, backend="getfuse", options=given)


def notes(run: object) -> str:
    return "\n".join(n for s in torch_getfuse.report(run).sections for n in s.notes)


def test_torch_compile_runs_groups_by_rows_with_the_weights_of_the_moment() -> None:
    torch.manual_seed(0)
    model, x = Skip(True).eval(), torch.randn(2, 3, 17, 10)
    run = compiled(model)
    with torch.no_grad():
        assert distance(run(x), model(x)) < 1e-5
        assert "groups run row by row" in notes(run)
        model.c.weight.mul_(3)
        model.b.weight = nn.Parameter(torch.randn_like(model.b.weight))
        assert distance(run(x), model(x)) < 1e-5
        second = Skip(True).eval()
        assert distance(compiled(second)(x), second(x)) < 1e-5


def test_training_runs_the_fx_nodes_and_the_report_says_so() -> None:
    torch.manual_seed(0)
    model, x = Excite().eval(), torch.randn(1, 3, 14, 11)
    run = compiled(model)
    grads = []
    for call in (run, model):
        model.zero_grad()
        call(x).sum().backward()  # type: ignore[union-attr, attr-defined]
        grads.append([p.grad.clone() for p in model.parameters()])  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert "runs as its FX nodes: the call is recorded for gradients" in notes(run)


def test_dynamic_shapes_run_the_fx_nodes_and_the_report_says_so() -> None:
    torch.manual_seed(0)
    model = Excite().eval()
    run = torch.compile(
        model,
        backend="getfuse",
        options={"buffer": "3KB", "inner": "depth_first", "cache": False},
        dynamic=True,
    )
    with torch.no_grad():
        for rows in (14, 19):
            x = torch.randn(1, 3, rows, 11)
            assert torch.equal(run(x), model(x))
    assert "shapes are dynamic" in notes(run)


@pytest.mark.parametrize("options", [{"granularity": "pixel"}, {"scheme": "brr"}])
def test_torch_compile_refuses_plans_that_are_not_in_rows(options: dict[str, str]) -> None:
    run = compiled(Excite().eval(), **options)
    with pytest.raises(Exception, match="granularity='line'"), torch.no_grad():
        run(torch.randn(1, 3, 14, 11))


def test_strict_raises_what_cannot_run_by_rows() -> None:
    model = Run(lambda x: torch.std_mean(x, (2, 3))[0] + 1)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        with pytest.raises(Exception, match="std_mean") as raised:
            compiled(model)(x)
        assert isinstance(getattr(raised.value, "inner_exception", raised.value), GetfuseError)
        torch._dynamo.reset()
        run = compiled(model, strict=False)
        assert torch.equal(run(x), model(x))
        assert "fusion_group_0 runs as its FX nodes" in notes(run)


# -- the paper's networks -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_every_group_of_the_optimal_plans_of_the_networks(name: str) -> None:
    model, x = network(name)
    # Eager's own rounding on resnet152 is 3.6e-4 (against float64), and eager in channels_last
    # differs from eager by 3.2e-4: no order of summing comes closer.
    tolerance = 1e-3 if name == "resnet152" else 1e-4
    ledger = check(model, (x,), tolerance, buffer="256KB", method="exact", time_limit=60)
    assert not any(group.whole for group in ledger.groups)


def test_calibration_is_what_the_networks_have() -> None:
    """An output that is nothing would be close to anything."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(2, 3, 9, 9)
    calibrate_batch_norm(model.eval(), x)
    with torch.no_grad():
        assert model(x).abs().max() > 0.1
    check(model, (x,))
