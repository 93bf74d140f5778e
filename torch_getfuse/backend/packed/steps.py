"""From an inference graph to steps: packed convolutions, operators by rows, and everything else.

Steps keep the order of the graph. A convolution takes in the eval batch norm, the residual
addition and the activation that follow it, if nothing else reads what lies between. A step that
can run on a block of rows says which input rows it needs; all others run on whole maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from torch_getfuse.backend.fx_nodes.autocast import is_switch
from torch_getfuse.backend.fx_nodes.effects import order_edges
from torch_getfuse.backend.fx_nodes.normalize import Invocation, normalise
from torch_getfuse.backend.fx_nodes.values import flat_tensors, traced_value
from torch_getfuse.backend.packed.live_conv import LiveConv
from torch_getfuse.backend.packed.packed_conv import Activation, Affine, ConvShape, PackedConv
from torch_getfuse.backend.rules.registry import UNKNOWN, facts_of, positional
from torch_getfuse.backend.rules.rule import spread
from torch_getfuse.backend.torch_private import (
    OpOverloadPacket,
    schema_of,
    storage_key,
    tree_map_only,
)
from torch_getfuse.ir.window import positions_needed

_DTYPES = (torch.float32, torch.bfloat16)

_UNARY: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
_BINARY: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
}


@dataclass(frozen=True)
class RowWindow:
    """Rows that an output block needs of one map, before the map's borders are considered.

    Attributes:
        kernel, stride, dilation, padding: along rows.
        fill: what rows outside the map hold.
    """

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    padding: int = 0
    fill: float = 0.0

    def needs(self, low: int, high: int) -> tuple[int, int]:
        """First needed row and the one after the last, for output rows ``low`` to ``high - 1``."""
        return positions_needed(self.kernel, self.stride, self.dilation, self.padding, low, high)


@dataclass
class Step:
    """One thing that a fast program does.

    Attributes:
        node: the FX node whose value it gives.
        maps: nodes of the tensors it reads, apart from weights.
        windows: per map, how a block of rows reads it; ``None`` for a map that is read whole.
            An empty tuple: the step does not run by rows.
        conv: the packed convolution, or ``None``.
        live: the same as a product with the weights as they lie, where that may be faster.
        weights: nodes of a convolution's weight and of the vectors of its :class:`Affine`.
        whole: from the values of ``maps`` to the value; of a convolution this is not used.
        rows: the same for blocks of rows, vertical padding included.
        covers: all nodes that it stands for.
    """

    node: fx.Node
    maps: tuple[fx.Node, ...]
    windows: tuple[RowWindow | None, ...] = ()
    conv: PackedConv | None = None
    live: LiveConv | None = None
    weights: tuple[fx.Node, ...] = ()
    whole: Callable[..., Any] | None = None
    rows: Callable[..., Tensor] | None = None
    covers: tuple[fx.Node, ...] = field(default=())

    @property
    def by_rows(self) -> bool:
        """Whether it can run on blocks of rows."""
        return bool(self.windows)


ByRows = tuple[tuple[fx.Node, ...], tuple[RowWindow | None, ...], Callable[..., Tensor]]
"""Maps, their windows, and what computes a block of rows from blocks of them."""


class Unfit(Exception):
    """Why a graph is left to its FX nodes."""


def build_steps(gm: fx.GraphModule) -> list[Step]:
    """The steps of a graph in executable order; its inputs, attributes and output are none.

    Args:
        gm: a graph that runs without gradients, with traced values.

    Raises:
        Unfit: where an operator changes what several others read, or the layout of what it
            changes matters.
    """
    return _Builder(gm).run()


def is_map(node: object) -> TypeGuard[fx.Node]:
    """Whether a node's value is a dense map ``(N, C, H, W)`` that fast programs handle."""
    if not isinstance(node, fx.Node):
        return False
    value = traced_value(node)
    return (
        isinstance(value, Tensor)
        and value.dim() == 4
        and value.dtype in _DTYPES
        and value.device.type == "cpu"
        and all(isinstance(size, int) for size in value.shape)
    )


