"""The figures of one planned graph, as shown by its report.

Totals are of the whole network. The fusion groups contain the *fusable* operators, the only ones
that the paper counts; the *unfusable* ones add the same DRAM access under any plan. Under cascade
all operators stand in groups, which are steps; the unfusable ones are told apart all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch_getfuse.accelerator import Accelerator, format_size
from torch_getfuse.errors import PlanError
from torch_getfuse.ir import Op, Tensor
from torch_getfuse.partition.cost.cascade.model import Cascade
from torch_getfuse.partition.cost.cascade.pricing import NOTHING
from torch_getfuse.partition.cost.cascade.way import UNFUSABLE
from torch_getfuse.partition.cost.scheme import Dram, Evaluator, FusionScheme, once, smallest_buffer
from torch_getfuse.partition.fusion_group import FusionGroup
from torch_getfuse.partition.group_ends import find_borders
from torch_getfuse.partition.node_set import mask_of
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.reporting.blame import dram_dict
from torch_getfuse.reporting.estimates import Estimates
from torch_getfuse.reporting.export import features
from torch_getfuse.reporting.kinds import Kind, kinds_of
from torch_getfuse.reporting.outlook import Outlook, Reach
from torch_getfuse.reporting.steps import Occupancy, StepFigures

_UNSTREAMED = "a map that is not streamed along an axis"


@dataclass(frozen=True)
class Section:
    """One captured graph: a model has several if torch.compile breaks its graph.

    Attributes:
        plan: the plan of this graph, which contains the graph.
        name: ``"graph 0"``, ... if there are several; empty for a single one.
        unsupported: FX target -> number of operators without a rule.
        notes: other remarks for the reader, one sentence each.
        gradients: whether it was traced with gradients enabled. ``plan(model, (x,))`` traces
            without, and a model that checks the mode gives a different graph there.
        accelerator: what it was planned for, whose figures give estimates; a plan file does not
            say.
        outlook: what is known of cascade beside the plan; shared by copies of a section, so that
            it is worked out once.
    """

    plan: PartitionPlan
    name: str = ""
    unsupported: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    gradients: bool = False
    accelerator: Accelerator | None = None
    outlook: Outlook = field(default_factory=Outlook, compare=False, repr=False)

    @cached_property
    def scheme(self) -> FusionScheme:
        """The cost model of the plan."""
        return self.plan.make_scheme()

    @cached_property
    def steps(self) -> StepFigures | None:
        """What only a cascade plan has; ``None`` under other schemes."""
        return StepFigures(self.plan) if isinstance(self.scheme, Cascade) else None

    @property
    def reach(self) -> Reach | None:
        """What cascade would reach in the same buffer; ``None`` where nothing is proved of it."""
        return self.outlook.of(self.plan)

    # -- DRAM access ----------------------------------------------------------------------

    @cached_property
    def _alone(self) -> dict[str, Dram]:
        """Fusable operators -> DRAM access of each as a single-operator group."""
        apart = set(self.plan.unfusable)
        return {
            op.name: self._single(1 << i)
            for i, op in enumerate(self.plan.graph)
            if op.name not in apart
        }

    def _single(self, mask: int) -> Dram:
        """DRAM access of a fusable operator alone, with nothing resident."""
        plan, scheme = self.plan, self.scheme
        if not isinstance(scheme, Cascade):
            return scheme.dram(mask, plan.buffer_bytes)
        step = scheme.step(mask, NOTHING, 0, plan.buffer_bytes)
        if step is None:
            name = plan.graph.ops[mask.bit_length() - 1].name
            raise PlanError(
                f"{name!r} is not called unfusable but does not fit {plan.buffer_bytes} B"
            )
        return step.dram

    def alone(self, name: str) -> Dram:
        """DRAM access of an operator by itself, per sample; of an unfusable one the least."""
        return self.unfusable[name] if name in self.unfusable else self._alone[name]

    @cached_property
    def unfused(self) -> Dram:
        """DRAM access with every fusable operator as a single-operator group, per sample."""
        return added(self._alone.values())

    @cached_property
    def planned(self) -> Dram:
        """DRAM access of the plan's groups, per sample, but for steps of unfusable operators."""
        return added(group.dram for group in self.plan.groups if is_fusable(group))

    @cached_property
    def unfusable(self) -> dict[str, Dram]:
        """Operators that do not fit alone -> least DRAM access of each, per sample.

        Every input read once, the output written once and the weights read once, by any method.
        """
        index = self.plan.graph.index
        return {name: once(self.scheme, 1 << index[name]) for name in self.plan.unfusable}

    @cached_property
    def outside(self) -> Dram:
        """Least DRAM access of all unfusable operators together, per sample."""
        return added(self.unfusable.values())

    @cached_property
    def floor(self) -> Dram:
        """The inputs, outputs and weights of the network, each once: no plan moves less."""
        return once(self.scheme, (1 << len(self.plan.graph)) - 1)

    @property
    def lower_bound(self) -> int:
        """No legal plan of the whole network moves fewer bytes per sample."""
        bound = self.plan.lower_bound_bytes
        return bound + self.outside.total if self.plan.apart else bound

    @property
    def fusable_lower_bound(self) -> int:
        """The same of the fusable operators alone."""
        return max(0, self.lower_bound - self.outside.total)

    @property
    def network_unfused(self) -> Dram:
        """:attr:`unfused` plus :attr:`outside`: the whole network, every operator alone."""
        return added((self.unfused, self.outside))

    @property
    def network_planned(self) -> Dram:
        """:attr:`planned` plus :attr:`outside`: the whole network under the plan."""
        return added((self.planned, self.outside))

    # -- compute --------------------------------------------------------------------------

    def macs_of(self, names: Iterable[str]) -> int | None:
        """Multiply-accumulates of operators; ``None`` where that of one is not known."""
        total = 0
        for name in names:
            macs = self.op(name).macs
            if macs is None:
                return None
            total += macs
        return total

    @cached_property
    def uncounted(self) -> tuple[str, ...]:
        """Operators whose multiply-accumulates are not known."""
        return tuple(op.name for op in self.plan.graph if op.macs is None)

    @property
    def known_macs(self) -> int | None:
        """Multiply-accumulates of all others, per sample; ``None`` if there are none."""
        if len(self.uncounted) == len(self.plan.graph):
            return None
        return sum(op.macs or 0 for op in self.plan.graph)

    def intensity(self, dram: Dram) -> float | None:
        """Arithmetic intensity: known multiply-accumulates per byte of DRAM access."""
        if self.known_macs is None or not dram.total:
            return None
        return self.known_macs / dram.total

    @cached_property
    def kinds(self) -> list[Kind]:
        """The operators by kind, those with most multiply-accumulates first."""
        return kinds_of(self.plan, self.scheme.weights)

    @property
    def estimates(self) -> Estimates | None:
        """Least time and energy; ``None`` where the accelerator's figures say nothing."""
        if self.accelerator is None:
            return None
        widths = (self.plan.activation_bytes, self.plan.weight_bytes)
        found = Estimates(
            self.accelerator, self.network_unfused, self.network_planned, self.known_macs, widths
        )
        return found if found.known else None

    @property
    def remarks(self) -> tuple[str, ...]:
        """:attr:`obstacle` and :attr:`notes`."""
        return (self.obstacle, *self.notes) if self.obstacle else self.notes

    @property
    def obstacle(self) -> str:
        """That the plan needs a memory which the accelerator has not; else empty."""
        target = self.accelerator
        between = features(self.network_planned) - features(self.floor)
        if target is None or not target.read_only or not between:
            return ""
        other = "" if self.steps is not None else "scheme='cascade' (tensors stay between steps), "
        return (
            f"{target.name} cannot run this plan as it is: its memory outside is read-only flash, "
            f"and the plan moves {format_size(between)} of feature maps there and back. To keep "
            f"them on chip try {other}a larger buffer= than {format_size(self.plan.buffer_bytes)}, "
            "or an accelerator with DRAM, such as ethos-u65-256"
        )

    # -- buffers --------------------------------------------------------------------------

    @cached_property
    def needs(self) -> dict[str, int | None]:
        """Unfusable operators -> the smallest buffer into which each fits alone, in bytes.

        ``None`` if the scheme has no schedule for it at any size.
        """
        plan = self.plan
        return {
            name: smallest_buffer(self.scheme, 1 << plan.graph.index[name], plan.buffer_bytes)
            for name in plan.unfusable
        }

    @cached_property
    def border_needs(self) -> list[int | None]:
        """Per group, the smallest buffer for it and the operators over its border, in bytes.

        ``None`` if the group does not end because of the buffer, or no size suffices, and for the
        steps of a cascade plan, which end by tensors that leave (:attr:`StepFigures.leaving`).
        """
        plan = self.plan
        if self.steps is not None:
            return [
                None if is_fusable(group) else self.needs[group.ops[0]] for group in plan.groups
            ]
        evaluator = Evaluator(self.scheme, plan.buffer_bytes, pins=plan.pins_of(self.scheme))
        apart = mask_of(plan.graph.index[name] for name in plan.unfusable)
        return [
            smallest_buffer(self.scheme, border.over, plan.buffer_bytes) if border.over else None
            for border in find_borders(evaluator, plan.masks(), apart)
        ]

    # -- operators ------------------------------------------------------------------------

    @cached_property
    def held_whole(self) -> dict[str, str]:
        """Operators whose cost assumes that whole maps are held -> reason.

        These are limits of the cost model, not of a chip: a map that is not streamed along an
        axis (mostly 1-D and 3-D ones), or an operator without a rule for its windows.
        """
        tensors = self.plan.graph.tensors
        held = {}
        for op in self.plan.graph:
            if op.reason:
                held[op.name] = op.reason
            elif any(
                _is_unstreamed(tensors[name])
                for name in (*(read.tensor for read in op.reads), op.writes)
            ):
                held[op.name] = _UNSTREAMED
        return held

    def op(self, name: str) -> Op:
        """The operator called ``name``."""
        return self.plan.graph.ops[self.plan.graph.index[name]]

    @property
    def granularity(self) -> str | None:
        """Unit of the streams; ``None`` for a scheme that has none (BRR tiles whole rows)."""
        return self.plan.granularity if self.scheme.granularities else None

    # -- data -----------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values; sizes are integer bytes per sample.

        ``totals`` are of the whole network; ``totals["fusable"]`` is the paper's figure, of the
        fusion groups alone, and ``totals["unfusable"]`` the rest. ``saved_bytes`` is unfused minus
        planned. Under cascade each group is a step with its ``way``, unfusable operators among
        them, and there are :meth:`StepFigures.to_dict` and ``totals["floor"]`` as well; under
        LBDF and BRR ``cascade`` says what that would reach. ``macs`` are multiply-accumulates per
        sample, ``None`` where some are not known. ``estimates`` are ``None`` unless the accelerator
        has figures for them.
        """
        plan, steps = self.plan, self.steps
        floor = {} if steps is None else {"floor": dram_dict(self.floor)}
        return {
            "name": self.name,
            "fingerprint": plan.graph.fingerprint,
            "assumptions": self._assumptions(),
            "totals": {
                "operators": len(plan.graph),
                "groups": len(plan.groups),
                "unfused": dram_dict(self.network_unfused),
                "planned": dram_dict(self.network_planned),
                "saved_bytes": self.unfused.total - self.planned.total,
                "lower_bound_bytes": self.lower_bound,
                "proof": plan.proof,
                "claimed_by": plan.claimed_by,
                "max_buffer_bytes": plan.max_buffer_bytes,
                "fusable": {
                    "operators": len(plan.graph) - len(plan.unfusable),
                    "unfused": dram_dict(self.unfused),
                    "planned": dram_dict(self.planned),
                    "saved_bytes": self.unfused.total - self.planned.total,
                    "lower_bound_bytes": self.fusable_lower_bound,
                },
                "unfusable": {"operators": len(plan.unfusable), **dram_dict(self.outside)},
                **floor,
            },
            "macs": {
                "total": None if self.uncounted else self.known_macs,
                "known": self.known_macs,
                "unknown": list(self.uncounted),
                "per_byte": {
                    "unfused": self.intensity(self.network_unfused),
                    "planned": self.intensity(self.network_planned),
                },
            },
            "kinds": [kind.to_dict() for kind in self.kinds],
            "estimates": self.estimates and self.estimates.to_dict(),
            "method": plan.method,
            "stages": plan.to_dict()["stages"],
            "groups": [
                {
                    "name": f"fusion_group_{k}",
                    "ops": list(group.ops),
                    "modules": [self.op(name).module for name in group.ops],
                    "macs": self.macs_of(group.ops),
                    "buffer_bytes": group.buffer_bytes,
                    "needs_bytes": needs,
                    **dram_dict(group.dram),
                    "ends": group.ends,
                    **({} if group.way is None else {"way": group.way.to_dict()}),
                }
                for k, (group, needs) in enumerate(zip(plan.groups, self.border_needs, strict=True))
            ],
            **(
                {"cascade": self.reach and self.reach.to_dict()}
                if steps is None
                else steps.to_dict()
            ),
            "unfusable": [
                {
                    "name": name,
                    "kind": self.op(name).kind,
                    "macs": self.op(name).macs,
                    "needs_bytes": self.needs[name],
                    **dram_dict(dram),
                }
                for name, dram in self.unfusable.items()
            ],
            "held_whole": [
                {"name": name, "kind": self.op(name).kind, "reason": reason}
                for name, reason in self.held_whole.items()
            ],
            "unsupported": dict(self.unsupported),
            "notes": list(self.remarks),
        }

    def _assumptions(self) -> dict[str, Any]:
        plan = self.plan
        cascade = {"residency": plan.residency, "slice_channels": plan.slice_channels}
        return {
            "scheme": plan.scheme,
            "granularity": self.granularity,
            "buffer_bytes": plan.buffer_bytes,
            "activation_bytes": plan.activation_bytes,
            "weight_bytes": plan.weight_bytes,
            "align_channels": plan.align_channels,
            **({} if self.steps is None else cascade),
            **plan.pins,
            "accelerator": None if self.accelerator is None else self.accelerator.name,
            "samples": 1,
            "gradients": self.gradients,
        }

    def records(self) -> list[dict[str, Any]]:
        """Flat rows: one per fusion group, then one per unfusable operator that stands in none.

        The sum of ``dram_bytes`` is that of the whole network as planned, the sum of
        ``unfused_bytes`` that of the whole network with every operator alone. Under cascade there
        is a row per step, with its way and what is on chip.
        """
        plan = self.plan
        alone = {**self._alone, **self.unfusable}
        held: Iterable[Occupancy | None] = [None] * len(plan.groups)
        if self.steps is not None:
            held = self.steps.occupancy
        groups = [
            {
                "graph": self.name,
                "group": f"fusion_group_{k}",
                "fusable": is_fusable(group),
                "operators": len(group.ops),
                "ops": " ".join(group.ops),
                "way": str(group.way or ""),
                "macs": self.macs_of(group.ops),
                "buffer_bytes": group.buffer_bytes,
                "needs_bytes": needs,
                "unfused_bytes": sum(alone[name].total for name in group.ops),
                **dram_dict(group.dram),
                **_held(on_chip),
                "ends": group.ends,
            }
            for k, (group, needs, on_chip) in enumerate(
                zip(plan.groups, self.border_needs, held, strict=True)
            )
        ]
        apart = [
            {
                "graph": self.name,
                "group": f"unfusable_{k}",
                "fusable": False,
                "operators": 1,
                "ops": name,
                "way": "",
                "macs": self.op(name).macs,
                "buffer_bytes": 0,
                "needs_bytes": self.needs[name],
                "unfused_bytes": self.unfusable[name].total,
                **dram_dict(self.unfusable[name]),
                **_held(None),
                "ends": "unfusable",
            }
            for k, name in enumerate(plan.apart)
        ]
        return groups + apart


ON_CHIP = ("weights_bytes", "lines_bytes", "residents_bytes", "idle_bytes")
"""Fields of a row that only the steps of a cascade plan have."""


def _held(on_chip: Occupancy | None) -> dict[str, int | None]:
    """What the buffer holds; ``None`` of all where that is not known."""
    if on_chip is None or on_chip.unknown:
        return dict.fromkeys(ON_CHIP)
    told = on_chip.to_dict()
    return {name: told[name] for name in ON_CHIP}


def is_fusable(group: FusionGroup) -> bool:
    """Whether a group is a fusion group, and no step of an unfusable operator."""
    return group.way is None or group.way.kind != UNFUSABLE


def _is_unstreamed(tensor: Tensor) -> bool:
    """Whether a tensor is a map of several positions that is not streamed, but a single unit."""
    return tensor.stream_axis is None and any(size > 1 for size in tensor.shape[2:])


def added(drams: Iterable[Dram]) -> Dram:
    """The sum of DRAM accesses."""
    return Dram(*map(sum, zip(Dram(0, 0, 0), *drams, strict=True)))
