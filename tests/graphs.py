"""Random operator graphs with everything the cost models must cope with.

Every graph is drawn from a ``random.Random``, so hypothesis can shrink it and a seed can name it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from torch_getfuse.ir import Op, OpGraph, Read, Tensor, Window
from torch_getfuse.partition.node_set import ancestors, components, mask_of, neighbours

IDENTITY = Window.identity()


class Builder:
    """Adds operators one at a time; each names its output after itself."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.tensors: dict[str, Tensor] = {}
        self.inputs: list[str] = []

    def input(self, shape: Sequence[int]) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs.append(name)
        self.tensors[name] = Tensor.of(name, shape)
        return name

    def op(
        self,
        kind: str,
        reads: Sequence[tuple[str, Window]],
        shape: Sequence[int],
        weights: int = 0,
        in_place: bool = False,
        mixes: bool = False,
        groups: int = 1,
    ) -> str:
        name = f"{kind}{len(self.ops)}"
        self.tensors[name] = Tensor.of(name, shape)
        self.ops.append(
            Op(
                name,
                kind,
                tuple(Read(tensor, window) for tensor, window in reads),
                name,
                weight_elements=weights,
                in_place=in_place,
                mixes_channels=mixes,
                groups=groups,
            )
        )
        return name

    def conv(
        self,
        source: str,
        channels: int,
        kernel: int = 1,
        stride: int = 1,
        dilation: int = 1,
        padding: int | None = None,
        depthwise: bool = False,
    ) -> str:
        _, c, h, w = self.tensors[source].shape
        pad = dilation * (kernel - 1) // 2 if padding is None else padding
        window = Window.sliding(
            (kernel, kernel), (stride, stride), (dilation, dilation), (pad, pad)
        )
        size = [window.output_size(axis, n) or (h, w)[axis] for axis, n in enumerate((h, w))]
        if depthwise:
            channels = c
        weights = channels * kernel * kernel * (1 if depthwise else c) + channels
        return self.op(
            "conv",
            [(source, window)],
            (1, channels, *size),
            weights,
            mixes=True,
            groups=c if depthwise else 1,
        )

    def act(self, source: str) -> str:
        return self.op("act", [(source, IDENTITY)], self.tensors[source].shape, in_place=True)

    def add(self, *sources: str) -> str:
        return self.op("add", [(s, IDENTITY) for s in sources], self.tensors[sources[0]].shape)

    def graph(self, outputs: Sequence[str] = ()) -> OpGraph:
        read = {r.tensor for op in self.ops for r in op.reads}
        sinks = [op.writes for op in self.ops if op.writes not in read]
        wanted = tuple(dict.fromkeys([*sinks, *outputs]))
        used = [name for name in self.inputs if name in read]
        tensors = {n: t for n, t in self.tensors.items() if n in used or n not in self.inputs}
        return OpGraph(tuple(used), wanted, tuple(self.ops), tensors)


def heavy_between() -> OpGraph:
    """Two convolutions and the sum of both; the second has 1000 weights, the first next to none."""
    build = Builder()
    first = build.conv(build.input((1, 1, 4, 4)), 1)
    heavy = build.op("conv", [(first, IDENTITY)], (1, 1, 4, 4), weights=1000)
    build.add(heavy, first)
    return build.graph()


