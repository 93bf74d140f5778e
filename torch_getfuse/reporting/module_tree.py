"""A network by its modules: the tree of ``named_modules()``, with what the plan makes of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch_getfuse.accelerator import format_size
from torch_getfuse.reporting.export import Style
from torch_getfuse.reporting.kinds import format_macs
from torch_getfuse.reporting.section import Section
from torch_getfuse.terminal import HELD_SPACE, Mark, Marked, numbers

_HEADERS = ("module", "ops", "groups", "output", "weights", "MACs", "unfused", "planned")


@dataclass
class _Module:
    """A module, its operators and those of the modules in it."""

    path: str
    depth: int
    ops: list[str] = field(default_factory=list)
    children: dict[str, _Module] = field(default_factory=dict)

    def walk(self) -> Iterator[_Module]:
        yield self
        for child in self.children.values():
            yield from child.walk()


@dataclass(frozen=True, slots=True)
class ModuleFigures:
    """What the plan makes of one module.

    Attributes:
        path: of the module; ``""`` for the model.
        depth: 0 for the model.
        operators: names, in topological order, of modules in it as well.
        groups: numbers of the fusion groups (cascade: steps) that hold some of them.
        unfusable: how many stand in no group.
        outputs: shapes of the tensors that others read or the model returns.
        weight_bytes: as the plan stores them.
        macs: multiply-accumulates per sample; ``None`` where that of an operator is not known.
        unfused_bytes: DRAM access with every operator alone.
        planned_bytes: as planned; ``None`` where a group holds operators of other modules too.
    """

    path: str
    depth: int
    operators: tuple[str, ...]
    groups: tuple[int, ...]
    unfusable: int
    outputs: tuple[tuple[int, ...], ...]
    weight_bytes: int
    macs: int | None
    unfused_bytes: int
    planned_bytes: int | None


def modules_of(section: Section, depth: int) -> list[ModuleFigures]:
    """The modules that hold operators, down to ``depth`` names from the model."""
    root = _Module("", 0)
    for op in section.plan.graph:
        at = root
        at.ops.append(op.name)
        for name in op.module.split(".")[:depth] if op.module else ():
            path = f"{at.path}.{name}" if at.path else name
            at = at.children.setdefault(name, _Module(path, at.depth + 1))
            at.ops.append(op.name)
    return [_figures(section, module) for module in root.walk()]


def _figures(section: Section, module: _Module) -> ModuleFigures:
    plan = section.plan
    graph = plan.graph
    inside = set(module.ops)
    groups = [k for k, group in enumerate(plan.groups) if not inside.isdisjoint(group.ops)]
    planned = None
    if all(inside.issuperset(plan.groups[k].ops) for k in groups):
        planned = sum(plan.groups[k].dram.total for k in groups)
        planned += sum(section.unfusable[name].total for name in plan.apart if name in inside)
    outputs = []
    for name in module.ops:
        tensor = graph.ops[graph.index[name]].writes
        readers = (graph.ops[i].name for i in graph.consumers[tensor])
        if tensor in graph.outputs or not inside.issuperset(readers):
            outputs.append(graph.tensors[tensor].shape)
    return ModuleFigures(
        module.path,
        module.depth,
        tuple(module.ops),
        tuple(groups),
        sum(name in inside for name in plan.apart),
        tuple(outputs),
        sum(section.scheme.weights[graph.index[name]] for name in module.ops),
        section.macs_of(module.ops),
        sum(section.alone(name).total for name in module.ops),
        planned,
    )


def modules_parts(section: Section, depth: int, style: Style) -> list[str]:
    """A table with a row per module, indented by its depth, and what it says."""
    modules = modules_of(section, depth)
    told = ""
    if any(module.unfusable for module in modules):
        told = "+n: and n unfusable operators; "
    return [
        style.table([_row(m) for m in modules], _HEADERS, "lrllrrrr", wrapped=(0, 2, 3)),
        style.paragraph(
            f"{told}unfused, planned: DRAM access; planned is left out where a group holds "
            "operators of other modules too"
        ),
    ]


def _row(module: ModuleFigures) -> list[str]:
    where = numbers(module.groups)
    if module.unfusable:
        where = Marked(f"{where} +{module.unfusable}".strip(), Mark.OVER)
    shapes = ["x".join(map(str, shape)) for shape in module.outputs]
    planned = "" if module.planned_bytes is None else format_size(module.planned_bytes)
    if module.planned_bytes is not None and module.planned_bytes < module.unfused_bytes:
        planned = Marked(planned, Mark.SAVED)
    return [
        HELD_SPACE * 2 * module.depth + (module.path.rpartition(".")[2] or "(model)"),
        str(len(module.operators)),
        where,
        shapes[0] if len(shapes) == 1 else f"{len(shapes)} tensors",
        format_size(module.weight_bytes),
        format_macs(module.macs),
        format_size(module.unfused_bytes),
        planned,
    ]
