"""The tables of the page as Markdown, and all cells as rows for a CSV file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import mean, median
from typing import Any

from tabulate import tabulate

from benchmarks.reproduction import published
from benchmarks.reproduction.claims import NAMES, OPEN, Claim, search_name, table_5_cell
from benchmarks.reproduction.requests import (
    CONTROLS,
    EXPLAINERS,
    GETS,
    LADDER_FACTOR,
    MODELS,
    Request,
    curve,
    curve_marks,
    ladder,
)
from benchmarks.reproduction.results import MB, Cell, Column, Results
from torch_getfuse.accelerator import KB
from torch_getfuse.explain.training.data import TABLE_1


def markdown(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """A pipe table; no number is touched."""
    return str(tabulate(rows, headers, "pipe", disable_numparse=True))


def claims_table(found: Sequence[Claim], own: bool = False) -> str:
    """Claim, the paper's figure unless the claim is our own, ours, verdict."""
    if own:
        return markdown([(c.text, c.ours, f"**{c.verdict}**") for c in found], _OWN)
    rows = [(c.text, c.paper, c.ours, f"**{c.verdict}**") for c in found]
    return markdown(rows, ("claim", "paper", "ours", "verdict"))


_OWN = ("claim", "measured", "verdict")


def summary_table(results: Results, divide: int = 1) -> str:
    """Mean gap to the optimum over the networks of each table, per explainer.

    ``divide``: look at the best plans after this fraction of the budget.
    """
    names = [name for name in EXPLAINERS if name in results.mode.explainers]
    tables: dict[tuple[Any, ...], list[Column]] = {}
    for column in results.columns((*GETS, *CONTROLS)):
        r = column.request
        tables.setdefault((r.search, _model(r), r.buffer_kb), []).append(column)
    rows = []
    for (search, model, buffer_kb), columns in tables.items():
        row = [search_name(search), f"{model}, {buffer_kb} KB", str(len(columns))]
        for name in names:
            gaps = [
                cell.gap_at(max(1, column.request.budget // divide))
                for column in columns
                for cell in [column.baseline if name == "none" else column.explained.get(name)]
                if cell is not None and cell.optimum is not None
            ]
            row.append(_percent(mean(gaps)) if len(gaps) == len(columns) else OPEN)
        rows.append(row)
    headers = ("search", "cost model", "networks", *(NAMES[name] for name in names))
    return markdown(rows, headers)


def search_table(results: Results, search: str, scheme: str, granularity: str, kb: int) -> str:
    """One search of Table II, III or IV: a row per network, a column per explainer."""
    names = [name for name in (*GETS, *CONTROLS) if name in results.mode.explainers]
    rows = []
    for column in _columns(results, search, scheme, granularity, kb):
        optimum = results.optimum(column.request)
        auto = results.one(replace(column.request, kind="auto", search="", budget=0))
        known = published.column(search, scheme, column.request.network)
        row = [
            column.request.network,
            OPEN if optimum is None else f"{optimum / MB:.3f}",
            OPEN if auto is None else _percent(100 * (auto["dram_bytes"] / (optimum or 1) - 1)),
            _cell_text(column.baseline, None, None, kb == 256),
        ]
        for name in names:
            paper = known[name] / known["none"] if name in known else None
            cell = column.explained.get(name)
            row.append(_cell_text(cell, column.baseline, paper, kb == 256))
        rows.append(row)
    headers = ["network", "optimum, MB", "auto", "none", *(NAMES[name] for name in names)]
    return markdown(rows, headers)


def _columns(
    results: Results, search: str, scheme: str, granularity: str, kb: int
) -> Iterator[Column]:
    wanted = search, scheme, granularity, kb
    for column in results.columns((*GETS, *CONTROLS)):
        r = column.request
        if (r.search, r.scheme, r.granularity, r.buffer_kb) == wanted:
            yield column


def _cell_text(cell: Cell | None, baseline: Cell | None, paper: float | None, buffer: bool) -> str:
    """Gap with its spread; ratio to the baseline beside the paper's; or MB of the baseline."""
    if cell is None:
        return OPEN
    text = _gap(cell)
    if baseline is None:
        text += f"<br>{cell.mean / MB:.3f} MB"
    else:
        text += f"<br>×{cell.mean / baseline.mean:.3f}"
        text += f" (paper ×{paper:.3f})" if paper is not None else ""
    if buffer:
        usage = [row["max_buffer_bytes"] / KB for row in cell.rows]
        text += (
            f"<br>{min(usage):.0f} KB"
            if len(set(usage)) == 1
            else (f"<br>{min(usage):.0f} to {max(usage):.0f} KB")
        )
    return text


def _percent(gap: float) -> str:
    """A gap to the optimum; 0 only where it is the optimum."""
    return "0 %" if gap == 0 else "<0.05 %" if gap < 0.05 else f"+{gap:.1f} %"


def _gap(cell: Cell) -> str:
    if cell.gap is None or cell.optimum is None:
        return OPEN
    gaps = [100 * (dram / cell.optimum - 1) for dram in cell.drams]
    least, most = f"{min(gaps):.1f}", f"{max(gaps):.1f}"
    return f"{_percent(cell.gap)}" + (f" ({least} to {most})" if least != most else "")


def cell_rows(results: Results) -> list[dict[str, Any]]:
    """Every finished cell of Tables II to V with all of its figures."""
    found = []
    for column in results.columns((*GETS, *CONTROLS)):
        known = published.column(
            column.request.search, column.request.scheme, column.request.network
        )
        for name, cell in {"none": column.baseline, **column.explained}.items():
            if cell is None:
                continue
            ratio = cell.mean / column.baseline.mean if column.baseline else None
            found.append(
                {
                    "network": column.request.network,
                    "scheme": column.request.scheme,
                    "granularity": column.request.granularity,
                    "buffer_kb": column.request.buffer_kb,
                    "search": column.request.search,
                    "explainer": name,
                    "budget": column.request.budget,
                    "seeds": len(cell.rows),
                    "dram_mean_bytes": round(cell.mean),
                    "dram_least_bytes": min(cell.drams),
                    "dram_most_bytes": max(cell.drams),
                    "optimum_bytes": cell.optimum,
                    "gap_percent": None if cell.gap is None else round(cell.gap, 3),
                    "max_buffer_bytes": max(row["max_buffer_bytes"] for row in cell.rows),
                    "ratio_to_none": None if ratio is None else round(ratio, 4),
                    "paper_ratio": round(known[name] / known["none"], 4) if name in known else None,
                    "rectify_percent": round(cell.rectify_rate, 1) if name != "none" else None,
                    "seconds": round(cell.seconds, 2),
                }
            )
    return found


def samples_table(results: Results) -> str:
    """Table I: distinct groups per network."""
    columns: dict[str, Mapping[str, int]] = {}
    for request, row in results.of_kind("samples"):
        columns[_model(request)] = row["groups"] if row is not None else {}
    rows = []
    for network, paper in TABLE_1.items():
        rows.append([network, paper, *(_count(found, network) for found in columns.values())])
    totals = [sum(found.values()) if found else OPEN for found in columns.values()]
    rows.append(["all", sum(TABLE_1.values()), *totals])
    return markdown(rows, ("network", "paper", *columns))


def _count(found: Mapping[str, int], network: str) -> str:
    return str(found.get(network, "–")) if found else OPEN


def _model(request: Request) -> str:
    return "BRR" if request.scheme == "brr" else f"LBDF {request.granularity}"


def valid_table(results: Results) -> str:
    """Fig. 3: share of valid groups per buffer."""
    rows: list[list[str]] = []
    headers = ["cost model", "share of valid groups"]
    for request, row in results.of_kind("samples"):
        if row is None:
            rows.append([_model(request), OPEN])
            continue
        headers = ["cost model", *(f"{size // KB} KB" for size in row["buffers"])]
        rows.append([_model(request), *(f"{100 * share:.1f} %" for share in row["valid"])])
    return markdown(rows, headers)


def predictor_table(results: Results) -> str:
    """Accuracy and F1 on the test part and on networks never trained on."""
    row = next((row for _, row in results.of_kind("predictors")), None)
    if row is None:
        return OPEN
    found: dict[str, dict[str, str]] = {}
    for score in row["scores"]:
        text = f"{score['accuracy %']:.2f} / {score['F1 %']:.2f}"
        found.setdefault(score["on"], {})[score["model"]] = text
    models = [f"{scheme} {granularity}" for scheme, granularity in MODELS]
    rows = [[name, *(scores.get(model, "–") for model in models)] for name, scores in found.items()]
    return markdown(rows, ("accuracy / F1, % on", *models))


def explanation_table(results: Results) -> str:
    """Fig. 4: what each explainer blames, and what its own cuts make of the group."""
    row = next((row for _, row in results.of_kind("explanation") if row is not None), None)
    if row is None:
        return OPEN
    rows = []
    for blame in row["why"]["explainers"]:
        best = [f"{e['producer']} → {e['consumer']}" for e in blame["edges"][:3]]
        parts, cost = blame["parts"], blame["dram_bytes"]
        split = "not rectified" if parts is None else f"{parts} valid groups, {cost / KB:.0f} KB"
        rows.append((NAMES[blame["explainer"]], "<br>".join(best), split))
    return markdown(rows, ("explainer", "edges blamed most", "its own cuts"))


def curve_table(results: Results) -> str:
    """Fig. 5: mean gap to the optimum after so many plans."""
    marks = curve_marks(results.mode)
    rows = []
    for request in curve(results.mode):
        cell = results.cell(request)
        row = [request.network, search_name(request.search), NAMES[request.explainer]]
        if cell is None or cell.optimum is None:
            rows.append([*row, OPEN])
        else:
            best = [100 * (cell.best_at(plans) / cell.optimum - 1) for plans in marks]
            rows.append([*row, *map(_percent, best)])
    headers = ("network", "search", "explainer", *(f"{plans} plans" for plans in marks))
    return markdown(rows, headers)


def rates_table(results: Results) -> str:
    """Table V: rectify rate and seconds."""
    rows = []
    for search in ("local", "random"):
        for name in (*GETS, "saliency", *CONTROLS):
            if name not in results.mode.explainers and name != "saliency":
                continue
            cell = table_5_cell(results, search, name)
            rate, seconds = published.TABLE_5.get((search, name), (None, None))
            rows.append(
                (
                    search_name(search),
                    NAMES[name],
                    "" if rate is None else f"{rate} %",
                    OPEN if cell is None else f"{cell.rectify_rate:.1f} %",
                    "" if seconds is None else f"{seconds:.0f} s",
                    OPEN if cell is None else f"{cell.seconds:.1f} s",
                )
            )
    headers = ("search", "explainer", "rectified, paper", "ours", "time, paper", "ours")
    return markdown(rows, headers)


def ladder_table(results: Results) -> str:
    """What the baseline needs to reach the optimum."""
    rows = []
    for request in ladder(results.mode):
        cell = results.cell(request)
        budget = request.budget // LADDER_FACTOR
        row = [request.network, NAMES[request.search], f"{budget}"]
        if cell is None or cell.optimum is None:
            rows.append([*row, OPEN])
            continue
        for plans in (budget // 4, budget, request.budget):
            row.append(_percent(100 * (cell.best_at(plans) / cell.optimum - 1)))
        for share in (1.01, 1.0):
            row.append(_plans(cell.plans_to(share * cell.optimum)))
        rows.append(row)
    headers = ["network", "local search", "plans of the table"]
    headers += ["gap at a quarter", "at the budget", f"at {LADDER_FACTOR} times it"]
    return markdown(rows, [*headers, "plans to within 1 %", "plans to the optimum"])


def _plans(found: Sequence[int | None]) -> str:
    """The median over the seeds that got there, and how many did not."""
    there = [plans for plans in found if plans is not None]
    if not there:
        return "no seed"
    text = f"{median(there):.0f}"
    return text if len(there) == len(found) else f"{text} ({len(there)} of {len(found)} seeds)"
