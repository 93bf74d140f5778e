"""Sweeps: the same models planned for many buffers, schemes and methods, by many processes.

Each model is captured once, in the calling process; workers are sent operator graphs and import
no torch unless an explainer needs it. joblib runs them: local processes by default, Ray or Dask
inside joblib's own ``parallel_config(backend=...)`` (docs/sweep.md).
"""

from __future__ import annotations

import csv
import html
import io
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from torch_getfuse.accelerator import KB, MB, format_size
from torch_getfuse.errors import CaptureError, GetfuseError, OptionError, nearest
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options
from torch_getfuse.planner import plan_graph
from torch_getfuse.report import Section

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1

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
KEY = (
    "schema_version",
    "fingerprint",
    "scheme",
    "granularity",
    "buffer_bytes",
    "activation_bytes",
    "weight_bytes",
    "method",
    "explainer",
    "split_rule",
    "budget",
    "seed",
    "time_limit",
)
"""Fields of a record that say what was asked for: all that its figures depend on."""
FIGURES = (
    "dram_bytes",
    "feature_bytes",
    "unfused_bytes",
    "unfusable_bytes",
    "lower_bound_bytes",
    "proof",
    "groups",
    "unfusable",
    "max_buffer_bytes",
    "stopped",
    "seconds",
)
"""Fields of a record that say what was found."""
_COLUMNS = ("model", *KEY, *FIGURES, "error")

Record = dict[str, Any]


def sweep(
    model: Any,
    args: tuple[Any, ...] = (),
    *,
    buffers: Iterable[int | str] | None = None,
    schemes: Iterable[str] = ("lbdf",),
    granularities: Iterable[str] = ("line",),
    methods: Iterable[str] = ("auto",),
    n_jobs: int | None = -1,
    path: str | Path | None = None,
    progress: bool | str = "auto",
    **options: Any,
) -> Sweep:
    """Plan models for every buffer, scheme, granularity and method, in parallel.

    Args:
        model: a module (with ``args``), an ExportedProgram, or a name as on the command line
            (``"torchvision:resnet18"``); or a list of these, or of pairs ``(model, args)``; or a
            mapping from names of your own to these.
        args: example inputs of a single module; a name without inputs takes the model's usual.
        buffers: on-chip buffers, bytes or text like ``"256KB"``; by default the one of
            ``accelerator``, or 256 KB.
        schemes, granularities, methods: cost models and searches. BRR has no granularity and is
            planned once.
        n_jobs: worker processes; -1 for one per core, 1 for none but this, ``None`` for what
            ``joblib.parallel_config`` says.
        path: a file of JSON lines. Every finished point is appended at once, and points that it
            holds already are not planned again. One sweep at a time may write to it.
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
    """
    chosen = _choices(buffers, schemes, granularities, methods, options)
    if progress not in (True, False, "auto"):
        raise OptionError(f"progress={progress!r} is not True, False or 'auto'")
    wanted = _models(model, args)
    kept = _Journal(path) if path is not None else None
    graphs, failures = _captured(wanted)
    # Two models may have one graph: it is planned once.
    points: dict[tuple[Any, ...], tuple[OpGraph, Options, Record]] = {}
    for name, graph in graphs.items():
        for point in chosen:
            record = _asked(graph, point, name)
            points.setdefault(_identity(record), (graph, point, record))
    found = dict(kept.records) if kept is not None else {}
    open_ = [work for key, work in points.items() if key not in found]
    log.info("sweep: %d points, %d of them done before", len(points), len(points) - len(open_))
    try:
        for record in _shown(_results(open_, n_jobs), len(open_), progress):
            found[_identity(record)] = record
            if kept is not None:
                kept.append(record)
    finally:
        if kept is not None:
            kept.close()
    records: list[Record] = []
    for name in wanted:
        for point in chosen:
            if name in failures:
                records.append(_blank(name, point) | {"error": failures[name]})
            else:
                records.append(
                    found[_identity(_asked(graphs[name], point, name))] | {"model": name}
                )
    result = Sweep(tuple(records))
    for record in result.errors:
        log.warning("sweep: %s failed: %s", _title(record), record["error"])
    return result


