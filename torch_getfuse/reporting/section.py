"""The figures of one planned graph: what its report shows, before any of it is text.

Totals are of the whole network. The fusion groups hold the *fusable* operators, which is all that
the paper counts; the *unfusable* ones move what they move beside them, whatever method runs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch_getfuse.ir import Op, Tensor
from torch_getfuse.partition.cost.scheme import Dram, Evaluator, FusionScheme, once, smallest_buffer
from torch_getfuse.partition.group_ends import find_borders
from torch_getfuse.partition.node_set import mask_of
from torch_getfuse.partition.plan import FusionGroup, PartitionPlan
from torch_getfuse.reporting.blame import dram_dict

_UNSTREAMED = "a map that is not streamed along an axis"


@dataclass(frozen=True)
class Section:
    """One captured graph: a model has several where torch.compile breaks its graph.

    Attributes:
        plan: the plan of this graph, which carries the graph.
        name: ``"graph 0"``, ... where there are several; empty for the only one.
        unsupported: FX target -> number of operators that had no rule.
        notes: anything else a reader must know, a sentence each.
        gradients: whether it was traced with gradients enabled. ``plan(model, (x,))`` traces
            without, and a model that looks at the mode gives another graph there.
    """

    plan: PartitionPlan
    name: str = ""
    unsupported: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    gradients: bool = False

    @cached_property
    def scheme(self) -> FusionScheme:
        """The cost model of the plan."""
        return self.plan.make_scheme()

    # -- DRAM access ----------------------------------------------------------------------

    @cached_property
    def _alone(self) -> dict[str, Dram]:
        """Fusable operators -> what each moves as a group of its own."""
        plan, apart = self.plan, set(self.plan.unfusable)
        return {
            op.name: self.scheme.dram(1 << i, plan.buffer_bytes)
            for i, op in enumerate(plan.graph)
            if op.name not in apart
        }

    @cached_property
    def unfused(self) -> Dram:
        """DRAM access with every fusable operator as a group of its own, per sample."""
        return added(self._alone.values())

    @cached_property
    def planned(self) -> Dram:
        """DRAM access of the plan's groups, per sample."""
        return added(map(group_dram, self.plan.groups))

    @cached_property
    def unfusable(self) -> dict[str, Dram]:
        """Operators that alone do not fit -> what each moves by itself, at least, per sample.

        Every input read once, the output written once, the weights read once, whatever the
        method that runs it.
        """
        index = self.plan.graph.index
        return {name: once(self.scheme, 1 << index[name]) for name in self.plan.unfusable}

    @cached_property
    def outside(self) -> Dram:
        """What the unfusable operators move together, at least, per sample."""
        return added(self.unfusable.values())

    @property
    def network_unfused(self) -> Dram:
        """:attr:`unfused` and :attr:`outside`: the whole network, every operator alone."""
        return added((self.unfused, self.outside))

    @property
    def network_planned(self) -> Dram:
        """:attr:`planned` and :attr:`outside`: the whole network under the plan."""
        return added((self.planned, self.outside))

    # -- buffers --------------------------------------------------------------------------

    @cached_property
    def needs(self) -> dict[str, int | None]:
        """Unfusable operators -> the smallest buffer that holds each alone, in bytes.

        ``None`` where the scheme has no schedule for it at any size.
        """
        plan = self.plan
        return {
            name: smallest_buffer(self.scheme, 1 << plan.graph.index[name], plan.buffer_bytes)
            for name in plan.unfusable
        }

    @cached_property
    def border_needs(self) -> list[int | None]:
        """Per group, the smallest buffer that also holds what lies over its border, in bytes.

        ``None`` where the buffer is not what ends it, or no size would do.
        """
        plan = self.plan
        evaluator = Evaluator(self.scheme, plan.buffer_bytes)
        apart = mask_of(plan.graph.index[name] for name in plan.unfusable)
        return [
            smallest_buffer(self.scheme, border.over, plan.buffer_bytes) if border.over else None
            for border in find_borders(evaluator, plan.masks(), apart)
        ]

    # -- operators ------------------------------------------------------------------------

    @cached_property
    def held_whole(self) -> dict[str, str]:
        """Operators that are priced as holding whole maps -> why.

        These are limits of the cost model, not of a chip: a map that is not streamed along an
        axis (1-D and 3-D ones above all), or an operator without a rule for what it reads when.
        """
        tensors = self.plan.graph.tensors
        found = {}
        for op in self.plan.graph:
            if op.reason:
                found[op.name] = op.reason
            elif any(
                _is_unstreamed(tensors[name])
                for name in (*(read.tensor for read in op.reads), op.writes)
            ):
                found[op.name] = _UNSTREAMED
        return found

    def op(self, name: str) -> Op:
        """The operator of a name."""
        return self.plan.graph.ops[self.plan.graph.index[name]]

    @property
    def granularity(self) -> str | None:
        """Unit of the streams; ``None`` for a scheme that has none (BRR tiles whole rows)."""
        return self.plan.granularity if self.scheme.granularities else None

    # -- data -----------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values, sizes in integer bytes per sample.

        ``totals`` are of the whole network; ``totals["fusable"]`` is the paper's figure, of the
        fusion groups alone, and ``totals["unfusable"]`` the rest. ``saved_bytes`` = unfused -
        planned, of either.
        """
        plan = self.plan
        return {
            "name": self.name,
            "fingerprint": plan.graph.fingerprint,
            "assumptions": {
                "scheme": plan.scheme,
                "granularity": self.granularity,
                "buffer_bytes": plan.buffer_bytes,
                "activation_bytes": plan.activation_bytes,
                "weight_bytes": plan.weight_bytes,
                "samples": 1,
                "gradients": self.gradients,
            },
            "totals": {
                "operators": len(plan.graph),
                "groups": len(plan.groups),
                "unfused": dram_dict(self.network_unfused),
                "planned": dram_dict(self.network_planned),
                "saved_bytes": self.unfused.total - self.planned.total,
                "lower_bound_bytes": plan.lower_bound_bytes + self.outside.total,
                "proof": plan.proof,
                "claimed_by": plan.claimed_by,
                "max_buffer_bytes": plan.max_buffer_bytes,
                "fusable": {
                    "operators": len(plan.graph) - len(plan.unfusable),
                    "unfused": dram_dict(self.unfused),
                    "planned": dram_dict(self.planned),
                    "saved_bytes": self.unfused.total - self.planned.total,
                    "lower_bound_bytes": plan.lower_bound_bytes,
                },
                "unfusable": {"operators": len(plan.unfusable), **dram_dict(self.outside)},
            },
            "method": plan.method,
            "stages": plan.to_dict()["stages"],
            "groups": [
                {
                    "name": f"fusion_group_{k}",
                    "ops": list(group.ops),
                    "modules": [self.op(name).module for name in group.ops],
                    "buffer_bytes": group.buffer_bytes,
                    "needs_bytes": needs,
                    **dram_dict(group_dram(group)),
                    "ends": group.ends,
                }
                for k, (group, needs) in enumerate(zip(plan.groups, self.border_needs, strict=True))
            ],
            "unfusable": [
                {
                    "name": name,
                    "kind": self.op(name).kind,
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
            "notes": list(self.notes),
        }

    def records(self) -> list[dict[str, Any]]:
        """Flat rows: one per fusion group, then one per unfusable operator.

        The sum of ``dram_bytes`` is the whole network as planned, that of ``unfused_bytes`` the
        whole network with every operator alone.
        """
        groups = [
            {
                "graph": self.name,
                "group": f"fusion_group_{k}",
                "fusable": True,
                "operators": len(group.ops),
                "ops": " ".join(group.ops),
                "buffer_bytes": group.buffer_bytes,
                "needs_bytes": needs,
                "unfused_bytes": sum(self._alone[name].total for name in group.ops),
                **dram_dict(group_dram(group)),
                "ends": group.ends,
            }
            for k, (group, needs) in enumerate(
                zip(self.plan.groups, self.border_needs, strict=True)
            )
        ]
        apart = [
            {
                "graph": self.name,
                "group": f"unfusable_{k}",
                "fusable": False,
                "operators": 1,
                "ops": name,
                "buffer_bytes": 0,
                "needs_bytes": self.needs[name],
                "unfused_bytes": dram.total,
                **dram_dict(dram),
                "ends": "unfusable",
            }
            for k, (name, dram) in enumerate(self.unfusable.items())
        ]
        return groups + apart


def _is_unstreamed(tensor: Tensor) -> bool:
    """Whether a tensor is a map of several positions that is one unit all the same."""
    return tensor.stream_axis is None and any(size > 1 for size in tensor.shape[2:])


def added(drams: Iterable[Dram]) -> Dram:
    """The sum of what several move."""
    return Dram(*map(sum, zip(Dram(0, 0, 0), *drams, strict=True)))


def group_dram(group: FusionGroup) -> Dram:
    """What a group's record says that it moves."""
    return Dram(group.dram_read_bytes, group.dram_write_bytes, group.dram_weight_bytes)