def random_graph(rng: Random, operators: int = 8, size: int = 12, crops: bool = False) -> OpGraph:
    """A graph of exactly ``operators`` operators over maps of up to ``size`` rows.

    With ``crops`` some operators read a part of a map's rows and columns (a slice).
    """
    build = Builder()
    maps = [
        build.input((1, rng.randint(1, 3), rng.randint(1, size), rng.randint(1, size)))
        for _ in range(rng.choice((1, 1, 2)))
    ]
    vectors: list[str] = []  # one-unit maps: the scales of Squeeze-and-Excite
    while len(build.ops) < operators:
        # Mostly the newest tensors, so that depth and long skips both appear.
        recent = maps[-3:] if rng.random() < 0.7 else maps
        source = rng.choice(recent)
        _, c, h, w = shape = build.tensors[source].shape
        same = [m for m in maps if m != source and build.tensors[m].shape == shape]
        draw = rng.random()
        if crops and rng.random() < 0.2:
            begins = [rng.choice((0, 0, rng.randrange(n))) for n in (h, w)]
            ends = [rng.choice((0, 0, rng.randrange(n - b))) for n, b in zip((h, w), begins)]
            window = Window.sliding(
                (1, 1),
                padding=(-begins[0], -begins[1]),
                padding_end=(-ends[0], -ends[1]),
            )
            out = [n - b - e for n, b, e in zip((h, w), begins, ends)]
            made = build.op("crop", [(source, window)], (1, c, *out))
        elif draw < 0.22 and same:
            others = rng.sample(same, min(len(same), rng.choice((1, 1, 2))))
            operands = [source, *others]
            rng.shuffle(operands)
            made = build.add(*operands)
        elif draw < 0.34:
            made = build.act(source)
        elif draw < 0.42 and min(h, w) >= 2:
            scale = rng.choice((2, 2, 3))
            if max(h, w) * scale > 2 * size:
                continue
            made = build.op(
                "resize",
                [(source, Window.resize((float(scale), float(scale))))],
                (1, c, h * scale, w * scale),
            )
        elif draw < 0.46:
            kernel, stride, pad = rng.choice(((2, 2, 0), (4, 2, 1), (3, 2, 1)))
            window = Window.transposed((kernel,) * 2, (stride,) * 2, (1, 1), (pad,) * 2)
            out = [(window.output_size(axis, n) or 0) for axis, n in enumerate((h, w))]
            if min(out) < 1 or max(out) > 2 * size:
                continue
            made = build.op("deconv", [(source, window)], (1, c, *out), c * kernel, mixes=True)
        elif draw < 0.53:
            window = Window.reduce() if rng.random() < 0.7 else Window.whole()
            made = build.op("pool", [(source, window)], (1, c, 1, 1))
            vectors.append(made)
            continue
        elif draw < 0.62 and vectors:
            scale_by = rng.choice(vectors)
            operands = [(source, IDENTITY), (scale_by, IDENTITY)]
            rng.shuffle(operands)
            made = build.op("mul", operands, shape)
        elif draw < 0.65:
            made = build.op("softmax", [(source, Window.whole())], shape)
        else:
            kernel = rng.choice((1, 1, 3, 3, 5))
            stride = rng.choice((1, 1, 1, 2, 3))
            dilation = rng.choice((1, 1, 2))
            padding = rng.choice((None, None, 0, 1, 2))
            reach = dilation * (kernel - 1) + 1
            pad = (reach - 1) // 2 if padding is None else padding
            if min(h, w) + 2 * pad < reach:
                continue
            made = build.conv(
                source, rng.randint(1, 3), kernel, stride, dilation, padding, rng.random() < 0.3
            )
        maps.append(made)
    extra = [op.writes for op in build.ops if rng.random() < 0.1]
    return build.graph(extra)


def with_pools(rng: Random, graph: OpGraph, share: float) -> OpGraph:
    """The graph with that share of its convolutions as pools: windows, but no weights."""
    return replace(
        graph,
        ops=tuple(
            replace(op, kind="pool", weight_elements=0, mixes_channels=False, groups=1)
            if op.kind == "conv" and rng.random() < share
            else op
            for op in graph.ops
        ),
    )


def residual_chain(rng: Random, operators: int, size: int) -> OpGraph:
    """Operators that mostly read the one before them, over maps of ``size`` rows, and skips."""
    build = Builder()
    channels = rng.choice((1, 2, 4))
    maps = [build.input((1, channels, size, rng.choice((1, size, 3 * size))))]
    if rng.random() < 0.3:
        maps.insert(0, build.input(build.tensors[maps[0]].shape))
    while len(build.ops) < operators:
        source = maps[-1] if rng.random() < 0.9 else rng.choice(maps)
        shape = build.tensors[source].shape
        same = [m for m in maps if m != source and build.tensors[m].shape == shape]
        draw = rng.random()
        if draw < 0.3 and same:
            made = build.add(source, rng.choice(same))
        elif draw < 0.45:
            made = build.act(source)
        else:
            kernel = rng.choice((1, 3, 3, 5))
            stride = 2 if shape[2] > 3 and rng.random() < 0.1 else 1
            grown = channels if rng.random() < 0.8 else rng.choice((1, 2, 4))
            made = build.conv(source, grown, kernel, stride, depthwise=rng.random() < 0.2)
        maps.append(made)
    return build.graph([rng.choice(maps[1:])] if rng.random() < 0.2 else [])


