"""Rebuild ``tests/goldens/*.json``: the optimum of every network, cost model and buffer.

    python -m tests.make_goldens              # all of them
    python -m tests.make_goldens resnet18     # of some networks

One byte per element. A difference to what is committed is a change of the operator graphs, of a
cost model or of the exact search, and its commit must say which and why.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests.networks import SIZES, operator_graph
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.cascade.model import Cascade
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Dram, Evaluator
from torch_getfuse.partition.exact.down_sets import Limits, exact
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.steps.optimum import optimum
from torch_getfuse.partition.steps.problem import StepProblem

COMMAND = "python -m tests.make_goldens"
FOLDER = Path(__file__).parent / "goldens"

# Form -> scheme and granularity. BRR and cascade have no granularity.
FORMS = {
    "lbdf-line": ("lbdf", "line"),
    "lbdf-pixel": ("lbdf", "pixel"),
    "brr": ("brr", "line"),
    "cascade": ("cascade", "line"),
}
KILOBYTES = (128, 256, 1024)

Golden = dict[str, int]


def golden(graph: OpGraph, form: str, kilobytes: int) -> Golden:
    """The optimum's figures, in bytes per sample and counts."""
    name, granularity = FORMS[form]
    scheme = make_scheme(name, graph, granularity, 1, 1)
    buffer_bytes = kilobytes * 1024
    if isinstance(scheme, Cascade):
        return steps_golden(StepProblem(scheme, buffer_bytes))
    evaluator = Evaluator(scheme, buffer_bytes)
    problem = FusionProblem(evaluator)
    found = exact(problem, limits=Limits(steps=1 << 40))  # however long it takes
    drams: list[Dram] = [scheme.dram(group, buffer_bytes) for group in found.groups]
    assert sum(dram.total for dram in drams) == found.dram_bytes
    return {
        "dram_bytes": found.dram_bytes,
        "feature_bytes": sum(dram.read + dram.write for dram in drams),
        "groups": len(found.groups),
        "unfusable": problem.unfusable.bit_count(),
        # Several plans may be optimal; the search takes the same one each time.
        "max_buffer_bytes": max((evaluator.buffer(g) or 0 for g in found.groups), default=0),
    }


def steps_golden(problem: StepProblem) -> Golden:
    """The same of a sequence of steps, unfusable operators included."""
    solved = optimum(problem)
    assert solved.found is not None
    assert not solved.stopped
    masks, lives = solved.found.masks, problem.lives(solved.found.masks, solved.found.residents)
    steps = [step for step in problem.priced(masks, lives) if step is not None]
    assert sum(step.dram.total for step in steps) == solved.found.dram_bytes
    return {
        "dram_bytes": solved.found.dram_bytes,
        "feature_bytes": sum(step.dram.read + step.dram.write for step in steps),
        "groups": len(steps),
        "unfusable": problem.unfusable.bit_count(),
        "max_buffer_bytes": max(step.priced.buffer for step in steps if step.priced is not None),
    }


def load(name: str) -> dict[str, dict[str, Golden]]:
    """Form -> buffer in KB -> figures; empty where the network has no file."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}  # type: ignore[no-any-return]


def main(names: list[str]) -> None:
    for name in names or SIZES:
        graph = operator_graph(name)
        table: dict[str, dict[str, Golden]] = {}
        for form in FORMS:
            started = time.perf_counter()
            table[form] = {str(size): golden(graph, form, size) for size in KILOBYTES}
            print(f"{name} {form}: {time.perf_counter() - started:.1f} s", flush=True)
        (FOLDER / f"{name}.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