def _is_vector(node: object, conv: fx.Node) -> TypeGuard[fx.Node]:
    """Whether a node's value has one number per channel of a convolution's result."""
    value = traced_value(node) if isinstance(node, fx.Node) else None
    return (
        isinstance(value, Tensor)
        and tuple(value.shape) == (traced_value(conv).shape[1],)
        and value.dtype in _DTYPES
    )


class _Builder:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.nodes = [
            node
            for node in gm.graph.nodes
            # Where autocast changes nothing, as here, it need not be entered.
            if node.op not in ("placeholder", "get_attr", "output") and not is_switch(node)
        ]
        self.calls: dict[fx.Node, Invocation] = {
            node: normalise(node, positional)
            for node in self.nodes
            if node.op in ("call_function", "call_method")
        }
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.taken: set[fx.Node] = set()  # nodes that a convolution computes as well
        ordered = [*self.nodes, gm.graph.output_node()]
        for i, earlier in enumerate(order_edges(gm, ordered)):
            node = ordered[i]
            data = {self.position[s] for s in node.all_input_nodes if s in self.position}
            if earlier - data:
                other = self.nodes[max(earlier - data)]
                raise Unfit(
                    f"{node.name} must run after {other.name}, whose value it does not read"
                )

    def run(self) -> list[Step]:
        made: dict[fx.Node, Step] = {}
        for node in self.nodes:
            step = self._convolution(node)
            if step is not None:
                self.taken.update(step.covers)
                made[step.node] = step
        return [
            made[node] if node in made else self._other(node)
            for node in self.nodes
            if node in made or node not in self.taken
        ]

    # -- convolutions -------------------------------------------------------------------------

    def _convolution(self, node: fx.Node) -> Step | None:
        call = self.calls.get(node)
        if call is None or call.name not in ("conv2d", "convolution") or not is_map(node):
            return None
        x, weight, bias = (call.args.get(key) for key in ("input", "weight", "bias"))
        if not is_map(x) or not isinstance(weight, fx.Node):
            return None
        shape = self._conv_shape(call, weight, x)
        if shape is None:
            return None
        if traced_value(weight).dtype != traced_value(x).dtype:
            return None  # autocast or a mistake of the user's: eager knows what to do
        if bias is not None and not _is_vector(bias, node):
            return None
        covers = [node]
        vectors: list[fx.Node | None] = [bias]
        epsilon = None
        follower = self._only_reader(covers)
        if follower is not None and (norm := self._folds(follower, node)) is not None:
            keys = ("running_mean", "running_var", "weight", "bias")
            vectors += [norm.args[key] for key in keys]
            epsilon = float(norm.args["eps"])
            covers.append(follower)
            follower = self._only_reader(covers)
        other = None
        if follower is not None and (other := self._added(follower, covers)) is not None:
            after = self._only_reader([*covers, follower])
            activation = self._activation(after) if after is not None else None
            if activation is not None and not activation.follows_addition:
                activation = None
            covers.append(follower)
        else:
            after = follower
            activation = self._activation(after) if after is not None else None
        if activation is not None:
            assert after is not None
            covers.append(after)
        affine = Affine([value is not None for value in vectors], epsilon)
        conv = PackedConv(shape, activation or Activation(), affine, other is not None)
        live = None
        if self._may_run_live(shape, node, weight):
            live = LiveConv(shape, conv.activation, affine)
        window = RowWindow(shape.kernel[0], shape.stride[0], shape.dilation[0], shape.padding[0])
        maps = (x,) if other is None else (x, other)
        windows = (window,) if other is None else (window, RowWindow())
        return Step(
            covers[-1],
            maps,
            windows,
            conv=conv,
            live=live,
            weights=(weight, *(value for value in vectors if value is not None)),
            covers=tuple(covers),
        )

    @staticmethod
    def _may_run_live(shape: ConvShape, node: fx.Node, weight: fx.Node) -> bool:
        """Whether a product with the weight as it lies may be faster than comparing the weight."""
        value = traced_value(node)
        if value.dtype != torch.float32 or shape.groups != 1:
            return False
        # What the positions read is written anew where windows overlap: for a few only.
        positions = value.numel() // value.shape[1]
        return shape.is_linear or positions <= int(traced_value(weight).shape[0])

    def _conv_shape(self, call: Invocation, weight: fx.Node, x: fx.Node) -> ConvShape | None:
        padding, kernels = call.args.get("padding", 0), traced_value(weight)
        if isinstance(padding, str) or call.args.get("transposed"):
            return None
        values = [
            spread(call.args.get(key, default), 2)
            for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))
        ]
        if not all(isinstance(item, int) for pair in values for item in pair):
            return None
        stride, pads, dilation = ((int(a), int(b)) for a, b in values)
        kernel = (int(kernels.shape[2]), int(kernels.shape[3]))
        groups = int(call.args.get("groups") or 1)
        _, channels, rows, cols = traced_value(x).shape
        size = (1, int(channels), int(rows), int(cols))
        return ConvShape(kernel, stride, pads, dilation, groups, size)

    def _only_reader(self, chain: Sequence[fx.Node]) -> fx.Node | None:
        """The one node that reads the last of ``chain``, once, if it is a call that is free."""
        users = list(chain[-1].users)
        if len(users) != 1 or users[0] not in self.calls or users[0] in self.taken:
            return None
        if _is_told_where(self.calls[users[0]]):
            return None
        return users[0] if list(users[0].all_input_nodes).count(chain[-1]) == 1 else None

    def _folds(self, node: fx.Node, conv: fx.Node) -> Invocation | None:
        """The call of an eval batch norm over ``conv`` with statistics given as nodes."""
        call = self.calls[node]
        if call.name != "batch_norm" or call.args.get("input") is not conv:
            return None
        if call.args.get("training") is not False or not isinstance(call.args.get("eps"), float):
            return None
        needed = (call.args.get("running_mean"), call.args.get("running_var"))
        optional = (call.args.get("weight"), call.args.get("bias"))
        if not is_map(node) or not all(_is_vector(value, conv) for value in needed):
            return None
        # Eager also takes vectors of a higher rank, (C, 1, 1, 1), which then run as they are.
        good = all(value is None or _is_vector(value, conv) for value in optional)
        return call if good else None

    def _added(self, node: fx.Node, chain: Sequence[fx.Node]) -> fx.Node | None:
        """The other map of an addition of two maps of one shape."""
        call = self.calls[node]
        if call.name != "add" or call.args.get("alpha", 1) != 1:
            return None
        pair = (call.args.get("input"), call.args.get("other"))
        other = pair[1] if pair[0] is chain[-1] else pair[0]
        if not is_map(other) or other is chain[-1] or not is_map(node):
            return None
        if call.mutates and pair[0] is not chain[-1]:
            return None
        same = traced_value(other).shape == traced_value(chain[-1]).shape
        alike = traced_value(other).dtype == traced_value(chain[-1]).dtype
        return other if same and alike else None

    def _activation(self, node: fx.Node) -> Activation | None:
        """The post-operator that computes what ``node`` does."""
        call = self.calls[node]
        if not is_map(node):
            return None
        plain = {
            "relu": "relu",
            "sigmoid": "sigmoid",
            "tanh": "tanh",
            "silu": "swish",
            "hardswish": "hardswish",
            "hardsigmoid": "hardsigmoid",
        }
        if call.name in plain:
            return Activation(plain[call.name])
        bounds: tuple[Any, Any] | None = None
        if call.name == "relu6":
            bounds = (0.0, 6.0)
        elif call.name == "hardtanh":
            bounds = (call.args.get("min_val", -1.0), call.args.get("max_val", 1.0))
        elif call.name == "clamp":
            bounds = (call.args.get("min"), call.args.get("max"))
        if bounds is not None and all(isinstance(bound, (int, float)) for bound in bounds):
            return Activation("hardtanh", (float(bounds[0]), float(bounds[1])))
        if call.name == "leaky_relu":
            slope = call.args.get("negative_slope", 0.01)
            return Activation("leaky_relu", (float(slope),)) if isinstance(slope, float) else None
        if call.name == "gelu":
            return Activation("gelu", (), str(call.args.get("approximate", "none")))
        return None

    # -- everything else ----------------------------------------------------------------------

    def _other(self, node: fx.Node) -> Step:
        inputs = tuple(node.all_input_nodes)
        whole: Callable[..., Any] = _Node(self.gm, node)
        call = self.calls.get(node)
        rule = UNKNOWN if call is None else facts_of(call.name)
        if call is None or not rule.is_torchs or rule.by_strides:
            if any(map(is_map, inputs)) and (call is None or call.mutates):
                raise Unfit(f"{node.name} may depend on the strides of what it changes")
            whole = _AsTraced(whole, inputs)
        elif any(map(_overlaps, flat_tensors(traced_value(node)))):
            # Its strides cannot be made from other ones afterwards: nothing writes to them.
            whole = _AsTraced(whole, inputs)
        if _may_alias(call) and not _storages(node) & set().union(*map(_storages, inputs)):
            whole = _Apart(whole)
        step = Step(node, inputs, whole=whole, covers=(node,))
        if call is not None and is_map(node) and not _is_told_where(call):
            found = self._by_rows(node, call)
            if found is not None:
                step.maps, step.windows, step.rows = found
                step.whole = _Reordered(whole, inputs, step.maps)
        return step

    def _by_rows(self, node: fx.Node, call: Invocation) -> ByRows | None:
        x = call.args.get("input")
        if call.name in _UNARY and is_map(x):
            return (x,), (RowWindow(),), _UNARY[call.name]
        if call.name in ("hardtanh", "relu6", "clamp") and is_map(x):
            activation = self._activation(node)
            if activation is not None:
                low, high = activation.scalars
                return (x,), (RowWindow(),), lambda t: torch.clamp(t, low, high)
        if call.name in _BINARY and call.args.get("alpha", 1) == 1:
            return self._pointwise(node, call)
        if call.name == "cat":
            return self._cat(node, call)
        if call.name == "max_pool2d" and is_map(x) and not call.args.get("return_indices"):
            return self._max_pool(x, call)
        return None

    def _pointwise(self, node: fx.Node, call: Invocation) -> ByRows | None:
        one, two = call.args.get("input"), call.args.get("other")
        rows = traced_value(node).shape[2]
        if not is_map(one) or not is_map(two):
            return None
        maps = (one, two)
        windows = tuple(
            RowWindow() if traced_value(value).shape[2] == rows else None for value in maps
        )
        if windows == (None, None) or call.args.get("rounding_mode"):
            return None
        if any(traced_value(v).dtype != traced_value(node).dtype for v in maps):
            return None
        return maps, windows, _BINARY[call.name]

    def _cat(self, node: fx.Node, call: Invocation) -> ByRows | None:
        parts = call.args.get("tensors") or call.args.get("*") or call.args.get("input")
        if isinstance(parts, (list, tuple)) and len(parts) == 1 and isinstance(parts[0], list):
            parts = parts[0]
        axis = call.args.get("dim", 0)
        if axis not in (1, -3) or not isinstance(parts, (list, tuple)):
            return None
        if not all(is_map(part) for part in parts) or len(set(parts)) != len(parts):
            return None
        return tuple(parts), (RowWindow(),) * len(parts), lambda *blocks: torch.cat(blocks, 1)

    def _max_pool(self, x: fx.Node, call: Invocation) -> ByRows | None:
        kernel = spread(call.args["kernel_size"], 2)
        given = call.args.get("stride")
        stride = kernel if given is None or given == [] else spread(given, 2)
        padding = spread(call.args.get("padding", 0), 2)
        dilation = spread(call.args.get("dilation", 1), 2)
        ceil = bool(call.args.get("ceil_mode", False))
        window = RowWindow(kernel[0], stride[0], dilation[0], padding[0], float("-inf"))

        def rows(block: Tensor) -> Tensor:
            return F.max_pool2d(block, kernel, stride, (0, padding[1]), dilation, ceil)

        return (x,), (window,), rows


