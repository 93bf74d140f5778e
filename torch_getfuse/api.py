"""The public functions, re-exported by :mod:`torch_getfuse`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torch_getfuse.backend.capture import (
    Capture,
    capture_exported,
    capture_model,
    run_captured,
)
from torch_getfuse.backend.depth_first import check_runnable, split_depth_first
from torch_getfuse.backend.fx_values import tensor_info, traced_value
from torch_getfuse.backend.grouping import split_capture
from torch_getfuse.backend.inner import find_inner
from torch_getfuse.backend.ledger import Ledger
from torch_getfuse.backend.records import find
from torch_getfuse.backend.regions import inline_regions
from torch_getfuse.errors import CaptureError, OptionError
from torch_getfuse.explanation import Explanation
from torch_getfuse.options import Options
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.planner import plan_graph
from torch_getfuse.report import Report, Section
from torch_getfuse.why import DEFAULT as DEFAULT_EXPLAINERS
from torch_getfuse.why import check_explainers, explain_graph

Model = nn.Module | torch.export.ExportedProgram


def plan(model: Model, args: tuple[Any, ...] = (), **options: Any) -> PartitionPlan:
    """Plan layer fusion for a model, without running or changing it.

    Args:
        model: a module, or an ExportedProgram (which brings its own shapes).
        args: example inputs of a module; a tuple, as for ``torch.export.export``.
        options: see :class:`torch_getfuse.options.Options`.

    Raises:
        OptionError: for an unknown option or value, or missing example inputs.
        CaptureError: if the model cannot be traced as one graph.
    """
    chosen = _options(options)
    return plan_graph(_capture(model, args).graph, chosen)


def report(model: object, *args: Any, **options: Any) -> Report:
    """The fusion report of a model.

    With inputs (or an ExportedProgram), plans without running. Without inputs, reports what
    ``torch.compile(model, backend="getfuse")`` has compiled and run so far: ``model`` may be the
    compiled wrapper or the module itself; an empty report says that nothing was compiled yet.
    A ``PartitionPlan`` gives its own report.

    Raises:
        OptionError: for an unknown option or value.
        CaptureError: if the model cannot be traced as one graph.
    """
    if isinstance(model, PartitionPlan):
        return Report([Section(model)])
    if args or isinstance(model, torch.export.ExportedProgram):
        chosen = _options(options)
        target = getattr(model, "_orig_mod", model)
        captured = _capture(target, args)
        return Report(
            [Section(plan_graph(captured.graph, chosen), unsupported=captured.unsupported)]
        )
    if options:
        raise OptionError(
            f"report(model, {next(iter(options))}=...) needs example inputs: report(model, x, ...)"
        )
    return _compiled_report(model)


def explain(
    model: Model,
    args: tuple[Any, ...] = (),
    operators: Sequence[str] | None = None,
    explainers: Sequence[str] = DEFAULT_EXPLAINERS,
    **options: Any,
) -> Explanation:
    """Why operators of a model do not fit the on-chip buffer together.

    The answer names what fills the buffer, the edges that each explainer blames, and the cut that
    the recursive split takes with its price in DRAM access. Operators that fit are told to fit.

    Args:
        model, args: as for :func:`plan`.
        operators: names of operators as reports show them, or module paths, which select every
            operator below them; operators on paths between them are added. ``None``: all that
            fit alone.
        explainers: ``"saliency"``, ``"rgexplainer"``, ``"pgexplainer"``, ``"gnnexplainer"``, and
            the controls ``"random"`` and ``"all"``.
        options: see :class:`torch_getfuse.options.Options`; ``explainer`` says whose edges the
            split cuts.

    Raises:
        OptionError: for an unknown option, value, operator or explainer, and for operators that
            no edge joins.
        CaptureError: if the model cannot be traced as one graph.
        WeightsError: where an explainer's weights are missing or made for another model.
    """
    chosen = _options(options)
    check_explainers(explainers)
    return explain_graph(_capture(model, args).graph, chosen, operators, explainers)


def split(model: Model, args: tuple[Any, ...], plan: PartitionPlan) -> fx.GraphModule:
    """The model as an FX GraphModule with one child per fusion group (``fusion_group_0``, ...).

    It is called like the model and returns what the model returns. Parameters and buffers are
    shared with the model, and each child can be saved or lowered on its own.

    Args:
        model: a module, or an ExportedProgram (then ``args`` may be empty).
        args: example inputs of a module.
        plan: a plan of the same model and shapes.

    Raises:
        PlanError: if the plan belongs to another graph, or no order can run its groups.
        CaptureError: if ``torch.export`` cannot trace the model.
    """
    if isinstance(model, torch.export.ExportedProgram):
        program = model
    else:
        try:
            program = torch.export.export(_checked(model, args), args)
        except torch._dynamo.exc.Unsupported as error:
            why = str(error).strip().split("\n")[0]
            raise CaptureError(
                f"torch.export cannot trace {type(model).__name__}: {why}"
            ) from error
    captured = _in_module(program)
    plan.check_graph(captured.graph)
    return split_capture(captured, plan)


def run_counted(model: Model, args: tuple[Any, ...], plan: PartitionPlan) -> tuple[Any, Ledger]:
    """Run a model as a plan says, depth-first and row by row, and count the bytes that move.

    Each fusion group keeps its tensors in rings of exactly the rows of the plan, recomputes
    nothing, and counts what it loads from outside and writes to the outside. Unfusable operators
    run as usual. For inference: nothing has gradients. See ``docs/depth-first.md``.

    Args:
        model: a module, or an ExportedProgram.
        args: inputs of the shapes that the plan was made for; a batch runs image by image.
        plan: LBDF at ``line`` granularity, of the same model and shapes.

    Returns:
        The outputs in the model's own structure, and the ledger: planned and counted bytes.

    Raises:
        PlanError: if the plan is not in rows, or belongs to another graph.
        OptionError: for inputs that are missing, or of other shapes than a program's.
        CaptureError: if the model cannot be traced as one graph.
    """
    check_runnable(plan)
    ledgers: list[Ledger] = []

    def make(captured: Capture) -> fx.GraphModule:
        plan.check_graph(captured.graph)
        split, ledger = split_depth_first(captured, plan)
        ledgers.append(ledger)
        return split

    if isinstance(model, torch.export.ExportedProgram):
        captured = _in_module(model)
        _check_inputs(captured, args)
        with torch.no_grad():
            outputs = make(captured)(*args)
    else:
        outputs = run_captured(_checked(getattr(model, "_orig_mod", model), args), args, make)
    return outputs, ledgers[0]


def _options(options: Mapping[str, Any]) -> Options:
    """Options, refused at once where compiling with them would be refused."""
    chosen = Options.of(options)
    find_inner(chosen.inner)
    return chosen


def _compiled_report(model: object) -> Report:
    records, own = find(model)
    sections, unplanned = [], []
    for number, record in enumerate(records):
        name = f"graph {number}" if len(records) > 1 else ""
        for part, failure in record.failures.items():
            what = " ".join(filter(None, (name or "the graph", part)))
            unplanned.append(f"{what} runs unplanned: {failure}")
        for section in record.sections:
            if not own:
                shared = "compiled for another instance of this class, whose code it shares"
                section = replace(section, notes=(*section.notes, shared))
            title = f"{name or 'graph 0'} {section.name}" if section.name else name
            sections.append(replace(section, name=title))
    pairs = itertools.combinations(records, 2)
    return Report(sections, unplanned, alternatives=any(a.replaces(b) for a, b in pairs))


def _capture(model: object, args: tuple[Any, ...]) -> Capture:
    if isinstance(model, torch.export.ExportedProgram):
        return capture_exported(model)
    return capture_model(_checked(model, args), args)


def _in_module(program: torch.export.ExportedProgram) -> Capture:
    """The capture of a program, in the graph of its module.

    The program's graph has its weights as inputs; as a module it has them as attributes.
    """
    captured = capture_exported(program)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    module = inline_regions(module)
    found = {node.name: node for node in module.graph.nodes if node.op != "placeholder"}
    moved = {n: found[n.name] for n in captured.graph_module.graph.nodes if n.name in found}
    # An input may have another name here (``input_1``), but has its place.
    kept = set(program.graph_signature.user_inputs)
    given = [n for n in captured.graph_module.graph.find_nodes(op="placeholder") if n.name in kept]
    moved.update(zip(given, module.graph.find_nodes(op="placeholder"), strict=True))
    return captured.moved(module, moved)


def _check_inputs(captured: Capture, args: tuple[Any, ...]) -> None:
    """Refuse inputs of another shape or type than a program was exported with."""
    nodes = captured.graph_module.graph.find_nodes(op="placeholder")
    for node, given in zip(nodes, pytree.tree_leaves(args), strict=False):
        traced = traced_value(node)
        if isinstance(traced, torch.Tensor) and isinstance(given, torch.Tensor):
            wanted = tensor_info(traced)
            if tensor_info(given) != wanted:
                raise OptionError(
                    f"input {node.name!r} is {tuple(given.shape)} {given.dtype}, but the program "
                    f"and the plan are for {wanted.shape} {wanted.dtype}; export and plan for it"
                )


def _checked(model: object, args: tuple[Any, ...]) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"expected a torch.nn.Module or an ExportedProgram, got {type(model).__name__}"
        )
    if not isinstance(args, tuple):
        raise OptionError(
            f"args must be a tuple of example inputs, like (x,), not {type(args).__name__}"
        )
    if not args:
        raise OptionError("example inputs are missing: plan(model, (x,))")
    return model
