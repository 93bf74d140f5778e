"""Plans that were made before, in memory and on disk, by fingerprint and options.

A graph is compiled again and again: in every process, after ``torch._dynamo.reset()``, for each
of several equal parts of a model. Files are written under another name and moved into place, so
that processes may share a folder; a file that is no legal plan is dropped with a warning.
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
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from torch_getfuse.errors import GetfuseError
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options
from torch_getfuse.partition.cost import weights_of
from torch_getfuse.partition.plan import PartitionPlan, load_plan
from torch_getfuse.partition.split import SET_LIMIT

log = logging.getLogger(__name__)

_KEPT = 256
_MATTERS = (
    "buffer", "scheme", "granularity", "method", "explainer", "split_rule", "budget", "seed",
    "time_limit",
)  # fmt: skip
"""Options that change which plan is found; widths are added as the graph resolves them."""

_memory: OrderedDict[str, PartitionPlan] = OrderedDict()
_lock = threading.Lock()
_warned: set[str] = set()


def default_folder() -> Path:
    """The user's cache folder: ``LOCALAPPDATA``, ``XDG_CACHE_HOME``, or the platform's default."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "torch_getfuse"


def cache_key(graph: OpGraph, options: Options) -> str:
    """SHA-256 of everything that a plan depends on, this package's code included."""
    form = {
        "graph": graph.fingerprint,
        "code": code_digest(),
        "activation_bytes": options.activation_bytes or graph.activation_bytes,
        "weight_bytes": options.weight_bytes or graph.weight_width,
        "weights": weights_of(graph, options.weight_bytes),
        **{name: getattr(options, name) for name in _MATTERS},
    }
    return hashlib.sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()


def find_plan(graph: OpGraph, options: Options) -> PartitionPlan | None:
    """A plan made before for an equal graph and equal options."""
    if options.cache is False:
        return None
    key = cache_key(graph, options)
    with _lock:
        found = _memory.get(key)
        if found is not None:
            _memory.move_to_end(key)
            return found
    path = _path(key, options)
    try:
        if not path.is_file():
            return None
        plan = load_plan(path)
        plan.check_graph(graph)
        plan.verify()
    except GetfuseError as error:
        _drop(path, str(error))
        return None
    except OSError as error:
        _warn(f"cannot read the plan cache {str(path.parent)!r}: {error}")
        return None
    log.info("plan from the cache: %s", path)
    _keep(key, plan)
    return plan


def store_plan(plan: PartitionPlan, graph: OpGraph, options: Options) -> None:
    """Keep a plan; on disk only where no stage ran out of time, for that is the machine's doing.

    A folder that cannot be written is warned of once; planning goes on without it.
    """
    if options.cache is False:
        return
    key = cache_key(graph, options)
    _keep(key, plan)
    if any(stage.stopped not in ("", SET_LIMIT) for stage in plan.stages):
        return
    path = _path(key, options)
    try:
        write_whole(path, plan.save)
    except OSError as error:
        _warn(f"cannot write the plan cache {str(path.parent)!r}: {error}")


def write_whole(path: Path, save: Callable[[str], object]) -> None:
    """Write a file of a cache under another name and move it into place; nothing else is left.

    Args:
        path: of the file; its folder is made.
        save: writes to the path that it is given.

    Raises:
        OSError: where the folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-", suffix=".json")
    os.close(handle)
    try:
        save(name)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


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


def _path(key: str, options: Options) -> Path:
    folder = default_folder() if isinstance(options.cache, bool) else Path(options.cache)
    return folder / f"{key}.json"


def _drop(path: Path, reason: str) -> None:
    _warn(f"dropped a damaged entry of the plan cache: {reason}")
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.info("cannot remove %s: %s", path, error)


def _warn(what: str) -> None:
    if what not in _warned:
        _warned.add(what)
        warnings.warn(f"torch_getfuse: {what}; plans are made anew", stacklevel=3)


@functools.cache
def code_digest() -> str:
    """A digest of this package: another version, or an edited one, may plan otherwise."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted((*root.rglob("*.py"), *root.rglob("*.safetensors"))):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
