"""What was measured, in words and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median

from tabulate import tabulate

from benchmarks.survey.measure import BUFFERS_KB, SCHEMES, Row
from benchmarks.survey.models import LIBRARIES, NO_IMAGES, NOT_SURVEYED
from torch_getfuse.options import Options

LIMIT = Options.time_limit


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
        slowest = max((ratio for p in plans if p and (ratio := _ratio(p, row))), default=None)
        rows.append(
            [
                spec,
                str(row.get("operators", "-")),
                equal,
                *("-" if plan is None else cell(plan) for plan in plans),
                "-" if slowest is None else f"{slowest:.2f}",
                "; ".join(_remarks(row)),
            ]
        )
    return rows


def _ratio(plan: Row, row: Row) -> float | None:
    """CPU seconds of a plan beside those of torch.export in the same process."""
    export = plan.get("export_seconds", row.get("export_seconds"))
    return plan["seconds"] / export if export and plan["status"] == "done" else None


def _remarks(row: Row) -> Iterator[str]:
    if "capture" in row:
        yield f"not captured: {row['capture'][:100]}"
    for key, counted in row.get("counted", {}).items():
        if counted["status"] != "done":
            yield f"counted {key}: {counted['error'][:80]}"
        elif differ := _differing(counted):
            yield f"counted {key}: {differ} groups differ"
        elif copies := counted.get("copies"):
            yield f"counted {key}: {copies} groups have a tensor on chip in memory as well"
        elif counted["by_rows"] < counted["groups"]:
            yield f"{key}: {counted['groups'] - counted['by_rows']} groups not by rows"
    split = row.get("split", {})
    if split.get("status") == "failed":
        yield f"split: {split['error'][:80]}"
    elif split and not split.get("equal"):
        yield "split differs"


def _differing(counted: Row) -> int:
    """Groups that ran row by row and did not move what was planned."""
    return int(counted["by_rows"] - counted["agree"] - counted.get("copies", 0))


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
            f"Counted runs: {sum(run['by_rows'] - _differing(run) for run in counted):,} of "
            f"{sum(run['by_rows'] for run in counted):,} groups that ran row by row moved "
            "exactly what was planned, and "
            f"{sum(run.get('copies', 0) for run in counted)} of them had a tensor that is on chip "
            "in memory as well, uncounted; "
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
            took = [plan["seconds"] for plan in done if plan["proof"] == "optimal"]
            proved, late = len(took), sum(seconds > LIMIT for seconds in took)
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
                f"({proved / len(done):.1%})"
                + (f", {late} of them in more than {LIMIT:g} s" if late else "")
                + f"{rest}{unknown}."
            )
    for scheme in SCHEMES:
        ratios = [
            ratio
            for row in measured
            for key, plan in row["plans"].items()
            if key.startswith(f"{scheme} ") and (ratio := _ratio(plan, row))
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
    commits = sorted({name for row in found.values() for name in row.get("commit", "").split()})
    return "\n".join(
        [
            "# Survey of public networks",
            "",
            "Written by `python -m benchmarks.survey --table docs/survey.md` from what it "
            f"measured (torch {', '.join(versions)}; commits {', '.join(commits)}; one thread). "
            f"Plans are for one byte per element, with the default time limit, {LIMIT:g} s in "
            "counted steps; buffers in KB. `=` in a column of plans is a proved optimum, a "
            "percentage how far the plan can be above the optimum at most; `=` under eager says "
            "that the compiled model gives eager's result to the last bit. plan / export: CPU "
            "seconds of the slowest of the nine plans beside those of torch.export's second trace, "
            "in one process. A machine that is busy takes more CPU time for the same steps.",
            "",
            *(f"- {line}" for line in summary(found)),
            *(f"- Not surveyed: torchvision's {k}: {why}." for k, why in NOT_SURVEYED.items()),
            *(f"- Not surveyed: transformers' {k}: {why}." for k, why in NO_IMAGES.items()),
            "",
            tabulate(rows_of(found), headers=headers, tablefmt="pipe", disable_numparse=True),
            "",
        ]
    )
