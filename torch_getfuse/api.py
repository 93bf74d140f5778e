"""The public functions, re-exported by :mod:`torch_getfuse`."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from torch_getfuse.backend.capture.capture import (
    Capture,
    capture_exported,
    capture_model,
    does_not_run,
    run_captured,
)
from torch_getfuse.backend.capture.eager_quantised import check_traceable, is_eager_quantised
from torch_getfuse.backend.capture.exported_regions import inline_regions
from torch_getfuse.backend.capture.idle_casts import without_idle_casts
from torch_getfuse.backend.capture.mode_notes import mode_notes
from torch_getfuse.backend.capture.quantisation import quantisation_notes, with_own_dequantize
from torch_getfuse.backend.capture.renaming import named_as
from torch_getfuse.backend.capture.view_changes import exported_without_view_changes
from torch_getfuse.backend.compiled_models import compiler_of, find, is_compiled
from torch_getfuse.backend.fx_nodes.values import tensor_info, traced_value
from torch_getfuse.backend.inner.compile_groups import find_inner
from torch_getfuse.backend.rowwise.depth_first import check_runnable, split_depth_first
from torch_getfuse.backend.rowwise.ledger import Ledger
from torch_getfuse.backend.split.grouping import split_capture
from torch_getfuse.backend.torch_private import Unsupported, original_module, tree_leaves
from torch_getfuse.errors import CaptureError, Interrupted, OptionError, interrupts
from torch_getfuse.explain_graph import explain_graph
from torch_getfuse.group_planner import ExplainerLike
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import OptionKwargs, Options
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.planner import plan_graph
from torch_getfuse.plugins import check_explainers
from torch_getfuse.price_graph import GroupsLike, price_graph, read_groups
from torch_getfuse.reporting.appraisal import Appraisal
from torch_getfuse.reporting.explanation import Explanation
from torch_getfuse.reporting.html.page import Origin
from torch_getfuse.reporting.report import Report
from torch_getfuse.reporting.section import Section

if TYPE_CHECKING:
    from typing_extensions import Unpack

Model = nn.Module | torch.export.ExportedProgram


def plan(
    model: Model, args: tuple[Any, ...] = (), **options: Unpack[OptionKwargs]
) -> PartitionPlan:
    """Plan layer fusion for a model, without running or changing it.

    Args:
        model: a module, or an ExportedProgram (which brings its own shapes).
        args: example inputs of a module; a tuple, as for ``torch.export.export``.
        options: see :class:`torch_getfuse.options.Options`.

    Raises:
        OptionError: for an unknown option or value, or missing example inputs.
        CaptureError: if the model cannot be traced as one graph.
        Interrupted: for a ``KeyboardInterrupt``; its ``plan`` is the best so far, or ``None``.
    """
    with interrupts():
        chosen = _options(options, model)
        return plan_graph(_capture(model, args, "plan(model, (x,))").graph, chosen)


def report(model: object, *args: Any, **options: Unpack[OptionKwargs]) -> Report:
    """The fusion report of a model.

    With inputs (or an ExportedProgram), plans without running. Without inputs, reports what
    ``torch.compile(model, backend="getfuse")`` has compiled and run so far: ``model`` may be the
    compiled wrapper or the module itself; an empty report says that nothing was compiled yet.
    A ``PartitionPlan`` is verified and gives its own report.

    Raises:
        OptionError: for an unknown option or value.
        PlanError: for a plan that is not legal, or states wrong figures.
        CaptureError: if the model cannot be traced as one graph.
        Interrupted: for a ``KeyboardInterrupt``; its ``plan`` is the best so far and its ``report``
            that plan's, or both are ``None``.
    """
    if isinstance(model, PartitionPlan):
        return Report([Section(model.verify())])
    if args or isinstance(model, torch.export.ExportedProgram):
        with interrupts():
            chosen = _options(options, model)
            target = original_module(model)
            captured = _capture(target, args, "report(model, x)")
            section = _sections_of(captured, chosen)
            origin = _origin(target, options)
            try:
                plan = plan_graph(captured.graph, chosen)
            except Interrupted as error:
                if error.plan is not None:
                    error.report = Report([section(error.plan)], origin=origin)
                raise
            return Report([section(plan)], origin=origin)
    if not callable(model) or isinstance(model, type):
        raise _no_model(model)
    if options:
        _options(options, model)
        raise OptionError(
            f"report(model, {next(iter(options))}=...) needs example inputs: report(model, x, ...)"
        )
    return _compiled_report(model)


def explain(
    model: Model,
    args: tuple[Any, ...] = (),
    operators: Sequence[str] | None = None,
    explainers: Sequence[ExplainerLike] | None = None,
    **options: Unpack[OptionKwargs],
) -> Explanation:
    """Why operators of a model do not fit the on-chip buffer together.

    The answer names what fills the buffer, the edges that each explainer blames, and the cut that
    the recursive split takes with its price in DRAM access. Operators that fit are told to fit.

    Args:
        model: as for :func:`plan`.
        args: as for :func:`plan`.
        operators: names of operators as reports show them, or module paths, which select every
            operator below them; operators on paths between them are added. ``None``: all that
            fit alone.
        explainers: of ``"saliency"``, ``"rgexplainer"``, ``"pgexplainer"``, ``"gnnexplainer"`` (the
            default), the controls ``"random"`` and ``"all"``, and those of one's own, by name or as
            objects. For a scheme without a validity predictor the default is ``explainer``.
        options: see :class:`torch_getfuse.options.Options`; ``explainer`` says whose edges the
            split cuts.

    Raises:
        OptionError: for an unknown option, value, operator or explainer, and for operators that
            no edge joins.
        CaptureError: if the model cannot be traced as one graph.
        WeightsError: where an explainer's weights are missing or made for another model.
    """
    chosen = _options(options, model)
    check_explainers(explainers or ())
    captured = _capture(model, args, "explain(model, (x,))")
    section, origin = _sections_of(captured, chosen), _origin(original_module(model), options)
    planned = partial(_report_of, captured.graph, chosen, section, origin)
    why = explain_graph(captured.graph, chosen, operators, explainers)
    return replace(why, model=origin.model, report=planned)


def _sections_of(captured: Capture, chosen: Options) -> Callable[[PartitionPlan], Section]:
    """What makes a section of a plan for what was captured."""
    gm = captured.graph_module
    notes = (*mode_notes(gm), *quantisation_notes(gm, captured.graph, captured.views))
    return partial(
        Section, unsupported=captured.unsupported, notes=notes, accelerator=chosen.preset
    )


def _report_of(
    graph: OpGraph, chosen: Options, section: Callable[[PartitionPlan], Section], origin: Origin
) -> Report:
    """The report of what was captured, planned now."""
    return Report([section(plan_graph(graph, chosen))], origin=origin)


def price(
    model: Model,
    args: tuple[Any, ...] = (),
    groups: GroupsLike = (),
    **options: Unpack[OptionKwargs],
) -> Appraisal:
    """A plan from outside, priced: what is wrong with it, what it moves, how far from the best.

    Args:
        model: as for :func:`plan`.
        args: as for :func:`plan`.
        groups: lists of operators as reports show them, or of module paths, which select every
            operator below them; under cascade the steps in the order in which they run, unfusable
            operators among them. A plan, a plan file, or a JSON file of such lists as well. A plan
            is judged by its own cost model, buffer, widths and pins, unless other ones are given;
            its ways and resident tensors are chosen anew.
        options: see :class:`torch_getfuse.options.Options`; they also say how our own plan beside
            it is searched. An ``accelerator`` gives its buffer, widths and alignment in place of a
            plan's. What is given in place of a plan's own is told (``changed``). ``plan`` is taken
            as our plan, and must have been made for the same options as count for the groups;
            where these are lists, for which options that are not given are those of ``plan``.

    Returns:
        An illegal plan is told, not raised: ``legal``, ``problems`` and each group's ``problems``.

    Raises:
        OptionError: for an unknown option or value, for groups that are no lists of names, and for
            a ``plan`` that was made for other options.
        PlanError: for a plan of another graph, or a file that cannot be read.
        CaptureError: if the model cannot be traced as one graph.
    """
    _options(options, model)
    asked = read_groups(groups)
    captured = _capture(model, args, "price(model, (x,), groups)")
    name = _origin(original_module(model), options).model
    return replace(price_graph(captured.graph, options, asked), model=name)


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
        check_traceable(model, "split")
        target = _checked(model, args, "split(model, (x,), plan)")
        try:
            program = torch.export.export(target, args)
        except Unsupported as error:
            why = str(error).strip().split("\n")[0]
            raise CaptureError(
                f"torch.export cannot trace {type(model).__name__}: {why}"
            ) from error
        except Exception as error:  # a model fails in its own code, by whatever it raises
            raise does_not_run(target, args, error) from error
    captured = _in_module(program)
    if captured.graph.fingerprint != plan.graph.fingerprint and program is not model:
        # torch.export forgets some modules' paths, which Dynamo, and so the plan, remembers.
        with suppress(CaptureError):
            captured = named_as(captured, capture_model(target, args).graph)
    captured.check(plan)
    return split_capture(captured, plan)


def run_counted(model: Model, args: tuple[Any, ...], plan: PartitionPlan) -> tuple[Any, Ledger]:
    """Run a model as a plan says, depth-first and row by row, and count the bytes that move.

    Each fusion group keeps its tensors in rings of exactly the rows of the plan, recomputes
    nothing, and counts what it loads from outside, writes to the outside and fetches of weights.
    The steps of a cascade plan leave resident tensors to each other on chip. Unfusable operators
    run as usual. For inference: nothing has gradients. See ``docs/depth-first.md``.

    Args:
        model: a module, or an ExportedProgram.
        args: inputs of the shapes that the plan was made for; a batch runs image by image.
        plan: LBDF at ``line`` granularity, or cascade, of the same model and shapes.

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
        captured.check(plan)
        split, ledger = split_depth_first(captured, plan)
        ledgers.append(ledger)
        return split

    if isinstance(model, torch.export.ExportedProgram):
        captured = _in_module(model)
        _check_inputs(captured, args)
        with torch.no_grad():
            outputs = make(captured)(*args)
    else:
        check_traceable(original_module(model), "run_counted")
        target = _checked(original_module(model), args, "run_counted(model, (x,), plan)")
        outputs = run_captured(target, args, make)
    return outputs, ledgers[0]


def _options(options: Mapping[str, object], model: object) -> Options:
    """Options, refused at once where compiling with them would be refused."""
    known = {field.name for field in dataclasses.fields(Options)}
    forward = getattr(model, "forward", None)
    for name in options:
        if name not in known and callable(forward) and name in _parameters(forward):
            raise OptionError(
                f"{name}= is an input of {type(model).__name__}, not an option; give inputs by "
                "position: report(model, x), plan(model, (x,))"
            )
    chosen = Options.of(options)
    find_inner(chosen.inner)
    return chosen


def _parameters(function: Callable[..., Any]) -> Sequence[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        return ()


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
    unplanned += _recurrent(model, sections)
    if records or is_compiled(model):
        unplanned += _quantised(model)
    if not sections and not unplanned:
        return Report([], empty=_nothing(model))
    pairs = itertools.combinations(records, 2)
    return Report(
        sections,
        unplanned,
        alternatives=any(a.replaces(b) for a, b in pairs),
        origin=_origin(original_module(model), {}),
    )


def _origin(model: object, options: Mapping[str, object]) -> Origin:
    """Class of the model and the options as they were given, for the page of a report."""
    told = {
        name: str(value) if isinstance(value, (str, int, float, NoneType)) else type(value).__name__
        for name, value in options.items()
    }
    return Origin(type(model).__name__, told)


def _nothing(model: object) -> str:
    """Why a report is empty, and what to do."""
    plans = "report(model, x) plans without running"
    backend = compiler_of(model)
    if backend not in (None, "getfuse"):
        return (
            f"Nothing to report: this was compiled with backend={backend!r}, and reports are of "
            f'torch.compile(model, backend="getfuse"); {plans}.'
        )
    what = "no graph has been compiled yet; call the compiled model once with an input"
    if not is_compiled(model):
        what = (
            'this was not compiled by torch.compile(model, backend="getfuse"), or not called since'
        )
    text = f"Nothing to report: {what}; {plans}."
    module = original_module(model)
    if type(module).__module__.startswith("torch.nn"):
        text += (
            " A module of torch's own, such as nn.Sequential, is not found where it has no "
            "parameters or runs what was compiled for another one: torch runs one code for all."
        )
    return text


def _recurrent(model: object, sections: Sequence[Section]) -> list[str]:
    """What Dynamo has kept from the backend: it leaves recurrent modules to eager by itself."""
    module = original_module(model)
    if not isinstance(module, nn.Module):
        return []
    found = {
        name or "the model": type(part).__name__
        for name, part in module.named_modules()
        if isinstance(part, nn.RNNBase)
    }
    kinds = {op.kind for section in sections for op in section.plan.graph}
    missing = [f"{name} ({kind})" for name, kind in found.items() if kind.lower() not in kinds]
    if not missing:
        return []
    what = "is" if len(missing) == 1 else "are"
    return [
        f"{', '.join(missing)} {what} left to eager by torch.compile, with all of the frames that "
        "call it, unless torch._dynamo.config.allow_rnn is True: not planned, and in no total "
        "here. report(model, x) plans it without running."
    ]


def _quantised(model: object) -> list[str]:
    """What Dynamo cannot trace: kernels on tensors of quantised types."""
    module = original_module(model)
    if not is_eager_quantised(module):
        return []
    return [
        f"{type(module).__name__} holds modules of torch's eager-mode quantisation, which Dynamo "
        "does not trace: they run unplanned, and are in no total here. report(model, x) plans "
        "them by their reference; a model that PT2E (torchao) quantises compiles whole."
    ]


def _capture(model: object, args: tuple[Any, ...], usage: str) -> Capture:
    if isinstance(model, torch.export.ExportedProgram):
        return capture_exported(model)
    return capture_model(_checked(model, args, usage), args)


def _in_module(program: torch.export.ExportedProgram) -> Capture:
    """The capture of a program, in the graph of its module.

    The program's graph has its weights as inputs; as a module it has them as attributes.
    """
    captured = capture_exported(program)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    # As the capture's own graph, so that a node has the same name in both.
    module = exported_without_view_changes(inline_regions(module), ending=True)
    module = with_own_dequantize(without_idle_casts(module))
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
    for node, given in zip(nodes, tree_leaves(args), strict=False):
        traced = traced_value(node)
        if isinstance(traced, torch.Tensor) and isinstance(given, torch.Tensor):
            wanted = tensor_info(traced)
            if tensor_info(given) != wanted:
                raise OptionError(
                    f"input {node.name!r} is {tuple(given.shape)} {given.dtype}, but the program "
                    f"and the plan are for {wanted.shape} {wanted.dtype}; export and plan for it"
                )


def _checked(model: object, args: object, usage: str) -> nn.Module:
    """The module; raises :class:`OptionError` where it or its inputs are not of their kind."""
    if not isinstance(model, nn.Module):
        raise _no_model(model)
    if not isinstance(args, tuple):
        named = "; inputs go by position, in the order of forward()"
        raise OptionError(
            f"args must be a tuple of example inputs, like (x,), not {type(args).__name__}"
            + (named if isinstance(args, Mapping) else "")
        )
    if not args:
        raise OptionError(f"example inputs are missing: {usage}")
    if len(args) > 1 and all(isinstance(value, int) for value in args):
        size = ", ".join(map(str, args))
        raise OptionError(f"args hold sizes, not inputs: give tensors, like (torch.zeros({size}),)")
    for position, value in enumerate(args):
        if type(value).__module__ == "numpy":
            raise OptionError(
                f"input {position} is a numpy {type(value).__name__}: give torch.from_numpy(x)"
            )
    return model


def _no_model(model: object) -> OptionError:
    """The error for what is no model."""
    if isinstance(model, type):
        name = model.__name__
        return OptionError(f"{name} is a class: give an instance, like {name}(...)")
    hint = ""
    if isinstance(model, str):
        hint = f"; torch_getfuse.models.load_model({model!r}) makes a model of a name"
    elif callable(model):
        hint = "; a function goes into the forward() of one"
    return OptionError(
        f"expected a torch.nn.Module or an ExportedProgram, got {type(model).__name__}{hint}"
    )
