"""``price``: plans from outside, legal or not, and what they cost."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn

import torch_getfuse
from tests.brute import brute_force
from tests.cascade_brute import random_cascade
from tests.graphs import Builder, random_graph
from tests.partition.test_cascade_exact import model_of
from tests.partition.test_pins import chain
from torch_getfuse.cli.main import main
from torch_getfuse.errors import OptionError, PlanError
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.node_set import bits
from torch_getfuse.planner import plan_graph
from torch_getfuse.price_graph import price_graph


def options(buffer: int, scheme: str = "lbdf") -> Options:
    return Options(buffer=buffer, scheme=scheme, activation_bytes=1, weight_bytes=1)


def wrong(graph: OpGraph, groups: list[list[str]], buffer: int = 4096, scheme: str = "lbdf") -> str:
    made = price_graph(graph, options(buffer, scheme), groups)
    assert not made.legal
    assert made.network is None
    assert made.distance.startswith("none")
    told = [text for group in made.groups for text in group.problems]
    for text in (*made.problems, *told):
        assert text in " ".join(str(made).split())
    return "\n".join((*made.problems, *told))


CONVS = [[f"conv{2 * k}", f"act{2 * k + 1}"] for k in range(4)]


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ([["conv0", "act9"], *CONVS[1:]], r"'act9' is neither an operator .* did you mean"),
        ([CONVS[0], *CONVS], "also in group 0: conv0, act1"),
        (CONVS[1:], "2 operators in no group: conv0, act1"),
        ([CONVS[0] + CONVS[2], CONVS[1], CONVS[3]], "not connected: .* conv0 and that of conv4"),
        ([CONVS[0] + CONVS[2], CONVS[1], CONVS[3]], "not convex: .* through conv2, act3"),
        ([CONVS[0] + CONVS[2], CONVS[1], CONVS[3]], "a cycle between groups: those of"),
    ],
)
def test_what_is_wrong_is_told(groups: list[list[str]], told: str) -> None:
    text = wrong(chain(), groups)

    assert re.search(told, text), text


def test_convex_groups_that_wait_for_each_other() -> None:
    build = Builder()
    a, b = build.conv(build.input((1, 2, 4, 4)), 2), build.conv(build.input((1, 2, 4, 4)), 2)
    c, d = build.add(a, b), build.add(b, a)
    one, two = build.add(a, d), build.add(b, c)
    graph = build.graph()
    text = wrong(graph, [[a, c], [b, d], [one], [two]])
    assert "a cycle between groups: those of" in text


def test_a_group_that_is_too_big_says_by_how_much_and_of_what() -> None:
    text = wrong(chain(), [[name for group in CONVS for name in group]], 700)
    need = make_scheme("lbdf", chain(), "line", 1, 1).buffer(255, 700)
    assert need is not None
    assert f"too big: needs {need / 1024:.2f} KB" in text
    assert "the buffer of 700 B; the most is" in text


def test_an_unfusable_operator_stands_alone() -> None:
    graph = chain()
    limit = make_scheme("lbdf", graph, "line", 1, 1).buffer(1, 1 << 30)
    assert limit is not None
    assert "conv0 is unfusable" in wrong(graph, CONVS, limit)
    alone = [[op.name] for op in graph]
    assert price_graph(graph, options(limit), alone).legal
    fusable = [[op.name] for op in graph if op.kind != "conv"]
    assert price_graph(graph, options(limit), fusable).legal, "they may be left out"


def test_steps_must_stand_in_order() -> None:
    text = wrong(chain(), [CONVS[1], CONVS[0], *CONVS[2:]], scheme="cascade")
    assert "step 0 runs conv2, which must run after act1 of a later step" in text


@pytest.mark.parametrize("scheme", ["lbdf", "brr"])
def test_figures_of_legal_plans(scheme: str) -> None:
    rng, seen = Random(3), 0
    for _ in range(25):
        graph = random_graph(rng, rng.randint(2, 6), 6)
        model = make_scheme(scheme, graph, "line", 1, 1)
        evaluator = Evaluator(model, rng.randint(50, 1500))
        if evaluator.unfusable():
            continue
        least, masks = brute_force(evaluator)
        names = [[graph.ops[i].name for i in bits(mask)] for mask in masks]
        made = price_graph(graph, options(evaluator.buffer_bytes, scheme), names)
        assert made.legal
        assert made.network is not None
        assert made.network.total == least
        assert made.distance == "optimal (proved)"
        assert made.above_optimum == 0
        alone = price_graph(
            graph, options(evaluator.buffer_bytes, scheme), [[op.name] for op in graph]
        )
        assert alone.network == alone.unfused
        seen += least < alone.unfused.total
    assert seen > 3


def test_the_steps_of_an_optimum_are_priced_as_it() -> None:
    """Ways and residents are chosen anew, and are the same or as good."""
    rng, seen = Random(5), 0
    for _ in range(20):
        oracle = random_cascade(rng, rng.randint(2, 6))
        model = model_of(oracle)
        chosen = Options(
            buffer=oracle.buffer_bytes,
            scheme="cascade",
            activation_bytes=model.activation_bytes,
            weight_bytes=model.weight_bytes,
            slice_channels=model.slice_channels,
        )
        plan = plan_graph(oracle.graph, chosen)
        made = price_graph(oracle.graph, chosen, plan)
        assert made.plan is not None
        assert made.plan.dram_bytes == plan.dram_bytes
        assert made.residents_exact
        seen += bool(made.plan.resident)
    assert seen


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))


def test_public_function_and_saved_forms(net: nn.Module, tmp_path: Path) -> None:
    x = torch.zeros(1, 3, 16, 16)
    given = {"buffer": "2KB", "activation_bytes": 1, "weight_bytes": 1}
    made = torch_getfuse.price(net, (x,), [["0", "1"], ["2"]], **given)  # type: ignore[arg-type]
    assert made.legal
    for name in ("a.txt", "a.md", "a.json"):
        made.save(tmp_path / name)
        assert (tmp_path / name).read_text(encoding="utf-8").strip()
    assert json.loads((tmp_path / "a.json").read_text()) == made.to_dict()
    assert made.plan is not None
    made.plan.save(tmp_path / "plan.json")
    again = torch_getfuse.price(net, (x,), tmp_path / "plan.json", **given)  # type: ignore[arg-type]
    assert again.network == made.network
    with pytest.raises(OptionError, match="entry 0 is '0', not a list"):
        torch_getfuse.price(net, (x,), ["0"], **given)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="another graph"):
        torch_getfuse.price(net, (x[..., 1:],), made.plan, **given)  # type: ignore[arg-type]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "groups.json"
    argv = ["price", "tests.cli_models:small", "--groups", str(file), "--input", "1x3x16x16"]
    file.write_text(json.dumps([["nothing"]]))
    assert main(argv) == 1
    assert "not a legal plan" in capsys.readouterr().out
    file.write_text("{")
    assert main(argv) == 2
    assert "torch-getfuse: " in capsys.readouterr().err


def test_a_module_that_is_called_twice_names_its_first_operator() -> None:
    """Names of reports and plan files are those of operators."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.act = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.b(self.act(self.a(x))))  # type: ignore[no-any-return]

    x = torch.zeros(1, 3, 8, 8)
    assert torch_getfuse.price(Twice(), (x,), [["a", "act"], ["b", "act_1"]]).legal
