"""The evaluation of arXiv 2501.00636 made again: tables, plots and claims, with proved optima.

    python -m benchmarks.paper [full|quick|smallest] [--jobs 2]

Every finished run is a line of ``--rows``, keyed by all that it depends on: what was asked, the
operator graph, the code that is run, the explainers' weights, library versions. So a run that was
stopped goes on where it was, and after a change only what the change can reach is run again.
The page is written at the end, on interruption too, and with ``--page-only`` at any time; what
has no row yet stands there as "not run yet". ``make paper`` is the full evaluation (hours, most
of them GNNExplainer's), ``make paper-quick`` takes minutes.
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import joblib
from tqdm import tqdm

from benchmarks.reproduction.execute import Figures, execute, graph_of, machine
from benchmarks.reproduction.journal import Journal
from benchmarks.reproduction.page import write_page
from benchmarks.reproduction.provenance import ROOT
from benchmarks.reproduction.requests import MODES, Mode, Request, depends_on, key_of, requests
from benchmarks.reproduction.results import Results

log = logging.getLogger(__name__)


def keyed(mode: Mode, folder: Path) -> dict[Request, str]:
    """Every run of a mode in order, with its key."""
    found = {}
    for request in requests(mode):
        graph = graph_of(request.network, folder).fingerprint if request.network else ""
        found[request] = key_of(request, depends_on(request, graph))
    return found


def run(
    mode: Mode,
    journal: Journal,
    folder: Path,
    jobs: int = 1,
    explainers: Sequence[str] = (),
) -> list[str]:
    """Carry out what has no row yet; the errors of the runs that failed.

    Args:
        mode: which runs there are.
        journal: where finished ones are kept.
        folder: where operator graphs and data are kept.
        jobs: processes.
        explainers: leave out the runs of all others; empty for none.
    """
    keys = keyed(mode, folder)
    if explainers:
        keys = {request: key for request, key in keys.items() if request.explainer in explainers}
    todo = [request for request, key in keys.items() if key not in journal.rows]
    errors = []
    here = machine()
    bar = tqdm(total=len(keys), initial=len(keys) - len(todo), unit="run", desc=mode.name)
    with bar:
        for request, figures, error in _carried_out(todo, folder, jobs):
            bar.update()
            if error:
                errors.append(f"{request}: {error}")
                bar.write(f"failed: {request}\n{error}", file=sys.stderr)
            else:
                row = {"key": keys[request], **asdict(request), **figures, "machine": here}
                journal.append(row)
    return errors


def _carried_out(
    todo: Sequence[Request], folder: Path, jobs: int
) -> Iterator[tuple[Request, Figures, str]]:
    if jobs == 1:
        yield from (_attempt(request, folder) for request in todo)
    else:
        yield from joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(
            joblib.delayed(_attempt)(request, folder) for request in todo
        )


def _attempt(request: Request, folder: Path) -> tuple[Request, Figures, str]:
    """A run that fails must not end the hours of the others; its error is told at the end."""
    try:
        return request, execute(request, folder), ""
    except Exception:
        return request, {}, traceback.format_exc()


def results(mode: Mode, journal: Journal, folder: Path) -> Results:
    """The rows of a mode that are there."""
    keys = keyed(mode, folder)
    rows = {r: journal.rows[key] for r, key in keys.items() if key in journal.rows}
    return Results(mode, tuple(keys), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a run failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=MODES, nargs="?", default="full")
    parser.add_argument("--jobs", type=int, default=1, help="processes; each needs about 2 GB")
    parser.add_argument("--explainers", nargs="+", help="run no others (none: without one)")
    parser.add_argument("--rows", type=Path, help="default: runs/paper/MODE.jsonl")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "paper")
    parser.add_argument("--page", type=Path, help="default: docs/paper.md, or beside the rows")
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    given = parser.parse_args(arguments)
    mode = MODES[given.mode]
    rows = given.rows or given.folder / f"{mode.name}.jsonl"
    usual = ROOT / "docs" / "paper.md" if mode.name == "full" else rows.with_suffix(".md")
    page = given.page or usual
    journal = Journal(rows)
    errors: list[str] = []
    try:
        if not given.page_only:
            errors = run(mode, journal, given.folder, given.jobs, given.explainers or ())
    finally:
        print(write_page(results(mode, journal, given.folder), page))
    print(f"{page} written; rows in {rows}")
    if errors:
        print(f"{len(errors)} runs failed, the first: {errors[0]}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
