"""The page: claims, tables and plots from rows; no figure on it is typed in."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.reproduction import tables
from benchmarks.reproduction.claims import (
    FAILS,
    HOLDS,
    NAMES,
    OPEN,
    own_claims,
    paper_claims,
    search_name,
)
from benchmarks.reproduction.plots import draw_all
from benchmarks.reproduction.requests import EARLY, RULE, Mode
from benchmarks.reproduction.results import Results

_PROTOCOL = """\
1 byte per activation and weight. LBDF at `{first}` granularity is the paper's; `line`, what
line-buffer hardware allocates, is the second column. Searches run over single operators
(nothing merged), with the same budget of plans, the same seeds and the same random splitting for
every explainer. Explainers blame as many edges of a group as they do in the package; the split is
the paper's Algorithm 1 with its own rule for cuts with one valid side (`{rule}`). MB are 10⁶
bytes, KB 1024.

How to read a cell: `+1.2 % (0.0 to 3.5)` is the mean gap to the proved optimum and the least and
greatest of the seeds; `×0.98 (paper ×0.90)` is DRAM access as a share of the same column's baseline
(no explainer), ours and the paper's. Absolute MB do not transfer: the paper gives neither its
cost models' formulas nor the width of an element. `random edges` and `all edges` are controls:
the same split with edges drawn at random, and with every edge. An explainer that does no better
explains nothing. Local search comes in two readings. *Local search* is the
package's. *Local, as worded* is the least that the paper's sentence needs: an edit moves one
operator into a neighbouring group and is spent if that makes a cycle, random splitting cuts at a
position of the topological order, nothing is remembered (`benchmarks/reproduction/plain.py`).
The section on what the baseline needs goes from the one to the other step by step. A network
with `@onnx` has the operators of an ONNX file of the paper's time: SiLU as Sigmoid and Mul,
hard-swish as Add, Clip, Mul and Div; beside it the same network with torch's operators.\
"""


