"""From an operator graph and options to a partition plan."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch_getfuse.errors import Interrupted, OptionError, interrupts
from torch_getfuse.group_planner import MODEL_STEPS, GroupStrategy
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options, format_option
from torch_getfuse.partition.cost.cascade.model import Cascade
from torch_getfuse.partition.cost.registry import make_scheme
from torch_getfuse.partition.cost.scheme import Evaluator, FusionScheme
from torch_getfuse.partition.pins import Pins, pins_of
from torch_getfuse.partition.plan import PartitionPlan, load_plan
from torch_getfuse.partition.problem import FusionProblem, SearchResult
from torch_getfuse.partition.steps.problem import StepProblem
from torch_getfuse.partition.work import Work
from torch_getfuse.plugins import SCHEMES, fact, name_of
from torch_getfuse.step_planner import StepStrategy

log = logging.getLogger(__name__)

OF_ACCELERATORS = ("buffer", "activation_bytes", "weight_bytes", "align_channels")
"""Options that an accelerator gives where they are not given."""

OF_CASCADE = ("residency", "slice_channels")
"""Options that mean something to schemes with steps alone."""

GIVEN = "given"
"""The method of a plan from outside."""


def plan_graph(graph: OpGraph, options: Options, work: Work | None = None) -> PartitionPlan:
    """Plan an operator graph; verified before it is returned.

    ``work``: a new object that counts the steps, to be read afterwards.

    Raises:
        PlanError: if ``options.plan`` cannot be read or belongs to another graph.
        OptionError: if a method or explainer cannot be used (an extra is not installed, "direct"
            without an explainer), or for options that ``options.plan`` was not made for.
        Interrupted: for a ``KeyboardInterrupt``, with the best plan by then.
    """
    work = Work() if work is None else work
    given = given_plan(options)
    if given is not None:
        given.check_graph(graph)
        check_made_for(given, options)
        return given.verify()
    with interrupts(), _heap_left_alone():
        scheme = scheme_of(graph, options)
        if isinstance(scheme, Cascade):
            return _plan_steps(scheme, options, work)
        pins = pins_for(scheme, options)
        problem = FusionProblem(Evaluator(scheme, options.buffer_bytes, work, pins))
        strategy = GroupStrategy(problem, options)
        found = strategy.run()
        if found is None:
            raise Interrupted()
        plan = strategy.record(found).verify()
    log.info("%s: %s", plan.method, plan)
    if strategy.interrupted:
        raise Interrupted(plan)
    return plan


@contextmanager
def _heap_left_alone() -> Iterator[None]:
    """Collections of garbage meanwhile look at what is made meanwhile alone.

    A search makes enough to bring on a full one, which would look at all that the process holds:
    beside a model and torch's traces that takes as long as planning a small network. What a process
    has frozen itself stays so.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _plan_steps(scheme: Cascade, options: Options, work: Work) -> PartitionPlan:
    """A plan of the cascade scheme."""
    work.add(MODEL_STEPS * len(scheme.graph))
    pins = pins_for(scheme, options)
    strategy = StepStrategy(
        StepProblem(scheme, options.buffer_bytes, options.residency, work, pins), options
    )
    if name_of(options.method) in ("auto", "exact"):
        strategy.exact()
    else:
        evaluator = Evaluator(scheme, options.buffer_bytes, work, pins)
        groups = GroupStrategy(FusionProblem(evaluator), options)
        found = groups.run()
        strategy.searched(groups.stages)
        strategy.interrupted = groups.interrupted
        if found is not None:
            strategy.given(found.groups, groups.method)
    plan = strategy.record()
    if strategy.interrupted:
        raise Interrupted(None if plan is None else plan.verify())
    if plan is None:
        raise Interrupted()
    log.info("%s: %s", plan.method, plan)
    return plan.verify()


