"""The torch.compile backend: one Dynamo graph in, the same graph as fusion groups out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from torch_getfuse.backend.capture.capture import Capture, capture_fx
from torch_getfuse.backend.capture.mode_notes import mode_notes
from torch_getfuse.backend.capture.quantisation import quantisation_notes
from torch_getfuse.backend.capture.view_changes import changing_inputs, recorded_otherwise
from torch_getfuse.backend.compiled_models import CompiledGraph, remember
from torch_getfuse.backend.fx_nodes.autocast import cast_apart
from torch_getfuse.backend.fx_nodes.effects import changes_mode
from torch_getfuse.backend.fx_nodes.values import flat_tensors, size_hint, traced_value
from torch_getfuse.backend.inner.compile_groups import (
    DEPTH_FIRST,
    compile_children,
    find_inner,
    is_eager,
)
from torch_getfuse.backend.packed.fast import fast_program
from torch_getfuse.backend.plan_cache import find_plan, store_plan
from torch_getfuse.backend.rowwise.depth_first import check_runnable, split_depth_first
from torch_getfuse.backend.split.gradient_order import moved_sums
from torch_getfuse.backend.split.grouping import children_of, split_capture
from torch_getfuse.backend.split.overlapping_inputs import apart_or_unplanned
from torch_getfuse.backend.split.submodules import split_graph_module
from torch_getfuse.backend.torch_private import RestartAnalysis
from torch_getfuse.backend.torch_versions import FEATURES
from torch_getfuse.backend.training import (
    JointCompiler,
    has_checkpoint,
    needs_gradients,
    plans_backward,
)
from torch_getfuse.errors import GetfuseError, NoOperatorError, OptionError, some_of
from torch_getfuse.options import Options
from torch_getfuse.partition.cost.registry import effective_granularity
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.planner import check_made_for, given_plan, options_of, plan_graph
from torch_getfuse.plugins import SCHEMES, fact, name_of
from torch_getfuse.reporting.section import Section

log = logging.getLogger(__name__)
_warned: set[str] = set()
_MOST_NAMED = 3  # of the values in one note
_OVERLAPS = (
    "called with inputs that overlap in memory, one of which is written, and did not when it was "
    "compiled: such calls run unplanned"
)


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
        OptionError: for an unknown option or value, or one that ``options["plan"]`` was not made
            for.
        PlanError: if ``options["plan"]`` cannot be read, belongs to another graph, or cannot be
            run by ``inner="depth_first"``.
        Exception: whatever made planning fail, with ``strict=True``; otherwise that is a warning
            and the graph runs unplanned.
    """
    if mode is not None:
        raise OptionError(f"mode={mode!r} is a setting of inductor; getfuse takes options={{...}}")
    chosen = Options.of(options or {})
    find_inner(chosen.inner)  # a wrong name is refused before any work
    given = given_plan(chosen)
    if given is not None:
        check_made_for(given, chosen)
    if chosen.inner == DEPTH_FIRST:
        _check_depth_first(chosen, given)
    record = CompiledGraph(gm, example_inputs, options or {})
    try:
        capture = capture_fx(gm, example_inputs)
        if given is not None:
            capture.check(given)
        plan = _planned(capture, chosen)
        compiled = _compile(capture, plan, chosen, record, example_inputs, gm)
        if compiled != gm.forward:
            compiled = changing_inputs(gm, compiled)
    except NoOperatorError:
        log.info("a graph without operators runs as it is")
        return gm.forward
    except RestartAnalysis:
        raise  # not a failure: Dynamo traces again, with fewer symbols
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        if isinstance(error, IndexError) and (chosen.strict or given is not None):
            # Dynamo takes an IndexError for one of the user's program and lets it through bare.
            raise GetfuseError(failure) from error
        if chosen.strict or given is not None:
            raise
        _warn_once(failure)
        record.sections.clear()
        record.failures[""] = failure
        return remember(gm.forward, record)
    log.info("compiled a graph of %d operators into %d groups", len(plan.graph), len(plan.groups))
    compiled = apart_or_unplanned(gm, compiled, lambda: record.add_notes([_OVERLAPS]))
    return remember(compiled, record)


def _check_depth_first(options: Options, given: PartitionPlan | None) -> None:
    """Refuse plans that are not in rows, before any work."""
    if given is not None:
        check_runnable(given)
        return
    rows = fact(SCHEMES.load(options.scheme), "row_granularity", None)
    if rows is None or rows != effective_granularity(options.scheme, options.granularity):
        raise OptionError(
            f"inner='depth_first' runs row by row, not scheme={name_of(options.scheme)!r} with "
            f"granularity={options.granularity!r}; give scheme='lbdf', granularity='line', or "
            "scheme='cascade'"
        )


def _planned(capture: Capture, options: Options) -> PartitionPlan:
    """A plan: the given one, one made before, or a new one."""
    if options.plan is None and (found := find_plan(capture.graph, options)) is not None:
        return found
    plan = plan_graph(capture.graph, options)
    if options.plan is None:
        store_plan(plan, capture.graph, options)
    return plan