def write_page(results: Results, path: Path) -> str:
    """Write the page, its plots and a CSV of all cells; the claims and the state as text.

    Args:
        results: of a mode.
        path: of the page; plots and CSV go to a folder of its name beside it.
    """
    folder = path.with_suffix("")
    plots = draw_all(results, folder)
    for _, row in results.of_kind("explanation"):
        if row is not None:
            (folder / "fig4.svg").write_text(row["picture"], encoding="utf-8")
            plots["fig4"] = "An invalid group, the edges blamed, the cut, what fills the buffer"
    found = paper_claims(results)
    counted = Counter(claim.verdict for claim in found)
    summary = (
        f"{counted[HOLDS]} hold, {counted[FAILS]} do not hold, {counted[OPEN]} are not run yet"
    )
    claims = tables.claims_table(found)
    questions = tables.claims_table(own_claims(results), own=True)
    parts = [
        "# The paper, reproduced",
        "The evaluation of *Applying Graph Explanation to Operator Fusion* "
        "([arXiv 2501.00636](https://arxiv.org/abs/2501.00636)) with this implementation; "
        f"written by `{_command(results.mode)}`.",
        _state(results),
        "## The claims\n\nGET stands for the paper's graph explanation techniques: RG-, PG- and "
        f"GNNExplainer. Verdicts are computed from the rows of the tables below: {summary}.",
        claims,
        "What the paper does not ask: whether GETs help while a search is still far from its end, "
        "whether they beat the controls, and where the package's own default, `auto`, ends.",
        questions,
    ]
    if "ratios" in plots:
        parts.append(_image(folder, "ratios", plots))
    parts.append(
        "## Protocol\n\n" + _PROTOCOL.format(first=results.mode.granularities[0], rule=RULE)
    )
    for title, text in _sections(results):
        parts.append(f"## {title}\n\n{text}")
        for name, start in (("fig3", "Fig. 3"), ("fig4", "Fig. 4"), ("fig5", "Fig. 5")):
            if title.startswith(start) and name in plots:
                parts.append(_image(folder, name, plots))
    cells = tables.cell_rows(results)
    if cells:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cells.csv").write_text(_csv(cells), encoding="utf-8")
        parts.append(
            f"Every cell with its mean, least and greatest DRAM access, rectify rate and seconds: "
            f"[cells.csv]({folder.name}/cells.csv)."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return f"{claims}\n\n{questions}\n\n{_state(results)}"


def _command(mode: Mode) -> str:
    return {"full": "make paper", "quick": "make paper-quick"}.get(
        mode.name, f"python -m benchmarks.paper {mode.name}"
    )


def _state(results: Results) -> str:
    """How much has been run, for how long and on what."""
    mode, rows = results.mode, results.rows
    seeds = f"{mode.seeds} seeds" if mode.seeds > 1 else "1 seed"
    text = f"Mode `{mode.name}`: {seeds}, {len(rows)} of {len(results.requests)} runs finished"
    hours = Counter[str]()
    for row in rows.values():
        hours[row["machine"]] += row["wall"] / 3600
    if hours:
        told = (f"{spent:.2f} h on {machine}" for machine, spent in hours.most_common())
        text += f", together {'; '.join(told)}, one core per run"
    text += "."
    if mode.left_out:
        left = (f"{NAMES[name]} under {search_name(search)}" for search, name in mode.left_out)
        text += f" Left out of this mode: {'; '.join(left)}."
    if len(rows) < len(results.requests):
        text += f' What is missing stands as "{OPEN}"; the same command goes on with it.'
    return text


def _sections(results: Results) -> Iterator[tuple[str, str]]:
    mode = results.mode
    yield (
        "In short: mean gap to the optimum",
        "How much room each search leaves an explainer, over the networks of its table.\n\n"
        + tables.summary_table(results)
        + f"\n\nThe same runs, stopped after one in {EARLY} of their plans:\n\n"
        + tables.summary_table(results, EARLY),
    )
    if mode.data:
        yield (
            "Table I: fusion groups of the data",
            "Distinct groups per network, each judged under five buffers. Ours are in proportion "
            "to the paper's, as far as a network has as many.\n\n" + tables.samples_table(results),
        )
        yield "Fig. 3: valid groups against the buffer", tables.valid_table(results)
        yield (
            "Validity predictors",
            "Accuracy and F1 on the test part of the data (split by the structure of a group) and "
            "on networks that no predictor was trained on.\n\n" + tables.predictor_table(results),
        )
    for granularity in mode.granularities:
        column = "" if granularity == mode.granularities[0] else f" ({granularity})"
        if mode.table_2:
            for search, name in (
                ("local", "local search"),
                ("plain", "local search as worded"),
                ("nsga2", "NSGA-II"),
                ("random", "random search"),
            ):
                plans = 5000 // mode.divide
                yield (
                    f"Table II{column}: {name}, LBDF, 256 KB, {plans} plans",
                    "The last line of a cell is the maximum buffer usage over the seeds.\n\n"
                    + tables.search_table(results, search, "lbdf", granularity, 256),
                )
        yield from _small(results, "lbdf", granularity, column)
    if "brr" in mode.schemes:
        yield from _small(results, "brr", "line", "")
    optional: list[tuple[str, str, Callable[[Results], str]]] = []
    if mode.ladder:
        optional.append(
            (
                "What the baseline needs",
                "Local search without an explainer, from the paper's sentence to the package's, "
                "one step per line: an edit may merge and cut as well; the package's edits and "
                "memory of plans met; blocks of operators that some optimum keeps together.",
                tables.ladder_table,
            )
        )
    if "mobilenet_v2" in mode.table_34:
        optional += [
            (
                "Fig. 4: one invalid group explained",
                "Two inverted residuals of MobileNetV2 that do not fit 32 KB together.",
                tables.explanation_table,
            ),
            (
                "Fig. 5: budget",
                "Mean gap to the optimum of the best plan so far; LBDF, MobileNetV2 at 128 KB and "
                "EfficientNet-B3 at 256 KB.",
                tables.curve_table,
            ),
            (
                "Table V: rectify rate and seconds",
                "MobileNetV2, LBDF, 128 KB: share of the distinct invalid groups met that an "
                "explanation's own cuts turned into valid groups only, and seconds per search.",
                tables.rates_table,
            ),
        ]
    for title, text, table in optional:
        yield title, f"{text}\n\n{table(results)}"


def _small(
    results: Results, scheme: str, granularity: str, column: str
) -> Iterator[tuple[str, str]]:
    """Tables III and IV of one cost model."""
    plans = 2000 // results.mode.divide
    for number, search, name in (
        ("III", "local", "local search"),
        ("III", "plain", "local search as worded"),
        ("IV", "random", "random search"),
    ):
        if scheme == "brr" and search == "plain":
            continue
        yield (
            f"Table {number}{column}: {name}, {scheme.upper()}, 128 KB, {plans} plans",
            tables.search_table(results, search, scheme, granularity, 128),
        )


def _image(folder: Path, name: str, plots: dict[str, str]) -> str:
    return f"![{plots[name]}]({folder.name}/{name}.svg)"


def _csv(rows: list[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
