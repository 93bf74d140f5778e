"""Tensors in the widths in which a model stores them: captured, planned, saved, run and counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import one_line
from torch import nn

import torch_getfuse
from torch_getfuse.accelerator import Accelerator
from torch_getfuse.backend.capture.capture import capture_model
from torch_getfuse.backend.plan_cache import cache_key
from torch_getfuse.errors import PlanError
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options
from torch_getfuse.partition.plan import PartitionPlan, load_plan

X = torch.randn(1, 3, 12, 10)


class Mixed(nn.Module):
    """Two convolutions in bfloat16 behind an input in float32, and one in float32 behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1).bfloat16()
        self.second = nn.Conv2d(8, 8, 3, padding=1).bfloat16()
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x.to(torch.bfloat16)).relu()).relu()
        return self.last(y.float()).sigmoid()


MODEL = Mixed().eval()


def planned(**options: Any) -> PartitionPlan:
    given = {"buffer": "2KB", "cache": False, "progress": False, **options}
    return torch_getfuse.plan(MODEL, (X,), **given)


def widths(graph: OpGraph) -> list[int | float]:
    """Of the input, then of what each operator writes."""
    return [graph.width(name) for name in (*graph.inputs, *(op.writes for op in graph))]


# -- capture ---------------------------------------------------------------------------------------


def test_each_tensor_has_the_width_of_its_dtype() -> None:
    graph = capture_model(MODEL, (X,)).graph
    assert [op.kind for op in graph][:3] == ["to", "conv2d", "relu"]
    # A cast is an operator: it reads one width and writes the other, and writes over nothing.
    assert widths(graph) == [4, 2, 2, 2, 2, 2, 4, 4, 4]
    assert graph.activation_width is None
    assert not graph.overwrites[0]
    assert graph.overwrites[2]
    assert all(tensor.bits in (None, 16) for tensor in graph.tensors.values())
    exported = torch_getfuse.plan(torch.export.export(MODEL, (X,)), buffer="2KB", cache=False)
    assert widths(exported.graph) == widths(graph)
    assert exported.graph.fingerprint == graph.fingerprint


def test_a_model_of_one_width_states_no_bits() -> None:
    for dtype, width in ((torch.float32, 4), (torch.float16, 2)):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).to(dtype).eval()
        graph = capture_model(model, (X.to(dtype),)).graph
        assert graph.activation_width == graph.weight_width == width
        assert all(tensor.bits is None for tensor in graph.tensors.values())


def test_under_autocast_values_are_as_wide_as_they_are_made() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.head(self.conv(x).relu().mean((2, 3))).float()

    graph = capture_model(Cast().eval(), (X,)).graph
    assert widths(graph) == [4, 2, 2, 2, 2, 4]
    assert graph.weight_width == 4  # they are cast on their way, and stored as they are


def test_indices_and_masks_count_at_their_own_widths() -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(10, 6)

        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            values, places = (self.words(ids) + x).relu().topk(2)
            return torch.where(x[..., :2] > 0, values, places)

    graph = capture_model(Indexed().eval(), (torch.randn(1, 7, 6), torch.zeros(1, 7).long())).graph
    found = {op.kind: graph.width(op.writes) for op in graph}
    assert sorted(graph.width(name) for name in graph.inputs) == [4, 8]
    assert found["gt"] == 1
    assert found["topk"] == 6  # as many float32 as int64


# -- plans -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "bytes_of"),
    [
        ({}, (4, 2, 4)),
        ({"activation_bytes": 1}, (1, 1, 1)),
        ({"activation_bytes": 0.5}, (0.5, 0.5, 0.5)),
    ],
    ids=str,
)
def test_what_crosses_the_border(options: dict[str, Any], bytes_of: tuple[float, ...]) -> None:
    plan = planned(buffer="64KB", **options)
    (group,) = plan.groups
    given, inner, result = bytes_of
    assert group.dram_read_bytes == 12 * 10 * 3 * given
    assert group.dram_write_bytes == 12 * 10 * 5 * result
    assert plan.graph.tensor_bytes["first"] == 12 * 10 * 8 * inner
    assert plan.activation_bytes == options.get("activation_bytes")


@pytest.mark.parametrize("scheme", ["lbdf", "cascade"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"align_channels": 16},
        {"weight_bytes": 0},
        {"activation_bytes": 0.5, "weight_bytes": 0.5, "buffer": 500},
        {"activation_bytes": 0.125, "weight_bytes": 0.125, "buffer": 150},
    ],
    ids=str,
)
def test_files_and_runs_agree_with_the_plan(
    scheme: str, options: dict[str, Any], tmp_path: Path
) -> None:
    plan = planned(scheme=scheme, **options)
    plan.save(tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.graph.tensor_bytes == plan.graph.tensor_bytes
    assert loaded.graph.overwrites == plan.graph.overwrites
    assert (loaded.align_channels, loaded.to_dict()) == (plan.align_channels, plan.to_dict())
    loaded.verify(prove=True)
    result, ledger = torch_getfuse.run_counted(MODEL, (X,), loaded)
    torch.testing.assert_close(result, MODEL(X), rtol=0.02, atol=0.02)  # of bfloat16
    assert ledger.agrees, str(ledger)


def test_slices_of_weights_that_are_no_whole_bytes_add_up() -> None:
    model = nn.Sequential(nn.Conv2d(8, 13, 3)).eval()
    x = torch.randn(1, 8, 5, 5)
    given = {"scheme": "cascade", "activation_bytes": 0.5, "weight_bytes": 0.125, "cache": False}
    plan = torch_getfuse.plan(model, (x,), buffer=120, **given)
    assert str(plan.groups[0].way).endswith("slices")
    assert plan.groups[0].dram_weight_bytes == -(-(8 * 13 * 9 + 13) // 8)
    _, ledger = torch_getfuse.run_counted(model, (x,), plan)
    assert ledger.agrees, str(ledger)


def test_weights_that_are_read_in_place_cost_nothing() -> None:
    plan = planned(weight_bytes=0)
    assert plan.weight_bytes == 0
    assert all(group.dram_weight_bytes == 0 for group in plan.groups)
    assert not any(t.kind == "weights" for t in plan.make_scheme().terms(plan.masks()[0], 2048))
    told = one_line(torch_getfuse.report(MODEL, X, buffer="2KB", weight_bytes=0, cache=False))
    assert "weights read in place (0 B" in " ".join(told.split())


def test_an_accelerator_brings_its_alignment() -> None:
    npu = Accelerator("npu", 4096, 0.5, 0, align_channels=16)
    options = Options(accelerator=npu)
    assert (options.activation_bytes, options.weight_bytes, options.align_channels) == (0.5, 0, 16)
    assert Options(accelerator=npu, align_channels=1, weight_bytes=1).align_channels == 1
    plan = planned(accelerator=npu)
    assert (plan.align_channels, plan.activation_bytes, plan.weight_bytes) == (16, 0.5, 0)
    assert plan.graph.tensor_bytes["last"] == 12 * 10 * 16 // 2
    told = one_line(torch_getfuse.report(MODEL, X, accelerator=npu, cache=False))
    assert "channels in multiples of 16" in " ".join(told.split())


def test_the_plan_cache_tells_widths_apart() -> None:
    graph = capture_model(MODEL, (X,)).graph
    narrow = replace(graph.tensors["first"], bits=8)
    other = replace(graph, tensors={**graph.tensors, "first": narrow})
    assert other.fingerprint == graph.fingerprint
    keys = {
        cache_key(each, Options(**options))
        for each in (graph, other)
        for options in ({}, {"align_channels": 16}, {"weight_bytes": 0})
    }
    assert len(keys) == 6
    # In one width for all, they are the same.
    assert len({cache_key(each, Options(activation_bytes=0.5)) for each in (graph, other)}) == 1


# -- files -----------------------------------------------------------------------------------------


def test_a_file_states_the_widths_that_differ() -> None:
    form = planned(align_channels=4).to_dict()
    tensors = form["graph"]["tensors"]
    assert (form["activation_bytes"], form["align_channels"]) == (4, 4)
    assert tensors["first"]["bytes"] == 2
    assert "bytes" not in tensors["last"]
    assert "align_channels" not in planned(activation_bytes=1).to_dict()
    assert PartitionPlan.from_dict(form).activation_bytes is None


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("activation_bytes",), 0.3, "activation_bytes is 0.3"),
        (("activation_bytes",), 0, "activation_bytes is 0"),
        (("activation_bytes",), 4.0, "activation_bytes is 4.0"),
        (("activation_bytes",), None, "activation_bytes is None"),
        (("weight_bytes",), -1, "weight_bytes is -1"),
        (("align_channels",), 0, "align_channels is 0"),
        (("align_channels",), True, "align_channels is True"),
        (("graph", "tensors", "first", "bytes"), "2", "tensor 'first'.bytes is '2'"),
        (("graph", "tensors", "first", "bytes"), 2000, "tensor 'first'.bytes is 2000"),
    ],
    ids=str,
)
def test_damaged_widths_are_refused_by_name(
    place: tuple[str, ...], value: object, message: str
) -> None:
    form: Any = planned().to_dict()
    at = form
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    with pytest.raises(PlanError, match=message):
        PartitionPlan.from_dict(form)


def test_a_file_with_another_width_does_not_verify() -> None:
    form: Any = planned().to_dict()
    form["graph"]["tensors"]["first"]["bytes"] = 1
    with pytest.raises(PlanError, match="DRAM"):
        PartitionPlan.from_dict(form).verify()
