"""Imports between modules point down only, and what needs no torch imports none.

The walls of the package in one table: a module may import from lower floors, and from its own
floor within its own folder as long as no cycle comes of it. Imports inside functions and under
``TYPE_CHECKING`` count as well.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = "torch_getfuse"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

FLOORS = {
    "errors": 0,
    "fields": 0,
    "files": 0,
    "ir": 0,
    "accelerator": 0,
    "forms": 1,
    "options": 0,
    "partition.group": 1,
    "partition.cuts": 1,
    "partition.work": 1,
    "partition.cost": 2,
    "partition.plan": 2,  # verify() recomputes every cost of a plan file
    "partition.stream": 2,
    "partition.region": 2,
    "partition.schedule": 2,
    "partition.fan": 2,
    "partition.lbdf": 2,
    "partition.brr": 2,
    "partition.brr_rows": 2,
    "partition.schemes": 2,
    "partition.problem": 2,
    "partition.borders": 3,
    "partition.repair": 3,
    "partition.moves": 3,
    "partition.regroup": 3,
    "partition.split": 3,
    "partition.search": 3,
    "partition.nsga2": 3,
    "partition.exact": 3,
    "partition.frontier": 3,
    "partition.levels": 3,
    "partition.lending": 3,
    "partition.automaton": 3,
    "partition.columns": 3,
    "partition.prices": 3,
    "partition.choice": 3,
    "partition.bound": 3,
    "partition.listing": 3,
    "partition.cover": 3,
    "partition": 3,
    "explain.features": 3,
    "explain.sampling": 3,
    "explain.dataset": 3,
    "explain.weights_io": 3,
    "explain.validity": 3,
    "explain.explainers": 4,  # its controls are those of partition.split
    "explain.rg_explainer": 3,
    "explain": 3,
    "explain.metrics": 4,
    "explain.synthetic": 3,
    "explain.data": 6,  # captures the networks that it samples from
    "explain.train": 6,
    "planner": 5,
    "sweep_result": 4,
    "section": 4,
    "report": 4,
    "drawing": 4,
    "findings": 4,
    "explanation": 5,
    "why": 6,
    "models": 5,
    "backend.rule_types": 5,
    "backend.rules_alias": 5,
    "backend.rules_global": 5,
    "backend.rules_pointwise": 5,
    "backend.rules_spatial": 5,
    "backend.op_rules": 5,
    "backend.normalise": 5,
    "backend.views": 5,
    "backend.fx_values": 5,
    "backend.decompose": 5,
    "backend.graph_inputs": 5,
    "backend.graph_values": 5,
    "backend.graph_builder": 5,
    "backend.records": 5,
    "backend.capture": 5,
    "backend.targets": 5,
    "backend.effects": 5,
    "backend.op_order": 5,
    "backend.view_changes": 5,
    "backend.overlaps": 5,
    "backend.mode_notes": 5,
    "backend.modes": 5,
    "backend.regions": 5,
    "backend.submodules": 5,
    "backend.grouping": 5,
    "backend.ledger": 5,
    "backend.rings": 5,
    "backend.row_calls": 5,
    "backend.row_views": 5,
    "backend.row_kernels": 5,
    "backend.row_windows": 5,
    "backend.row_spatial": 5,
    "backend.row_resize": 5,
    "backend.row_reductions": 5,
    "backend.row_rules": 5,
    "backend.row_group": 5,
    "backend.row_trial": 5,
    "backend.gradient_order": 5,
    "backend.depth_first": 5,
    "backend.own_sizes": 5,
    "backend.symbols": 5,
    "backend.scatters": 5,
    "backend.strides": 5,
    "backend.layouts": 5,
    "backend.inner": 5,
    "backend.snapshots": 5,
    "backend.conv_weights": 5,
    "backend.live": 5,
    "backend.packed": 5,
    "backend.fast_steps": 5,
    "backend.strips": 5,
    "backend.fast_program": 5,
    "backend.fast_tuning": 6,
    "backend.fast": 6,
    "backend.plan_cache": 6,
    "backend.training": 5,
    "backend.compiler": 6,
    "backend": 6,
    "api": 7,
    "sweeps": 7,
    "cli_options": 7,
    "cli_run": 8,
    "cli": 8,
    "__main__": 9,
    "": 9,  # torch_getfuse/__init__.py: the public names
}

UPWARD = {
    # verify(prove=True) is a plan's own, and the planner proves.
    ("partition.plan", "planner"),
}
"""The imports within functions that point up on purpose."""

NO_TORCH = ("errors", "fields", "files", "ir", "accelerator", "options", "partition")
TORCH = {"torch", "torch_geometric", "torchvision", "functorch", "timm", "transformers"}


def module_name(file: Path) -> str:
    """``partition.cost`` for ``torch_getfuse/partition/cost/scheme.py``; ``""`` for the package."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(ROOT.rglob("*.py"))}