class _Node:
    """Runs one FX node on the values of its inputs, whatever it is."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node) -> None:
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                values[source] = graph.node_copy(source, values.__getitem__)
            else:
                values[source] = graph.placeholder(source.name)
        graph.output(graph.node_copy(node, values.__getitem__))
        self._run = fx.GraphModule(gm, graph).forward
        self._attributes = tuple(source.op == "get_attr" for source in node.all_input_nodes)

    def __call__(self, *values: Any) -> Any:
        given = [v for v, own in zip(values, self._attributes, strict=True) if not own]
        return self._run(*given)


class _AsTraced:
    """Gives an operator its maps with the strides that the trace saw."""

    def __init__(self, whole: Callable[..., Any], inputs: Sequence[fx.Node]) -> None:
        self._whole = whole
        self._inputs = tuple(inputs)

    def __call__(self, *values: Any) -> Any:
        return self._whole(*map(as_traced, values, self._inputs))


class _Reordered:
    """``whole`` of a step whose maps stand in another order than the node's inputs."""

    def __init__(
        self, whole: Callable[..., Any], inputs: Sequence[fx.Node], maps: Sequence[fx.Node]
    ) -> None:
        self._whole = whole
        self._at = [list(maps).index(node) for node in inputs]

    def __call__(self, *values: Any) -> Any:
        return self._whole(*(values[k] for k in self._at))


