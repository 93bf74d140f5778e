"""Imports between rooms point down only, and what needs no torch imports none.

The walls of the package in one table: a module may import from its own room, as long as no cycle
comes of it, and from rooms on lower floors; rooms on one floor do not know each other. Imports
inside functions and under ``TYPE_CHECKING`` count as well. What ``plugins`` loads by name does not:
whoever asks for a name knows the interface of what comes, which is on a floor below.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = "torch_getfuse"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

FLOORS = (
    ("errors", "version", "backend.torch_versions"),
    ("widths", "limits"),
    (
        "json_fields",
        "atomic_files",
        "ordering",
        "accelerator",
        "plugins",
        "terminal",
        "backend.torch_private",
    ),
    ("accelerator_file",),
    ("ir", "options"),
    ("partition.node_set", "partition.work"),
    ("partition.selection",),
    ("partition.pins",),
    ("partition.cost.scheme",),
    ("partition.cost.lbdf", "partition.cost.brr"),
    ("partition.cost.cascade",),
    ("partition.cost",),
    ("partition.problem",),
    ("partition.merging",),
    ("partition.steps",),
    ("partition.fusion_group",),
    ("partition.group_check",),
    ("partition.plan",),  # verify() of a plan prices its groups, or its steps
    ("partition.group_ends", "partition.search", "partition.exact"),
    ("partition.wide",),
    ("partition",),
    ("explain", "reporting", "importers", "backend.rules", "models"),
    ("group_planner", "step_planner"),
    ("planner", "backend.fx_nodes"),
    (
        "explain_graph",
        "price_graph",
        "backend.capture",
        "backend.plan_cache",
        "backend.compiled_models",
    ),
    ("explain.training", "backend.split"),
    ("backend.inner.dynamic", "backend.inner.inductor_patches"),
    ("backend.rowwise", "backend.packed", "backend.inner"),
    ("backend.training",),
    ("backend.compiler",),
    ("backend",),
    ("api", "sweeps"),
    ("cli",),
    ("", "__main__"),  # torch_getfuse/__init__.py: the public names
)
"""Rooms from the ground up: folders and modules; rooms within a folder are not part of it."""

UPWARD = {
    # verify(prove=True) is a plan's own, and the planner proves.
    ("partition.plan", "planner"),
    # A plan shows itself in a notebook.
    ("partition.plan", "reporting.plan_card"),
}
"""The imports within functions that point up on purpose."""

NO_TORCH = (
    *("errors", "version", "widths", "limits", "json_fields", "atomic_files", "ordering"),
    *("accelerator", "accelerator_file", "plugins", "terminal", "ir", "options", "partition"),
)
TORCH = {"torch", "torch_geometric", "torchvision", "functorch", "timm", "transformers"}


def module_name(file: Path) -> str:
    """``ir.graph`` for ``torch_getfuse/ir/graph.py``; ``""`` for the package."""
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


FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room(name: str) -> str | None:
    """The innermost room of a module; ``None`` where it has none."""
    while name not in FLOOR_OF:
        if "." not in name:
            return None
        name = name.rpartition(".")[0]
    return name


@pytest.mark.parametrize("name", FILES, ids=lambda name: name or PACKAGE)
def test_imports_point_down(name: str) -> None:
    file = FILES[name]
    home = room(name)
    assert home is not None, (
        f"{file.name}: module {name!r} has no room; add it to FLOORS in tests/test_floors.py, "
        "above everything it imports and below everything that imports it"
    )
    for other, line in own(name, file).items():
        where = f"{file.relative_to(ROOT.parent)}:{line} imports {other or PACKAGE!r}"
        there = room(other)
        assert there is not None, f"{where}, which has no room; add it to FLOORS in this file"
        assert there == home or FLOOR_OF[there] < FLOOR_OF[home], (
            f"{where} of floor {FLOOR_OF[there]}, but stands on floor {FLOOR_OF[home]} itself: "
            "imports point down only, or stay within a room"
        )


@pytest.mark.parametrize("name", [name for name in FILES if FILES[name].name == "__init__.py"])
def test_every_folder_has_a_map(name: str) -> None:
    text = ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8"))) or ""
    modules = {f.stem for f in FILES[name].parent.glob("*.py")} - {"__init__", "__main__"}
    folders = {f.parent.name for f in FILES[name].parent.glob("*/__init__.py")}
    if not name:
        return  # its map is docs/architecture.md
    missing = [m for m in sorted(modules) if f"``{m}.py``" not in text]
    missing += [f for f in sorted(folders) if f"``{f}/``" not in text]
    assert not missing, f"{FILES[name].relative_to(ROOT.parent)} leaves out {', '.join(missing)}"


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


def test_the_table_names_rooms_that_exist_once() -> None:
    assert sum(map(len, FLOORS)) == len(FLOOR_OF)
    assert FLOOR_OF.keys() <= FILES.keys(), FLOOR_OF.keys() - FILES.keys()
