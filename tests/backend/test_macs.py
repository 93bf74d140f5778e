"""Multiply-accumulates per operator, against PyTorch's counter and against formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import SIZES, operator_graph
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import torch_getfuse
from torch_getfuse.backend.capture.capture import capture_model
from torch_getfuse.backend.rules.registry import BY_TARGET
from torch_getfuse.backend.rules.rule import Run
from torch_getfuse.errors import GraphError, PlanError
from torch_getfuse.ir import Op, OpGraph, Window
from torch_getfuse.models import import_torchvision


def counted(model: nn.Module, *inputs: Tensor) -> int:
    """What PyTorch counts of a call, two FLOPs for each multiply-accumulate."""
    # Of attention and transformers it counts the plain operators only.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


def total(graph: OpGraph) -> int:
    """Of a graph all of whose operators are known."""
    macs = [op.macs for op in graph]
    assert None not in macs
    return sum(n or 0 for n in macs)


def by_kind(graph: OpGraph, kind: str) -> list[int | None]:
    return [op.macs for op in graph if op.kind == kind]


@pytest.mark.parametrize("name", SIZES)
def test_networks_are_counted_as_torch_counts_them(name: str) -> None:
    models = import_torchvision().models
    home = models.segmentation if name.startswith("deeplab") else models
    options = {"weights_backbone": None} if name.startswith("deeplab") else {}
    with torch.device("meta"):
        model = getattr(home, name)(weights=None, **options).eval()
        expected = counted(model, torch.empty(1, 3, SIZES[name], SIZES[name]))
    assert total(operator_graph(name)) == expected > 0


def _einsum(equation: str) -> Callable[..., Tensor]:
    return lambda *operands: torch.einsum(equation, *operands)


CALLS: dict[str, tuple[nn.Module, tuple[tuple[int, ...], ...]]] = {
    "grouped": (nn.Conv2d(6, 4, 3, 2, 1, groups=2), ((6, 9, 8),)),
    "dilated, same": (nn.Conv2d(3, 4, (3, 5), padding="same", dilation=2), ((3, 9, 8),)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2), ((6, 5, 7),)),
    "signal": (nn.Conv1d(3, 5, 4), ((3, 12),)),
    "volume": (nn.Conv3d(3, 5, 2), ((3, 4, 6, 5),)),
    "kernel that is a map": (Run(lambda x: F.conv2d(x, x.tanh()[:1])), ((3, 6, 5),)),
    "linear of tokens": (nn.Linear(6, 5), ((7, 6),)),
    "matmul by weights": (Run(lambda x, w: x.tanh() @ w, (6, 5)), ((7, 6),)),
    "weights on the left": (Run(lambda x, w: w @ x.tanh(), (5, 7)), ((7, 6),)),
    "matmul of maps": (Run(lambda x, y: x.tanh() @ y), ((2, 7, 6), (2, 6, 3))),
    "attention": (
        Run(lambda q, k, v: F.scaled_dot_product_attention(q.tanh(), k, v)),
        ((2, 6, 4), (2, 5, 4), (2, 5, 3)),
    ),
    "causal": (
        Run(lambda x: F.scaled_dot_product_attention(x.tanh(), x, x, is_causal=True)),
        ((2, 6, 4),),
    ),
    "baddbmm": (Run(lambda x, y: torch.baddbmm(x @ y, x.tanh(), y)), ((5, 6), (6, 4))),
    "einsum": (Run(_einsum("bij,bkj->bik")), ((5, 6), (4, 6))),
    "einsum, ellipsis": (Run(_einsum("...ij,...jk->...ik")), ((2, 5, 6), (2, 6, 4))),
    "einsum, implicit": (Run(_einsum("ij,jk"), (6, 4)), ((6,),)),
    "encoder layer": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), ((5, 8),)),
    "convolution, batch norm": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        ((3, 9, 8),),
    ),
    "nothing to multiply": (nn.Sequential(nn.MaxPool2d(2), nn.SiLU()), ((3, 8, 8),)),
}


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", CALLS)
def test_operators_are_counted_per_sample_as_torch_counts_them(name: str, batch: int) -> None:
    model, shapes = CALLS[name]
    inputs = tuple(torch.rand(batch, *shape) for shape in shapes)
    graph = capture_model(model.eval(), inputs).graph
    assert batch * total(graph) == counted(model, *inputs)
    assert (total(graph) == 0) == (name == "nothing to multiply")


def test_a_vision_transformer_by_its_formula() -> None:
    with torch.device("meta"):
        model = import_torchvision().models.vit_b_16(weights=None).eval()
        graph = capture_model(model, (torch.empty(1, 3, 224, 224),)).graph
    tokens, width, hidden, layers = 197, 768, 3072, 12
    layer = tokens * (4 * width * width + 2 * width * hidden) + 2 * tokens * tokens * width
    assert total(graph) == 196 * 768 * width + layers * layer + width * 1000


@pytest.mark.parametrize(("layer", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_by_their_formula(layer: type[nn.RNNBase], gates: int) -> None:
    x = torch.rand(3, 7, 6)  # three samples of seven steps
    graph = capture_model(layer(6, 5, 2, batch_first=True).eval(), (x,)).graph
    assert total(graph) == 7 * gates * 5 * ((6 + 5) + (5 + 5))
    both = layer(6, 5, batch_first=True, bidirectional=True).eval()
    assert total(capture_model(both, (x,)).graph) == 2 * 7 * gates * 5 * (6 + 5)


def test_a_projected_lstm_and_cells_by_their_formulas() -> None:
    projected = nn.LSTM(6, 5, proj_size=2, batch_first=True).eval()
    graph = capture_model(projected, (torch.rand(3, 7, 6),)).graph
    assert total(graph) == 7 * (4 * 5 * (6 + 2) + 2 * 5)
    for cell, gates in ((nn.LSTMCell(6, 5), 4), (nn.GRUCell(6, 5), 3), (nn.RNNCell(6, 5), 1)):
        graph = capture_model(cell.eval(), (torch.rand(3, 6),)).graph
        assert total(graph) == gates * 5 * (6 + 5), cell


def test_products_of_whole_operands_by_their_formulas() -> None:
    x, y = torch.rand(4, 6), torch.rand(4, 3)
    bilinear = nn.Bilinear(6, 3, 5).eval()
    assert by_kind(capture_model(bilinear, (x, y)).graph, "bilinear") == [5 * (6 + 1) * 3]
    added = Run(lambda m, w, b: torch.addmm(b, m.tanh(), w), (6, 5), (5,))
    assert by_kind(capture_model(added, (x,)).graph, "addmm") == [6 * 5]
    # It adds up the samples: all of them are needed, once.
    over = Run(lambda a, b, c: torch.addbmm(c, a.tanh(), b), (2, 3))
    maps = torch.rand(4, 2, 6), torch.rand(4, 6, 3)
    assert by_kind(capture_model(over, maps).graph, "addbmm") == [4 * 2 * 6 * 3]
    # The sum over m comes first, then x by y.
    summed = Run(lambda a, b: torch.einsum("bim,bj->bij", a, b))
    told = capture_model(summed, (torch.rand(4, 6, 9), y)).graph
    assert by_kind(told, "einsum") == [6 * 3]
    alone = Run(lambda a: torch.einsum("bij->bji", a.tanh()))
    assert by_kind(capture_model(alone, maps[:1]).graph, "einsum") == [0]


class Fused(nn.Module):
    """The operators of PyTorch's fast path of transformers, which traces do not take."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        layer, own = self.layer, self.layer.self_attn
        weights = (own.in_proj_weight, own.in_proj_bias, own.out_proj.weight, own.out_proj.bias)
        norms = (layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias)
        linear1, linear2 = layer.linear1, layer.linear2
        further = (linear1.weight, linear1.bias, linear2.weight, linear2.bias)
        made: Tensor = torch.ops.aten._transformer_encoder_layer_fwd(
            x, 8, 2, *weights, False, False, 1e-5, *norms, *further
        )
        found: tuple[Tensor, Tensor] = torch.ops.aten._native_multi_head_attention(
            made, made, made, 8, 2, *weights, None, False
        )
        return found[0]


