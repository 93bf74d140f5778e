"""Real memory: what a group takes of the process's heap, counted by a preloaded malloc."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = shutil.which("cc") or shutil.which("gcc")
SOURCE = Path(__file__).with_name("heap_peak.c")
ROOT = Path(__file__).resolve().parents[2]
SLACK = 128 * 1024


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads glibc's malloc")
@pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_0", "mobilenet_v3_large"])
def test_heap_of_every_group_is_what_the_plan_says(name: str, tmp_path: Path) -> None:
    """Rings and weights at 4 bytes an element, the results, and 128 KiB of scratch."""
    library = tmp_path / "heap_peak.so"
    assert COMPILER is not None
    subprocess.run([COMPILER, "-O2", "-shared", "-fPIC", "-o", library, SOURCE], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.backend.heap_run", name],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(library)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    groups = json.loads(done.stdout.splitlines()[-1])
    assert len(groups) > 5
    for group, (peak, planned, written) in groups.items():
        assert peak > written, f"{group}: the counter counts nothing"
        assert peak <= planned + written + SLACK, f"{group}: {peak} B, {planned} B planned"