@dataclass(frozen=True)
class Sweep:
    """What a sweep found; ``print(sweep)`` shows a table.

    Attributes:
        records: one dictionary per point: ``model``, what was asked for (:data:`KEY`), what was
            found (:data:`FIGURES`; ``None`` where the point failed) and ``error`` (``None`` where
            it did not). Sizes are integer bytes per sample; ``dram_bytes`` is of the plan's
            groups, ``unfused_bytes`` the same with every fusable operator alone, and
            ``unfusable_bytes`` what the ``unfusable`` operators move at least. ``seconds`` is
            the planning time, ``stopped`` why a search ended early.
    """

    records: tuple[Record, ...]

    @property
    def errors(self) -> list[Record]:
        """The points that failed."""
        return [record for record in self.records if record["error"] is not None]

    def __str__(self) -> str:
        return self._render("simple", str)

    def __repr__(self) -> str:
        return f"<Sweep of {len(self.records)} points, {len(self.errors)} failed>"

    def _repr_html_(self) -> str:
        return self._render("html", lambda text: f"<p>{html.escape(text)}</p>")

    def _render(self, form: str, paragraph: Callable[[str], str]) -> str:
        parts = []
        rows = [_row(record) for record in self.records if record["error"] is None]
        if rows:
            align = ("left",) * 3 + ("right",) * (len(_HEADERS) - 4) + ("left",)
            parts.append(str(tabulate(rows, _HEADERS, form, colalign=align, disable_numparse=True)))
        parts += [paragraph(f"{_title(r)} failed: {r['error']}") for r in self.errors]
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "records": [{name: record[name] for name in _COLUMNS} for record in self.records],
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def to_jsonl(self) -> str:
        """One JSON object per line and point: what ``sweep(path=...)`` writes and reads."""
        return "".join(json.dumps(record) + "\n" for record in self.records)

    def to_csv(self) -> str:
        """One line per point below a line of names."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records)
        return text.getvalue()

    def to_pandas(self) -> pandas.DataFrame:
        """One row per point.

        Raises:
            GetfuseError: where pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise GetfuseError("to_pandas() needs pandas: pip install pandas") from error
        return pandas.DataFrame(list(self.records), columns=list(_COLUMNS))

    def plot(self) -> Figure:
        """DRAM access against the buffer, a line per model, scheme and method.

        Unfusable operators are included at the least that they move, since otherwise the plan of
        a smaller buffer, which leaves more of them out, would look cheaper. Points that are not
        proved optimal are hollow.

        Raises:
            GetfuseError: where matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise GetfuseError("plots need matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        lines: dict[str, list[Record]] = {}
        for record in self.records:
            if record["error"] is None:
                lines.setdefault(_label(record), []).append(record)
        for label, records in lines.items():
            records = sorted(records, key=lambda record: int(record["buffer_bytes"]))
            x = [record["buffer_bytes"] / KB for record in records]
            y = [(record["dram_bytes"] + record["unfusable_bytes"]) / MB for record in records]
            (line,) = axes.plot(x, y, marker="o", label=label)
            unproved = [k for k, record in enumerate(records) if record["proof"] != "optimal"]
            axes.plot(
                [x[k] for k in unproved],
                [y[k] for k in unproved],
                color=line.get_color(),
                marker="o",
                linestyle="",
                markerfacecolor="white",
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("on-chip buffer (KB)")
        axes.set_ylabel("DRAM access per sample (MB)")
        if lines:
            axes.legend(fontsize="small")
        return figure

    def save(self, path: str | Path) -> None:
        """Write the form that the suffix names: .txt, .json, .jsonl, .csv, .svg or .png.

        Raises:
            OptionError: for another suffix.
            GetfuseError: for a picture where matplotlib is not installed.
            OSError: where the file cannot be written.
        """
        _form(path)(self, Path(path))

    @staticmethod
    def check_suffix(path: str | Path) -> None:
        """Refuse, before any work is done, a path that :meth:`save` could not name a form for.

        Raises:
            OptionError: names the known suffixes.
        """
        _form(path)


# -- what is asked for --------------------------------------------------------------------


def _choices(
    buffers: Iterable[int | str] | None,
    schemes: Iterable[str],
    granularities: Iterable[str],
    methods: Iterable[str],
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
        found.setdefault((scheme, _granularity(chosen), method, chosen.buffer_bytes), chosen)
    return list(found.values())


def _listed(values: Any) -> list[Any]:
    """``values`` as a list; a single one is meant as a list of one."""
    return [values] if isinstance(values, str | int) else list(values)


def _granularity(options: Options) -> str:
    return options.granularity if options.scheme == "lbdf" else "line"


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

    from torch_getfuse.backend.capture import capture_exported, capture_model

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
        "scheme": options.scheme,
        "granularity": _granularity(options),
        "buffer_bytes": options.buffer_bytes,
        "activation_bytes": options.activation_bytes,
        "weight_bytes": options.weight_bytes,
        "method": options.method,
        "explainer": options.explainer,
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
        "weight_bytes": options.weight_bytes or graph.weight_bytes,
    }


def _identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in KEY)


# -- planning -----------------------------------------------------------------------------


def _plan(graph: OpGraph, options: Options, record: Record) -> Record:
    """Plan one point, in a worker; an error becomes part of the record."""
    started = time.perf_counter()
    try:
        plan = plan_graph(graph, options)
        section = Section(plan)
        stopped = dict.fromkeys(stage.stopped for stage in plan.stages if stage.stopped)
        figures: Record = {
            "dram_bytes": plan.dram_bytes,
            "feature_bytes": plan.feature_bytes,
            "unfused_bytes": section.unfused.total,
            "unfusable_bytes": sum(dram.total for dram in section.unfusable.values()),
            "lower_bound_bytes": plan.lower_bound_bytes,
            "proof": plan.proof,
            "groups": len(plan.groups),
            "unfusable": len(plan.unfusable),
            "max_buffer_bytes": plan.max_buffer_bytes,
            "stopped": ", ".join(stopped),
            "seconds": time.perf_counter() - started,
        }
    except Exception as error:  # one point must not cost the others
        log.debug("%s failed", _title(record), exc_info=True)
        return {**record, "error": _told(error)}
    if "interrupted" in stopped:
        # The search kept its best plan; a sweep that is stopped does not keep half a point.
        raise KeyboardInterrupt
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


# -- the file of finished points ----------------------------------------------------------


class _Journal:
    """A file of JSON lines, one per finished point; later lines replace earlier ones.

    Attributes:
        records: what was finished before, without errors, by what was asked for.

    Raises:
        GetfuseError: where the file holds something else.
        OSError: where it cannot be read or written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.records: dict[tuple[Any, ...], Record] = {}
        # Bytes, so that a character cut in two is as good as any other damage.
        data = self.path.read_bytes() if self.path.exists() else b""
        lines = data.splitlines(keepends=True)
        whole = 0
        for number, line in enumerate(lines, 1):
            record = _parsed(line)
            if record is None and number == len(lines) and (number > 1 or line.startswith(b"{")):
                log.warning(
                    "%s: line %d is cut off, as by a kill; that point is planned again",
                    self.path,
                    number,
                )
                break
            if record is None:
                raise GetfuseError(
                    f"line {number} of {str(self.path)!r} is no point of a sweep; name another file"
                )
            whole += len(line)
            if record["error"] is None:
                self.records[_identity(record)] = record
        self._file = self.path.open("ab")
        if whole < len(data):
            self._file.truncate(whole)
        elif data and not data.endswith(b"\n"):
            self._file.write(b"\n")

    def append(self, record: Record) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and all(name in record for name in _COLUMNS)
    return record if whole else None