class _Apart:
    """Gives a result memory of its own, as the trace does, where other strides make it a view."""

    def __init__(self, whole: Callable[..., Any]) -> None:
        self._whole = whole

    def __call__(self, *values: Any) -> Any:
        result = self._whole(*values)
        own = {tensor.untyped_storage().data_ptr() for tensor in flat_tensors(result)}
        given = {tensor.untyped_storage().data_ptr() for tensor in flat_tensors(values)}
        return tree_map_only(Tensor, torch.clone, result) if own & given else result


def _is_told_where(call: Invocation) -> bool:
    """Whether a call is told where to write, ``out=``: an input that it does not read."""
    return call.args.get("out") is not None


def _storages(node: fx.Node) -> set[int]:
    """The storages of a node's traced value."""
    return {storage_key(tensor) for tensor in flat_tensors(traced_value(node))}


def _may_alias(call: Invocation | None) -> bool:
    """Whether an operator returns, for some strides, its input or a view of it."""
    packet = None if call is None else getattr(torch.ops.aten, call.name, None)
    if not isinstance(packet, OpOverloadPacket):
        return True
    schemas = [schema_of(getattr(packet, name)) for name in packet.overloads()]
    return any(
        value.alias_info is not None and not value.alias_info.is_write
        for schema in schemas
        for value in schema.returns
    )


def _overlaps(value: Tensor) -> bool:
    """Whether elements of a tensor share memory, as where it is expanded."""
    reach = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def as_traced(value: Any, node: fx.Node) -> Any:
    """A value in the layout that the trace promises to whoever looks at its strides.

    One whose elements share memory was made as the trace makes it, but for axes of size one.
    """
    traced = traced_value(node)
    if not isinstance(value, Tensor) or value.stride() == traced.stride() or _overlaps(traced):
        return value
    same = torch.empty_strided(traced.shape, traced.stride(), dtype=value.dtype)
    return same.copy_(value)
