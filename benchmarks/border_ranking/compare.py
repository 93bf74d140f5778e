"""Every order of edges under the same search, in the same CPU time."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.border_ranking.data import Row, options, problem_of
from benchmarks.border_ranking.graphs import WIDE, load
from benchmarks.border_ranking.rankers import ORDERS, SPLITTERS, Models, built
from benchmarks.border_ranking.train import SEEDS, optimal_rows
from benchmarks.json_lines import rows_in
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.search.edge_cuts import Edge
from torch_getfuse.partition.search.local import local_search
from torch_getfuse.partition.search.recursive_split import EdgeRanker, RecursiveSplit
from torch_getfuse.partition.work import TIME_LIMIT, OutOfWork, Work, clock
from torch_getfuse.planner import plan_graph

SECONDS = 10.0
SHARES = (0.5, 0.25, 0.125)
"""Of a group's edges, that a ranker may name; which, is chosen on the validation part."""

DRAWN = ("random", "gnn")
"""Orders that depend on a seed: of the draw, or of the training."""

SEARCHED = ("size", "saved", "gnn")
"""Orders whose plan a local search starts from as well."""

_LOOK = 2_000  # steps between two readings of the clock
_UNLIMITED = 1 << 60  # plans


class ClockWork(Work):
    """Ends by CPU time alone: counted steps know nothing of what a model takes.

    Args:
        seconds: from now on, of every limit together.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._started = clock()
        self._last = self._started + seconds
        self._ends = float("inf")
        self._unseen = 0

    @property
    def taken(self) -> float:
        """CPU seconds so far."""
        return clock() - self._started

    def add(self, steps: int) -> None:
        self._unseen += steps
        if self._unseen >= _LOOK:
            self.check()

    def check(self) -> None:
        self._unseen = 0
        if clock() >= self._ends:
            raise OutOfWork(TIME_LIMIT)

    @contextmanager
    def _until(self, ends: float) -> Iterator[None]:
        before, self._ends = self._ends, ends
        try:
            yield
        finally:
            self._ends = before

    @contextmanager
    def within(self, seconds: float | None, whole: bool = False) -> Iterator[None]:
        ends = self._ends if seconds is None else min(self._ends, self._last, clock() + seconds)
        with self._until(ends):
            yield

    @contextmanager
    def finishing(self) -> Iterator[None]:
        with self._until(float("inf")):
            yield


def split_and_local(
    graph: OpGraph,
    kb: int,
    ranker: Callable[[FusionProblem], EdgeRanker],
    seed: int,
    seconds: float = SECONDS,
) -> Row:
    """The recursive split of the whole graph, then local search from it, repaired by the split.

    The split has half of the time at most, and its polish what is left of all. Features and
    inference of a model count.

    Returns:
        ``ranking``, ``direct`` and ``seconds`` of CPU, ``direct_bytes``, ``dram_bytes``, ``plans``
        of the local search and its ``history``: (plans, bytes) whenever the best improved.
    """
    work = ClockWork(seconds)
    problem = problem_of(graph, kb, work)
    started = work.taken
    edges = ranker(problem)
    ranking = work.taken - started
    split = RecursiveSplit(problem, edges)
    first = split.direct(seconds / 2)
    at = work.taken
    found = local_search(
        problem, _UNLIMITED, seed, split, seconds, population=10, start=[first.groups]
    )
    taken = work.taken
    with work.finishing():
        assert problem.legal(found.groups)
    return {
        "ranking": round(ranking, 3),
        "direct": round(at, 2),
        "direct_stopped": first.stopped,
        "seconds": round(taken, 2),
        "direct_bytes": first.dram_bytes,
        "dram_bytes": found.dram_bytes,
        "plans": found.plans,
        "history": found.history,
    }


def built_and_local(
    graph: OpGraph,
    kb: int,
    order: Callable[[FusionProblem], Sequence[Edge]],
    seed: int,
    seconds: float = SECONDS,
    search: bool = True,
) -> Row:
    """The plan that an order gives by itself, then local search from it, repaired at random.

    Returns:
        ``ranking``, ``built`` and ``seconds`` of CPU, ``built_bytes``, ``dram_bytes``, ``plans``.
        Without ``search``, the plan by the order alone.
    """
    work = ClockWork(seconds)
    problem = problem_of(graph, kb, work)
    started = work.taken
    edges = order(problem)
    ranking = work.taken - started
    with work.within(seconds):
        plan = built(problem, edges)
    at = work.taken
    row = {"ranking": round(ranking, 3), "built": round(at, 2), "built_bytes": problem.cost(plan)}
    assert problem.legal(plan)
    if not search:
        return {**row, "seconds": round(at, 2), "dram_bytes": problem.cost(plan), "plans": 1}
    found = local_search(problem, _UNLIMITED, seed, None, seconds, start=[tuple(plan)])
    return {
        **row,
        "seconds": round(work.taken, 2),
        "dram_bytes": found.dram_bytes,
        "plans": found.plans,
    }


def default_plan(graph: OpGraph, kb: int) -> Row:
    """The default planner in 10 s: ``dram_bytes``, ``lower_bound_bytes``, ``proof``, ``method``."""
    work = ClockWork(SECONDS)
    plan = plan_graph(graph, options(kb, SECONDS))
    return {
        "operators": len(graph),
        "seconds": round(work.taken, 2),
        "dram_bytes": plan.dram_bytes,
        "lower_bound_bytes": plan.lower_bound_bytes,
        "proof": plan.proof,
        "method": plan.method,
    }


def choose_shares(plans: Path, models: Models) -> list[Row]:
    """Mean gap of the recursive split to proved optima of the validation part, by share.

    At 256 KB, seed 0. The share with the least gap is used in the comparison.
    """
    rows = [r for r in optimal_rows(plans) if r["part"] == "validation" and r["kb"] == 256]
    gaps: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        graph = load(row["graph"])
        assert graph is not None
        for name in SPLITTERS:
            for share in SHARES if name != "all" else (1.0,):
                problem = problem_of(graph, row["kb"])
                split = RecursiveSplit(problem, models.ranker(name, problem, 0, share))
                cost = split.direct().dram_bytes
                gaps.setdefault((name, share), []).append(100 * (cost / row["dram_bytes"] - 1))
    return [
        {"what": "share", "ranker": name, "share": share, "graphs": len(found),
         "mean_gap": statistics.mean(found)}
        for (name, share), found in gaps.items()
    ]  # fmt: skip


def chosen_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Per ranker the share with the least mean gap, of equals the largest."""
    best: dict[str, Row] = {}
    for row in rows:
        if row.get("what") == "share":
            known = best.get(row["ranker"])
            if known is None or (row["mean_gap"], -row["share"]) < (
                known["mean_gap"],
                -known["share"],
            ):
                best[row["ranker"]] = row
    return {name: row["share"] for name, row in best.items()}


