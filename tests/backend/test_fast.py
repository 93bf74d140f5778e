"""The fast program: equal to eager to rounding, however it is cut; right for other weights."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_getfuse
from torch_getfuse.backend.packed import fast
from torch_getfuse.backend.packed import tuning as fast_tuning
from torch_getfuse.backend.packed.live_conv import LiveConv
from torch_getfuse.backend.packed.packed_conv import Activation, Affine, ConvShape, PackedConv
from torch_getfuse.backend.packed.program import Choice, FastProgram
from torch_getfuse.backend.packed.steps import Step, Unfit, build_steps
from torch_getfuse.backend.packed.strips import Segment
from torch_getfuse.backend.packed.tuning import StepTimes, choose_strips
from torch_getfuse.models import calibrate_batch_norm, import_torchvision

pytestmark = pytest.mark.fast_program

NETWORKS = (
    "mobilenet_v2",
    "resnet18",
    "squeezenet1_0",
    "efficientnet_b0",
    "shufflenet_v2_x0_5",
    "googlenet",
)


def traced(model: nn.Module, x: Tensor) -> tuple[Any, list[Any]]:
    """The graph that the backend is given for inference, and its inputs."""
    found: list[Any] = []

    def backend(gm: Any, inputs: list[Any]) -> Callable[..., Any]:
        found.append((gm, inputs))
        return gm.forward  # type: ignore[no-any-return]

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=False)(x)
    assert len(found) == 1
    return found[0]


def runnable(steps: list[Step], returned: set[Any], first: int, end: int) -> bool:
    """Whether steps can be one segment."""
    part = steps[first:end]
    if not all(step.by_rows for step in part):
        return False
    inside = {step.node for step in part}
    later = {node for step in steps[end:] for node in step.maps}
    return Segment(part, {n for n in inside if n in returned or n in later}).runs


def cut_anywhere(steps: list[Step], returned: set[Any], seed: int) -> list[Choice]:
    """Segments of random lengths in random numbers of strips, as many as fit."""
    rng = random.Random(seed)
    choices, at = [], 0
    while at < len(steps):
        end = min(len(steps), at + rng.randint(1, 9))
        while end > at and not runnable(steps, returned, at, end):
            end -= 1
        if end > at:
            choices.append(Choice(at, end, rng.randint(2, 9)))
        at = max(end, at + 1)
    return choices


def close(ours: Any, eager: Any, tolerance: float = 1e-4) -> None:
    assert type(ours) is type(eager)
    if isinstance(ours, Tensor):
        assert ours.shape == eager.shape
        assert ours.stride() == eager.stride()
        scale = float(eager.abs().max())
        assert float((ours - eager).abs().max()) <= tolerance * scale + 1e-12
        return
    for a, b in zip(ours, eager, strict=True):
        close(a, b, tolerance)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    arguments = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = getattr(import_torchvision().models, name)(weights=None, **arguments).eval()
    return calibrate_batch_norm(model, torch.randn(2, 3, 96, 96))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_cut_anywhere(name: str) -> None:
    gm, inputs = traced(network(name), torch.randn(2, 3, 96, 80))
    steps = build_steps(gm)
    returned = set(gm.graph.output_node().all_input_nodes)
    with torch.no_grad():
        eager = gm.forward(*inputs)
        close(FastProgram(gm, steps, [], 1)(*inputs), tuple(eager))
        for seed, threads in ((1, 1), (2, 2), (3, 1)):
            choices = cut_anywhere(steps, returned, seed)
            assert any(choice.end - choice.first > 1 for choice in choices)
            close(FastProgram(gm, steps, choices, threads)(*inputs), tuple(eager))


class Sketch(nn.Module):
    """Random layers: windows of every kind, skips, branches, several outputs."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.layers = nn.ModuleList()
        self.plan: list[tuple[str, int, int]] = []
        channels = [4]
        for _ in range(self.rng.randint(2, 7)):
            source = self.rng.randrange(len(channels))
            kind = self.rng.choice(["conv", "conv", "conv", "act", "pool", "cat", "add"])
            other = self.rng.randrange(len(channels))
            self.plan.append((kind, source, other))
            wide = channels[source]
            if kind == "conv":
                out = self.rng.choice([4, 6])
                kernel = self.rng.choice([1, 2, 3, 5])
                dilation = self.rng.choice([1, 1, 2])
                conv = nn.Conv2d(
                    wide, out, kernel, 1, self.rng.randint(0, kernel), dilation,
                    bias=self.rng.random() < 0.5,
                )  # fmt: skip
                norm = nn.BatchNorm2d(out) if self.rng.random() < 0.5 else nn.Identity()
                act = self.rng.choice(
                    [nn.ReLU(True), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.Identity()]
                )
                self.layers.append(nn.Sequential(conv, norm, act))
                channels.append(out)
            elif kind == "pool":
                self.layers.append(nn.MaxPool2d(3, self.rng.choice([1, 2]), 1, ceil_mode=True))
                channels.append(wide)
            else:
                self.layers.append(nn.Sigmoid())
                channels.append(wide + channels[other] if kind == "cat" else wide)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for layer, (kind, source, other) in zip(self.layers, self.plan, strict=True):
            a, b = values[source], values[other]
            if kind == "cat" and source != other and a.shape[2:] == b.shape[2:]:
                values.append(torch.cat([a, b], 1))
            elif kind == "cat":
                values.append(torch.cat([a, a * 2], 1)[:, : a.shape[1] + b.shape[1]])
            elif kind == "add" and a.shape == b.shape:
                values.append(a + b)
            else:
                values.append(layer(a))
        return values[-1], *values[1:-1:3]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_random_graphs_cut_anywhere(seed: int) -> None:
    torch.manual_seed(seed)
    model = Sketch(seed).eval()
    x = torch.randn(1 + seed % 2, 4, 13, 11)
    try:
        model(x)
    except (RuntimeError, IndexError):
        return  # the sketch shrank a map to nothing
    gm, inputs = traced(calibrate_batch_norm(model, x), x)
    steps = build_steps(gm)
    returned = set(gm.graph.output_node().all_input_nodes)
    with torch.no_grad():
        eager = gm.forward(*inputs)
        for strips in range(3):
            choices = cut_anywhere(steps, returned, seed + strips)
            close(FastProgram(gm, steps, choices, 1)(*inputs), tuple(eager))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda t: t,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "swish": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.relu6,
    "leaky_relu": lambda t: F.leaky_relu(t, 0.1),
    "gelu": F.gelu,
}
SCALARS = {"hardtanh": (0.0, 6.0), "leaky_relu": (0.1,)}


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_post_operators(name: str, kernel: int) -> None:
    x, weight, bias = torch.randn(2, 8, 7, 9), torch.randn(6, 8, kernel, kernel), torch.randn(6)
    shape = ConvShape((kernel,) * 2, (1, 1), (kernel // 2,) * 2, (1, 1), 1, (1, 8, 7, 9))
    activation = Activation(name, SCALARS.get(name, ()), "none" if name == "gelu" else "")
    affine = Affine([True], None)
    conv = PackedConv(shape, activation, affine, False)
    assert conv.linear == (kernel == 1)
    found = conv.whole(conv.prepare(weight, [bias]), x)
    right = ACTIVATIONS[name](F.conv2d(x, weight, bias, padding=kernel // 2))
    assert torch.allclose(found, right, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)
    if activation.follows_addition:
        conv = PackedConv(shape, activation, affine, True)
        other = torch.randn_like(found)
        found = conv.whole(conv.prepare(weight, [bias]), x, other)
        right = ACTIVATIONS[name](F.conv2d(x, weight, bias, padding=kernel // 2) + other)
        assert torch.allclose(found, right, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("window", [(1, 1, 0, 1), (1, 2, 0, 1), (3, 1, 1, 1), (3, 2, 0, 2)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_weights_where_they_lie(
    name: str, window: tuple[int, ...], layout: torch.memory_format
) -> None:
    kernel, stride, padding, dilation = window
    x, bias = torch.randn(2, 8, 7, 9), torch.randn(6)
    weight = torch.randn(6, 8, kernel, kernel).contiguous(memory_format=layout)
    shape = ConvShape(
        (kernel,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2, 1, (1, 8, 7, 9)
    )
    activation = Activation(name, SCALARS.get(name, ()), "none" if name == "gelu" else "")
    conv = LiveConv(shape, activation, Affine([True], None))
    right = F.conv2d(x, weight, bias, stride, padding, dilation)
    other = torch.randn_like(right)

    def by_position(value: Tensor) -> Tensor:
        return value.permute(0, 2, 3, 1).reshape(-1, value.shape[1])

    for added in (None, other):
        sums: list[Tensor] = []
        flat = conv.product(
            weight,
            conv.prepare([bias]),
            by_position(x) if shape.is_linear else x,
            None if added is None else by_position(added),
            sums,
        )
        batch, channels, rows, cols = right.shape
        found = flat.view(batch, rows, cols, channels).permute(0, 3, 1, 2)
        assert len(sums) == 1
        assert torch.allclose(
            found, ACTIVATIONS[name](right if added is None else right + added), atol=1e-4
        )
        assert found.is_contiguous(memory_format=torch.channels_last)


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(
        model, backend="getfuse", options={"method": "direct", "strict": True, **options}
    )


def notes(model: Any) -> str:
    return " | ".join(n for s in torch_getfuse.report(model).sections for n in s.notes)


@pytest.mark.usefixtures("always")
def test_right_after_weights_change_and_for_another_instance() -> None:
    model, x = network("resnet18"), torch.randn(1, 3, 64, 64)
    run = compiled(model)
    with torch.no_grad():
        close(run(x), model(x))
        assert "packed convolutions" in notes(run)
        model.conv1.weight.mul_(0.5)
        close(run(x), model(x))
        model.layer1[0].bn1.running_var.add_(0.3)
        close(run(x), model(x))
        model.conv1.weight = nn.Parameter(torch.randn_like(model.conv1.weight))
        close(run(x), model(x))
        other = network("resnet18")
        other.load_state_dict({k: v * 1.01 for k, v in other.state_dict().items()})
        second = torch.compile(other, backend="getfuse", options={"method": "direct"})
        close(second(x), other(x))
        close(run(x), model(x))


def through_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def other_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def through_vector(model: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 1.5, model.parameters())


def through_numpy(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.detach().numpy()[...] *= 1.5


def last_bit(model: nn.Module) -> None:
    weight = model[3].weight.detach().numpy()  # type: ignore[index]
    weight.reshape(-1)[-1] = -1e3


def statistics(model: nn.Module) -> None:
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.numpy()[...] += 0.7


def infinite(model: nn.Module) -> None:
    model[3].weight.detach().numpy()[0, 0, 0, 0] = float("inf")  # type: ignore[index]


def nan(model: nn.Module) -> None:
    model[0].weight.detach().numpy()[0, 0, 0, 0] = float("nan")  # type: ignore[index]


WRITES = (
    through_data, other_data, through_vector, through_numpy, last_bit, statistics, infinite, nan,
)  # fmt: skip


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 64, 3, 2, bias=False),
        nn.BatchNorm2d(64), nn.ReLU6(), nn.Conv2d(64, 4, 1), nn.Hardsigmoid(),
    ]  # fmt: skip
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.usefixtures("always")
def test_right_after_any_write(write: Callable[[nn.Module], None]) -> None:
    model, x = stack(), torch.randn(1, 4, 9, 9)
    run = compiled(model)
    with torch.no_grad():
        close(run(x), model(x))
        assert "packed convolutions" in notes(run)
        before = model(x)
        write(model)
        assert not torch.equal(model(x), before)
        assert torch.allclose(run(x), model(x), rtol=1e-4, atol=1e-5, equal_nan=True)
        assert torch.allclose(run(x), model(x), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.usefixtures("always")
def test_weights_in_shared_memory_and_with_gaps() -> None:
    model, x = stack(), torch.randn(1, 4, 9, 9)
    wide = torch.randn(64, 8, 3, 6)
    model[3].weight.data = wide[..., ::2]
    aliases = [p.detach().share_memory_() for p in model.parameters() if p is not model[3].weight]
    run = compiled(model)
    with torch.no_grad():
        for _ in range(2):
            close(run(x), model(x))
            wide.numpy()[...] *= 1.5
            for alias in aliases:
                alias.numpy()[...] -= 0.1
        close(run(x), model(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.usefixtures("always")
def test_what_is_not_finite_is_not_lost(value: float) -> None:
    model, x = stack(), torch.randn(1, 4, 9, 9)
    run = compiled(model)
    with torch.no_grad():
        close(run(x), model(x))
        x[0, 0, 4, 4] = value
        assert not model(x).isfinite().all() or value != value
        assert torch.allclose(run(x), model(x), equal_nan=True, atol=1e-5)


@pytest.mark.usefixtures("always")
def test_compiled_for_nan() -> None:
    model, x = stack(), torch.full((1, 4, 9, 9), float("nan"))
    run = compiled(model)
    with torch.no_grad():
        assert run(x).isnan().all()
    assert "infinities or NaN" in notes(run)


def test_results_are_compared() -> None:
    right = torch.tensor([1.0, float("inf"), float("nan")])
    assert fast._differs([right], [right.clone()]) == ""
    assert "differs by" in fast._differs([right], [right + torch.tensor([1.0, 0.0, 0.0])])
    for wrong in ([1.0, 1.0, float("nan")], [1.0, float("inf"), 0.0], [1.0, float("nan"), 1.0]):
        assert fast._differs([right], [torch.tensor(wrong)])
    assert "no finite" in fast._differs([right[2:]], [right[2:]])
    assert fast._differs([torch.tensor([3])], [torch.tensor([3])]) == ""
    assert "real numbers" in fast._differs([torch.tensor([3])], [torch.tensor([4])])


class Odd(nn.Module):
    """A convolution, and what ``kind`` says after it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.register_buffer("scale", torch.rand(8, 1, 1, 1) + 0.5)
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("variance", torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        if self.kind == "norm":
            return F.batch_norm(y, self.mean, self.variance, self.scale, self.mean)
        if self.kind == "expanded":
            one = y.amax().reshape(1).expand(1, 6)  # traced in other strides than it has
            wide = y.mean((2, 3), keepdim=True).expand(-1, -1, 6, 5)
            return wide, y[:, :, :1].expand_as(y), one
        if self.kind == "windows":
            return y.unfold(3, 3, 1)
        if self.kind == "copy here, view there":
            z = y.permute(0, 2, 3, 1).reshape(-1, 8)
            z += 1
            return z.sum(), y.sum()
        if self.kind == "two copies":
            return y.permute(0, 2, 3, 1).reshape(-1, 8), y.permute(0, 2, 3, 1).reshape(-1, 8)
        if self.kind == "one under two names":
            z = F.pad(y, (1, 0))
            return z, y, z.type_as(x)
        if self.kind == "computed":
            weight = self.conv.weight - self.conv.weight.mean((1, 2, 3), keepdim=True)
            return F.relu(F.conv2d(x, weight, self.conv.bias))
        z = y.flatten(1)
        z.mul_(2)
        return y  # which z is a view of in eager


def places(results: tuple[Tensor, ...]) -> list[int]:
    """Which of the results lies first in the memory of each."""
    at = [result.untyped_storage().data_ptr() for result in results]
    return [at.index(place) for place in at]


@pytest.mark.parametrize(
    "kind",
    [
        *("norm", "expanded", "windows", "copy here, view there", "two copies", "computed"),
        "one under two names",
    ],
)
@pytest.mark.usefixtures("always")
def test_shapes_strides_and_memory_as_in_eager(kind: str) -> None:
    model, x = Odd(kind).eval(), torch.randn(2, 4, 6, 5)
    run = compiled(model)
    with torch.no_grad():
        for _ in range(2):
            ours, eager = run(x), model(x)
            close(ours, eager)
            if isinstance(ours, tuple):
                assert places(ours) == places(eager)
    assert "packed convolutions" in notes(run)


@pytest.mark.usefixtures("always")
def test_written_through_a_view_that_is_returned() -> None:
    model, x = Odd("view").eval(), torch.randn(2, 4, 6, 5)
    run = compiled(model)
    with torch.no_grad():
        close(run(x), model(x), 0.0)
    assert "must run after" in notes(run)


@pytest.mark.usefixtures("always")
def test_empty_tensors_run_by_fx_nodes() -> None:
    model = nn.Conv2d(4, 8, 1).eval()
    run = compiled(model)
    with torch.no_grad():
        assert run(torch.randn(0, 4, 6, 6)).shape == (0, 8, 6, 6)
    assert "a tensor is empty" in notes(run) or not notes(run)


def test_tensors_on_another_device_run_by_fx_nodes() -> None:
    """Stands for a GPU: no time was measured there, and the note says what there is instead."""
    run = compiled(nn.Conv2d(4, 8, 1, device="meta").eval())
    with torch.no_grad():
        assert run(torch.rand(1, 4, 6, 6, device="meta")).device.type == "meta"
    assert "tensors are on meta, and inner auto measures on a CPU only" in notes(run)
    assert "inner='inductor' compiles the groups there" in notes(run)


def test_strips_on_threads_in_inference_mode() -> None:
    gm, inputs = traced(network("mobilenet_v2"), torch.randn(2, 3, 64, 64))
    steps = build_steps(gm)
    choices = cut_anywhere(steps, set(gm.graph.output_node().all_input_nodes), 2)
    with torch.no_grad():
        eager = gm.forward(*inputs)
        program = FastProgram(gm, steps, choices, 2)
        close(program(*inputs), tuple(eager))
    with torch.inference_mode():
        close(program(*inputs), tuple(eager))


@pytest.mark.usefixtures("always")
def test_training_runs_by_fx_nodes() -> None:
    model, x = network("resnet18"), torch.randn(2, 3, 64, 64)
    run = compiled(model)
    assert torch.equal(run(x), model(x))  # parameters need gradients
    run(x).sum().backward()
    assert "recorded for gradients" in notes(run)
    assert "packed" not in notes(run)
    with torch.no_grad():
        close(run(x), model(x))
    assert "packed" in notes(run)


@pytest.mark.usefixtures("always")
def test_inference_mode_and_bfloat16() -> None:
    model, x = network("mobilenet_v2"), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        close(compiled(model)(x), model(x))
    half = copy.deepcopy(model).bfloat16()
    run = compiled(half)
    with torch.no_grad():
        close(run(x.bfloat16()), half(x.bfloat16()), 0.05)


class Branch(nn.Module):
    """``kind`` says what the graph does that a fast program leaves alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "input":
            x.add_(1)
        y = self.conv(x)
        if self.kind == "shared":
            z = y * 2
            y.mul_(3)
            return z + y
        if self.kind == "buffer":
            self.calls.add_(1)
        if self.kind == "random":
            return y + torch.rand(1)
        if self.kind == "alias":
            z = F.relu(y)
            return z, z.flatten()  # type: ignore[return-value]
        return F.relu(y)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("input", "changes its inputs"),
        ("buffer", "changes its inputs"),
        ("random", "random"),
        ("shared", "must run after"),
        ("alias", "share memory"),
    ],
)
@pytest.mark.usefixtures("always")
def test_graphs_with_effects_run_by_fx_nodes(kind: str, why: str) -> None:
    model, eager = Branch(kind).eval(), Branch(kind).eval()
    eager.load_state_dict(model.state_dict())
    run = compiled(model)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        for _ in range(2):
            torch.manual_seed(1)
            ours = run(x.clone())
            torch.manual_seed(1)
            close(ours, eager(x.clone()), 0.0)
    assert torch.equal(model.calls, eager.calls)
    assert why in notes(run)


@pytest.mark.usefixtures("always")
def test_autocast_runs_by_fx_nodes() -> None:
    model = network("resnet18")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        run = compiled(model)
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(run(x), model(x))
        assert "autocast is on" in notes(run)


def test_a_slower_or_wrong_program_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network("resnet18"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        monkeypatch.setattr(fast, "_times", lambda *_: (0.002, 0.001))
        run = compiled(model)
        assert torch.equal(run(x), model(x))
        assert "the fast program took 2.0 ms against 1.0 ms" in notes(run)
        monkeypatch.setattr(fast, "_times", lambda *_: (0.001, 0.002))
        monkeypatch.setattr(FastProgram, "compute", lambda *_: (torch.zeros(1, 1000),))
        run = compiled(model)
        assert torch.equal(run(x), model(x))
        assert "differs by" in notes(run)


def test_layout_that_the_trace_promises() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = F.relu(self.conv(x))
            return y.view(1, 2, 4, 6, 6).transpose(1, 2).reshape(1, 8, 6, 6), y

    x = torch.randn(1, 4, 6, 6)
    for given_x in (x, x.contiguous(memory_format=torch.channels_last)):
        model = Viewed().eval()
        if not given_x.is_contiguous():
            return  # such a view is an error in eager as well
        gm, inputs = traced(model, given_x)
        with torch.no_grad():
            close(FastProgram(gm, build_steps(gm), [], 1)(*inputs), tuple(gm.forward(*inputs)))


def test_group_norm_far_from_zero_is_as_exact_as_eager() -> None:
    """Torch's of maps in channels last, as convolutions give them, is not: 0.1 off here."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8)).eval()
    gm, inputs = traced(model, torch.randn(1, 4, 12, 12))
    with torch.no_grad():
        model[0].bias.fill_(300)
        close(FastProgram(gm, build_steps(gm), [], 1)(*inputs), tuple(gm.forward(*inputs)))


def test_two_convolutions_that_are_added() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.a(x) + self.b(x))

    gm, inputs = traced(Twins().eval(), torch.randn(1, 4, 6, 6))
    steps = build_steps(gm)
    assert [step.conv is not None and step.conv.adds for step in steps] == [False, True]
    with torch.no_grad():
        close(FastProgram(gm, steps, [Choice(0, 2, 3)], 1)(*inputs), tuple(gm.forward(*inputs)))


@pytest.mark.parametrize(
    "after",
    [
        lambda y, x: torch.sub(x, y, out=y * 2),
        lambda y, x: torch.sigmoid(x, out=y),  # not an activation of the convolution
        lambda y, x: torch.add(y, x, out=torch.empty_like(x, dtype=torch.bfloat16)),
        lambda y, x: torch.sigmoid(y, out=torch.empty_like(x, dtype=torch.bfloat16)),
    ],
    ids=["by rows", "over the convolution", "added, of another type", "of another type"],
)
def test_where_a_result_goes_is_no_operand(after: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return after(self.conv(x), x)

    gm, inputs = traced(Told().eval(), torch.randn(1, 4, 6, 6))
    with torch.no_grad():
        ours = FastProgram(gm, build_steps(gm), [], 1)(*inputs)
        (right,) = gm.forward(*inputs)
    assert ours[0].dtype == right.dtype
    close(ours, (right,))


def test_in_place_on_a_view_is_left_alone() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y.view(1, 8, 36).add_(1.0)
            return y * 2

    gm, _ = traced(Aliased().eval(), torch.randn(1, 4, 6, 6))
    with pytest.raises(Unfit, match="must run after"):
        build_steps(gm)


def test_times_are_kept_and_choices_repeat(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_tuning, "_WORTH", 0)
    gm, _ = traced(network("mobilenet_v2"), torch.randn(1, 3, 96, 96))
    steps = build_steps(gm)
    returned = set(gm.graph.output_node().all_input_nodes)
    times = StepTimes(tmp_path)
    first = choose_strips(steps, returned, times, 1)
    times.save()
    again = StepTimes(tmp_path)
    assert again._seconds
    assert again._seconds == times._seconds
    assert choose_strips(steps, returned, again, 1) == first
    assert not again._fresh
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "text",
    [
        "{damaged", "[]", "null", "3", '{"a": null}', '{"a": "1"}', '{"a": [1]}', '{"a": true}',
        '{"a": NaN}', '{"a": -1.0}', '{"a": 1e999}', "[" * 10**5, b"\xff\xfe",
    ],
)  # fmt: skip
def test_damaged_times_are_one_warning(
    text: str | bytes, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_tuning, "_warned", set())
    file = tmp_path / f"machine-{fast_tuning._machine()}.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(UserWarning, match="measured anew"):
        times = StepTimes(tmp_path)
    assert times._seconds == StepTimes(tmp_path)._seconds == {}  # without a second warning


def test_times_that_cannot_be_written_are_one_warning(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_tuning, "_warned", set())
    (tmp_path / "file").touch()
    times = StepTimes(tmp_path / "file" / "folder")
    times._seconds, times._fresh = {"a": 1.0}, True
    with pytest.warns(UserWarning, match="cannot keep"):
        times.save()
    times.save()  # without a second warning


def test_strips_are_chosen_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, _ = traced(network("mobilenet_v2"), torch.randn(1, 3, 256, 256))
    steps = build_steps(gm)
    returned = set(gm.graph.output_node().all_input_nodes)
    assert choose_strips(steps, returned, StepTimes(None), 1) == []  # maps of 6 MB at most
    monkeypatch.setattr(fast_tuning, "_WORTH", 0)
    monkeypatch.setattr(StepTimes, "copy", lambda self, node, rows: 0.0)
    monkeypatch.setattr(StepTimes, "whole", lambda self, step: 1.0)
    monkeypatch.setattr(StepTimes, "rows", lambda self, step, rows, foot: 1e-4 * rows)
    found = choose_strips(steps, returned, StepTimes(None), 1)
    assert found
    assert all(choice.strips > 1 for choice in found)
    monkeypatch.setattr(StepTimes, "rows", lambda self, step, rows, foot: 1.0)
    assert choose_strips(steps, returned, StepTimes(None), 1) == []
    assert fast_tuning.block_bytes(steps[0].node, 2) == 2 * 32 * 128 * 4
