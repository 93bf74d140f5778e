"""From an operator graph and options to a partition plan."""

from __future__ import annotations

import logging

from torch_getfuse.accelerator import format_size
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options
from torch_getfuse.partition.borders import why_ends
from torch_getfuse.partition.cost import Evaluator
from torch_getfuse.partition.exact import exact
from torch_getfuse.partition.group import bits
from torch_getfuse.partition.plan import PartitionPlan, Stage, load_plan, make_group
from torch_getfuse.partition.schemes import make_scheme

log = logging.getLogger(__name__)


def plan_graph(graph: OpGraph, options: Options) -> PartitionPlan:
    """Plan an operator graph; verified before it is returned.

    Raises:
        PlanError: if ``options.plan`` cannot be read or belongs to another graph.
    """
    if options.plan is not None:
        given = options.plan if isinstance(options.plan, PartitionPlan) else load_plan(options.plan)
        given.check_graph(graph)
        return given.verify()
    activation_bytes = options.activation_bytes or graph.activation_bytes
    weight_bytes = options.weight_bytes or graph.weight_bytes
    scheme = make_scheme(options.scheme, graph, options.granularity, activation_bytes, weight_bytes)
    evaluator = Evaluator(scheme, options.buffer_bytes)
    found = exact(evaluator)
    unfusable = evaluator.unfusable()
    log.info(
        "exact: %d groups, %s of DRAM access, %d down-sets, %d groups priced, %.2f s",
        len(found.groups),
        format_size(found.dram_bytes),
        found.down_sets,
        found.evaluated,
        found.seconds,
    )
    ends = why_ends(evaluator, found.groups, unfusable)
    plan = PartitionPlan(
        graph=graph,
        scheme=options.scheme,
        granularity=options.granularity,
        buffer_bytes=options.buffer_bytes,
        activation_bytes=activation_bytes,
        weight_bytes=weight_bytes,
        groups=tuple(
            make_group(scheme, mask, options.buffer_bytes, reason)
            for mask, reason in zip(found.groups, ends, strict=True)
        ),
        unfusable=tuple(graph.ops[i].name for i in bits(unfusable)),
        lower_bound_bytes=found.dram_bytes,
        proof="optimal",
        method="exact",
        stages=(Stage("exact", found.dram_bytes, found.evaluated, found.seconds),),
    )
    return plan.verify()
