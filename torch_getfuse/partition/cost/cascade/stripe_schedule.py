"""The schedule of a step in stripes (docs/method.md, section 12), for the executor.

In each stripe tensors from outside are loaded and then the operators run one after another, each
making at once the rows that the stripe asks of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch_getfuse.errors import PlanError
from torch_getfuse.ir import OpGraph, WindowKind
from torch_getfuse.partition.cost.lbdf.row_schedule import ScheduleRun


class Turn(NamedTuple):
    """Rows ``[low, high)`` of one tensor: made by its operator, or loaded if it is from outside.

    An operator that makes nothing in a stripe has a turn of no rows: its weights come by all the
    same.
    """

    tensor: str
    low: int
    high: int


@dataclass(frozen=True)
class StripeSchedule:
    """The turns of a step, and the rings that they need.

    Attributes:
        stripes: turns in order; each row is made or loaded once.
        storage: tensor -> last tensor in its storage.
        rings: last tensor of each storage -> rows of its ring.
        loads, writes: tensors loaded from outside, and tensors needed outside.
    """

    stripes: tuple[tuple[Turn, ...], ...]
    storage: Mapping[str, str]
    rings: Mapping[str, int]
    loads: tuple[str, ...]
    writes: tuple[str, ...]


def make_stripes(
    graph: OpGraph,
    mask: int,
    count: int,
    rings: Mapping[str, int],
    storage: Mapping[str, str],
    held: Collection[str] = (),
) -> StripeSchedule:
    """The schedule of a step in stripes, in rings of a given size.

    Rows that are needed outside but that no stripe asks for are made row by row after the last
    one, with the weights of its fetch, and tensors from outside are loaded to their ends: as
    :func:`~torch_getfuse.partition.cost.lbdf.row_schedule.make_schedule` does.

    Args:
        graph: the operator graph.
        mask: the step.
        count: stripes, at least one.
        rings: last tensor of each storage -> rows.
        storage: tensor -> last tensor in its storage.
        held: tensors from outside of which all rows are there from the start.

    Raises:
        PlanError: if a ring is too small for the schedule, or a row is overwritten too early.
    """
    run = ScheduleRun(graph, mask, rings, storage, held)
    longest = max(run.rows[name] for name in run.sinks)
    if not 1 <= count <= longest:
        raise PlanError(f"{count} stripes of a step whose longest sink has {longest} rows")
    stripes = [_stripe(run, q, count) for q in range(1, count + 1)]
    run.complete()
    stripes[-1] += [Turn(name, unit, unit + 1) for name, unit in run.steps]
    return StripeSchedule(
        tuple(map(tuple, stripes)), run.storage, dict(rings), run.loads, run.writes
    )


def _stripe(run: ScheduleRun, q: int, count: int) -> list[Turn]:
    """Turns of stripe ``q``, counted in ``run``."""
    ends = _ends(run, q, count)
    released = {last: run.released(last, run.made[last]) for last in run.rings}
    # Reductions that have not had their turn in this stripe.
    behind = {
        op.writes
        for op in run.makers.values()
        if any(read.window.kind is WindowKind.REDUCE for read in op.reads)
    }
    turns = []
    for name in (*run.loads, *run.makers):
        turn = Turn(name, run.made[name], ends[name])
        if turn.low < turn.high:
            run.check_overwritten(name, turn.high, behind)
            run.made[name] = turn.high
            run.check_ring(name, released[run.storage[name]])
        behind.discard(name)
        if turn.low < turn.high or name in run.makers:
            turns.append(turn)
    return turns


def _ends(run: ScheduleRun, q: int, count: int) -> dict[str, int]:
    """Rows of each tensor that there are at the end of stripe ``q``."""
    ends = dict(run.made)
    for name in run.sinks:
        ends[name] = -(-q * run.rows[name] // count)
    for name in reversed(run.makers):
        op = run.makers[name]
        for read in op.reads if ends[name] else ():
            needed = max(run.ends[op.name, read.tensor][: ends[name]])
            ends[read.tensor] = max(ends[read.tensor], needed)
    return ends