def cascade_graph(rng: Random, operators: int = 6) -> OpGraph:
    """A graph for cascade: few rows, so that every number of stripes can be tried.

    Beyond :func:`random_graph`, there are residual sums, elementwise operators that are not marked
    in place, weights from next to none to more than the maps, enough channels to slice and further
    orders.
    """
    if rng.random() < 0.5:
        graph = random_graph(rng, operators, rng.choice((2, 4, 4, 6)), crops=rng.random() < 0.3)
    else:
        graph = residual_chain(rng, operators, rng.choice((3, 5, 9)))
    wider = rng.choice((1, 1, 2, 3))
    tensors = {
        name: replace(t, shape=(1, t.shape[1] * wider, *t.shape[2:]))
        for name, t in graph.tensors.items()
    }
    rows_of_weights = rng.choice((0, 1, 2))
    ops = []
    for op in graph.ops:
        same = [
            name
            for name in tensors
            if tensors[name].shape == tensors[op.writes].shape
            and graph.producer.get(name, -1) < graph.index[op.name]
            and name not in {read.tensor for read in op.reads}
        ]
        weights = op.weight_elements * rng.choice((1, 1, 4)) + (rng.random() < 0.05)
        if weights and rows_of_weights:
            row = tensors[op.writes].elements // tensors[op.writes].rows
            weights = rng.randint(1, rows_of_weights * row)
        marked = op.in_place and rng.random() < 0.6
        reads = op.reads
        if same and not marked and rng.random() < 0.3:
            reads = (*reads, Read(rng.choice(same), IDENTITY))
        ops.append(replace(op, reads=reads, weight_elements=weights, in_place=marked))
    read = {read.tensor for op in ops for read in op.reads}
    outputs = [name for name in graph.outputs if name not in read or rng.random() < 0.5]
    graph = replace(graph, ops=tuple(ops), tensors=tensors, outputs=tuple(outputs))
    return with_order(rng, graph, 0.2) if rng.random() < 0.1 else graph


def interesting_buffer(rng: Random, alone: Sequence[int], whole: int, grown: int) -> int:
    """A buffer under which something is to be decided.

    Args:
        alone: the least that each operator needs, one by one.
        whole: what the whole graph needs at once.
        grown: what some group of operators needs, run in some way.

    The last is barely met or barely missed, or it is somewhere between the needs of single
    operators, so that some are unfusable, or little more than all of those.
    """
    low, middle, high = min(alone) + 1, max(alone) + 1, max(*alone, whole) + 1
    draw = rng.random()
    if draw < 0.35:
        return max(low, grown + rng.randint(0, 3))
    if draw < 0.5:
        return rng.randint(low, middle)
    return rng.randint(middle, (3 * middle + high) // 4)


def with_order(rng: Random, graph: OpGraph, share: float) -> OpGraph:
    """The graph with about ``share`` times as many further orders between its operators."""
    for _ in range(round(share * len(graph))):
        first, last = sorted(rng.sample(range(len(graph)), 2))
        if not ancestors(graph)[last] >> first & 1:
            ops = list(graph.ops)
            ops[last] = replace(ops[last], after=(*ops[last].after, ops[first].name))
            graph = replace(graph, ops=tuple(ops))
    return graph


def random_group(rng: Random, graph: OpGraph) -> int:
    """A weakly connected set of operators (not necessarily convex)."""
    chosen = mask_of(i for i in range(len(graph)) if rng.random() < rng.choice((0.5, 0.8, 1.0)))
    if not chosen:
        chosen = 1 << rng.randrange(len(graph))
    return rng.choice(components(chosen, neighbours(graph)))


def grown_group(rng: Random, graph: OpGraph, size: int) -> int:
    """A weakly connected set of ``size`` operators (fewer where the graph ends), grown at random.

    Neighbours join in random order, so the set need be neither convex nor closed anywhere.
    """
    near = neighbours(graph)
    mask = 1 << rng.randrange(len(graph))
    front = near[mask.bit_length() - 1]
    for _ in range(size - 1):
        if not front:
            break
        joining = rng.choice([i for i in range(len(graph)) if front >> i & 1])
        mask |= 1 << joining
        front = (front | near[joining]) & ~mask
    return mask


def wide_graph() -> OpGraph:
    """Twelve branches of three convolutions each, more down-sets than any search goes through."""
    build = Builder()
    fork = build.conv(build.input((1, 4, 24, 24)), 4)
    ends = []
    for _ in range(12):
        end = fork
        for _ in range(3):
            end = build.conv(end, 4, 3)
        ends.append(end)
    build.add(*ends)
    return build.graph()
