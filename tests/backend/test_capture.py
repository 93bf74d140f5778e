"""Capture of whole models: one graph however it was traced, all weights, all shapes."""

from __future__ import annotations

import functools
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from tests.networks import SIZES
from torch_getfuse.backend.capture.capture import (
    Capture,
    capture_exported,
    capture_fx,
    capture_model,
)
from torch_getfuse.backend.fx_nodes.values import module_path
from torch_getfuse.backend.rules.rule import Run
from torch_getfuse.backend.torch_private import is_dynamo_weight
from torch_getfuse.errors import CaptureError
from torch_getfuse.ir import Window, WindowKind
from torch_getfuse.models import import_torchvision

OTHERS = (
    *("convnext_tiny", "densenet121", "googlenet", "mnasnet1_0", "regnet_y_400mf"),
    *("swin_t", "vit_b_16", "shufflenet_v2_x1_0"),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def _network(name: str) -> nn.Module:
    """In eval, on the meta device: nothing is computed, so nothing need be stored."""
    torchvision = import_torchvision()
    more: dict[str, Any] = {"weights_backbone": None} if "deeplab" in name else {}
    if name == "googlenet":
        more["init_weights"] = False
    if name.startswith("regnet"):
        # Its constructor computes with tensors, which the meta device cannot.
        model = torchvision.models.get_model(name, weights=None, **more)
        return model.to("meta").eval()  # type: ignore[no-any-return]
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **more)
    return model.eval()  # type: ignore[no-any-return]


def _image(side: int, batch: int = 2) -> torch.Tensor:
    return torch.empty(batch, 3, side, side, device="meta")


def _backend_capture(model: nn.Module, *inputs: object, **options: Any) -> Capture:
    """What a torch.compile backend sees of a model, captured there."""
    found: list[Capture] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        found.append(capture_fx(gm, example_inputs))
        return gm.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True, **options)
    with torch.no_grad():
        compiled(*inputs)
    assert len(found) == 1
    return found[0]


def _same(one: Capture, other: Capture) -> None:
    assert one.graph.to_dict() == other.graph.to_dict()
    assert one.graph.fingerprint == other.graph.fingerprint


def _expected_weights(model: nn.Module) -> int:
    """Parameters with every batch norm folded: gamma and beta become the bias of its convolution.

    True for the networks of the paper, each of whose batch norms follows a convolution.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    total = sum(p.numel() for p in model.parameters())
    assert len(norms) <= len(convolutions)
    return total - sum(2 * m.num_features - m.num_features for m in norms)


@pytest.mark.parametrize("name", SIZES)
def test_paper_network(name: str) -> None:
    model, image = _network(name), _image(SIZES[name])
    captured = capture_model(model, (image,))
    graph = captured.graph
    graph.verify()
    assert graph.weight_elements == _expected_weights(model)
    assert not captured.unsupported
    assert [op.name for op in graph if op.reason] == []
    assert (graph.activation_bytes, graph.weight_bytes) == (4, 4)
    _same(_backend_capture(model, image), captured)
    _same(capture_exported(torch.export.export(model, (image,))), captured)
    for op in graph:
        value = captured.nodes[op.name][0].meta["example_value"]
        assert graph.tensors[op.writes].shape == (1, *value.shape[1:])


def test_every_call_belongs_to_one_operator() -> None:
    captured = capture_model(_network("mobilenet_v2"), (_image(64),))
    listed = [node for nodes in captured.nodes.values() for node in nodes]
    calls = [n for n in captured.graph_module.graph.nodes if n.op.startswith("call")]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(calls)
    kinds = [str(getattr(n.target, "__name__", n.target)) for n in captured.nodes["features.0.0"]]
    assert kinds == ["conv2d", "batch_norm"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks(name: str) -> None:
    model, image = _network(name), _image(224)
    captured = capture_model(model, (image,))
    _same(capture_exported(torch.export.export(model, (image,))), captured)
    _same(capture_model(model, (_image(224, batch=1),)), captured)
    assert set(captured.unsupported) <= {"roll"}


def test_names_are_module_paths() -> None:
    names = [op.name for op in capture_model(_network("resnet18"), (_image(64),)).graph]
    assert names[:7] == [
        "conv1",
        "relu",
        "maxpool",
        "layer1.0.conv1",
        "layer1.0.relu",
        "layer1.0.conv2",
        "layer1.0.add",
    ]
    assert names[7] == "layer1.0.relu_1"
    assert names[-2:] == ["avgpool", "fc"]


def test_channel_shuffle_keeps_identity_windows() -> None:
    graph = capture_model(_network("shufflenet_v2_x1_0"), (_image(64),)).graph
    windows = {read.window.kind for op in graph for read in op.reads}
    assert windows == {WindowKind.IDENTITY, WindowKind.SLIDING, WindowKind.REDUCE}


def test_channels_last_blocks_keep_identity_windows() -> None:
    graph = capture_model(_network("convnext_tiny"), (_image(64),)).graph
    norm = graph.ops[graph.index["features.1.0.block.2"]]
    assert norm.kind == "layer_norm"
    assert norm.reads[0].window.kind is WindowKind.IDENTITY
    assert graph.tensors[norm.writes].stream_axis == 1
    assert all(r.window.kind is not WindowKind.WHOLE for op in graph for r in op.reads)


def test_batch_does_not_matter() -> None:
    model = _network("mobilenet_v3_small")
    one, eight = (capture_model(model, (_image(96, batch=b),)) for b in (1, 8))
    _same(one, eight)


# -- small models ------------------------------------------------------------------------------


def _all_ways(model: nn.Module, *inputs: Any) -> Capture:
    captured = capture_model(model, inputs)
    _same(_backend_capture(model, *inputs), captured)
    _same(capture_exported(torch.export.export(model, inputs)), captured)
    return captured


class _Two(nn.Module):
    """Two inputs, nested outputs, one tensor returned twice, one input not used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleDict({"a": nn.ReLU(), "b": nn.Conv2d(4, 4, 1)})

    def forward(self, unused: Any, y: Any, x: Any) -> dict[str, Any]:
        z = self.blocks["b"](self.blocks["a"](self.conv(x)))
        pooled = z.mean((2, 3))
        return {"sum": z + y, "list": [pooled, z], "again": (z, pooled.unsqueeze(1))}


