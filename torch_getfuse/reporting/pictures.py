"""Pictures: a group of operators next to bars of its demand, and the buffer from step to step.

A :class:`Drawing` describes a group, independent of its meaning; :func:`to_dot` writes it as DOT
text, :func:`save_picture` draws it. A :class:`Timeline` is what the buffer holds in each step of a
plan; :func:`timeline_figure` draws it. matplotlib is imported only then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_getfuse.accelerator import KB, format_size
from torch_getfuse.reporting.figure import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TERMS = 12
"""Terms of a buffer that tables and pictures show; the others are one row, or bar."""
_MARGIN = -2.4  # x of the longest skips; the boxes begin at 0
_CALM, _BLAMED, _CUT, _BAR = "#9aa0a6", "#c5221f", "#1a56b0", "#5f8fd6"
_PARTS = ("#5f8fd6", "#f2b134", "#4a9b6e", "#9aa0a6")  # of a timeline, from the bottom up


@dataclass(frozen=True, slots=True)
class Box:
    """An operator: its label, and its part of the cut group."""

    label: str
    part: int


@dataclass(frozen=True, slots=True)
class Arrow:
    """An edge between two boxes, by position.

    Attributes:
        score: the number beside it; 0 if it has none.
        share: the same as a share of the highest one, for colour and width.
        cut: whether the cut crosses it.
    """

    source: int
    target: int
    score: float
    share: float
    cut: bool


@dataclass(frozen=True, slots=True)
class Bar:
    """A share of the buffer, in bytes."""

    label: str
    size: int


@dataclass(frozen=True, slots=True)
class Drawing:
    """What to draw.

    Attributes:
        title: one line.
        legend: meaning of the colour of an arrow.
        boxes: top to bottom; the boxes of one part are contiguous.
        arrows: between boxes, downwards.
        bars: largest first.
        buffer_bytes: the on-chip buffer.
    """

    title: str
    legend: str
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    bars: tuple[Bar, ...]
    buffer_bytes: int

    @property
    def folded_bars(self) -> list[Bar]:
        """The bars to draw: the largest ones, and the rest as one."""
        if len(self.bars) <= TERMS:
            return list(self.bars)
        shown, rest = self.bars[:TERMS], self.bars[TERMS:]
        return [*shown, Bar(f"{len(rest)} smaller terms", sum(bar.size for bar in rest))]


@dataclass(frozen=True, slots=True)
class Timeline:
    """What the buffer holds in each step of a plan.

    Attributes:
        title: one line.
        parts: label of each part -> bytes in each step, from the bottom up; together below the
            buffer size, or all of it.
        buffer_bytes: the on-chip buffer.
    """

    title: str
    parts: Mapping[str, Sequence[int]]
    buffer_bytes: int


def to_dot(drawing: Drawing) -> str:
    """The graph in the DOT language: a cluster per part, blamed edges red, cut edges dashed."""
    lines = [
        "digraph explanation {",
        f"  label={_quote(drawing.title)}; labelloc=t; fontname=sans;",
        "  node [shape=box, fontname=sans, fontsize=10]; edge [fontname=sans, fontsize=9];",
    ]
    for part in dict.fromkeys(box.part for box in drawing.boxes):
        lines.append(f"  subgraph cluster_{part} {{")
        lines.append(f'    label="part {part}"; style=dashed; color="{_CUT}";')
        lines += [
            f"    n{k} [label={_quote(box.label)}];"
            for k, box in enumerate(drawing.boxes)
            if box.part == part
        ]
        lines.append("  }")
    for arrow in drawing.arrows:
        marks = [f"penwidth={1 + 3 * arrow.share:.2f}", f'color="{_color(arrow.share)}"']
        if arrow.score:
            marks.append(f'label="{arrow.score:.2f}"')
        if arrow.cut:
            marks.append("style=dashed")
        lines.append(f"  n{arrow.source} -> n{arrow.target} [{', '.join(marks)}];")
    return "\n".join([*lines, "}"]) + "\n"


def save_picture(drawing: Drawing, path: str | Path) -> None:
    """Draw to a ``.png`` or ``.svg`` file, by the suffix.

    The same drawing gives the same bytes.

    Raises:
        GetfuseError: if matplotlib is not installed.
        FileError: if the file cannot be written.
    """
    rows = _rows(drawing)
    bars = drawing.folded_bars
    height = max(0.36 * (rows[-1] + 1), 0.32 * (len(bars) + 1)) + 1.5
    figure = new_figure(13, height)
    figure.suptitle(drawing.title, fontsize=11)
    graph, terms = figure.subplots(1, 2, width_ratios=(5, 4))
    _draw_graph(graph, drawing, rows)
    _draw_bars(terms, drawing, bars, rows[-1])
    save_figure(figure, path, dpi=110)


def timeline_figure(timelines: Sequence[Timeline]) -> Figure:
    """A bar per step, one plan below the other.

    Raises:
        GetfuseError: if matplotlib is not installed.
    """
    longest = max(len(sizes) for line in timelines for sizes in line.parts.values())
    width = min(30.0, max(7.0, 2.5 + 0.16 * longest))
    figure = new_figure(width, 4.5 * len(timelines))
    for axes, line in zip(figure.subplots(len(timelines), squeeze=False)[:, 0], timelines):
        steps = range(longest)
        below = [0.0] * longest
        for (label, sizes), color in zip(line.parts.items(), _PARTS):
            heights = [size / KB for size in sizes]
            axes.bar(
                steps[: len(heights)], heights, 0.9, below[: len(heights)], label=label, color=color
            )
            below = [low + more for low, more in zip(below, heights)]
        axes.axhline(line.buffer_bytes / KB, color="black", linestyle="--", linewidth=1.2)
        axes.set_title(line.title, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel("KB on chip")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _rows(drawing: Drawing) -> list[float]:
    """Distance of each box from the top; a cut adds some space."""
    heights = [0.0]
    for before, box in zip(drawing.boxes, drawing.boxes[1:], strict=False):
        heights.append(heights[-1] + (1.7 if box.part != before.part else 1.0))
    return heights


def _draw_graph(axes: Any, drawing: Drawing, rows: Sequence[float]) -> None:
    left, right, half = 0.0, 6.0, 0.3
    middle = (left + right) / 2
    for y, box in zip(rows, drawing.boxes, strict=True):
        axes.add_patch(_rectangle(left, y - half, right - left, 2 * half))
        axes.text(middle, y, box.label, ha="center", va="center", fontsize=8)
    for k, (before, box) in enumerate(zip(drawing.boxes, drawing.boxes[1:], strict=False)):
        if before.part != box.part:
            y = (rows[k] + rows[k + 1]) / 2
            axes.plot([_MARGIN, right + 0.4], [y, y], "--", color=_CUT, linewidth=1.3, zorder=0)
            axes.text(right + 0.4, y - 0.08, "cut", color=_CUT, fontsize=8, ha="right", va="bottom")
    for arrow in sorted(drawing.arrows, key=lambda arrow: arrow.score):
        start, end = rows[arrow.source], rows[arrow.target]
        color, width = _color(arrow.share), 1 + 3 * arrow.share
        head = {"arrowstyle": "-|>", "color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
        skips = arrow.target != arrow.source + 1
        if skips:  # around the left side; longer skips run further out
            x = max(_MARGIN + 0.5, left - 0.3 - 0.1 * (end - start))
            axes.plot([left, x, x], [start, start, end], color=color, linewidth=width)
            axes.annotate("", xy=(left, end), xytext=(x, end), arrowprops=head)
            at = x - 0.1, (start + end) / 2
        else:
            ends = (middle, start + half), (middle, end - half)
            axes.annotate("", xy=ends[1], xytext=ends[0], arrowprops=head)
            # Next to the first half of the arrow: a cut crosses its middle.
            at = middle + 0.15, min((start + end) / 2, start + half + 0.22)
        if arrow.score:
            side = "right" if skips else "left"
            text = f"{arrow.score:.2f}"
            axes.text(*at, text, color=color, fontsize=7, ha=side, va="center")
    axes.set_title(drawing.legend, fontsize=9, loc="left")
    axes.set_xlim(_MARGIN, right + 0.5)
    axes.set_ylim(rows[-1] + 1, -1)
    axes.axis("off")


def _draw_bars(axes: Any, drawing: Drawing, bars: Sequence[Bar], depth: float) -> None:
    total = sum(bar.size for bar in bars)
    shown = [Bar("together", total), *bars]
    buffer = drawing.buffer_bytes
    axes.barh(
        range(len(shown)),
        [bar.size / KB for bar in shown],
        0.7,
        color=[_BLAMED, *[_BAR] * len(bars)],
    )
    for k, bar in enumerate(shown):
        axes.text(
            bar.size / KB,
            k,
            f" {format_size(bar.size)}, {bar.size / buffer:.0%}",
            va="center",
            fontsize=8,
            # Over the line of the buffer, which would cross it.
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
    bottom = (
        max(depth, len(shown)) + 0.5
    )  # as high as the graph next to it, to limit the bars' thickness
    at = buffer / KB
    axes.plot([at, at], [-0.6, bottom], color="black", linestyle="--", linewidth=1.2, zorder=2)
    axes.text(at, -0.7, f"buffer {format_size(buffer)}", fontsize=8, ha="center", va="bottom")
    axes.set_yticks(range(len(shown)), [bar.label for bar in shown], fontsize=8)
    axes.set_ylim(bottom, -1.2)
    axes.set_xlim(0, 1.25 * max(total, buffer) / KB)
    axes.set_xlabel("KB of the on-chip buffer", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _rectangle(x: float, y: float, width: float, height: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor="#f6f8fa", edgecolor="#57606a", linewidth=0.8)


def _color(score: float) -> str:
    """From grey (not blamed) to red (blamed most)."""
    pairs = [(_CALM[k : k + 2], _BLAMED[k : k + 2]) for k in (1, 3, 5)]
    mixed = [round(int(a, 16) + (int(b, 16) - int(a, 16)) * score) for a, b in pairs]
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
