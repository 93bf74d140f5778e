"""Plans: legality, recomputed figures, the file form, and everything that can be wrong with one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from tests.graphs import Builder, random_graph
from torch_getfuse.errors import PlanError
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options
from torch_getfuse.partition.fusion_group import FusionGroup
from torch_getfuse.partition.plan import PartitionPlan, load_plan
from torch_getfuse.planner import plan_graph


def diamond() -> OpGraph:
    build = Builder()
    stem = build.conv(build.input((1, 4, 8, 8)), 4)
    build.add(build.conv(stem, 4, kernel=3), build.conv(stem, 4))
    return build.graph()


def planned(buffer: int = 600) -> PartitionPlan:
    options = Options(buffer=buffer, activation_bytes=1, weight_bytes=1)
    return plan_graph(diamond(), options)


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = planned()
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").verify() == plan
    assert json.loads((tmp_path / "plan.json").read_text())["dram_bytes"] == plan.dram_bytes


def test_random_plans_survive_their_files() -> None:
    rng = Random(3)
    for _ in range(40):
        graph = random_graph(rng, 7, 8)
        options = Options(buffer=rng.randint(20, 400), activation_bytes=2, weight_bytes=1)
        plan = plan_graph(graph, options)
        assert PartitionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))).verify() == plan


def change(plan: PartitionPlan, k: int, **changes: object) -> PartitionPlan:
    groups = list(plan.groups)
    groups[k] = replace(groups[k], **changes)  # type: ignore[arg-type]
    return replace(plan, groups=tuple(groups))


def without_proof(plan: PartitionPlan, *groups: tuple[str, ...]) -> PartitionPlan:
    records = tuple(FusionGroup(ops, 1, 0, 0, 0) for ops in groups)
    return replace(plan, groups=records, proof=None, lower_bound_bytes=0)


def test_every_rule_of_a_legal_plan() -> None:
    plan = planned(10_000)
    assert [group.ops for group in plan.groups] == [("conv0", "conv1", "conv2", "add3")]
    with pytest.raises(PlanError, match="states 1 B of buffer"):
        change(plan, 0, buffer_bytes=1).verify()
    with pytest.raises(PlanError, match="not below the buffer of 300 B"):
        replace(plan, buffer_bytes=300).verify()
    with pytest.raises(PlanError, match="1 operators stand in no group: add3"):
        without_proof(plan, ("conv0", "conv1", "conv2")).verify()
    with pytest.raises(PlanError, match="'conv0' stands in fusion group 1 and a second time"):
        without_proof(plan, ("conv0", "conv1", "conv2", "add3"), ("conv0",)).verify()
    with pytest.raises(PlanError, match="cycle"):
        without_proof(plan, ("conv0", "conv1", "add3"), ("conv2",)).verify()
    with pytest.raises(PlanError, match="not connected"):
        without_proof(plan, ("conv0",), ("conv1", "conv2"), ("add3",)).verify()
    with pytest.raises(PlanError, match="'other', which its graph has not"):
        without_proof(plan, ("other",)).verify()
    scheme = plan.make_scheme()
    alone = tuple(
        FusionGroup((op.name,), scheme.buffer(1 << i, 0) or 0, *scheme.dram(1 << i, 0))
        for i, op in enumerate(plan.graph)
        if i
    )
    claimed = replace(without_proof(plan), groups=alone, unfusable=("conv0",))
    with pytest.raises(PlanError, match="'conv0' is called unfusable but needs only"):
        claimed.verify()
    with pytest.raises(PlanError, match="lower bound"):
        replace(plan, lower_bound_bytes=plan.dram_bytes + 1, proof=None).verify()
    with pytest.raises(PlanError, match="called optimal"):
        replace(plan, lower_bound_bytes=1).verify()


def test_a_plan_of_another_graph_says_where_they_differ() -> None:
    build = Builder()
    stem = build.conv(build.input((1, 4, 8, 8)), 4)
    build.add(build.conv(stem, 4, kernel=3), build.conv(stem, 4, kernel=3))
    with pytest.raises(PlanError, match=r"another graph .*first difference: conv2 \(conv\)"):
        planned().check_graph(build.graph())


def damage(form: dict[str, object], **changes: object) -> dict[str, object]:
    return {**form, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 3}, "schema_version is 3"),
        ({"dram_bytes": 1}, "its groups add up to"),
        ({"groups": 3}, "damaged"),
        ({"buffer_bytes": "many"}, "damaged"),
        ({"proof": "surely"}, "unknown proof"),
        ({"graph": {"ops": []}}, "damaged: graph has no 'tensors'"),
    ],
)
def test_damaged_files_are_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(damage(planned().to_dict(), **changes)))
    with pytest.raises(PlanError, match=message):
        load_plan(path)


def test_truncated_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    planned().save(path)
    path.write_text(path.read_text()[:-200])
    with pytest.raises(PlanError, match="damaged or truncated"):
        load_plan(path)
    with pytest.raises(PlanError, match="cannot be read: No such file"):
        load_plan(tmp_path / "none.json")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="not a text file"):
        load_plan(path)


def test_an_edited_graph_no_longer_has_its_fingerprint() -> None:
    form = planned().to_dict()
    form["graph"]["ops"][0]["weight_elements"] = 1
    with pytest.raises(PlanError, match="fingerprint"):
        PartitionPlan.from_dict(form)


def test_same_inputs_same_plan() -> None:
    one, other = planned().to_dict(), planned().to_dict()
    for plan in (one, other):
        plan["stages"] = [{**stage, "seconds": 0} for stage in plan["stages"]]
    assert one == other
