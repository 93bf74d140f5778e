"""Sweeps: the same models planned for many buffers, schemes and methods, by many processes.

Each model is captured once, in the calling process; workers are sent operator graphs and import
no torch unless an explainer needs it. joblib runs them: local processes by default, Ray or Dask
inside joblib's own ``parallel_config(backend=...)`` (docs/sweep.md).
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_getfuse.errors import CaptureError, GetfuseError, Interrupted, OptionError, interrupts
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options, SweptKwargs
from torch_getfuse.partition.cost.registry import effective_granularity
from torch_getfuse.planner import plan_graph
from torch_getfuse.plugins import name_of
from torch_getfuse.reporting.section import Section
from torch_getfuse.reporting.sweep_result import (
    FIGURES,
    SCHEMA_VERSION,
    Journal,
    Record,
    Sweep,
    identity,
    title,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger(__name__)

SWEPT = {
    "buffers": "64KB,128KB,1MB",
    "schemes": "lbdf,brr",
    "granularities": "line,pixel",
    "methods": "auto,local",
}
"""What a sweep takes several of, with an example of the command line each."""
_SINGLE = dict(zip(("buffer", "scheme", "granularity", "method"), SWEPT, strict=True))
_REFUSED = {
    "plan": "a sweep makes its plans",
    "inner": "a sweep runs no model",
    "strict": "a sweep runs no model",
}
NOT_SWEPT = (*_SINGLE, *_REFUSED)
"""Options that are not the same for all points, or that a sweep has no use for."""


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
    progress: bool | str = "auto",
    **options: Unpack[SweptKwargs],
) -> Sweep:
    """Plan models for every buffer, scheme, granularity and method, in parallel.

    Args:
        model: a module (with ``args``), an ExportedProgram, or a name as on the command line
            (``"torchvision:resnet18"``); or a list of these, or of pairs ``(model, args)``; or a
            mapping from names of your own to these.
        args: example inputs of a single module; a name without inputs takes the model's usual.
        buffers: on-chip buffers, bytes or text like ``"256KB"``; by default the one of
            ``accelerator``, or 256 KB.
        schemes, granularities, methods: cost models and searches, by name or as objects (which
            worker processes must be able to unpickle). BRR has no granularity and is planned once.
        n_jobs: worker processes; -1 for one per core, 1 for none but this, ``None`` for what
            ``joblib.parallel_config`` says.
        path: a file of JSON lines. Every finished point is appended at once, and points that it
            holds already are not planned again, unless an object was given for them. One sweep at
            a time may write to it.
        progress: a bar over the points: ``True``, ``False``, or ``"auto"``: on a terminal.
        options: the other options of :class:`~torch_getfuse.options.Options`, for all points.

    Returns:
        One record per point, in the order of the arguments. A point that failed has an ``error``
        and no figures, and is tried again by the next sweep with this ``path``.

    Raises:
        OptionError: for an unknown option or value, before anything is planned.
        CaptureError: where not one model can be captured.
        GetfuseError: where ``path`` holds something else than a sweep.
        OSError: where ``path`` cannot be read or written.
        Interrupted: for a ``KeyboardInterrupt``; its ``sweep`` holds the finished points.
    """
    chosen = _choices(buffers, schemes, granularities, methods, options)
    if progress not in (True, False, "auto"):
        raise OptionError(f"progress={progress!r} is not True, False or 'auto'")
    wanted = _models(model, args)
    kept = Journal(path) if path is not None else None
    with interrupts():
        graphs, failures = _captured(wanted)
    # Two models may have one graph: it is planned once.
    points: dict[tuple[Any, ...], tuple[OpGraph, Options, Record]] = {}
    for name, graph in graphs.items():
        for point in chosen:
            record = _asked(graph, point, name)
            points.setdefault(identity(record), (graph, point, record))
    found = dict(kept.records) if kept is not None else {}
    for key, (_, point, _) in points.items():
        if point.objects:
            found.pop(key, None)  # nobody can tell whether an object is still what it was
    done = set(found)
    open_ = [work for key, work in points.items() if key not in done]
    log.info("sweep: %d points, %d of them done before", len(points), len(points) - len(open_))
    interrupted: KeyboardInterrupt | None = None
    try:
        for record in _shown(_results(open_, n_jobs), len(open_), progress):
            found[identity(record)] = record
            if kept is not None:
                kept.append(record)
    except KeyboardInterrupt as error:
        interrupted = error
    finally:
        if kept is not None:
            kept.close()
    records: list[Record] = []
    for name in wanted:
        for point in chosen:
            if name in failures:
                records.append(_blank(name, point) | {"error": failures[name]})
            elif (key := identity(_asked(graphs[name], point, name))) in found:
                records.append(found[key] | {"model": name})
    result = Sweep(tuple(records), sum(identity(record) in done for record in records))
    if interrupted is not None:
        raise Interrupted(sweep=result) from interrupted
    for record in result.errors:
        log.warning("sweep: %s failed: %s", title(record), record["error"])
    return result


# -- what is asked for --------------------------------------------------------------------


def _choices(
    buffers: Iterable[int | str] | None,
    schemes: Iterable[str | Callable[..., Any]],
    granularities: Iterable[str],
    methods: Iterable[str | Callable[..., Any]],
    options: Mapping[str, Any],
) -> list[Options]:
    """The product of the four, every point once, as checked options."""
    for name, several in _SINGLE.items():
        if name in options:
            raise OptionError(f"a sweep takes {several}=[...], not {name}=")
    for name, reason in _REFUSED.items():
        if name in options:
            raise OptionError(f"sweep() does not take {name}=: {reason}")
    given: dict[str, Sequence[Any]] = {
        "buffers": [Options.of(options).buffer_bytes] if buffers is None else _listed(buffers),
        "schemes": _listed(schemes),
        "granularities": _listed(granularities),
        "methods": _listed(methods),
    }
    for name, values in given.items():
        if not values:
            raise OptionError(f"{name}=[] leaves nothing to plan")
    found: dict[tuple[Any, ...], Options] = {}
    for scheme, granularity, method, buffer in itertools.product(
        given["schemes"], given["granularities"], given["methods"], given["buffers"]
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
        same = found.setdefault(key, chosen)
        for name in ("scheme", "method"):
            one, other = getattr(same, name), getattr(chosen, name)
            if one is not other and one != other:
                raise OptionError(
                    f"two {_SINGLE[name]} are called {name_of(other)!r}; records tell them apart "
                    "by their names: give each its own"
                )
    return list(found.values())


def _listed(values: Any) -> list[Any]:
    """``values`` as a list; a single one is meant as a list of one."""
    return [values] if isinstance(values, str | int) or callable(values) else list(values)


def _models(model: Any, args: tuple[Any, ...]) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Name -> (model or its name, inputs), each model under a name of its own."""
    if isinstance(model, Mapping):
        given = list(model.items())
    elif isinstance(model, list):
        given = [("", one) for one in model]
    else:
        given = [("", (model, args))]
        args = ()
    if args:
        raise OptionError("several models bring their own inputs: sweep([(model, (x,)), ...])")
    if not given:
        raise OptionError("there is no model to plan")
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for name, one in given:
        what, inputs = one if isinstance(one, tuple) and len(one) == 2 else (one, ())
        if not isinstance(inputs, tuple):
            raise OptionError(
                f"inputs must be a tuple, like (model, (x,)), not {type(inputs).__name__}"
            )
        name = str(name) or (what if isinstance(what, str) else type(what).__name__)
        found[_unused(name, found)] = (what, inputs)
    return found


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    tries = itertools.chain([name], (f"{name} ({k})" for k in itertools.count(2)))
    return next(each for each in tries if each not in taken)


