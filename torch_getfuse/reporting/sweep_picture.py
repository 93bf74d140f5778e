"""The picture of a sweep: DRAM access against the buffer. matplotlib is imported only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch_getfuse.accelerator import KB, MB, format_size
from torch_getfuse.reporting.figure import new_figure
from torch_getfuse.reporting.knee import Knee

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEW, _MANY = (1, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
"""Marks of the axis in each decade, for curves of several or of one."""
_GREY = "0.4"
_DASHES = ("--", (0, (7, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
"""Of what moves unfused: one per scheme of a model."""


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

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.points[0]["model"])


def sweep_figure(curves: Sequence[Curve]) -> Figure:
    """Curves, what each network moves unfused and its floor, and the knees.

    Raises:
        GetfuseError: if matplotlib is not installed.
    """
    figure = new_figure(8, 5)

    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator

    axes = figure.subplots()
    colours: dict[str, str] = {}  # of each model: that of its first curve
    for number, curve in enumerate(curves):
        points = curve.points
        x = [point["buffer_bytes"] / KB for point in points]
        y = [point["dram_bytes"] / MB for point in points]
        knee = "" if curve.knee is None else f", knee {format_size(curve.knee.buffer_bytes)}"
        # A line that a later one covers is seen at its sides.
        covered = sum(_same(points, later.points) for later in curves[number + 1 :])
        wide: dict[str, Any] = {"linewidth": 1.5 + 3 * covered, "markersize": 6 + 4 * covered}
        (line,) = axes.plot(x, y, marker="o", label=f"{curve.label}{knee}", **wide)
        colours.setdefault(curve.model, line.get_color())
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
    if len(colours) == 1:
        colours = dict.fromkeys(colours, _GREY)
    _draw_unfused(axes, curves, colours)
    floors = {curve.model: point["floor_bytes"] / MB for curve in curves for point in curve.points}
    for model, floor in floors.items():
        axes.axhline(floor, color=colours[model], linestyle=":", label=f"{short(model)}, floor")
    mark: dict[str, Any] = {"color": _GREY, "marker": "o", "linestyle": ""}
    if any(curve.knee is not None for curve in curves):
        ring: dict[str, Any] = {"markersize": 14, "markerfacecolor": "none", "markeredgewidth": 1.5}
        axes.plot([], [], label="knee: where the curve bends most", **mark, **ring)
    if any(point["proof"] != "optimal" for curve in curves for point in curve.points):
        axes.plot([], [], label="not proved optimal", markerfacecolor="white", **mark)
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


def short(model: str) -> str:
    """A model without the library that it is of."""
    return model.rpartition(":")[2]


def _draw_unfused(axes: Any, curves: Sequence[Curve], colours: Mapping[str, str]) -> None:
    """A dashed line per model; where schemes differ in what an operator alone moves, per scheme."""
    lines: dict[tuple[Any, ...], set[str]] = {}
    for curve in curves:
        line = tuple((point["buffer_bytes"], point["unfused_bytes"]) for point in curve.points)
        lines.setdefault((curve.model, line), set()).add(curve.points[0]["scheme"])
    models = [model for model, _ in lines]
    for number, ((model, line), schemes) in enumerate(lines.items()):
        several = f" ({', '.join(sorted(schemes))})" if models.count(model) > 1 else ""
        earlier = models[:number].count(model)
        axes.plot(
            [size / KB for size, _ in line],
            [dram / MB for _, dram in line],
            color=colours[model],
            linestyle=_DASHES[earlier % len(_DASHES)],
            label=f"{short(model)}, unfused{several}",
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
    models = list(dict.fromkeys(curve.model for curve in curves))
    if not models:
        return "nothing planned"
    named = ", ".join(models[:3]) + (f" and {len(models) - 3} more" if len(models) > 3 else "")
    return f"{named}: DRAM access against the buffer"
