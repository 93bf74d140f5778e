"""Quantised networks: folded calls, stored widths, stored weights, and eager's results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from texts import one_line
from torch import nn

import torch_getfuse
from torch_getfuse.backend.capture.capture import Capture, capture_exported, capture_model
from torch_getfuse.backend.capture.quantisation import quantisation_notes
from torch_getfuse.errors import PlanError
from torch_getfuse.ir import OpGraph, WindowKind
from torch_getfuse.models import import_torchvision
from torch_getfuse.options import Options
from torch_getfuse.planner import plan_graph

quant_api = pytest.importorskip("torchao.quantization")
pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
x86_inductor = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
xnnpack = pytest.importorskip("torchao.testing.pt2e._xnnpack_quantizer")

IMAGE = (1, 3, 32, 32)


class Small(nn.Module):
    """What MobileNets are made of: strided, depthwise and 1x1 convolutions, a sum, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.b1 = nn.BatchNorm2d(16)
        self.c2 = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False)
        self.b2 = nn.BatchNorm2d(16)
        self.c3 = nn.Conv2d(16, 16, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.b1(self.c1(x)), inplace=True)
        y = F.hardtanh(self.b2(self.c2(x)), 0.0, 6.0, inplace=True)
        y = self.c3(y) + x
        return self.fc(torch.flatten(self.pool(y), 1))


def _pt2e(quantizer: Any) -> nn.Module:
    x = torch.randn(IMAGE)
    prepared = pt2e.prepare_pt2e(torch.export.export(Small().eval(), (x,)).module(), quantizer)
    prepared(x)
    return pt2e.convert_pt2e(prepared)


def _x86() -> nn.Module:
    config = x86_inductor.get_default_x86_inductor_quantization_config()
    return _pt2e(x86_inductor.X86InductorQuantizer().set_global(config))


def _xnnpack(*, dynamic: bool = False) -> nn.Module:
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    return _pt2e(xnnpack.XNNPACKQuantizer().set_global(config))


