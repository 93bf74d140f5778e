"""Why operators do not fit together (docs/method.md, sections 6 to 8)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from random import Random

from torch_getfuse import plugins
from torch_getfuse.accelerator import format_buffer, format_size
from torch_getfuse.errors import OptionError
from torch_getfuse.group_planner import ExplainerLike, ranker_of
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options
from torch_getfuse.partition.cost.scheme import CostTerm, Dram, Evaluator, once, smallest_buffer
from torch_getfuse.partition.node_set import (
    bits,
    components,
    convex_hull,
    topological_order,
)
from torch_getfuse.partition.problem import FusionProblem
from torch_getfuse.partition.search.edge_cuts import Edge
from torch_getfuse.partition.search.random_split import RandomSplit
from torch_getfuse.partition.search.recursive_split import (
    EdgeRanker,
    RecursiveSplit,
    convex_parts,
    group_edges,
)
from torch_getfuse.partition.selection import no_operator, selected
from torch_getfuse.planner import scheme_of
from torch_getfuse.plugins import ASKED_EXPLAINERS, check_explainers
from torch_getfuse.reporting.blame import Blame, Cut, GroupEdge, Part
from torch_getfuse.reporting.explanation import Explanation


def explain_graph(
    graph: OpGraph,
    options: Options,
    operators: Sequence[str] | None = None,
    explainers: Sequence[ExplainerLike] | None = None,
) -> Explanation:
    """Why operators of a graph do not fit into the buffer together, or how much room they leave.

    Args:
        graph: the operator graph.
        options: buffer, cost model and widths; ``explainer`` selects whose edges are cut,
            ``split_rule`` which cut is taken, ``seed`` the random choices.
        operators: names of operators, or module paths that select all operators below them;
            ``None`` for everything that fits alone.
        explainers: those to ask, by name or as objects; ``None`` for
            :data:`~torch_getfuse.plugins.ASKED_EXPLAINERS`, or for the one that the options name
            where the scheme has no validity predictor to ask.

    Raises:
        OptionError: for an unknown name, or operators that no group can hold because no edge
            joins them.
        WeightsError: where an explainer's weights are missing or made for another model.
    """
    scheme = scheme_of(graph, options)
    if explainers is None:
        default = () if options.explainer is None else (options.explainer,)
        explainers = ASKED_EXPLAINERS if scheme.has_predictor else default
    check_explainers(explainers)
    problem = FusionProblem(Evaluator(scheme, options.buffer_bytes))
    requested = problem.fusable if operators is None else _named(graph, operators)
    if not requested:
        size, index = options.buffer_bytes, range(len(graph))
        needs = [smallest_buffer(scheme, 1 << i, size) for i in index]
        known = [(size, graph.ops[i].name) for i, size in enumerate(needs) if size is not None]
        least = f" ({min(known)[1]} fits from {format_buffer(min(known)[0])} up)" if known else ""
        raise OptionError(
            "no operator fits the buffer alone; name one in operators= to see why, or raise "
            f"buffer={least}"
        )
    group = requested if operators is None else _group_of(problem, requested)
    if any(block & group and block & ~group for block in problem.blocks):
        problem = FusionProblem(problem.evaluator, merge=False)
    return _Question(problem, options, group, group & ~requested).explain(explainers)


class _Question:
    """One set of operators under one buffer, to be explained."""

    def __init__(self, problem: FusionProblem, options: Options, group: int, added: int) -> None:
        self.problem = problem
        self.options = options
        self.graph = problem.graph
        self.evaluator = problem.evaluator
        self.group = group
        self.added = added
        self.positions = group_edges(self.graph, group)
        self.number = {edge: k for k, edge in enumerate(self.positions)}

    def explain(self, explainers: Sequence[ExplainerLike]) -> Explanation:
        evaluator, scheme = self.evaluator, self.evaluator.scheme
        buffer_bytes = evaluator.buffer_bytes
        unfusable = self.group & self.problem.unfusable
        obstacles = self._obstacles()
        valid = evaluator.valid(self.group) and not obstacles
        terms = scheme.terms(self.group, buffer_bytes)
        # Explain and cut an invalid set if it has an edge.
        ask = not valid and bool(self.positions)
        asking = [
            each
            for each in explainers
            if plugins.fact(plugins.EXPLAINERS.load(each), "asks_predictor", False)
        ]
        if asking and not scheme.has_predictor:
            ranker_of(asking[0], self.problem, self.options)  # refuses by name
        asks = bool(asking)
        return Explanation(
            operators=self._names(self.group),
            added=self._names(self.added),
            unfusable=self._names(unfusable),
            obstacles=obstacles,
            scheme=scheme.name,
            granularity=scheme.granularity if scheme.granularities else None,
            activation_bytes=scheme.activation_bytes,
            weight_bytes=scheme.weight_bytes,
            align_channels=self.graph.align_channels,
            buffer_bytes=buffer_bytes,
            demand_bytes=evaluator.buffer(self.group),
            valid=valid,
            probability=self._probability() if asks else None,
            untrained=self._untrained() if asks else "",
            terms=tuple(sorted(terms, key=lambda term: -term.bytes)),
            dram=once(scheme, self.group),
            edges=self._edges(terms),
            blames=tuple(self._blame(name) for name in explainers) if ask else (),
            cut=self._cut() if ask else None,
            fingerprint=self.graph.fingerprint,
        )

    def _names(self, mask: int) -> tuple[str, ...]:
        return tuple(self.graph.ops[i].name for i in bits(mask))

    def _obstacles(self) -> tuple[str, ...]:
        """Why the set cannot be a group, apart from its buffer demand."""
        problem, graph, group = self.problem, self.graph, self.group
        obstacles = []
        for i in bits(problem.unfusable):
            name = graph.ops[i].name
            need = self.evaluator.buffer(1 << i)
            size = "has no schedule" if need is None else f"needs {format_buffer(need)}"
            if group >> i & 1:
                obstacles.append(f"{name} alone {size}: unfusable")
            elif problem.above[i] & group and problem.below[i] & group:
                obstacles.append(
                    f"a path leaves the group and comes back through {name}, which alone {size}"
                )
        pieces = components(group, problem.near)
        if len(pieces) > 1:
            obstacles.append(f"it consists of {len(pieces)} pieces that no edge connects")
        return tuple(obstacles)

    def _edges(self, terms: Sequence[CostTerm]) -> tuple[GroupEdge, ...]:
        graph = self.graph
        held = {term.name: term.bytes for term in terms if term.kind != "weights"}
        edges = []
        for i, j in self.positions:
            tensor = graph.tensors[graph.ops[i].writes]
            edges.append(
                GroupEdge(
                    producer=graph.ops[i].name,
                    consumer=graph.ops[j].name,
                    tensor=tensor.name,
                    shape=tensor.shape[1:],
                    tensor_bytes=graph.tensor_bytes[tensor.name],
                    held_bytes=held.get(tensor.name, 0),
                )
            )
        return tuple(edges)

    # -- explainers -----------------------------------------------------------------------

    def _blame(self, explainer: ExplainerLike) -> Blame:
        ranker = ranker_of(explainer, self.problem, self.options)
        started = time.perf_counter()
        ranked = ranker(self.group)
        seconds = time.perf_counter() - started
        best = max((score for _, score in ranked), default=0.0) or 1.0
        parts = self._split(_only(self.group & self.problem.fusable, ranked))
        return Blame(
            explainer=plugins.name_of(explainer),
            edges=tuple((self.number[edge], max(0.0, score / best)) for edge, score in ranked),
            seconds=seconds,
            parts=None if parts is None else len(parts),
            dram_bytes=None if parts is None else sum(self._dram(part).total for part in parts),
        )

    def _probability(self) -> float:
        """The validity predictor's probability for the group."""
        from torch_getfuse.explain.explainers import one_thread
        from torch_getfuse.explain.features import FeatureTable
        from torch_getfuse.explain.validity import load_model

        scheme = self.evaluator.scheme
        table = FeatureTable(
            self.graph, scheme.granularity, scheme.activation_bytes, scheme.weight_bytes
        )
        tensors = table.group(self.group, self.evaluator.buffer_bytes)
        model = load_model(scheme.name, scheme.granularity).requires_grad_(False)
        with one_thread():
            return float(model(tensors.x, tensors.edge_index).sigmoid())

    def _untrained(self) -> str:
        """The ranges of the validity predictor's training data that the question is outside of."""
        from torch_getfuse.explain.sampling import BUFFERS, WIDTHS

        scheme, buffer_bytes = self.evaluator.scheme, self.evaluator.buffer_bytes
        limits = []
        if not BUFFERS[0] <= buffer_bytes <= BUFFERS[-1]:
            limits.append(f"buffers of {format_size(BUFFERS[0])} to {format_size(BUFFERS[-1])}")
        if (scheme.activation_bytes, scheme.weight_bytes) not in WIDTHS:
            pairs = (f"{one}/{other}" for one, other in sorted(set(WIDTHS)))
            limits.append(f"{', '.join(pairs)} B per activation/weight")
        return " and ".join(limits)

    # -- the cut --------------------------------------------------------------------------

    def _split(self, ranker: EdgeRanker) -> list[int] | None:
        """Cut the group at a ranker's edges into valid parts and single unfusable operators."""
        split = RecursiveSplit(self.problem, ranker, self.options.split_rule)
        alone = [1 << i for i in bits(self.group & self.problem.unfusable)]
        rest = self.group & self.problem.fusable
        groups = split(rest, Random(self.options.seed)) if rest else []
        return None if groups is None else [*groups, *alone]

    def _cut(self) -> Cut:
        explainer = self.options.explainer
        parts = None
        if explainer is not None:
            parts = self._split(ranker_of(explainer, self.problem, self.options))
        if parts is None:
            explainer = "random"
            parts = self._split_at_random()
        graph = self.graph
        others = [1 << i for i in range(len(graph)) if not self.group >> i & 1]
        order = topological_order([*parts, *others], graph)
        assert order is not None, "parts of a convex group form no cycle"
        parts = [parts[k] for k in order if k < len(parts)]
        home = {i: part for part in parts for i in bits(part)}
        edges = [k for k, (i, j) in enumerate(self.positions) if home[i] != home[j]]
        crossing = {}
        for k in edges:
            tensor = graph.tensors[graph.ops[self.positions[k][0]].writes]
            crossing[tensor.name] = graph.tensor_bytes[tensor.name]
        return Cut(
            by=plugins.name_of(explainer),
            parts=tuple(
                Part(
                    operators=self._names(part),
                    buffer_bytes=self.evaluator.buffer(part),
                    fits=not part & self.problem.unfusable,
                    dram=self._dram(part),
                )
                for part in parts
            ),
            edges=tuple(edges),
            crossing=crossing,
        )

    def _split_at_random(self) -> list[int]:
        repair, rng = RandomSplit(self.problem), Random(self.options.seed)
        parts = [1 << i for i in bits(self.group & self.problem.unfusable)]
        for part in convex_parts(self.problem, self.group & self.problem.fusable):
            parts += [part] if self.evaluator.valid(part) else repair(part, rng)
        return parts

    def _dram(self, part: int) -> Dram:
        """``F_D`` of a valid part; for an unfusable operator, the least of any method."""
        if part & self.problem.unfusable:
            return once(self.evaluator.scheme, part)
        return self.evaluator.scheme.dram(part, self.evaluator.buffer_bytes)


