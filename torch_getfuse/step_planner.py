"""Plans of the cascade scheme: sequences of steps with tensors that stay (docs/method.md, 12)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch_getfuse.errors import OptionError
from torch_getfuse.options import Options
from torch_getfuse.partition.cost.cascade.model import Step
from torch_getfuse.partition.cost.cascade.way import Resident
from torch_getfuse.partition.fusion_group import Stage, make_step
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.partition.steps.optimum import Solved, solve, with_residents
from torch_getfuse.partition.steps.problem import StepProblem
from torch_getfuse.partition.steps.reasons import why_steps_end
from torch_getfuse.partition.work import INTERRUPTED


class StepStrategy:
    """One planning run over sequences of steps.

    Attributes:
        stages: what each stage reached.
        method: the stage that found the best plan.
        bound: no legal plan moves fewer bytes.
        interrupted: whether a ``KeyboardInterrupt`` ended it.
    """

    def __init__(self, problem: StepProblem, options: Options) -> None:
        self.problem, self.options = problem, options
        self.stages: list[Stage] = []
        self.method = ""
        self.bound = problem.unavoidable
        self.interrupted = False
        self._stage = ""

    def exact(self) -> None:
        """The optimum, or the best plan and a bound as far as time allows.

        Raises:
            OptionError: where no plan keeps to the pins, or none is found in time.
        """
        problem = self.problem
        try:
            with problem.work.within(self.options.time_limit, whole=True):
                solved = solve(problem, self._run)
        except KeyboardInterrupt:
            self.interrupted = True
            self._note(self._stage, Solved(problem.best, 0, 0, 0.0, INTERRUPTED))
            return
        if problem.best is None:
            raise OptionError(
                f"no plan that keeps to the pins was found ({solved.stopped}); raise time_limit=, "
                "or pin less"
                if solved.stopped
                else problem.why_none()
            )

    def _run(self, stage: str, run: Callable[[], Solved]) -> Solved:
        self._stage = stage
        solved = run()
        self._note(stage, solved)
        return solved

    def searched(self, stages: Sequence[Stage]) -> None:
        """Note the stages of a search over groups, with what the unfusable operators move."""
        problem = self.problem
        more = sum(
            problem.scheme.unfusable_step(1 << i).dram.total for i in bits(problem.unfusable)
        )
        for stage in stages:
            reached = None if stage.dram_bytes is None else stage.dram_bytes + more
            history = tuple((plans, dram + more) for plans, dram in stage.history)
            self.stages.append(replace(stage, dram_bytes=reached, history=history))

    def given(self, groups: Sequence[int], method: str) -> None:
        """The best residents for groups that a search over groups has found."""
        problem = self.problem
        masks = problem.steps_of(groups)
        started = time.perf_counter()
        with problem.work.finishing():
            found = with_residents(problem, masks)
        if found is None:
            raise OptionError(
                f"the groups of method={method!r} have no room for what keep= pins; method='auto' "
                "looks for groups that have"
            )
        seconds = time.perf_counter() - started
        self._note("residents", Solved(problem.best, 0, len(masks), seconds))
        self.method = method

    def _note(self, stage: str, solved: Solved) -> None:
        best, known = self.problem.best, [s.dram_bytes for s in self.stages if s.dram_bytes]
        if best is not None and (not known or best.dram_bytes < min(known)):
            self.method = stage
        self.bound = max(self.bound, solved.bound)
        reached = None if best is None else best.dram_bytes
        stopped = self.problem.work.reason(solved.stopped, solved.bound == reached)
        self.stages.append(Stage(stage, reached, solved.groups, solved.seconds, stopped))

    def record(self) -> PartitionPlan | None:
        """The best plan; ``None`` where there is none."""
        problem, best = self.problem, self.problem.best
        if best is None:
            return None
        lives = problem.lives(best.masks, best.residents)
        steps = [step for step in problem.priced(best.masks, lives) if step is not None]
        assert len(steps) == len(best.masks), "a legal sequence fits"
        kept = best.residents | _kept(steps)
        lives = problem.lives(best.masks, kept)
        scheme, names = problem.scheme, problem.facts.lines.names
        ends = why_steps_end(problem, best.masks, lives, steps)
        proof: str | None = "bound" if self.bound or not best.dram_bytes else None
        if self.bound == best.dram_bytes:
            proof = "optimal"
        options = self.options
        return PartitionPlan(
            graph=problem.graph,
            scheme=scheme.name,
            granularity=scheme.granularity,
            buffer_bytes=problem.buffer_bytes,
            activation_bytes=scheme.activation_bytes,
            weight_bytes=scheme.weight_bytes,
            groups=tuple(
                make_step(scheme, step, why) for step, why in zip(steps, ends, strict=True)
            ),
            unfusable=tuple(problem.graph.ops[i].name for i in bits(problem.unfusable)),
            resident=tuple(Resident(names[t], *life) for t, life in sorted(lives.items())),
            residency=options.residency,
            keep=tuple(options.keep),
            split_before=tuple(options.split_before),
            together=tuple(map(tuple, options.together)),
            slice_channels=scheme.slice_channels,
            lower_bound_bytes=self.bound,
            proof=proof,
            method=self.method,
            stages=tuple(self.stages),
        )


def _kept(steps: Sequence[Step]) -> int:
    """Mask of the tensors that are resident in one step alone."""
    found = 0
    for step in steps:
        found |= step.priced.kept if step.priced is not None else 0
    return found