def record_groups(
    problem: FusionProblem, options: Options, groups: Sequence[int], bound: int
) -> PartitionPlan:
    """The plan of groups that are given, verified.

    Args:
        groups: legal, in an order in which they can run.
        bound: no legal plan has less DRAM access, in bytes.
    """
    strategy = GroupStrategy(problem, options)
    strategy.bound, strategy.method = bound, GIVEN
    found = SearchResult(tuple(groups), problem.cost(groups), 1, 0.0)
    return strategy.record(found).verify()


def record_steps(problem: StepProblem, options: Options, bound: int) -> PartitionPlan:
    """The plan of steps that are given, with the residents that a search has found for them."""
    strategy = StepStrategy(problem, options)
    strategy.bound, strategy.method = bound, GIVEN
    plan = strategy.record()
    assert plan is not None, "a search has found residents"
    return plan.verify()


def given_plan(options: Options) -> PartitionPlan | None:
    """The plan that the options bring, with the cost model of the same name if they bring that.

    Raises:
        PlanError: for a file that cannot be read.
    """
    if options.plan is None:
        return None
    given = options.plan if isinstance(options.plan, PartitionPlan) else load_plan(options.plan)
    if callable(options.scheme) and name_of(options.scheme) == given.scheme:
        given = replace(given, cost_model=options.scheme)
    return given


def plan_again(plan: PartitionPlan, time_limit: float) -> PartitionPlan:
    """The best plan for the graph, cost model and buffer of another, found from nothing."""
    return plan_graph(plan.graph, Options.of({**options_of(plan), "time_limit": time_limit}))


def options_of(plan: PartitionPlan) -> dict[str, Any]:
    """The options that a plan was made for, but for those of the search.

    Widths of ``None`` are those that its graph states.
    """
    return {
        "buffer": plan.buffer_bytes,
        "scheme": plan.cost_model or plan.scheme,
        "granularity": plan.granularity,
        "residency": plan.residency,
        "slice_channels": plan.slice_channels,
        "activation_bytes": plan.activation_bytes,
        "weight_bytes": plan.weight_bytes,
        "align_channels": plan.align_channels,
        "keep": plan.keep,
        "split_before": plan.split_before,
        "together": plan.together,
    }


def check_made_for(plan: PartitionPlan, options: Options) -> None:
    """Refuse options beside a plan that it was not made for: they would have no effect.

    Raises:
        OptionError: with the differences.
    """
    named = {*options.named, *(OF_ACCELERATORS if "accelerator" in options.named else ())}
    stated = {**options_of(plan), "scheme": plan.scheme}
    asked = {name: getattr(options, name) for name in stated if name in named}
    if "scheme" in asked:
        asked["scheme"] = name_of(options.scheme)
    scheme = SCHEMES.load(plan.scheme) if SCHEMES.find(plan.scheme) else None
    if not fact(scheme, "granularities", ()):
        asked.pop("granularity", None)
    if not fact(scheme, "sequential", False):
        for name in OF_CASCADE:
            asked.pop(name, None)
    for name, stored in (
        ("activation_bytes", plan.graph.activation_bytes),
        ("weight_bytes", plan.graph.weight_width),
    ):
        stated[name] = stored if stated[name] is None else stated[name]
        if asked.get(name, 0) is None or stated[name] is None:  # as stored
            asked.pop(name, None)
    told = [
        f"{name} {format_option(name, stated[name])}, not {format_option(name, value)}"
        for name, value in asked.items()
        if value != stated[name]
    ]
    if told:
        raise OptionError(
            f"the given plan was made for {'; '.join(told)}: leave these options out, or leave the "
            "plan out and a new one is searched"
        )


def scheme_of(graph: OpGraph, options: Options) -> FusionScheme:
    """The cost model that the options name; widths default to those that are stored."""
    return make_scheme(
        options.scheme,
        graph.stored_as(options.activation_bytes, options.align_channels),
        options.granularity,
        options.activation_bytes,
        graph.weight_width if options.weight_bytes is None else options.weight_bytes,
        options.slice_channels,
    )


def pins_for(scheme: FusionScheme, options: Options) -> Pins:
    """The pins that the options name, for the graph of a cost model."""
    return pins_of(
        scheme.graph, options.keep, options.split_before, options.together, scheme.sequential
    )
