"""The order in which a step makes and loads rows, checked against its layout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch_getfuse.backend.rowwise.onchip import Stay
from torch_getfuse.errors import PlanError
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.cascade.step_layout import StepLayout
from torch_getfuse.partition.cost.cascade.stripe_schedule import Turn, make_stripes
from torch_getfuse.partition.cost.cascade.way import LINE, SLICES, STRIPES
from torch_getfuse.partition.cost.lbdf.row_schedule import make_schedule
from torch_getfuse.partition.node_set import bits


class Turns(NamedTuple):
    """The schedule of a step, in the form that all ways have in common.

    Attributes:
        stripes: turns in order; a step by lines, or one of its slices, is one stripe of turns of
            one row each.
        needed: tensors that it makes and that are needed outside.
        stays: operators whose weights are fetched once; those of others once per stripe.
    """

    stripes: tuple[tuple[Turn, ...], ...]
    needed: tuple[str, ...]
    stays: frozenset[str]


def turns_of(graph: OpGraph, layout: StepLayout, stay: Stay) -> Turns:
    """The turns of a step that runs by rows.

    Raises:
        PlanError: where the layout is not one of the step, or does not do for its schedule.
    """
    way, mask = layout.way, layout.mask
    names = frozenset(graph.ops[i].name for i in bits(mask))
    if way.kind not in (LINE, STRIPES, SLICES):
        raise PlanError(f"a step that is {way.kind!r} does not run by rows")
    if way.kind == SLICES and (len(names) > 1 or way.count < 2):
        raise PlanError(f"{len(names)} operators in {way.count} slices; slices take one operator")
    if strange := set(way.weights_stay) - names:
        raise PlanError(f"the weights of {sorted(strange)} stay, which are not in the step")
    if way.kind == STRIPES:
        made = make_stripes(graph, mask, way.count, layout.rings, layout.shared, stay.held)
        turns = Turns(made.stripes, made.writes, frozenset(way.weights_stay))
        loads = made.loads
    else:
        schedule = make_schedule(graph, mask, layout.rings, layout.shared, stay.held)
        rows = tuple(Turn(name, unit, unit + 1) for name, unit in schedule.steps)
        turns = Turns((rows,), schedule.writes, names)
        loads = schedule.loads
    _check(graph, layout, stay, loads, turns.needed)
    return turns


def _check(
    graph: OpGraph, layout: StepLayout, stay: Stay, loads: Iterable[str], needed: Iterable[str]
) -> None:
    """Check what crosses the border, and that what is on chip is there as a whole."""
    on_chip = layout.resident
    crossing = [name for name in needed if name not in on_chip or name in graph.outputs]
    for what, planned, found in (
        ("loads", layout.loads, loads),
        ("writes", layout.writes, crossing),
        ("keeps on chip", on_chip, stay.touched),
    ):
        if set(planned) != set(found):
            raise PlanError(f"the layout {what} {sorted(planned)}, the step {sorted(found)}")
    for name in sorted(on_chip):
        last = layout.shared[name]
        rows = graph.tensors[name].rows
        if layout.rings[last] != rows:
            raise PlanError(
                f"{name!r} stays on chip, where it has room for {layout.rings[last]} of {rows} rows"
            )
        # What is written to memory is written row by row, before anything is written over it.
        later = name in stay.kept or (name in needed and name not in layout.writes)
        if later and last != name:
            raise PlanError(f"{name!r} is needed after the step, but {last!r} is written over it")
