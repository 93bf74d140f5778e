"""Which steps run strip by strip, and in how many strips: by times measured on this machine.

Every distinct step is timed on blocks of a few heights, once; the times are kept on disk. What a
segment of consecutive steps would take in strips is the sum over its steps of the time for their
rows, halo included, times the strips. The cheapest way through the program is a shortest path.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from torch_getfuse.backend.fx_nodes.values import traced_value
from torch_getfuse.backend.packed.program import Choice
from torch_getfuse.backend.packed.steps import Step
from torch_getfuse.backend.packed.strips import Segment, last_reads, map_rows
from torch_getfuse.backend.plan_cache import folder_of, write_whole

_LONGEST = 8
"""Steps of a segment at most: longer ones compute too much halo anew."""

_HEIGHTS = (4, 8, 16, 32, 64)
"""Rows of a block that are timed, and rows per strip that are tried."""

_GAIN = 1.05
"""A segment runs in strips only if that is predicted to be so much faster."""

_OVERHEAD = 5e-6
"""Seconds to take the blocks of one step out of the maps."""

_SYNC = 150e-6
"""Seconds to hand strips to threads and wait for them."""

_NEAR = 2**20
"""Bytes that a strip's maps may have to be found in a core's own cache: L2 of most processors."""

_WORTH = 8 * 2**20
"""Bytes of the largest map between two steps above which strips may pay: a smaller one is still in
the last-level cache when it is read. So models of small maps need no timing at all."""

_FAR = 12 * 2**20
"""Bytes of maps between two uses where a strip is larger than that; the most a strip may have."""

_MOST_BYTES = 64 * 2**20
"""Of a file of times; a step's times take some 500."""

_MOST_SECONDS = 3600.0
"""Of one step; a longer time was not measured."""

_warned: set[str] = set()

_LAST = torch.channels_last


class StepTimes:
    """Seconds of steps on blocks of rows, measured when first asked for.

    Args:
        folder: where times are kept between processes; ``None`` for in memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / f"machine-{_machine()}.json"
        self._seconds: dict[str, float] = {}
        self._fresh = False
        try:
            if self._path is not None and self._path.is_file():
                self._seconds = _seconds_in(self._path)
        except (OSError, ValueError, RecursionError) as error:
            _warn(f"the times of this machine in {str(self._path)!r} are measured anew: {error}")

    def save(self) -> None:
        """Write what was measured; a folder that cannot be written is warned of once."""
        if self._path is None or not self._fresh:
            return
        try:
            write_whole(self._path, json.dumps(self._seconds))
            self._fresh = False
        except (OSError, ValueError) as error:
            _warn(f"cannot keep the times of this machine in {str(self._path)!r}: {error}")

    def whole(self, step: Step) -> float:
        """Of the whole map of one image, with the threads that torch has now."""
        # Its input was just written, its output goes where the last one was freed.
        return self._time(step, map_rows(step.node), torch.get_num_threads(), 0, whole=True)

    def rows(self, step: Step, rows: int, footprint: int) -> float:
        """Of a block of ``rows`` output rows on one thread, between measured heights linear.

        Args:
            footprint: bytes of all the maps of the strip.
        """
        size = map_rows(step.node)
        reach = 0 if footprint <= _NEAR else _FAR
        heights = [height for height in _HEIGHTS if height < size] + [size]
        above = next((k for k, height in enumerate(heights) if height >= rows), len(heights) - 1)
        high = heights[above]
        right = self._time(step, high, 1, reach)
        if above == 0 or rows >= high:
            return right
        low = heights[above - 1]
        left = self._time(step, low, 1, reach)
        return left + (right - left) * (rows - low) / (high - low)

    def copy(self, node: fx.Node, rows: int) -> float:
        """Of moving so many rows of a map between the cache and memory."""
        count = block_bytes(node, rows)
        key = f"copy {count}"
        if key not in self._seconds:
            source = torch.ones(count // 4 + 1)
            targets = itertools.cycle(
                [torch.empty_like(source) for _ in range(max(1, 4 * _FAR // (count + 1)))]
            )
            self._seconds[key] = _measure(lambda: next(targets).copy_(source), 4)
            self._fresh = True
        return self._seconds[key]

    def _time(
        self, step: Step, rows: int, threads: int, reach: int, *, whole: bool = False
    ) -> float:
        key = f"{_signature(step)} {rows} {threads} {reach}{' whole' if whole else ''}"
        if key not in self._seconds:
            before = torch.get_num_threads()
            if threads != before:
                torch.set_num_threads(threads)
            try:
                self._seconds[key] = _time_step(step, rows, reach, whole)
                self._fresh = True
            finally:
                if threads != before:
                    torch.set_num_threads(before)
        return self._seconds[key]


def _seconds_in(path: Path) -> dict[str, float]:
    """The times in a file.

    Raises:
        OSError: where it cannot be read.
        ValueError: where it holds anything else.
        RecursionError: where it is nested without end.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__} and no times by step")
    for key, value in found.items():
        if type(value) not in (int, float) or not 0 <= value < _MOST_SECONDS:
            raise ValueError(f"it gives {value!r} as the seconds of {key!r}")
    return found


