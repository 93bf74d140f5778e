"""Partition plans: which operators run together, what that costs, and the proof.

A plan is self-contained: it carries the operator graph, so a saved plan can be checked by
anyone, and compared by fingerprint with the graph that a compiler holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch_getfuse import plugins
from torch_getfuse.accelerator import format_size
from torch_getfuse.atomic_files import replace_text
from torch_getfuse.errors import GraphError, OptionError, PlanError, shown
from torch_getfuse.ir import OpGraph
from torch_getfuse.json_fields import Fields, as_list, as_text, read_json
from torch_getfuse.limits import MOST, MOST_POSITIONS
from torch_getfuse.partition.cost.cascade.model import Cascade
from torch_getfuse.partition.cost.cascade.way import Resident
from torch_getfuse.partition.cost.registry import SchemeLike, make_scheme
from torch_getfuse.partition.cost.scheme import FusionScheme
from torch_getfuse.partition.fusion_group import FusionGroup, Stage
from torch_getfuse.partition.group_check import check_groups, check_stated_steps
from torch_getfuse.partition.node_set import bits, mask_of, topological_order
from torch_getfuse.partition.pins import Pins, pins_of
from torch_getfuse.partition.steps.problem import StepProblem
from torch_getfuse.terminal import hanging, text_width, wrap
from torch_getfuse.widths import Width

SCHEMA_VERSION = 2
_READ = (1, 2)
"""Versions that are read. In version 1 the order of the groups said nothing."""
_PROOFS = ("optimal", "bound", None)


@dataclass(frozen=True)
class PartitionPlan:
    """A set of fusion groups that covers every fusable operator once (docs/method.md, section 1).

    Attributes:
        graph: the operator graph, with its tensors stored as the plan has them.
        scheme, granularity, buffer_bytes, activation_bytes, weight_bytes: the cost model; a width
            is ``None`` where tensors, or weights, count at the widths they are stored in.
        groups: fusion groups in an order in which they can run. Under cascade: all steps, those of
            unfusable operators among them.
        unfusable: operators that alone do not fit the buffer; not in ``dram_bytes``, but under
            cascade, where each is a step.
        resident: tensors that stay on chip between steps, under cascade.
        residency: whether tensors were allowed to stay.
        slice_channels: output channels of which streamed weights are staged at a time.
        keep, split_before, together: the pins that it keeps to (docs/method.md, section 13); its
            bound is of all plans that do.
        lower_bound_bytes: no legal plan has less DRAM access.
        proof: ``"optimal"``, ``"bound"`` (a bound above zero is proved) or ``None``.
        method: the search that found it.
        stages: what each stage of the search reached.
        claimed_by: where bound and proof come from if nothing here has proved them: ``"the plan
            file"``, ``"the plan cache"``; ``""`` for a plan of a search in this process, and for
            one that ``verify(prove=True)`` returned.
        cost_model: what makes the cost model of a graph, where it was given as an object; ``None``
            where ``scheme`` is a name by which it is found.
    """

    graph: OpGraph
    scheme: str
    granularity: str
    buffer_bytes: int
    activation_bytes: Width | None
    weight_bytes: Width | None
    groups: tuple[FusionGroup, ...]
    unfusable: tuple[str, ...] = ()
    resident: tuple[Resident, ...] = ()
    residency: bool = True
    slice_channels: int = 16
    keep: tuple[str, ...] = ()
    split_before: tuple[str, ...] = ()
    together: tuple[tuple[str, ...], ...] = ()
    lower_bound_bytes: int = 0
    proof: str | None = None
    method: str = ""
    stages: tuple[Stage, ...] = ()
    claimed_by: str = field(default="", compare=False)
    cost_model: Callable[..., FusionScheme] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "graph", self.graph.stored_as(self.activation_bytes))

    @property
    def apart(self) -> tuple[str, ...]:
        """Unfusable operators that stand outside the groups: under cascade none do."""
        return () if any(group.way for group in self.groups) else self.unfusable

    @property
    def dram_bytes(self) -> int:
        """Reads, writes and weights of all groups, per sample."""
        return sum(group.dram_bytes for group in self.groups)

    @property
    def align_channels(self) -> int:
        """Channels of stored tensors are padded to a multiple of it."""
        return self.graph.align_channels

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

    @property
    def standing(self) -> str:
        """In words, whether the bound was proved in this process or who claims it."""
        return f"claimed by {self.claimed_by}" if self.claimed_by else "proved"

    @property
    def pins(self) -> dict[str, list[Any]]:
        """Option -> what it pins, of those that pin anything."""
        given: dict[str, list[Any]] = {
            "keep": list(self.keep),
            "split_before": list(self.split_before),
            "together": [list(names) for names in self.together],
        }
        return {name: value for name, value in given.items() if value}

    def pins_of(self, scheme: FusionScheme) -> Pins:
        """The pins as masks.

        Raises:
            PlanError: for a name that the graph has not, or pins that contradict each other.
        """
        try:
            return pins_of(
                self.graph, self.keep, self.split_before, self.together, scheme.sequential
            )
        except OptionError as error:
            raise PlanError(f"the plan's pins: {error}") from error

    def make_scheme(self) -> FusionScheme:
        """The cost model under which the plan was made.

        Raises:
            PlanError: where there is no such scheme or granularity.
        """
        try:
            return make_scheme(
                self.cost_model or self.scheme,
                self.graph,
                self.granularity,
                self.activation_bytes,
                self.weight_bytes,
                self.slice_channels,
            )
        except OptionError as error:
            raise PlanError(
                f"the plan's cost model is not known: {error}; install the package that has it, or "
                f"pass what makes it: plan.verify(scheme=...)"
            ) from error

    def masks(self) -> list[int]:
        """The groups as bit masks over ``graph.ops``.

        Raises:
            PlanError: for a name that the graph has not.
        """
        try:
            return [mask_of(self.graph.index[name] for name in group.ops) for group in self.groups]
        except KeyError as error:
            raise PlanError(f"the plan names {error.args[0]!r}, which its graph has not") from error

    def verify(
        self,
        prove: bool = False,
        time_limit: float = 10.0,
        scheme: SchemeLike | None = None,
    ) -> PartitionPlan:
        """Hold every rule of a legal plan and recompute every figure.

        Args:
            prove: compute the lower bound again too, by the exact search; otherwise what a file
                says of it stays a claim (``claimed_by``).
            time_limit: seconds of that search.
            scheme: the cost model that the plan names, where it was not installed but given as an
                object: what makes one, or a name under which it is installed.

        Returns:
            The plan; with ``prove`` one that claims nothing, with ``scheme`` one that keeps it.

        Raises:
            PlanError: names the first group that breaks a rule, with the numbers. With ``prove``
                also where a better plan is found than the bound allows, or where the bound is out
                of reach of the search.
        """
        if scheme is not None and scheme != self.scheme:
            make = plugins.SCHEMES.load(scheme)
            if plugins.name_of(make) != self.scheme:
                raise PlanError(
                    f"the plan is for scheme {self.scheme!r}, not {plugins.name_of(make)!r}"
                )
            return replace(self, cost_model=make).verify(prove, time_limit)
        self._verify_groups()
        self._verify_bound()
        self._verify_sizes()
        return self._proved(time_limit) if prove else self

    def _verify_groups(self) -> None:
        masks = self.masks()
        scheme = self.make_scheme()
        if self.granularity != scheme.granularity:
            raise PlanError(
                f"the plan states granularity {self.granularity!r}; plans of scheme "
                f"{self.scheme!r} have {scheme.granularity!r}"
            )
        pins = self.pins_of(scheme)
        if isinstance(scheme, Cascade):
            problem = StepProblem(scheme, self.buffer_bytes, self.residency)
            check_stated_steps(problem, self.groups, masks, self.unfusable, self.resident, pins)
            return
        self.check_no_steps()
        self._check_unfusable()
        check_groups(scheme, self.buffer_bytes, self.groups, masks, self.unfusable, pins)

    def _check_unfusable(self) -> None:
        for name in self.unfusable:
            if name not in self.graph.index:
                raise PlanError(f"unfusable operator {name!r} is not in the plan's graph")

    def _verify_bound(self) -> None:
        """What is said of bound and stages is possible; :meth:`_proved` asks whether it is true."""
        bound, dram = self.lower_bound_bytes, self.dram_bytes
        if self.proof not in _PROOFS:
            raise PlanError(f"unknown proof {self.proof!r}; known: 'optimal', 'bound', null")
        if bound < 0:
            raise PlanError(f"the lower bound is {bound} B; it cannot be negative")
        if bound > dram:
            raise PlanError(f"lower bound {bound} B is above the plan's {dram} B")
        if self.proof == "optimal" and bound != dram:
            raise PlanError(
                f"the plan is called optimal at {dram} B but its lower bound is {bound} B"
            )
        if self.proof is None and bound:
            raise PlanError(f"the lower bound of {bound} B comes without a proof")
        for stage in self.stages:
            if stage.dram_bytes is not None and stage.dram_bytes < bound:
                raise PlanError(
                    f"stage {stage.method!r} reached {stage.dram_bytes} B, less than the lower "
                    f"bound of {bound} B"
                )

    def _verify_sizes(self) -> None:
        """No figure is larger than a file may state: the widths of options may give such."""
        most = max([self.dram_bytes, *(stage.dram_bytes or 0 for stage in self.stages)])
        if most > MOST:
            raise PlanError(
                f"a DRAM access of {shown(most)} B is above {MOST} B, the most that a plan can "
                "state; give a smaller activation_bytes=, weight_bytes= or align_channels="
            )

    def _proved(self, time_limit: float) -> PartitionPlan:
        """The plan with its bound proved here."""
        # The one import that points up: the bound belongs to the plan, its proof to the planner.
        from torch_getfuse.planner import plan_again

        again = plan_again(self, time_limit)
        if again.dram_bytes < self.lower_bound_bytes:
            raise PlanError(
                f"the lower bound of {self.lower_bound_bytes} B is wrong: a plan with "
                f"{again.dram_bytes} B of DRAM access exists"
            )
        if again.lower_bound_bytes < self.lower_bound_bytes:
            raise PlanError(
                f"the lower bound of {self.lower_bound_bytes} B is only claimed: in {time_limit:g} "
                f"s no more than {again.lower_bound_bytes} B was proved; give more time"
            )
        return replace(self, claimed_by="")

    def check_no_steps(self) -> None:
        """Refuse what only cascade plans have; raises :class:`PlanError`."""
        if self.resident or any(group.way for group in self.groups):
            raise PlanError(f"scheme {self.scheme!r} has no ways of steps and no resident tensors")

    def check_graph(self, graph: OpGraph) -> None:
        """Refuse a plan that was made for another graph, or names what its graph has not.

        Raises:
            PlanError: with the first difference.
        """
        if graph.fingerprint == self.graph.fingerprint:
            self.masks()
            self._check_unfusable()
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
        """plan.json, schema_version 2."""
        graph = self.graph
        return {
            "schema_version": SCHEMA_VERSION,
            "scheme": self.scheme,
            "granularity": self.granularity,
            "buffer_bytes": self.buffer_bytes,
            "activation_bytes": graph.activation_bytes,
            "weight_bytes": self.weight_bytes,
            **({} if graph.align_channels == 1 else {"align_channels": graph.align_channels}),
            "graph": {"fingerprint": graph.fingerprint, **graph.to_dict()},
            "groups": [group.to_dict() for group in self.groups],
            "unfusable": list(self.unfusable),
            **(self._residents() if any(group.way for group in self.groups) else {}),
            **self.pins,
            "dram_bytes": self.dram_bytes,
            "lower_bound_bytes": self.lower_bound_bytes,
            "proof": self.proof,
            "method": self.method,
            "stages": [stage.to_dict() for stage in self.stages],
        }

    def _residents(self) -> dict[str, Any]:
        """What only cascade plans have."""
        return {
            "resident": [asdict(resident) for resident in self.resident],
            "residency": self.residency,
            "slice_channels": self.slice_channels,
        }

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> PartitionPlan:
        """The inverse of :meth:`to_dict`.

        Raises:
            PlanError: for another schema version, missing keys, or a graph that does not have
                the fingerprint that the file states.
        """
        try:
            return cls._read(Fields.of(form, ""))
        except GraphError as error:
            raise PlanError(f"the plan file is damaged: {error}") from error

    @classmethod
    def _read(cls, fields: Fields) -> PartitionPlan:
        version = fields.form.get("schema_version")
        if type(version) is not int or version not in _READ:  # true and 2.0 are none
            raise PlanError(
                f"schema_version is {ascii(version)[:60]}; this package reads "
                f"{' and '.join(map(str, _READ))}; make the plan again"
            )
        entry = fields.child("graph")
        graph = OpGraph.from_dict(entry.form)
        width: Width | None = None
        if fields.value("weight_bytes") is not None:
            width = fields.width("weight_bytes", zero=True)
            graph = replace(graph, weight_bytes=width)
        elif any(op.weight_bytes is None for op in graph):
            raise GraphError(
                "it states neither one width of all weights (weight_bytes) nor the bytes of each "
                "operator's"
            )
        align = 1
        if "align_channels" in fields:
            align = fields.integer("align_channels", 1, MOST_POSITIONS)
        graph = replace(
            graph, activation_bytes=fields.width("activation_bytes"), align_channels=align
        )
        proof = fields.value("proof")
        if not (proof is None or isinstance(proof, str)) or proof not in _PROOFS:
            raise PlanError(f"the plan file is damaged: unknown proof {ascii(proof)[:60]}")
        groups = tuple(map(FusionGroup.read, fields.objects("groups")))
        # What only steps have: the bound and their prices follow from it, so they must state it.
        steps = any(group.way for group in groups)
        plan = cls(
            graph=graph,
            scheme=fields.text("scheme"),
            granularity=fields.text("granularity"),
            buffer_bytes=fields.integer("buffer_bytes", 1),
            activation_bytes=graph.activation_width,
            weight_bytes=width,
            groups=groups,
            unfusable=fields.texts("unfusable"),
            resident=tuple(
                Resident(
                    resident.text("tensor"), resident.integer("first"), resident.integer("last")
                )
                for resident in (
                    fields.objects("resident") if steps or "resident" in fields else ()
                )
            ),
            residency=fields.flag("residency") if steps or "residency" in fields else True,
            slice_channels=(
                fields.integer("slice_channels", 1, MOST_POSITIONS)
                if steps or "slice_channels" in fields
                else 16
            ),
            keep=fields.texts("keep") if "keep" in fields else (),
            split_before=fields.texts("split_before") if "split_before" in fields else (),
            together=tuple(
                tuple(as_text(name, "together") for name in as_list(names, "together"))
                for names in (fields.items("together") if "together" in fields else ())
            ),
            lower_bound_bytes=fields.integer("lower_bound_bytes"),
            proof=proof,
            method=fields.text("method"),
            stages=tuple(
                Stage(
                    method=stage.text("method"),
                    dram_bytes=None
                    if stage.value("dram_bytes") is None
                    else stage.integer("dram_bytes"),
                    plans=stage.integer("plans"),
                    seconds=stage.number("seconds"),
                    stopped=stage.text("stopped") if "stopped" in stage else "",
                )
                for stage in fields.objects("stages")
            ),
            claimed_by="the plan file",
        )
        stated = entry.text("fingerprint")
        if stated != plan.graph.fingerprint:
            raise GraphError("the graph does not have the fingerprint that the file states")
        if (dram := fields.integer("dram_bytes")) != plan.dram_bytes:
            raise GraphError(
                f"it states {dram} B of DRAM access, its groups add up to {plan.dram_bytes} B"
            )
        return plan._in_order() if version == 1 else plan

    def _in_order(self) -> PartitionPlan:
        """The plan with its groups, and the operators of each, in an order in which they can run,
        where they have one.
        """
        names = [name for group in self.groups for name in group.ops] + list(self.unfusable)
        if sorted(names) != sorted(self.graph.index):
            return self  # verify() says what is wrong
        masks = self.masks()
        alone = [1 << self.graph.index[name] for name in self.unfusable]
        order = topological_order([*masks, *alone], self.graph)
        if order is None:
            return self
        groups = (
            replace(self.groups[k], ops=tuple(self.graph.ops[i].name for i in bits(masks[k])))
            for k in order
            if k < len(masks)
        )
        return replace(self, groups=tuple(groups))

    def to_json(self) -> str:
        """:meth:`to_dict` as the text of a plan file."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all.

        Raises:
            FileError: where the file cannot be written; one that was there before stays.
        """
        replace_text(path, self.to_json())

    def __repr__(self) -> str:
        number = len(self.groups)
        noun = "step" if any(group.way for group in self.groups) else "group"
        proof = self.proof or "nothing proved"
        if self.proof == "bound":
            proof = f"at most {self.gap:.1%} above the optimum"
        # Under a cost model without steps they are apart, and not in the figure.
        apart = f" and {len(self.unfusable)} unfusable" if self.unfusable else ""
        return (
            f"PartitionPlan({number} {noun}{'' if number == 1 else 's'}, "
            f"{format_size(self.dram_bytes)}{apart}, {proof}, {format_size(self.buffer_bytes)})"
        )

    def _repr_html_(self) -> str:
        from torch_getfuse.reporting.plan_card import plan_card

        return plan_card(self)

    def __str__(self) -> str:
        width = text_width()
        head = (
            f"{len(self.groups)} fusion groups, {self.dram_bytes} B of DRAM access, "
            f"buffer {self.max_buffer_bytes} of {self.buffer_bytes} B"
        )
        lines = wrap(head, width)
        for k, group in enumerate(self.groups):
            told = f"fusion_group_{k}: {', '.join(group.ops)}"
            lines += hanging(told, width, "  ", "    ")
        return "\n".join(lines)


def load_plan(path: str | Path) -> PartitionPlan:
    """Read a plan file. It is not verified, and what it says of its bound is a claim.

    Raises:
        PlanError: if the file does not exist, is no regular file, is no JSON (truncated), or is
            no plan.
    """
    try:
        return PartitionPlan.from_dict(read_json(path))
    except PlanError as error:
        raise PlanError(f"plan {str(path)!r}: {error}") from error