def _only(known: int, ranked: list[tuple[Edge, float]]) -> EdgeRanker:
    """A ranker with the explanation of one group: its parts are not explained again."""

    def rank(group: int) -> list[tuple[Edge, float]]:
        return ranked if group == known else []

    return rank


def _named(graph: OpGraph, operators: Sequence[str]) -> int:
    """Mask of the operators selected by names and module paths."""
    if isinstance(operators, str):
        operators = (operators,)
    if not operators:
        raise OptionError("operators is empty: name operators or modules, or leave it out for all")
    mask = 0
    for name in operators:
        found = selected(graph, name)
        if not found:
            raise OptionError(no_operator(graph, name))
        mask |= found
    return mask


def _group_of(problem: FusionProblem, mask: int) -> int:
    """A set with everything on paths between its members.

    Raises:
        OptionError: if the result is not connected.
    """
    mask = convex_hull(mask, problem.above, problem.below)
    pieces = components(mask, problem.near)
    if len(pieces) > 1:
        names = [problem.graph.ops[(piece & -piece).bit_length() - 1].name for piece in pieces[:2]]
        raise OptionError(
            f"no edge joins {names[0]} and {names[1]}, so no group can hold both"
            f"{_joint(problem, pieces[0], pieces[1])}"
        )
    return mask


def _joint(problem: FusionProblem, first: int, second: int) -> str:
    """Hint: the nearest operator that depends on two unconnected sets, or that both depend on."""
    reach = [(problem.below, min), (problem.above, max)]
    for beyond, closest in reach:
        sets = []
        for piece in (first, second):
            total = 0
            for i in bits(piece):
                total |= beyond[i]
            sets.append(total)
        common = list(bits(sets[0] & sets[1] & problem.fusable))
        if common:
            return f"; add {problem.graph.ops[closest(common)].name}, where their paths meet"
    return ""
