"""The depth-first executor: runs an LBDF fusion group row by row, in the cost model's schedule.

Exact mode (docs/method.md, section 11). Each tensor of the group lives in a ring of as many rows as
the plan says and not one more; nothing is computed twice; every tensor from outside is loaded
once, row by row, and every tensor needed outside is written once, and both are counted. What the
plan prices is thus what runs.
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
from torch_getfuse.backend.rowwise.kernel_registry import make_kernel
from torch_getfuse.backend.rowwise.kernels import Accumulator, RowKernel, WholeKernel
from torch_getfuse.backend.rowwise.ledger import Counts, GroupLedger
from torch_getfuse.backend.rowwise.operand_views import is_base
from torch_getfuse.backend.rowwise.rings import Ring, RingView
from torch_getfuse.ir import Tensor
from torch_getfuse.partition.cost.lbdf.row_schedule import Schedule, make_schedule

log = logging.getLogger(__name__)

Tap = Callable[[str, int, int, torch.Tensor], None]
"""Is shown each row that is computed: tensor, sample, row, block."""


Layouts = Mapping[str, tuple[list[int], list[int]]]
"""Tensor -> sizes and strides, whole batch."""


class RowError(RuntimeError):
    """A row that could not be computed, by tensor or operator, and what it raised."""


class DepthFirstGroup(nn.Module):
    """A fusion group under the name of the child that it replaces.

    Inference only: what it returns has no gradients. It writes nothing but its results, so that
    its FX nodes can always run in its place, and do where a row cannot be computed.

    Args:
        child: the group's FX module; weights are among its inputs or are its attributes.
        capture: of the graph that the child was split from, views brought to their readers
            (:func:`~torch_getfuse.backend.split.grouping.localise_views`).
        mask: the group.
        rings: rows of each storage, by its last tensor.
        entry: takes in what each run counts.
        activation_bytes: width of an element in ``entry``.
        tell: is given a sentence when the group falls back to its FX nodes in a call.
        trial: finds out about inputs of other strides than in the trace, in a call that has
            them: enters :attr:`layouts`, or raises.

    Attributes:
        layouts: for each tuple of strides of the inputs that was tried, how the results lie: as
            those of the FX nodes do. A fake tensor does not always have the strides of the real
            one, along axes of size one or where a kernel chooses them.

    Raises:
        NoRowKernel: names the operator that cannot be run by rows, and why.
        PlanError: where a ring is too small for the schedule.
    """

    def __init__(
        self,
        child: fx.GraphModule,
        capture: Capture,
        mask: int,
        rings: dict[str, int],
        entry: GroupLedger | None = None,
        activation_bytes: int = 1,
        tell: Callable[[Sequence[str]], None] | None = None,
        trial: Callable[[DepthFirstGroup, Sequence[Any]], None] | None = None,
    ) -> None:
        super().__init__()
        self.child = child
        self.entry = entry
        self.activation_bytes = activation_bytes
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
        self.schedule: Schedule = make_schedule(graph, mask, rings)
        self.samples = capture.samples
        self.ops = [op for i, op in enumerate(graph.ops) if mask >> i & 1]
        self.tensors: dict[str, Tensor] = {n: graph.tensors[n] for n in self.schedule.storage}
        self.kernels = {op.writes: make_kernel(capture, op) for op in self.ops}
        self.takers: dict[str, list[Accumulator]] = {name: [] for name in self.tensors}
        for op in self.ops:
            kernel = self.kernels[op.writes]
            if isinstance(kernel, Accumulator):
                self.takers[op.reads[0].tensor].append(kernel)
        self.nodes = {name: _node_of(capture, name) for name in self.tensors}
        traced = {n: flat_tensors(traced_value(self.nodes[n]))[0] for n in self.nodes}
        for name, tensor in traced.items():
            if not is_plain(tensor):
                raise NoRowKernel(f"{name!r} is a {type(tensor).__name__} of no strided rows")
            if tensor.device.type != "cpu":
                raise NoRowKernel(f"{name!r} is on {tensor.device}; rows run on the CPU")
        self.dtypes = {name: tensor.dtype for name, tensor in traced.items()}
        self._check_batch(capture)
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
        wanted += [self.nodes[name] for name in self.schedule.loads]
        before = _closure(wanted, set())
        if computed := before & inside:
            name = min(node.name for node in computed)
            raise NoRowKernel(f"a weight is computed from {name}")
        written = {self.nodes[name] for name in self.schedule.writes}
        output = self.child.graph.output_node()
        after = _closure(output.all_input_nodes, written | before)
        loose = [n for n in after if n.op != "placeholder" and n not in written]
        for node in loose:
            if node in inside or any(
                s in inside and s not in written for s in node.all_input_nodes
            ):
                raise NoRowKernel(f"{node.name} is read outside but not written there by the plan")
        order = list(self.child.graph.nodes)
        ahead = [n for n in order if n in before or n.op == "placeholder"]
        return ahead, [n for n in order if n in after and n not in before and n not in written]

    # -- one call ---------------------------------------------------------------------------

    def forward(self, *args: Any) -> Any:
        """The child's results, in the child's form.

        Raises:
            Exception: what the child's FX nodes raise, which is then no error of the rows.
        """
        if self.by_rows:
            try:
                if self.trial is not None and strides_of(args) not in self.layouts:
                    self.trial(self, args)
                results, counts = self.run_rows(args)
            except Exception as error:
                with torch.no_grad():
                    results = self.child(*args)
                self._give_up(error)
                return results
            if self.entry is not None:
                self.entry.count(counts, self.activation_bytes)
            return results
        with torch.no_grad():
            return self.child(*args)

    def _give_up(self, error: Exception) -> None:
        """Run by FX nodes from now on, for these could be computed where a row could not."""
        self.by_rows = False
        log.warning("torch_getfuse: a group runs as its FX nodes from now on: %s", error)
        if self.entry is not None:
            self.entry.fall_back(f"in a call, {error}")
            if self.tell is not None:
                self.tell([f"{self.entry.name} runs as its FX nodes: {self.entry.fallback}"])

    def run_rows(self, args: Sequence[Any], tap: Tap | None = None) -> tuple[Any, Counts]:
        """The child's results, computed by rows, and what was counted.

        Args:
            args: of the strides that :attr:`layouts` has.
            tap: is shown the rows.

        Raises:
            RowError: where a row cannot be computed.
        """
        with torch.no_grad(), _one_thread():
            return self._run(args, tap)

    def _run(self, args: Sequence[Any], tap: Tap | None) -> tuple[Any, Counts]:
        values: dict[fx.Node, Any] = {}
        given = iter(args)
        for node in self._before:
            values[node] = next(given) if node.op == "placeholder" else self._value(node, values)
        layouts = self.layouts[strides_of(args)]
        for name in self.schedule.writes:
            size, stride = layouts[name]
            values[self.nodes[name]] = torch.empty_strided(
                size, stride, dtype=self.dtypes[name], device="cpu"
            )
        counts = Counts()
        run = _Run(self, values, counts, tap)
        for sample in range(self.samples):
            run.sample(sample)
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


class _Run:
    """The buffers of one call."""

    def __init__(
        self,
        group: DepthFirstGroup,
        values: Mapping[fx.Node, Any],
        counts: Counts,
        tap: Tap | None,
    ) -> None:
        self.group, self.values, self.counts, self.tap = group, values, counts, tap
        schedule = group.schedule
        rings: dict[str, Ring] = {}
        for last, rows in schedule.rings.items():
            tensor = group.tensors[last]
            ring = Ring(rows, tensor.elements // tensor.rows, group.dtypes[last])
            rings[last] = ring
            counts.rings += ring.storage.numel()
        self.rings = rings
        self.views = {
            name: RingView(rings[last], group.tensors[name])
            for name, last in schedule.storage.items()
        }
        self.beside = 0

    def sample(self, sample: int) -> None:
        """Carry out the schedule for one sample.

        Raises:
            RowError: where a row cannot be computed.
        """
        group, counts = self.group, self.counts
        for ring in self.rings.values():
            ring.clear()
        loads = {name: self._part(name, sample) for name in group.schedule.loads}
        writes = {name: self._part(name, sample) for name in group.schedule.writes}
        states: dict[Accumulator, Any] = {}
        self.full: dict[str, torch.Tensor] = {}
        self.local = {
            kernel.op.name: {**self.values, **self._own(kernel.by_sample, sample)}
            for kernel in group.kernels.values()
            if kernel.by_sample
        }
        name, unit = "", 0
        try:
            for name, unit in group.schedule.steps:
                source = loads.get(name)
                if source is not None:
                    block = _unit(source, group.tensors[name], unit)
                    counts.read += block.numel()
                else:
                    block = self._compute(name, unit, states)
                    if self.tap is not None:
                        self.tap(name, sample, unit, block)
                self.views[name].write(unit, block)
                if name in writes:
                    _unit(writes[name], group.tensors[name], unit).copy_(block)
                    counts.written += block.numel()
                for taker in group.takers[name]:
                    states[taker] = taker.take(self._values(taker), states.get(taker), block, unit)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise RowError(f"row {unit} of {name} cannot be computed: {reason}") from error
        counts.samples += 1

    def _own(self, nodes: Mapping[fx.Node, int], sample: int) -> dict[fx.Node, torch.Tensor]:
        """Each sample's part of constants that have a batch."""
        return {
            node: self.values[node].narrow(0, sample * lead, lead) for node, lead in nodes.items()
        }

    def _values(self, kernel: RowKernel | Accumulator) -> Mapping[fx.Node, Any]:
        return self.local.get(kernel.op.name, self.values)

    def _compute(self, name: str, unit: int, states: dict[Accumulator, Any]) -> torch.Tensor:
        kernel = self.group.kernels[name]
        if isinstance(kernel, Accumulator):
            return kernel.finish(self._values(kernel), states.pop(kernel))
        if isinstance(kernel, WholeKernel):
            return self._whole(kernel, unit)
        inputs = self._inputs(kernel, unit, unit + 1)
        return kernel.rows(self._values(kernel), inputs, unit, unit + 1)

    def _inputs(self, kernel: RowKernel, low: int, high: int) -> list[torch.Tensor]:
        return [
            self.views[read.tensor].read(*kernel.needs(k, low, high))
            for k, read in enumerate(kernel.op.reads)
        ]

    def _whole(self, kernel: WholeKernel, unit: int) -> torch.Tensor:
        """A row of an operator that is computed at once and held until its last row is out."""
        name, rows = kernel.target.name, kernel.target.rows
        if unit == 0:
            inputs = self._inputs(kernel, 0, rows)
            found = kernel.rows(self._values(kernel), inputs, 0, rows)
            if rows == 1:
                return found
            self.full[name] = found
            self.beside += found.numel()
            self.counts.beside = max(self.counts.beside, self.beside)
        row = _unit(self.full[name], kernel.target, unit)
        if unit == rows - 1:
            self.beside -= self.full.pop(name).numel()
        return row

    def _part(self, name: str, sample: int) -> torch.Tensor:
        """One sample of a tensor outside the group."""
        full: torch.Tensor = self.values[self.group.nodes[name]]
        if self.group.samples == 1:
            return full
        lead = self.group.tensors[name].shape[0]
        return full.narrow(0, sample * lead, lead)


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


def _unit(full: torch.Tensor, tensor: Tensor, unit: int) -> torch.Tensor:
    return full if tensor.stream_axis is None else full.narrow(tensor.stream_axis, unit, 1)


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


def _node_of(capture: Capture, name: str) -> fx.Node:
    """The node that gives a tensor itself, not a view of it.

    Raises:
        NoRowKernel: where there is none.
    """
    calls = capture.calls.get(name)
    if calls and calls[-1].node in capture.views:
        return calls[-1].node
    for node, view in capture.views.items():
        picked = node.op == "placeholder" or (calls and node.args[0] is calls[-1].node)
        if view.tensor == name and picked and is_base(capture, view):
            return node
    raise NoRowKernel(f"the group gets views of {name!r} but not the tensor itself")
