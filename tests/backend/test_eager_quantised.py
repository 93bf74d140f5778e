"""Models of torch's eager-mode quantisation are planned by their reference."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from texts import one_line
from torch import nn
from torch.ao import quantization

import torch_getfuse
from torch_getfuse.backend.capture.capture import capture_model
from torch_getfuse.backend.capture.eager_quantised import is_eager_quantised, reference_of
from torch_getfuse.errors import CaptureError
from torch_getfuse.models import import_torchvision

ENGINES = [
    name for name in ("fbgemm", "qnnpack") if name in torch.backends.quantized.supported_engines
]
pytestmark = pytest.mark.skipif(not ENGINES, reason="this build of torch runs no quantised kernels")


class Net(nn.Module):
    """A strided, a depthwise and a 1x1 convolution, a sum, a gate and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU())
        self.point, self.gate = nn.Conv2d(8, 8, 1), nn.Hardswish()
        self.sum = nn.quantized.FloatFunctional()
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.quant(x))
        x = self.sum.add(self.gate(self.point(self.deep(x))), x)
        return self.dequant(self.head(self.pool(x).flatten(1)))


def quantised() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    torch.backends.quantized.engine = ENGINES[0]
    x = torch.randn(4, 3, 16, 16)
    net = Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch will drop it; people have such models
        quantization.fuse_modules(net, [["first.0", "first.1"], ["deep.0", "deep.1"]], inplace=True)
        net.qconfig = quantization.get_default_qconfig(ENGINES[0])
        quantization.prepare(net, inplace=True)
        net(x)
        quantization.convert(net, inplace=True)
    return net, x


def test_the_reference_computes_the_same_to_a_step_of_quantisation() -> None:
    net, x = quantised()
    reference = reference_of(net)
    assert is_eager_quantised(net)
    assert not is_eager_quantised(reference)
    with torch.no_grad():
        got, expected = reference(x), net(x)
    assert (got - expected).abs().max() <= 2.01 * net.head.scale
    assert is_eager_quantised(net)  # the model itself is as it was


def test_widths_and_weights_are_those_that_are_stored() -> None:
    net, x = quantised()
    graph = capture_model(net, (x[:1],)).graph
    kinds = Counter(op.kind for op in graph)
    assert kinds["conv2d"] == 3
    assert kinds["linear"] == 1
    assert not [kind for kind in kinds if "quant" in kind]
    # Between pool and classifier nothing is quantised.
    wide = {name for name in graph.tensors if graph.width(name) != 1}
    assert wide <= {
        "point",
        "pool",
    }
    for op, module in (("first", net.first[0]), ("head", net.head)):
        (found,) = (o for o in graph if o.module.startswith(op) and o.weight_elements)
        weight, bias = module.weight(), module.bias()
        scales = 0
        if weight.qscheme() != torch.per_tensor_affine:
            scales = 16 * weight.shape[0]  # a double and a long for each channel
        assert graph.stored_bytes(found) == weight.numel() + 4 * bias.numel() + scales


def test_reports_and_plans_take_it_and_the_rest_says_why_not() -> None:
    net, x = quantised()
    report = torch_getfuse.report(net, x[:1], buffer="4KB")
    assert any(note.startswith("quantised: ") for note in report.sections[0].notes)
    plan = torch_getfuse.plan(net, (x[:1],), buffer="4KB", scheme="cascade")
    assert plan.verify().proof == "optimal"
    for call in (torch_getfuse.split, torch_getfuse.run_counted):
        with pytest.raises(CaptureError, match=r"eager-mode quantisation, .* price\(\) and sweep"):
            call(net, (x[:1],), plan)
    assert torch_getfuse.price(net, (x[:1],), plan).legal


@pytest.mark.needs_torch("observers")
def test_a_model_that_is_not_converted_yet_is_a_float_one() -> None:
    net, x = Net().eval(), torch.randn(1, 3, 16, 16)
    assert not is_eager_quantised(net)
    plan = torch_getfuse.plan(net, (x,), buffer="4KB")
    with torch.no_grad():
        assert torch.equal(torch_getfuse.split(net, (x,), plan)(x), net(x))


def test_dropout_of_a_model_in_eval_mode_does_nothing() -> None:
    net, x = quantised()
    net.gate = nn.Sequential(net.gate, torch.ao.nn.quantized.Dropout(0.5).eval())
    captured = capture_model(net, (x[:1],))
    assert not [op for op in captured.graph if op.kind == "dropout"]


def test_a_module_without_a_reference_is_named() -> None:
    net, x = quantised()
    net.gate = torch.ao.nn.quantized.LeakyReLU(1.0, 0)
    with pytest.raises(CaptureError, match=r"gate is a torch\.ao\.nn\.quantized.*\.LeakyReLU"):
        torch_getfuse.plan(net, (x[:1],))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "mobilenet_v3_large"])
def test_torchvisions_quantizable_networks(name: str) -> None:
    models = import_torchvision().models
    torch.backends.quantized.engine = ENGINES[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build = getattr(models.quantization, name)
        net = build(weights=None, quantize=True).eval()
        plain = getattr(models, name)(weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    graph = capture_model(net, (x,)).graph
    plain_kinds = Counter(op.kind for op in capture_model(plain, (x,)).graph)
    kinds = Counter(op.kind for op in graph)
    for kind in ("conv2d", "linear", "add", "hardswish"):
        assert kinds[kind] == plain_kinds[kind]
    assert sum(graph.width(name) == 1 for name in graph.tensors) > 0.85 * len(graph.tensors)


def test_the_report_of_a_compiled_one_says_that_dynamo_leaves_it_to_eager() -> None:
    net, x = quantised()
    compiled = torch.compile(net, backend="getfuse")
    assert torch.equal(compiled(x), net(x))
    told = one_line(torch_getfuse.report(compiled))
    assert "Net holds modules of torch's eager-mode quantisation" in told
    assert "no graph has been compiled" not in told
