"""What Jupyter shows of results, and their one-line ``repr``."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import nn

import torch_getfuse
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.reporting import notebook

X = torch.zeros(2, 3, 16, 16)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 256, 100)).eval()


OPTIONS: dict[str, Any] = {
    "buffer": "4KB",
    "activation_bytes": 1,
    "weight_bytes": 1,
    "cache": False,
}


@pytest.fixture(scope="module")
def plan() -> PartitionPlan:
    return torch_getfuse.plan(small(), (X,), **OPTIONS)


@pytest.fixture(scope="module")
def results(plan: PartitionPlan) -> dict[str, Any]:
    model = small()
    return {
        "plan": plan,
        "steps": torch_getfuse.plan(model, (X,), scheme="cascade", **OPTIONS),
        "report": torch_getfuse.report(model, X, **OPTIONS),
        "explanation": torch_getfuse.explain(
            model, (X,), ["0", "2"], ["all"], **{**OPTIONS, "buffer": 600}
        ),
        "price": torch_getfuse.price(model, (X,), [["0", "1"], ["2", "3"]], **OPTIONS),
        "illegal": torch_getfuse.price(model, (X,), [["0", "1"]], **OPTIONS),
        "sweep": torch_getfuse.sweep(model, (X,), buffers=["2KB", "4KB"], n_jobs=1),
        "ledger": torch_getfuse.run_counted(model, (X,), plan)[1],
    }


class _Page(HTMLParser):
    """Tags are balanced; nothing is fetched, and nothing runs."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag not in ("script", "link", "img", "style", "iframe"), tag
        assert not {name for name, _ in attrs} - {"style", "open"}
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> str:
    parser = _Page()
    parser.feed(page)
    assert not parser.open
    return parser.text


NAMES = ("plan", "steps", "report", "explanation", "price", "illegal", "sweep", "ledger")


@pytest.mark.parametrize("name", NAMES)
def test_cards(results: dict[str, Any], name: str) -> None:
    made = results[name]
    page = made._repr_html_()
    text = read(page)
    assert repr(made) in text, "the title is the repr"
    assert "<table" in page
    colours = set(re.findall(r"(?:color|background)[^;\"]*", page))
    assert colours == {"color:inherit"}, "the theme's colours, light or dark"


def test_reprs(results: dict[str, Any]) -> None:
    told = {name: repr(made) for name, made in results.items()}
    assert max(map(len, told.values())) <= 100
    assert not any("\n" in text for text in told.values())
    assert told["plan"] == "PartitionPlan(1 group, 3.54 KB and 1 unfusable, optimal, 4 KB)"
    assert told["steps"].startswith("PartitionPlan(")
    assert "step" in told["steps"]
    assert told["report"].startswith("Report(1 group, ")
    assert re.fullmatch(
        r"Explanation\(3 operators, [\d.]+ K?B too much, 600 B\)", told["explanation"]
    )
    assert "above the optimum (proved)" in told["price"]
    assert told["illegal"] == "Appraisal(1 group, not legal, 4 KB)"
    assert told["sweep"] == "Sweep(2 points: 2 planned, 0 kept from before, 0 failed)"
    assert told["ledger"] == "Ledger(1 group, equal to the plan, 2 samples)"


def test_a_plan_of_which_only_a_bound_is_known(plan: PartitionPlan) -> None:
    near = replace(plan, proof="bound", lower_bound_bytes=plan.dram_bytes // 2)
    assert "at most 100.0% above the optimum" in repr(near)
    assert "nothing proved" in repr(replace(plan, proof=None, lower_bound_bytes=0))


def test_names_are_escaped(plan: PartitionPlan) -> None:
    name, odd = plan.graph.ops[0].name, "<script>&amp;"

    def renamed(form: Any) -> Any:
        if isinstance(form, dict):
            return {renamed(key): renamed(value) for key, value in form.items()}
        if isinstance(form, list):
            return [renamed(value) for value in form]
        return odd if form == name else form

    form = renamed(plan.to_dict())
    form["graph"]["fingerprint"] = OpGraph.from_dict(form["graph"]).fingerprint
    made = PartitionPlan.from_dict(form)
    assert odd in read(made._repr_html_())
    assert odd in read(torch_getfuse.report(made)._repr_html_())


def test_parts_fold_under_their_summaries() -> None:
    parts = [notebook.summary("one"), "a", "b", notebook.summary("two"), "c"]
    page = "".join(notebook.folded(["before", *parts], opened=1))
    assert page.startswith("before<details open")
    assert page.count("<details") == page.count("</details>") == 2
    assert page.count("<details open") == 1
    assert notebook.folded(["alone"]) == ["alone"]


def test_long_tables_of_plans_are_folded(plan: PartitionPlan) -> None:
    assert "<details open" in plan._repr_html_()
    long = replace(plan, groups=plan.groups * (notebook.SHORT + 1))
    assert "<details open" not in long._repr_html_()
