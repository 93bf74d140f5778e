"""The same plan on a machine that has nothing else to do and on one that is busy.

    python -m benchmarks.loaded [MODEL ...] [--busy N] [--scheme lbdf brr cascade] [--buffer KB ...]

Each model is captured and planned in a process of its own: once alone, then twice beside ``--busy``
processes (by default twice the processors) that count in a loop. The plans of the three runs must
be equal: groups, bytes, bounds, and where each search ended. A search whose count of steps is not
used up when the clock strikes (20 s of CPU time, twice the default limit) may end elsewhere; such a
plan is counted apart. The table also says what a step takes when a model is alone, in
microseconds of CPU time, of the plan in which it takes least and of the one in which it takes most.
Exits with 1 where a plan differs though no clock has struck, or a model cannot be planned.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tabulate import tabulate

from torch_getfuse.errors import GetfuseError

ROOT = Path(__file__).parents[1]
MODELS = (
    "torchvision:mobilenet_v2", "torchvision:resnet50", "torchvision:densenet121",
    "torchvision:googlenet", "torchvision:inception_v3", "torchvision:swin_t",
    "timm:crossvit_9_240", "timm:ghostnetv3_050",
)  # fmt: skip
SCHEMES = ("lbdf", "brr", "cascade")
BUFFERS_KB = (64, 256, 1024)


def planned(spec: str, schemes: Sequence[str], buffers_kb: Sequence[int]) -> dict[str, Any]:
    """Digests of a model's plans by scheme and buffer, in this process."""
    from benchmarks.survey.measure import prepared
    from torch_getfuse.backend.capture.capture import capture_model
    from torch_getfuse.options import Options
    from torch_getfuse.partition.work import Work, by_machine
    from torch_getfuse.planner import plan_graph

    model, inputs = prepared(spec, {})
    graph = capture_model(model, inputs).graph
    found = {}
    for scheme in schemes:
        for buffer in buffers_kb:
            options = Options(
                scheme=scheme, buffer=buffer * 1024, activation_bytes=1, weight_bytes=1, cache=False
            )
            started, work = (time.perf_counter(), time.process_time()), Work()
            plan = plan_graph(graph, options, work)
            stages = [(s.method, s.dram_bytes, s.plans, s.stopped) for s in plan.stages]
            text = repr((plan.groups, plan.resident, plan.lower_bound_bytes, stages))
            found[f"{scheme} {buffer}"] = {
                "digest": hashlib.sha256(text.encode()).hexdigest()[:16],
                "clock": any(by_machine(stage.stopped) for stage in plan.stages),
                "wall": time.perf_counter() - started[0],
                "cpu": time.process_time() - started[1],
                "steps": work.steps,
            }
    return found


def in_a_process(spec: str, schemes: Sequence[str], buffers_kb: Sequence[int]) -> dict[str, Any]:
    """:func:`planned` in a process with one thread.

    Raises:
        RuntimeError: with its last words where it fails.
    """
    command = [sys.executable, "-m", "benchmarks.loaded", "--one", spec, "--scheme", *schemes]
    child = subprocess.run(
        [*command, "--buffer", *map(str, buffers_kb)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    if child.returncode:
        raise RuntimeError(f"{spec}: {child.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


@contextmanager
def busy(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many processes that do nothing but count."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield loops
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def differing(runs: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Of plans whose digests differ between runs, those of searches that the clock has ended in
    some run, and the others.
    """
    by_clock, others = [], []
    for key in runs[0]:
        if len({run[key]["digest"] for run in runs}) > 1:
            (by_clock if any(run[key]["clock"] for run in runs) else others).append(key)
    return by_clock, others


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--busy", type=int, default=2 * (os.cpu_count() or 1), metavar="N")
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--buffer", nargs="+", type=int, default=BUFFERS_KB, metavar="KB")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a child of this very file
    args = parser.parse_args()
    if args.busy < 1:
        parser.error(f"--busy {args.busy}: at least one process is needed")
    if args.one:
        try:
            print(json.dumps(planned(args.one, args.scheme, args.buffer)))
        except GetfuseError as error:
            parser.exit(1, f"{error}\n")
        return 0
    rows, failed = [], 0
    for spec in args.models:
        try:
            runs = [in_a_process(spec, args.scheme, args.buffer)]
            with busy(args.busy):
                runs += [in_a_process(spec, args.scheme, args.buffer) for _ in range(2)]
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            rows.append([spec, "not planned", "", "", "", ""])
            failed += 1
            continue
        by_clock, others = differing(runs)
        failed += len(others)
        slower = sum(r["wall"] for r in runs[1].values()) / sum(r["wall"] for r in runs[0].values())
        clock = sum(any(run[key]["clock"] for run in runs) for key in runs[0])
        count = len(runs[0])
        equal = count - len(by_clock) - len(others)
        each = [1e6 * run["cpu"] / run["steps"] for run in runs[0].values()]
        rows.append([spec, f"{equal} of {count}", str(clock), f"{slower:.1f}",
                     f"{min(each):.2f} to {max(each):.2f}",
                     ", ".join(by_clock + others)])  # fmt: skip
        print(f"{spec}: {equal} of {count} equal", file=sys.stderr, flush=True)
    headers = ["model", "equal plans", "clock struck", "wall / alone", "us a step", "differ"]
    print(tabulate(rows, headers, "github", disable_numparse=True))
    print(f"beside {args.busy} busy loops on {os.cpu_count()} processors; {failed} plans differ "
          "though no clock has struck, or were not made")  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
