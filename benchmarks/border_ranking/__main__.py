"""Whether a GNN that names the borders of the optimum helps where no proof is in reach.

    python -m benchmarks.border_ranking plans     # optimal plans of many graphs, proved (minutes)
    python -m benchmarks.border_ranking train     # the GNN, three seeds; the baselines (minutes)
    python -m benchmarks.border_ranking compare   # on the wide graphs, in equal time (an hour)
    python -m benchmarks.border_ranking page      # docs/border-ranking.md from what was measured

``plans`` and ``compare`` go on where they were stopped; ``all`` does one after the other.
Everything is kept in ``--folder`` (``runs/border_ranking``); the rows that the page is made of are
written beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.border_ranking.compare import compare
from benchmarks.border_ranking.data import build
from benchmarks.border_ranking.page import page
from benchmarks.border_ranking.train import train
from benchmarks.json_lines import rows_in

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("plans", "train", "compare", "page")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=(*STEPS, "all"))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "border_ranking")
    parser.add_argument("--epochs", type=int, default=30, help="of the GNN (30)")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "border-ranking.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    steps = STEPS if given.step == "all" else (given.step,)
    if "plans" in steps:
        build(given.folder / "plans.jsonl")
    if "train" in steps:
        rows = train(given.folder, given.epochs)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (given.folder / "train.jsonl").write_text(text, encoding="utf-8")
    if "compare" in steps:
        compare(given.folder)
    if "page" in steps:
        rows = [row for name in STEPS[1:3] for row in rows_in(given.folder / f"{name}.jsonl")]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        given.page.with_suffix(".jsonl").write_text(text, encoding="utf-8")
        given.page.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