def test_two_inputs_and_nested_outputs() -> None:
    inputs = (torch.randn(2, 7), torch.randn(2, 4, 6, 6), torch.randn(2, 3, 6, 6))
    graph = _all_ways(_Two().eval(), *inputs).graph
    assert [op.name for op in graph] == ["conv", "blocks.a", "blocks.b", "mean", "add"]
    assert {name: graph.tensors[name].shape for name in graph.inputs} == {
        "input": (1, 3, 6, 6),
        "input_1": (1, 4, 6, 6),
    }
    assert graph.outputs == ("blocks.b", "mean", "add")


def test_in_place_operators_make_new_tensors() -> None:
    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a = x * 2
        b = a.view(a.shape[0], -1)  # an alias, which sees what follows
        a.add_(y)
        a.relu_()
        return b + b.sigmoid()

    graph = _all_ways(Run(run), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)).graph
    assert [op.name for op in graph] == ["mul", "add", "relu", "sigmoid", "add_1"]
    assert [r.tensor for r in graph.ops[2].reads] == ["add"]
    assert [r.tensor for r in graph.ops[3].reads] == ["relu"]
    assert [r.tensor for r in graph.ops[4].reads] == ["relu", "sigmoid"]


def test_in_place_on_a_part_reads_everything() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        a = x * 2
        a[:, :1].relu_()
        a[:, 1:] += x[:, :2]
        return a - 1

    graph = _all_ways(Run(run), torch.randn(2, 3, 4, 4)).graph
    assert [op.kind for op in graph] == ["mul", "relu", "add", "sub"]
    for op, reads in ((graph.ops[1], ["mul"]), (graph.ops[2], ["relu", "input"])):
        assert [(r.tensor, r.window) for r in op.reads] == [(n, Window.whole()) for n in reads]
        assert graph.tensors[op.writes].shape == (1, 3, 4, 4)
        assert "writes into a part of a tensor in place" in op.reason


def test_a_constant_filled_with_feature_maps_becomes_one() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape[0], 6, 4, 4)
        out[:, :3] = x.relu()
        return out * 2

    graph = capture_model(Run(run), (torch.randn(2, 3, 4, 4),)).graph
    assert [op.kind for op in graph] == ["relu", "copy", "mul"]
    assert graph.ops[2].reads[0].tensor == "copy"


def test_one_dimensional_networks_stream_over_their_length() -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2)
    ).eval()
    graph = _all_ways(model, torch.randn(2, 3, 32)).graph
    assert [op.name for op in graph] == ["0", "2", "3"]
    assert {t.stream_axis for t in graph.tensors.values()} == {2}
    assert graph.tensors["3"].rows == 16
    assert graph.ops[0].weight_elements == 3 * 8 * 5 + 8