def _compile(
    capture: Capture,
    plan: PartitionPlan,
    options: Options,
    record: CompiledGraph,
    example_inputs: Sequence[object],
    original: fx.GraphModule,
) -> Callable[..., Any]:
    """The planned graph as a callable, or ``original.forward``; fills in its record."""
    gm = capture.graph_module
    hints = _shape_notes(gm)
    if hints and options.inner == "inductor" and (lacks := FEATURES["strides"].missing()):
        hints = (*hints, lacks)
    forward = Section(
        plan,
        unsupported=capture.unsupported,
        notes=(*hints, *mode_notes(gm), *quantisation_notes(gm, capture.graph, capture.views)),
        gradients=torch.is_grad_enabled(),
        accelerator=options.preset,
    )
    record.sections.append(forward)
    recorded = "the call is recorded for gradients" if needs_gradients(example_inputs) else ""
    if options.inner == DEPTH_FIRST:
        why = recorded or ("shapes are dynamic" if hints else "")
        if not why:
            split, ledger = split_depth_first(
                capture, plan, strict=options.strict, tell=record.add_notes
            )
            record.add_notes(ledger.notes())
            return split.forward
        record.add_notes([f"inner depth_first: every group runs as its FX nodes: {why}"])
        options = replace(options, inner="eager")
    joint = ""
    if recorded:
        if has_checkpoint(gm):
            joint = "it has a checkpointed region"
        elif plans_backward(options):
            joint = "the backward is planned"
    if not joint and not is_eager(options.inner) and changes_mode(gm):
        # A group compiled on its own would know nothing of autocast around it.
        joint = "autocast, grad mode or the like change within it"
    if not joint:
        if not (is_eager(options.inner) and recorded):
            split = split_capture(capture, plan)
            record.add_notes(compile_children(split, options))
            if options.inner == "auto":
                given = gm, example_inputs, split.forward, options.cache
                program, note = fast_program(*given, record.replace_notes)
                record.add_notes([note])
                return program or split.forward
            return split.forward
        if options.inner == "auto":
            record.add_notes([f"inner auto: runs by FX nodes: {recorded}"])
        children = children_of(capture, plan)
        if cast := cast_apart(gm, children):
            record.add_notes(
                [f"gradients may differ from eager's in the last bit: groups cast {cast} apart"]
            )
        split = split_graph_module(gm, list(children.values()), list(children))
        if moved := [*recorded_otherwise(original), *moved_sums(gm, split)]:
            names = some_of([value.name for value in moved], _MOST_NAMED)
            record.add_notes(
                [
                    "runs in the order of the model, not by groups, in which the gradients of "
                    f"{names} add up in another order"
                ]
            )
            return original.forward
        return split.forward
    record.add_notes([f"{'differentiated' if recorded else 'traced'} by AOTAutograd: {joint}"])

    def report_backward(capture: Capture, plan: PartitionPlan, notes: Sequence[str]) -> None:
        section = Section(
            plan,
            "backward",
            capture.unsupported,
            (*hints, *notes),
            accelerator=options.preset,
        )
        record.sections.append(section)

    def fail(part: str, error: Exception) -> None:
        failure = f"{type(error).__name__}: {error}"
        if options.strict:
            raise GetfuseError(f"{part}: {failure}") from error
        _warn_once(f"{part}: {failure}")
        record.failures[part] = failure

    # A given plan says for which buffer and cost model; pins name operators of the forward graph.
    same = {} if options.plan is None else options_of(plan)
    unpinned = {**same, "plan": None, "keep": (), "split_before": (), "together": ()}
    compiler = JointCompiler(
        options,
        lambda backward: _planned(backward, replace(options, **unpinned)),
        children_of,
        report_backward,
        fail,
        record.add_notes,
    )
    return compiler.compile(capture, plan, example_inputs)


def _shape_notes(gm: fx.GraphModule) -> tuple[str, ...]:
    """What a reader must know of a graph whose sizes may change: the sizes that were planned."""
    hints: dict[str, int] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = traced_value(node)
        sizes: list[int | torch.SymInt] = [value] if isinstance(value, torch.SymInt) else []
        sizes += [size for tensor in flat_tensors(value) for size in tensor.shape]
        for size in sizes:
            # A symbol that the trace has found to be a number, such as the channels, is none.
            if isinstance(size, torch.SymInt) and not size.node.expr.is_number:
                hints.setdefault(str(size), size_hint(size))
    if not hints:
        return ()
    named = ", ".join(f"{name} = {size}" for name, size in hints.items())
    return (
        f"shapes are hints: {named}; planned for these sizes, and run at every size that "
        "torch.compile lets through",
    )


def _warn_once(failure: str) -> None:
    if failure not in _warned:
        _warned.add(failure)
        warnings.warn(
            f"torch_getfuse could not plan a graph, which now runs unplanned: {failure} "
            "(options={'strict': True} raises instead)",
            stacklevel=2,
        )
