"""Every example runs, as a reader would run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# The two that hand groups on run with and without the library that they hand them to.
EXPECTED = {
    "architect_sweep.py": [
        "8 points: 8 planned",
        "  cascade: 256 KB, with 88% of all",
        "within 5% of the floor of 11.3 MB from 512 KB up",
        "at the floor first: cascade with 512 KB",
    ],
    "best_plan.py": [
        "23 of 16384",
        "network               one sample of 1x32x16x16",
        "bit for bit",
    ],
    "executorch_groups.py": ["fusion_group_0.pt", "unfusable operators run from their files"],
    "export_plan.py": [
        "optimal, 24 KB), claimed by the plan file",
        "optimal, 24 KB), proved",
        "compiled with the plan of the file",
        "operators.csv",
    ],
    "export_groups.py": ["fusion_group_0.pt2", "run from their files; equal", "to the last bit"],
    "group_cost.py": ["3584 B  of rows", "needs 9.22 KB, 3.22 KB more than 6 KB"],
    "onnx_groups.py": ["fusion_group_0.", "unfusable operators run from their files"],
    "plug_in.py": ["whole_maps, shuffled_merge: PartitionPlan(4 groups", "demo::soft_clip_3"],
    "quickstart.py": ["max relative error", "fusion groups", "optimal (proved)"],
    "referee.py": [
        "too big: needs 268 KB, 11.7 KB over the buffer of 256 KB",
        "The plan from outside: a legal plan",
        "above the optimum (proved)",
        "a border before features.3 costs 100352 B",
    ],
    "train.py": ["losses and weights are equal, to the last bit", "Fusion groups"],
    "why_not.py": [
        "8 operators under a buffer of 8 KB: 1.22 KB too much",
        "largest term: lines of 0.widen, 2.25 KB",
        "the cut costs 4 KB of DRAM access more",
        "a buffer of 9441 B: Explanation(8 operators, fits, 1 B of room left",
    ],
}


def test_every_example_is_known() -> None:
    assert {path.name for path in EXAMPLES} == set(EXPECTED)


@pytest.fixture(scope="module")
def outputs() -> dict[str, str]:
    """What the examples that have run have printed."""
    return {}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path: Path, outputs: dict[str, str], tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, path],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},  # a plan of the cache is a claim
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for text in EXPECTED[path.name]:
        assert text in run.stdout
    outputs[path.name] = run.stdout


def test_readme_shows_what_the_demo_prints(outputs: dict[str, str]) -> None:
    if "quickstart.py" not in outputs:
        pytest.skip("runs after test_example[quickstart.py]")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, after = readme.partition("```text\nmax relative error")
    shown = "max relative error" + after.partition("\n```")[0]
    printed = outputs["quickstart.py"].rstrip()
    # Rounding and how it runs depend on the machine, seconds on its load.
    varies = re.compile(r"max relative error.*|search  .*|Note: inner auto(?s:.*?)(?=\n\n)")
    assert varies.sub("", shown) == varies.sub("", printed), (
        "paste the output of make demo into README.md"
    )
