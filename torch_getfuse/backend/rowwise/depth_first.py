"""A plan as a module whose fusion groups run depth-first, row by row.

What cannot run by rows runs by its FX nodes, and the ledger says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import fx

from torch_getfuse.backend.capture.capture import Capture
from torch_getfuse.backend.fx_nodes.effects import effects_in_words
from torch_getfuse.backend.rowwise.calls import NoRowKernel
from torch_getfuse.backend.rowwise.group import DepthFirstGroup
from torch_getfuse.backend.rowwise.kernels import WholeKernel
from torch_getfuse.backend.rowwise.ledger import GroupLedger, Ledger
from torch_getfuse.backend.rowwise.trial import try_rows
from torch_getfuse.backend.split.grouping import localise_views, split_capture
from torch_getfuse.errors import PlanError
from torch_getfuse.partition.plan import PartitionPlan

log = logging.getLogger(__name__)


def check_runnable(plan: PartitionPlan) -> None:
    """Refuse a plan that is not in rows.

    Raises:
        PlanError: for BRR, and for LBDF in another granularity than line.
    """
    if (plan.scheme, plan.granularity) != ("lbdf", "line"):
        what = plan.scheme if plan.scheme != "lbdf" else f"lbdf in {plan.granularity} granularity"
        raise PlanError(
            f"the plan is for {what}; depth-first runs row by row: plan with scheme='lbdf', "
            "granularity='line'"
        )


def split_depth_first(
    capture: Capture,
    plan: PartitionPlan,
    *,
    strict: bool = False,
    tell: Callable[[Sequence[str]], None] | None = None,
) -> tuple[fx.GraphModule, Ledger]:
    """The captured graph split by a plan, its fusion groups run by the depth-first executor.

    A group that cannot run by rows stays as its FX nodes, and its entry in the ledger says why;
    ``strict`` raises instead. So does one with a node that does more than compute a value
    (:func:`~torch_getfuse.backend.fx_nodes.effects.effects_in_words`), and one that on random
    values of the traced shapes and types does not give by rows what its FX nodes give
    (:func:`~torch_getfuse.backend.rowwise.trial.try_rows`).

    Args:
        capture: what the plan was made for.
        plan: in rows.
        strict: whether to raise where a group cannot run by rows.
        tell: is given a sentence where a group falls back to its FX nodes in a call.

    Returns:
        The module (inference only), and the ledger that every run of it fills in anew.

    Raises:
        PlanError: for a plan that is not in rows, or whose order mutation makes impossible.
        NoRowKernel: with ``strict``, for a group that cannot run by rows.
    """
    check_runnable(plan)
    capture = localise_views(capture, plan)
    split = split_capture(capture, plan)
    calls = {call.node for own in capture.calls.values() for call in own}
    owner = {node: op for op, own in capture.nodes.items() for node in own}
    effects = {
        node.name: f"{owner.get(node, node.name)} {words}"
        for node, words in effects_in_words(capture.graph_module, calls).items()
    }
    scheme = plan.make_scheme()
    ledger = Ledger([], plan.activation_bytes, capture.samples, plan.unfusable)
    for k, (group, mask) in enumerate(zip(plan.groups, plan.masks(), strict=True)):
        lines = [term for term in scheme.terms(mask, plan.buffer_bytes) if term.kind == "lines"]
        entry = GroupLedger(
            f"fusion_group_{k}",
            group.ops,
            group.dram_read_bytes,
            group.dram_write_bytes,
            sum(term.bytes for term in lines),
            group.dram_weight_bytes,
        )
        ledger.groups.append(entry)
        child = getattr(split, entry.name)
        rings = {term.name: term.units for term in lines}
        try:
            for node in child.graph.nodes:
                if node.op != "placeholder" and node.name in effects:
                    raise NoRowKernel(effects[node.name])
            runner = DepthFirstGroup(
                child, capture, mask, rings, entry, plan.activation_bytes, tell, try_rows
            )
            try_rows(runner)
        except (NoRowKernel, PlanError) as error:
            if strict:
                told = f"{entry.name} cannot run by rows: {error} (strict=False runs its FX nodes)"
                raise type(error)(told) from error
            entry.fall_back(str(error))
            log.info("%s runs as its FX nodes: %s", entry.name, error)
            continue
        entry.whole = tuple(
            op.name
            for op in runner.ops
            if isinstance(runner.kernels[op.writes], WholeKernel)
            and runner.tensors[op.writes].rows > 1
        )
        setattr(split, entry.name, runner)
    return split, ledger
