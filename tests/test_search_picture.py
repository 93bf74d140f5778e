"""The history of a search, and its picture."""

from __future__ import annotations

import pytest
from networks import operator_graph

from torch_getfuse import OptionError
from torch_getfuse.options import Options
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.planner import plan_graph
from torch_getfuse.reporting.report import Report
from torch_getfuse.reporting.search_picture import Panel, Searched, search_figure
from torch_getfuse.reporting.section import Section

MB = 1 << 20


def made(**options: object) -> PartitionPlan:
    asked = {"activation_bytes": 1, "weight_bytes": 1, "buffer": "128KB", "cache": False}
    return plan_graph(operator_graph("squeezenet1_0"), Options.of({**asked, **options}))


def test_stages_tell_their_history() -> None:
    plan = made(method="local", explainer=None, budget=200)
    (stage,) = plan.stages
    tried, reached = zip(*stage.history, strict=True)
    assert list(tried) == sorted(set(tried))
    assert list(reached) == sorted(set(reached), reverse=True)
    assert reached[-1] == stage.dram_bytes == plan.dram_bytes
    assert tried[-1] <= stage.plans == 200
    assert "history" not in plan.to_dict()["stages"][0]
    assert PartitionPlan.from_dict(plan.to_dict()) == plan


def test_steps_tell_what_the_unfusable_operators_move_too() -> None:
    plan = made(method="local", explainer=None, budget=50, scheme="cascade", buffer="4KB")
    first = plan.stages[0]
    assert first.history[-1][1] == first.dram_bytes


def test_the_picture() -> None:
    pytest.importorskip("matplotlib")
    plan = made()
    direct, exact = plan.stages
    (axes,) = Report([Section(plan)]).plot_search().axes
    drawn = {line.get_label(): line for line in axes.lines}
    assert set(drawn) >= {"direct", "exact", "optimum (proved)"}
    assert drawn["optimum (proved)"].get_ydata()[0] == plan.dram_bytes / MB
    assert drawn["direct"].get_ydata()[-1] * MB == direct.dram_bytes
    assert list(drawn["exact"].get_xdata()) == [direct.plans + exact.plans]
    assert axes.get_title() == "exact search, buffer 128 KB"
    assert "MB" in axes.get_ylabel()
    assert axes.get_xlabel() == "plans tried (direct and exact: groups)"


def test_a_panel_for_each_problem() -> None:
    pytest.importorskip("matplotlib")
    few = Panel("few", [Searched("a", [(100, 9 * MB), (200, 8 * MB)])])
    many = Panel("many", [Searched("b", [(1, 9 * MB), (999, 5 * MB)])], 4 * MB)
    one, other = search_figure([few, many]).axes
    assert (one.get_xscale(), other.get_xscale()) == ("linear", "log")
    assert [text.get_text() for text in other.get_legend().get_texts()] == [
        "b",
        "lower bound (proved)",
    ]


def test_plans_without_a_history() -> None:
    read = PartitionPlan.from_dict(made().to_dict())
    with pytest.raises(OptionError, match="comes from the plan file, which keeps no history"):
        Report([Section(read)]).plot_search()
    with pytest.raises(OptionError, match="no graph has been planned"):
        Report([]).plot_search()