def _warn(what: str) -> None:
    if what not in _warned:
        _warned.add(what)
        warnings.warn(f"torch_getfuse: {what}", stacklevel=3)


def block_bytes(node: fx.Node, rows: int) -> int:
    """Bytes of so many rows of a map of one image."""
    value = traced_value(node)
    return int(value.shape[1] * value.shape[3] * value.element_size()) * rows


def _measure(call: Callable[[], Any], warm: int) -> float:
    """The least of a few runs: what the machine can do when nothing else disturbs it."""
    with torch.no_grad():
        for _ in range(warm):
            call()
        best, spent, runs = float("inf"), 0.0, 0
        while runs < 4 or (runs < 8 and spent < 1e-3):
            started = time.perf_counter()
            call()
            took = time.perf_counter() - started
            best, spent, runs = min(best, took), spent + took, runs + 1
    return best


def _time_step(step: Step, rows: int, reach: int, whole: bool) -> float:
    """A step on blocks of the right size, with so many bytes touched between two uses of one."""
    shapes = []
    touched = block_bytes(step.node, rows)
    for node, window in zip(step.maps, step.windows, strict=True):
        value = traced_value(node)
        high = int(value.shape[2])
        if window is not None and not whole:
            start, end = window.needs(0, rows)
            high = end - start
        shapes.append(((1, value.shape[1], high, value.shape[3]), value.dtype))
        touched += block_bytes(node, high)
    turns = max(1, -(-reach // touched))
    inputs = [
        [torch.ones(shape, dtype=dtype).contiguous(memory_format=_LAST) for shape, dtype in shapes]
        for _ in range(turns)
    ]
    outputs: deque[Tensor] = deque(maxlen=turns)
    given = itertools.cycle(inputs)
    if step.conv is None:
        run = step.rows
        assert run is not None
        return _measure(lambda: outputs.append(run(*next(given))), turns)
    conv = step.conv
    weight, *vectors = (_like(traced_value(node)) for node in step.weights)
    packed = conv.prepare(weight, vectors)
    run_conv = conv.whole if whole else conv.rows
    return _measure(lambda: outputs.append(run_conv(packed, *next(given))), turns)


def _like(value: Tensor) -> Tensor:
    """A real tensor of a traced one's shape and type."""
    return torch.ones(tuple(value.shape), dtype=value.dtype)


def _signature(step: Step) -> str:
    """Everything that a step's time depends on, but for its rows."""
    shapes = [tuple(traced_value(node).shape[1:]) for node in step.maps]
    kind = traced_value(step.node).dtype
    if step.conv is not None:
        what = f"{step.conv.shape} {step.conv.activation} {step.conv.adds}"
    else:
        what = f"{step.node.target} {step.windows}"
    text = f"{what} {shapes} {kind}"
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _machine() -> str:
    """A name for this processor, this torch, and this way of getting memory."""
    text = f"{platform.processor()} {platform.machine()} {os.cpu_count()} {torch.__version__}"
    text += torch.backends.cpu.get_cpu_capability()
    # How memory is got is part of what a map costs: a fresh mapping pays for page faults.
    text += "".join(
        f"{name}={os.environ[name]}"
        for name in sorted(os.environ)
        if name.startswith("MALLOC_") or name in ("LD_PRELOAD", "GLIBC_TUNABLES")
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


_times: dict[Path | None, StepTimes] = {}
_lock = threading.Lock()


def step_times(cache: bool | str | Path) -> StepTimes:
    """The times of this machine, kept where plans are (option ``cache``)."""
    folder = None if cache is False else folder_of(cache)
    with _lock:
        if folder not in _times:
            _times[folder] = StepTimes(folder)
        return _times[folder]


def choose_strips(
    steps: Sequence[Step], returned: set[fx.Node], times: StepTimes, threads: int
) -> list[Choice]:
    """The segments that run in strips: a shortest path over measured times.

    Args:
        steps: of a program, in order.
        returned: nodes that the graph returns.
        times: of this machine.
        threads: that share the strips.
    """
    last = last_reads(steps)
    arrivals: list[list[tuple[float, Choice, int]]] = [[] for _ in range(len(steps) + 1)]
    best: list[tuple[float, Choice | None, int]] = [(0.0, None, 0)]
    for at in range(len(steps)):
        cost = best[at][0]
        for end in range(at + 2, min(len(steps), at + _LONGEST) + 1):
            part = steps[at:end]
            if not all(step.by_rows for step in part):
                break
            if max(block_bytes(step.node, map_rows(step.node)) for step in part[:-1]) <= _WORTH:
                continue
            segment = Segment.part(steps, at, end, returned, last)
            if not segment.runs:
                continue
            found = _best_strips(segment, times, threads)
            if found is None:
                continue
            whole = sum(map(times.whole, part))
            if found[0] * _GAIN < whole:
                # Costs are counted from those of running everything whole.
                arrivals[end].append((cost + found[0] - whole, Choice(at, end, found[1]), at))
        alone: tuple[float, Choice | None, int] = (cost, None, at)
        best.append(min([alone, *arrivals[at + 1]], key=lambda option: option[0]))
    chosen = []
    at = len(steps)
    while at > 0:
        _, choice, before = best[at]
        if choice is not None:
            chosen.append(choice)
        at = before
    return chosen[::-1]


def _best_strips(segment: Segment, times: StepTimes, threads: int) -> tuple[float, int] | None:
    """Seconds and number of strips of the best of a few heights."""
    rows = segment.rows[segment.outputs[-1]]
    best: tuple[float, int] | None = None
    for height in _HEIGHTS:
        strips = -(-rows // height)
        if strips < 2 * threads:
            break
        ranges = segment.ranges(strips // 2, strips)
        footprint = sum(
            block_bytes(step.node, high - low)
            for step, (low, high) in zip(segment.steps, ranges, strict=True)
        )
        if footprint > _FAR:
            break
        seconds = 0.0
        for step, (low, high) in zip(segment.steps, ranges, strict=True):
            if high > low:
                seconds += times.rows(step, high - low, footprint) + _OVERHEAD
        for k in segment.outputs:
            seconds += times.copy(segment.steps[k].node, max(1, segment.rows[k] // strips))
        for node, rows_read in segment.reads(ranges).items():
            # A large map from outside has left the cache since it was made.
            if block_bytes(node, map_rows(node)) > _FAR:
                seconds += times.copy(node, rows_read)
        seconds *= strips
        if threads > 1:
            seconds = seconds / threads + _SYNC
        if best is None or seconds < best[0]:
            best = (seconds, strips)
    return best
