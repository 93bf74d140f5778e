"""What it costs that ``inner="auto"`` proves its weights at every call.

    python -m benchmarks.proof                    four networks at 224, 1 and 2 threads
    python -m benchmarks.proof --models resnet50 --threads 1 --turns 50

Per network and number of threads, interleaved in one process in random order: the graph by its FX
nodes, every convolution on packed weights that are taken for right ("unproved", which is wrong
after a write through ``.data``), every one on packed weights that are compared ("compared"), and
the program that is taken, where some read their weights where they lie. Least milliseconds, the
median of the ratio of the program taken to "unproved" in the same turn, and the part of the
program taken in which inputs and weights are looked at. ``--cpu`` counts the time of the processor
instead of the clock's, for one thread on a machine that has other work. ``--inductor`` adds
``torch.compile`` with Dynamo's guards around what it calls: inductor with
``torch._inductor.config.freezing``, ``inner="auto"`` with the same, where both bake weights in, and
``inner="auto"`` without, which proves them; and the median ratios of inductor to these two.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch._inductor.config
from tabulate import tabulate
from torch import Tensor, fx, nn

from benchmarks.depth_first import build
from torch_getfuse.backend.packed.fast import fast_program
from torch_getfuse.backend.packed.program import FastProgram
from torch_getfuse.backend.packed.steps import build_steps
from torch_getfuse.backend.packed.straight_line import PROOF

MODELS = ("mobilenet_v2", "efficientnet_b0", "resnet50", "vgg16")


class Unproved:
    """Stands for a program's weights: what a first call found is taken for right."""

    def __init__(self, program: FastProgram, args: list[Any]) -> None:
        self._made = program._store.ready((*args, *program._constants))

    def ready(self, _: object) -> Any:
        return self._made


def traced(name: str, size: int) -> tuple[fx.GraphModule, list[Any]]:
    """The graph of a model that the backend is given, and its inputs."""
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append((gm, inputs))
        return gm.forward

    model, x = build(name, size)
    torch._dynamo.reset()
    torch.compile(model, backend=backend, dynamic=False)(x)
    return found[0]


def guarded(model: nn.Module, x: Tensor) -> dict[str, Callable[..., Any]]:
    """The model compiled by inductor and by this backend, both frozen, and by this one as usual.

    They take any arguments.
    """
    calls = {}
    # Other options, or Dynamo would run one compiled form of the class for both.
    for key, strict in (("auto, frozen", False), ("auto", True)):
        options: dict[str, Any] = {"strict": strict, "cache": False}
        calls[key] = torch.compile(copy.deepcopy(model), backend="getfuse", options=options)
    calls["inductor, frozen"] = torch.compile(model)
    for key, call in calls.items():
        with torch._inductor.config.patch(freezing="frozen" in key):
            call(x)
    return {key: lambda *_, call=call: call(x) for key, call in calls.items()}


def measure(
    name: str, size: int, threads: int, turns: int, clock: Callable[[], float], inductor: bool
) -> Any:
    """One row of the table."""
    torch.set_num_threads(threads)
    gm, inputs = traced(name, size)
    taken, note = fast_program(gm, inputs, gm.forward, False, lambda *_: None)
    if taken is None:
        return {"model": name, "threads": threads, "note": note}
    compared, unproved = (FastProgram(gm, build_steps(gm), [], threads) for _ in range(2))
    unproved._store = Unproved(unproved, inputs)  # type: ignore[assignment]
    calls: dict[str, Callable[..., Any]] = {
        "FX nodes": gm.forward,
        "unproved": unproved,
        "compared": compared,
        "taken": taken,
    }
    if inductor:
        calls |= guarded(*build(name, size))
    times: dict[str, list[float]] = {key: [] for key in calls}
    proof = []
    for _ in range(turns):
        for key in random.sample(list(calls), len(calls)):
            started = clock()
            calls[key](*inputs)
            times[key].append(clock() - started)
        proof.append(taken.timed(*inputs)[PROOF])

    def ratio(one: str, other: str) -> float:
        """Median of the ratios of two calls of one turn."""
        pairs = zip(times[one], times[other], strict=True)
        return round(median(first / second for first, second in pairs), 3)

    theirs = "inductor, frozen"
    ours = ("auto, frozen", "auto") if inductor else ()
    return {
        "model": name,
        "threads": threads,
        **{f"{key} ms": round(min(took) * 1e3, 2) for key, took in times.items()},
        "taken / unproved": ratio("taken", "unproved"),
        **{f"{theirs} / {key}": ratio(theirs, key) for key in ours},
        "proof ms": round(min(proof) * 1e3, 2),
        "as they lie": note.partition(" on weights")[0].rpartition(" ")[2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--inductor", action="store_true")
    given = parser.parse_args()
    clock = time.process_time if given.cpu else time.perf_counter
    with torch.no_grad():
        rows = [
            measure(name, given.size, threads, given.turns, clock, given.inductor)
            for name in given.models
            for threads in given.threads
        ]
    print(tabulate(rows, headers="keys", tablefmt="github"))


if __name__ == "__main__":
    main()
