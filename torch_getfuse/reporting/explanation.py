"""Why operators do not fit together, as an object that prints and exports.

Text formats use human-readable sizes (1024-based), data formats integer bytes.
:mod:`torch_getfuse.explain_graph` computes the explanation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch_getfuse.accelerator import format_activations, format_size, format_width
from torch_getfuse.atomic_files import replace_text
from torch_getfuse.errors import OptionError
from torch_getfuse.partition.cost.scheme import CostTerm, Dram
from torch_getfuse.reporting.blame import Blame, Cut, GroupEdge, dram_dict, term_text
from torch_getfuse.reporting.export import (
    MARKDOWN,
    Style,
    compact,
    counted,
    features,
    plain,
)
from torch_getfuse.reporting.pictures import TERMS, Arrow, Bar, Box, Drawing, save_picture, to_dot
from torch_getfuse.reporting.printed import Printed
from torch_getfuse.reporting.suffixes import EXPLANATION, PICTURES, known_suffix
from torch_getfuse.terminal import Mark, Marked, share
from torch_getfuse.widths import Width

SCHEMA_VERSION = 1

CONTROLS = ("random", "all")

_EDGES = 16
_CROSSING = 6


class _Page(Protocol):
    """A report, which stands above this module: it shows explanations."""

    def to_html(self, explanation: Explanation | None = None) -> str: ...


@dataclass(frozen=True)
class Explanation(Printed):
    """The answer to "why do these operators not fit together?".

    Attributes:
        operators: names of the group's operators, in topological order.
        added: those of them that were not requested; they are on a path between others.
        unfusable: those of them that do not fit even alone.
        obstacles: other reasons why this is not a group, one sentence each.
        scheme, granularity: the cost model; granularity is ``None`` for BRR, which has none.
        activation_bytes, weight_bytes: element widths; ``None``: as stored.
        align_channels: channels of stored tensors are padded to a multiple of it.
        buffer_bytes: the on-chip buffer ``B``.
        demand_bytes: ``F_b``; ``None`` if the scheme has no schedule for the group.
        valid: ``F_b < B``, and nothing in ``unfusable`` or ``obstacles``.
        probability: probability of ``F_b < B`` by the GNN; ``None`` if no explainer uses it.
        untrained: the range that the GNN was trained for, if the question is outside; else empty.
        terms: the terms that sum to the demand, largest first.
        dram: DRAM access of the group if it fitted, its weights once, in bytes per sample.
        edges: every edge inside the group.
        blames: one per explainer; empty if the group is valid or has no edge.
        cut: ``None`` if the group is valid or a single operator.
        fingerprint: fingerprint of the operator graph.
        model: what people call the model; empty for an operator graph alone.
        report: plans the same model with the same options; ``None`` where the explanation is of
            an operator graph alone.
    """

    operators: tuple[str, ...]
    added: tuple[str, ...]
    unfusable: tuple[str, ...]
    obstacles: tuple[str, ...]
    scheme: str
    granularity: str | None
    activation_bytes: Width | None
    weight_bytes: Width | None
    align_channels: int
    buffer_bytes: int
    demand_bytes: int | None
    valid: bool
    probability: float | None
    untrained: str
    terms: tuple[CostTerm, ...]
    dram: Dram
    edges: tuple[GroupEdge, ...]
    blames: tuple[Blame, ...]
    cut: Cut | None
    fingerprint: str
    model: str = ""
    report: Callable[[], _Page] | None = field(default=None, compare=False, repr=False)

    @property
    def gap_bytes(self) -> int | None:
        """Demand minus buffer size; the group fits only if this is negative."""
        return None if self.demand_bytes is None else self.demand_bytes - self.buffer_bytes

    @property
    def added_dram_bytes(self) -> int:
        """Feature bytes that the cut moves to and from DRAM, minus those of the whole group."""
        if self.cut is None:
            return 0
        return features(self.cut.dram) - features(self.dram)

    @property
    def headline(self) -> str:
        """How many operators, under which buffer, and whether they fit, by how much not."""
        return f"{_title(self)}: {_verdict(self)}"

    @property
    def shown_blames(self) -> tuple[Blame, ...]:
        """Those that count: without the controls, if there are others."""
        return tuple(b for b in self.blames if b.explainer not in CONTROLS) or self.blames

    @property
    def mean_scores(self) -> tuple[float, ...]:
        """Per edge, the mean of its scores over :attr:`shown_blames`; 0 where one names it not."""
        scores = [0.0] * len(self.edges)
        for blame in self.shown_blames:
            for edge, score in blame.edges:
                scores[edge] += score
        return tuple(score / max(len(self.shown_blames), 1) for score in scores)

    # -- text forms -----------------------------------------------------------------------

    _opened = 2

    def parts(self, style: Style) -> list[str]:
        """Headings, tables and paragraphs in a text format."""
        return _parts(self, style)

    def __repr__(self) -> str:
        what = counted(len(self.operators), "operator")
        return f"Explanation({what}, {_verdict(self)}, {format_size(self.buffer_bytes)})"

    def to_markdown(self) -> str:
        """Headings and pipe tables."""
        return "\n\n".join(_parts(self, MARKDOWN)) + "\n"

    def to_html(self) -> str:
        """The page of :meth:`Report.to_html` with this explanation; plans the model for it.

        Raises:
            OptionError: for an explanation of an operator graph alone.
        """
        if self.report is None:
            raise OptionError(
                "the page shows a plan as well, and this explanation knows no model: "
                "torch_getfuse.report(model, x).to_html(explanation) makes it"
            )
        return self.report().to_html(self)

    def to_dot(self) -> str:
        """The group's operator graph in the DOT language."""
        return to_dot(self.drawing())

    def drawing(self) -> Drawing:
        """The group's operator graph and its terms, for drawing.

        The number of an edge is :attr:`mean_scores`, its colour the share of the highest one.
        """
        parts = [part.operators for part in self.cut.parts] if self.cut else [self.operators]
        order = {name: k for k, name in enumerate(name for part in parts for name in part)}
        scores = self.mean_scores
        most = max(scores, default=0.0) or 1.0
        cut = set(self.cut.edges) if self.cut else set()
        return Drawing(
            title=f"{self.model}: {self.headline}" if self.model else self.headline,
            legend=_legend(self.shown_blames),
            boxes=tuple(Box(name, k) for k, part in enumerate(parts) for name in part),
            arrows=tuple(
                Arrow(order[edge.producer], order[edge.consumer], score, score / most, k in cut)
                for k, (edge, score) in enumerate(zip(self.edges, scores, strict=True))
            ),
            bars=tuple(Bar(term_text(term), term.bytes) for term in self.terms),
            buffer_bytes=self.buffer_bytes,
        )

    # -- data forms -----------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values; sizes are integer bytes."""
        return {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "model": self.model or None,
            "scheme": self.scheme,
            "granularity": self.granularity,
            "activation_bytes": self.activation_bytes,
            "weight_bytes": self.weight_bytes,
            "align_channels": self.align_channels,
            "operators": list(self.operators),
            "added": list(self.added),
            "unfusable": list(self.unfusable),
            "obstacles": list(self.obstacles),
            "valid": self.valid,
            "predicted_probability": self.probability,
            "predictor_trained_for": self.untrained or None,
            "demand_bytes": self.demand_bytes,
            "buffer_bytes": self.buffer_bytes,
            "gap_bytes": self.gap_bytes,
            "terms": [
                {
                    "kind": term.kind,
                    "name": term.name,
                    "units": term.units,
                    "unit_bytes": term.unit_bytes,
                    "bytes": term.bytes,
                }
                for term in self.terms
            ],
            **dram_dict(self.dram),
            "explainers": [blame.to_dict(self.edges) for blame in self.blames],
            "cut": self.cut
            and {
                **self.cut.to_dict(self.edges),
                "added_feature_bytes": self.added_dram_bytes,
            },
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def save(self, path: str | Path) -> None:
        """Write the format given by the suffix: .txt, .json, .md, .dot, .html, .svg or .png.

        Raises:
            OptionError: for another suffix, or as :meth:`to_html`.
            GetfuseError: for a picture if matplotlib is not installed.
            FileError: if the file cannot be written.
        """
        suffix = known_suffix(path, "an explanation", EXPLANATION)
        if suffix in PICTURES:
            save_picture(self.drawing(), path)
        else:
            replace_text(path, _FORMS[suffix](self))


_FORMS: Mapping[str, Callable[[Explanation], str]] = {
    ".txt": lambda explanation: explanation.render(plain()) + "\n",
    ".json": lambda explanation: explanation.to_json() + "\n",
    ".md": Explanation.to_markdown,
    ".dot": Explanation.to_dot,
    ".html": Explanation.to_html,
}


# -- text ---------------------------------------------------------------------------------


def _parts(why: Explanation, style: Style) -> list[str]:
    parts = [style.heading(why.headline)]
    parts.append(style.table(_facts(why), (), "ll", (1,)))
    if not why.valid:
        parts += [style.heading("What fills the buffer"), _term_table(why, style)]
    if why.blames:
        parts += [style.heading("Edges to blame (0 or blank: the explainer's least, 1: its best)")]
        parts += [_edge_table(why, style), _blame_table(why, style)]
    if why.cut is not None:
        parts += [style.heading(f"Where the recursive split cuts (edges: {why.cut.by})")]
        parts += [_part_table(why.cut, why.buffer_bytes, style)]
        parts += [style.paragraph(_cost(why, why.cut))]
    return parts


def _legend(blames: Sequence[Blame]) -> str:
    """What the numbers and colours of the edges are."""
    names = ", ".join(blame.explainer for blame in blames)
    return f"edges: {'mean blame of' if len(blames) > 1 else 'blame by'} {names}" if names else ""


def _title(why: Explanation) -> str:
    return f"{counted(len(why.operators), 'operator')} under a buffer of " + format_size(
        why.buffer_bytes
    )


def _verdict(why: Explanation) -> str:
    gap = why.gap_bytes
    if why.valid and gap is not None:
        return f"fits, {format_size(-gap)} of room left"
    if gap is None:
        return "no schedule"
    if gap > 0:
        return f"{format_size(gap)} too much"
    return "full to the last byte" if gap == 0 else "no group"


def _facts(why: Explanation) -> list[list[str]]:
    first, last = why.operators[0], why.operators[-1]
    rows = [["network", why.model]] if why.model else []
    rows += [["operators", first if first == last else f"{first} .. {last}"]]
    if why.added:
        rows.append(["added", f"{', '.join(why.added)}: on a path between the requested operators"])
    if why.demand_bytes is None:
        demand = f"none: {why.scheme} has no schedule for this group"
    else:
        part = why.demand_bytes / why.buffer_bytes
        demand = share(
            why.demand_bytes,
            why.buffer_bytes,
            f"{format_size(why.demand_bytes)} ({part:.1%}); a group must stay below the buffer",
        )
    rows.append(["demand", demand])
    rows += [["obstacle", Marked(obstacle, Mark.OVER)] for obstacle in why.obstacles]
    if why.probability is not None:
        verdict = f"valid with probability {why.probability:.3f}: {_judged(why, why.probability)}"
        rows.append(["GNN", verdict])
    unit = f", granularity {why.granularity}" if why.granularity else ""
    rows.append(
        [
            "assumptions",
            f"scheme {why.scheme}{unit}, "
            f"{format_activations(why.activation_bytes, why.align_channels)}, "
            f"{format_width(why.weight_bytes)}, one sample at a time",
        ]
    )
    return rows


def _judged(why: Explanation, probability: float) -> str:
    """Whether the predictor is right; it predicts ``F_b < B`` only, not obstacles."""
    gap = why.gap_bytes
    if (probability > 0.5) == (gap is not None and gap < 0):
        return "right"
    if why.untrained:
        return f"wrong, but it was trained for {why.untrained} only"
    return "wrong"


def _term_table(why: Explanation, style: Style) -> str:
    rows = [
        [term_text(term), format_size(term.bytes), f"{term.bytes / why.buffer_bytes:.1%}"]
        for term in why.terms[:TERMS]
    ]
    rest = sum(term.bytes for term in why.terms[TERMS:])
    if rest:
        left = counted(len(why.terms) - TERMS, "smaller term")
        rows.append([left, format_size(rest), f"{rest / why.buffer_bytes:.1%}"])
    if not rows:
        return f"{why.scheme} has no schedule for this group, so nothing to add up."
    total = sum(term.bytes for term in why.terms)
    rows.append(["together", format_size(total), share(total, why.buffer_bytes)])
    return style.table(rows, ("", "bytes", "of the buffer"), "lrr", (0,))


def _edge_table(why: Explanation, style: Style) -> str:
    scores = [dict(blame.edges) for blame in why.blames]
    named = {edge for blame in scores for edge in blame}
    mean = why.mean_scores
    best = sorted(named, key=lambda edge: (-mean[edge], edge))
    several = len(why.shown_blames) > 1
    cut = set(why.cut.edges) if why.cut else set()
    rows = [
        [
            str(why.edges[k]),
            format_size(why.edges[k].tensor_bytes),
            format_size(why.edges[k].held_bytes),
            *(f"{score[k]:.2f}" if k in score else "" for score in scores),
            *([f"{mean[k]:.2f}"] if several else []),
            "cut" if k in cut else "",
        ]
        for k in best[:_EDGES]
    ]
    if len(best) > _EDGES:
        rows.append([f"{len(best) - _EDGES} more", *[""] * (3 + len(scores) + several)])
    short = [blame.explainer.removesuffix("explainer") for blame in why.blames]
    heads = (*short, "mean") if several else short
    align = "lrr" + "r" * len(heads) + "r"
    return style.table(rows, ("edge", "tensor", "held", *heads, ""), align, (0,))


def _blame_table(why: Explanation, style: Style) -> str:
    rows = [
        [
            blame.explainer,
            f"{blame.seconds * 1000:.1f} ms",
            "leave an invalid part"
            if blame.parts is None or blame.dram_bytes is None
            else f"{counted(blame.parts, 'part')}, {format_size(blame.dram_bytes)} of DRAM access",
        ]
        for blame in why.blames
    ]
    return style.table(rows, ("explainer", "time", "its edges alone"), "lrl", (0, 2))


def _part_table(cut: Cut, buffer_bytes: int, style: Style) -> str:
    rows = []
    for k, part in enumerate(cut.parts):
        name = compact(part.operators)
        used = part.buffer_bytes
        rows.append(
            [
                str(k),
                name if part.fits else Marked(f"{name}: unfusable", Mark.OVER),
                "none" if used is None else format_size(used),
                "" if used is None else share(used, buffer_bytes),
                *map(format_size, part.dram),
            ]
        )
    headers = ("part", "operators", "buffer", "share", "read", "write", "weights")
    return style.table(rows, headers, "llrrrrr", below=(1,))


def _cost(why: Explanation, cut: Cut) -> str:
    before, after = features(why.dram), features(cut.dram)
    named = [f"{name} ({format_size(size)})" for name, size in cut.crossing.items()]
    more = len(named) - _CROSSING
    tensors = ", ".join(named[:_CROSSING]) + (f" and {more} more" if more > 0 else "")
    weights = "the weights are read once either way"
    if cut.dram.weight != why.dram.weight:
        weights = (
            f"weights {format_size(cut.dram.weight)}, against {format_size(why.dram.weight)} once"
        )
    return (
        f"Cost: the parts move {format_size(after)} of features to and from DRAM, the group would "
        f"move {format_size(before)}: {format_size(after - before)} more, for what the cut sends "
        f"through DRAM: {tensors or 'nothing'}; {weights}."
    )
