"""Plans of fusion groups: which searches are tried, in what order, and what each reached."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from torch_getfuse.accelerator import format_size
from torch_getfuse.errors import OptionError, PlanError
from torch_getfuse.options import Options
from torch_getfuse.partition.exact.down_sets import Limits, NoPlan, TooWide, exact
from torch_getfuse.partition.fusion_group import Stage, make_group
from torch_getfuse.partition.group_ends import why_ends
from torch_getfuse.partition.merging import merge_greedily
from torch_getfuse.partition.node_set import bits, is_connected
from torch_getfuse.partition.pins import Whole
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.partition.problem import (
    FusionProblem,
    Search,
    SearchInterrupted,
    SearchResult,
    too_big,
)
from torch_getfuse.partition.search.local import local_search
from torch_getfuse.partition.search.recursive_split import EdgeRanker, RecursiveSplit
from torch_getfuse.partition.search.run import Progress
from torch_getfuse.partition.work import INTERRUPTED, OutOfWork
from torch_getfuse.plugins import EXPLAINERS, SEARCHES, fact, name_of

if TYPE_CHECKING:
    from torch_getfuse.partition.exact.backward import FromTheEnd

log = logging.getLogger(__name__)

_PROGRESS_AFTER = 2.0

_FEW_STEPS = 20_000
_TRIAL_PACE, _PACE = 0.5, 0.65
"""How fast the search from the start is to be (:class:`Limits`) in its trial before all else, and
where the cover has the time instead. Of the networks of the survey whose search ends, all are."""
_PASSED = 1 / 200
"""If its trial has passed less than this share of the operators, it is not tried again there."""
_PROOF, _COVERED_PROOF = 9 / 10, 1 / 3
"""Shares of the time for a proof, the latter where the program of wide graphs may follow."""

_FIRST, _AFTER, _LATER = 1 / 16, 1 / 8, 3 / 4
"""Shares of the time for windows: of that for the proof, before it is tried or after; and of what
is left where there is none."""
_DIRECT, _DIRECT_ALONE, _DIRECT_SETS = 1 / 100, 1 / 32, 1_000
"""Shares of the time that "direct" may have first, before merging and "exact" and where these have
no part; and the sets."""

ExplainerLike = str | Callable[[FusionProblem, int], EdgeRanker]
"""A name, or what makes the ranker of a problem and a seed."""

MODEL_STEPS = 100
"""Counted as work for each operator, for the cost model is made first."""


def ranker_of(explainer: ExplainerLike, problem: FusionProblem, options: Options) -> EdgeRanker:
    """An explainer for a problem; torch and PyG are imported only where it needs them.

    Raises:
        OptionError: where the cost model has no validity predictor and the explainer asks it.
        WeightsError: where the explainer's weights are missing or made for another model.
    """
    ranker: EdgeRanker = EXPLAINERS.load(explainer)(problem, options.seed)
    return ranker


class GroupStrategy:
    """One planning run over fusion groups: which searches are tried, and what each reached.

    Attributes:
        stages: what each stage reached.
        method: the stage that found the best plan.
        bound: no legal plan moves fewer bytes.
        interrupted: whether a ``KeyboardInterrupt`` ended it.
    """

    def __init__(self, problem: FusionProblem, options: Options) -> None:
        self.problem = problem
        self.work = problem.evaluator.work
        self.options = options
        self.stages: list[Stage] = []
        self.method = ""
        self.additive = problem.evaluator.scheme.additive
        # The program of wide graphs knows no pins.
        self.has_cover = problem.evaluator.scheme.has_cover and not problem.evaluator.pins
        self.bound = problem.unavoidable if self.additive else 0
        self.interrupted = False
        self._reason, self._passed = "", 1.0
        self._best: SearchResult | None = None
        self._stage = ""

    def run(self) -> SearchResult | None:
        """The best plan; ``None`` where a ``KeyboardInterrupt`` came before any."""
        several: dict[str, Callable[[], SearchResult]] = {
            "auto": self._auto,
            "direct": self._direct,
            "exact": self._exact,
        }
        if not self.problem.blocks:
            return SearchResult((), 0, 0, 0.0)
        several["auto"] = self._auto if self.problem.unready is None else self._exact_alone
        if self.problem.unready is not None and name_of(self.options.method) not in (
            "auto",
            "exact",
        ):
            raise OptionError(
                f"{self._no_group(self.problem.unready)}; only method='auto' and 'exact' look for "
                "larger groups that hold them"
            )
        self.work.add(MODEL_STEPS * len(self.problem.graph))
        try:
            with self.work.within(self.options.time_limit, whole=True):
                return several.get(name_of(self.options.method), self._search)()
        except SearchInterrupted as error:
            if self._best is None:
                self._note(error.result, self._stage)
            else:
                self._better(self._best, error.result, self._stage)
        except KeyboardInterrupt:
            self.stages.append(Stage(self._stage, None, 0, 0.0, INTERRUPTED))
        self.interrupted = True
        return self._best

    def _auto(self) -> SearchResult:
        """Direct first, for it explains; then exact; where that gives up, local search.

        The exact searches believe that traffic is additive; where it is not, they have no part.
        """
        best = None
        if self.options.explainer is not None:
            share = _DIRECT if self.additive else _DIRECT_ALONE
            best = self._direct(share * self.options.time_limit, _DIRECT_SETS)
        if not self.additive:
            scheme = self.problem.evaluator.scheme.name
            why = f"not tried: scheme {scheme!r} does not promise additive traffic"
            self.stages.append(Stage("exact", None, 0, 0.0, why))
            searched = self._local(best)
            if best is None:
                return self._note(searched, "local")
            return self._better(best, searched, "local")
        trial = Limits(self._few_steps(), self.work.left / 4, _TRIAL_PACE)
        found = self._try_exact(best, trial)
        if found is not None:
            return found
        # The rest is for what follows: the cover, windows again and the local search.
        share = _COVERED_PROOF if self.has_cover and not self.problem.rereads else _PROOF
        best = self._prove(best, share)
        if best.lower_bound_bytes < best.dram_bytes and self.work.left > 0:
            best = self._windows(best, _LATER * self.work.left)
            best = self._better(best, self._local(best), "local")
        return best

    def _local(self, best: SearchResult | None) -> SearchResult:
        self._stage = "local"
        with _shown(self.options, "local search") as progress:
            return local_search(
                self.problem,
                self.options.budget,
                self.options.seed,
                self._repair(),
                self.work.left,
                progress,
                start=[] if best is None else [best.groups],
            )

    def _direct(self, seconds: float | None = None, sets: int | None = None) -> SearchResult:
        self._stage = "direct"
        repair = self._repair()
        if repair is None:
            raise OptionError(
                "method='direct' splits where an explainer says; explainer=None has none"
            )
        return self._note(repair.direct(seconds or self.options.time_limit, sets=sets), "direct")

    def _exact(self) -> SearchResult:
        if self.problem.unready is not None:
            return self._exact_alone()
        found = self._try_exact(None, Limits(self._few_steps(), self.work.left, _TRIAL_PACE))
        return found or self._prove(None, 1.0)

    def _few_steps(self) -> int:
        """Of the search from the start; if weights are read again, that from the end is faster."""
        return _FEW_STEPS // 20 if self.problem.rereads else _FEW_STEPS

    def _exact_alone(self) -> SearchResult:
        """The optimum where a pinned set is no valid group by itself: no other search has a start.

        Raises:
            OptionError: where there is none, or none is found in time.
        """
        found = self._try_exact(None, Limits(seconds=self.work.left)) if self.additive else None
        if found is None:
            assert self.problem.unready is not None
            reason = self._reason or "the cost model does not promise additive traffic"
            with self.work.finishing():
                why = self._no_group(self.problem.unready)
            raise OptionError(
                f"{why}, and no larger group that holds them was found ({reason}); raise "
                "time_limit=, or pin operators that make a group"
            )
        return found

    def _no_group(self, whole: Whole) -> str:
        """What keeps a pinned set from being a group by itself."""
        if not is_connected(whole.mask, self.problem.near):
            return f"{whole.text}: no tensor joins all of them"
        return too_big(whole, self.problem.evaluator)

    def _prove(self, known: SearchResult | None, share: float) -> SearchResult:
        """The optimum, or the best plan and bound that the time limit allows.

        Merging first, and windows where the search from the end has no part: the better the plan
        that is known, the more of the dynamic program can be left out.
        """
        self._stage = "merging"
        merged = merge_greedily(self.problem, self.work.left / 4)
        if known is None:
            best = self._note(merged, "merging")
        else:
            best = self._better(known, merged, "merging")
        started, left = time.perf_counter(), self.work.left
        seconds = share * left
        if self.problem.rereads:
            return self._prove_rereading(best, seconds, started)
        best = self._windows(best, _FIRST * seconds)
        limits: Limits | None = Limits(seconds=max(0.0, seconds - (left - self.work.left)))
        if self.has_cover:  # for which it leaves the time where it will not end
            passes_nothing = self._passed < _PASSED
            limits = None if passes_nothing else Limits(seconds=self.work.left, pace=_PACE)
        found = self._exact_again(best, limits, started)
        return found or (self._cover(best) if self.has_cover else best)

    def _prove_rereading(self, best: SearchResult, seconds: float, started: float) -> SearchResult:
        """The same where groups can read weights again: the search from the end, then the cover.

        Windows follow, which take longer than they would save these.
        """
        from torch_getfuse.partition.exact.backward import FromTheEnd  # numpy: few graphs need it

        search = FromTheEnd(self.problem)
        limits = Limits(seconds=(1 - _AFTER) * seconds)
        ended = self._backward(search, best, limits, followed=self.has_cover)
        if ended is not None and (ended.proved or not self.has_cover):
            return ended if ended.proved else self._windows(ended, _AFTER * seconds)
        best = ended or best
        spare = seconds / 3
        if self.has_cover:
            left = self.work.left
            best = self._cover(best)
            spare -= left - self.work.left
            if ended is not None and not best.proved:  # the rest of the time
                best = self._backward(search, best, Limits(seconds=self.work.left)) or best
            if best.proved or not self.work.left:
                return best
        best = self._windows(best, _FIRST * seconds)
        limits_left = Limits(seconds=spare) if spare > 0 else None
        return self._exact_again(best, limits_left, started) or best

    def _exact_again(
        self, best: SearchResult, limits: Limits | None, started: float
    ) -> SearchResult | None:
        """The search from the start, with a plan that is known; ``None`` where it gives up.

        ``limits``: ``None`` not to try; ``started``: since when its time is counted.
        """
        found = None if limits is None else self._try_exact(best, limits)
        if found is None:
            spent = time.perf_counter() - started
            groups = self.problem.evaluator.evaluated
            self.stages.append(Stage("exact", None, groups, spent, f"gave up: {self._reason}"))
        return found

    def _cover(self, best: SearchResult) -> SearchResult:
        """The best plan and bound by prices of groups."""
        from torch_getfuse.partition.wide.group_cover import (
            cover,  # scipy: only wide graphs need it
        )

        self._stage = "cover"
        return self._better(best, cover(self.problem, best, self.work.left), "cover")

    def _windows(self, best: SearchResult, seconds: float) -> SearchResult:
        """A plan with all that lies close together in it as good as it can be."""
        from torch_getfuse.partition.exact.windows import windows  # numpy: few graphs need it

        self._stage = "windows"
        return self._better(best, windows(self.problem, best, Limits(seconds=seconds)), "windows")

    def _backward(
        self, search: FromTheEnd, best: SearchResult, limits: Limits, followed: bool = False
    ) -> SearchResult | None:
        """The best plan and bound of the search from the end; ``None`` for too many down-sets.

        Where groups read weights again, it proves what the search from the start cannot.
        """
        self._stage = "backward"
        try:
            return self._better(best, search.run(best, limits, followed), "backward")
        except TooWide as reason:
            self.stages.append(Stage("backward", None, 0, 0.0, f"not tried: {reason}"))
            return None

    def _try_exact(self, known: SearchResult | None, limits: Limits) -> SearchResult | None:
        self._stage = "exact"
        try:
            found = exact(self.problem, known.dram_bytes if known else None, limits)
        except NoPlan as error:
            unready = self.problem.unready
            why = f": {self._no_group(unready)}" if unready is not None else ""
            raise OptionError(f"{error}{why}") from None
        except TooWide as reason:
            self._reason, self._passed = str(reason), reason.passed
            self.bound = max(self.bound, reason.bound)
            log.info("exact: %s", reason)
            return None
        return self._note(found, "exact")

    def _search(self) -> SearchResult:
        """The search that the options name, or are given."""
        options = self.options
        name = self._stage = name_of(options.method)
        search: Search = SEARCHES.load(options.method)
        with _shown(options, f"{name} search") as progress:
            try:
                found = search(
                    self.problem,
                    options.budget,
                    options.seed,
                    self._repair(),
                    options.time_limit,
                    progress,
                )
            except OutOfWork as reason:
                raise PlanError(
                    f"the {name} search lost its plan at the {reason}; a search keeps its best in "
                    "a torch_getfuse.Run"
                ) from reason
        if not isinstance(found, SearchResult):
            raise OptionError(
                f"method={name} returns a {type(found).__name__}; a search returns a "
                "torch_getfuse.SearchResult"
            )
        if options.method not in SEARCHES.built_in:
            found = replace(found, lower_bound_bytes=0)  # nobody has proved it
        return self._note(found, name)

    def _repair(self) -> RecursiveSplit | None:
        explainer = self.options.explainer
        if explainer is None:
            return None
        ranker = ranker_of(explainer, self.problem, self.options)
        steps = fact(EXPLAINERS.load(explainer), "steps", 0)
        name, rule = name_of(explainer), self.options.split_rule
        return RecursiveSplit(self.problem, ranker, rule, name=name, ranked=steps)

    def _note(self, found: SearchResult, method: str) -> SearchResult:
        """File a stage; the method of the last best plan names the plan's.

        Raises:
            PlanError: where a search found no legal plan.
            GetfuseError: where the cost model is not as additive as it says.
        """
        with self.work.finishing():
            if not self.problem.legal(found.groups):
                raise PlanError(f"the {method} search found an illegal plan: a fault in the search")
            self.problem.check_additive(found.groups)
            if (cost := self.problem.cost(found.groups)) != found.dram_bytes:
                raise PlanError(
                    f"the {method} search states {found.dram_bytes} B of DRAM access for a plan of "
                    f"{cost} B: a fault in the search"
                )
        stopped = self.work.reason(found.stopped, found.proved)
        self.stages.append(
            Stage(method, found.dram_bytes, found.plans, found.seconds, stopped, found.history)
        )
        self.bound = max(self.bound, found.lower_bound_bytes)
        self.method = method
        if self._best is None or found.dram_bytes < self._best.dram_bytes:
            self._best = found
        return found

    def _better(self, best: SearchResult, found: SearchResult, method: str) -> SearchResult:
        """The cheaper of two results, with the better bound of both."""
        name = self.method
        self._note(found, method)
        if found.dram_bytes > best.dram_bytes or (
            found.dram_bytes == best.dram_bytes and found.lower_bound_bytes < found.dram_bytes
        ):
            self.method = name
            return best
        return found

    def record(self, found: SearchResult) -> PartitionPlan:
        """The plan of a result, with the reason why each group ends."""
        problem, options = self.problem, self.options
        evaluator = problem.evaluator
        scheme = evaluator.scheme
        ends = why_ends(evaluator, found.groups, problem.unfusable)
        bound = self.bound
        proof: str | None = "bound"
        if bound > found.dram_bytes:
            log.error("a bound of %d B contradicts a plan of %d B", bound, found.dram_bytes)
            bound = 0
        if not bound and found.dram_bytes:
            proof = None
        elif bound == found.dram_bytes:
            proof = "optimal"
        return PartitionPlan(
            graph=problem.graph,
            scheme=name_of(options.scheme),
            cost_model=options.scheme if callable(options.scheme) else None,
            granularity=scheme.granularity,
            buffer_bytes=evaluator.buffer_bytes,
            activation_bytes=scheme.activation_bytes,
            weight_bytes=scheme.weight_bytes,
            groups=tuple(
                make_group(scheme, mask, evaluator.buffer_bytes, reason)
                for mask, reason in zip(found.groups, ends, strict=True)
            ),
            unfusable=tuple(problem.graph.ops[i].name for i in bits(problem.unfusable)),
            keep=tuple(options.keep),
            split_before=tuple(options.split_before),
            together=tuple(map(tuple, options.together)),
            lower_bound_bytes=bound,
            proof=proof,
            method=self.method,
            stages=tuple(self.stages),
        )


@contextmanager
def _shown(options: Options, what: str) -> Iterator[Progress | None]:
    """A progress bar over the budget: always, never, or on a terminal after two seconds."""
    if options.progress is False or (options.progress == "auto" and not sys.stderr.isatty()):
        yield None
        return
    from tqdm import tqdm

    delay = _PROGRESS_AFTER if options.progress == "auto" else 0.0
    with tqdm(total=options.budget, desc=what, unit="plan", delay=delay, leave=False) as bar:

        def update(plans: int, best: int) -> None:
            bar.set_postfix_str(format_size(best), refresh=False)
            bar.update(plans - bar.n)

        yield update
