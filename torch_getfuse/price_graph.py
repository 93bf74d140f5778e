"""Prices a plan from outside: legal or why not, what it moves, how far it is from the optimum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch_getfuse.accelerator import format_buffer, format_size
from torch_getfuse.errors import OptionError, PlanError, shown, some_of
from torch_getfuse.ir import OpGraph
from torch_getfuse.json_fields import read_json
from torch_getfuse.options import Options, format_option
from torch_getfuse.partition.cost.cascade.model import Cascade
from torch_getfuse.partition.cost.scheme import CostTerm, Evaluator, FusionScheme, once
from torch_getfuse.partition.node_set import (
    ancestors,
    bits,
    components,
    convex_hull,
    descendants,
    neighbours,
    topological_order,
)
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.selection import no_operator, selected
from torch_getfuse.partition.steps.optimum import best_residents
from torch_getfuse.partition.steps.problem import StepProblem
from torch_getfuse.planner import (
    OF_ACCELERATORS,
    OF_CASCADE,
    given_plan,
    options_of,
    pins_for,
    plan_graph,
    record_groups,
    record_steps,
    scheme_of,
)
from torch_getfuse.reporting.appraisal import Appraisal, PricedGroup
from torch_getfuse.reporting.export import counted

_NAMED = 3  # terms, operators and groups that a sentence names
_LISTS = "give a list of lists of operator names, such as [['a', 'b'], ['c']]"

GroupsLike = Sequence[Sequence[str]] | PartitionPlan | str | Path
Groups = Sequence[Sequence[str]] | PartitionPlan
"""What :func:`read_groups` makes of it."""


def price_graph(graph: OpGraph, given: Mapping[str, object], groups: Groups) -> Appraisal:
    """Price a plan from outside; the rest as for :func:`torch_getfuse.price`.

    Args:
        graph: the operator graph as captured.
        given: the options that were given, by name. Others are those of the plan that is priced,
            or of the one that ``plan`` names.
        groups: from :func:`read_groups`.
    """
    asked = Options.of(given)
    ours = given_plan(asked)
    theirs = groups if isinstance(groups, PartitionPlan) else None
    for plan in (theirs, ours):
        if plan is not None:
            plan.check_graph(graph)
    options, source, changed = asked, "", {}
    stated = theirs or ours
    if stated is not None:
        source = "the priced plan" if theirs else "plan="
        explicit = {*given, *(OF_ACCELERATORS if asked.accelerator is not None else ())}
        kept = {name: v for name, v in options_of(stated).items() if name not in explicit}
        options = Options.of({**kept, **given, "plan": ours})
        graph = _stored_as_in(stated, graph, explicit)
    scheme = scheme_of(graph, options)
    if stated is not None:
        changed = _changed(stated, scheme, options)
    if ours is not None:
        _check_same(ours, scheme, options)
    best = plan_graph(graph, options)
    names = _of_plan(groups, graph) if isinstance(groups, PartitionPlan) else groups
    made = _Referee(scheme, options, names, best).appraise()
    preset = "" if options.preset is None else options.preset.name
    return replace(made, accelerator=preset, options_of=source, changed=changed)


def read_groups(groups: GroupsLike) -> Groups:
    """The plan or the lists of names that ``groups`` is, or is the path of.

    Raises:
        OptionError: for what is no list of lists of names.
        PlanError: for a file that cannot be read.
    """
    if isinstance(groups, PartitionPlan):
        return groups
    if not isinstance(groups, (str, Path)):
        return _lists(groups, "groups")
    where = f"groups {str(groups)!r}"
    try:
        form = read_json(groups)
        if isinstance(form, dict) and "schema_version" in form:
            return PartitionPlan.from_dict(form)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error
    if isinstance(form, dict) and "groups" in form:
        form = form["groups"]
    return _lists(form, f"{where}: what it holds")


def _lists(groups: object, where: str) -> list[list[str]]:
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        what = "None" if groups is None else f"of type {type(groups).__name__}"
        raise OptionError(f"{where} is {what}; {_LISTS}")
    if not groups:
        raise OptionError(f"{where} is empty; {_LISTS}")
    for k, group in enumerate(groups):
        if isinstance(group, str) or not isinstance(group, Sequence):
            raise OptionError(
                f"{where}: entry {k} is {shown(group)}, not a list of names; {_LISTS}"
            )
        if not group:
            raise OptionError(f"{where}: entry {k} is an empty list; name its operators")
        for name in group:
            if not isinstance(name, str) or not name:
                raise OptionError(f"{where}: entry {k} holds {shown(name)}, which is no name")
    return [list(group) for group in groups]


def _of_plan(plan: PartitionPlan, graph: OpGraph) -> list[list[str]]:
    """Its groups by names, in an order in which they can run where there is one."""
    masks = [*plan.masks(), *(1 << graph.index[name] for name in plan.apart)]
    order = topological_order(masks, graph) or range(len(masks))
    return [[graph.ops[i].name for i in bits(masks[k])] for k in order]


# -- by which options ---------------------------------------------------------------------


def _stored_as_in(plan: PartitionPlan, graph: OpGraph, explicit: set[str]) -> OpGraph:
    """The graph with tensors and weights at the widths of the plan's, but for explicit options."""
    tensors = graph if "activation_bytes" in explicit else plan.graph
    weights = graph if "weight_bytes" in explicit else plan.graph
    return replace(
        graph,
        tensors=tensors.tensors,
        activation_bytes=tensors.activation_bytes,
        weight_bytes=weights.weight_bytes,
        ops=tuple(
            replace(op, weight_bytes=other.weight_bytes)
            for op, other in zip(graph.ops, weights.ops, strict=True)
        ),
    )


