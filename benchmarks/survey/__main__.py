"""Public vision networks: compiled, planned, verified, counted, exported, each beside eager.

    python -m benchmarks.survey [--only PATTERN ...] [--jobs N] [--limit SECONDS] [--redo]
                                [--memory GB] [--list] [--again SCHEME] [--table FILE]

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
where it was, ``--redo`` runs again what failed. ``--again brr`` only plans again, under that cost
model, what was measured by other code. ``--table docs/survey.md`` writes the page.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from joblib import Parallel, delayed

from benchmarks.json_lines import rows_in
from benchmarks.survey.measure import SCHEMES, Row, measure, plan_again
from benchmarks.survey.models import ROOT, chosen
from benchmarks.survey.page import page, summary


def in_a_process(spec: str, limit: float, memory_gb: float, again: str | None = None) -> Row:
    """The row of a model; ``status`` is measured, failed, time or memory.

    A child prints its row after each step, so that what it measured before a limit is kept.
    ``again``: :func:`plan_again` under this cost model.
    """
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.survey", "--one", spec]
    command += ["--memory", str(memory_gb), *(["--again", again] if again else [])]
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


def _replaced(old: Row, new: Row) -> Row:
    """A row with the plans of :func:`plan_again`, and the commits of both."""
    commits = dict.fromkeys([*old.get("commit", "").split(), *new["commit"].split()])
    return {**old, "plans": {**old["plans"], **new["plans"]}, "commit": " ".join(commits)} | {
        "wall_seconds": new["wall_seconds"]
    }


def _commit() -> str:
    """The commit that is measured, with ``+`` where files differ from it."""
    asked = ["git", "describe", "--always", "--abbrev=10", "--dirty=+"]
    found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "no git"


def read(path: Path) -> dict[str, Row]:
    """The last line of each model; a line that was cut off is left out."""
    return {row["model"]: row for row in rows_in(path)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="as torchvision:*")
    parser.add_argument("--path", type=Path, default=ROOT / "runs" / "survey.jsonl")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one (default 1800)")
    parser.add_argument("--memory", type=float, default=16, help="GB for one (default 16)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument("--redo", action="store_true", help="run again what failed or timed out")
    parser.add_argument("--again", choices=SCHEMES, help="only plan again, under this cost model")
    parser.add_argument("--list", action="store_true", help="only print the models")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the page, run nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a child of this very file
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: at least one process is needed")
    if args.one:
        most = int(args.memory * (1 << 30))
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        if args.again:
            print(json.dumps(plan_again(args.one, args.again)))
        else:
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
    now = _commit()
    if args.again:
        todo = [
            spec for spec in specs
            if spec in found and found[spec]["status"] == "measured"
            and now not in found[spec].get("commit", "").split()
        ]  # fmt: skip
    else:
        todo = [
            spec for spec in specs
            if spec not in found or (args.redo and found[spec]["status"] != "measured")
        ]  # fmt: skip
    args.path.parent.mkdir(parents=True, exist_ok=True)
    run = Parallel(args.jobs, backend="threading", return_as="generator_unordered")
    for k, row in enumerate(
        run(delayed(in_a_process)(spec, args.limit, args.memory, args.again) for spec in todo)
    ):
        if args.again and row["status"] == "measured":
            row = _replaced(found[row["model"]], row)
        elif args.again:
            print(f"{row['model']}: kept as it was: {row['status']}", flush=True)
            continue
        found[row["model"]] = row
        with args.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{k + 1}/{len(todo)} {row['model']}: {row['status']} in {row['wall_seconds']} s",
              flush=True)  # fmt: skip
    print("\n".join(summary({spec: row for spec, row in found.items() if spec in set(specs)})))
    return 0 if all(found[spec]["status"] == "measured" for spec in specs) else 1


if __name__ == "__main__":
    sys.exit(main())
