"""Random networks: the same for a number, of many kinds, with what the paper's networks lack."""

from __future__ import annotations

import pytest
import torch

from torch_getfuse.explain.features import CATEGORIES, category
from torch_getfuse.explain.training.data import SYNTHETIC, capture_network
from torch_getfuse.explain.training.synthetic import synthetic_network
from torch_getfuse.ir import WindowKind


@pytest.mark.parametrize("number", [0, 4, 5, 6])
def test_they_run(number: int) -> None:
    model = synthetic_network(number).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    again = synthetic_network(number)
    assert str(again) == str(model)


def test_no_two_are_alike() -> None:
    with torch.device("meta"):
        assert len({str(synthetic_network(number)) for number in range(SYNTHETIC)}) == SYNTHETIC


def test_they_have_what_the_papers_networks_lack() -> None:
    dense = capture_network("synthetic-0", 96)
    widest = max(len(op.reads) for k, op in enumerate(dense.ops) if category(dense, k) == "cat")
    assert widest >= 5, "a concatenation of all maps before it"
    shuffled = capture_network("synthetic-4", 96)
    kinds = {category(shuffled, k) for k in range(len(shuffled))}
    assert {"depthwise", "cat", "linear"} <= kinds <= set(CATEGORIES)
    excited = capture_network("synthetic-5", 96)
    scaled = [
        op
        for op in excited.ops
        if len(op.reads) == 2
        and {excited.tensors[read.tensor].rows for read in op.reads} > {1}
        and all(read.window.kind is WindowKind.IDENTITY for read in op.reads)
    ]
    assert scaled, "a map scaled by one value per channel: Squeeze-and-Excite"
