"""The plots of the page: small SVG files, the same bytes for the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.reproduction import published
from benchmarks.reproduction.claims import NAMES, search_name
from benchmarks.reproduction.requests import curve, curve_marks
from benchmarks.reproduction.results import Results
from torch_getfuse.accelerator import KB

_COLORS = {
    "none": "#202124",
    "rgexplainer": "#c5221f",
    "pgexplainer": "#1a56b0",
    "gnnexplainer": "#188038",
    "random": "#9aa0a6",
    "all": "#e8710a",
}
_MARKERS = {"local": "o", "nsga2": "^", "random": "s", "plain": "x"}
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "getfuse", "font.size": 9}


def draw_all(results: Results, folder: Path) -> dict[str, str]:
    """Write every plot that has rows; its name and what it shows."""
    found = {}
    with matplotlib.rc_context(_STYLE):
        for name, draw, text in (
            ("fig3", _valid_shares, "Share of valid groups against the buffer"),
            ("ratios", _ratios, "DRAM access with a GET as a share of the baseline's: ours, paper"),
            ("fig5", _curves, "Gap to the optimum against plans evaluated"),
        ):
            figure = draw(results)
            if figure is not None:
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                found[name] = text
    return found


def _valid_shares(results: Results) -> Figure | None:
    rows = [(request, row) for request, row in results.of_kind("samples") if row is not None]
    if not rows:
        return None
    figure = Figure(figsize=(5, 2.8), layout="constrained")
    axes = figure.subplots()
    for request, row in rows:
        label = "BRR" if request.scheme == "brr" else f"LBDF {request.granularity}"
        sizes = [size // KB for size in row["buffers"]]
        axes.plot(sizes, [100 * share for share in row["valid"]], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size} KB" for size in sizes])
    axes.set_ylabel("valid groups, %")
    axes.set_ylim(0, 100)
    _finish(axes)
    return figure


def _ratios(results: Results) -> Figure | None:
    """Every cell that the paper has as well: its ratio on x, ours on y."""
    first = results.mode.granularities[0]
    points: dict[str, list[tuple[float, float]]] = {}
    for column in results.columns():
        request = column.request
        known = published.column(request.search, request.scheme, request.network)
        if request.scheme == "lbdf" and request.granularity != first:
            continue
        for name, ratio in column.ratios.items():
            if name in known:
                pair = known[name] / known["none"], ratio
                points.setdefault(request.search, []).append(pair)
    if not points:
        return None
    figure = Figure(figsize=(4.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for search, pairs in points.items():
        x, y = zip(*pairs, strict=True)
        axes.scatter(x, y, 16, marker=_MARKERS[search], label=search_name(search), alpha=0.7)
    low = min(min(pair) for pairs in points.values() for pair in pairs)
    axes.plot([low, 1], [low, 1], "--", color="#9aa0a6", linewidth=1)
    axes.axhline(1, color="#9aa0a6", linewidth=0.8)
    axes.axvline(1, color="#9aa0a6", linewidth=0.8)
    axes.set_xlabel("with a GET / baseline, paper")
    axes.set_ylabel("with a GET / baseline, ours")
    _finish(axes)
    return figure


def _curves(results: Results) -> Figure | None:
    requests = curve(results.mode)
    networks = list(dict.fromkeys(request.network for request in requests))
    searches = list(dict.fromkeys(request.search for request in requests))
    cells = {request: results.cell(request) for request in requests}
    if not any(cells.values()):
        return None
    figure = Figure(figsize=(9, 2.7 * len(networks)), layout="constrained")
    panels = figure.subplots(len(networks), len(searches), squeeze=False)
    marks = curve_marks(results.mode)
    for row, network in zip(panels, networks, strict=True):
        for axes, search in zip(row, searches, strict=True):
            for request, cell in cells.items():
                if (request.network, request.search) != (network, search):
                    continue
                if cell is not None and cell.optimum is not None:
                    gaps = [100 * (cell.best_at(plans) / cell.optimum - 1) for plans in marks]
                    color, label = _COLORS[request.explainer], NAMES[request.explainer]
                    axes.plot(marks, gaps, marker=".", color=color, label=label)
            axes.set_xscale("log")
            axes.set_title(f"{network}: {search_name(search)}", fontsize=9)
            axes.set_xlabel("plans")
            axes.set_ylabel("gap to the optimum, %")
            axes.set_ylim(bottom=0)
            _finish(axes)
    return figure


def _finish(axes: Any) -> None:
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
