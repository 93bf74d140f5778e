"""Sweeps: the same models planned for many buffers, schemes and methods, in many processes.

Each model is captured once, in the calling process; workers receive operator graphs and do not
import torch unless an explainer needs it. joblib runs them: local processes by default, Ray or
Dask inside joblib's ``parallel_config(backend=...)`` (docs/sweep.md).
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_getfuse.errors import CaptureError, GetfuseError, Interrupted, OptionError, interrupts
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import REFUSED_BY_SWEEP, SWEPT, Options, SweptKwargs
from torch_getfuse.partition.cost.registry import effective_granularity
from torch_getfuse.planner import plan_graph
from torch_getfuse.plugins import SCHEMES, fact, name_of
from torch_getfuse.reporting.section import Section
from torch_getfuse.reporting.smallest import next_buffer
from torch_getfuse.reporting.sweep_result import (
    FIGURES,
    SCHEMA_VERSION,
    Journal,
    Record,
    Sweep,
    identity,
    line_of,
    title,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger(__name__)

Point = tuple[OpGraph, Options, Record]
"""A graph, what it is planned for, and the record without its figures."""


def sweep(
    model: Any,
    args: tuple[Any, ...] = (),
    *,
    buffers: Iterable[int | str] | None = None,
    schemes: Iterable[str | Callable[..., Any]] = ("lbdf",),
    granularities: Iterable[str] = ("line",),
    methods: Iterable[str | Callable[..., Any]] = ("auto",),
    n_jobs: int | None = -1,
    path: str | Path | None = None,
    within: float | None = None,
    progress: bool | str = "auto",
    **options: Unpack[SweptKwargs],
) -> Sweep:
    """Plan models for every buffer, scheme, granularity and method, in parallel.

    Args:
        model: a module (with ``args``), an ExportedProgram, or a name as on the command line
            (``"torchvision:resnet18"``); or a list of these, or of pairs ``(model, args)``; or a
            mapping from names that you choose to these.
        args: example inputs of a single module; by default those usual for a model given by name.
        buffers: on-chip buffers, bytes or text like ``"256KB"``; by default the one of
            ``accelerator``, or 256 KB.
        schemes: cost models, by name or as objects (which worker processes must be able to
            unpickle).
        granularities: of the schemes that have one; the others are planned once.
        methods: searches, by name or as objects.
        n_jobs: worker processes; -1 for one per core, 1 for this process only, ``None`` for the
            setting of ``joblib.parallel_config``.
        path: a file of JSON lines. Every finished point is appended at once, and points that it
            holds already are not planned again, unless an object was given for them. One sweep at
            a time may write to it.
        within: search the smallest buffer as well, in steps of 1 KB, whose plan is at most so many
            per cent above the floor: inputs, outputs and weights once. For each model, scheme and
            method of which a buffer of the sweep suffices; ``result.smallest()`` has them.
        progress: show a progress bar: ``True``, ``False``, or ``"auto"`` (only on a terminal).
        options: the other options of :class:`~torch_getfuse.options.Options`, for all points.

    Returns:
        One record per point, in the order of the arguments. A point that failed has an ``error``
        and no figures, and is tried again by the next sweep with this ``path``.

    Raises:
        OptionError: for an unknown option or value, before anything is planned.
        CaptureError: if none of the models can be captured.
        GetfuseError: if ``path`` contains something other than a sweep.
        FileError: if ``path`` cannot be written.
        OSError: if it cannot be read.
        Interrupted: for a ``KeyboardInterrupt``; its ``sweep`` holds the finished points.
    """
    if "jobs" in options:
        raise OptionError("sweep() takes n_jobs=, not jobs=")
    chosen = _choices(buffers, schemes, granularities, methods, options)
    if progress not in (True, False, "auto"):
        raise OptionError(f"progress={progress!r} is not True, False or 'auto'")
    if within is not None and (not isinstance(within, (int, float)) or not within >= 0):
        raise OptionError(f"within={within!r} is not a number of per cent from 0 up")
    wanted = _models(model, args)
    kept = Journal(path) if path is not None else None
    with interrupts():
        graphs, failures = _captured(wanted)
    # Two models may have the same graph, which is planned once.
    points: dict[tuple[Any, ...], Point] = {}
    for name, graph in graphs.items():
        for point in chosen:
            record = _request(graph, point, name)
            points.setdefault(identity(record), (graph, point, record))
    finished = dict(kept.records) if kept is not None else {}
    for key, (_, point, _) in points.items():
        if point.objects:
            finished.pop(key, None)  # an object may have changed since it was planned
    done = set(finished)
    open_ = [work for key, work in points.items() if key not in done]
    log.info("sweep: %d points, %d of them done before", len(points), len(points) - len(open_))
    interrupted: KeyboardInterrupt | None = None
    tried: dict[tuple[Any, ...], Record] = {}

    def plan_all(open_: Sequence[Point]) -> None:
        for record in _with_bar(_results(open_, n_jobs), len(open_), progress):
            finished[identity(record)] = record
            if kept is not None:
                kept.append(record)

    try:
        plan_all(open_)
        if within is not None:
            for line in _narrowed(points, finished, within, plan_all):
                tried.update((identity(record), record) for record in line)
    except KeyboardInterrupt as error:
        interrupted = error
    finally:
        if kept is not None:
            kept.close()
    records: list[Record] = []
    for name in wanted:
        for point in chosen:
            if name in failures:
                records.append(_empty_record(name, point) | {"error": failures[name]})
            elif (key := identity(_request(graphs[name], point, name))) in finished:
                records.append(finished[key] | {"model": name})
    result = Sweep(
        tuple(records),
        sum(identity(record) in done for record in records),
        within,
        tuple(
            record | {"model": name}
            for name, graph in graphs.items()
            for record in tried.values()
            if record["fingerprint"] == graph.fingerprint
        ),
    )
    if interrupted is not None:
        raise Interrupted(sweep=result) from interrupted
    for record in result.errors:
        log.warning("sweep: %s failed: %s", title(record), record["error"])
    return result


# -- points to plan -----------------------------------------------------------------------


def _choices(
    buffers: Iterable[int | str] | None,
    schemes: Iterable[str | Callable[..., Any]],
    granularities: Iterable[str],
    methods: Iterable[str | Callable[..., Any]],
    options: Mapping[str, Any],
) -> list[Options]:
    """The product of the four as validated options, without duplicates."""
    for name, several in SWEPT.items():
        if name in options:
            raise OptionError(f"a sweep takes {several}=[...], not {name}=")
    for name, reason in REFUSED_BY_SWEEP.items():
        if name in options:
            raise OptionError(f"sweep() does not take {name}=: {reason}")
    axes: dict[str, Sequence[Any]] = {
        "buffers": [Options.of(options).buffer_bytes] if buffers is None else _listed(buffers),
        "schemes": _listed(schemes),
        "granularities": _listed(granularities),
        "methods": _listed(methods),
    }
    for name, values in axes.items():
        if not values:
            raise OptionError(f"{name}=[] leaves nothing to plan")
    points: dict[tuple[Any, ...], Options] = {}
    for scheme, granularity, method, buffer in itertools.product(
        axes["schemes"], axes["granularities"], axes["methods"], axes["buffers"]
    ):
        chosen = Options.of(
            {
                **options,
                "scheme": scheme,
                "granularity": granularity,
                "method": method,
                "buffer": buffer,
                "progress": False,
            }
        )
        unit = effective_granularity(scheme, granularity)
        key = name_of(scheme), unit, name_of(method), chosen.buffer_bytes
        same = points.setdefault(key, chosen)
        for name in ("scheme", "method"):
            one, other = getattr(same, name), getattr(chosen, name)
            if one is not other and one != other:
                raise OptionError(
                    f"two {SWEPT[name]} are called {name_of(other)!r}; records tell them apart "
                    "by their names: give each its own"
                )
    return list(points.values())


def _listed(values: Any) -> list[Any]:
    """``values`` as a list; a single value becomes a list of one."""
    return [values] if isinstance(values, str | int) or callable(values) else list(values)


def _models(model: Any, args: tuple[Any, ...]) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Name -> (model or its name, inputs), with a unique name per model."""
    if isinstance(model, Mapping):
        pairs = list(model.items())
    elif isinstance(model, list):
        pairs = [("", entry) for entry in model]
    else:
        pairs = [("", (model, args))]
        args = ()
    if args:
        raise OptionError("several models bring their own inputs: sweep([(model, (x,)), ...])")
    if not pairs:
        raise OptionError("there is no model to plan")
    models: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for name, entry in pairs:
        what, inputs = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, ())
        if not isinstance(inputs, tuple):
            raise OptionError(
                f"inputs must be a tuple, like (model, (x,)), not {type(inputs).__name__}"
            )
        name = str(name) or (what if isinstance(what, str) else type(what).__name__)
        models[_unique_name(name, models)] = (what, inputs)
    return models