def test_batch_norm_folds_only_where_it_may() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1, bias=False)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Any) -> Any:
            y = self.conv(x)
            return self.norm(y) + y

    image = torch.randn(2, 3, 5, 5)
    shared = _all_ways(Net().eval(), image).graph
    assert [(op.kind, op.weight_elements) for op in shared] == [
        ("conv2d", 12),
        ("batch_norm", 8),
        ("add", 0),
    ]
    training = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    graph = capture_model(training, (image,)).graph
    assert [op.kind for op in graph] == ["conv2d", "batch_norm"]
    assert graph.ops[1].reads[0].window.kind is WindowKind.WHOLE
    assert training.training
    assert int(training[1].num_batches_tracked) == 0  # type: ignore[arg-type]


def test_weights_are_counted_where_they_are_used() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 8))
            self.scale = nn.Parameter(torch.ones(8))
            self.raw = nn.Parameter(torch.ones(6, 3, 1, 1))
            self.register_buffer("places", torch.arange(8))
            self.constant = torch.ones(8)

        def forward(self, x: Any) -> Any:
            std, mean = torch.std_mean(self.raw, (1, 2, 3), keepdim=True, correction=0)
            x = F.conv2d(x, (self.raw - mean) / (std + 1))
            x = x.flatten(2)[:, :, :8] * self.scale * self.constant + self.places
            return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)

    graph = _all_ways(Net().eval(), torch.randn(2, 3, 4, 4)).graph
    assert [(op.kind, op.weight_elements) for op in graph] == [
        ("conv2d", 18),
        ("mul", 8),
        ("mul", 8),
        ("add", 8),
        ("cat", 8),
    ]


def test_dead_operators_and_unused_inputs_are_dropped() -> None:
    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        (y * 3).relu_()
        x.size()
        return x + 1

    graph = capture_model(Run(run), (torch.randn(2, 3), torch.randn(2, 3))).graph
    assert [op.name for op in graph] == ["add"]
    assert graph.inputs == ("input",)


def test_an_input_that_is_returned_is_no_output() -> None:
    # Dynamo does not record that it is returned, so no trace may say so.
    def run(x: torch.Tensor) -> Any:
        y = x.relu()
        return x, y, y.view(-1)

    graph = _all_ways(Run(run), torch.randn(2, 3, 4, 4)).graph
    assert (graph.inputs, graph.outputs) == (("input",), ("relu",))


@pytest.mark.needs_torch("attention")
def test_composites_are_taken_apart_in_a_copy() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Any) -> Any:
            return self.attention(x, x, x)[0]

    captured = _all_ways(Net().eval(), torch.randn(2, 5, 8))
    assert [op.kind for op in captured.graph if op.kind == "linear"] == ["linear", "linear"]
    captured.graph_module.graph.lint()


def test_dynamic_shapes_are_captured_by_their_hints() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip
    image = torch.randn(4, 3, 20, 24)
    dynamic = _backend_capture(model, image, dynamic=True)
    _same(capture_model(model, (image,)), dynamic)


def test_capture_inside_another_module() -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Any) -> Any:
            return self.inner(x).tanh()

    outer = Outer(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())).eval()
    image = torch.randn(2, 3, 4, 4)
    graph = _all_ways(outer, image).graph
    assert [op.name for op in graph] == ["inner.0", "inner.1", "tanh"]
    again = capture_model(torch.compile(outer), (image,))  # type: ignore[arg-type]
    assert again.graph == graph


# -- Dynamo ------------------------------------------------------------------------------------