def _changed(
    plan: PartitionPlan, scheme: FusionScheme, options: Options
) -> dict[str, tuple[Any, Any]]:
    """Options in which a plan differs from what is judged by -> its own value, and the other."""
    judged: dict[str, Any] = {
        **{name: getattr(options, name) for name in options_of(plan)},
        "scheme": scheme.name,
        "granularity": scheme.granularity,
        "activation_bytes": scheme.activation_bytes,
        "weight_bytes": scheme.weight_bytes,
    }
    stated = {**options_of(plan), "scheme": plan.scheme}
    if not scheme.sequential or plan.scheme != scheme.name:
        for name in OF_CASCADE:
            del stated[name]
    return {name: (value, judged[name]) for name, value in stated.items() if value != judged[name]}


def _check_same(ours: PartitionPlan, scheme: FusionScheme, options: Options) -> None:
    """Refuse to set a plan beside one that was judged by other options.

    Raises:
        OptionError: with the differences.
    """
    graph, other = scheme.graph, ours.graph
    told = [
        f"{name} {format_option(name, value)} there, {format_option(name, judged)} here"
        for name, (value, judged) in _changed(ours, scheme, options).items()
    ]
    if not told and any(graph.width(name) != other.width(name) for name in graph.tensors):
        told.append("tensors are stored in other widths")
    if not told and scheme.weight_bytes is None:
        pairs = zip(graph.ops, other.ops, strict=True)
        if any(graph.stored_bytes(one) != other.stored_bytes(two) for one, two in pairs):
            told.append("weights are stored in other widths")
    if told:
        raise OptionError(
            f"plan= was made for other options than the groups are judged by: {'; '.join(told)}; "
            "give the same ones, or leave plan= out: our plan is then searched"
        )


