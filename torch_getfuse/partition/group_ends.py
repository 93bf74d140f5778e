"""Why each fusion group of a plan ends: one reason with its numbers per group.

A group ends at the operators outside it that read its tensors. The first of them in topological
order is the *next operator*, and the reason says why it is not in the group. As it is the first,
it can be added alone: any path from the group to it through another operator would contain an
earlier consumer of the group, so the grown group stays convex.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch_getfuse.accelerator import format_size
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.node_set import bits, components, neighbours


class Reason(str, enum.Enum):
    """Why a group ends; a closed set, in the order in which the reasons are checked."""

    OUTPUT = "output"
    PINNED = "pinned"
    UNFUSABLE = "unfusable"
    BUFFER = "buffer"
    UNDEFINED = "undefined"
    BRANCH = "branch"
    REST = "rest"
    CHEAPER = "cheaper"
    EQUAL = "equal"
    UNTRIED = "untried"


@dataclass(frozen=True, slots=True)
class Border:
    """The end of one fusion group.

    Attributes:
        reason: why the next operator is not in the group.
        operator: name of the next operator; empty for ``OUTPUT``.
        other: the operator that has not run yet (``BRANCH``), else empty.
        excess_bytes: ``BUFFER``: demand with the next operator, minus the buffer size (0: exactly
            full, while the demand of a group must stay below the buffer). ``CHEAPER`` and
            ``UNTRIED``: by how much the plan's DRAM access would rise or fall.
        weight_bytes: ``BUFFER``: weights of the next operator, if the scheme holds weights.
        merged_bytes: ``CHEAPER``: demand of the two groups merged, minus the buffer size, if that
            is not negative; else ``None``.
        over: mask of the group together with the next operator (``CHEAPER``: with the next
            operator's whole group) if these do not fit into the buffer or it is unfusable; else 0.
    """

    reason: Reason
    operator: str = ""
    other: str = ""
    excess_bytes: int = 0
    weight_bytes: int = 0
    merged_bytes: int | None = None
    over: int = field(default=0, compare=False)

    def __str__(self) -> str:
        name, size = self.operator, format_size(self.excess_bytes)
        if self.reason is Reason.OUTPUT:
            return "output"
        if self.reason is Reason.PINNED:
            return f"pinned: a border lies before {name}"
        if self.reason is Reason.UNFUSABLE:
            return f"unfusable neighbour {name}"
        if self.reason is Reason.BUFFER:
            over = f"{size} over the buffer" if self.excess_bytes else "fills the buffer"
            if not self.weight_bytes:
                return f"next {name}: {over}"
            return f"next {name}: {over}, brings {format_size(self.weight_bytes)} of weights"
        if self.reason is Reason.UNDEFINED:
            return f"next {name}: the scheme has no schedule for a group with it"
        if self.reason is Reason.BRANCH:
            return f"branch: {name} also needs {self.other}"
        if self.reason is Reason.REST:
            return f"next {name} fits, but the rest of its group would not"
        if self.reason is Reason.CHEAPER:
            if self.merged_bytes is None:
                return f"adding {name} would cost {size} more DRAM access"
            return (
                f"adding {name} alone would cost {size} more DRAM access; its whole group would be "
                f"{format_size(self.merged_bytes)} over the buffer"
            )
        if self.reason is Reason.EQUAL:
            return f"adding {name} would change nothing"
        return f"not tried: adding {name} would save {size} of DRAM access"


def why_ends(evaluator: Evaluator, groups: Sequence[int], unfusable: int) -> list[str]:
    """The reason for each group as one short text (``FusionGroup.ends``).

    Args:
        evaluator: cost model and buffer of the plan.
        groups: masks of a legal plan's groups, in an executable order.
        unfusable: mask of the operators in no group.
    """
    return [str(border) for border in find_borders(evaluator, groups, unfusable)]


def find_borders(evaluator: Evaluator, groups: Sequence[int], unfusable: int) -> list[Border]:
    """The border of each group; arguments as for :func:`why_ends`."""
    return _Borders(evaluator, groups, unfusable).find()


class _Borders:
    """The borders of one plan."""

    def __init__(self, evaluator: Evaluator, groups: Sequence[int], unfusable: int) -> None:
        self.evaluator = evaluator
        self.graph = evaluator.graph
        self.groups = groups
        self.unfusable = unfusable
        self.home = {i: group for group in groups for i in bits(group)}
        self.near = neighbours(self.graph)

    def find(self) -> list[Border]:
        borders = []
        done = 0
        for group in self.groups:
            done |= group
            for i in bits(self.unfusable & ~done):
                if not self.graph.predecessors[i] & ~done:
                    done |= 1 << i
            borders.append(self._border(group, done))
        return borders

    def _border(self, group: int, done: int) -> Border:
        """The border of ``group``; ``done`` is the mask of what can have run after it."""
        after = 0
        for i in bits(group):
            after |= self.graph.readers[i]
        after &= ~group
        if not after:
            return Border(Reason.OUTPUT)
        following = (after & -after).bit_length() - 1
        name = self.graph.ops[following].name
        grown = group | 1 << following
        if self.unfusable >> following & 1:
            return Border(Reason.UNFUSABLE, name, over=grown)
        if self.evaluator.pins.torn(grown):
            return Border(Reason.PINNED, name)
        need = self.evaluator.buffer(grown)
        if need is None:
            return Border(Reason.UNDEFINED, name)
        if need >= self.evaluator.buffer_bytes:
            return Border(
                Reason.BUFFER,
                name,
                excess_bytes=need - self.evaluator.buffer_bytes,
                weight_bytes=self._weights(grown, name),
                over=grown,
            )
        waiting = self.graph.predecessors[following] & ~done
        if waiting:
            first = (waiting & -waiting).bit_length() - 1
            return Border(Reason.BRANCH, name, other=self.graph.ops[first].name)
        return self._compare(group, grown, name)

    def _compare(self, group: int, grown: int, name: str) -> Border:
        """Compare the plan's cost with ``grown`` in place of ``group``.

        Everything that the next operator reads has run, so the changed plan runs in the same
        order.
        """
        other = self.home[(grown ^ group).bit_length() - 1]
        blocks = [grown, *components(other & ~grown, self.near)]
        before = self.evaluator.dram(group) + self.evaluator.dram(other)
        merged = group | other
        if not all(self.evaluator.valid(block) for block in blocks):
            return Border(Reason.REST, name)
        rise = sum(map(self.evaluator.dram, blocks)) - before
        if rise > 0:
            need = self.evaluator.buffer(merged)
            excess = None if need is None else need - self.evaluator.buffer_bytes
            full = excess is not None and excess >= 0
            return Border(
                Reason.CHEAPER,
                name,
                excess_bytes=rise,
                merged_bytes=excess if full else None,
                over=merged if full else 0,
            )
        return Border(Reason.UNTRIED if rise else Reason.EQUAL, name, excess_bytes=-rise)

    def _weights(self, grown: int, name: str) -> int:
        """Bytes of the weights of operator ``name`` in the buffer demand of ``grown``."""
        terms = self.evaluator.scheme.terms(grown, self.evaluator.buffer_bytes)
        return sum(t.bytes for t in terms if t.kind == "weights" and t.name == name)
