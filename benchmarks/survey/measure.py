"""What the survey measures of one model."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

SCHEMES = ("lbdf", "brr", "cascade")
BUFFERS_KB = (64, 256, 1024)
COUNTED = (("lbdf", 256), ("cascade", 256))
Row = dict[str, Any]

_VIDEO = (1, 3, 16, 112, 112)
_FLOW = (1, 3, 128, 128)


def measure(spec: str, tell: Callable[[Row], object] = lambda row: None) -> Row:
    """Everything about one model, in this process; ``tell`` has the row after each step."""
    import torch

    row: Row = {"model": spec, "torch": torch.__version__}
    model, inputs = prepared(spec, row)
    with torch.no_grad():
        expected = model(*inputs)
    row["export_seconds"] = _export(model, inputs)
    row["compiled"] = _step(lambda: _compiled(model, inputs, expected))
    tell(row)
    if not _all_planned(model, inputs, row, SCHEMES, tell):
        return row
    row["split"] = _step(lambda: _split(model, inputs, expected))
    row["counted"] = {}
    for scheme, buffer in COUNTED:
        tell(row)
        key = f"{scheme} {buffer}"
        row["counted"][key] = _step(lambda s=scheme, b=buffer: _counted(model, inputs, s, b))
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def plan_again(spec: str, scheme: str) -> Row:
    """The plans of one model under one cost model, and nothing else, in this process."""
    row: Row = {"model": spec}
    model, inputs = prepared(spec, row)
    row["export_seconds"] = _export(model, inputs)
    _all_planned(model, inputs, row, [scheme], lambda row: None)
    return row


def prepared(spec: str, row: Row) -> tuple[Any, tuple[Any, ...]]:
    """A model with its usual input, its batch norm calibrated where it has one input.

    ``row``: told where calibration fails.
    """
    import torch

    from torch_getfuse.models import ModelError, calibrate_batch_norm, load_model

    torch.set_num_threads(1)
    model = load_model(spec)
    assert isinstance(model, torch.nn.Module)
    torch.manual_seed(0)
    inputs = tuple(torch.randn(2, *shape[1:]) for shape in _shapes(spec, model))
    try:
        calibrate_batch_norm(model, *inputs[:1]) if len(inputs) == 1 else None
    except ModelError as error:
        row["calibration"] = str(error)
    return model, tuple(value[:1].contiguous() for value in inputs)


def _all_planned(
    model: Any,
    inputs: tuple[Any, ...],
    row: Row,
    schemes: Sequence[str],
    tell: Callable[[Row], object],
) -> bool:
    """Add the plans to a row, each with torch.export's seconds; whether there is a graph."""
    row["plans"] = {}
    graph = _captured(model, inputs, row)
    for scheme in schemes if graph is not None else ():
        for buffer in BUFFERS_KB:
            found = _step(lambda s=scheme, b=buffer: _planned(graph, s, b))
            row["plans"][f"{scheme} {buffer}"] = {**found, "export_seconds": row["export_seconds"]}
            tell(row)
    return graph is not None


def _shapes(spec: str, model: Any) -> list[tuple[int, ...]]:
    from torch_getfuse.models import default_input

    module = type(model).__module__
    if ".video." in module:
        side = 224 if any(name in module for name in ("mvit", "s3d")) else 112
        return [(*_VIDEO[:3], side, side)]
    if ".optical_flow." in module:
        return [_FLOW, _FLOW]
    return [default_input(spec)]


def _step(run: Callable[[], Row]) -> Row:
    """What a step found, or why it failed; the others go on."""
    try:
        return {"status": "done", **run()}
    except Exception as error:  # whatever a public network raises is a result
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}


def _export(model: Any, inputs: tuple[Any, ...]) -> float | None:
    """CPU seconds of the second export; ``None`` where torch.export cannot trace the model."""
    import torch

    took = None
    for _ in range(2):
        started = time.process_time()
        try:
            torch.export.export(model, inputs)
        except Exception:  # its own failures are not ours to tell
            return None
        took = round(time.process_time() - started, 4)
    return took


def _leaves(value: Any) -> list[Any]:
    """The tensors of a result, of whatever class the library gives it."""
    import torch
    from torch.utils._pytree import tree_leaves

    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _compiled(model: Any, inputs: tuple[Any, ...], expected: Any) -> Row:
    import torch

    import torch_getfuse

    options = {"buffer": "256KB", "activation_bytes": 1, "weight_bytes": 1}
    started = time.process_time()
    compiled = torch.compile(
        model, backend="getfuse", options={**options, "inner": "eager", "strict": True}
    )
    with torch.no_grad():
        got = compiled(*inputs)
    pairs = list(zip(_leaves(got), _leaves(expected), strict=True))
    report = torch_getfuse.report(compiled)
    return {
        "equal": all(torch.equal(one, other) for one, other in pairs),
        "graphs": len(report.sections),
        "unplanned": len(report.unplanned),
        "seconds": round(time.process_time() - started, 4),
    }


def _captured(model: Any, inputs: tuple[Any, ...], row: Row) -> Any:
    from torch_getfuse.backend.capture.capture import capture_model

    started = time.process_time()
    try:
        captured = capture_model(model, inputs)
    except Exception as error:
        row["capture"] = f"{type(error).__name__}: {error}"[:500]
        return None
    row["capture_seconds"] = round(time.process_time() - started, 4)
    row["operators"] = len(captured.graph)
    row["unsupported"] = dict(captured.unsupported)
    return captured.graph


def _planned(graph: Any, scheme: str, buffer_kb: int) -> Row:
    from torch_getfuse.options import Options
    from torch_getfuse.planner import plan_graph

    options = Options(
        scheme=scheme, buffer=buffer_kb * 1024, activation_bytes=1, weight_bytes=1, cache=False
    )
    started = time.process_time()
    plan = plan_graph(graph, options)
    took = round(time.process_time() - started, 4)
    plan.verify()
    return {
        "seconds": took,
        "groups": len(plan.groups),
        "unfusable": len(plan.unfusable),
        "dram_bytes": plan.dram_bytes,
        "proof": plan.proof,
        "gap": round(plan.gap, 6) if plan.lower_bound_bytes else None,
    }


def _counted(model: Any, inputs: tuple[Any, ...], scheme: str, buffer_kb: int) -> Row:
    import torch_getfuse

    plan = _plan(model, inputs, scheme, buffer_kb)
    _, ledger = torch_getfuse.run_counted(model, inputs, plan)
    fusable = [group for group in ledger.groups if group.way != "unfusable"]
    by_rows = [group for group in fusable if not group.fallback]
    return {
        "groups": len(fusable),
        "by_rows": len(by_rows),
        "agree": sum(group.agrees for group in by_rows),
        "copies": sum(group.counts_agree and not group.agrees for group in by_rows),
    }


def _split(model: Any, inputs: tuple[Any, ...], expected: Any) -> Row:
    import torch

    import torch_getfuse

    plan = _plan(model, inputs, "lbdf", 256)
    with torch.no_grad():  # as the plan was traced
        got = torch_getfuse.split(model, inputs, plan)(*inputs)
    pairs = zip(_leaves(got), _leaves(expected), strict=True)
    return {"equal": all(torch.equal(one, other) for one, other in pairs)}


def _plan(model: Any, inputs: tuple[Any, ...], scheme: str, buffer_kb: int) -> Any:
    import torch_getfuse

    return torch_getfuse.plan(
        model, inputs, scheme=scheme, buffer=buffer_kb * 1024, activation_bytes=1, weight_bytes=1
    )