class _Referee:
    """One plan from outside under one cost model and buffer."""

    def __init__(
        self,
        scheme: FusionScheme,
        options: Options,
        names: Sequence[Sequence[str]],
        best: PartitionPlan,
    ) -> None:
        self.scheme, self.options, self.best = scheme, options, best
        self.graph, self.limit = scheme.graph, options.buffer_bytes
        self.pins = pins_for(scheme, options)
        self.near = neighbours(self.graph)
        self.above, self.below = ancestors(self.graph), descendants(self.graph)
        self.evaluator = Evaluator(scheme, self.limit)
        self.unfusable = self.evaluator.unfusable()
        self.masks: list[int] = []
        self.wrong: list[list[str]] = []
        for group in names:
            mask, wrong = 0, []
            for name in group:
                found = selected(self.graph, name)
                if not found:
                    wrong.append(no_operator(self.graph, name))
                if twice := mask & found:
                    wrong.append(f"named twice in it: {some_of(self._names(twice), _NAMED)}")
                mask |= found
            self.masks.append(mask)
            self.wrong.append(wrong)

    @property
    def steps(self) -> bool:
        """Whether the groups are the steps of a sequence, unfusable operators among them."""
        return isinstance(self.scheme, Cascade)

    @property
    def noun(self) -> str:
        """What the groups are called."""
        return "step" if self.steps else "group"

    def appraise(self) -> Appraisal:
        """Everything that is wrong, or the priced plan."""
        for k, mask in enumerate(self.masks):
            self.wrong[k] += self._wrong(k, mask)
        problems = [*self._missing(), *self._order()]
        plan, exact = None, None
        if not problems and not any(self.wrong):
            plan, exact = self._plan()
            if plan is None:
                problems.append("no choice of resident tensors keeps what keep= pins on chip")
        return Appraisal(self._groups(plan), tuple(problems), plan, self.best, exact)

    # -- what is wrong --------------------------------------------------------------------

    def _wrong(self, k: int, mask: int) -> list[str]:
        """Why a set of operators is no legal group."""
        if not mask:
            return []
        graph, found = self.graph, []
        for j, other in enumerate(self.masks[:k]):
            if twice := self._names(mask & other):
                found.append(f"also in {self.noun} {j}: {some_of(twice, _NAMED)}")
        pieces = components(mask, self.near)
        if len(pieces) > 1:
            first, second = (graph.ops[(p & -p).bit_length() - 1].name for p in pieces[:2])
            found.append(
                f"not connected: no edge inside it joins the part of {first} and that of {second}"
            )
        outside = convex_hull(mask, self.above, self.below) & ~mask
        if outside:
            names = some_of(self._names(outside), _NAMED)
            found.append(f"not convex: a path leaves it and comes back through {names}")
        stuck = mask & self.unfusable
        if stuck and mask & (mask - 1):
            for name in self._names(stuck):
                need = self.evaluator.buffer(1 << graph.index[name])
                size = "" if need is None else f": it needs {format_buffer(need)}"
                found.append(
                    f"{name} is unfusable: alone it does not fit {format_size(self.limit)}{size}; "
                    "it is executed by itself"
                )
        elif not stuck and not self.evaluator.fits(mask):
            found.append(self._too_big(mask))
        if broken := self.pins.broken(graph, mask):
            found.append(broken)
        return found

    def _too_big(self, mask: int) -> str:
        need = self.evaluator.buffer(mask)
        if need is None:
            return f"scheme {self.scheme.name!r} has no schedule for it"
        terms = self._terms(mask)
        filled = ", ".join(f"{t.kind} of {t.name} {format_size(t.bytes)}" for t in terms[:_NAMED])
        rest = len(terms) - _NAMED
        over = need - self.limit
        by = f"{format_size(over)} over" if over else f"exactly; a {self.noun} must stay below"
        return (
            f"too big: needs {format_size(need)}, {by} the buffer of {format_size(self.limit)}; "
            f"the most is {filled}{f', and {rest} smaller' if rest > 0 else ''}"
        )

    def _missing(self) -> list[str]:
        covered = 0
        for mask in self.masks:
            covered |= mask
        left = ((1 << len(self.graph)) - 1) & ~covered
        if not self.steps:
            left &= ~self.unfusable  # they stand in no group
        names = self._names(left)
        if not names:
            return []
        return [f"{counted(len(names), 'operator')} in no {self.noun}: {some_of(names, _NAMED)}"]

    def _order(self) -> list[str]:
        """Whether the groups can run, under cascade in the order in which they were given."""
        graph = self.graph
        masks = [mask for mask in self.masks if mask]
        if any(a & b for k, a in enumerate(masks) for b in masks[:k]):
            return []  # told of the groups
        covered = sum(masks)
        alone = [1 << i for i in bits(self.unfusable & ~covered)]
        if topological_order([*masks, *alone], graph) is None:
            return [self._cycle([*masks, *alone])]
        done = 0
        for k, mask in enumerate(masks if self.steps else ()):
            for i in bits(mask):
                if late := graph.predecessors[i] & covered & ~(done | mask):
                    return [
                        f"step {k} runs {graph.ops[i].name}, which must run after "
                        f"{graph.ops[late.bit_length() - 1].name} of a later step; give the steps "
                        "in the order in which they run"
                    ]
            done |= mask
        return []

    def _cycle(self, masks: Sequence[int]) -> str:
        """A cycle of groups, by one operator of each."""
        home = {i: k for k, mask in enumerate(masks) for i in bits(mask)}
        waits = [
            {home[j] for i in bits(mask) for j in bits(self.graph.predecessors[i]) if j in home}
            - {k}
            for k, mask in enumerate(masks)
        ]
        left = set(range(len(masks)))
        while ready := {k for k in left if not waits[k] & left}:
            left -= ready
        row = [min(left)]
        while row.count(row[-1]) < 2:
            row.append(min(waits[row[-1]] & left))
        row = row[row.index(row[-1]) :]
        firsts = [self._names(masks[k] & -masks[k])[0] for k in reversed(row)]
        return f"a cycle between {self.noun}s: those of {' -> '.join(firsts)} wait for each other"

    # -- figures --------------------------------------------------------------------------

    def _plan(self) -> tuple[PartitionPlan | None, bool | None]:
        """The priced plan; and under cascade, whether its residents are proved to be the best."""
        bound = self.best.lower_bound_bytes
        if isinstance(self.scheme, Cascade):
            problem = StepProblem(self.scheme, self.limit, self.options.residency, pins=self.pins)
            found, exact = best_residents(problem, self.masks, self.options.time_limit)
            return (record_steps(problem, self.options, bound) if found else None), exact
        groups = [mask for mask in self.masks if not mask & self.unfusable]
        problem_ = FusionProblem(Evaluator(self.scheme, self.limit, pins=self.pins), merge=False)
        order = problem_.order(groups)
        assert order is not None, "a cycle was told"
        return record_groups(problem_, self.options, order, bound), None

    def _groups(self, plan: PartitionPlan | None) -> tuple[PricedGroup, ...]:
        figures = {} if plan is None else {frozenset(group.ops): group for group in plan.groups}
        found = []
        for mask, wrong in zip(self.masks, self.wrong, strict=True):
            ops = tuple(self._names(mask))
            known = figures.get(frozenset(ops))
            if known is not None:
                dram = known.dram
                need: int | None = known.buffer_bytes
                way = str(known.way or "")
            else:
                legal = mask and not wrong and not mask & self.unfusable
                dram = self.scheme.dram(mask, self.limit) if legal else once(self.scheme, mask)
                need = self.evaluator.buffer(mask) if mask else 0
                way = ""
            terms = self._terms(mask) if mask else []
            found.append(PricedGroup(ops, tuple(wrong), need, dram, tuple(terms), way))
        return tuple(found)

    def _terms(self, mask: int) -> list[CostTerm]:
        terms = self.scheme.terms(mask, self.limit)
        return sorted(terms, key=lambda term: -term.bytes)

    def _names(self, mask: int) -> list[str]:
        return [self.graph.ops[i].name for i in bits(mask)]
