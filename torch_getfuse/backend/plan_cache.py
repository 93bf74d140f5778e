"""Plans that were made before, in memory and on disk, by fingerprint and options.

A graph is compiled again and again: in every process, after ``torch._dynamo.reset()``, for each
of several equal parts of a model. Files are written under another name and moved into place, so
that processes may share a folder; a file that is no legal plan of what is asked for is dropped with
a warning. A file is not believed where it speaks of a bound: such a plan says so (``claimed_by``).
A folder that cannot be used is warned of once, and planning goes on without it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import sys
import tempfile
import threading
import time
import warnings
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

from torch_getfuse import plugins
from torch_getfuse.atomic_files import PART_PREFIX, replace_text
from torch_getfuse.errors import GetfuseError, PlanError
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options
from torch_getfuse.partition.cost.registry import effective_granularity
from torch_getfuse.partition.cost.scheme import weights_of
from torch_getfuse.partition.plan import PartitionPlan, load_plan
from torch_getfuse.partition.work import by_machine
from torch_getfuse.widths import Width

log = logging.getLogger(__name__)

_KEPT = 256
_STALE = 3600.0
"""Seconds after which a file that is still being written is one that a killed process left."""
_MATTERS = (
    "buffer", "granularity", "residency", "slice_channels", "keep", "split_before", "together",
    "split_rule", "budget", "seed", "time_limit",
)  # fmt: skip
"""Options that change which plan is found; widths are added as the graph resolves them, and what
goes by name as what it stands for."""

_memory: OrderedDict[str, PartitionPlan] = OrderedDict()
_lock = threading.Lock()
_warned: set[str] = set()


def default_folder() -> Path:
    """The user's cache folder: ``LOCALAPPDATA``, ``XDG_CACHE_HOME``, or the platform's default.

    For a user without a home, a folder among the temporary files.
    """
    variable = {"win32": "LOCALAPPDATA", "darwin": ""}.get(sys.platform, "XDG_CACHE_HOME")
    inside = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
    if base := os.environ.get(variable):
        return Path(base) / "torch_getfuse"
    try:
        return Path.home() / inside / "torch_getfuse"
    except RuntimeError as error:
        folder = Path(tempfile.gettempdir()) / "torch_getfuse"
        _warn(folder, f"{error}; the cache is in {str(folder)!r}")
        return folder


def cache_key(graph: OpGraph, options: Options) -> str | None:
    """SHA-256 of everything that a plan depends on, this package's code included.

    Names of other packages' cost models, searches and explainers stand for their code too. ``None``
    where one was given as an object: nobody can tell when that has changed.
    """
    if options.objects:
        return None
    form = {
        "graph": graph.fingerprint,
        "code": code_digest(),
        **_widths(graph, options),
        "tensors": list(
            graph.stored_as(options.activation_bytes, options.align_channels).tensor_bytes.values()
        ),
        "weights": weights_of(graph, options.weight_bytes),
        "macs": [op.macs for op in graph],
        **{name: getattr(options, name) for name in _MATTERS},
        **{
            registry.option: registry.identity(getattr(options, registry.option))
            for registry in (plugins.SCHEMES, plugins.SEARCHES, plugins.EXPLAINERS)
        },
    }
    return hashlib.sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()


def find_plan(graph: OpGraph, options: Options) -> PartitionPlan | None:
    """A plan made before for an equal graph and equal options."""
    if options.cache is False:
        return None
    folder = folder_of(options.cache)
    key = _key(graph, options, folder)
    if key is None:
        return None
    with _lock:
        found = _memory.get(key)
        if found is not None:
            _memory.move_to_end(key)
            return found
    path = folder / f"{key}.json"
    try:
        if not path.is_file():
            return None
        plan = replace(load_plan(path), claimed_by="the plan cache")
        _check_asked(plan, graph, options)
        plan.verify()
    except GetfuseError as error:
        _drop(path, str(error))
        return None
    except OSError as error:
        _warn(folder, f"cannot read the plan cache {str(folder)!r}: {error}")
        return None
    log.info("plan from the cache: %s", path)
    _keep(key, plan)
    return plan


def store_plan(plan: PartitionPlan, graph: OpGraph, options: Options) -> None:
    """Keep a plan; on disk only where no stage was ended by the clock, the machine's doing.

    A folder that cannot be written is warned of once; planning goes on without it.
    """
    if options.cache is False:
        return
    folder = folder_of(options.cache)
    key = _key(graph, options, folder)
    if key is None:
        return
    _keep(key, plan)
    if any(by_machine(stage.stopped) for stage in plan.stages):
        return
    try:
        write_whole(folder / f"{key}.json", plan.to_json())
    except OSError as error:
        _warn(folder, f"cannot write the plan cache {str(folder)!r}: {error}")


def write_whole(path: Path, text: str) -> None:
    """Write a file of a cache whole; what killed processes left in its folder goes.

    Args:
        path: of the file; its folder is made.
        text: what it is to hold.

    Raises:
        OSError: where the folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _tidy(path.parent)
    if path.exists() and not path.is_file():
        raise OSError(f"{str(path)!r} is no regular file")  # writing to a pipe would wait
    replace_text(path, text)


@functools.cache
def _tidy(folder: Path) -> None:
    """Remove what killed processes were writing; once per folder and process."""
    for left in folder.glob(f"{PART_PREFIX}*"):
        try:
            if time.time() - left.stat().st_mtime > _STALE:
                left.unlink()
        except OSError as error:  # another process was quicker, or it belongs to another user
            log.info("cannot remove %s: %s", left, error)


def folder_of(cache: bool | str | Path) -> Path:
    """The folder that the option ``cache`` names; ``~`` is the user's home."""
    return default_folder() if isinstance(cache, bool) else Path(os.path.expanduser(cache))


def clear_memory() -> None:
    """Forget the plans in memory; those on disk stay."""
    with _lock:
        _memory.clear()


def _keep(key: str, plan: PartitionPlan) -> None:
    with _lock:
        _memory[key] = plan
        _memory.move_to_end(key)
        while len(_memory) > _KEPT:
            _memory.popitem(last=False)


def _key(graph: OpGraph, options: Options, folder: Path) -> str | None:
    try:
        return cache_key(graph, options)
    except OSError as error:  # the package's own files cannot be read
        _warn(folder, f"the plan cache is not used: {error}")
        return None


def _check_asked(plan: PartitionPlan, graph: OpGraph, options: Options) -> None:
    """A file is found by its name alone, which says nothing of what is in it.

    Raises:
        PlanError: where the plan is one for something else.
    """
    plan.check_graph(graph)
    asked = {
        "buffer_bytes": options.buffer_bytes,
        "scheme": options.scheme,
        "granularity": effective_granularity(options.scheme, options.granularity),
        **_widths(graph, options),
        "keep": options.keep,
        "split_before": options.split_before,
        "together": options.together,
    }
    if any(group.way for group in plan.groups):
        asked |= {"residency": options.residency, "slice_channels": options.slice_channels}
    for name, value in asked.items():
        if getattr(plan, name) != value:
            raise PlanError(f"its {name} is {getattr(plan, name)!r}, asked for is {value!r}")


def _widths(graph: OpGraph, options: Options) -> dict[str, Width | int | None]:
    """How a plan stores tensors and weights, by its attributes."""
    stored = graph.stored_as(options.activation_bytes, options.align_channels)
    weight_bytes = options.weight_bytes
    return {
        "activation_bytes": stored.activation_width,
        "align_channels": stored.align_channels,
        "weight_bytes": graph.weight_width if weight_bytes is None else weight_bytes,
    }


def _drop(path: Path, reason: str) -> None:
    _warn(path, f"dropped a damaged entry of the plan cache: {reason}")
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.info("cannot remove %s: %s", path, error)


def _warn(about: Path, what: str) -> None:
    """One warning per file or folder: a folder that cannot be read cannot be written either."""
    if str(about) not in _warned:
        _warned.add(str(about))
        warnings.warn(f"torch_getfuse: {what}; plans are made anew", stacklevel=3)


@functools.cache
def code_digest() -> str:
    """A digest of this package: another version, or an edited one, may plan otherwise."""
    return plugins.source_digest(Path(__file__).resolve().parents[1])
