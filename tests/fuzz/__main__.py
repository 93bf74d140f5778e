"""Many programs: ``python -m tests.fuzz --start 0 --count 100000 --jobs 2``.

Goes on where it stopped: a block of seeds is done once for each state of the code. Failures come
out as files that run on their own, the first of each kind made short.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import joblib
from tqdm import tqdm

from .generate import generate
from .reproduce import reproducer
from .shrink import shrink
from .surroundings import guards_unmeasured, quietly

BLOCK = 50
_ROOT = Path(__file__).parents[2]


def code_digest() -> str:
    """Of the package and of the fuzzer: a block counts for the code that ran it."""
    found = hashlib.sha256()
    for folder in ("torch_getfuse", "tests/fuzz"):
        for path in sorted((_ROOT / folder).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def run_block(start: int, count: int, folder: Path) -> dict[str, Any]:
    """Check the programs of some seeds, and write what failed.

    Returns:
        ``programs``, ``skipped`` (reason -> number), ``checked`` (way -> number), ``failures``
        (seed, kind, message) and ``seconds`` of the processor.
    """
    from .check import check_block

    done = folder / f"{start:06d}-{count}.json"
    if done.is_file():
        found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return found
    started = time.process_time()
    skipped, checked = Counter[str](), Counter[str]()
    failures = []
    with quietly(), guards_unmeasured():
        for program, verdict in check_block(map(generate, range(start, start + count))):
            checked.update(verdict.checked)
            if verdict.skipped:
                skipped[verdict.skipped[:100]] += 1
            for failure in verdict.failures:
                failures.append([program.seed, failure.kind, failure.message])
                _write(folder, program, failure)
    found = {
        "programs": count,
        "skipped": dict(skipped),
        "checked": dict(checked),
        "failures": failures,
        "seconds": round(time.process_time() - started, 1),
    }
    done.write_text(json.dumps(found), encoding="utf-8")
    return found


def _write(folder: Path, program: Any, failure: Any) -> None:
    """A failing program; the first of its kind is made short."""
    kind = re.sub(r"\W+", "-", failure.kind).strip("-")[:80]
    place = folder / kind
    place.mkdir(exist_ok=True)
    if not any(place.iterdir()):
        (place / f"{program.seed}-whole.py").write_text(reproducer(program, failure))
        program, failure = shrink(program, failure)
    (place / f"{program.seed}.py").write_text(reproducer(program, failure))


def main() -> int:
    """Run blocks of seeds, and say what was found; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--count", type=int, default=100_000, help="number of programs")
    parser.add_argument("--jobs", type=int, default=joblib.cpu_count(), help="processes")
    parser.add_argument("--folder", type=Path, default=_ROOT / "runs" / "fuzz", help="for results")
    args = parser.parse_args()
    folder = args.folder / code_digest()
    folder.mkdir(parents=True, exist_ok=True)
    blocks = [
        (at, min(BLOCK, args.start + args.count - at))
        for at in range(args.start, args.start + args.count, BLOCK)
    ]
    tasks = (joblib.delayed(run_block)(at, count, folder) for at, count in blocks)
    results = joblib.Parallel(args.jobs, return_as="generator_unordered")(tasks)
    kinds, examples = Counter[str](), dict[str, list[int]]()
    skipped = Counter[str]()
    programs, seconds = 0, 0.0
    for found in tqdm(results, total=len(blocks), unit="block", disable=not sys.stderr.isatty()):
        programs += found["programs"]
        seconds += found["seconds"]
        skipped.update(found["skipped"])
        for seed, kind, _ in found["failures"]:
            kinds[kind] += 1
            examples.setdefault(kind, []).append(seed)
    rate = programs / seconds if seconds else 0.0
    print(
        f"{programs} programs, {sum(skipped.values())} of them not compiled by torch itself; "
        f"{rate:.1f} programs/s of one core"
    )
    for kind, count in kinds.most_common():
        print(f"{count:6d}  {kind}  seeds {sorted(examples[kind])[:3]}")
    if kinds:
        print(f"programs that fail: {folder}")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
