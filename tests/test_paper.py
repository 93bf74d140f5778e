"""benchmarks/paper.py in its smallest mode: rows, going on after a kill, verdicts from rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import paper
from benchmarks.reproduction import execute, provenance, published
from benchmarks.reproduction.claims import FAILS, HOLDS, OPEN, Claim, own_claims, paper_claims
from benchmarks.reproduction.journal import Journal
from benchmarks.reproduction.onnx_operators import write_out
from benchmarks.reproduction.plain import EDITS, PositionSplit, plain_local_search
from benchmarks.reproduction.requests import (
    CONTROLS,
    MODES,
    Mode,
    Request,
    depends_on,
    key_of,
    requests,
)
from benchmarks.reproduction.results import Results
from tests.graphs import random_graph
from torch_getfuse.backend.capture.capture import capture_model
from torch_getfuse.explain.sampling import Sample
from torch_getfuse.explain.training.data import ShardRequest
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.node_set import bits, topological_order
from torch_getfuse.partition.problem import FusionProblem

SMALLEST = MODES["smallest"]
CLOCK = ("seconds", "wall", "machine")
ROOT = Path(__file__).resolve().parents[1]


def figures(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows without what the clock says."""
    return {k: {n: v for n, v in row.items() if n not in CLOCK} for k, row in rows.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rows and the page of the smallest mode."""
    place = tmp_path_factory.mktemp("paper")
    assert paper.main(["smallest", "--folder", str(place)]) == 0
    return place


def test_the_smallest_mode_gives_every_row(folder: Path) -> None:
    rows = Journal(folder / "smallest.jsonl").rows
    wanted = requests(SMALLEST)
    assert len(rows) == len(wanted) > 15
    optimum = next(row for row in rows.values() if row["kind"] == "optimum")["dram_bytes"]
    for row in rows.values():
        assert row["dram_bytes"] >= optimum > 0
        if row["kind"] == "search":
            assert row["plans"] == row["budget"]
            assert row["history"][-1][1] == row["dram_bytes"]
            assert row["max_buffer_bytes"] < 128 * 1024
            assert (row["attempts"] > 0) == (row["explainer"] != "none")
            assert row["rectified"] <= row["attempts"]


def test_the_page_holds_the_figures_of_the_rows(folder: Path) -> None:
    page = (folder / "smallest.md").read_text(encoding="utf-8")
    rows = Journal(folder / "smallest.jsonl").rows.values()
    best = {
        row["search"]: row["dram_bytes"] / 1e6
        for row in rows
        if row["kind"] == "search" and row["explainer"] == "none" and row["budget"] == 20
    }
    for search in ("plain", "local", "random"):
        assert f"{best[search]:.3f} MB" in page
    assert "auto never worse than any run" in page
    assert (folder / "smallest" / "ratios.svg").stat().st_size < 60_000
    cells = (folder / "smallest" / "cells.csv").read_text(encoding="utf-8").splitlines()
    assert len(cells) == 1 + 3 * len(SMALLEST.explainers)


def test_nothing_is_run_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "execute", None)
    before = (folder / "smallest.jsonl").read_bytes()
    assert paper.main(["smallest", "--folder", str(folder)]) == 0
    assert (folder / "smallest.jsonl").read_bytes() == before


def test_a_killed_run_goes_on_where_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    arguments = ["smallest", "--folder", str(folder), "--rows", str(rows)]
    command = [sys.executable, "-m", "benchmarks.paper", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as killed:
        while not rows.exists() or rows.read_bytes().count(b"\n") < 3:
            assert killed.poll() is None, "it ended before its third row"
            time.sleep(0.01)
        os.kill(killed.pid, signal.SIGKILL)
    done = Journal(rows).rows
    assert len(done) >= 3
    # What a kill in the middle of a write leaves behind.
    with rows.open("a", encoding="utf-8") as file:
        file.write('{"key": "half a li')
    ran = []
    real = paper.execute
    monkeypatch.setattr(paper, "execute", lambda r, f: ran.append(r) or real(r, f))
    assert paper.main(arguments) == 0
    assert len(ran) == len(requests(SMALLEST)) - len(done)
    whole = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert len(whole) == len({row["key"] for row in whole}) == len(requests(SMALLEST))
    # The same figures as the run that was never stopped.
    assert figures(Journal(rows).rows) == figures(Journal(folder / "smallest.jsonl").rows)


def test_a_failed_run_is_told_and_tried_again(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = paper.execute

    def broken(request: Request, place: Path) -> dict[str, Any]:
        if request.kind == "auto":
            raise RuntimeError("out of coffee")
        return real(request, place)

    arguments = ["smallest", "--folder", str(folder), "--rows", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr(paper, "execute", broken)
    assert paper.main(arguments) == 1
    assert "out of coffee" in capsys.readouterr().err
    assert len(Journal(tmp_path / "rows.jsonl").rows) == len(requests(SMALLEST)) - 1
    assert OPEN in (tmp_path / "rows.md").read_text(encoding="utf-8")
    monkeypatch.setattr(paper, "execute", real)
    assert paper.main(arguments) == 0


def test_a_line_that_is_no_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("[1, 2]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: not a row"):
        Journal(path)


# -- keys -----------------------------------------------------------------------------------


def test_new_weights_run_only_what_asks_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys() -> dict[str, str]:
        return {
            name: key_of(request, depends_on(request, "graph"))
            for name in ("none", "random", "rgexplainer", "gnnexplainer")
            for request in [Request("search", "net", search="local", explainer=name)]
        }

    before = keys()
    real = provenance.weights_digest

    def retrained(scheme: str, granularity: str, *models: str) -> str:
        return real(scheme, granularity, *models) + ("new" if "rg" in models else "")

    monkeypatch.setattr(provenance, "weights_digest", retrained)
    after = keys()
    assert {name for name in before if before[name] != after[name]} == {"rgexplainer"}


def test_a_key_hangs_on_code_but_not_on_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "top.py").write_text("from benchmarks import low\n", encoding="utf-8")

    def digest(text: str) -> str:
        (package / "low.py").write_text(text, encoding="utf-8")
        provenance.code_digest.cache_clear()
        provenance.tree.cache_clear()
        return provenance.code_digest("benchmarks.top")

    try:
        first = digest('def f():\n    """One."""\n    return 1\n')
        assert digest('# two\ndef f():\n    """Two."""\n\n    return 1\n') == first
        assert digest("def f():\n    return 2\n") != first
    finally:
        provenance.code_digest.cache_clear()
        provenance.tree.cache_clear()


def test_a_key_hangs_on_how_many_edges_an_explainer_may_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()

    def digest(edges: int, other: int) -> str:
        text = f"EDGES = {edges}\nOTHER = {other}\n\ndef f():\n    return EDGES\n"
        (tmp_path / "benchmarks" / "low.py").write_text(text, encoding="utf-8")
        provenance.tree.cache_clear()
        provenance.function_digest.cache_clear()
        return provenance.function_digest("benchmarks.low", "f")

    try:
        assert digest(6, 1) == digest(6, 2)
        assert digest(6, 1) != digest(7, 1)
    finally:
        provenance.tree.cache_clear()
        provenance.function_digest.cache_clear()


def test_a_row_of_lbdf_does_not_hang_on_brr() -> None:
    found = provenance.closure(
        ["torch_getfuse.partition.cost.lbdf.model", "torch_getfuse.partition.search.local"]
    )
    assert "torch_getfuse.partition.search.moves" in found
    assert "torch_getfuse.partition.cost.scheme" in found
    assert "torch_getfuse.partition.cost.brr.model" not in found


# -- verdicts -------------------------------------------------------------------------------

TABLES = Mode(
    "tables",
    schemes=("lbdf",),
    granularities=("pixel",),
    seeds=2,
    data=False,
)


def made_up(dram: Callable[[Request], int | None], mode: Mode = TABLES) -> list[Claim]:
    """The claims over rows with the DRAM access that ``dram`` gives; ``None`` for no row."""
    wanted = requests(mode)
    rows = {}
    for request in wanted:
        found = dram(request)
        if found is not None and request.kind in ("search", "optimum", "auto"):
            rows[request] = {
                "dram_bytes": found,
                "max_buffer_bytes": 1,
                "history": [[1, 2 * found], [2, found]],
                "attempts": 10,
                "rectified": 5,
                "seconds": 1.0,
                "wall": 1.0,
                "machine": "none",
            }
    results = Results(mode, wanted, rows)
    return [*paper_claims(results), *own_claims(results)]


def verdicts(found: list[Claim], start: str) -> set[str]:
    chosen = {claim.verdict for claim in found if claim.text.startswith(start)}
    assert chosen, f"no claim starts with {start!r}"
    return chosen


def by_kind(optimum: int, auto: int, search: Callable[[Request], int | None]) -> Any:
    return lambda r: {"optimum": optimum, "auto": auto}.get(r.kind) or search(r)


def test_claims_hold_where_the_rows_say_so() -> None:
    gets = ("rgexplainer", "pgexplainer", "gnnexplainer")
    found = made_up(by_kind(100, 100, lambda r: 120 if r.explainer in gets else 200))
    assert verdicts(found, "GET never worse") == {HOLDS}
    assert verdicts(found, "Over 20 % less DRAM access on efficientnet_b3") == {HOLDS}
    assert verdicts(found, "GET at 1000 plans") == {HOLDS}
    assert verdicts(found, "20 % less on efficientnet_b3 at 250 plans") == {HOLDS}
    assert verdicts(found, "GETs end below the control random edges") == {HOLDS}
    assert verdicts(found, "auto at least 20 %") == {HOLDS}
    assert verdicts(found, "auto never worse") == {HOLDS}
    # Rates are equal here, so nobody is ahead of the control.
    assert verdicts(found, "Each GET rectifies more") == {FAILS}
    assert verdicts(found, "RG-Explainer rectifies over 90 %") == {FAILS}
    # Predictors belong to modes with data alone.
    assert not [claim for claim in found if claim.text.startswith("Accuracy and F1")]
    with_data = made_up(by_kind(100, 100, lambda r: 100), replace(TABLES, data=True))
    assert verdicts(with_data, "Accuracy and F1") == {OPEN}


def test_claims_do_not_hold_where_the_rows_say_so() -> None:
    found = made_up(by_kind(100, 130, lambda r: 125 if r.explainer == "pgexplainer" else 120))
    assert verdicts(found, "GET never worse") == {FAILS}
    # RG and GNNE are as good as the baseline, so the best of three is not worse.
    assert verdicts(found, "The best of the three") == {HOLDS}
    assert verdicts(found, "Over 20 % less DRAM access on efficientnet_b3") == {FAILS}
    assert verdicts(found, "GET at 1000 plans") == {FAILS}
    assert verdicts(found, "20 % less on efficientnet_b3 at 250 plans") == {FAILS}
    assert verdicts(found, "auto at least 20 %") == {FAILS}
    assert verdicts(found, "auto never worse") == {FAILS}
    worse = next(claim for claim in found if claim.text.startswith("GET never worse"))
    assert "worst ×1.04 (PG" in worse.ours
    assert worse.paper.startswith("worse in 0 of ")


def test_a_claim_is_open_until_its_rows_are_there_unless_one_refutes_it() -> None:
    def half(request: Request) -> int | None:
        return None if request.explainer == "gnnexplainer" else 100

    assert verdicts(made_up(by_kind(100, 100, half)), "GET never worse") == {OPEN}
    assert verdicts(made_up(by_kind(100, 100, half)), "auto never worse") == {OPEN}

    def refuted(request: Request) -> int | None:
        return 101 if request.explainer == "rgexplainer" else half(request)

    assert verdicts(made_up(by_kind(100, 100, refuted)), "GET never worse") == {FAILS}
    # A missing seed is a missing cell.
    one = made_up(by_kind(100, 100, lambda r: None if r.seed else 100))
    assert verdicts(one, "GET never worse") == {OPEN}


def test_nobody_can_save_more_than_the_optimum() -> None:
    def baseline_only(request: Request) -> int | None:
        return 110 if request.explainer == "none" else None

    found = made_up(by_kind(100, 100, baseline_only))
    # At most 9.1 % can be saved, so the rows of the explainers need not be waited for.
    assert verdicts(found, "Over 20 % less DRAM access on efficientnet_b3") == {FAILS}
    assert verdicts(made_up(by_kind(50, 50, baseline_only)), "Over 20 % less") == {OPEN}


def test_what_a_mode_leaves_out_is_neither_run_nor_missed() -> None:
    mode = replace(TABLES, left_out=(("random", "gnnexplainer"),))
    wanted = requests(mode)
    asked = {(request.search, request.explainer) for request in wanted}
    assert ("random", "gnnexplainer") not in asked
    assert ("local", "gnnexplainer") in asked
    found = made_up(by_kind(100, 100, lambda r: 100), mode)
    assert verdicts(found, "GET never worse") == {HOLDS}


def test_where_a_reduction_comes_from() -> None:
    """Blame where the controls save less, repair where they save as much."""

    def blame(request: Request) -> int:
        return 100 if request.explainer in ("none", *CONTROLS) else 80

    title = "10 % less on efficientnet_b3, ONNX's: local, as worded"
    claims = {c.text: c for c in made_up(by_kind(80, 80, blame))}
    found = claims[f"{title}, pixel"]
    assert found.verdict == HOLDS
    assert found.ours.endswith("the baseline is 25.0 % above the optimum; blame does it")
    repair = made_up(by_kind(80, 80, lambda r: 100 if r.explainer == "none" else 80))
    (found,) = (claim for claim in repair if claim.text.startswith(title))
    assert found.ours.endswith("repair by any edges does it")
    assert verdicts(made_up(by_kind(80, 80, lambda r: 95)), title) == {FAILS}
    # The paper's counts are of its own networks once, whatever they are written in.
    counts = [c.paper for c in claims.values() if c.text.startswith("GET never worse")]
    assert counts == ["worse in 0 of 57", "worse in 0 of 18", "worse in 0 of 24"]


def test_onnx_has_several_operators_where_torch_has_one() -> None:
    class Block(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 4, 1), nn.SiLU(inplace=True), nn.Hardswish(), nn.ReLU6())

    x = torch.randn(1, 3, 4, 4)
    model = Block().eval()
    expected = model(x)
    rewritten = write_out(model)
    assert torch.allclose(rewritten(x), expected, atol=1e-6)
    kinds = [op.kind for op in capture_model(rewritten, (x,)).graph]
    assert kinds == ["conv2d", "sigmoid", "mul", "add", "clamp", "mul", "div", "relu6"]


def test_the_papers_figures() -> None:
    assert published.column("plain", "lbdf", "efficientnet_b3@onnx")["none"] == 90.5
    assert published.column("local", "lbdf", "mobilenet_v2")["rgexplainer"] == 8.823
    assert published.column("nsga2", "lbdf", "efficientnet_b3")["none"] == 77.334
    assert published.column("plain", "lbdf", "resnet152")["none"] == 80.733
    assert published.column("random", "brr", "resnet50")["rgexplainer"] == 92.376
    assert not published.column("random", "brr", "resnet152")


def test_table_1_counts_the_papers_networks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(*valid: bool) -> Sample:
        return Sample(1, 1, 1, valid, "00")

    drawn = {
        "vgg16": [sample(False, False, True, True, True), sample(*[True] * 5)],
        "another": [sample(*[False] * 5)],
    }
    shards = [ShardRequest("lbdf", "line", name, 224, 2, 0) for name in drawn]
    monkeypatch.setattr(execute, "build", lambda *given, **more: None)
    monkeypatch.setattr(execute, "requests", lambda *given, **more: shards)
    monkeypatch.setattr(execute, "load_samples", lambda shard, folder: drawn[shard.network])
    row = execute.execute(Request("samples", granularity="line"), tmp_path)
    assert row["groups"] == {"vgg16": 2}
    assert row["valid"] == [0.5, 0.5, 1.0, 1.0, 1.0]


# -- the plain local search -----------------------------------------------------------------


@pytest.mark.parametrize("edits", [("move",), EDITS])
def test_the_plain_search_gives_legal_plans(edits: tuple[str, ...]) -> None:
    rng = Random(3)
    for _ in range(20):
        graph = random_graph(rng, 8)
        alone = max(Lbdf(graph, "line", 1, 1).buffer(1 << i, 1 << 40) or 0 for i in range(8))
        problem = FusionProblem(Evaluator(Lbdf(graph, "line", 1, 1), alone + 40), merge=False)
        found = plain_local_search(problem, 60, 1, edits=edits)
        again = plain_local_search(problem, 60, 1, edits=edits)
        assert (found.groups, found.history) == (again.groups, again.history)
        assert found.plans == 60
        assert sum(found.groups) == problem.fusable
        assert all(map(problem.evaluator.valid, found.groups))
        rest = [1 << i for i in bits(problem.unfusable)]
        assert topological_order([*found.groups, *rest], graph) is not None


def test_random_positions_cut_until_every_part_fits() -> None:
    graph = random_graph(Random(5), 12)
    alone = max(Lbdf(graph, "line", 1, 1).buffer(1 << i, 1 << 40) or 0 for i in range(len(graph)))
    problem = FusionProblem(Evaluator(Lbdf(graph, "line", 1, 1), alone + 1), merge=False)
    parts = PositionSplit(problem)(problem.fusable, Random(0))
    assert sum(parts) == problem.fusable
    assert len(parts) > 1
    assert all(map(problem.evaluator.valid, parts))
