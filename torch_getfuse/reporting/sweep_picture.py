"""The picture of a sweep: DRAM access against the buffer. matplotlib is imported only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch_getfuse.accelerator import KB, MB, format_size
from torch_getfuse.errors import GetfuseError
from torch_getfuse.reporting.knee import Knee

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEW, _MANY = (1, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
"""Marks of the axis in each decade, for curves of several or of one."""
_GREYS = ("0.35", "0.6", "0.75")


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of the picture.

    Attributes:
        label: of the legend.
        points: records of a sweep that differ in their buffers alone, by buffer.
        knee: where it bends, if it does.
    """

    label: str
    points: Sequence[Mapping[str, Any]]
    knee: Knee | None


def sweep_figure(curves: Sequence[Curve]) -> Figure:
    """Curves, what each network moves unfused and its floor, and the knees.

    Raises:
        GetfuseError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator
    except ImportError as error:
        raise GetfuseError("plots need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        points = curve.points
        x = [point["buffer_bytes"] / KB for point in points]
        y = [point["dram_bytes"] / MB for point in points]
        knee = "" if curve.knee is None else f", knee at {format_size(curve.knee.buffer_bytes)}"
        # A line that a later one covers is seen at its sides.
        covered = sum(_same(points, later.points) for later in curves[number + 1 :])
        wide: dict[str, Any] = {"linewidth": 1.5 + 3 * covered, "markersize": 6 + 4 * covered}
        (line,) = axes.plot(x, y, marker="o", label=f"{curve.label}{knee}", **wide)
        unproved = [k for k, point in enumerate(points) if point["proof"] != "optimal"]
        hollow: dict[str, Any] = {"color": line.get_color(), "marker": "o", "linestyle": ""}
        axes.plot(
            [x[k] for k in unproved],
            [y[k] for k in unproved],
            markersize=wide["markersize"],
            markerfacecolor="white",
            **hollow,
        )
        if curve.knee is not None:
            at = [curve.knee.buffer_bytes / KB], [curve.knee.dram_bytes / MB]
            axes.plot(*at, markersize=14, markerfacecolor="none", markeredgewidth=1.5, **hollow)
    _draw_unfused(axes, curves)
    floors = {
        point["model"]: point["floor_bytes"] / MB for curve in curves for point in curve.points
    }
    for (model, floor), grey in zip(floors.items(), _GREYS * len(floors)):
        axes.axhline(floor, color=grey, linestyle=":", label=f"{model}, floor")
    if any(point["proof"] != "optimal" for curve in curves for point in curve.points):
        mark: dict[str, Any] = {
            "color": "0.35",
            "marker": "o",
            "markerfacecolor": "white",
            "linestyle": "",
        }
        axes.plot([], [], label="not proved optimal", **mark)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    buffers = sorted({point["buffer_bytes"] for curve in curves for point in curve.points})
    axes.xaxis.set_major_locator(FixedLocator([size / KB for size in _spread(buffers)]))
    axes.xaxis.set_major_formatter(lambda value, _: format_size(round(value * KB)))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=_FEW if high > 10 * low else _MANY))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.set_title(_title(curves), fontsize=11)
    axes.set_xlabel("on-chip buffer")
    axes.set_ylabel("DRAM access per sample (MB)")
    if curves:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)
    return figure


def _draw_unfused(axes: Any, curves: Sequence[Curve]) -> None:
    """A dashed line per model; where schemes differ in what an operator alone moves, per scheme."""
    lines: dict[tuple[Any, ...], set[str]] = {}
    for curve in curves:
        line = tuple((point["buffer_bytes"], point["unfused_bytes"]) for point in curve.points)
        lines.setdefault((curve.points[0]["model"], line), set()).add(curve.points[0]["scheme"])
    models = [model for model, _ in lines]
    for ((model, line), schemes), grey in zip(lines.items(), _GREYS * len(lines)):
        several = f" ({', '.join(sorted(schemes))})" if models.count(model) > 1 else ""
        axes.plot(
            [size / KB for size, _ in line],
            [dram / MB for _, dram in line],
            color=grey,
            linestyle="--",
            label=f"{model}, unfused{several}",
        )


def _same(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two curves are the same line."""
    keys = ("model", "buffer_bytes", "dram_bytes")
    return [[p[key] for key in keys] for p in one] == [[p[key] for key in keys] for p in other]


def _spread(buffers: Sequence[int], apart: float = 1.25) -> list[int]:
    """Buffers to name on the axis: none so near to the one before that names overlap."""
    found: list[int] = []
    for size in buffers:
        if not found or size >= apart * found[-1]:
            found.append(size)
    return found


def _title(curves: Sequence[Curve]) -> str:
    models = list(dict.fromkeys(point["model"] for curve in curves for point in curve.points))
    if not models:
        return "nothing planned"
    named = ", ".join(models[:3]) + (f" and {len(models) - 3} more" if len(models) > 3 else "")
    return f"{named}: DRAM access against the buffer"
