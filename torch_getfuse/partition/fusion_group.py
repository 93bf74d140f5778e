"""The records of a plan: its fusion groups, and what the stages of the search reached."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch_getfuse.errors import GetfuseError
from torch_getfuse.json_fields import Fields
from torch_getfuse.partition.cost.cascade.model import Cascade, Step
from torch_getfuse.partition.cost.cascade.way import Way
from torch_getfuse.partition.cost.scheme import Dram, FusionScheme
from torch_getfuse.partition.node_set import bits


@dataclass(frozen=True, slots=True)
class FusionGroup:
    """Operators that run together, and what they cost per sample in bytes.

    Attributes:
        ops: operator names in topological order.
        buffer_bytes: ``F_b``, what the group needs on chip.
        dram_read_bytes, dram_write_bytes, dram_weight_bytes: the parts of ``F_D``.
        ends: why the group ends where it does.
        way: how it runs, as a step of a cascade plan; ``None`` under other schemes.
    """

    ops: tuple[str, ...]
    buffer_bytes: int
    dram_read_bytes: int
    dram_write_bytes: int
    dram_weight_bytes: int
    ends: str = ""
    way: Way | None = None

    @property
    def dram_bytes(self) -> int:
        """``F_D``."""
        return self.dram_read_bytes + self.dram_write_bytes + self.dram_weight_bytes

    @property
    def dram(self) -> Dram:
        """The parts of ``F_D`` as recorded."""
        return Dram(self.dram_read_bytes, self.dram_write_bytes, self.dram_weight_bytes)

    def to_dict(self) -> dict[str, Any]:
        """The form of plan.json."""
        form = {
            "ops": list(self.ops),
            "buffer_bytes": self.buffer_bytes,
            "dram_read_bytes": self.dram_read_bytes,
            "dram_write_bytes": self.dram_write_bytes,
            "dram_weight_bytes": self.dram_weight_bytes,
            "ends": self.ends,
        }
        if self.way is not None:
            form["way"] = self.way.to_dict()
        return form

    @classmethod
    def read(cls, fields: Fields) -> FusionGroup:
        """The inverse of :meth:`to_dict`; raises :class:`GraphError` for anything else."""
        return cls(
            ops=fields.texts("ops"),
            buffer_bytes=fields.integer("buffer_bytes"),
            dram_read_bytes=fields.integer("dram_read_bytes"),
            dram_write_bytes=fields.integer("dram_write_bytes"),
            dram_weight_bytes=fields.integer("dram_weight_bytes"),
            ends=fields.text("ends") if "ends" in fields else "",
            way=Way.read(fields.child("way")) if "way" in fields else None,
        )


@dataclass(frozen=True, slots=True)
class Stage:
    """What one search method reached on the way to a plan.

    Attributes:
        method: its name.
        dram_bytes: DRAM access of its best plan; ``None`` if it found none.
        plans: plans (or, for the exact search, groups) it evaluated.
        seconds: wall time.
        stopped: why it ended early: ``""``, ``"time limit"``, ``"interrupted"``, ...
        history: (plans evaluated, best DRAM access so far) whenever the best improved, of searches
            that tell; plan files leave it out.
    """

    method: str
    dram_bytes: int | None
    plans: int
    seconds: float
    stopped: str = ""
    history: tuple[tuple[int, int], ...] = field(default=(), compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The form of plan.json."""
        return {
            "method": self.method,
            "dram_bytes": self.dram_bytes,
            "plans": self.plans,
            "seconds": self.seconds,
            "stopped": self.stopped,
        }


def make_group(scheme: FusionScheme, mask: int, buffer_bytes: int, ends: str = "") -> FusionGroup:
    """The record of a valid group.

    Raises:
        GetfuseError: where the cost model's figures are no whole numbers of bytes.
    """
    need = scheme.buffer(mask, buffer_bytes)
    assert need is not None, "only valid groups have a record"
    read, write, weight = scheme.dram(mask, buffer_bytes)
    names = tuple(scheme.graph.ops[i].name for i in bits(mask))
    for what, size in zip(("buffer", "reads", "writes", "weights"), (need, read, write, weight)):
        if type(size) is not int or size < 0:
            raise GetfuseError(
                f"scheme {scheme.name!r} gives {size!r} for the {what} of the group of {names[0]} "
                f"({len(names)} operators); sizes are whole numbers of bytes from 0 up"
            )
    return FusionGroup(names, need, read, write, weight, ends)


def make_step(scheme: Cascade, step: Step, ends: str = "") -> FusionGroup:
    """The record of a step of a cascade plan."""
    names = tuple(scheme.graph.ops[i].name for i in bits(step.mask))
    buffer = 0 if step.priced is None else step.priced.buffer
    return FusionGroup(names, buffer, *step.dram, ends, scheme.way_of(step))
