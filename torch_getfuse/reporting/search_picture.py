"""The picture of searches: the best plan so far against the plans tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch_getfuse.accelerator import MB
from torch_getfuse.errors import OptionError
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.reporting.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOGARITHMIC = 30  # from so many times the first plans on; below that the axis would have no marks

_OF_GROUPS = ("direct", "exact")
"""Searches that count the groups they look at: they build one plan of them."""


@dataclass(frozen=True, slots=True)
class Searched:
    """One search.

    Attributes:
        label: of the legend.
        history: (plans tried, DRAM access in bytes) whenever the best improved; then its end.
    """

    label: str
    history: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Panel:
    """Searches on one problem.

    Attributes:
        title: one line.
        searches: drawn one over the other.
        bound: no legal plan has less DRAM access, in bytes; 0 where nothing is known.
        optimal: whether a plan reaches the bound.
    """

    title: str
    searches: Sequence[Searched]
    bound: int = 0
    optimal: bool = False


def plan_panel(plan: PartitionPlan, title: str) -> Panel:
    """The stages of a plan's search, one after the other.

    A stage that tells no history, as the exact search, is a point at its end.

    Raises:
        OptionError: for a plan whose search was in another process, or did not take place.
    """
    if plan.claimed_by:
        raise OptionError(
            f"the plan comes from {plan.claimed_by}, which keeps no history "
            "of its search; plan with cache=False to see it"
        )
    searches, tried = [], 0
    for stage in plan.stages:
        if stage.dram_bytes is None:
            continue
        history = [(tried + plans, dram) for plans, dram in stage.history]
        tried += stage.plans
        searches.append(Searched(stage.method, [*history, (tried, stage.dram_bytes)]))
    if not tried:
        raise OptionError("nothing was searched for this plan, so there is no history to draw")
    return Panel(title, searches, plan.lower_bound_bytes, plan.proof == "optimal")


def search_figure(panels: Sequence[Panel]) -> Figure:
    """A panel below the other: steps down to the best plan, and the bound.

    Raises:
        GetfuseError: if matplotlib is not installed.
    """
    figure = new_figure(8, 3.8 * len(panels))

    from matplotlib.ticker import NullFormatter

    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels):
        for search in panel.searches:
            x = [max(plans, 1) for plans, _ in search.history]
            y = [dram / MB for _, dram in search.history]
            (line,) = axes.plot(x, y, drawstyle="steps-post", label=search.label)
            axes.plot(x[-1:], y[-1:], marker="o", color=line.get_color())
        if panel.bound:
            name = "optimum (proved)" if panel.optimal else "lower bound (proved)"
            axes.axhline(panel.bound / MB, color="0.35", linestyle=":", label=name)
        tried = [plans for search in panel.searches for plans, _ in search.history]
        if max(tried) > _LOGARITHMIC * min(tried):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.set_title(panel.title, fontsize=11)
        groups = [search.label for search in panel.searches if search.label in _OF_GROUPS]
        named = f" ({' and '.join(groups)}: groups)" if groups else ""
        axes.set_xlabel(f"plans tried{named}")
        axes.set_ylabel("best DRAM access of what\nis planned (MB per sample)")
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure
