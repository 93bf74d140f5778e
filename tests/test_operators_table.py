"""Rows of operators: every operator once, and sums that are those of their groups."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import Builder
from networks import operator_graph

import torch_getfuse
from torch_getfuse import OptionError
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.planner import plan_graph
from torch_getfuse.reporting import operators_table
from torch_getfuse.reporting.report import Report
from torch_getfuse.reporting.section import Section


def chain() -> OpGraph:
    """Two 3x3 convolutions on 8x8, 2 to 4 to 4 channels."""
    build = Builder()
    x = build.input((1, 2, 8, 8))
    build.conv(build.conv(x, 4, kernel=3), 4, kernel=3)
    return build.graph()


SHARED = ("unfused_bytes", "dram_read_bytes", "dram_write_bytes", "dram_weight_bytes", "dram_bytes")


def made(network: str, **options: Any) -> Section:
    asked = {"activation_bytes": 1, "weight_bytes": 1, "cache": False, **options}
    return Section(plan_graph(operator_graph(network), Options.of(asked)))


@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("squeezenet1_0", {"buffer": "64KB"}),
        ("squeezenet1_0", {"buffer": "64KB", "scheme": "brr"}),  # reads weights once per pass
        ("squeezenet1_0", {"buffer": "16KB", "scheme": "cascade"}),  # stripes and slices
    ],
    ids=["lbdf", "brr", "cascade"],
)
def test_the_sums_are_those_of_the_groups(network: str, options: dict[str, Any]) -> None:
    section = made(network, **options)
    report = Report([section])
    rows = report.to_records("operator")
    assert sorted(row["operator"] for row in rows) == sorted(section.plan.graph.index)
    assert all(tuple(row) == operators_table.COLUMNS for row in rows)
    for group in report.to_records():
        own = [row for row in rows if row["group"] == group["group"]]
        assert [row["operator"] for row in own] == group["ops"].split(" ")
        for name in SHARED:
            assert sum(row[name] for row in own) == group[name], (group["group"], name)
    macs = section.known_macs
    assert sum(row["macs"] for row in rows) == macs
    assert {row["fusable"] for row in rows if row["unfusable"]} <= {False}
    if section.steps is not None:
        stays = {entry.tensor for entry in section.steps.staying}
        assert {row["output"] for row in rows if row["output_place"] == "stays"} <= stays


def test_a_row_by_hand() -> None:
    plan = plan_graph(
        chain(), Options.of({"buffer": "64KB", "activation_bytes": 1, "cache": False})
    )
    row = Report([Section(plan)]).to_records("operator")[0]
    op = plan.graph.ops[0]
    (read,) = op.reads
    assert row["kind"] == op.kind
    assert row["group"] == "fusion_group_0"
    assert row["input_shapes"] == "x".join(map(str, plan.graph.tensors[read.tensor].shape))
    assert row["output_shape"] == "x".join(map(str, plan.graph.tensors[op.writes].shape))
    assert row["output_bits"] == 8
    assert row["output_place"] == "chip"
    assert row["macs"] is None or row["macs"] > 0
    assert row["dram_read_bytes"] == 2 * 8 * 8
    assert row["dram_weight_bytes"] == row["weight_bytes"] == 4 * (2 * 4 * 9 + 4)
    assert row["dram_write_bytes"] == 0


class Doubtful(torch_getfuse.FusionScheme):
    """Moves one byte more than anyone could share out."""

    name = "doubtful"

    def buffer(self, mask: int, buffer_bytes: int) -> int | None:
        return 1

    def dram(self, mask: int, buffer_bytes: int) -> torch_getfuse.Dram:
        read, write, weight = super().dram(mask, buffer_bytes)
        return torch_getfuse.Dram(read + 1, write, weight)


def test_what_cannot_be_shared_out_is_unknown() -> None:
    asked = {"scheme": Doubtful, "explainer": None, "budget": 5, "buffer": 100, "cache": False}
    plan: PartitionPlan = plan_graph(chain(), Options.of(asked))
    rows = Report([Section(plan)]).to_records("operator")
    assert {row["dram_read_bytes"] for row in rows} == {None}
    assert {row["dram_bytes"] for row in rows} == {None}
    assert all(row["dram_write_bytes"] is not None for row in rows)


def test_forms(tmp_path: Path) -> None:
    report = Report([made("squeezenet1_0", buffer="64KB")])
    rows = list(csv.DictReader(io.StringIO(report.to_csv("operator"))))
    assert len(rows) == len(report.sections[0].plan.graph)
    unfusable = [row for row in rows if row["fusable"] == "False"]
    assert unfusable
    assert all(row["unfusable"].startswith("alone it needs ") for row in unfusable)
    report.save(tmp_path / "ops.csv", by="operator")
    assert (tmp_path / "ops.csv").read_text() == report.to_csv(by="operator")
    with pytest.raises(OptionError, match=r"is for \.csv files"):
        report.save(tmp_path / "ops.md", by="operator")
    with pytest.raises(OptionError, match="did you mean 'operator'"):
        report.to_csv(by="operators")


def test_pandas() -> None:
    pytest.importorskip("pandas")
    report = Report([made("squeezenet1_0", buffer="64KB")])
    frame = report.to_pandas("operator")
    assert list(frame.columns) == list(operators_table.COLUMNS)
    assert str(frame["macs"].dtype) == "Int64"
    assert frame["dram_bytes"].sum() == report.to_dict()["totals"]["planned_bytes"]


def test_a_model_with_inputs_of_several_operators() -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) + torch.sigmoid(x)

    x = torch.zeros(1, 2, 8, 8)
    rows = torch_getfuse.report(Twice(), x, buffer="64KB").to_records("operator")
    # The input is loaded once, for the first that reads it.
    assert [row["dram_read_bytes"] for row in rows] == [512, 0, 0]
    assert rows[2]["input_shapes"] == "1x2x8x8 1x2x8x8"
