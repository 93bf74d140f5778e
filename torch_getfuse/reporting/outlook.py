"""What the cascade scheme would reach where a plan is of another: worked out when it is asked for.

A search within a second of counted work, whatever the clock says, so that a report says the same on
every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch_getfuse.accelerator import format_size
from torch_getfuse.partition.cost.cascade.model import Cascade
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.partition.steps.optimum import Proof, good_plan
from torch_getfuse.partition.steps.problem import StepProblem
from torch_getfuse.partition.work import STEPS_PER_SECOND, OutOfWork, Work

COMPARED = ("lbdf", "brr")
"""Schemes whose reports tell it."""

_STEPS = STEPS_PER_SECOND
"""Counted steps of the search: a second of counted work, up to a few by the clock."""

_FIRST_STEPS = 2 * _STEPS // 5
"""Of these, at most, for a good plan before the proof."""

_MODEL_STEPS = 300  # counted for each operator, for the cost model is made first


@dataclass(frozen=True, slots=True)
class Reach:
    """The optimum of cascade for the graph, buffer and widths of a plan.

    Attributes:
        dram_bytes: of the whole network.
        unfusable: operators that fit in no way, counted at the least that they move.
    """

    dram_bytes: int
    unfusable: int

    def told(self, planned: int, bounded: bool) -> str:
        """In words, beside what the plan moves.

        Args:
            planned: bytes of the whole network under the plan.
            bounded: whether unfusable operators count in that, at the least that they move.
        """
        alone = f", {self.unfusable} unfusable" if self.unfusable else ""
        change = self.dram_bytes - planned
        compared = "as much"
        if change:
            compared = f"{abs(change) / planned:.1%} {'less' if change < 0 else 'more'}"
        if change > 0 and bounded:
            compared += ", beside figures that count unfusable operators at their least"
        return (
            "scheme='cascade' (tensors that stay on chip, weights that stream) reaches "
            f"{format_size(self.dram_bytes)} (proved{alone}), {compared}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return {
            "dram_bytes": self.dram_bytes,
            "proof": "optimal",
            "unfusable": self.unfusable,
        }


class Outlook:
    """The :class:`Reach` beside one plan, worked out once however often it is asked for."""

    def __init__(self) -> None:
        self._known: tuple[PartitionPlan, Reach | None] | None = None

    def of(self, plan: PartitionPlan) -> Reach | None:
        """``None`` where it is not proved in time, and for plans of schemes not compared."""
        if plan.scheme not in COMPARED or plan.cost_model is not None:
            return None
        if self._known is None or self._known[0] is not plan:
            self._known = plan, _reach(plan)
        return self._known[1]


def _reach(plan: PartitionPlan) -> Reach | None:
    work = Work()
    try:
        with work.steps_within(_STEPS):
            work.add(_MODEL_STEPS * len(plan.graph))
            scheme = Cascade(plan.graph, plan.activation_bytes, plan.weight_bytes)
            problem = StepProblem(scheme, plan.buffer_bytes, work=work)
            with work.steps_within(_FIRST_STEPS):
                good_plan(problem)
            solved = Proof(problem).run()
    except OutOfWork:
        return None
    if solved.found is None or solved.stopped:
        return None
    return Reach(solved.found.dram_bytes, problem.unfusable.bit_count())
