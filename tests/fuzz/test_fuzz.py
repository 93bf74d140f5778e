"""Random programs hold however they are run; ``make fuzz`` runs as many more as one likes."""

from __future__ import annotations

import pytest

from fuzz.check import check_block
from fuzz.generate import generate
from fuzz.surroundings import quietly

pytestmark = [pytest.mark.slow, pytest.mark.fast_program]

PROGRAMS, IN_CI, BLOCK = 2000, 600, 50


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(start, marks=[pytest.mark.exhaustive] if start >= IN_CI else [])
        for start in range(0, PROGRAMS, BLOCK)
    ],
)
def test_programs_hold(start: int) -> None:
    failures, skipped, planned = [], 0, 0
    with quietly():
        for program, verdict in check_block(map(generate, range(start, start + BLOCK))):
            for failure in verdict.failures:
                failures.append(f"seed {program.seed}: {failure.mode}: {failure.message}")
            skipped += bool(verdict.skipped)
            planned += "plan" in verdict.checked
    assert not failures, "\n".join(["python -m tests.fuzz shrinks these:", *failures])
    assert skipped <= BLOCK // 3, "torch itself compiles too few of the programs"
    assert planned >= BLOCK // 2, "too few of the programs have anything to plan"