def test_an_input_for_all_samples_that_is_read_through_a_view_of_itself() -> None:
    """Exported, ``flatten`` of a flat input stands for it: the product reads that."""

    class Net(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return y.flatten()[:1] * 2, x * y

    inputs = torch.randn(2, 4, 6, 6), torch.randn(6)
    exported = capture_exported(torch.export.export(Net(), inputs)).graph
    assert exported.fingerprint == capture_model(Net(), inputs).graph.fingerprint
    assert (6,) in [exported.tensors[name].shape for name in exported.inputs]


def test_graph_breaks_are_an_error_that_counts() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + 1
            torch._dynamo.graph_break()
            return x.relu()

    with pytest.raises(CaptureError, match=r"Dynamo traces Broken not as one graph but as 2: "):
        capture_model(Broken().eval(), (torch.randn(2, 3),))


def test_a_model_without_tensors_is_an_error() -> None:
    with pytest.raises(CaptureError, match="no tensor"):
        capture_model(Run(lambda x: 3), (torch.randn(2),))


def test_capture_leaves_compiled_code_alone() -> None:
    compiles = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        compiles.append(gm)
        return gm.forward

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    compiled = torch.compile(model, backend=backend)
    image = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        compiled(image)
        for batch in range(1, 12):  # more than Dynamo's limit of recompiles
            capture_model(model, (torch.randn(batch, 3, 4, 4),))
        compiled(image)
    assert len(compiles) == 1


_CALLS = """
import ctypes

import torch
from torch import nn

from torch_getfuse.backend.capture.capture import capture_model

python = ctypes.pythonapi
python.PyInterpreterState_Get.restype = ctypes.c_void_p
python._PyInterpreterState_GetEvalFrameFunc.argtypes = [ctypes.c_void_p]
python._PyInterpreterState_GetEvalFrameFunc.restype = ctypes.c_void_p

def evaluates():
    return python._PyInterpreterState_GetEvalFrameFunc(python.PyInterpreterState_Get())

model, image = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval(), torch.randn(2, 3, 4, 4)
alone = evaluates()
torch.compile(model, backend="eager")(image)
assert evaluates() == alone
capture_model(model, (image,))
assert evaluates() == alone
"""


def test_capture_leaves_calls_of_python_functions_as_fast_as_they_were() -> None:
    """Dynamo evaluates no frame after it, as it would if something had left it by an exception."""
    subprocess.run([sys.executable, "-c", _CALLS], check=True, timeout=300)


def test_capture_draws_nothing() -> None:
    class Drawing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(x + random.randint(0, 5)) * torch.rand(1)

    image = torch.randn(1, 3, 4, 4)
    before, seed = random.getstate(), torch.get_rng_state()
    assert len(capture_model(Drawing(), (image,)).graph) == 3
    assert random.getstate() == before
    assert torch.equal(torch.get_rng_state(), seed)


def test_what_dynamo_says_of_a_placeholder() -> None:
    """Pins the private attributes by which parameters, buffers and inputs are told apart."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("buffer", torch.ones(3))
            self.attribute = torch.ones(3)

        def forward(self, x: Any, more: dict[str, Any]) -> Any:
            return x * self.weight + self.buffer * self.attribute + more["y"]

    captured = capture_model(Net(), (torch.randn(2, 3), {"y": torch.randn(2, 3)}))
    holders = [n for n in captured.graph_module.graph.nodes if n.op == "placeholder"]
    assert sum(is_dynamo_weight(n) for n in holders) == 3
    assert len(holders) == 5
    assert len(captured.graph.inputs) == 2


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("L['self'].layer1.0.conv", "layer1.0.conv"),
        ("L['self']", ""),
        ("L__self__", ""),
        ("layer1.0.conv", "layer1.0.conv"),
        ("layer1.0.conv@1", "layer1.0.conv"),
        ("getattr(L['self'].layer1, '0').conv", "layer1.0.conv"),
        ("L['self']._modules['layer1']._modules['0'].conv", "layer1.0.conv"),
        ("L['fn'].__closure__[0].cell_contents.features.0", "features.0"),
        ("G['model']._orig_mod.features", "features"),
        ("", ""),
    ],
)
def test_module_paths(written: str, path: str) -> None:
    node = fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"key": (written, nn.Module)}
    assert module_path(node) == path


def test_graphs_without_recorded_shapes_need_inputs() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.relu, (x,)),))
    gm = fx.GraphModule(nn.Module(), graph)
    with pytest.raises(CaptureError, match="example inputs"):
        capture_fx(gm)
    captured = capture_fx(gm, [torch.randn(2, 3, 4, 4)])
    assert [op.name for op in captured.graph] == ["relu"]
    assert captured.graph.tensors["input"].shape == (1, 3, 4, 4)


def test_one_sample_is_found_among_windows_folded_into_the_batch() -> None:
    class Windows(nn.Module):
        """Windows of a map as samples, and back, as Swin has them; then a roll of the map."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, h, w, c = x.shape
            x = x.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
            x = torch.softmax(x, 1)
            x = x.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
            return torch.roll(x, (2, 2), (1, 2))

    one, two = (capture_model(Windows(), (torch.zeros(n, 8, 8, 6),)).graph for n in (1, 2))
    assert one.to_dict() == two.to_dict()
    assert "along the rows" in one.ops[-1].reason