def test_fused_attention_is_counted_as_its_parts_are() -> None:
    model, x = Fused().eval(), torch.rand(3, 5, 8)
    graph = capture_model(model, (x,)).graph
    attention = 5 * 4 * 8 * 8 + 2 * 5 * 5 * 8
    assert by_kind(graph, "_native_multi_head_attention") == [attention]
    plain = capture_model(model.layer, (x,)).graph
    (layer,) = by_kind(graph, "_transformer_encoder_layer_fwd")
    assert layer == attention + 2 * 5 * 8 * 16 == total(plain)


def test_what_nobody_has_counted_is_unknown() -> None:
    three = Run(lambda x: torch.einsum("bij,bkj,bkl->bil", x.tanh(), x, x))
    assert by_kind(capture_model(three, (torch.rand(2, 5, 6),)).graph, "einsum") == [None]
    (op,) = capture_model(Run(lambda x: torch.cdist(x, x)), (torch.rand(2, 5, 6),)).graph
    assert op.reason.startswith("no rule")
    assert op.macs is None


def test_an_operator_like_another_is_counted_like_it_one_by_windows_is_not() -> None:
    @torch.library.custom_op("getfuse_macs::project", mutates_args=())
    def project(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    @project.register_fake
    def _(x: Tensor, w: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], w.shape[0])

    x = torch.rand(2, 7, 6)
    try:
        torch_getfuse.register_rule(project, like="linear")
        (op,) = capture_model(Run(project, (5, 6)), (x,)).graph
        assert op.macs == 7 * 6 * 5
        torch_getfuse.register_rule(project, windows=Window.whole())
        (op,) = capture_model(Run(project, (5, 6)), (x,)).graph
        assert op.macs is None
    finally:
        BY_TARGET.pop("getfuse_macs::project", None)


