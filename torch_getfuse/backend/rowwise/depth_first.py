"""A plan as a module whose fusion groups run depth-first, row by row.

What cannot run by rows runs by its FX nodes, and the ledger says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from torch_getfuse.backend.capture.capture import Capture
from torch_getfuse.backend.capture.quantisation import quantisation
from torch_getfuse.backend.fx_nodes.effects import effects_in_words
from torch_getfuse.backend.rowwise.calls import NoRowKernel
from torch_getfuse.backend.rowwise.group import DepthFirstGroup, base_node
from torch_getfuse.backend.rowwise.kernels import WholeKernel
from torch_getfuse.backend.rowwise.ledger import GroupLedger, Ledger
from torch_getfuse.backend.rowwise.onchip import NodeStep, OnChip, Stay
from torch_getfuse.backend.rowwise.trial import try_rows
from torch_getfuse.backend.split.grouping import localise_views, split_capture
from torch_getfuse.errors import PlanError
from torch_getfuse.partition.cost.cascade.model import Cascade
from torch_getfuse.partition.cost.cascade.step_layout import StepLayout, line_layout
from torch_getfuse.partition.cost.cascade.way import UNFUSABLE
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.partition.steps.layouts import step_layouts
from torch_getfuse.partition.steps.problem import StepProblem

log = logging.getLogger(__name__)


def check_runnable(plan: PartitionPlan) -> None:
    """Refuse a plan that is not in rows.

    Raises:
        PlanError: for a scheme that does not run by rows, and for another granularity than its
            rows'.
    """
    scheme = plan.make_scheme()
    if scheme.granularity != scheme.row_granularity:
        unit = f" in {scheme.granularity} granularity" if scheme.row_granularity else ""
        what = f"{plan.scheme}{unit}"
        raise PlanError(
            f"the plan is for {what}; depth-first runs row by row: plan with scheme='lbdf', "
            "granularity='line', or scheme='cascade'"
        )


def layouts_of(plan: PartitionPlan) -> list[StepLayout]:
    """What each group of a plan in rows holds, and how it runs.

    Raises:
        PlanError: for steps that are not those of a legal plan, or in other ways than the cost
            model's.
    """
    scheme, masks = plan.make_scheme(), plan.masks()
    layouts = []
    if isinstance(scheme, Cascade):
        problem = StepProblem(scheme, plan.buffer_bytes, plan.residency)
        layouts = step_layouts(problem, masks, problem.stated(plan.resident))
        for k, (group, layout) in enumerate(zip(plan.groups, layouts, strict=True)):
            if group.way != layout.way:
                raise PlanError(f"step {k} runs {group.way}; the cost model says {layout.way}")
        return layouts
    plan.check_no_steps()
    for mask in masks:
        terms = scheme.terms(mask, plan.buffer_bytes)
        rings = {term.name: term.units for term in terms if term.kind == "lines"}
        layouts.append(line_layout(plan.graph, mask, rings))
    return layouts


def split_depth_first(
    capture: Capture,
    plan: PartitionPlan,
    *,
    strict: bool = False,
    tell: Callable[[Sequence[str]], None] | None = None,
) -> tuple[fx.GraphModule, Ledger]:
    """The captured graph split by a plan, its fusion groups run by the depth-first executor.

    A group that cannot run by rows stays as its FX nodes, and its entry in the ledger says why;
    ``strict`` raises instead. So does one with a node that does more than compute a value
    (:func:`~torch_getfuse.backend.fx_nodes.effects.effects_in_words`), and one that on random
    values of the traced shapes and types does not give by rows what its FX nodes give
    (:func:`~torch_getfuse.backend.rowwise.trial.try_rows`).

    Args:
        capture: what the plan was made for.
        plan: in rows.
        strict: whether to raise where a group cannot run by rows.
        tell: is given a sentence where a group falls back to its FX nodes in a call.

    Returns:
        The module (inference only), and the ledger that every run of it fills in anew.

    Raises:
        PlanError: for a plan that is not in rows, or whose steps cannot run in its order.
        NoRowKernel: with ``strict``, for a group that cannot run by rows.
    """
    check_runnable(plan)
    layouts = layouts_of(plan)
    capture = localise_views(capture, plan)
    split = split_capture(capture, plan)
    calls = {call.node for own in capture.calls.values() for call in own}
    owner = {node: op for op, own in capture.nodes.items() for node in own}
    effects = {
        node.name: f"{owner.get(node, node.name)} {words}"
        for node, words in effects_in_words(capture.graph_module, calls).items()
    }
    for node in capture.graph_module.graph.nodes:
        if (kind := quantisation(node)) is not None:
            effects[node.name] = f"{owner.get(node, node.name)} has no row kernel to {kind.value}"
    ledger = Ledger([], plan.activation_bytes, capture.samples, plan.unfusable)
    border = _Border.of(capture, plan, split)
    for k, (group, layout) in enumerate(zip(plan.groups, layouts, strict=True)):
        stay = border.stay(k, layout)
        entry = _entry(plan, k, layout)
        ledger.groups.append(entry)
        child = getattr(split, entry.name)
        by_nodes = border.by_nodes(child, stay)
        try:
            if layout.way.kind == UNFUSABLE:
                raise NoRowKernel(f"{group.ops[0]} is unfusable")
            for node in child.graph.nodes:
                if node.op != "placeholder" and node.name in effects:
                    raise NoRowKernel(effects[node.name])
            runner = DepthFirstGroup(
                child, capture, plan, layout, stay, by_nodes, entry, tell, try_rows
            )
            try_rows(runner)
        except (NoRowKernel, PlanError) as error:
            if strict and layout.way.kind != UNFUSABLE:
                told = f"{entry.name} cannot run by rows: {error} (strict=False runs its FX nodes)"
                raise type(error)(told) from error
            entry.fall_back(str(error), sorted(stay.touched))
            log.info("%s runs as its FX nodes: %s", entry.name, error)
            if plan.resident:
                setattr(split, entry.name, by_nodes)
            continue
        entry.whole = tuple(
            op.name
            for op in runner.ops
            if isinstance(runner.kernels[op.writes], WholeKernel)
            and runner.tensors[op.writes].rows > 1
        )
        entry.unseen = runner.unseen
        entry.copied = tuple(sorted(runner.copied))
        setattr(split, entry.name, runner)
    return split, ledger


def _entry(plan: PartitionPlan, k: int, layout: StepLayout) -> GroupLedger:
    """The ledger of a group with the plan's figures, nothing counted yet."""
    group, graph = plan.groups[k], plan.graph
    whole = {layout.shared[name] for name in layout.resident}
    rings = sum(
        rows * graph.row_bytes[last] for last, rows in layout.rings.items() if last not in whole
    )
    alive = {r.tensor for r in plan.resident if r.first <= k <= r.last}
    resident = sum(graph.tensor_bytes[name] for name in whole | (alive - layout.resident))
    return GroupLedger(
        f"fusion_group_{k}",
        group.ops,
        group.dram_read_bytes,
        group.dram_write_bytes,
        rings,
        group.dram_weight_bytes,
        "" if group.way is None else str(group.way),
        resident,
    )


