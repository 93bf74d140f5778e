"""What the tensors are that a graph is given: weights, and what has no batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_getfuse
from torch_getfuse.partition.plan import PartitionPlan

BATCH = 4
X = torch.linspace(-1, 1, BATCH * 3 * 8 * 8).reshape(BATCH, 3, 8, 8)


def plan_of(function: Callable[..., Any], *args: Any) -> PartitionPlan:
    torch._dynamo.reset()
    compiled = torch.compile(
        function, backend="getfuse", fullgraph=True, options={"strict": True, "inner": "eager"}
    )
    with torch.no_grad():
        compiled(*args)
    (section,) = torch_getfuse.report(compiled).sections
    return section.plan


def input_shapes(plan: PartitionPlan) -> list[tuple[int, ...]]:
    return [plan.graph.tensors[name].shape for name in plan.graph.inputs]


# -- weights ----------------------------------------------------------------------------------


def test_parameters_that_are_given_as_tensors_are_weights() -> None:
    """As by torch.func.functional_call; one of them comes first, and has the highest rank too."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    ).eval()
    values = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def call(values: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
        return torch.func.functional_call(model, values, (x,))

    assert plan_of(call, values, X).graph == plan_of(model, X).graph


def test_what_is_read_otherwise_as_well_is_no_weight() -> None:
    kernel = torch.randn(BATCH, 3, 3, 3)

    def call(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, kernel).sum((2, 3)) + kernel.sum((1, 2, 3))

    plan = plan_of(call, X, kernel)
    assert len(plan.graph.inputs) == 2
    assert all(op.weight_elements == 0 for op in plan.graph)


def test_a_convolution_of_weights_is_no_weight_argument() -> None:
    """The second input of linear interpolation is called weight, and is a map."""

    def call(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.lerp(x, y, weight)

    assert input_shapes(plan_of(call, X, X + 1, X + 2)) == [(1, 3, 8, 8)] * 3


# -- what has no batch --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "sample"),
    [
        ((BATCH, 1, 8, 8), (1, 1, 8, 8)),
        ((BATCH, 1, 1, 1), (1, 1, 1, 1)),
        ((1, 3, 8, 8), (1, 3, 8, 8)),
        ((8, 8), (8, 8)),  # 8 is a multiple of the batch
        ((8, 1), (8, 1)),
        ((8,), (8,)),
    ],
)
@pytest.mark.parametrize("cast", [False, True])
def test_masks(shape: tuple[int, ...], sample: tuple[int, ...], cast: bool) -> None:
    mask = torch.rand(shape)

    def call(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(mask > 0.5, 0) if cast else x * mask

    assert sorted(input_shapes(plan_of(call, X, mask))) == sorted([(1, 3, 8, 8), sample])


@pytest.mark.parametrize("name", ["relu6", "hardtanh", "logsigmoid", "relu"])
def test_a_mask_behind_any_elementwise_operator(name: str) -> None:
    mask = torch.rand(BATCH, 8)  # its leading size is that of the batch

    def call(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x + getattr(F, name)(mask)

    assert (BATCH, 8) in input_shapes(plan_of(call, torch.rand(BATCH, 3, BATCH, 8), mask))


def test_a_mask_of_attention() -> None:
    q = torch.randn(BATCH, 2, 8, 4)
    mask = torch.ones(8, 8).tril()

    def call(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    assert (8, 8) in input_shapes(plan_of(call, q, mask))


def test_targets_have_the_batch() -> None:
    """One label per sample: fewer axes than the scores, and yet a batch."""
    labels = torch.arange(BATCH) % 3

    def call(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x.mean((2, 3)), labels)

    assert (1,) in input_shapes(plan_of(call, X, labels))


@pytest.mark.parametrize("shape", [(8, 8), (8, 1), (1, 8, 8), (8,)])
def test_depth_first_refuses_what_has_no_batch_by_name(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape)

    def call(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * mask)

    torch._dynamo.reset()
    options = {"strict": True, "inner": "depth_first"}
    compiled = torch.compile(call, backend="getfuse", options=options)
    with torch.no_grad(), pytest.raises(Exception, match="'input_1' does not have its batch"):
        compiled(X, mask)
    one = torch.compile(call, backend="getfuse", options=options, dynamic=False)
    with torch.no_grad():
        assert torch.equal(one(X[:1], mask), call(X[:1], mask))


def test_many_ways_from_an_input_are_followed_once() -> None:
    """Each step doubles the ways to the end."""

    def call(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for _ in range(60):
            y = y + y * 2
        return x + y

    assert input_shapes(plan_of(call, X, X + 1)) == [(1, 3, 8, 8)] * 2
