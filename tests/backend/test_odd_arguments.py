"""Calls that eager runs and rules could stumble over: scalars, empty tensors, tensors for numbers.

Each must be planned (``strict``) and give eager's result to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torch_getfuse
from torch_getfuse.backend.capture.capture import capture_exported, capture_model
from torch_getfuse.backend.rules.rule import Run

Function = Callable[..., Any]

SCALAR: dict[str, Function] = {
    "cumsum": lambda x: torch.cumsum(x + 1, 0),
    "cumprod": lambda x: torch.cumprod(x + 1, -1),
    "cummax": lambda x: torch.cummax(x + 1, 0),
    "logcumsumexp": lambda x: torch.logcumsumexp(x + 1, 0),
    "sort": lambda x: torch.sort(x + 1, 0),
    "softmax": lambda x: torch.softmax(x + 1, 0),
    "softmax, last axis": lambda x: F.log_softmax(x + 1, -1),
    "sum": lambda x: (x + 1).sum(0),
    "max": lambda x: (x + 1).max(0),
    "argmax": lambda x: (x + 1).argmax(0),
    "topk": lambda x: (x + 1).topk(1),
    "norm": lambda x: torch.linalg.vector_norm(x + 1),
    "transpose": lambda x: (x + 1).transpose(0, -1) * 2,
    "t": lambda x: (x + 1).t() * 2,
    "permute": lambda x: (x + 1).permute(()) * 2,
    "movedim": lambda x: (x + 1).movedim(0, 0) * 2,
    "squeeze": lambda x: (x + 1).squeeze(0) * 2,
    "unsqueeze": lambda x: (x + 1).unsqueeze(-1) * 2,
    "flatten": lambda x: (x + 1).flatten() * 2,
    "expand": lambda x: (x + 1).expand(3) * 2,
    "unfold": lambda x: (x + 1).unfold(0, 1, 1) * 2,
    "roll": lambda x: torch.roll(x + 1, 0),
    "gather": lambda x: torch.gather(x + 1, 0, torch.tensor(0)),
    "index_select": lambda x: (x + 1).index_select(0, torch.tensor([0])),
    "new axis": lambda x: (x + 1)[None, ...] * 2,
    "truth value as index": lambda x: (x + 1)[True] * 2,
}

EMPTY: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "nothing selected": (lambda x, i: x.relu()[i] * 2, (torch.randn(4, 5), torch.arange(0))),
    "an empty part of cat": (
        lambda x: torch.cat([x[:0], x * 2]).relu() + 1,
        (torch.randn(4, 5),),
    ),
    "sum of nothing": (lambda x: (x[:0] * 2).sum() + x.relu(), (torch.randn(4, 5),)),
    "an empty batch": (
        lambda x: F.conv2d(x, torch.ones(3, 3, 1, 1)).relu(),
        (torch.randn(0, 3, 4, 4),),
    ),
    "no features": (
        lambda x, w: F.linear(x * 2, w).relu(),
        (torch.randn(3, 0), torch.randn(4, 0)),
    ),
    "an empty part of split": (
        lambda x: [a + 1 for a in (x * 2).split([0, 5], 1)],
        (torch.randn(4, 5),),
    ),
    "an empty result": (lambda x: ((x * 2)[:0], x + 1), (torch.randn(4, 5),)),
    "nothing written": (
        lambda x: x.clone().index_put_((torch.arange(0),), torch.tensor(1.0)) + 1,
        (torch.randn(4),),
    ),
}

TENSORS_FOR_NUMBERS: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "narrow": (
        lambda x, s: (x + 1).narrow(0, s, 2) * 2,
        (torch.randn(5, 3), torch.tensor(1)),
    ),
    "index": (lambda x, s: (x + 1)[s] * 2, (torch.randn(5, 3), torch.tensor(1))),
    "pad": (lambda x: F.pad(x.relu(), (torch.tensor(2), 0)) * 2, (torch.randn(1, 4, 8),)),
    "clamp": (lambda x: torch.clamp(x, min=x.mean()), (torch.randn(3, 4),)),
    "softmax without an axis": (lambda x: F.softmax(x + 1), (torch.randn(2, 3, 4),)),
}


def _check(function: Function, inputs: tuple[Tensor, ...]) -> None:
    expected = function(*inputs)
    options = {"inner": "eager", "strict": True, "cache": False}
    with torch.no_grad():
        got = torch.compile(function, backend="getfuse", options=options)(*inputs)
    right, ours = pytree.tree_leaves(expected), pytree.tree_leaves(got)
    assert len(right) == len(ours)
    assert all(map(torch.equal, right, ours))


@pytest.mark.parametrize("name", SCALAR)
def test_scalars(name: str) -> None:
    _check(SCALAR[name], (torch.tensor(2.0),))


@pytest.mark.parametrize("name", EMPTY)
def test_empty_tensors(name: str) -> None:
    _check(*EMPTY[name])


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("name", TENSORS_FOR_NUMBERS)
def test_tensors_where_rules_expect_numbers(name: str) -> None:
    _check(*TENSORS_FOR_NUMBERS[name])


def test_an_empty_tensor_is_no_operator_and_moves_nothing() -> None:
    model = Run(lambda x: torch.cat([x[:, :0] * 2, x.relu()], 1))
    graph = capture_model(model, (torch.randn(1, 4, 6, 7),)).graph
    assert [op.kind for op in graph.ops] == ["relu", "cat"]
    assert [read.tensor for read in graph.ops[1].reads] == ["relu"]


def test_arguments_that_a_rule_cannot_read_are_counted_as_no_rule() -> None:
    model = Run(lambda x: F.pad(x.relu(), (torch.tensor(2), 0)))
    capture = capture_model(model, (torch.randn(1, 4, 8),))
    assert capture.graph.ops[-1].reason.startswith("no rule for these arguments of pad")
    assert capture.unsupported == {"pad": 1}


def test_a_list_among_the_results_is_picked_apart() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        counts, edges = torch.histogramdd(x, [3, 2])
        return counts + 1, edges[0] * 2, edges[1]

    _check(function, (torch.rand(10, 2),))
    graph = capture_model(Run(function), (torch.rand(10, 2),)).graph
    assert [op.kind for op in graph.ops] == ["histogramdd", "add", "mul"]


class _Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 8), nn.Linear(16, 4)
        self.cell = cell(8, 8, 2, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.cell(torch.relu(self.before(x)))[0])


@pytest.mark.filterwarnings("ignore:The tensor attributes self.cell")
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_module_is_one_operator_with_all_its_weights(cell: type[nn.RNNBase]) -> None:
    model, x = _Recurrent(cell).eval(), torch.randn(5, 1, 8)
    graph = capture_model(model, (x,)).graph
    assert [op.name for op in graph.ops] == ["before", "relu", "cell", "after"]
    state = 2 * 2 * 8 * (2 if cell is nn.LSTM else 1)  # two layers, two ways
    assert graph.weight_elements == sum(p.numel() for p in model.parameters()) + state
    assert graph.tensors[graph.inputs[0]].shape == (5, 1, 8)  # one sample of five steps
    assert graph.fingerprint == capture_exported(torch.export.export(model, (x,))).graph.fingerprint
    plan = torch_getfuse.plan(model, (x,), buffer="64KB")
    with torch.no_grad():
        assert torch.equal(torch_getfuse.split(model, (x,), plan)(x), model(x))


def test_a_model_without_any_graph_says_why() -> None:
    class Printed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x

    with pytest.raises(
        torch_getfuse.CaptureError, match="Dynamo traces Printed as no graph at all"
    ):
        torch_getfuse.plan(Printed().eval(), (torch.randn(3),))
