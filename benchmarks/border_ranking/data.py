"""Proved optimal plans, as JSON lines, and the labels of edges that follow from them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.border_ranking.graphs import BUFFERS_KB, load, proved_specs
from benchmarks.json_lines import rows_in
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.search.edge_cuts import Edge
from torch_getfuse.partition.work import Work
from torch_getfuse.planner import plan_graph

Row = dict[str, Any]
KB = 1024
FEW_KB = {"synthetic": (64, 256, 1024), "cells": (64, 128, 256)}
"""Buffers of the random networks, which are many and small; the others have all of BUFFERS_KB."""


def options(buffer_kb: int, seconds: float = 10.0) -> Options:
    """LBDF by lines, one byte per element; nothing from the cache of plans."""
    return Options(
        buffer=buffer_kb * KB, activation_bytes=1, weight_bytes=1, time_limit=seconds,
        cache=False, progress=False,
    )  # fmt: skip


def problem_of(graph: OpGraph, buffer_kb: int, work: Work | None = None) -> FusionProblem:
    """The problem that the planner has under :func:`options`."""
    scheme = make_scheme("lbdf", graph.stored_as(1), "line", 1, 1)
    return FusionProblem(Evaluator(scheme, buffer_kb * KB, work or Work()))


def proved(graph: OpGraph, buffer_kb: int) -> Row:
    """What the default planner proves of a graph in 10 s.

    Returns:
        ``proof`` (``"optimal"`` or less), CPU ``seconds``, ``dram_bytes``, and for an optimum
        ``groups``: per operator the number of its fusion group, -1 for an unfusable one.
    """
    started = time.process_time()
    plan = plan_graph(graph, options(buffer_kb))
    row: Row = {
        "operators": len(graph),
        "proof": plan.proof,
        "seconds": round(time.process_time() - started, 3),
        "dram_bytes": plan.dram_bytes,
    }
    if plan.proof == "optimal":
        number = {name: k for k, group in enumerate(plan.groups) for name in group.ops}
        row["groups"] = [number.get(op.name, -1) for op in graph.ops]
    return row


def free_edges(problem: FusionProblem) -> list[Edge]:
    """The edges that a plan may cut: between fusable operators of different blocks.

    Two operators of a block are in one group in some optimum, so nothing is to be learnt there.
    """
    block = {i: k for k, mask in enumerate(problem.blocks) for i in bits(mask)}
    readers = problem.graph.readers
    return [(i, j) for i in block for j in bits(readers[i]) if block.get(j, block[i]) != block[i]]


def labels(edges: Sequence[Edge], groups: Sequence[int]) -> list[bool]:
    """Per edge, whether it is a border: its ends stand in different groups of the optimum."""
    return [groups[i] != groups[j] for i, j in edges]


def build(path: Path) -> None:
    """Append the rows that are missing: each graph at each of its buffers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {(row["graph"], row["kb"]) for row in rows_in(path)}
    for part, spec in proved_specs():
        buffers = FEW_KB.get(spec.partition("-")[0], BUFFERS_KB)
        missing = [kb for kb in buffers if (spec, kb) not in known]
        graph = load(spec) if missing else None
        for kb in missing if graph is not None else ():
            row = {"graph": spec, "part": part, "kb": kb, **proved(graph, kb)}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(spec, kb, row["proof"], row["seconds"], flush=True)