# -- plan files ---------------------------------------------------------------------------


def test_they_are_no_part_of_the_graphs_identity_and_go_to_the_plan_file(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.rand(2, 3, 9, 8)
    plan = torch_getfuse.plan(model, (x,), cache=False)
    assert [op.macs for op in plan.graph] == [4 * 7 * 6 * 3 * 9, 0]
    plan.save(tmp_path / "plan.json")
    loaded = torch_getfuse.load_plan(tmp_path / "plan.json")
    assert [op.macs for op in loaded.graph] == [op.macs for op in plan.graph]

    form = json.loads((tmp_path / "plan.json").read_text())
    for op in form["graph"]["ops"]:
        del op["macs"]
    (tmp_path / "old.json").write_text(json.dumps(form))
    old = torch_getfuse.load_plan(tmp_path / "old.json")
    assert [op.macs for op in old.graph] == [None, None]
    assert old.graph == plan.graph
    assert old.graph.fingerprint == plan.graph.fingerprint

    for wrong in (-1, 2.5, True, "3"):
        form["graph"]["ops"][0]["macs"] = wrong
        (tmp_path / "wrong.json").write_text(json.dumps(form))
        with pytest.raises(PlanError, match="macs"):
            torch_getfuse.load_plan(tmp_path / "wrong.json")


def test_a_graph_refuses_less_than_none() -> None:
    graph = operator_graph("alexnet")
    ops: tuple[Op, ...] = (replace(graph.ops[0], macs=-1), *graph.ops[1:])
    with pytest.raises(GraphError, match="-1 multiply-accumulates"):
        replace(graph, ops=ops)
