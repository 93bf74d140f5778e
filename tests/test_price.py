"""``price``: plans from outside, legal or not, and what they cost."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

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
from torch_getfuse.errors import GetfuseError, OptionError, PlanError
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.node_set import bits
from torch_getfuse.planner import plan_graph
from torch_getfuse.price_graph import price_graph, read_groups


def options(buffer: int, scheme: str = "lbdf") -> dict[str, object]:
    return {"buffer": buffer, "scheme": scheme, "activation_bytes": 1, "weight_bytes": 1}


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
        ([[*CONVS[0], CONVS[0][0]], *CONVS[1:]], "named twice in it: conv0"),
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


def test_under_cascade_groups_are_steps() -> None:
    text = wrong(chain(), [CONVS[0], CONVS[0] + CONVS[2]], scheme="cascade")
    assert "4 operators in no step: conv2" in text
    assert "also in step 0: conv0, act1" in text
    assert "group" not in text
    made = price_graph(chain(), options(4096, "cascade"), CONVS)
    assert re.search(r"our plan +1 step; ", str(made))
    assert "group" not in str(made)
    assert re.search(r"our plan +1 group; ", str(price_graph(chain(), options(4096), CONVS)))


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
        chosen: dict[str, object] = {
            "buffer": oracle.buffer_bytes,
            "scheme": "cascade",
            "activation_bytes": model.activation_bytes,
            "weight_bytes": model.weight_bytes,
            "slice_channels": model.slice_channels,
        }
        plan = plan_graph(oracle.graph, Options.of(chosen))
        made = price_graph(oracle.graph, chosen if seen % 2 else {}, plan)
        assert not made.changed
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
    assert "torch-getfuse: groups " in capsys.readouterr().err
    plan = ["plan", argv[1], *argv[4:], "--buffer", "3KB", "--activation-bytes", "0.5"]
    assert main([*plan, "-o", str(file)]) == 0
    capsys.readouterr()
    for given, changed in (
        ([], {}),
        (["--buffer", "2KB"], {"buffer": {"plan": 3072, "used": 2048}}),
    ):
        code = main([*argv, "--json", *given])
        form = json.loads(capsys.readouterr().out)
        assert code == (0 if form["legal"] else 1)
        assert (form["activation_bytes"], form["changed"]) == (0.5, changed)


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


HALF = {"buffer": 700, "activation_bytes": 0.5, "weight_bytes": 0, "align_channels": 8}


def test_a_saved_plan_is_judged_by_its_own_options(tmp_path: Path) -> None:
    """Cost model, buffer, widths, alignment and pins are those of the file."""
    pinned = {"split_before": ["conv4"], "together": [["conv0", "act1"]]}
    for scheme in ("lbdf", "brr", "cascade"):
        asked = {**HALF, **pinned, "scheme": scheme, "slice_channels": 4, "residency": False}
        plan = plan_graph(chain(), Options.of(asked))
        plan.save(tmp_path / "plan.json")
        made = price_graph(chain(), {}, read_groups(tmp_path / "plan.json"))
        assert made.plan is not None
        assert made.plan.dram_bytes == plan.dram_bytes
        assert (made.options_of, made.changed) == ("the priced plan", {})
        kept = ("scheme", "buffer_bytes", "weight_bytes", "align_channels", *pinned)
        assert [getattr(made.best, n) for n in kept] == [getattr(plan, n) for n in kept]
        assert made.best.activation_bytes == 0.5
        if scheme == "cascade":
            assert (made.best.residency, made.best.slice_channels) == (False, 4)
            assert re.search(r"our plan +\d+ steps?;", str(made))


def test_widths_that_tensors_state_are_those_of_the_plan() -> None:
    """Also where the model has others, as a float model beside its quantised form."""
    graph = chain()
    tensors = {
        name: replace(tensor, bits=8 if k % 2 else 4)
        for k, (name, tensor) in enumerate(graph.tensors.items())
    }
    ops = tuple(
        replace(op, weight_bytes=op.weight_elements // 2 + k) if op.weight_elements else op
        for k, op in enumerate(graph.ops)
    )
    mixed = replace(graph, tensors=tensors, ops=ops)
    plan = plan_graph(mixed, Options(buffer=900))
    assert (plan.activation_bytes, plan.weight_bytes) == (None, None)
    made = price_graph(graph, {}, plan)
    assert made.network == made.ours
    assert made.ours.total == plan.dram_bytes
    explicit = price_graph(graph, {"activation_bytes": None, "weight_bytes": None}, plan)
    assert explicit.best.activation_bytes == explicit.best.weight_bytes == 4
    swapped = {name: replace(t, bits=12 - (t.bits or 0)) for name, t in tensors.items()}
    other = plan_graph(replace(mixed, tensors=swapped), Options(buffer=900))
    with pytest.raises(OptionError, match="tensors are stored in other widths"):
        price_graph(graph, {"plan": other}, plan)
    heavier = tuple(replace(op, weight_bytes=2 * (op.weight_bytes or 0)) for op in ops)
    other = plan_graph(replace(mixed, ops=heavier), Options(buffer=900))
    with pytest.raises(OptionError, match="weights are stored in other widths"):
        price_graph(graph, {"plan": other}, plan)


def test_what_is_given_instead_of_a_plans_own_options_is_told() -> None:
    plan = plan_graph(chain(), Options.of(HALF))
    made = price_graph(chain(), {"buffer": "2KB", "weight_bytes": 1}, plan)
    assert made.changed == {"buffer": (700, 2048), "weight_bytes": (0, 1)}
    assert made.best.activation_bytes == 0.5
    told = "those of the priced plan, but for buffer 2 KB (there 700 B), weight_bytes 1 (there 0)"
    assert told in " ".join(str(made).split())
    assert made.to_dict()["changed"]["buffer"] == {"plan": 700, "used": 2048}
    chip = price_graph(chain(), {"accelerator": "ethos-u85-128"}, plan)
    assert set(chip.changed) == {"buffer", "activation_bytes", "weight_bytes", "align_channels"}
    assert "assumptions accelerator ethos-u85-128, scheme lbdf, buf" in " ".join(str(chip).split())
    cascade = price_graph(chain(), {"scheme": "cascade"}, plan)
    assert cascade.changed == {"scheme": ("lbdf", "cascade")}


def test_one_table_has_one_set_of_options() -> None:
    ours = plan_graph(chain(), Options.of(HALF))
    made = price_graph(chain(), {"plan": ours}, [[op.name] for op in chain()])
    assert (made.options_of, made.best) == ("plan=", ours)
    assert made.unfused.total == price_graph(chain(), HALF, CONVS).unfused.total
    with pytest.raises(OptionError, match="buffer 700 B there, 800 B here; give the same ones, or"):
        price_graph(chain(), {"plan": ours, "buffer": 800}, CONVS)
    other = plan_graph(chain(), Options.of({**HALF, "keep": ["conv0"]}))
    with pytest.raises(OptionError, match=r"keep \['conv0'\] there, \[\] here"):
        price_graph(chain(), {"plan": other}, ours)


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ([], "groups is empty; give a list of lists of operator names, such as"),
        (None, "groups is None; give a list of lists"),
        ({"a": ["b"]}, "groups is of type dict; give a list of lists"),
        ([[]], "entry 0 is an empty list; name its operators"),
        ([[""]], "entry 0 holds '', which is no name"),
        ([[5]], "entry 0 holds 5, which is no name"),
    ],
)
def test_what_are_no_groups(groups: Any, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        read_groups(groups)


def test_messages_of_files_name_them(tmp_path: Path) -> None:
    files = {
        "bad.json": ("{", "it is damaged or truncated: .*; write it again"),
        "none.json": (None, "it cannot be read: No such file"),
        "other.json": ('{"a": 1}', "what it holds is of type dict; give a list"),
        "plan.json": ('{"schema_version": 2}', "the plan file is damaged: the file has no 'graph'"),
    }
    for name, (text, told) in files.items():
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        with pytest.raises(GetfuseError, match=f"^groups '{re.escape(str(path))}': {told}"):
            read_groups(path)
    with pytest.raises(PlanError, match=f"^groups '{re.escape(str(tmp_path))}': it cannot be read"):
        read_groups(tmp_path)
