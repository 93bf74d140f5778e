"""Recurrent layers: one operator, streamed by steps, with its state beside its weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from texts import one_line
from torch import Tensor, nn

import torch_getfuse
from torch_getfuse.backend.capture.capture import capture_exported, capture_model
from torch_getfuse.ir import Op, OpGraph, WindowKind
from torch_getfuse.options import Options
from torch_getfuse.partition.cost.brr.model import Brr
from torch_getfuse.partition.cost.cascade.model import Cascade
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.planner import plan_graph

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes self")

LAYERS = (nn.LSTM, nn.GRU, nn.RNN)


class Speech(nn.Module):
    """A convolution over a signal, a recurrent layer over its steps, a linear layer for each."""

    def __init__(self, layer: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.front = nn.Conv1d(6, 8, 3, padding=1)
        self.layer = layer(8, 16, batch_first=True, **options)
        self.head = nn.Linear(16 * (2 if options.get("bidirectional") else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(self.front(x).transpose(1, 2))[0])
        return out


X = torch.randn(2, 6, 12)


def _layer(graph: OpGraph) -> Op:
    (op,) = (op for op in graph if op.recurrent)
    return op


@pytest.mark.parametrize("layer", LAYERS)
def test_a_step_is_a_unit_and_the_state_is_held(layer: type[nn.RNNBase]) -> None:
    model = Speech(layer, num_layers=2).eval()
    graph = capture_model(model, (X,)).graph
    op = _layer(graph)
    assert [graph.tensors[op.writes].shape, graph.tensors[op.writes].rows] == [(1, 12, 16), 12]
    assert op.reads[0].window.kind is WindowKind.IDENTITY
    state = 2 * 16 * (2 if layer is nn.LSTM else 1)
    stored = sum(p.numel() for p in model.layer.parameters())
    assert op.weight_elements == stored + state
    assert op.weight_bytes == 4 * (stored + state)
    # One step in, one step out, all weights and the state.
    alone = Lbdf(graph, "line", 1, 1).buffer(1 << graph.ops.index(op))
    assert alone == stored + state + 8 + 16
    assert capture_exported(torch.export.export(model, (X,))).graph == graph


def test_a_state_that_is_given_is_read() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(8, 16, batch_first=True)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
            out: Tensor = self.layer(x, (h, c))[0]
            return out

    model = Given().eval()
    state = torch.zeros(1, 1, 16)
    graph = capture_model(model, (torch.randn(1, 12, 8), state, state.clone())).graph
    (op,) = graph
    assert op.weight_elements == sum(p.numel() for p in model.parameters())
    assert [graph.tensors[read.tensor].elements for read in op.reads] == [96, 16, 16]


def test_both_ways_need_the_whole_sequence() -> None:
    op = _layer(capture_model(Speech(nn.GRU, bidirectional=True).eval(), (X,)).graph)
    assert op.reads[0].window.kind is WindowKind.WHOLE
    assert op.reason == "a bidirectional gru starts at both ends of the sequence"


def test_only_the_last_state_takes_in_each_step() -> None:
    class Last(Speech):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.layer(self.front(x).transpose(1, 2))[1][0])
            return out

    graph = capture_model(Last(nn.GRU).eval(), (X,)).graph
    op = _layer(graph)
    assert op.reads[0].window.kind is WindowKind.REDUCE
    assert graph.tensors[op.writes].elements == 16


def test_steps_before_samples() -> None:
    """``(T, N, F)``: the batch is the second axis, behind elementwise operators as well."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(torch.relu(x))[0]
            return out.tanh()

    graphs = [capture_model(Steps().eval(), (torch.randn(12, n, 8),)).graph for n in (1, 3)]
    assert graphs[0].to_dict() == graphs[1].to_dict()
    assert graphs[0].tensors[graphs[0].inputs[0]].shape == (12, 1, 8)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("scheme", ["lbdf", "cascade"])
def test_plans_run(layer: type[nn.RNNBase], scheme: str) -> None:
    model = Speech(layer).eval()
    plan = torch_getfuse.plan(model, (X,), buffer="32KB", scheme=scheme, activation_bytes=1)
    plan.verify()
    with torch.no_grad():
        expected = model(X)
        assert torch.equal(torch_getfuse.split(model, (X,), plan)(X), expected)
        found, ledger = torch_getfuse.run_counted(model, (X,), plan)
    torch.testing.assert_close(found, expected)
    refused = [group["fallback"] for group in ledger.to_dict()["groups"] if group["fallback"]]
    kind = layer.__name__.lower()
    assert refused == [f"layer ({kind}) carries a state from row to row, which no kernel keeps"]


def test_weights_are_not_taken_in_slices() -> None:
    """Each step needs all of the weights, where a linear layer of that size may take its share."""
    graph = capture_model(Speech(nn.LSTM).eval(), (X,)).graph
    layer = _layer(graph)
    at, mask = graph.ops.index(layer), 1 << graph.ops.index(layer)
    alike = replace(
        graph, ops=tuple(replace(op, recurrent=False) if op is layer else op for op in graph)
    )
    brr, other = (
        Brr(g, activation_bytes=1, weight_bytes=1).dram(mask, 1200) for g in (graph, alike)
    )
    assert other.weight == layer.weight_elements  # in one tile, a slice of the weights at a time
    assert brr.weight == 12 * layer.weight_elements
    assert brr.read == other.read == 12 * 8
    cascade, other_cascade = (Cascade(g, 1200, 1, 1) for g in (graph, alike))
    assert cascade.facts.channels[at] == 1
    assert other_cascade.facts.channels[at] == 16
    plan, sliced = (
        plan_graph(g, Options(buffer=1200, scheme="cascade", activation_bytes=1, weight_bytes=1))
        for g in (graph, alike)
    )
    assert layer.name in plan.unfusable
    assert layer.name not in sliced.unfusable


def test_a_compiled_layer_is_reported() -> None:
    torch._dynamo.reset()
    model = Speech(nn.RNN).eval()
    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(model, backend="getfuse", options={"inner": "eager"})
        assert torch.equal(compiled(X), model(X))
    report = one_line(torch_getfuse.report(compiled))
    assert "left to eager" not in report
    assert "no rule" not in report