def _captured(
    wanted: Mapping[str, tuple[Any, tuple[Any, ...]]],
) -> tuple[dict[str, OpGraph], dict[str, str]]:
    """Graphs of the models, and the errors of those that have none.

    One model is in memory at a time if it is given by name.

    Raises:
        OptionError: for something that is no model, or a module without inputs.
        ModelError: for a name that stands for none.
        CaptureError: where there is not one graph.
    """
    graphs: dict[str, OpGraph] = {}
    failures: dict[str, str] = {}
    for name, (model, inputs) in wanted.items():
        try:
            graphs[name] = _capture(model, inputs)
        except Exception as error:  # a model fails in its own code, by whatever it raises
            if isinstance(error, GetfuseError) and not isinstance(error, CaptureError):
                raise
            failures[name] = _told(error)
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


def _blank(name: str, options: Options) -> Record:
    """A record of a point of which nothing is known but what was asked for."""
    return {
        "model": name,
        "schema_version": SCHEMA_VERSION,
        "fingerprint": None,
        "scheme": name_of(options.scheme),
        "granularity": effective_granularity(options.scheme, options.granularity),
        "buffer_bytes": options.buffer_bytes,
        "activation_bytes": options.activation_bytes,
        "weight_bytes": options.weight_bytes,
        "method": name_of(options.method),
        "explainer": None if options.explainer is None else name_of(options.explainer),
        "split_rule": options.split_rule,
        "budget": options.budget,
        "seed": options.seed,
        "time_limit": options.time_limit,
        **dict.fromkeys(FIGURES),
        "error": None,
    }


