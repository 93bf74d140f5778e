"""Where the tensors of a step lie: what the executor needs to know beyond the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.cascade.way import LINE, Way
from torch_getfuse.partition.cost.lbdf.row_schedule import storages
from torch_getfuse.partition.cost.scheme import boundary


@dataclass(frozen=True)
class StepLayout:
    """One step of a plan, as it is carried out.

    Attributes:
        mask: the operators.
        way: how they run.
        rings: last tensor of each storage -> rows that it holds; all of them for one with a
            resident tensor in it.
        shared: tensor -> last tensor in its storage; each that is not written over is its own.
        resident: tensors that the step reads or makes and that stay on chip.
        loads, writes: tensors that are read from DRAM, and written there.
    """

    mask: int
    way: Way
    rings: Mapping[str, int]
    shared: Mapping[str, str]
    resident: frozenset[str]
    loads: tuple[str, ...]
    writes: tuple[str, ...]


def line_layout(graph: OpGraph, mask: int, rings: Mapping[str, int]) -> StepLayout:
    """The layout of a group that keeps nothing on chip for others, unit by unit.

    Args:
        rings: last tensor of each storage -> rows.
    """
    loads, writes = boundary(graph, mask)
    shared = storages(graph, mask)
    return StepLayout(mask, Way(LINE), rings, shared, frozenset(), tuple(loads), tuple(writes))
