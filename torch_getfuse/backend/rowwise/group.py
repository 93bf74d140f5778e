"""The depth-first executor: runs a fusion group row by row, in the cost model's schedule.

Exact mode (docs/method.md, section 11). Each tensor of the group lives in a ring of as many rows as
the plan says and not one more; nothing is computed twice; every tensor from outside is loaded
once, row by row, and every tensor needed outside is written once, and both are counted. What the
plan prices is thus what runs. The steps of a cascade plan (section 12) run so as well, by lines, in
stripes or in slices, with resident tensors left on chip for the next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from torch_getfuse.backend.capture.capture import Capture
from torch_getfuse.backend.fx_nodes.effects import attribute
from torch_getfuse.backend.fx_nodes.values import flat_tensors, is_plain, result_of, traced_value
from torch_getfuse.backend.rowwise.calls import NoRowKernel
from torch_getfuse.backend.rowwise.execution import Execution, Program, Tap
from torch_getfuse.backend.rowwise.kernel_registry import make_kernel
from torch_getfuse.backend.rowwise.kernels import Accumulator
from torch_getfuse.backend.rowwise.ledger import Counts, GroupLedger
from torch_getfuse.backend.rowwise.onchip import NodeStep, OnChip, Stay
from torch_getfuse.backend.rowwise.operand_views import is_base
from torch_getfuse.backend.rowwise.turns import turns_of
from torch_getfuse.backend.rowwise.weights import make_weights
from torch_getfuse.ir import Tensor
from torch_getfuse.partition.cost.cascade.step_layout import StepLayout
from torch_getfuse.partition.plan import PartitionPlan

log = logging.getLogger(__name__)

Layouts = Mapping[str, tuple[list[int], list[int]]]
"""Tensor -> sizes and strides, whole batch."""


class DepthFirstGroup(nn.Module):
    """A fusion group under the name of the child that it replaces.

    Inference only: what it returns has no gradients. It writes nothing but its results, so that
    its FX nodes can always run in its place, and do where a row cannot be computed.

    Args:
        child: the group's FX module; weights are among its inputs or are its attributes.
        capture: of the graph that the child was split from, views brought to their readers
            (:func:`~torch_getfuse.backend.split.grouping.localise_views`).
        plan: whose group it is: for how its tensors and weights are stored.
        layout: what the group holds, and how it runs.
        stay: what is on chip around it.
        by_nodes: runs the child among the other steps.
        entry: takes in what each run counts.
        tell: is given a sentence when the group falls back to its FX nodes in a call.
        trial: finds out about inputs of other strides than in the trace, in a call that has
            them: enters :attr:`layouts`, or raises.

    Attributes:
        layouts: for each tuple of strides of the inputs that was tried, how the results lie: as
            those of the FX nodes do. A fake tensor does not always have the strides of the real
            one, along axes of size one or where a kernel chooses them.

    Raises:
        NoRowKernel: names the operator that cannot be run by rows, and why.
        PlanError: where the layout is not one of the group, or a ring too small for the schedule.
    """

    def __init__(
        self,
        child: fx.GraphModule,
        capture: Capture,
        plan: PartitionPlan,
        layout: StepLayout,
        stay: Stay,
        by_nodes: NodeStep,
        entry: GroupLedger,
        tell: Callable[[Sequence[str]], None] | None = None,
        trial: Callable[[DepthFirstGroup, Sequence[Any]], None] | None = None,
    ) -> None:
        super().__init__()
        self.child = child
        self.by_nodes = by_nodes
        self.entry = entry
        self.stored = plan.graph
        self.tell = tell
        self.trial = trial
        self.layouts: dict[tuple[Any, ...], Layouts] = {}
        self.by_rows = True
        by_name = {node.name: node for node in child.graph.nodes}
        found = {
            node: by_name[node.name]
            for node in capture.graph_module.graph.nodes
            if node.name in by_name and node.op != "output"
        }
        capture = capture.moved(child, found)
        graph = capture.graph
        self.samples = capture.samples
        self.ops = [op for i, op in enumerate(graph.ops) if layout.mask >> i & 1]
        turns = turns_of(graph, layout, stay)
        self.tensors: dict[str, Tensor] = {name: graph.tensors[name] for name in layout.shared}
        self._check_batch(capture)
        self.kernels = {op.writes: make_kernel(capture, op) for op in self.ops}
        takers: dict[str, list[Accumulator]] = {name: [] for name in self.tensors}
        for op in self.ops:
            kernel = self.kernels[op.writes]
            if isinstance(kernel, Accumulator):
                takers[op.reads[0].tensor].append(kernel)
        self.nodes = {name: base_node(capture, name) for name in self.tensors}
        traced = {n: flat_tensors(traced_value(self.nodes[n]))[0] for n in self.nodes}
        for name, tensor in traced.items():
            if not is_plain(tensor):
                raise NoRowKernel(f"{name!r} is a {type(tensor).__name__} of no strided rows")
            if tensor.device.type != "cpu":
                raise NoRowKernel(f"{name!r} is on {tensor.device}; rows run on the CPU")
        self.dtypes = {name: tensor.dtype for name, tensor in traced.items()}
        weights = {
            name: make_weights(capture, k, plan.weight_bytes) for name, k in self.kernels.items()
        }
        self.unseen = tuple(w.op for w in weights.values() if w.elements and w.counted is None)
        self.stay = stay
        self.results = turns.needed
        self.program = Program(
            layout,
            turns,
            self.kernels,
            weights,
            takers,
            self.tensors,
            self.nodes,
            self.dtypes,
            self.samples,
            stay,
            plan.graph.tensor_bytes,
        )
        self._before, self._after = self._around()

    def _check_batch(self, capture: Capture) -> None:
        if self.samples == 1:
            return
        for name in self.tensors:
            batch = capture.batch_axes[name]
            if batch is None or batch != (0, self.tensors[name].shape[0]):
                raise NoRowKernel(f"{name!r} does not have its batch on the first axis")

    def _around(self) -> tuple[list[fx.Node], list[fx.Node]]:
        """Nodes to compute before the schedule (weights) and after it (views that are returned).

        Raises:
            NoRowKernel: where something returned, or a weight, is not to be had.
        """
        inside = {node for op in self.ops for node in [self.nodes[op.writes]]}
        wanted = [node for kernel in self.kernels.values() for node in kernel.weights]
        wanted += [self.nodes[name] for name in self.program.layout.loads]
        before = _closure(wanted, set())
        if computed := before & inside:
            name = min(node.name for node in computed)
            raise NoRowKernel(f"a weight is computed from {name}")
        written = {self.nodes[name] for name in self.results}
        output = self.child.graph.output_node()
        after = _closure(output.all_input_nodes, written | before)
        loose = [n for n in after if n.op != "placeholder" and n not in written]
        for node in loose:
            if node in inside or any(
                s in inside and s not in written for s in node.all_input_nodes
            ):
                raise NoRowKernel(f"{node.name} is read outside but not written there by the plan")
        on_chip = {self.nodes[name] for name in self.stay.held}
        for node in (*loose, *before):
            if not on_chip.isdisjoint(node.all_input_nodes):
                raise NoRowKernel(f"{node.name} is computed from a tensor that is on chip")
        # What is viewed outside must be in memory.
        shown = {source for node in loose for source in node.all_input_nodes}
        self.copied = {
            name
            for name in self.results
            if name not in self.program.layout.writes
            and (name in self.stay.real or self.nodes[name] in shown)
        }
        order = list(self.child.graph.nodes)
        ahead = [n for n in order if n in before or n.op == "placeholder"]
        return ahead, [n for n in order if n in after and n not in before and n not in written]

    # -- one call ---------------------------------------------------------------------------

    def forward(self, *args: Any) -> Any:
        """The child's results, in the child's form; of resident tensors, without memory.

        Raises:
            Exception: what the child's FX nodes raise, which is then no error of the rows.
        """
        if not self.by_rows:
            with torch.no_grad():
                return self.by_nodes(*args)
        chip, layout = self.stay.chip, self.program.layout
        if self.stay.number == 0 or not chip.stores:
            chip.start(self.samples)
        # Written over, of which the FX nodes would need what was there.
        kept = chip.copies([n for n in self.stay.held if layout.shared[n] != n])
        try:
            if self.trial is not None and strides_of(args) not in self.layouts:
                self.trial(self, args)
            results, counts = self.run_rows(args, chip=chip)
        except Exception as error:
            chip.update(kept)
            with torch.no_grad():
                results = self.by_nodes(*args)
            self._give_up(error)
            return results
        self.entry.count(counts, self.stored)
        return results

    def _give_up(self, error: Exception) -> None:
        """Run by FX nodes from now on, for these could be computed where a row could not."""
        self.by_rows = False
        log.warning("torch_getfuse: a group runs as its FX nodes from now on: %s", error)
        self.entry.fall_back(f"in a call, {error}", sorted(self.stay.touched))
        if self.tell is not None:
            self.tell([f"{self.entry.name} runs as its FX nodes: {self.entry.fallback}"])

    def run_rows(
        self, args: Sequence[Any], tap: Tap | None = None, chip: OnChip | None = None
    ) -> tuple[Any, Counts]:
        """The child's results, computed by rows, and what was counted.

        Args:
            args: of the strides that :attr:`layouts` has.
            tap: is shown the rows.
            chip: has the tensors that are on chip, and takes in those that stay. Without it they
                are among ``args``, and all results are real.

        Raises:
            RowError: where a row cannot be computed.
        """
        with torch.no_grad(), _one_thread():
            return self._run(args, tap, chip)

    def _run(self, args: Sequence[Any], tap: Tap | None, chip: OnChip | None) -> tuple[Any, Counts]:
        values: dict[fx.Node, Any] = {}
        given = iter(args)
        for node in self._before:
            values[node] = next(given) if node.op == "placeholder" else self._value(node, values)
        alone = chip is None
        if chip is None:
            chip = OnChip()
            chip.start(self.samples)
        for name in sorted(self.stay.held):
            if name not in chip:
                chip.put(self.tensors[name], values[self.nodes[name]])
        layouts = self.layouts[strides_of(args)]
        written = self.program.layout.writes
        for name in self.results:
            size, stride = layouts[name]
            values[self.nodes[name]] = torch.empty_strided(
                size,
                stride,
                dtype=self.dtypes[name],
                device="cpu" if name in written else "meta",
            )
        counts = Counts()
        Execution(self.program, values, chip, counts, tap).run()
        for name in self.results:
            if name in self.copied or (alone and name not in written):
                tensor, node = self.tensors[name], self.nodes[name]
                values[node] = chip.take(tensor, values[node])
        for node in self._after:
            if node not in values:
                values[node] = self._value(node, values)
        results = fx.map_arg(self.child.graph.output_node().args[0], values.__getitem__)
        return results, counts

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """A node outside the schedule, as FX would compute it."""
        args = fx.map_arg(node.args, values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, values.__getitem__)
        if node.op == "get_attr":
            return attribute(self.child, str(node.target))
        if node.op == "call_module":
            return self.child.get_submodule(str(node.target))(*args, **kwargs)
        return result_of(node, args, kwargs)


def strides_of(args: Sequence[Any]) -> tuple[Any, ...]:
    """The strides of each tensor; ``None`` for other values."""
    return tuple(arg.stride() if isinstance(arg, torch.Tensor) else None for arg in args)


@contextmanager
def _one_thread() -> Iterator[None]:
    """A row is too little work to share: threads would only wait for each other."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _closure(nodes: Iterable[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they are computed from, down to those of ``stop``."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            if node not in stop:
                pending += node.all_input_nodes
    return found


def base_node(capture: Capture, name: str) -> fx.Node:
    """The node that gives a tensor itself, not a view of it.

    Raises:
        NoRowKernel: where there is none.
    """
    calls = capture.calls.get(name)
    if calls:
        shown = capture.views.get(calls[-1].node)
        if shown is not None and is_base(capture, shown):
            return calls[-1].node
    for node, view in capture.views.items():
        picked = node.op == "placeholder" or (calls and node.args[0] is calls[-1].node)
        if view.tensor == name and picked and is_base(capture, view):
            return node
    raise NoRowKernel(f"the group gets views of {name!r} but not the tensor itself")