def imported(name: str, file: Path) -> dict[str, int]:
    """Full names of the modules that ``file`` imports, each with a line."""
    package = [PACKAGE, *name.split(".")] if name else [PACKAGE]
    if file.name != "__init__.py":
        package.pop()
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # "from torch_getfuse.partition import cost" imports a module, not a name.
                full = f"{source}.{alias.name}"
                inner = full.removeprefix(f"{PACKAGE}.")
                found[full if inner in FILES else source] = node.lineno
    return found


def own(name: str, file: Path) -> dict[str, int]:
    """Modules of this package that ``file`` imports, without the package's name."""
    found = {
        full.removeprefix(PACKAGE).removeprefix("."): line
        for full, line in imported(name, file).items()
        if full.partition(".")[0] == PACKAGE
    }
    return {other: line for other, line in found.items() if (name, other) not in UPWARD}


def folder(name: str) -> str:
    return name if name in ("partition", "explain", "backend") else name.rpartition(".")[0]


@pytest.mark.parametrize("name", FILES, ids=lambda name: name or PACKAGE)
def test_imports_point_down(name: str) -> None:
    file = FILES[name]
    assert name in FLOORS, (
        f"{file.name}: module {name!r} has no floor; add it to FLOORS in tests/test_floors.py, "
        "above everything it imports and below everything that imports it"
    )
    for other, line in own(name, file).items():
        where = f"{file.relative_to(ROOT.parent)}:{line} imports {other or PACKAGE!r}"
        assert other in FLOORS, f"{where}, which has no floor; add it to FLOORS in this file"
        if FLOORS[other] == FLOORS[name] and folder(name) == folder(other):
            continue
        assert FLOORS[other] < FLOORS[name], (
            f"{where} of floor {FLOORS[other]}, but stands on floor {FLOORS[name]} itself: "
            "imports point down only (or sideways within a folder)"
        )


def test_no_import_cycles() -> None:
    edges = {name: set(own(name, file)) - {name} for name, file in FILES.items()}
    left = dict(edges)
    while left:
        free = [name for name, others in left.items() if not others & left.keys()]
        assert free, f"these modules import each other in a circle: {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize(
    "name",
    [name for name in FILES if name.partition(".")[0] in NO_TORCH],
)
def test_no_torch_below(name: str) -> None:
    file = FILES[name]
    for full, line in imported(name, file).items():
        where = f"{file.relative_to(ROOT.parent)}:{line} imports {full}"
        assert full.partition(".")[0] not in TORCH, f"{where}: no torch in this part"
    for other, line in own(name, file).items():
        where = f"{file.relative_to(ROOT.parent)}:{line} imports {other}"
        assert other.partition(".")[0] in NO_TORCH, f"{where}, which may import torch"


def test_the_table_names_no_module_twice_over() -> None:
    assert all(name == name.strip(".") for name in FLOORS)
    assert {"errors", "ir", ""} <= FILES.keys(), "the tests look at the right folder"