@dataclass(frozen=True)
class _Border:
    """What passes between the steps of a split graph.

    Attributes:
        plan: the plan.
        samples: of the batch.
        chip: what is on chip.
        bases: resident tensor -> name of the node that gives it.
        real: resident tensors that something else than a step reads.
    """

    plan: PartitionPlan
    samples: int
    chip: OnChip
    bases: Mapping[str, str]
    real: frozenset[str]

    @classmethod
    def of(cls, capture: Capture, plan: PartitionPlan, split: fx.GraphModule) -> _Border:
        """Of a graph that was split by a plan.

        Raises:
            PlanError: where tensors stay on chip for steps that cannot run in the plan's order.
        """
        bases = {}
        real: set[str] = set()
        for resident in plan.resident:
            try:
                bases[resident.tensor] = base_node(capture, resident.tensor).name
            except NoRowKernel:
                # Every step is given views of it, so that none runs by rows; of what a part was
                # written into, steps are given that tensor's own memory.
                real |= _written_into(capture, resident.tensor)
        steps = [f"fusion_group_{k}" for k in range(len(plan.groups))]
        order = []
        for call in split.graph.find_nodes(op="call_module"):
            if call.target not in steps:
                continue
            order.append(call.target)
            outputs = _outputs(getattr(split, call.target))
            picked = [call] if len(outputs) == 1 else list(call.users)
            for value in picked:
                output = outputs[0 if value is call else value.args[1]]
                if any(user.target not in steps for user in value.users):
                    real |= {name for name, node in bases.items() if node == output}
        if plan.resident and order != steps:
            late = next(a for a, b in zip(steps, order, strict=True) if a != b)
            raise PlanError(f"{late} cannot run as early as the plan says: verify() tells why")
        return cls(plan, capture.samples, OnChip(), bases, frozenset(real))

    def stay(self, k: int, layout: StepLayout) -> Stay:
        """What is on chip around a step."""
        alive = {r.tensor: r for r in self.plan.resident if r.tensor in layout.resident}
        return Stay(
            self.chip,
            k,
            frozenset(alive),
            frozenset(name for name, life in alive.items() if life.first < k),
            frozenset(name for name, life in alive.items() if life.last > k),
            self.real.intersection(alive),
        )

    def by_nodes(self, child: fx.GraphModule, stay: Stay) -> NodeStep:
        """A step as its FX nodes."""
        names = {node: name for name, node in self.bases.items()}
        given = [node.name for node in child.graph.find_nodes(op="placeholder")]
        inputs, outputs = (
            {names[node]: at for at, node in enumerate(nodes) if node in names}
            for nodes in (given, _outputs(child))
        )
        return NodeStep(child, stay, self.samples, self.plan.graph.tensors, inputs, outputs)


def _written_into(capture: Capture, name: str) -> set[str]:
    """The tensors in whose place another one may be written."""
    graph = capture.graph
    op = graph.ops[graph.producer[name]] if name in graph.producer else None
    shape = graph.tensors[name].shape
    return {r.tensor for r in op.reads if graph.tensors[r.tensor].shape == shape} if op else set()


def _outputs(child: fx.GraphModule) -> list[str]:
    """Names of the nodes that a child returns."""
    found = child.graph.output_node().args[0]
    results = found if isinstance(found, (tuple, list)) else (found,)
    return [node.name for node in results if isinstance(node, fx.Node)]
