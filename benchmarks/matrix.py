"""Every setting of torch.compile on ten networks: what equals eager, and what does not.

    python benchmarks/matrix.py [--inner eager] [--network NAME ...] [--redo] [--fresh]
                                [--jobs N] [--table]

Runs each combination of ``tests/matrix.py`` in a process of its own, those of ``make test`` and
cheap ones first, ``--jobs`` of them at a time, and adds a line of JSON to ``runs/matrix.jsonl`` for
each. Stopped and started again it goes on where it was; ``--redo`` runs again what does not hold,
and ``--fresh`` everything.
``--table`` only prints the Markdown table of what was run. Exits with 1 where a combination does
not hold or was not run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.json_lines import rows_in  # noqa: E402
from tests.matrix import (  # noqa: E402
    AFFORDABLE,
    DTYPES,
    INNER,
    MODES,
    NETWORKS,
    PRODUCT,
    SHAPES,
    Combination,
    check,
)
from torch_getfuse.backend.plan_cache import code_digest  # noqa: E402

KINDS = ("outputs", "gradients", "buffers")


def measure(name: str) -> dict[str, Any]:
    """One combination in this process."""
    import torch

    torch.set_num_threads(1)
    (combination,) = (c for c in PRODUCT if str(c) == name)
    result = check(combination)
    return {
        **result,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "torch": torch.__version__,
    }


def in_a_process(combination: Combination, limit: float) -> dict[str, Any]:
    """What became of a combination: a ``status`` of holds, differs, failed or time."""
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "runs" / "inductor-cache"))
    try:
        child = subprocess.run(
            [sys.executable, __file__, "--one", str(combination)],
            capture_output=True, text=True, timeout=limit, env=environment, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        result: dict[str, Any] = {"status": "time", "limit_seconds": limit}
    else:
        if child.returncode:
            result = {"status": "failed", "error": child.stderr.strip()[-2000:]}
        else:
            result = json.loads(child.stdout.splitlines()[-1])
            result["status"] = "holds" if result.pop("holds") else "differs"
    seconds = round(time.perf_counter() - started, 1)
    return {**asdict(combination), **result, "seconds": seconds, "code": code_digest()[:12]}


def read(path: Path) -> dict[Combination, dict[str, Any]]:
    """The last line of each combination; a line that was cut off is left out."""
    return {_combination(row): row for row in rows_in(path)}


def _combination(row: dict[str, Any]) -> Combination:
    return Combination(*(row[name] for name in Combination.__dataclass_fields__))


def cell(row: dict[str, Any] | None) -> str:
    """What became of one combination: ``=`` for bit-equal, else the largest relative difference.

    In brackets the second comparison, where it does not hold in the first: the difference in double
    precision, or that eager's nearby runs settle it.
    """
    if row is None:
        return "not run"
    if row["status"] not in ("holds", "differs"):
        return f"**{ {'failed': 'failed', 'time': 'out of time'}[row['status']] }**"
    if all(row[kind]["equal"] for kind in KINDS):
        return "="
    if row["status"] == "holds":
        if "double" in row:
            return f"{_most(row)} (double {_most(row['double'])})"
        return f"{_most(row)} (nearby)" if "nearby" in row else _most(row)
    kinds = [
        kind
        for kind in KINDS
        if not row[kind]["equal"] and (row["inner"] == "eager" or row[kind]["excess"] > 1)
    ]
    return f"**{', '.join(kinds)} {max(row[kind]['relative'] for kind in kinds):.0e}**"


def _most(row: dict[str, Any]) -> str:
    return f"{max(row[kind]['relative'] for kind in KINDS):.0e}"


def table(found: dict[Combination, dict[str, Any]]) -> str:
    """Markdown: a row per network and shapes, a column per inner, mode and dtype."""
    columns = [(inner, mode, dtype) for inner in INNER for mode in MODES for dtype in DTYPES]
    lines = [
        "| network | shapes | " + " | ".join(", ".join(column) for column in columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for network in NETWORKS:
        for shapes in SHAPES:
            if not any((c.network, c.shapes) == (network, shapes) for c in PRODUCT):
                continue
            cells = [
                cell(found.get(Combination(network, mode, shapes, dtype, inner)))
                for inner, mode, dtype in columns
            ]
            lines.append(f"| {network} | {shapes} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--inner", choices=INNER, help="only this one")
    parser.add_argument("--network", choices=NETWORKS, nargs="+", help="only these")
    parser.add_argument("--path", type=Path, default=ROOT / "runs" / "matrix.jsonl")
    parser.add_argument("--limit", type=float, default=7200, help="seconds for one (default 7200)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument("--redo", action="store_true", help="run again what does not hold")
    parser.add_argument("--fresh", action="store_true", help="run everything again")
    parser.add_argument("--table", action="store_true", help="only print the table of what was run")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a child of this very file
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: at least one process is needed")
    if args.one:
        print(json.dumps(measure(args.one)))
        return 0
    chosen = [
        c for c in PRODUCT
        if args.inner in (None, c.inner) and (not args.network or c.network in args.network)
    ]  # fmt: skip
    found = read(args.path)
    if not args.table:
        chosen.sort(key=lambda c: c not in AFFORDABLE)  # stable: otherwise as in the product
        todo = [
            c for c in chosen
            if args.fresh or c not in found or (args.redo and found[c]["status"] != "holds")
        ]  # fmt: skip
        args.path.parent.mkdir(parents=True, exist_ok=True)
        run = Parallel(args.jobs, backend="threading", return_as="generator_unordered")
        rows = run(delayed(in_a_process)(combination, args.limit) for combination in todo)
        for k, row in enumerate(rows):
            combination = _combination(row)
            found[combination] = row
            with args.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{k + 1}/{len(todo)} {combination}: {row['status']} in {row['seconds']} s",
                  flush=True)  # fmt: skip
    print(table({c: row for c, row in found.items() if c in set(chosen)}))
    count = Counter(found[c]["status"] if c in found else "not run" for c in chosen)
    print(", ".join(f"{number} {status}" for status, number in sorted(count.items())))
    codes = {found[c]["code"] for c in chosen if c in found}
    if len(codes) > 1:
        print(f"made by {len(codes)} states of the package; --fresh runs all with this one")
    return 0 if count["holds"] == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
