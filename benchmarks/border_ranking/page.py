"""docs/border-ranking.md, from what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tabulate import tabulate

from benchmarks.border_ranking.compare import SEARCHED, SECONDS, chosen_shares
from benchmarks.border_ranking.data import Row
from benchmarks.border_ranking.graphs import TEST, TRAIN, VALIDATION, WIDE
from benchmarks.border_ranking.model import HIDDEN, LAYERS
from benchmarks.border_ranking.rankers import ORDERS, SPLITTERS
from benchmarks.border_ranking.train import PARTS, SEEDS

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


def beside(runs: Runs, one: tuple[str, ...], other: tuple[str, ...]) -> str:
    """In how many cases ``one`` (arguments of :meth:`Runs.median`) moves less, and how much."""
    ratios = []
    for case in runs.cases():
        a, b = runs.median(case, *one), runs.median(case, *other)
        if a is not None and b is not None:
            ratios.append(a / b)
    if not ratios:
        return "not measured"
    less, more = sum(r < 1 for r in ratios), sum(r > 1 for r in ratios)
    mean = 100 * (statistics.geometric_mean(ratios) - 1)
    word = "better" if less > more and mean < 0 else "worse" if more > less and mean > 0 else "even"
    return (
        f"**{word}**: less DRAM access in {less} of {len(ratios)} cases, more in {more}; "
        f"{mean:+.1f} % on average (geometric)"
    )


def _table(rows: Sequence[Sequence[object]], heads: Sequence[str]) -> str:
    return str(tabulate(rows, headers=heads, tablefmt="pipe", disable_numparse=True))


def _name(case: Case) -> str:
    return f"{case[0].partition(':')[2] or case[0]}, {case[1]} KB"


def edge_table(trained: Sequence[Row]) -> str:
    """Accuracy and area under the curve, median over the seeds, by part and family."""
    scored = [row for row in trained if "auc" in row]
    rankers = ("majority", "size", "edge", "gnn")
    rows = []
    for part in dict.fromkeys(row["on"] for row in scored):
        cells = []
        for name in rankers:
            alike = [row for row in scored if row["on"] == part and row["ranker"] == name]
            accuracy = statistics.median(row["accuracy"] for row in alike)
            area = statistics.median(row["auc"] for row in alike)
            cells.append(f"{100 * accuracy:.1f} / {area:.3f}")
        rows.append([part, f"{alike[0]['edges']:,}", f"{100 * alike[0]['borders']:.0f}", *cells])
    return _table(rows, ["on", "edges", "borders %", *rankers])


def split_table(runs: Runs) -> str:
    rows = []
    for case in runs.cases():
        default = runs.of(case, "default")[0]
        bound = f"{default['lower_bound_bytes'] / 1e6:.2f}"
        cells = [
            runs.above(case, runs.median(case, "split", name, field))
            + ("*" if field == "direct_bytes" and runs.cut_short(case, name) else "")
            for field in ("direct_bytes", "dram_bytes")
            for name in SPLITTERS
        ]
        gap = runs.above(case, default["dram_bytes"])
        rows.append([_name(case), f"{default['operators']:,}", bound, gap, *cells])
    heads = [f"{when}: {name}" for when in ("split", "10 s") for name in SPLITTERS]
    return _table(rows, ["graph, buffer", "operators", "bound MB", "default", *heads])


def plans_table(runs: Runs) -> str:
    rows = []
    for case in runs.cases():
        if plans := runs.fewest(case):
            cells = [runs.above(case, runs.at(case, name, plans)) for name in SPLITTERS]
            rows.append([_name(case), f"{plans:,}", *cells])
    return _table(rows, ["graph, buffer", "plans", *SPLITTERS])


def built_table(runs: Runs) -> str:
    rows = []
    for case in runs.cases():
        cells = []
        for name in ORDERS:
            seconds = runs.median(case, "built", name, "seconds")
            gap = runs.above(case, runs.median(case, "built", name))
            cells.append(gap if seconds is None else f"{gap} ({seconds:.1f} s)")
        cells += [runs.above(case, runs.median(case, "built and local", n)) for n in SEARCHED]
        default = runs.above(case, runs.median(case, "default"))
        rows.append([_name(case), default, *cells])
    heads = [*ORDERS, *(f"10 s: {name}" for name in SEARCHED)]
    return _table(rows, ["graph, buffer", "default", *heads])


def share_table(rows: Sequence[Row]) -> str:
    chosen = chosen_shares(rows)
    shares = [row for row in rows if row["what"] == "share"]
    return _table(
        [
            [row["ranker"], f"{row['share']:g}", f"{row['mean_gap']:.2f}",
             "used" if chosen[row["ranker"]] == row["share"] else ""]
            for row in shares
        ],
        ["ranker", "share of the edges", "mean gap %", ""],
    )  # fmt: skip


def findings(trained: Sequence[Row], runs: Runs) -> list[str]:
    """What holds, in sentences that the rows decide."""

    def area(ranker: str) -> float:
        rows = [r for r in trained if r.get("on") not in (None, *PARTS) and r["ranker"] == ranker]
        return statistics.mean(row["auc"] for row in rows)

    gnn = ("split", "gnn")
    lines = [
        f"Telling borders in families never trained on: area under the ROC curve "
        f"{area('gnn'):.3f} by the GNN, {area('edge'):.3f} by the regression on an edge's own "
        f"features, {area('size'):.3f} by the size of the tensor (mean over the families).",
    ]
    for other in SPLITTERS[:-1]:
        alone = beside(runs, (*gnn, "direct_bytes"), ("split", other, "direct_bytes"))
        lines.append(f"Recursive split alone, GNN beside `{other}`: {alone}.")
        lines.append(
            f"Split and local search, {SECONDS:g} s, GNN beside `{other}`: "
            f"{beside(runs, gnn, ('split', other))}."
        )
    lines.append(f"The same beside the default planner: {beside(runs, gnn, ('default',))}.")
    for other in ORDERS[:-1]:
        lines.append(
            f"Plans built by the order alone, GNN beside `{other}`: "
            f"{beside(runs, ('built', 'gnn'), ('built', other))}."
        )
    for name in ("gnn", "saved"):
        found = beside(runs, ("built and local", name), ("default",))
        lines.append(f"Built by `{name}`, then local search, beside the default planner: {found}.")
    ranking = [r["ranking"] for c in runs.cases() for r in runs.of(c, *gnn)]
    if ranking:
        lines.append(
            f"Features and inference of the GNN take {min(ranking):.2f} to {max(ranking):.2f} s of "
            "CPU for a graph, counted in its time."
        )
    return lines


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
        "**An optimum is not unique**: other plans of the same cost have other borders, so a prediction may be as good as its "
        "label and count as wrong. Edges inside a block of operators that some optimum keeps "
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


def page(rows: Sequence[Row]) -> str:
    """docs/border-ranking.md, from the rows of ``train.jsonl`` and ``compare.jsonl``."""
    compared = [row for row in rows if "what" in row]
    trained = [row for row in rows if "what" not in row]
    runs = Runs(compared)
    return "\n".join(
        [
            "# Borders named by a GNN",
            "",
            "Written by `python -m benchmarks.border_ranking page` from what it measured. The "
            "question: where a graph is too wide for a proof, does a GNN that was trained on "
            "proved plans of other graphs name better places to cut than every edge (`all`) or "
            "edges drawn at random, in equal time?",
            "",
            "## Result",
            "",
            *(f"- {line}" for line in findings(trained, runs)),
            "",
            "## Assumptions",
            "",
            *(f"- {line}" for line in assumptions(trained, runs)),
            "",
            "## Edges",
            "",
            "Accuracy in % / area under the ROC curve, over all edges of a part; of the GNN the "
            f"median of {len(SEEDS)} trainings. `majority` gives every edge the class that is more "
            "frequent there, `size` calls tensors below a size borders (the size that tells most "
            "training edges right), `edge` is the regression. Below the parts: the families of "
            "the test part.",
            "",
            edge_table(trained),
            "",
            "## Share of edges that a ranker names",
            "",
            "Mean gap of the recursive split to the proved optimum on the validation graphs at "
            "256 KB. Each ranker has the share that is best for it there.",
            "",
            share_table(compared),
            "",
            "## Recursive split and local search",
            "",
            f"Per cent above the default planner's lower bound. `default`: `method=\"auto\"` in "
            f"{SECONDS:g} s. `split`: Algorithm 1 and its polish with the ranker's edges, half of "
            "the time at most for the former (`*`: not finished then by some seed, and the rest "
            f"split at random). `{SECONDS:g} s`: local search from that plan, with "
            f"the split as its repair, until {SECONDS:g} s of CPU time are over in all. Median of "
            f"{len(SEEDS)} seeds (of the search, of the draw, of the training).",
            "",
            split_table(runs),
            "",
            "At an equal number of plans, as many as every run got to:",
            "",
            plans_table(runs),
            "",
            "## Plans built by an order alone",
            "",
            "Edges are gone through from the least likely border to the likeliest, and the groups "
            "at both ends are merged where that is valid and closes no cycle; then neighbours that "
            "fit together, the pair that saves most first. `size` merges at the largest tensor "
            "first; `saved` has no order and merges the pair that saves most from the start. In "
            f"brackets the CPU time. `{SECONDS:g} s`: local search from that plan, repaired at "
            "random, to the same time in all. Per cent above the bound.",
            "",
            built_table(runs),
            "",
        ]
    )  # fmt: skip