def _unique_name(name: str, taken: Mapping[str, Any]) -> str:
    tries = itertools.chain([name], (f"{name} ({k})" for k in itertools.count(2)))
    return next(candidate for candidate in tries if candidate not in taken)


def _captured(
    wanted: Mapping[str, tuple[Any, tuple[Any, ...]]],
) -> tuple[dict[str, OpGraph], dict[str, str]]:
    """Graphs of the models, and the errors of those that cannot be captured.

    Of models given by name, only one is in memory at a time.

    Raises:
        OptionError: for something that is not a model, or a module without inputs.
        ModelError: for a name that names no model.
        CaptureError: if none of the models can be captured.
    """
    graphs: dict[str, OpGraph] = {}
    failures: dict[str, str] = {}
    for name, (model, inputs) in wanted.items():
        try:
            graphs[name] = _capture(model, inputs)
        except Exception as error:  # a model's own code may raise anything
            if isinstance(error, GetfuseError) and not isinstance(error, CaptureError):
                raise
            failures[name] = _error_text(error)
            if len(failures) == len(wanted):
                raise CaptureError(f"{name} cannot be captured: {failures[name]}") from error
    return graphs, failures


def _capture(model: Any, inputs: tuple[Any, ...]) -> OpGraph:
    import torch

    from torch_getfuse.backend.capture.capture import capture_exported, capture_model

    if isinstance(model, str):
        from torch_getfuse.models import default_input, load_model

        name, model = model, load_model(model)
        if not inputs and isinstance(model, torch.nn.Module):
            inputs = (torch.zeros(default_input(name)),)
    if isinstance(model, torch.export.ExportedProgram):
        return capture_exported(model).graph
    if not isinstance(model, torch.nn.Module):
        raise OptionError(
            f"expected a torch.nn.Module, an ExportedProgram or a model's name, "
            f"got {type(model).__name__}"
        )
    if not inputs:
        raise OptionError(f"{type(model).__name__} needs example inputs: sweep(model, (x,))")
    return capture_model(model, inputs).graph


def _empty_record(name: str, options: Options) -> Record:
    """The record of a point that is not planned yet: its settings only."""
    steps = fact(SCHEMES.load(options.scheme), "sequential", False)
    return {
        "model": name,
        "schema_version": SCHEMA_VERSION,
        "fingerprint": None,
        "scheme": name_of(options.scheme),
        "granularity": effective_granularity(options.scheme, options.granularity),
        "buffer_bytes": options.buffer_bytes,
        "activation_bytes": options.activation_bytes,
        "weight_bytes": options.weight_bytes,
        "align_channels": options.align_channels,
        "residency": options.residency if steps else None,
        "slice_channels": options.slice_channels if steps else None,
        "method": name_of(options.method),
        "explainer": None if options.explainer is None else name_of(options.explainer),
        "split_rule": options.split_rule,
        "budget": options.budget,
        "seed": options.seed,
        "time_limit": options.time_limit,
        **dict.fromkeys(FIGURES),
        "error": None,
    }


def _request(graph: OpGraph, options: Options, name: str) -> Record:
    return _empty_record(name, options) | {
        "fingerprint": graph.fingerprint,
        "activation_bytes": graph.stored_as(options.activation_bytes).activation_width,
        "weight_bytes": (
            graph.weight_width if options.weight_bytes is None else options.weight_bytes
        ),
    }


