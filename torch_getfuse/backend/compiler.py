"""The torch.compile backend: one Dynamo graph in, the same graph as fusion groups out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from torch_getfuse.backend.capture import Capture, capture_fx
from torch_getfuse.backend.records import CompiledGraph, remember
from torch_getfuse.backend.submodules import split_graph_module
from torch_getfuse.errors import NoOperatorError, OptionError
from torch_getfuse.options import Options
from torch_getfuse.partition.plan import PartitionPlan, load_plan
from torch_getfuse.planner import plan_graph
from torch_getfuse.report import Section

log = logging.getLogger(__name__)
_warned: set[str] = set()


def getfuse(
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Plan a Dynamo graph and return it split into one FX submodule per fusion group.

    Args:
        gm: the graph; parameters and buffers are among its inputs.
        example_inputs: one value per placeholder.
        options: see :class:`torch_getfuse.options.Options`.
        mode: refused; the modes of torch.compile are inductor's.

    Returns:
        A callable with the graph's signature, which returns a tuple.

    Raises:
        OptionError: for an unknown option or value.
        PlanError: if ``options["plan"]`` cannot be read or belongs to another graph.
        Exception: whatever made planning fail, with ``strict=True``; otherwise that is a warning
            and the graph runs unplanned.
    """
    if mode is not None:
        raise OptionError(f"mode={mode!r} is a setting of inductor; getfuse takes options={{...}}")
    chosen = Options.of(options or {})
    given = chosen.plan
    if given is not None and not isinstance(given, PartitionPlan):
        given = load_plan(given)
    try:
        capture = capture_fx(gm, example_inputs)
        if given is not None:
            given.check_graph(capture.graph)
        plan = plan_graph(capture.graph, chosen)
        compiled = split_capture(capture, plan)
    except NoOperatorError:
        log.info("a graph without operators runs as it is")
        return gm.forward
    except Exception as error:
        if chosen.strict or given is not None:
            raise
        failure = f"{type(error).__name__}: {error}"
        _warn_once(failure)
        return remember(gm.forward, CompiledGraph(None, failure, example_inputs))
    log.info("compiled a graph of %d operators into %d groups", len(plan.graph), len(plan.groups))
    section = Section(plan, unsupported=capture.unsupported)
    return remember(compiled.forward, CompiledGraph(section, "", example_inputs))


def split_capture(capture: Capture, plan: PartitionPlan) -> fx.GraphModule:
    """The captured FX graph with one child per fusion group, and one per unfusable operator.

    Raises:
        PlanError: if mutation of shared storage makes the plan's order impossible.
    """
    groups = [[node for op in group.ops for node in capture.nodes[op]] for group in plan.groups]
    names = [f"fusion_group_{k}" for k in range(len(groups))]
    groups += [list(capture.nodes[op]) for op in plan.unfusable]
    names += [f"unfusable_{k}" for k in range(len(plan.unfusable))]
    return split_graph_module(capture.graph_module, groups, names)


def _warn_once(failure: str) -> None:
    if failure not in _warned:
        _warned.add(failure)
        warnings.warn(
            f"torch_getfuse could not plan a graph, which now runs unplanned: {failure} "
            "(options={'strict': True} raises instead)",
            stacklevel=2,
        )
