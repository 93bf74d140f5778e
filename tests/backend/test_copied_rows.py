"""Copies in a group: run by rows where their windows allow it, else refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_getfuse

CHOICE = [2, 0, 3]


class Between(nn.Module):
    """A copy between a convolution and an elementwise operator."""

    def __init__(self, copy: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.copy = nn.Conv2d(4, 4, 3, padding=1), copy

    def forward(self, x: Tensor) -> Tensor:
        return self.copy(self.conv(x).relu()) + 1


BY_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda x: x.roll((1, 2), (1, 3)),
    "flip": lambda x: x.flip(3),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "interleaved rows": lambda x: x.repeat_interleave(3, 2),
    "shuffle": lambda x: F.channel_shuffle(x, 2),
    "windows of rows": lambda x: x.unfold(2, 3, 2),
    "topk": lambda x: x.topk(2, 1)[0],
    "index": lambda x: x[:, CHOICE],
    "gather": lambda x: x.gather(1, (x > 0.5).long()),
    "scatter": lambda x: x.scatter(1, (x > 0.5).long(), x),
    "complex": lambda x: torch.view_as_real(torch.complex(x, x * 2)),
}
AS_NODES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "im2col": (
        lambda x: F.unfold(x, 3, padding=1) * 2,
        "im2col (im2col) gives its rows in another shape than they are stored in",
    ),
    "col2im": (
        lambda x: F.fold(x.repeat(1, 9, 1, 1).flatten(2), (8, 9), 3, padding=1),
        "has 72 rows, the output 8",
    ),
    "topk, both": (lambda x: sum(x.topk(2, 1)), "topk gives several tensors"),  # type: ignore[dict-item]
    "gathered rows": (
        lambda x: x.gather(2, (x > 0.5).long()),
        "needs all of one input for a row of another",
    ),
}


@pytest.mark.parametrize("name", [*BY_ROWS, *AS_NODES])
def test_copies_in_a_group(name: str) -> None:
    copy, refusal = AS_NODES.get(name) or (BY_ROWS[name], "")
    torch.manual_seed(0)
    model, x = Between(copy).eval(), torch.randn(2, 4, 8, 9)
    plan = torch_getfuse.plan(model, (x,), buffer="64KB").verify()
    assert len(plan.groups) == 1
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(torch_getfuse.split(model, (x,), plan)(x), expected)
        found, ledger = torch_getfuse.run_counted(model, (x,), plan)
    (group,) = ledger.to_dict()["groups"]
    assert refusal in (group["fallback"] or "")
    assert bool(group["fallback"]) == bool(refusal)
    torch.testing.assert_close(found, expected)
    if not refusal:
        for kind in ("read", "write", "ring"):
            assert group[f"counted_{kind}_bytes"] == group[f"planned_{kind}_bytes"], kind


@pytest.mark.parametrize("name", ["roll", "index", "im2col", "topk, both"])
def test_compiled_copies_equal_eager(name: str) -> None:
    torch._dynamo.reset()
    model = Between(BY_ROWS[name] if name in BY_ROWS else AS_NODES[name][0]).eval()
    x = torch.randn(1, 4, 8, 9)
    compiled = torch.compile(
        model, backend="getfuse", options={"buffer": "2KB", "inner": "eager", "strict": True}
    )
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_results_side_by_side_are_one_tensor() -> None:
    """Values and positions of topk: each a half, along the axis that they were taken from."""
    model = Between(AS_NODES["topk, both"][0]).eval()
    graph = torch_getfuse.plan(model, (torch.randn(1, 4, 8, 9),), buffer="64KB").graph
    assert graph.tensors["topk"].shape == (1, 4, 8, 9)
    assert graph.tensors["topk"].rows == 8
    assert [str(read.window) for op in graph for read in op.reads][-2:] == ["identity"] * 2


def test_reasons_name_what_is_data_dependent() -> None:
    def reasons(copy: Callable[[Tensor], Tensor]) -> list[str]:
        plan = torch_getfuse.plan(Between(copy).eval(), (torch.randn(2, 4, 8, 9),), buffer="64KB")
        return [op.reason for op in plan.graph if op.reason]

    grid = reasons(
        lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False)
    )
    assert grid == [
        "grid_sample reads where its grid says: it needs the whole map before its first row"
    ]
    (index,) = reasons(lambda x: x[:, :, CHOICE])
    assert index == "an index along the rows reads rows that are known only when it runs"
    (roll,) = reasons(lambda x: x.roll(1, 2))
    assert roll == "roll along the rows wraps around: the first row needs the last ones"
    assert not reasons(lambda x: x.roll(1, 3))
    (mask,) = reasons(lambda x: x.roll(1, 0))
    assert mask == "roll along the batch mixes its samples"