# -- forms --------------------------------------------------------------------------------

_HEADERS = (
    "model",
    "scheme",
    "method",
    "buffer",
    "unfused",
    "planned",
    "saved",
    "groups",
    "largest",
    "unfusable",
    "seconds",
    "proof",
)


def _row(record: Record) -> list[str]:
    dram, unfused, bound = (
        record[name] for name in ("dram_bytes", "unfused_bytes", "lower_bound_bytes")
    )
    if record["proof"] == "optimal":
        proof = "optimal"
    else:
        proof = f"at most {dram / bound - 1:.1%} above" if bound else "none"
    if record["stopped"]:
        proof += f" ({record['stopped']})"
    alone = f"{record['unfusable']}: {format_size(record['unfusable_bytes'])}"
    return [
        record["model"],
        _scheme(record),
        record["method"],
        format_size(record["buffer_bytes"]),
        format_size(unfused),
        format_size(dram),
        f"{(unfused - dram) / unfused:.1%}" if unfused else "0.0%",
        str(record["groups"]),
        format_size(record["max_buffer_bytes"]),
        alone if record["unfusable"] else "none",
        f"{record['seconds']:.2f}",
        proof,
    ]


def _scheme(record: Record) -> str:
    lbdf = record["scheme"] == "lbdf"
    return f"lbdf {record['granularity']}" if lbdf else str(record["scheme"])


def _label(record: Record) -> str:
    return f"{record['model']}, {_scheme(record)}, {record['method']}"


def _title(record: Record) -> str:
    return f"{_label(record)}, {format_size(record['buffer_bytes'])}"


def _text(form: Callable[[Sweep], str]) -> Callable[[Sweep, Path], None]:
    def write(result: Sweep, path: Path) -> None:
        path.write_text(form(result), encoding="utf-8")

    return write


def _picture(result: Sweep, path: Path) -> None:
    figure = result.plot()
    from matplotlib import rc_context

    svg = path.suffix.lower() == ".svg"
    # Without a date and random names the same sweep gives the same file.
    with rc_context({"svg.hashsalt": "torch-getfuse"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if svg else None)


_FORMS: Mapping[str, Callable[[Sweep, Path], None]] = {
    ".txt": _text(lambda result: f"{result}\n"),
    ".json": _text(lambda result: result.to_json() + "\n"),
    ".jsonl": _text(Sweep.to_jsonl),
    ".csv": _text(Sweep.to_csv),
    ".svg": _picture,
    ".png": _picture,
}


def _form(path: str | Path) -> Callable[[Sweep, Path], None]:
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMS:
        raise OptionError(
            f"cannot save a sweep as {str(path)!r}: the suffix must be one of "
            f"{', '.join(_FORMS)}{nearest(suffix, _FORMS) if suffix else ''}"
        )
    return _FORMS[suffix]
