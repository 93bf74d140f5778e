"""Groups and operators that are alike: one row of a table stands for all of them.

Alike are groups of the same operators on tensors of the same shapes, joined in the same way, with
the same figures, that end for the same reason; only names and numbers of groups differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from torch_getfuse.ir import Op, OpGraph
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.reporting.export import Style, fold
from torch_getfuse.reporting.section import Section

_T = TypeVar("_T")


def runs(items: Iterable[_T], key: Callable[[_T], Hashable]) -> list[list[_T]]:
    """Neighbours of one key together."""
    found: list[list[_T]] = []
    for item in items:
        if found and key(found[-1][0]) == key(item):
            found[-1].append(item)
        else:
            found.append([item])
    return found


def times(count: int, text: str) -> str:
    """``"3 x conv1"`` for several that are alike."""
    return text if count == 1 else f"{count} x {text}"


def folded(alike: Sequence[Sequence[object]], style: Style) -> list[str]:
    """What a table says below it of rows that stand for several."""
    if all(len(same) == 1 for same in alike):
        return []
    return [style.paragraph(_FOLDED)]


_FOLDED = (
    "N x: so many that are alike, of which the first is named; figures and reasons are its. "
    "A row for each: --full, to_text(full=True)"
)


def alike_groups(plan: PartitionPlan, full: bool = False) -> list[list[int]]:
    """Numbers of the groups that share a row, in the order of their first ones.

    Args:
        full: each has a row of its own; else those that are alike share one.
    """
    if full:
        return [[k] for k in range(len(plan.groups))]

    def key(number: int) -> Hashable:
        group = plan.groups[number]
        way = group.way
        return (
            _structure(plan.graph, group.ops),
            group.buffer_bytes,
            group.dram,
            way and (way.kind, way.count, tuple(map(group.ops.index, way.weights_stay))),
            _unnamed(group.ends, plan.graph, number),
        )

    return fold(range(len(plan.groups)), key)


def alike_unfusable(section: Section) -> list[list[str]]:
    """Names of the unfusable operators that are alike."""
    graph = section.plan.graph

    def key(name: str) -> Hashable:
        return _structure(graph, (name,)), section.needs[name], section.unfusable[name]

    return fold(section.unfusable, key)


def _structure(graph: OpGraph, ops: Sequence[str]) -> Hashable:
    """Operators, shapes and how they are joined, without names."""
    inside = {graph.ops[graph.index[name]].writes: k for k, name in enumerate(ops)}
    return tuple(_anonymous(graph.ops[graph.index[name]], graph, inside) for name in ops)


def _anonymous(op: Op, graph: OpGraph, inside: dict[str, int]) -> Hashable:
    return (
        op.kind,
        tuple(
            (
                inside.get(read.tensor),
                graph.tensors[read.tensor].shape,
                graph.width(read.tensor),
                read.window,
            )
            for read in op.reads
        ),
        graph.tensors[op.writes].shape,
        graph.width(op.writes),
        op.weight_elements,
        op.weight_bytes,
        op.in_place,
        op.groups,
        op.macs,
    )


def _unnamed(ends: str, graph: OpGraph, number: int) -> str:
    """Why a group ends, without names; numbers of steps from its own on."""
    words = [
        re.sub(r"\S+?(?=[:,;]?$)", lambda name: _other(name[0], graph), word)
        for word in ends.split(" ")
    ]
    return re.sub(r"\bstep (\d+)", lambda step: f"step {int(step[1]) - number:+}", " ".join(words))


def _other(word: str, graph: OpGraph) -> str:
    return "NAME" if word in graph.index or word in graph.tensors else word