def _linears(config: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    quant_api.quantize_(model, config)
    return model


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.randint(-128, 127, (8, 3, 3, 3), dtype=torch.int8))
        self.register_buffer("s", torch.rand(8, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(F.conv2d(x, self.w.to(x.dtype) * self.s))


FORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "x86": (_x86, IMAGE),
    "xnnpack": (_xnnpack, IMAGE),
    "xnnpack dynamic": (lambda: _xnnpack(dynamic=True), IMAGE),
    "int8 weights": (lambda: _linears(quant_api.Int8WeightOnlyConfig()), (4, 64)),
    "int8 dynamic": (
        lambda: _linears(quant_api.Int8DynamicActivationInt8WeightConfig()),
        (4, 64),
    ),
    "by hand": (ByHand, IMAGE),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _made(form: str) -> tuple[nn.Module, torch.Tensor]:
    build, shape = FORMS[form]
    return build(), torch.randn(shape)


def _bytes(tensor: Any) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return int(tensor.numel() * tensor.element_size())


def _read_tensors(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes of the parameters and buffers that the model reads, by the calls that read them."""
    program = torch.export.export(model, (x,))
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return sum(
        _bytes(program.state_dict[names[node.name]])
        for node in program.graph.find_nodes(op="placeholder")
        if node.name in names and node.users
    )


@pytest.mark.parametrize("form", [*FORMS])
def test_weights_count_as_stored(form: str) -> None:
    model, x = _made(form)
    graph = capture_model(model, (x,)).graph
    counted = sum(graph.stored_bytes(op) for op in graph)
    if form.startswith("int8"):
        assert counted == sum(map(_bytes, model.parameters()))
    else:
        assert counted == _read_tensors(model, x)


@pytest.mark.parametrize("form", [*FORMS])
@pytest.mark.parametrize("inner", ["auto", "eager"])
def test_results_are_eagers(form: str, inner: str) -> None:
    model, x = _made(form)
    if form == "by hand" and inner == "auto":
        pytest.skip("its convolution is one of floats, which auto packs: equal to rounding")
    options = {"inner": inner, "cache": False, "buffer": "8KB"}
    with torch.no_grad():
        compiled = torch.compile(model, backend="getfuse", options=options)
        assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("form", ["x86", "xnnpack", "xnnpack dynamic", "by hand"])
def test_both_traces_give_one_graph(form: str) -> None:
    model, x = _made(form)
    traced = capture_model(model, (x,)).graph
    exported = capture_exported(torch.export.export(model, (x,))).graph
    assert traced.fingerprint == exported.fingerprint
    assert [traced.width(op.writes) for op in traced] == [
        exported.width(op.writes) for op in exported
    ]


@pytest.mark.parametrize("form", ["int8 weights", "int8 dynamic"])
def test_exported_linear_is_one_operator(form: str) -> None:
    model, x = _made(form)
    exported = capture_exported(torch.export.export(model, (x,))).graph
    assert [(op.name, op.kind) for op in exported] == [
        ("0", "linear"),
        ("1", "relu"),
        ("2", "linear"),
    ]
    # An export leaves out the zero points of a symmetric quantisation: nothing reads them.
    for op, layer in zip((exported.ops[0], exported.ops[2]), (model[0], model[2]), strict=True):
        weight = layer.weight
        assert op.weight_bytes == sum(map(_bytes, (weight.qdata, weight.scale, layer.bias)))


class Shifted(nn.Module):
    """What torchao records of a dynamic linear layer where a processor wants unsigned integers.

    With a product of another type, for not every torch multiplies unsigned ones.
    """

    def __init__(self, zeros: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("weight", torch.randint(-128, 128, (24, 32), dtype=torch.int8))
        self.register_buffer("zeros", torch.randint(-9, 9, (24,), dtype=torch.int32))
        self.bias = nn.Parameter(torch.randn(24))
        self.scale = nn.Parameter(torch.rand(24))
        self.other = zeros

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        integers = (x.relu() * 20).round().clamp(-128, 127).to(torch.int8)
        shifted = (integers.to(torch.int32) + 128).to(torch.uint8).to(torch.int32)
        columns = self.weight.t()
        out = torch.matmul(shifted, columns.to(torch.int32))
        out -= self.zeros if self.other else columns.sum(0, keepdim=True) * 128
        return out.to(torch.float32) * self.scale + self.bias


@pytest.mark.parametrize("zeros", [False, True])
def test_shifted_integers_are_those_before(zeros: bool) -> None:
    model, x = Shifted(zeros).eval(), torch.randn(4, 32)
    program = torch.export.export(model, (x,))
    graph = capture_exported(program).graph
    assert graph.ops[-1].kind == "linear"
    assert not any("add" in op.kind for op in graph)
    # The sum of the columns is made of the weight; zero points are numbers of their own.
    assert graph.ops[-1].weight_elements == 24 * 32 + 24 + 24 + 24 * zeros
    plan = torch_getfuse.plan(program, buffer="16KB")
    assert torch.equal(torch_getfuse.split(program, (x,), plan)(x), model(x))


def test_xnnpack_plans_as_float_at_one_byte() -> None:
    model, x = _made("xnnpack")
    torch.manual_seed(0)
    for scheme in ("lbdf", "brr", "cascade"):
        options: dict[str, Any] = {"buffer": "16KB", "scheme": scheme}
        plan = torch_getfuse.plan(model, (x,), **options)
        plain = torch_getfuse.plan(
            Small().eval(), (x,), activation_bytes=1, weight_bytes=1, **options
        )
        assert [group.ops for group in plan.groups] == [group.ops for group in plain.groups]
        assert all(plan.graph.width(name) == 1 for name in plan.graph.tensors)
        moved = [
            sum(group.dram_read_bytes + group.dram_write_bytes for group in p.groups)
            for p in (plan, plain)
        ]
        assert moved[0] == moved[1]


def _calls(capture: Capture, op: str) -> list[str]:
    return [str(node.target) for node in capture.nodes[op]]


def test_dequantize_runs_with_its_reader() -> None:
    model, x = _made("xnnpack")
    capture = capture_model(model, (x,))
    for op in ("c2", "c3", "add"):
        assert any("dequantize_per_tensor" in call for call in _calls(capture, op))
        assert any(".quantize_per_tensor" in call for call in _calls(capture, op))
    (relu,) = (op for op in capture.graph if op.name == "relu")
    assert not any("dequantize" in call for call in _calls(capture, relu.name))


class _BothReaders(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.quantized_decomposed
        y = F.avg_pool2d(x, 2)
        q = ops.quantize_per_tensor(y, 0.1, 0, -128, 127, torch.int8)
        z = F.max_pool2d(ops.dequantize_per_tensor(q, 0.1, 0, -128, 127, torch.int8), 2)
        return z + F.max_pool2d(y, 2)


def test_tensor_that_is_read_as_float_too_is_stored_as_float() -> None:
    graph = capture_model(_BothReaders(), (torch.randn(1, 4, 16, 16),)).graph
    (pool,) = (op for op in graph if op.kind == "avg_pool2d")
    assert graph.width(pool.writes) == 4
    assert len(graph) == 4


class _WrittenLater(nn.Module):
    """What is quantised is changed in place before the integers are used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.quantized_decomposed
        y = F.avg_pool2d(x, 2)
        q = ops.quantize_per_tensor(y, 0.1, 0, -128, 127, torch.int8)
        y.add_(1.0)
        return y + ops.dequantize_per_tensor(q, 0.1, 0, -128, 127, torch.int8)


@pytest.mark.parametrize("own", [True, False])
def test_scales_chosen_from_another_tensor_wait_for_it(own: bool) -> None:
    space = torch.ops.quantized_decomposed

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            z = y if own else self.c(x)
            scale, zero = space.choose_qparams.tensor(y, -128, 127, 1e-5, torch.int8)
            how = (scale, zero, -128, 127, torch.int8)
            q = space.quantize_per_tensor.tensor(z, *how)
            return self.b(space.dequantize_per_tensor.tensor(q, *how))

    graph = capture_model(Net().eval(), (torch.randn(1, 3, 8, 8),)).graph
    reads = {op.kind: [read.tensor for read in op.reads] for op in graph}
    assert [op.module for op in graph if op.kind == "conv2d"] == (
        ["a", "b"] if own else ["a", "c", "b"]
    )
    assert reads.get("quantize") == (None if own else ["c", "a"])


@pytest.mark.parametrize(("scale", "width"), [(0.1, 1), (0.2, 4)])
def test_two_quantizations_are_one_tensor_only_if_they_are_alike(scale: float, width: int) -> None:
    space = torch.ops.quantized_decomposed

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left, self.right = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = self.first(x)
            found = []
            for conv, by in ((self.left, 0.1), (self.right, scale)):
                how = (by, 0, -128, 127, torch.int8)
                q = space.quantize_per_tensor.default(y, *how)
                found.append(conv(space.dequantize_per_tensor.default(q, *how)))
            return tuple(found)

    graph = capture_model(Twice().eval(), (torch.randn(1, 3, 8, 8),)).graph
    assert graph.width("first") == width


def test_quantize_before_a_write_is_an_operator() -> None:
    model, x = _WrittenLater(), torch.randn(1, 4, 16, 16)
    graph = capture_model(model, (x,)).graph
    assert [op.kind for op in graph].count("quantize") == 1
    compiled = torch.compile(model, backend="getfuse", options={"buffer": "1KB", "cache": False})
    assert torch.equal(compiled(x), model(x))


class _Dynamic(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.quantized_decomposed
        y = F.avg_pool2d(x, 2)
        scale, zero = ops.choose_qparams.tensor(y, -128, 127, 1e-5, torch.int8)
        q = ops.quantize_per_tensor.tensor(y, scale, zero, -128, 127, torch.int8)
        d = ops.dequantize_per_tensor.tensor(q, scale, zero, -128, 127, torch.int8)
        return F.max_pool2d(d, 2)


def test_scales_from_values_need_the_whole_tensor() -> None:
    capture = capture_model(_Dynamic(), (torch.randn(1, 4, 16, 16),))
    pool, last = capture.graph.ops
    assert (pool.kind, last.kind) == ("avg_pool2d", "max_pool2d")
    assert str(last.reads[0].window) == "whole"
    assert capture.graph.width(pool.writes) == 4
    notes = " ".join(quantisation_notes(capture.graph_module, capture.graph, capture.views))
    assert "1 times scales are chosen" in notes


def test_report_says_what_is_quantised() -> None:
    model, x = _made("xnnpack")
    text = one_line(torch_getfuse.report(model, x))
    assert "quantize and" in text
    assert "of 8 bits" in text


def test_rows_refuse_by_name() -> None:
    model, x = _made("xnnpack")
    plan = torch_getfuse.plan(model, (x,), buffer="256KB")
    with torch.no_grad():
        result, ledger = torch_getfuse.run_counted(model, (x,), plan)
        assert torch.equal(result, model(x))
    assert "no row kernel to" in str(ledger.to_dict())


def test_mobilenet_plans_as_float_at_one_byte_but_for_scales() -> None:
    x = torch.randn(1, 3, 224, 224)
    build = import_torchvision().models.mobilenet_v2
    plain = capture_model(build(weights=None).eval(), (x,)).graph
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    prepared = pt2e.prepare_pt2e(
        torch.export.export(build(weights=None).eval(), (x,)).module(),
        xnnpack.XNNPACKQuantizer().set_global(config),
    )
    prepared(x)
    graph = capture_model(pt2e.convert_pt2e(prepared), (x,)).graph
    assert [op.name for op in graph] == [op.name for op in plain]
    # The same network with the weights of the float one, a byte each: no scales and zero points.
    ops = tuple(
        replace(op, weight_elements=twin.weight_elements, weight_bytes=twin.weight_elements)
        for op, twin in zip(graph, plain, strict=True)
    )
    for scheme in ("lbdf", "brr", "cascade"):
        found = plan_graph(replace(graph, ops=ops), Options(buffer="256KB", scheme=scheme))
        wanted = plan_graph(
            plain, Options(buffer="256KB", scheme=scheme, activation_bytes=1, weight_bytes=1)
        )
        assert [group.ops for group in found.groups] == [group.ops for group in wanted.groups]
        assert found.dram_bytes == wanted.dram_bytes


class Holds(nn.Module):
    """A quantised network inside of another one."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x) * 2


def test_a_module_that_holds_a_pt2e_model_is_split_by_its_plan() -> None:
    model, x = Holds(_xnnpack()), torch.randn(IMAGE)
    plan = torch_getfuse.plan(model, (x,), buffer="4KB")
    with torch.no_grad():
        split = torch_getfuse.split(model, (x,), plan)
        assert torch.equal(split(x), model(x))
    assert len([name for name, _ in split.named_children() if "fusion_group" in name]) > 1
    with pytest.raises(PlanError, match="belongs to another graph"):
        torch_getfuse.split(Holds(nn.Conv2d(3, 4, 3)), (x,), plan)


def test_shared_dequantizes_stand_in_the_groups_of_their_readers() -> None:
    class Shared(nn.Module):
        """Each addition shares a dequantized tensor, before others are dequantized."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.c, self.l = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            z = F.max_pool2d(F.relu(self.a(x)), 2)
            w = self.b(z) + z
            v = torch.cat([self.c(w), w], 1)[:, 4:12]
            return self.l(v.mean((2, 3)).view(-1, 8)), w

    x = torch.randn(1, 3, 16, 16)
    config = x86_inductor.get_default_x86_inductor_quantization_config(is_dynamic=True)
    quantizer = x86_inductor.X86InductorQuantizer().set_global(config)
    prepared = pt2e.prepare_pt2e(torch.export.export(Shared().eval(), (x,)).module(), quantizer)
    prepared(x)
    model = pt2e.convert_pt2e(prepared)
    for buffer in ("1KB", "3KB", "1MB"):
        plan = torch_getfuse.plan(model, (x,), buffer=buffer)
        with torch.no_grad():
            for got, expected in zip(
                torch_getfuse.split(model, (x,), plan)(x), model(x), strict=True
            ):
                assert torch.equal(got, expected)


def test_a_model_of_the_same_structure_but_other_names_is_not_split() -> None:
    class Two(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            self.names = names
            for name in names:
                setattr(self, name, nn.Conv2d(3, 3, 3, padding=1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for name in self.names:
                x = getattr(self, name)(x)
            return x

    x = torch.randn(IMAGE)
    plan = torch_getfuse.plan(Two("a", "b"), (x,))
    torch_getfuse.split(Two("a", "b"), (x,), plan)
    for names in (("u", "v"), ("b", "a")):
        with pytest.raises(PlanError, match="belongs to another graph"):
            torch_getfuse.split(Two(*names), (x,), plan)


def test_a_result_returned_dequantized_is_told() -> None:
    class Returned(nn.Module):
        def __init__(self, integers: bool) -> None:
            super().__init__()
            self.conv, self.integers = nn.Conv2d(3, 4, 3), integers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            space = torch.ops.quantized_decomposed
            how = (0.1, 0, -128, 127, torch.int8)
            y = space.quantize_per_tensor.default(self.conv(x), *how)
            if not self.integers:
                y = space.dequantize_per_tensor.default(y, *how)
            return y.flatten(1)

    x = torch.randn(IMAGE)
    told = "conv: returned dequantized, counted as the integers"
    report = torch_getfuse.report(Returned(integers=False), x)
    assert told in one_line(report)
    assert report.sections[0].plan.graph.tensor_bytes["conv"] == 4 * 30 * 30
    assert told not in one_line(torch_getfuse.report(Returned(integers=True), x))

    class Both(Returned):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), self.conv(x)

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.conv(x)
            how = (0.1, 0, -128, 127, torch.int8)
            q = torch.ops.quantized_decomposed.quantize_per_tensor.default(y, *how)
            return torch.ops.quantized_decomposed.dequantize_per_tensor.default(q, *how), y

    assert told in one_line(torch_getfuse.report(Both(integers=False), x))
    assert told not in one_line(torch_getfuse.report(Same(), x)), "stored as it was"


def _graph(function: Callable[[nn.Module, torch.Tensor], Any]) -> OpGraph:
    """The operator graph of a function of two convolutions and an input of six rows."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x: torch.Tensor) -> Any:
            return function(self, x)

    return capture_model(Net().eval(), (torch.randn(1, 4, 6, 4),)).graph


SPACE = torch.ops.quantized_decomposed
RANGE = (-128, 127, torch.int8)


def test_channels_of_other_axes_are_other_integers() -> None:
    def both(net: Any, x: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        how = (torch.full((4,), 0.1), torch.zeros(4, dtype=torch.int64), 1, *RANGE)
        y = net.a(x)
        one = SPACE.quantize_per_channel.default(y, *how)
        other = SPACE.quantize_per_channel.default(change(y), *how)
        return one, other

    same = _graph(lambda net, x: both(net, x, lambda y: y))
    assert same.width("a") == 1
    turned = _graph(lambda net, x: both(net, x, lambda y: y.transpose(1, 3)))
    assert turned.width("a") == 4


def test_a_scale_is_waited_for_by_whoever_uses_it() -> None:
    def scaled(net: Any, x: torch.Tensor) -> torch.Tensor:
        y = net.a(x)
        scale, _ = SPACE.choose_qparams.tensor(y, -128, 127, 1e-5, torch.int8)
        return F.relu(y) * scale

    graph = _graph(scaled)
    (multiplied,) = (op for op in graph if op.kind == "mul")
    windows = {read.tensor: read.window.kind for read in multiplied.reads}
    assert windows == {"relu": WindowKind.IDENTITY, "a": WindowKind.WHOLE}


def test_scales_of_rows_that_lie_across_the_rows_wait_for_all_of_them() -> None:
    def dynamic(net: Any, x: torch.Tensor, turned: bool) -> torch.Tensor:
        y = net.a(x)
        y = y.transpose(2, 3) if turned else y.permute(0, 2, 3, 1)
        scale, zero = SPACE.choose_qparams_per_token.default(y, torch.int8)
        y = SPACE.quantize_per_token.default(y, scale, zero, *RANGE)
        y = SPACE.dequantize_per_token.default(y, scale, zero, *RANGE, torch.float32)
        return net.b(y.transpose(2, 3) if turned else y.permute(0, 3, 1, 2))

    for turned in (False, True):
        (read,) = _graph(lambda net, x, of=turned: dynamic(net, x, of)).ops[-1].reads
        assert (read.window.kind is WindowKind.WHOLE) == turned


def test_scales_that_are_returned_are_computed() -> None:
    def chosen(net: Any, x: torch.Tensor) -> Any:
        scale, zero = SPACE.choose_qparams.tensor(net.a(x), -128, 127, 1e-5, torch.int8)
        return net.b(x), scale, zero

    kinds = [op.kind for op in _graph(chosen)]
    assert sorted(kinds) == ["choose_qparams", "conv2d", "conv2d"]
