"""A network by kinds of operators: how many are fused, and what they compute and weigh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch_getfuse.accelerator import format_size
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.reporting.estimates import with_prefix
from torch_getfuse.reporting.export import Style
from torch_getfuse.terminal import Mark, Marked

_HEADERS = ("kind", "operators", "fused", "alone", "unfusable", "MACs", "weights")


@dataclass(frozen=True, slots=True)
class Kind:
    """The operators of one kind.

    Attributes:
        kind: as reports name it (``"conv2d"``).
        operators: their number: ``fused`` + ``alone`` + ``unfusable``.
        fused: those in groups of two or more.
        alone: those that are a group by themselves.
        unfusable: those that do not fit the buffer.
        macs: multiply-accumulates per sample; ``None`` where that of one is not known.
        weight_bytes: of their weights, as the plan stores them.
    """

    kind: str
    operators: int
    fused: int
    alone: int
    unfusable: int
    macs: int | None
    weight_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return asdict(self)


def kinds_of(plan: PartitionPlan, weights: Sequence[int]) -> list[Kind]:
    """The kinds of a plan's graph, those with most multiply-accumulates first.

    Args:
        weights: bytes of the weights of each operator.
    """
    together = {name for group in plan.groups if len(group.ops) > 1 for name in group.ops}
    unfusable = set(plan.unfusable)
    of_kind: dict[str, list[int]] = {}
    for i, op in enumerate(plan.graph):
        of_kind.setdefault(op.kind, []).append(i)
    found = []
    for kind, indices in of_kind.items():
        ops = [plan.graph.ops[i] for i in indices]
        apart = sum(op.name in unfusable for op in ops)
        fused = sum(op.name in together for op in ops)
        macs = [op.macs for op in ops if op.macs is not None]
        found.append(
            Kind(
                kind,
                len(ops),
                fused,
                len(ops) - fused - apart,
                apart,
                sum(macs) if len(macs) == len(ops) else None,
                sum(weights[i] for i in indices),
            )
        )
    return sorted(found, key=lambda kind: (-(kind.macs or 0), -kind.weight_bytes, -kind.operators))


def kinds_table(kinds: Sequence[Kind], style: Style) -> str:
    """A row per kind, and one of all operators."""
    macs = [kind.macs for kind in kinds if kind.macs is not None]
    everything = Kind(
        "all",
        sum(kind.operators for kind in kinds),
        sum(kind.fused for kind in kinds),
        sum(kind.alone for kind in kinds),
        sum(kind.unfusable for kind in kinds),
        sum(macs) if len(macs) == len(kinds) else None,
        sum(kind.weight_bytes for kind in kinds),
    )
    return style.table(
        [_row(kind) for kind in (*kinds, everything)], _HEADERS, "lrrrrrr", wrapped=(0,)
    )


def _row(kind: Kind) -> list[str]:
    unfusable = str(kind.unfusable)
    return [
        kind.kind,
        str(kind.operators),
        str(kind.fused),
        str(kind.alone),
        Marked(unfusable, Mark.OVER) if kind.unfusable else unfusable,
        format_macs(kind.macs),
        format_size(kind.weight_bytes),
    ]


def format_macs(macs: int | None) -> str:
    """Multiply-accumulates under a header that names them."""
    return "not known" if macs is None else with_prefix(macs, "", 4).strip()
