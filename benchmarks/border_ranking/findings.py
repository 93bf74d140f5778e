"""What was measured of the orders, in sentences that the rows decide."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.border_ranking.compare import SEARCHED, SECONDS
from benchmarks.border_ranking.data import Row
from benchmarks.border_ranking.graphs import TEST, TRAIN, VALIDATION, WIDE
from benchmarks.border_ranking.model import HIDDEN, LAYERS
from benchmarks.border_ranking.rankers import ORDERS, SPLITTERS
from benchmarks.border_ranking.train import PARTS

Case = tuple[str, int]


class Runs:
    """The rows of the comparison by case; medians over the seeds that were run."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            if row["what"] != "share":
                key = (row["graph"], row["kb"], row["what"], row["ranker"])
                self._rows.setdefault(key, []).append(row)

    def of(self, case: Case, what: str, ranker: str = "") -> list[Row]:
        return self._rows.get((*case, what, ranker), [])

    def cases(self) -> list[Case]:
        """The cases whose default plan is there, in the order of the comparison."""
        return [case for case in WIDE if self.of(case, "default")]

    def median(
        self, case: Case, what: str, ranker: str = "", field: str = "dram_bytes"
    ) -> float | None:
        values = [row[field] for row in self.of(case, what, ranker)]
        return statistics.median(values) if values else None

    def fewest(self, case: Case) -> int:
        """Plans that the local search of every run of the split got to."""
        return min((r["plans"] for s in SPLITTERS for r in self.of(case, "split", s)), default=0)

    def at(self, case: Case, ranker: str, plans: int) -> float | None:
        """Median bytes of the local search after so many plans, the first of which is the split."""
        found = [
            min([row["direct_bytes"], *(cost for k, cost in row["history"] if k <= plans)])
            for row in self.of(case, "split", ranker)
        ]
        return statistics.median(found) if found else None

    def cut_short(self, case: Case, ranker: str) -> bool:
        """Whether the split was not finished in its time, by any seed."""
        return any(row["direct_stopped"] for row in self.of(case, "split", ranker))

    def above(self, case: Case, value: float | None) -> str:
        """Per cent above the lower bound of the default planner."""
        bound = self.of(case, "default")[0]["lower_bound_bytes"]
        return "-" if value is None else f"{100 * (value / bound - 1):.2f}"


class Verdict(NamedTuple):
    """One way beside another over all cases: ``better``, ``worse``, ``mixed`` or ``equal``."""

    word: str
    text: str


def beside(runs: Runs, one: tuple[str, ...], other: tuple[str, ...]) -> Verdict:
    """In how many cases ``one`` (arguments of :meth:`Runs.median`) moves less, and how much.

    Better, or worse, is what is so in more cases than not and on average.
    """
    ratios = []
    for case in runs.cases():
        a, b = runs.median(case, *one), runs.median(case, *other)
        if a is not None and b is not None:
            ratios.append(a / b)
    if not ratios:
        return Verdict("not measured", "not measured")
    less, more = sum(r < 1 for r in ratios), sum(r > 1 for r in ratios)
    mean = 100 * (statistics.geometric_mean(ratios) - 1)
    word = (
        "better" if less > more and mean < 0 else "worse" if more > less and mean > 0 else "mixed"
    )
    word = word if less + more else "equal"
    return Verdict(
        word,
        f"**{word}**: less DRAM access in {less} of {len(ratios)} cases, more in {more}; "
        f"{mean:+.1f} % on average (geometric)",
    )


def case_name(case: Case) -> str:
    return f"{case[0].partition(':')[2] or case[0]}, {case[1]} KB"


def _beats(verdicts: Mapping[str, Verdict]) -> str:
    """Whom it beats and whom not, in words."""
    won = [name for name, verdict in verdicts.items() if verdict.word == "better"]
    lost = [f"{name} ({v.word})" for name, v in verdicts.items() if v.word != "better"]
    parts = [f"beats {', '.join(won)}" if won else "", f"does not beat {', '.join(lost)}"]
    return "; ".join(part for part in (parts if lost else parts[:1]) if part)