def _asked(graph: OpGraph, options: Options, name: str) -> Record:
    return _blank(name, options) | {
        "fingerprint": graph.fingerprint,
        "activation_bytes": options.activation_bytes or graph.activation_bytes,
        "weight_bytes": options.weight_bytes or graph.weight_width,
    }


# -- planning -----------------------------------------------------------------------------


def _plan(graph: OpGraph, options: Options, record: Record) -> Record:
    """Plan one point, in a worker; an error becomes part of the record."""
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
            "lower_bound_bytes": plan.lower_bound_bytes + section.outside.total,
            "proof": plan.proof,
            "groups": len(plan.groups),
            "unfusable": len(plan.unfusable),
            "max_buffer_bytes": plan.max_buffer_bytes,
            "stopped": ", ".join(stopped),
            "seconds": time.perf_counter() - started,
        }
    except Exception as error:  # one point must not cost the others
        log.debug("%s failed", title(record), exc_info=True)
        return {**record, "error": _told(error)}
    return {**record, **figures}


def _results(
    points: Sequence[tuple[OpGraph, Options, Record]], n_jobs: int | None
) -> Iterator[Record]:
    """The records as they are finished, in any order."""
    if not points:
        return
    from joblib import Parallel, delayed, effective_n_jobs
    from joblib.parallel import get_active_backend

    jobs = [delayed(_plan)(*point) for point in points]
    # One point per message: a point takes longer than sending it, and a finished one is saved.
    if get_active_backend()[0].supports_return_generator:
        yield from Parallel(n_jobs=n_jobs, return_as="generator_unordered", batch_size=1)(jobs)
        return
    # Ray's backend gives results all at once, so it gets a few rounds of points at a time.
    most = 4 * effective_n_jobs(n_jobs)
    for first in range(0, len(jobs), most):
        yield from Parallel(n_jobs=n_jobs, batch_size=1)(jobs[first : first + most])


def _shown(records: Iterable[Record], total: int, progress: bool | str) -> Iterable[Record]:
    from tqdm import tqdm

    # disable=None: tqdm looks whether there is a terminal.
    hidden = None if progress == "auto" else not progress
    bar: Iterable[Record] = tqdm(
        records, total=total, desc="sweep", unit="plan", leave=False, disable=hidden
    )
    return bar


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, GetfuseError) and text else f"{type(error).__name__}: {text}"