# -- planning -----------------------------------------------------------------------------


def _plan(graph: OpGraph, options: Options, record: Record) -> Record:
    """Plan one point, in a worker; an error is stored in the record."""
    started = time.perf_counter()
    try:
        plan = plan_graph(graph, options)
        section = Section(plan)
        planned = section.network_planned
        stopped = dict.fromkeys(stage.stopped for stage in plan.stages if stage.stopped)
        figures: Record = {
            "dram_bytes": planned.total,
            "feature_bytes": planned.read + planned.write,
            "unfused_bytes": section.network_unfused.total,
            "unfusable_bytes": section.outside.total,
            "lower_bound_bytes": section.lower_bound,
            "floor_bytes": section.floor.total,
            "proof": plan.proof,
            "groups": len(plan.groups),
            "unfusable": len(plan.unfusable),
            "max_buffer_bytes": plan.max_buffer_bytes,
            "stopped": ", ".join(stopped),
            "seconds": time.perf_counter() - started,
        }
    except Exception as error:  # the failure of one point must not affect the others
        log.debug("%s failed", title(record), exc_info=True)
        return {**record, "error": _error_text(error)}
    return {**record, **figures}


def _narrowed(
    points: Mapping[tuple[Any, ...], Point],
    finished: Mapping[tuple[Any, ...], Record],
    percent: float,
    plan_all: Callable[[Sequence[Point]], None],
) -> Iterator[list[Record]]:
    """Search the smallest buffers by halves, those of all lines side by side.

    Args:
        points: what the sweep was asked for, by :func:`identity`.
        finished: the records of what was planned.
        percent: how far above the floor a plan may be.
        plan_all: plans points and files them in ``finished``.

    Yields:
        The records that each round adds.
    """
    lines: dict[tuple[Any, ...], tuple[Point, list[Record]]] = {}
    for key, point in points.items():
        line = lines.setdefault(line_of(point[2]), (point, []))
        if finished[key]["error"] is None:
            line[1].append(finished[key])
    while lines:
        wanted: dict[tuple[Any, ...], Point] = {}
        for name, ((graph, options, record), known) in list(lines.items()):
            buffer = next_buffer(known, percent)
            if buffer is None:
                del lines[name]
                continue
            asked = {**record, "buffer_bytes": buffer}
            wanted[name] = (graph, replace(options, buffer=buffer), asked)
        plan_all([point for point in wanted.values() if identity(point[2]) not in finished])
        found = {name: finished[identity(point[2])] for name, point in wanted.items()}
        for name, record in found.items():
            lines[name][1].append(record)
            if record["error"] is not None:
                del lines[name]
        yield list(found.values())


def _results(points: Sequence[Point], n_jobs: int | None) -> Iterator[Record]:
    """The records as they are finished, in any order."""
    if not points:
        return
    from joblib import Parallel, delayed, effective_n_jobs
    from joblib.parallel import get_active_backend

    jobs = [delayed(_plan)(*point) for point in points]
    # One point per message: planning takes longer than sending, and each result is saved at once.
    if get_active_backend()[0].supports_return_generator:
        yield from Parallel(n_jobs=n_jobs, return_as="generator_unordered", batch_size=1)(jobs)
        return
    # Ray's backend returns all results at once, so points are submitted in batches.
    most = 4 * effective_n_jobs(n_jobs)
    for first in range(0, len(jobs), most):
        yield from Parallel(n_jobs=n_jobs, batch_size=1)(jobs[first : first + most])


def _with_bar(records: Iterable[Record], total: int, progress: bool | str) -> Iterable[Record]:
    from tqdm import tqdm

    # disable=None: tqdm checks for a terminal.
    hidden = None if progress == "auto" else not progress
    bar: Iterable[Record] = tqdm(
        records, total=total, desc="sweep", unit="plan", leave=False, disable=hidden
    )
    return bar


def _error_text(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, GetfuseError) and text else f"{type(error).__name__}: {text}"