def findings(trained: Sequence[Row], runs: Runs) -> list[str]:
    """What holds, in sentences that the rows decide."""

    def area(ranker: str) -> float:
        rows = [r for r in trained if r.get("on") not in (None, *PARTS) and r["ranker"] == ranker]
        return statistics.mean(row["auc"] for row in rows)

    gnn, built, default = ("split", "gnn"), ("built", "gnn"), ("default",)
    split = {name: beside(runs, gnn, ("split", name)) for name in SPLITTERS[:-1]}
    split["the default planner"] = beside(runs, gnn, default)
    orders = {name: beside(runs, built, ("built", name)) for name in ORDERS[:-1]}
    lines = [
        f"In short: as what says where the recursive split may cut, the GNN {_beats(split)}. As an "
        f"order to build a plan by, it {_beats(orders)}.",
        f"Telling borders in families never trained on: area under the ROC curve "
        f"{area('gnn'):.3f} by the GNN, {area('edge'):.3f} by the regression on an edge's own "
        f"features, {area('size'):.3f} by the size of the tensor (mean over the families).",
    ]
    for name in SPLITTERS[:-1]:
        alone = beside(runs, (*gnn, "direct_bytes"), ("split", name, "direct_bytes"))
        lines.append(f"Recursive split alone, GNN beside `{name}`: {alone.text}.")
    for name, found in split.items():
        shown = f"`{name}`" if name in SPLITTERS else name
        lines.append(f"Split and local search, {SECONDS:g} s, GNN beside {shown}: {found.text}.")
    for name, found in orders.items():
        lines.append(f"Plans built by the order alone, GNN beside `{name}`: {found.text}.")
    for name in SEARCHED:
        found = beside(runs, ("built and local", name), default)
        lines.append(
            f"Built by `{name}`, then local search, {SECONDS:g} s, beside the default planner: "
            f"{found.text}."
        )
    lines += _without_model(runs)
    ranking = [r["ranking"] for c in runs.cases() for r in runs.of(c, *gnn)]
    if ranking:
        lines.append(
            f"Features and inference of the GNN take {min(ranking):.2f} to {max(ranking):.2f} s of "
            "CPU for a graph, counted in its time."
        )
    return lines


def _without_model(runs: Runs) -> Iterator[str]:
    """Where an order that needs no model, and local search, leave the default planner behind."""
    found = []
    for case in runs.cases():
        default = runs.median(case, "default")
        ends = [runs.median(case, "built and local", name) for name in ("size", "saved")]
        known = [end for end in ends if end is not None]
        if default is not None and known and min(known) < default:
            found.append(
                f"{case_name(case)} ({runs.above(case, min(known))} instead of "
                f"{runs.above(case, default)} % above the bound)"
            )
    if found:
        yield (
            "Without any model, the better of `size` and `saved` with local search moves less than "
            f"the default planner on {'; '.join(found)}."
        )


def assumptions(trained: Sequence[Row], runs: Runs) -> Iterator[str]:
    """What the measurement took for granted."""
    asked = next(row for row in trained if "asked" in row)
    counts = ", ".join(
        f"{row['samples']} plans of {row['graphs']} graphs for {row['part']}"
        for row in trained
        if "samples" in row
    )
    taken = [row["seconds"] for case in runs.cases() for row in runs.of(case, "default")]
    if taken:
        yield (
            f"LBDF by lines, one byte per activation and per weight. Every search but the default "
            f"planner's ends by the clock, after {SECONDS:g} s of CPU time of one thread, for "
            "counted steps know nothing of what a model takes. The default planner counts steps, "
            f"so that busy machines give the same plan: it took {min(taken):.1f} to "
            f"{max(taken):.1f} s. torch is imported and weights are loaded before."
        )
    yield (
        "Labels are the borders of plans that the default planner proved optimal in 10 s: "
        f"{asked['optimal']} of {asked['asked']} that were asked for; {counts}. "
        "**An optimum is not unique**: other plans of the same cost have other borders, so a "
        "prediction may be as good as its label and count as wrong. Edges inside a block of "
        "operators that some optimum keeps "
        "together are left out."
    )
    yield (
        f"Training: {', '.join(TRAIN)}; random networks without blocks of DenseNet's or "
        "Inception's kind; randomly wired cells. Validation (when training stops, share of edges): "
        f"{', '.join(VALIDATION)}; every eighth random network. Test: {', '.join(TEST)}; narrow "
        "graphs of the generator whose wide ones are compared. No family stands in two parts, and "
        "neither the graphs compared nor their families in training or validation. Nothing was "
        "tuned on them."
    )
    yield (
        "Graphs that can be proved are narrower than those compared: what holds of their borders "
        "need not hold there."
    )
    rows = [row for row in trained if row.get("trained") == "gnn"]
    yield (
        f"The GNN: {LAYERS} residual GINE layers of width {HIDDEN} in both directions and an edge "
        "head; the validity predictor's features of operators, and of edges the size of the "
        "tensor, its readers, the length of the skip, and weights and needs of both ends; sizes as "
        f"shares of the buffer. {len(rows)} trainings with fixed seeds, "
        f"{statistics.median(row['seconds'] for row in rows):.0f} s of CPU each (torch "
        f"{rows[0]['torch']}). The weights are not in the repository."
    )
