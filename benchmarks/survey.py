"""Public vision networks: compiled, planned, verified, counted, exported, each beside eager.

    python -m benchmarks.survey [--only PATTERN ...] [--jobs N] [--limit SECONDS] [--redo]
                                [--memory GB] [--list] [--table FILE]

Every classification, segmentation, video and optical-flow model of torchvision, the smallest model
of each family (module) of timm, and an image classifier of each model type of transformers, all
with random weights and their usual input. For each, in a process of its own with a time limit:

- compiled by ``torch.compile(backend="getfuse", options={"inner": "eager", "strict": True})`` and
  compared with eager, bit for bit;
- planned at 64 KB, 256 KB and 1 MB under lbdf, brr and cascade, one byte per element, within the
  default time limit (10 s of CPU time); every plan verified; seconds of CPU beside those of
  ``torch.export``'s second trace in the same process;
- counted (``run_counted``) under lbdf and cascade at 256 KB, and split at 256 KB.

A line of JSON per model is appended to ``runs/survey.jsonl``; stopped and started again it goes on
where it was, ``--redo`` runs again what failed. ``--table docs/survey.md`` writes the page.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from joblib import Parallel, delayed
from tabulate import tabulate

from benchmarks.json_lines import rows_in

ROOT = Path(__file__).resolve().parents[1]
SCHEMES = ("lbdf", "brr", "cascade")
BUFFERS_KB = (64, 256, 1024)
COUNTED = (("lbdf", 256), ("cascade", 256))
Row = dict[str, Any]

_VIDEO = (1, 3, 16, 112, 112)
_FLOW = (1, 3, 128, 128)
_NOT_SURVEYED = {
    "detection": "needs torchvision's compiled operators, which the CPU build of torch here lacks",
    "quantization": "has a survey of its own: benchmarks of quantised networks",
}


# -- what is surveyed ------------------------------------------------------------------------------


def torchvision_models() -> Iterator[str]:
    """Names of all models, but for those of :data:`_NOT_SURVEYED`."""
    from torch_getfuse.models import import_torchvision

    models = import_torchvision().models
    for name in models.list_models():
        parts = models.get_model_builder(name).__module__.split(".")
        if not set(parts) & set(_NOT_SURVEYED):
            yield f"torchvision:{name}"


def timm_models() -> Iterator[str]:
    """The smallest model of each module, by its parameters on the meta device."""
    import torch

    from torch_getfuse.models import import_torchvision

    import_torchvision()
    import timm

    kept = ROOT / "runs" / "survey-timm.json"
    if not kept.exists():
        smallest = {}
        for family in timm.list_modules():
            sizes = {}
            for name in timm.list_models(module=family):
                try:
                    with torch.device("meta"):
                        model = timm.create_model(name)
                except Exception as error:  # some cannot be made on the meta device
                    print(f"timm:{name} is left out of its family's choice: {error}")
                    continue
                sizes[name] = sum(p.numel() for p in model.parameters())
            if sizes:
                smallest[family] = min(sizes, key=lambda name: (sizes[name], name))
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(smallest, indent=1), encoding="utf-8")
    found = json.loads(kept.read_text(encoding="utf-8"))
    yield from (f"timm:{name}" for name in dict.fromkeys(found.values()))


def transformers_models() -> Iterator[str]:
    """An image classifier of each model type."""
    from torch_getfuse.models import import_torchvision

    import_torchvision()
    from transformers.models.auto import modeling_auto

    for kind in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        yield f"transformers:{kind}"


LIBRARIES: Mapping[str, Callable[[], Iterator[str]]] = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": transformers_models,
}


# -- one model -------------------------------------------------------------------------------------


def measure(spec: str, tell: Callable[[Row], object] = lambda row: None) -> Row:
    """Everything about one model, in this process; ``tell`` has the row after each step."""
    import torch

    from torch_getfuse.models import ModelError, calibrate_batch_norm, load_model

    torch.set_num_threads(1)
    row: Row = {"model": spec, "torch": torch.__version__}
    model = load_model(spec)
    assert isinstance(model, torch.nn.Module)
    torch.manual_seed(0)
    inputs = tuple(torch.randn(2, *shape[1:]) for shape in _shapes(spec, model))
    try:
        calibrate_batch_norm(model, *inputs[:1]) if len(inputs) == 1 else None
    except ModelError as error:
        row["calibration"] = str(error)
    inputs = tuple(value[:1].contiguous() for value in inputs)
    with torch.no_grad():
        expected = model(*inputs)
    row["export_seconds"] = _export(model, inputs)
    row["compiled"] = _step(lambda: _compiled(model, inputs, expected))
    row["plans"] = {}
    tell(row)
    graph = _captured(model, inputs, row)
    if graph is None:
        return row
    for scheme in SCHEMES:
        for buffer in BUFFERS_KB:
            key = f"{scheme} {buffer}"
            row["plans"][key] = _step(lambda s=scheme, b=buffer: _planned(graph, s, b))
            tell(row)
    row["split"] = _step(lambda: _split(model, inputs, expected))
    row["counted"] = {}
    for scheme, buffer in COUNTED:
        tell(row)
        key = f"{scheme} {buffer}"
        row["counted"][key] = _step(lambda s=scheme, b=buffer: _counted(model, inputs, s, b))
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


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
        took = time.process_time() - started
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
        "seconds": time.process_time() - started,
    }


def _captured(model: Any, inputs: tuple[Any, ...], row: Row) -> Any:
    from torch_getfuse.backend.capture.capture import capture_model

    started = time.process_time()
    try:
        captured = capture_model(model, inputs)
    except Exception as error:
        row["capture"] = f"{type(error).__name__}: {error}"[:500]
        return None
    row["capture_seconds"] = time.process_time() - started
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
    took = time.process_time() - started
    plan.verify()
    return {
        "seconds": took,
        "groups": len(plan.groups),
        "unfusable": len(plan.unfusable),
        "dram_bytes": plan.dram_bytes,
        "proof": plan.proof,
        "gap": plan.gap if plan.lower_bound_bytes else None,
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


# -- all of them -----------------------------------------------------------------------------------


def in_a_process(spec: str, limit: float, memory_gb: float) -> Row:
    """The row of a model; ``status`` is measured, failed, time or memory.

    A child prints its row after each step, so that what it measured before a limit is kept.
    """
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.survey", "--one", spec]
    command += ["--memory", str(memory_gb)]
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        printed, told = child.communicate(timeout=limit)
        status, error = ("measured", "") if child.returncode == 0 else ("failed", told[-1000:])
    except subprocess.TimeoutExpired:
        child.kill()
        printed, told = child.communicate()
        status, error = "time", f"stopped after {limit:g} s"
    if child.returncode < 0 and status == "failed":
        error = f"{error}\nkilled by signal {-child.returncode}".strip()
    if "MemoryError" in error or "can't allocate memory" in error:
        status, error = "memory", f"more than {memory_gb:g} GB"
    # The last line may be cut off.
    lines = [line for line in printed.splitlines() if line.startswith("{") and line.endswith("}")]
    row: Row = {"model": spec, "commit": _commit(), **(json.loads(lines[-1]) if lines else {})}
    row.update(status=status, wall_seconds=round(time.perf_counter() - started, 1))
    return row if not error else {**row, "error": error.strip() or "no message"}


def _commit() -> str:
    """The commit that is measured, with ``+`` where files differ from it."""
    asked = ["git", "describe", "--always", "--abbrev=10", "--dirty=+"]
    found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "no git"


def read(path: Path) -> dict[str, Row]:
    """The last line of each model; a line that was cut off is left out."""
    return {row["model"]: row for row in rows_in(path)}


# -- the page --------------------------------------------------------------------------------------


def cell(plan: Row) -> str:
    """``=`` for a proved optimum, else how far it can be from it at most."""
    if plan["status"] != "done":
        return "failed"
    if plan["proof"] == "optimal":
        return "="
    return "?" if plan["gap"] is None else f"{100 * plan['gap']:.1f} %"


def rows_of(found: Mapping[str, Row]) -> list[list[str]]:
    """A row per model: what it is, whether it equals eager, a cell per scheme and buffer."""
    rows = []
    for spec in sorted(found):
        row = found[spec]
        if row["status"] != "measured":
            error = row.get("error", "out of time").strip().splitlines()[-1]
            rows.append([spec, row["status"], *[""] * (len(SCHEMES) * len(BUFFERS_KB) + 2), error])
            continue
        plans = [row["plans"].get(f"{s} {b}") for s in SCHEMES for b in BUFFERS_KB]
        compiled = row["compiled"]
        equal = "=" if compiled.get("equal") else compiled.get("error", "differs")[:60]
        export = row.get("export_seconds")
        slowest = max((p["seconds"] for p in plans if p and "seconds" in p), default=math.nan)
        rows.append(
            [
                spec,
                str(row.get("operators", "-")),
                equal,
                *("-" if plan is None else cell(plan) for plan in plans),
                "-" if not export else f"{slowest / export:.2f}",
                "; ".join(_remarks(row)),
            ]
        )
    return rows


def _remarks(row: Row) -> Iterator[str]:
    if "capture" in row:
        yield f"not captured: {row['capture'][:100]}"
    for key, counted in row.get("counted", {}).items():
        if counted["status"] != "done":
            yield f"counted {key}: {counted['error'][:80]}"
        elif counted["agree"] < counted["by_rows"]:
            yield f"counted {key}: {counted['by_rows'] - counted['agree']} groups differ"
        elif counted["by_rows"] < counted["groups"]:
            yield f"{key}: {counted['groups'] - counted['by_rows']} groups not by rows"
    split = row.get("split", {})
    if split.get("status") == "failed":
        yield f"split: {split['error'][:80]}"
    elif split and not split.get("equal"):
        yield "split differs"


def summary(found: Mapping[str, Row]) -> list[str]:
    """What holds of all that was measured."""
    measured = [row for row in found.values() if row["status"] == "measured"]
    equal = sum(bool(row["compiled"].get("equal")) for row in measured)
    lines = [
        f"{len(measured)} models measured; {equal} of them compiled and equal to eager to the last "
        "bit."
    ]
    left = [row for row in found.values() if row["status"] != "measured"]
    lines += [f"{row['model']}: {row['status']}." for row in left]
    for library, models in LIBRARIES.items():
        names = [name for name in found if name.startswith(f"{library}:")]
        if names:
            lines.append(f"{library}: {len(names)} of {len(list(models()))} models were run.")
    counted = [
        run
        for row in measured
        for run in row.get("counted", {}).values()
        if run["status"] == "done"
    ]
    if counted:
        lines.append(
            f"Counted runs: {sum(run['agree'] for run in counted):,} of "
            f"{sum(run['by_rows'] for run in counted):,} groups that ran row by row moved "
            "exactly what was planned; "
            f"{sum(run['groups'] - run['by_rows'] for run in counted)} more ran as FX nodes."
        )
    split = [row["split"] for row in measured if row.get("split", {}).get("status") == "done"]
    if split:
        same = sum(made["equal"] for made in split)
        lines.append(f"Split at 256 KB: {same} of {len(split)} equal to eager to the last bit.")
    refused = [row["model"] for row in measured if row.get("split", {}).get("status") == "failed"]
    if refused:
        lines.append(f"Not split, for the reason in their rows: {', '.join(refused)}.")
    for scheme in SCHEMES:
        for buffer in BUFFERS_KB:
            plans = [row["plans"].get(f"{scheme} {buffer}") for row in measured]
            done = [plan for plan in plans if plan and plan["status"] == "done"]
            if not done:
                continue
            proved = sum(plan["proof"] == "optimal" for plan in done)
            gaps = [plan["gap"] for plan in done if plan["proof"] != "optimal"]
            worst = [gap for gap in gaps if gap is not None]
            near = sum(gap <= 0.05 for gap in worst)
            rest = f"; of the rest {near} at most 5 % above their bound" if worst else ""
            rest += f", the worst {max(worst):.0%}" if len(worst) > near else ""
            unknown = (
                f"; {len(gaps) - len(worst)} without a bound" if len(gaps) > len(worst) else ""
            )
            lines.append(
                f"{scheme} at {buffer} KB: {proved} of {len(done)} proved "
                f"({proved / len(done):.1%}){rest}{unknown}."
            )
    for scheme in SCHEMES:
        ratios = [
            plan["seconds"] / row["export_seconds"]
            for row in measured
            if row.get("export_seconds")
            for key, plan in row["plans"].items()
            if plan["status"] == "done" and key.startswith(f"{scheme} ")
        ]
        if ratios:
            within = sum(ratio <= 1 for ratio in ratios)
            lines.append(
                f"Planning under {scheme} took at most torch.export's CPU time in {within} of "
                f"{len(ratios)} ({within / len(ratios):.1%}); the median ratio is "
                f"{median(ratios):.2f}."
            )
    return lines


def page(found: Mapping[str, Row]) -> str:
    """docs/survey.md."""
    heads = [f"{scheme} {buffer}" for scheme in SCHEMES for buffer in BUFFERS_KB]
    headers = ["model", "operators", "eager", *heads, "plan / export", "remarks"]
    versions = sorted({row["torch"] for row in found.values() if "torch" in row})
    commits = sorted({row["commit"] for row in found.values() if "commit" in row})
    return "\n".join(
        [
            "# Survey of public networks",
            "",
            "Written by `python -m benchmarks.survey --table docs/survey.md` from what it "
            f"measured (torch {', '.join(versions)}; commits {', '.join(commits)}; one thread). "
            "Plans are for one byte per element and end within the default time limit, 10 s of "
            "CPU time; buffers in KB. `=` in a column of plans is a proved optimum, a percentage "
            "how far the plan can be above the optimum at most; `=` under eager says that the "
            "compiled model gives eager's result to the last bit. plan / export: CPU seconds of "
            "the slowest of the nine plans beside those of torch.export's second trace, in one "
            "process.",
            "",
            *(f"- {line}" for line in summary(found)),
            *(f"- Not surveyed: torchvision's {k}: {why}." for k, why in _NOT_SURVEYED.items()),
            "",
            tabulate(rows_of(found), headers=headers, tablefmt="pipe", disable_numparse=True),
            "",
        ]
    )


def chosen(patterns: Sequence[str]) -> list[str]:
    """Models in the order of the libraries; ``patterns`` as in file names, or all."""
    wanted = [pattern.partition(":")[0] for pattern in patterns] or ["*"]
    libraries = [name for name in LIBRARIES if any(fnmatch.fnmatch(name, w) for w in wanted)]
    specs = [spec for library in libraries for spec in LIBRARIES[library]()]
    if not patterns:
        return specs
    return [spec for spec in specs if any(fnmatch.fnmatch(spec, p) for p in patterns)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="as torchvision:*")
    parser.add_argument("--path", type=Path, default=ROOT / "runs" / "survey.jsonl")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one (default 1800)")
    parser.add_argument("--memory", type=float, default=16, help="GB for one (default 16)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument("--redo", action="store_true", help="run again what failed or timed out")
    parser.add_argument("--list", action="store_true", help="only print the models")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the page, run nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a child of this very file
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: at least one process is needed")
    if args.one:
        most = int(args.memory * (1 << 30))
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        print(json.dumps(measure(args.one, lambda row: print(json.dumps(row), flush=True))))
        return 0
    found = read(args.path)
    if args.table:
        args.table.write_text(page(found), encoding="utf-8")
        print("\n".join(summary(found)))
        return 0
    specs = chosen(args.only)
    if args.list:
        print("\n".join(specs))
        return 0
    todo = [
        spec for spec in specs
        if spec not in found or (args.redo and found[spec]["status"] != "measured")
    ]  # fmt: skip
    args.path.parent.mkdir(parents=True, exist_ok=True)
    run = Parallel(args.jobs, backend="threading", return_as="generator_unordered")
    for k, row in enumerate(
        run(delayed(in_a_process)(spec, args.limit, args.memory) for spec in todo)
    ):
        found[row["model"]] = row
        with args.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{k + 1}/{len(todo)} {row['model']}: {row['status']} in {row['wall_seconds']} s",
              flush=True)  # fmt: skip
    print("\n".join(summary({spec: row for spec, row in found.items() if spec in set(specs)})))
    return 0 if all(found[spec]["status"] == "measured" for spec in specs) else 1


if __name__ == "__main__":
    sys.exit(main())
