"""How soon the command line answers, and what importing the package adds to importing torch.

    python benchmarks/startup.py [--repeat N]

The least of N fresh processes each, taken in turn with the bare interpreter, so that a busy machine
shows in all of them:

* ``torch-getfuse --help``, as a process. The aim: below 0.3 s.
* one completion of a shell (what runs after TAB): the same program, with argcomplete. Left out
  where that is not installed. No aim of its own.
* ``import torch``, and within the same process what ``import torch_getfuse`` then takes. The aim:
  at most 0.1 s. Names are imported when first used: the first use of all public ones is told too.

Exits with 1 where an aim is missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time

MOST_HELP, MOST_IMPORT = 0.3, 0.1
LINE = "torch-getfuse report torchvision:mobilenet_v"
COMPLETING = {
    "_ARGCOMPLETE": "1",
    "_ARGCOMPLETE_STDOUT_FILENAME": os.devnull,
    "COMP_LINE": LINE,
    "COMP_POINT": str(len(LINE)),
}


IMPORTS = """
import time
times = [time.perf_counter()]
import torch
times.append(time.perf_counter())
import torch_getfuse
times.append(time.perf_counter())
for name in torch_getfuse.__all__:
    getattr(torch_getfuse, name)
times.append(time.perf_counter())
print(*(b - a for a, b in zip(times, times[1:])))
"""


def run(*arguments: str, **environment: str) -> float:
    """Seconds of a fresh interpreter."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - started


def imports() -> list[float]:
    """Seconds of importing torch, then torch_getfuse, then all of its public names."""
    told = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True
    )
    return list(map(float, told.stdout.split()))


def main() -> int:
    parser = argparse.ArgumentParser(description="Start-up times.")
    parser.add_argument("--repeat", type=int, default=10, metavar="N")
    repeat = parser.parse_args().repeat
    processes = {
        "bare interpreter": lambda: run("-c", "pass"),
        "torch-getfuse --help": lambda: run("-m", "torch_getfuse", "--help"),
    }
    if importlib.util.find_spec("argcomplete") is not None:
        processes["one completion"] = lambda: run("-m", "torch_getfuse", **COMPLETING)
    imported = ("import torch", "import torch_getfuse after it", "and all of its public names")
    least = dict.fromkeys((*processes, *imported), float("inf"))
    for _ in range(repeat):
        for name, case in processes.items():
            least[name] = min(least[name], case())
        for name, seconds in zip(imported, imports(), strict=True):
            least[name] = min(least[name], seconds)
    for name, seconds in least.items():
        print(f"{name:30} {seconds:7.4f} s")
    met = least["torch-getfuse --help"] < MOST_HELP and least[imported[1]] <= MOST_IMPORT
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
