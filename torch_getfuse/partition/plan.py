"""Partition plans: which operators run together, what that costs, and the proof.

A plan is self-contained: it carries the operator graph, so a saved plan can be checked by
anyone, and compared by fingerprint with the graph that a compiler holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch_getfuse.errors import GetfuseError, PlanError
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost import Dram, FusionScheme
from torch_getfuse.partition.group import (
    bits,
    is_connected,
    mask_of,
    neighbours,
    topological_order,
)
from torch_getfuse.partition.schemes import make_scheme

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class FusionGroup:
    """Operators that run together, and what they cost per sample in bytes.

    Attributes:
        ops: operator names in topological order.
        buffer_bytes: ``F_b``, what the group needs on chip.
        dram_read_bytes, dram_write_bytes, dram_weight_bytes: the parts of ``F_D``.
        ends: why the group ends where it does.
    """

    ops: tuple[str, ...]
    buffer_bytes: int
    dram_read_bytes: int
    dram_write_bytes: int
    dram_weight_bytes: int
    ends: str = ""

    @property
    def dram_bytes(self) -> int:
        """``F_D``."""
        return self.dram_read_bytes + self.dram_write_bytes + self.dram_weight_bytes


@dataclass(frozen=True, slots=True)
class Stage:
    """What one search method reached on the way to a plan.

    Attributes:
        method: its name.
        dram_bytes: DRAM access of its best plan; ``None`` if it found none.
        plans: plans (or, for the exact search, groups) it evaluated.
        seconds: wall time.
        stopped: why it ended early: ``""``, ``"time limit"``, ``"interrupted"``, ...
    """

    method: str
    dram_bytes: int | None
    plans: int
    seconds: float
    stopped: str = ""


@dataclass(frozen=True)
class PartitionPlan:
    """A set of fusion groups that covers every fusable operator once (method.md section 1).

    Attributes:
        graph: the operator graph.
        scheme, granularity, buffer_bytes, activation_bytes, weight_bytes: the cost model;
            ``weight_bytes`` is ``None`` where weights count at the widths they are stored in.
        groups: fusion groups in an order in which they can run.
        unfusable: operators that alone do not fit the buffer; not in ``dram_bytes``.
        lower_bound_bytes: no legal plan has less DRAM access.
        proof: ``"optimal"``, ``"bound"`` (a bound above zero is proved) or ``None``.
        method: the search that found it.
        stages: what each stage of the search reached.
    """

    graph: OpGraph
    scheme: str
    granularity: str
    buffer_bytes: int
    activation_bytes: int
    weight_bytes: int | None
    groups: tuple[FusionGroup, ...]
    unfusable: tuple[str, ...] = ()
    lower_bound_bytes: int = 0
    proof: str | None = None
    method: str = ""
    stages: tuple[Stage, ...] = ()

    @property
    def dram_bytes(self) -> int:
        """Reads, writes and weights of all groups, per sample."""
        return sum(group.dram_bytes for group in self.groups)

    @property
    def feature_bytes(self) -> int:
        """Reads and writes of all groups, per sample."""
        return sum(group.dram_read_bytes + group.dram_write_bytes for group in self.groups)

    @property
    def max_buffer_bytes(self) -> int:
        """Maximum buffer usage (MBU) over the groups."""
        return max((group.buffer_bytes for group in self.groups), default=0)

    @property
    def gap(self) -> float:
        """How far above the optimum the plan can be at most, as a fraction of the bound."""
        if self.proof == "optimal" or not self.dram_bytes:
            return 0.0
        if not self.lower_bound_bytes:
            return float("inf")
        return self.dram_bytes / self.lower_bound_bytes - 1

    def make_scheme(self) -> FusionScheme:
        """The cost model under which the plan was made."""
        return make_scheme(
            self.scheme, self.graph, self.granularity, self.activation_bytes, self.weight_bytes
        )

    def masks(self) -> list[int]:
        """The groups as bit masks over ``graph.ops``.

        Raises:
            PlanError: for a name that the graph has not.
        """
        try:
            return [mask_of(self.graph.index[name] for name in group.ops) for group in self.groups]
        except KeyError as error:
            raise PlanError(f"the plan names {error.args[0]!r}, which its graph has not") from error

    def verify(self) -> PartitionPlan:
        """Hold every rule of a legal plan and recompute every figure; returns the plan.

        Raises:
            PlanError: names the first group that breaks a rule, with the numbers.
        """
        graph = self.graph
        masks = self.masks()
        seen: dict[str, int] = {}
        for name in self.unfusable:
            if name not in graph.index:
                raise PlanError(f"unfusable operator {name!r} is not in the plan's graph")
            seen[name] = -1
        for k, group in enumerate(self.groups):
            if not group.ops:
                raise PlanError(f"fusion group {k} is empty")
            for name in group.ops:
                if name in seen:
                    raise PlanError(f"{name!r} stands in fusion group {k} and a second time")
                seen[name] = k
        missing = [op.name for op in graph if op.name not in seen]
        if missing:
            raise PlanError(
                f"{len(missing)} operators stand in no group: {', '.join(missing[:3])}"
                + (", ..." if len(missing) > 3 else "")
            )
        alone = [1 << graph.index[name] for name in self.unfusable]
        order = topological_order([*masks, *alone], graph)
        if order is None:
            raise PlanError("the groups depend on each other in a cycle; no order can run them")
        near = neighbours(graph)
        scheme = self.make_scheme()
        for k, (group, mask) in enumerate(zip(self.groups, masks, strict=True)):
            if not is_connected(mask, near):
                raise PlanError(f"fusion group {k} ({group.ops[0]}, ...) is not connected")
        for k, (group, mask) in enumerate(zip(self.groups, masks, strict=True)):
            self._verify_costs(k, group, mask, scheme)
        for name, mask in zip(self.unfusable, alone, strict=True):
            need = scheme.buffer(mask, self.buffer_bytes)
            if need is not None and need < self.buffer_bytes:
                raise PlanError(
                    f"{name!r} is called unfusable but needs only {need} of {self.buffer_bytes} B"
                )
        if self.lower_bound_bytes > self.dram_bytes:
            raise PlanError(
                f"lower bound {self.lower_bound_bytes} B is above the plan's {self.dram_bytes} B"
            )
        if self.proof == "optimal" and self.lower_bound_bytes != self.dram_bytes:
            raise PlanError(
                f"the plan is called optimal at {self.dram_bytes} B but its lower bound is "
                f"{self.lower_bound_bytes} B"
            )
        return self

    def _verify_costs(self, k: int, group: FusionGroup, mask: int, scheme: FusionScheme) -> None:
        need = scheme.buffer(mask, self.buffer_bytes)
        if need is None or need >= self.buffer_bytes:
            raise PlanError(
                f"fusion group {k} ({group.ops[0]}, ...) needs {need} B, not below the buffer of "
                f"{self.buffer_bytes} B"
            )
        dram = scheme.dram(mask, self.buffer_bytes)
        told = (group.buffer_bytes, Dram(*_dram_of(group)))
        if told != (need, dram):
            raise PlanError(
                f"fusion group {k} ({group.ops[0]}, ...) states {told[0]} B of buffer and "
                f"{tuple(told[1])} B of DRAM reads, writes and weights; the cost model says "
                f"{need} B and {tuple(dram)} B"
            )

    def check_graph(self, graph: OpGraph) -> None:
        """Refuse a plan that was made for another graph; raises :class:`PlanError`."""
        if graph.fingerprint == self.graph.fingerprint:
            return
        ours, theirs = self.graph, graph
        for mine, other in zip(ours.ops, theirs.ops, strict=False):
            if mine != other or ours.tensors[mine.writes] != theirs.tensors[other.writes]:
                where = (
                    f"first difference: {mine.name} ({mine.kind}) "
                    f"{ours.tensors[mine.writes].shape} in the plan, {other.name} ({other.kind}) "
                    f"{theirs.tensors[other.writes].shape} in the model"
                )
                break
        else:
            where = f"{len(ours)} operators in the plan, {len(theirs)} in the model"
        raise PlanError(
            f"the plan belongs to another graph (fingerprint {ours.fingerprint[:12]}, the model's "
            f"is {theirs.fingerprint[:12]}); {where}; make a new plan for this model and shape"
        )

    def to_dict(self) -> dict[str, Any]:
        """plan.json, schema_version 1 (interface.md)."""
        return {
            "schema_version": SCHEMA_VERSION,
            "scheme": self.scheme,
            "granularity": self.granularity,
            "buffer_bytes": self.buffer_bytes,
            "activation_bytes": self.activation_bytes,
            "weight_bytes": self.weight_bytes,
            "graph": {"fingerprint": self.graph.fingerprint, **self.graph.to_dict()},
            "groups": [
                {
                    "ops": list(group.ops),
                    "buffer_bytes": group.buffer_bytes,
                    "dram_read_bytes": group.dram_read_bytes,
                    "dram_write_bytes": group.dram_write_bytes,
                    "dram_weight_bytes": group.dram_weight_bytes,
                    "ends": group.ends,
                }
                for group in self.groups
            ],
            "unfusable": list(self.unfusable),
            "dram_bytes": self.dram_bytes,
            "lower_bound_bytes": self.lower_bound_bytes,
            "proof": self.proof,
            "method": self.method,
            "stages": [
                {
                    "method": stage.method,
                    "dram_bytes": stage.dram_bytes,
                    "plans": stage.plans,
                    "seconds": stage.seconds,
                    "stopped": stage.stopped,
                }
                for stage in self.stages
            ],
        }

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> PartitionPlan:
        """The inverse of :meth:`to_dict`.

        Raises:
            PlanError: for another schema version, missing keys, or a graph that does not have
                the fingerprint that the file states.
        """
        if not isinstance(form, Mapping):
            raise PlanError(f"a plan is a JSON object, not {type(form).__name__}")
        version = form.get("schema_version")
        if version != SCHEMA_VERSION:
            raise PlanError(
                f"schema_version is {version!r}; this package reads {SCHEMA_VERSION}; make the "
                "plan again"
            )
        try:
            entry = form["graph"]
            plan = cls(
                graph=replace(
                    OpGraph.from_dict(entry),
                    activation_bytes=int(form["activation_bytes"]),
                    weight_bytes=int(form["weight_bytes"] or 0),
                ),
                scheme=str(form["scheme"]),
                granularity=str(form["granularity"]),
                buffer_bytes=int(form["buffer_bytes"]),
                activation_bytes=int(form["activation_bytes"]),
                weight_bytes=None if form["weight_bytes"] is None else int(form["weight_bytes"]),
                groups=tuple(
                    FusionGroup(
                        ops=tuple(map(str, group["ops"])),
                        buffer_bytes=int(group["buffer_bytes"]),
                        dram_read_bytes=int(group["dram_read_bytes"]),
                        dram_write_bytes=int(group["dram_write_bytes"]),
                        dram_weight_bytes=int(group["dram_weight_bytes"]),
                        ends=str(group.get("ends", "")),
                    )
                    for group in form["groups"]
                ),
                unfusable=tuple(map(str, form["unfusable"])),
                lower_bound_bytes=int(form["lower_bound_bytes"]),
                proof=form["proof"],
                method=str(form["method"]),
                stages=tuple(
                    Stage(
                        str(s["method"]),
                        s["dram_bytes"],
                        int(s["plans"]),
                        float(s["seconds"]),
                        str(s.get("stopped", "")),
                    )
                    for s in form["stages"]
                ),
            )
        except KeyError as error:
            raise PlanError(f"the plan file is damaged: {error.args[0]!r} is missing") from error
        except (TypeError, AttributeError, ValueError, OverflowError) as error:
            raise PlanError(f"the plan file is damaged: {error}") from error
        if plan.weight_bytes is None and any(op.weight_bytes is None for op in plan.graph):
            raise PlanError(
                "the plan file is damaged: it states neither one width of all weights nor the "
                "bytes of each operator's"
            )
        if entry.get("fingerprint") != plan.graph.fingerprint:
            raise PlanError(
                "the plan file is damaged: its graph does not have the fingerprint that it states"
            )
        if int(form.get("dram_bytes", -1)) != plan.dram_bytes:
            raise PlanError(
                f"the plan file is damaged: it states {form.get('dram_bytes')} B of DRAM access, "
                f"its groups add up to {plan.dram_bytes} B"
            )
        if plan.proof not in ("optimal", "bound", None):
            raise PlanError(f"the plan file is damaged: unknown proof {plan.proof!r}")
        return plan

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; readable one group per line is not promised, the keys are."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        lines = [
            f"{len(self.groups)} fusion groups, {self.dram_bytes} B of DRAM access, "
            f"buffer {self.max_buffer_bytes} of {self.buffer_bytes} B"
        ]
        lines += [
            f"  fusion_group_{k}: {', '.join(group.ops)}" for k, group in enumerate(self.groups)
        ]
        return "\n".join(lines)


def load_plan(path: str | Path) -> PartitionPlan:
    """Read a plan file.

    Raises:
        PlanError: if the file does not exist, is no JSON (truncated), or is no plan.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise PlanError(f"cannot read plan {str(path)!r}: {reason}") from error
    try:
        return PartitionPlan.from_dict(json.loads(text))
    except json.JSONDecodeError as error:
        raise PlanError(
            f"plan {str(path)!r} is damaged or truncated: {error.msg} at line {error.lineno}; "
            "save the plan again"
        ) from error
    except GetfuseError as error:
        raise PlanError(f"plan {str(path)!r}: {error}") from error


def make_group(scheme: FusionScheme, mask: int, buffer_bytes: int, ends: str = "") -> FusionGroup:
    """The record of a valid group."""
    need = scheme.buffer(mask, buffer_bytes)
    assert need is not None, "only valid groups have a record"
    read, write, weight = scheme.dram(mask, buffer_bytes)
    names = tuple(scheme.graph.ops[i].name for i in bits(mask))
    return FusionGroup(names, need, read, write, weight, ends)


def _dram_of(group: FusionGroup) -> tuple[int, int, int]:
    return group.dram_read_bytes, group.dram_write_bytes, group.dram_weight_bytes