def compare(folder: Path, cases: Sequence[tuple[str, int]] = WIDE) -> None:
    """Append what is missing to ``compare.jsonl`` of the folder."""
    path = folder / "compare.jsonl"
    models = Models(folder, SEEDS)
    rows = list(rows_in(path))

    def add(row: Row) -> None:
        rows.append(row)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = {key: value for key, value in row.items() if key != "history"}
        print(json.dumps(shown), flush=True)

    if not chosen_shares(rows):
        for row in choose_shares(folder / "plans.jsonl", models):
            add(row)
    shares = chosen_shares(rows)
    known = {_key(row) for row in rows}
    # Seed after seed, so that a run that is stopped has the first of all cases.
    for first in SEEDS:
        for spec, kb in cases:
            todo = [key for key in _keys(spec, kb) if key.seed == first and key not in known]
            graph = load(spec) if todo else None
            for key in todo:
                assert graph is not None
                add({**key._asdict(), **_run(graph, key, models, shares)})


class Key(NamedTuple):
    """One run: graph, KB, what was run, ranker or order, seed."""

    graph: str
    kb: int
    what: str
    ranker: str
    seed: int


def _run(graph: OpGraph, key: Key, models: Models, shares: Mapping[str, float]) -> Row:
    name, seed = key.ranker, key.seed
    if key.what == "default":
        return default_plan(graph, key.kb)
    if key.what == "split":
        share = shares[name]
        return split_and_local(graph, key.kb, lambda p: models.ranker(name, p, seed, share), seed)
    search = key.what == "built and local"
    return built_and_local(
        graph, key.kb, lambda p: models.order(name, p, seed), seed, search=search
    )


def _keys(spec: str, kb: int) -> Iterator[Key]:
    yield Key(spec, kb, "default", "", 0)
    for name in ORDERS:
        for seed in SEEDS if name in DRAWN else SEEDS[:1]:
            yield Key(spec, kb, "built", name, seed)
    for seed in SEEDS:
        yield from (Key(spec, kb, "split", name, seed) for name in SPLITTERS)
        yield from (Key(spec, kb, "built and local", name, seed) for name in SEARCHED)


def _key(row: Row) -> Key | None:
    if row["what"] == "share":
        return None
    return Key(row["graph"], row["kb"], row["what"], row["ranker"], row["seed"])
