"""The order in which a step makes and loads rows, checked against its layout."""

from __future__ import annotations

from collections.abc import Iterable

from torch_getfuse.backend.rowwise.onchip import Stay
from torch_getfuse.errors import PlanError
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.cascade.step_layout import StepLayout
from torch_getfuse.partition.cost.cascade.stripe_schedule import StripeSchedule, Turn, make_stripes
from torch_getfuse.partition.cost.cascade.way import KINDS, SLICES, STRIPES, UNFUSABLE
from torch_getfuse.partition.cost.lbdf.row_schedule import Schedule, make_schedule
from torch_getfuse.partition.node_set import bits

Stripes = tuple[tuple[Turn, ...], ...]


def turns_of(
    graph: OpGraph, layout: StepLayout, stay: Stay
) -> tuple[Stripes, tuple[str, ...], frozenset[str]]:
    """The turns of a step by stripes, and what else its schedule says.

    Returns:
        The stripes, one for a step by lines or of one slice; the tensors needed outside; the
        operators whose weights are fetched once per stripe sequence, not in each.

    Raises:
        PlanError: where the layout is not one of the step, or does not do for its schedule.
    """
    way, names = layout.way, frozenset(graph.ops[i].name for i in bits(layout.mask))
    if way.kind not in KINDS or way.kind == UNFUSABLE:
        raise PlanError(f"a step of way {way.kind!r} does not run by rows")
    if way.kind == SLICES and (len(names) > 1 or way.count < 2):
        raise PlanError(f"{len(names)} operators in {way.count} slices; slices take one operator")
    if not names.issuperset(way.weights_stay):
        raise PlanError(f"the weights of {way.weights_stay} are not all of the step's {len(names)}")
    schedule: Schedule | StripeSchedule
    if way.kind == STRIPES:
        schedule = make_stripes(
            graph, layout.mask, way.count, layout.rings, layout.shared, stay.held
        )
        stripes = schedule.stripes
        stays = frozenset(way.weights_stay)
    else:
        schedule = make_schedule(graph, layout.mask, layout.rings, layout.shared, stay.held)
        stripes = (tuple(Turn(name, unit, unit + 1) for name, unit in schedule.steps),)
        stays = names
    _equal("loads", layout.loads, schedule.loads)
    on_chip = layout.resident
    needed = set(schedule.writes)
    _equal(
        "writes",
        layout.writes,
        [n for n in schedule.writes if n not in on_chip or n in graph.outputs],
    )
    if not on_chip <= layout.shared.keys() or stay.touched != on_chip:
        raise PlanError(f"{sorted(on_chip)} are resident, of {sorted(layout.shared)}")
    for name in on_chip:
        last = layout.shared[name]
        if layout.rings[last] != graph.tensors[last].rows:
            raise PlanError(
                f"{name!r} is resident, but its storage holds {layout.rings[last]} of "
                f"{graph.tensors[last].rows} rows"
            )
    for name in (*stay.kept, *(needed & on_chip)):
        if layout.shared[name] != name:
            raise PlanError(
                f"{name!r} is still read, but {layout.shared[name]!r} is written over it"
            )
    return stripes, schedule.writes, stays


def _equal(what: str, planned: Iterable[str], found: Iterable[str]) -> None:
    if set(planned) != set(found):
        raise PlanError(f"the layout {what} {sorted(planned)}, the step {sorted(found)}")
