"""benchmarks/border_ranking: labels of proved plans, training, orders of edges, and the page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from graphs import Builder, random_graph

from benchmarks.border_ranking import compare, data, findings, graphs, page, rankers, train
from benchmarks.border_ranking.model import EdgeTensors, auc, border_logits, fit, fit_edges, pooled
from benchmarks.json_lines import rows_in
from torch_getfuse.ir import Window
from torch_getfuse.partition.merging import path_around
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.search.recursive_split import all_edges, group_edges
from torch_getfuse.partition.work import OutOfWork

CELLS = "cells-0"


def problem_of(number: int = 0, kb: int = 64) -> FusionProblem:
    return data.problem_of(graphs.random_cells(number), kb)


def rows_of(count: int) -> list[data.Row]:
    """Proved rows of the first random cells, the last two for validation and test."""
    parts = [*["train"] * (count - 2), "validation", "test"]
    specs = [f"cells-{number}" for number in range(count)]
    return [
        {"graph": spec, "part": part, "kb": 128, **data.proved(graphs.load(spec), 128)}
        for spec, part in zip(specs, parts, strict=True)
    ]


@pytest.fixture(scope="module")
def rows() -> list[data.Row]:
    return rows_of(5)


def test_groups_of_a_proved_plan_cost_what_was_proved() -> None:
    row = data.proved(graphs.random_cells(0), 64)
    assert row["proof"] == "optimal"
    masks: dict[int, int] = {}
    for i, group in enumerate(row["groups"]):
        masks[group] = masks.get(group, 0) | 1 << i
    problem = problem_of()
    assert masks.pop(-1, 0) == problem.unfusable
    assert problem.legal(list(masks.values()))
    assert problem.cost(list(masks.values())) == row["dram_bytes"]


def test_a_border_is_an_edge_between_two_groups() -> None:
    assert data.labels([(0, 1), (1, 2), (0, 2)], [0, 0, 1]) == [False, True, True]


def test_edges_inside_a_block_or_at_an_unfusable_operator_are_not_free() -> None:
    build = Builder()
    first = build.act(build.conv(build.input((1, 4, 8, 8)), 4, 3))
    build.conv(build.conv(first, 4, 3), 400, 3)
    problem = data.problem_of(build.graph(), 4)
    assert problem.unfusable == 1 << 3
    assert group_edges(problem.graph, problem.fusable) == [(0, 1), (1, 2)]
    assert data.free_edges(problem) == [(1, 2)]


def test_random_cells_are_drawn_by_their_number() -> None:
    assert graphs.random_cells(3) == graphs.random_cells(3)
    assert graphs.random_cells(3) != graphs.random_cells(4)
    for number in range(6):
        graphs.random_cells(number).verify()


def test_no_family_stands_in_two_parts_or_is_trained_on_and_compared() -> None:
    learnt = {train.family(f"torchvision:{name}") for name in graphs.TRAIN}
    stopped = {train.family(f"torchvision:{name}") for name in graphs.VALIDATION}
    tested = {train.family(f"torchvision:{name}") for name in graphs.TEST}
    compared = {train.family(spec) for spec, _ in graphs.WIDE}
    assert tested | {"generated"} == set(train.FAMILIES)
    assert not learnt & stopped
    assert not (learnt | stopped) & (tested | compared)


def test_synthetic_networks_of_the_wide_kinds_are_left_out() -> None:
    # Number 0 has dense blocks alone, number 4 shuffles alone.
    assert graphs.load("synthetic-0") is None
    assert graphs.load("synthetic-4") is not None


def test_build_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plans.jsonl"
    monkeypatch.setattr(data, "proved_specs", lambda: [("train", CELLS)])
    data.build(path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [json.loads(line) for line in lines]
    assert [row["kb"] for row in kept] == list(data.FEW_KB["cells"])
    path.write_text("".join(lines[:-1]), encoding="utf-8")
    again = {"proof": "again", "seconds": 0}
    monkeypatch.setattr(data, "proved", lambda graph, kb: again)
    data.build(path)
    added = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert added[:-1] == kept[:-1]
    assert added[-1] == {"graph": CELLS, "part": "train", "kb": kept[-1]["kb"], **again}


def test_tensors_name_the_free_edges() -> None:
    problem = problem_of()
    tensors = EdgeTensors.of(problem)
    assert list(tensors.edges) == data.free_edges(problem)
    edges = group_edges(problem.graph, problem.fusable)
    assert tensors.edge_index.shape == (2, len(edges))
    assert [edges[k] for k in tensors.free.tolist()] == list(tensors.edges)


def test_training_is_deterministic_and_learns(rows: list[data.Row]) -> None:
    found = train.samples_of(rows)
    model, curve = fit(found["train"], found["validation"], 0, epochs=8)
    again, _ = fit(found["train"], found["validation"], 0, epochs=8)
    other, _ = fit(found["train"], found["validation"], 1, epochs=8)
    tensors = found["test"][0].tensors
    assert torch.equal(border_logits(model, tensors), border_logits(again, tensors))
    assert not torch.equal(border_logits(model, tensors), border_logits(other, tensors))
    assert pooled(model, found["validation"])["auc"] == max(curve)
    for fitted in (model, fit_edges(found["train"])):
        assert pooled(fitted, found["train"])["auc"] > 0.7


def test_samples_of_another_graph_are_refused(rows: list[data.Row]) -> None:
    with pytest.raises(ValueError, match="not the graph that was planned"):
        train.samples_of([{**rows[0], "operators": 3}])


def test_area_under_the_curve() -> None:
    y = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert auc(torch.tensor([0.1, 0.9, 0.2, 0.8]), y) == 1
    assert auc(torch.tensor([0.9, 0.1, 0.8, 0.2]), y) == 0
    assert auc(torch.zeros(4), y) == 0.5
    assert auc(torch.tensor([0.1, 0.2, 0.3, 0.4]), y) == 0.75
    assert math.isnan(auc(torch.zeros(2), torch.ones(2)))


def test_a_ranker_names_the_likeliest_borders_of_the_group() -> None:
    problem = problem_of()
    edges = group_edges(problem.graph, problem.fusable)
    scores = {edge: float(k % 7) for k, edge in enumerate(edges[:-3])}
    ranked = rankers.ScoreRanker(problem, scores, 0.5)(problem.fusable)
    assert len(ranked) == round(len(edges) / 2)
    assert [score for _, score in ranked] == sorted(scores.values(), reverse=True)[: len(ranked)]
    assert all(scores[edge] == score for edge, score in ranked)
    i, j = edges[0]
    alone = rankers.ScoreRanker(problem, {}, 0.1)(1 << i | 1 << j)
    assert [edge for edge, _ in alone] == [(i, j)]


def test_any_order_builds_a_legal_plan() -> None:
    rng = Random(0)
    for _ in range(60):
        problem = data.problem_of(random_graph(rng, operators=9), 1)
        order = group_edges(problem.graph, problem.fusable)
        rng.shuffle(order)
        assert problem.legal(rankers.built(problem, order))


@pytest.mark.parametrize("kb", [1, 64])
def test_two_groups_around_another_are_not_joined(kb: int) -> None:
    """At 1 KB the convolution between is unfusable, at 64 KB its edges come last."""
    build = Builder()
    first = build.conv(build.input((1, 1, 4, 4)), 1)
    between = build.op("conv", [(first, Window.identity())], (1, 1, 4, 4), weights=2000)
    build.add(between, first)
    problem = data.problem_of(build.graph(), kb)
    assert problem.unfusable == (0b010 if kb == 1 else 0)
    home = {i: 1 << i for i in range(3) if not problem.unfusable >> i & 1}
    assert path_around(problem, home, 0b001, 0b100)
    assert problem.legal(rankers.built(problem, [(0, 2)]))
    if kb == 64:
        assert not path_around(problem, home, 0b001, 0b010)


def test_an_order_that_begins_with_the_borders_builds_the_optimum(rows: list[data.Row]) -> None:
    row = rows[0]
    problem = data.problem_of(graphs.load(row["graph"]), row["kb"])
    edges = data.free_edges(problem)
    borders = dict(zip(edges, data.labels(edges, row["groups"]), strict=True))
    order = sorted(edges, key=lambda edge: not borders[edge])
    assert problem.cost(rankers.built(problem, order)) == row["dram_bytes"]
    assert problem.cost(rankers.built(problem, order[::-1])) > row["dram_bytes"]


def test_what_is_built_when_time_is_up_is_legal() -> None:
    work = compare.ClockWork(-1.0)
    problem = data.problem_of(graphs.random_cells(0), 64, work)
    with work.within(1.0):
        plan = rankers.built(problem, group_edges(problem.graph, problem.fusable))
    with work.finishing():
        assert problem.legal(plan)


def test_clock_work_ends_by_cpu_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(compare, "clock", lambda: now)
    work = compare.ClockWork(10.0)
    with work.within(20.0):
        work.add(10**12)
        now = 109.9
        work.check()
        now = 110.0
        with work.finishing():
            work.check()
        with pytest.raises(OutOfWork, match="time limit"):
            work.check()
    work.check()  # no limit outside
    assert work.taken == 10


def test_searches_end_with_legal_plans_and_their_costs() -> None:
    graph = graphs.random_cells(0)
    split = compare.split_and_local(graph, 64, lambda p: all_edges(p.graph), 0, seconds=0.4)
    assert split["plans"] >= 1
    assert split["dram_bytes"] == split["history"][-1][1] <= split["direct_bytes"]
    order = compare.built_and_local(graph, 64, lambda p: [], 0, seconds=0.4)
    assert order["plans"] >= 1
    assert order["dram_bytes"] <= order["built_bytes"]
    optimum = data.proved(graph, 64)["dram_bytes"]
    assert min(split["dram_bytes"], order["dram_bytes"]) >= optimum


def test_the_share_with_the_least_gap_is_used() -> None:
    rows = [
        {"what": "share", "ranker": "gnn", "share": share, "mean_gap": gap}
        for share, gap in ((0.5, 2.0), (0.25, 1.0), (0.125, 1.0))
    ]
    assert compare.chosen_shares(rows) == {"gnn": 0.25}


# -- the page -------------------------------------------------------------------------------------


def compared(gnn: int) -> list[dict[str, Any]]:
    """Rows of one case whose bound is 100 B; the GNN ends at ``gnn`` B, all others at 120."""
    spec, kb = graphs.WIDE[0]
    case = {"graph": spec, "kb": kb, "seed": 0}
    rows: list[dict[str, Any]] = [
        {"what": "share", "ranker": name, "share": 0.5, "graphs": 1, "mean_gap": 1.0}
        for name in rankers.SPLITTERS
    ]
    default = {"what": "default", "ranker": "", "operators": 9, "seconds": 1.0}
    rows.append({**case, **default, "dram_bytes": 110, "lower_bound_bytes": 100})
    for name in rankers.SPLITTERS:
        end = gnn if name == "gnn" else 120
        history = [(1, 130), (4, end)]
        rows.append(
            {**case, "what": "split", "ranker": name, "ranking": 0.1, "direct_stopped": "",
             "direct_bytes": 130, "dram_bytes": end, "plans": 3 if name == "all" else 5,
             "history": history}
        )  # fmt: skip
    return rows


def test_the_page_says_who_is_better() -> None:
    runs = findings.Runs(compared(105))
    gnn, other = ("split", "gnn"), ("split", "all")
    found = findings.beside(runs, gnn, other)
    assert found.text.startswith("**better**: less DRAM access in 1 of 1 cases, more in 0; -12.5 %")
    assert findings.beside(runs, other, gnn).word == "worse"
    assert findings.beside(runs, gnn, ("default",)).word == "better"
    assert findings.beside(findings.Runs(compared(120)), gnn, other).word == "equal"
    assert findings.beside(findings.Runs(compared(115)), gnn, ("default",)).word == "worse"
    assert findings.beside(runs, ("built", "gnn"), other).word == "not measured"


def test_equal_plans_are_those_that_every_run_got_to() -> None:
    runs = findings.Runs(compared(105))
    case = graphs.WIDE[0]
    assert runs.fewest(case) == 3
    assert runs.at(case, "gnn", 3) == 130
    assert runs.at(case, "gnn", 4) == 105


def test_the_page_is_written_from_rows(rows: list[data.Row], tmp_path: Path) -> None:
    path = tmp_path / "plans.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    trained = train.train(tmp_path, epochs=1)
    assert train.load_gnn(tmp_path, 0).state_dict().keys()
    text = page.page([*trained, *compared(105)])
    assert "5 of 5 that were asked for" in text
    assert "the GNN beats all, random, edge, the default planner. As" in text
    assert "| nasnetalarge, 256 KB | 9" in text
    line = next(line for line in text.splitlines() if "256 KB | 9" in line)
    assert [cell.strip() for cell in line.split("|")[4:-1]] == [
        "10.00", *["30.00"] * 4, *["20.00"] * 3, "5.00",
    ]  # fmt: skip


def test_the_page_in_the_repository_is_that_of_its_rows() -> None:
    path = Path(__file__).resolve().parents[1] / "docs" / "border-ranking.md"
    assert path.read_text(encoding="utf-8") == page.page(list(rows_in(path.with_suffix(".jsonl"))))
