"""One graph however a model is captured; only torch's own operators have torch's meaning."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from texts import one_line
from torch import Tensor, fx, nn

import torch_getfuse
from torch_getfuse.backend.capture.capture import capture_exported, capture_fx, capture_model
from torch_getfuse.backend.rules.rule import Run
from torch_getfuse.errors import PlanError
from torch_getfuse.ir import OpGraph, WindowKind
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.cost.scheme import weights_of


def both(model: nn.Module, x: Tensor) -> OpGraph:
    """The graph of a model, the same from Dynamo and from ``torch.export``."""
    found = capture_model(model.eval(), (x,)).graph
    exported = capture_exported(torch.export.export(model, (x,))).graph
    assert found.to_dict() == exported.to_dict()
    return found


@pytest.mark.parametrize(
    ("function", "kinds"),
    [
        (lambda y: F.unfold(y, 3, padding=1), ["relu", "im2col"]),
        (lambda y: F.fold(y.reshape(1, 16, 16), (8, 8), 2, stride=2), ["relu", "col2im"]),
        (lambda y: torch.clamp(y, min=y.mean()), ["relu", "mean", "clamp"]),
        (lambda y: F.interpolate(y, (5, 5), mode="bilinear", antialias=True), None),
        (lambda y: y.mT.sigmoid(), ["relu", "sigmoid"]),
        (
            lambda y: F.grid_sample(y, y[:, :2].permute(0, 2, 3, 1), align_corners=False),
            ["relu", "grid_sample"],
        ),
        (
            lambda y: F.scaled_dot_product_attention(y, y, y, attn_mask=y.tanh()),
            ["relu", "tanh", "scaled_dot_product_attention"],
        ),
    ],
)
def test_functions_without_a_rule_are_the_operators_they_call(
    function: Callable[[Tensor], Tensor], kinds: list[str] | None
) -> None:
    graph = both(Run(lambda x: function(torch.relu(x))), torch.randn(1, 4, 8, 8))
    assert kinds is None or [op.kind for op in graph] == kinds


def test_antialiased_resizing_reads_more_than_two_rows() -> None:
    resize = Run(lambda x: F.interpolate(x, (2, 2), mode="bilinear", antialias=True))
    graph = both(resize, torch.randn(1, 4, 8, 8))
    assert graph.ops[0].reads[0].window.kind is WindowKind.WHOLE


def test_children_may_have_any_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            names = ("it's", 'a"b', "x[0]", "sp ace", "back\\slash", "new\nline", "both'\"")
            self.d = nn.ModuleDict({name: nn.ReLU() for name in names})

        def forward(self, x: Tensor) -> Tensor:
            for child in self.d.values():
                x = child(x)
            return x

    names = [op.name for op in both(Named(), torch.randn(1, 3, 8, 8))]
    assert names[:2] == ["d.it's", 'd.a"b']
    assert "d.new_line" in names


def test_what_is_written_over_an_input_is_an_output() -> None:
    graph = both(Run(lambda x: (F.relu(x), x.mul_(2))), torch.randn(1, 2, 4, 4))
    assert graph.outputs == ("relu", "mul")


def test_weights_written_in_place_and_kept_tensors_count() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(16, 8))
            self.cache = {"bias": torch.randn(16, 8)}

        def forward(self, x: Tensor) -> Tensor:
            p = torch.repeat_interleave(self.a, 4, dim=0)
            p.add_(self.b)
            return torch.relu(x) + p + self.cache["bias"]

    graph = both(Joined(), torch.randn(1, 16, 8))
    assert [op.weight_elements for op in graph] == [0, 32 + 128, 128]


class Mixed(nn.Module):
    """int8 kernel with a scale, boolean mask, bfloat16 and complex parameters, float32 norm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.randint(-128, 127, (4, 3, 3, 3), dtype=torch.int8))
        self.scale = nn.Parameter(torch.ones(4, 1, 1, 1))
        self.register_buffer("mask", torch.ones(4, 6, 6, dtype=torch.bool))
        self.thin = nn.Parameter(torch.randn(4, 4, 1, 1, dtype=torch.bfloat16))
        self.norm = nn.LayerNorm(6)
        self.turn = nn.Parameter(torch.randn(6, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel.to(x.dtype) * self.scale)
        x = x.masked_fill(self.mask, 0)
        x = F.conv2d(x.bfloat16(), self.thin).float()
        return (self.norm(x) * self.turn).abs()


def test_weights_of_every_dtype_count_as_stored() -> None:
    graph = both(Mixed(), torch.randn(1, 3, 8, 8))
    stored = {op.kind: (op.weight_elements, op.weight_bytes) for op in graph if op.weight_elements}
    assert stored.pop("conv2d") == (16, 32)  # the later one: bfloat16
    assert stored == {"masked_fill": (144, 144), "layer_norm": (12, 48), "mul": (6, 48)}
    assert (graph.ops[0].weight_elements, graph.ops[0].weight_bytes) == (108 + 4, 108 + 16)
    assert graph.weight_width is None
    everything = (1 << len(graph)) - 1
    for scheme, width in ((Lbdf(graph, "line", 4, None), None), (Lbdf(graph, "line", 4, 2), 2)):
        weights = weights_of(graph, width)
        assert scheme.dram(everything).weight == sum(weights)
        terms = scheme.terms(everything)
        assert sum(term.bytes for term in terms) == scheme.buffer(everything)
        assert [t.bytes for t in terms if t.kind == "weights"] == [w for w in weights if w]


def test_a_plan_of_mixed_widths_is_saved_and_verified(tmp_path: object) -> None:
    plan = torch_getfuse.plan(Mixed().eval(), (torch.randn(1, 3, 8, 8),), buffer="16KB")
    assert plan.weight_bytes is None
    assert sum(group.dram_weight_bytes for group in plan.groups) == 124 + 144 + 32 + 48 + 48
    plan.save(f"{tmp_path}/plan.json")
    again = torch_getfuse.load_plan(f"{tmp_path}/plan.json").verify()
    assert again.graph.fingerprint == plan.graph.fingerprint
    assert again.groups == plan.groups
    assert "weights as stored" in one_line(torch_getfuse.report(plan))
    one = torch_getfuse.plan(
        Mixed().eval(), (torch.randn(1, 3, 8, 8),), buffer="16KB", weight_bytes=1
    )
    assert sum(g.dram_weight_bytes for g in one.groups) == plan.graph.weight_elements


@torch.library.custom_op("getfusetest::relu", mutates_args=())
def _flipped(x: Tensor) -> Tensor:
    return x.flip(2)


@_flipped.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.compiler.allow_in_graph
def relu(x: Tensor) -> Tensor:
    return x.flip(2)


@pytest.mark.parametrize("function", [_flipped, relu])
def test_a_name_of_torch_is_not_its_meaning(function: Callable[[Tensor], Tensor]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return function(self.conv(x)) + 1

    model, x = Model().eval(), torch.randn(1, 3, 6, 6)
    plan = torch_getfuse.plan(model, (x,))
    op = plan.graph.ops[1]
    assert op.kind.endswith("relu")
    assert op.kind != "relu"
    assert op.reads[0].window.kind is WindowKind.WHOLE
    assert "no rule" in op.reason
    with torch.no_grad():
        for inner in ("eager", "auto", "depth_first"):
            torch._dynamo.reset()
            # By rows, a Python function that may do anything falls back.
            options = {"inner": inner, "strict": inner != "depth_first", "cache": False}
            ours, right = torch.compile(model, backend="getfuse", options=options)(x), model(x)
            if inner == "depth_first":  # rows may be rounded in other ways than whole maps
                assert torch.allclose(ours, right, atol=1e-6)
            else:
                assert torch.equal(ours, right)


def test_opaque_weights_are_told() -> None:
    linear = nn.Sequential(nn.Linear(8, 4)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its quantization deprecated
        packed = torch.ao.quantization.quantize_dynamic(linear, {nn.Linear}, dtype=torch.qint8)
    root = nn.Module()
    root.packed = packed[0]._packed_params._packed_params
    graph = fx.Graph()
    x, weights = graph.placeholder("x"), graph.get_attr("packed")
    y = graph.call_function(torch.ops.quantized.linear_dynamic.default, (x, weights))
    graph.output((y,))
    x.meta["example_value"], y.meta["example_value"] = torch.randn(2, 8), torch.randn(2, 4)
    weights.meta["example_value"] = None
    (op,) = capture_fx(fx.GraphModule(root, graph)).graph
    assert "LinearPackedParamsBase cannot be seen, and are not counted" in op.reason


def test_a_plan_of_another_grad_mode_is_refused_by_its_name() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(1, 10, 16)
    plan = torch_getfuse.plan(layer, (x,))
    with torch.no_grad():
        fused = torch_getfuse.plan(layer, (x,))
        outputs, _ = torch_getfuse.run_counted(layer, (x,), fused)
        assert torch.equal(outputs, layer(x))
        with pytest.raises(PlanError, match="it was made with gradients on"):
            torch_getfuse.run_counted(layer, (x,), plan)
    with pytest.raises(PlanError, match="it was made with gradients off"):
        torch_getfuse.split(layer, (x,), fused)
