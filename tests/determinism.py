"""What shows that a plan depends on nothing but its inputs: other clocks, other hash seeds."""

from __future__ import annotations

import os
import subprocess
import sys


class Ticking:
    """A clock that goes on by so many seconds each time it is looked at."""

    def __init__(self, step: float) -> None:
        self.step = step
        self.now = 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def outputs_of_hash_seeds(code: str, *arguments: str) -> set[str]:
    """What a program prints, run in processes of its own with two seeds of Python's hashes."""
    return {
        subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
