"""The fast way to run an inference graph on a CPU, taken only where it was seen to be faster.

``inner="auto"`` builds a :class:`FastProgram`, runs it beside the graph on the inputs that it is
compiled for, and takes it if its results agree and its time is less.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from torch_getfuse.backend.capture.quantisation import quantisation
from torch_getfuse.backend.fx_nodes.effects import changes_mode, changes_state, results_share
from torch_getfuse.backend.fx_nodes.values import flat_tensors, is_plain, traced_value
from torch_getfuse.backend.packed.any_size import CALLS, KEPT, AnySize, is_any_size
from torch_getfuse.backend.packed.packed_conv import NotFinite
from torch_getfuse.backend.packed.program import Choice, FastProgram, kept_for
from torch_getfuse.backend.packed.snapshots import Kept
from torch_getfuse.backend.packed.steps import Step, Unfit, build_steps
from torch_getfuse.backend.packed.straight_line import PROOF
from torch_getfuse.backend.packed.tuning import choose_strips, step_times
from torch_getfuse.backend.torch_private import FakeTensor, onednn
from torch_getfuse.errors import UnsupportedTorchError

log = logging.getLogger(__name__)

_TURNS = 3
_MOST_TURNS = 16
_SOON = 0.3
"""Seconds after which steps are not timed more often than need be; theirs differ by little."""

_LONG = 1.0
"""Seconds of a run after which one turn is enough."""

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest difference to eager, relative to the largest value, that rounding explains."""


def fast_program(
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    plain: Callable[..., Any],
    cache: bool | str | Path,
    tell: Callable[[Collection[str], Sequence[str]], None],
) -> tuple[FastProgram | AnySize | None, str]:
    """A program for a graph, if it is faster than ``plain`` and agrees with it.

    Args:
        gm: an inference graph with traced values, which returns a tuple.
        example_inputs: what it is compiled for.
        plain: the same computation by FX nodes.
        cache: where this machine's times are kept, as the option says.
        tell: where shapes are dynamic, takes notes on the sizes that were met, at calls too: those
            that it replaces, and the new ones.

    Returns:
        The program or ``None``, and a sentence for the report.
    """
    try:
        if changes_mode(gm):
            raise Unfit("autocast, grad mode or the like change within it")
        if changes_state(gm):
            raise Unfit("it changes its inputs or draws random numbers")
        if is_any_size(gm):

            def build(
                copied: fx.GraphModule, args: Sequence[Any], kept: Kept
            ) -> tuple[FastProgram | None, str]:
                return _program(copied, args, kept, plain, cache, "for this size")

            any_size = AnySize(gm, plain, build, tell)
            any_size.decide_first(example_inputs)
            return any_size, (
                f"inner auto: any size: each has a program of its own, with strips of its own and "
                f"packed weights that all share; a size runs by FX nodes before its call {CALLS}, "
                f"and {KEPT} sizes have one at a time, those called most"
            )
        kept = kept_for(gm)
        program, note = _program(gm, example_inputs, kept, plain, cache, "at compilation")
    except Unfit as reason:
        log.info("no fast program: %s", reason)
        return None, f"inner auto: runs by FX nodes: {reason}"
    return program, f"inner auto: {note}"


def _program(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    kept: Kept,
    plain: Callable[..., Any],
    cache: bool | str | Path,
    when: str,
) -> tuple[FastProgram | None, str]:
    """:func:`fast_program` where shapes are static. It draws no random numbers.

    Args:
        kept: for weights made ready.
        when: it is timed.

    Raises:
        Unfit: where the graph is not for this.
    """
    steps = _steps(gm, inputs)
    threads = torch.get_num_threads()
    times = step_times(cache)
    with torch.no_grad():
        returned = set(gm.graph.output_node().all_input_nodes)
        promising = choose_strips(steps, returned, times, threads)
        times.save()
        taken = {at for choice in promising for at in range(choice.first, choice.end)}
        may_live = [at for at, step in enumerate(steps) if step.live and at not in taken]
        try:
            special = FastProgram(gm, steps, promising, threads, may_live, kept)
            whole = FastProgram(gm, steps, [], threads, kept=kept)
        except NotFinite:
            return None, "runs by FX nodes: weights hold infinities or NaN"
        expected = plain(*inputs)
        for program in (special, whole):
            try:
                wrong = _differs(expected, program.compute(*inputs))
            except NotFinite:
                wrong = "inputs or weights hold infinities or NaN"
            else:
                if wrong:
                    log.warning("torch_getfuse: a fast program is not used: %s", wrong)
            if wrong:
                return None, f"runs by FX nodes: {wrong}"
        chosen, live = _seen_faster(steps, special, whole, promising, may_live, inputs)
        program = FastProgram(gm, steps, chosen, threads, live, kept)
        ours, theirs = _times(program, plain, inputs)
    inside = sum(choice.end - choice.first for choice in chosen)
    packed = sum(step.conv is not None for step in steps)
    found = (
        f"{packed} packed convolutions in {len(steps)} steps, {inside} of them depth-first in "
        f"{len(chosen)} segments, {len(live)} on weights as they lie"
    )
    if kept.frozen:
        found += "; weights are frozen (torch._inductor.config.freezing): not compared at calls"
    told = f"{ours * 1e3:.1f} ms against {theirs * 1e3:.1f} ms by FX nodes, timed {when}"
    if ours >= theirs:
        return None, f"runs by FX nodes: the fast program took {told}"
    return program, f"{found}; {told}"


