"""docs/border-ranking.md, from what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tabulate import tabulate

from benchmarks.border_ranking.compare import SEARCHED, SECONDS, chosen_shares
from benchmarks.border_ranking.data import Row
from benchmarks.border_ranking.findings import Runs, assumptions, case_name, findings
from benchmarks.border_ranking.rankers import ORDERS, SPLITTERS
from benchmarks.border_ranking.train import SEEDS


def _table(rows: Sequence[Sequence[object]], heads: Sequence[str]) -> str:
    return str(tabulate(rows, headers=heads, tablefmt="pipe", disable_numparse=True))


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
        rows.append([case_name(case), f"{default['operators']:,}", bound, gap, *cells])
    heads = [f"{when}: {name}" for when in ("split", "10 s") for name in SPLITTERS]
    return _table(rows, ["graph, buffer", "operators", "bound MB", "default", *heads])


def plans_table(runs: Runs) -> str:
    rows = []
    for case in runs.cases():
        if plans := runs.fewest(case):
            cells = [runs.above(case, runs.at(case, name, plans)) for name in SPLITTERS]
            rows.append([case_name(case), f"{plans:,}", *cells])
    return _table(rows, ["graph, buffer", "plans", *SPLITTERS])


def built_table(runs: Runs) -> str:
    rows = []
    for case in runs.cases():
        cells = []
        for name in ORDERS:
            seconds = runs.median(case, "built", name, "seconds")
            gap = runs.above(case, runs.median(case, "built", name))
            star = "*" if seconds is not None and seconds >= SECONDS else ""
            cells.append(gap if seconds is None else f"{gap}{star} ({seconds:.1f} s)")
        cells += [runs.above(case, runs.median(case, "built and local", n)) for n in SEARCHED]
        default = runs.above(case, runs.median(case, "default"))
        rows.append([case_name(case), default, *cells])
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
            f"brackets the CPU time (`*`: stopped by it). `{SECONDS:g} s`: local search from that "
            "plan, repaired at random, to the same time in all. Per cent above the bound.",
            "",
            built_table(runs),
            "",
        ]
    )  # fmt: skip
