"""The main job on every network of the paper: plan, save, verify, compile, compare with eager."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

import torch_getfuse
from tests.networks import SIZES, network, operator_graph
from tests.simulator import Simulator
from torch_getfuse.partition.node_set import mask_of


@pytest.mark.parametrize("name", SIZES)
def test_planned_saved_verified_compiled_and_bit_equal(name: str, tmp_path: Path) -> None:
    model, x = network(name)
    plan = torch_getfuse.plan(
        model, (x,), buffer="256KB", activation_bytes=1, weight_bytes=1, method="exact"
    )
    assert plan.proof == "optimal"
    assert plan.lower_bound_bytes == plan.dram_bytes
    plan.save(tmp_path / "plan.json")
    loaded = torch_getfuse.load_plan(tmp_path / "plan.json").verify()
    assert loaded == plan
    options = {"plan": str(tmp_path / "plan.json"), "strict": True}
    compiled = torch.compile(model, backend="getfuse", options=options)
    with torch.no_grad():
        expected, got = model(x), compiled(x)
    for one, other in zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True):
        assert one.abs().max() > 1e-3, "a network whose output is nothing proves nothing"
        assert torch.equal(one, other)
    report = torch_getfuse.report(compiled).to_dict()
    assert len(report["sections"][0]["groups"]) == len(plan.groups)


# (network, buffer KB) -> bytes of feature reads and writes of the optimum; 1 byte, line.
# An independent implementation gives the same, rounded to 0.001 * 1024000, for all but
# resnet152, where it states 43.220 * 1024000: see test_resnet152_beats_the_stated_optimum.
OPTIMA = {
    ("mobilenet_v2", 128): 1.451,
    ("squeezenet1_0", 128): 1.680,
    ("resnet50", 128): 17.642,
    ("efficientnet_b3", 256): 23.338,
    ("resnet152", 256): 43.024,
}


@pytest.mark.parametrize(("name", "kilobytes"), OPTIMA)
def test_feature_traffic_of_the_optimum(name: str, kilobytes: int) -> None:
    model, x = network(name)
    plan = torch_getfuse.plan(
        model, (x,), buffer=kilobytes * 1024, activation_bytes=1, weight_bytes=1, method="exact"
    )
    assert round(plan.feature_bytes / 1024000, 3) == OPTIMA[name, kilobytes]


def test_resnet152_beats_the_stated_optimum() -> None:
    """The group that makes 43.024 out of 43.220 fits, by the simulator alone.

    Layer 2's first addition with both its convolutions. The strided 1x1 convolution of the skip
    path needs every other row of its input, so one row is held of each tensor. See
    docs/cost-models.md, "Where our optimum is lower than the stated one".
    """
    graph = operator_graph("resnet152")
    names = ["conv3", "downsample.0", "add", "relu_2"]
    mask = mask_of(graph.index[f"layer2.0.{name}"] for name in names)
    weights = 128 * 512 + 512 + 256 * 512 + 512
    one_row_each = 128 * 28 + 256 * 56 + 2 * 512 * 28 + 512 * 28
    simulator = Simulator(graph, mask)
    assert simulator.buffer_bytes() == 258_560 < 256 * 1024
    assert simulator.buffer_bytes() - weights == sum(
        units * (simulator.tensors[name].elements // simulator.units[name])
        for name, units in simulator.peak.items()
    )
    assert (set(simulator.peak.values()), 258_560 - weights) == ({1}, one_row_each)