def _steps(gm: fx.GraphModule, example_inputs: Sequence[object]) -> list[Step]:
    """The steps of a graph that can be run fast.

    Raises:
        Unfit: where the graph is not for this.
    """
    values = [tensor for node in gm.graph.nodes for tensor in flat_tensors(traced_value(node))]
    if elsewhere := sorted({value.device.type for value in values} - {"cpu"}):
        raise Unfit(
            f"tensors are on {' and '.join(elsewhere)}, and inner auto measures on a CPU only; "
            "inner='inductor' compiles the groups there"
        )
    if any(value.numel() == 0 for value in values):
        raise Unfit("a tensor is empty")
    if not all(map(is_plain, values)):
        raise Unfit("a tensor is of a class or a layout of its own")
    if not all(isinstance(value, (Tensor, int, float, bool)) for value in example_inputs):
        raise Unfit("an input is no tensor")
    if any(isinstance(value, FakeTensor) for value in example_inputs):
        raise Unfit("it is compiled without real inputs")
    if torch.is_autocast_enabled("cpu"):
        raise Unfit("autocast is on")
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        raise Unfit("this build of torch has no oneDNN, or it is turned off")
    try:
        onednn()
    except UnsupportedTorchError as error:
        raise Unfit(str(error)) from error
    if results_share(gm):
        raise Unfit("its results share memory")
    if any(quantisation(node) is not None for node in gm.graph.nodes):
        raise Unfit("it quantises, which turns the last bits of packed convolutions into steps")
    steps = build_steps(gm)
    if not any(step.conv is not None for step in steps):
        raise Unfit("it has no convolution that oneDNN packs")
    return steps


def _seen_faster(
    steps: Sequence[Step],
    special: FastProgram,
    whole: FastProgram,
    choices: Sequence[Choice],
    live: Sequence[int],
    inputs: Sequence[object],
) -> tuple[list[Choice], list[int]]:
    """The segments that are faster in strips, and the steps that are faster on live weights.

    Each is timed where it stands, between its neighbours.

    Args:
        steps: of both programs.
        special: the program with all of them.
        whole: the program with none.
        choices, live: of ``special``.
        inputs: of both.
    """
    best: tuple[dict[int, float], dict[int, float]] = ({}, {})
    started = time.perf_counter()
    for turn in range(_MOST_TURNS if choices or live else 0):
        spent = time.perf_counter() - started
        if spent > 2 * _LONG or (turn >= _TURNS and spent > _SOON):
            break
        for least, program in zip(best, (special, whole), strict=True):
            for at, seconds in program.timed(*inputs).items():
                least[at] = min(least.get(at, seconds), seconds)
    faster = [
        choice
        for choice in choices
        if best[0][choice.first] < sum(best[1][at] for at in range(choice.first, choice.end))
    ]
    # A weight that is read where it lies need not be proved: its share of that counts as well.
    sizes = {at: traced_value(steps[at].weights[0]).nbytes for at in live}
    spared = (best[1][PROOF] - best[0][PROOF]) / max(1, sum(sizes.values())) if live else 0.0
    return faster, [at for at in live if best[0][at] < best[1][at] + spared * sizes[at]]


def _differs(expected: Sequence[Any], got: Sequence[Any]) -> str:
    """Why two results are not the same to rounding; empty where they are."""
    if len(expected) != len(got):
        return f"{len(got)} results instead of {len(expected)}"
    for k, (right, ours) in enumerate(zip(expected, got, strict=True)):
        if not isinstance(right, Tensor):
            if right is not ours and right != ours:
                return f"result {k} is {ours!r} instead of {right!r}"
            continue
        if (
            right.shape != ours.shape
            or right.dtype != ours.dtype
            or right.stride() != ours.stride()
        ):
            return f"result {k} has another shape, type or layout"
        if not (right.is_floating_point() or right.is_complex()):
            if not torch.equal(right, ours):
                return f"result {k} differs, and holds no real numbers that rounding might change"
            continue
        finite = right.isfinite()
        if not finite.any():
            return f"result {k} holds no finite number to compare"
        # Infinities and NaN must stand where they stand, everything else may differ by rounding.
        alike = (right == ours) | (right.isnan() & ours.isnan())
        if not (alike | finite).all():
            return f"result {k} has infinities or NaN elsewhere"
        scale = float(right[finite].abs().max())
        error = float((right[finite] - ours[finite]).abs().max())
        if not error <= _TOLERANCE.get(right.dtype, 1e-3) * scale:
            return f"result {k} differs by {error:.3g} at values up to {scale:.3g}"
    return ""


def _times(
    program: Callable[..., Any], plain: Callable[..., Any], inputs: Sequence[object]
) -> tuple[float, float]:
    """Least seconds of both, in turns."""
    best = [float("inf"), float("inf")]
    for _ in range(_TURNS):
        for k, call in enumerate((program, plain)):
            started = time.perf_counter()
            call(*inputs)
            best[k] = min(best[k], time.perf_counter() - started)
        if max(best) > _LONG:
            break
    return best[0], best[1]
