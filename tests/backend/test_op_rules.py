"""Every operator rule against torch: shapes, both traces, and what depends on what.

The dependence test is the one that counts: a window may be wider than the truth, never narrower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from torch_getfuse.backend.capture.capture import Capture, capture_exported, capture_model
from torch_getfuse.backend.rules import indexing, rearranged, recurrent
from torch_getfuse.backend.rules.registry import (
    BY_TARGET,
    EXTRA_SAMPLES,
    RULES,
    UNKNOWN,
    facts_of,
)
from torch_getfuse.backend.rules.rule import Run, Sample
from torch_getfuse.ir import Op, OpGraph, Read, WindowKind

SAMPLES = {rule.kind: rule.sample for rule in RULES} | EXTRA_SAMPLES


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _inputs(sample: Sample, batch: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(batch, *shape, dtype=torch.float64) for shape in sample.shapes)


def _model(sample: Sample) -> nn.Module:
    return sample.build().double()


def _capture(sample: Sample) -> tuple[nn.Module, Capture]:
    model = _model(sample)
    return model, capture_model(model, _inputs(sample, 2))


def test_targets_are_claimed_once() -> None:
    assert len(BY_TARGET) == sum(len(rule.targets) for rule in RULES)
    assert len({rule.kind for rule in RULES}) == len(RULES)


def test_facts_are_those_of_the_operators() -> None:
    """What follows from torch's schemas, and what is short enough to be written down."""
    for rule in RULES:
        packets = [getattr(torch.ops.aten, t) for t in rule.targets if hasattr(torch.ops.aten, t)]
        schemas = [getattr(packet, o)._schema for packet in packets for o in packet.overloads()]
        names = {argument.name for schema in schemas for argument in schema.arguments}
        assert names.issuperset(rule.weights), rule.kind
        if rule.factory:
            assert not any(
                value.alias_info for s in schemas for value in s.returns if not s.is_mutable
            )
        assert not (rule.elementwise and rule.view), rule.kind
        assert rule.product or not rule.batched, rule.kind
    strided = {target for rule in RULES if rule.by_strides and rule.view for target in rule.targets}
    assert strided == {"view", "unflatten", "view_as", "view_as_complex"}
    assert facts_of("relu6").elementwise
    assert not facts_of("dropout").elementwise
    assert facts_of("cat").broadcasts
    assert not facts_of("stack").broadcasts
    assert facts_of("no_such_operator") is UNKNOWN


@pytest.mark.parametrize("name", SAMPLES)
def test_both_traces_and_any_batch_give_one_graph(name: str) -> None:
    sample = SAMPLES[name]
    model, captured = _capture(sample)
    exported = capture_exported(torch.export.export(model, _inputs(sample, 2)))
    assert exported.graph.to_dict() == captured.graph.to_dict()
    assert capture_model(model, _inputs(sample, 3)).graph.to_dict() == captured.graph.to_dict()
    captured.graph.verify()


@pytest.mark.parametrize("name", SAMPLES)
def test_written_shapes_are_torchs(name: str) -> None:
    _, captured = _capture(SAMPLES[name])
    for op in captured.graph:
        shape = captured.graph.tensors[op.writes].shape
        results = [node.meta.get("example_value") for node in captured.nodes[op.name]]
        sizes = [value.numel() for value in results if isinstance(value, torch.Tensor)]
        sizes += [sum(part.numel() for part in v) for v in results[:1] if isinstance(v, tuple)]
        elements = captured.graph.tensors[op.writes].elements
        counted = {n for size in (*sizes[:1], *sizes[-1:]) for n in (size, size / 2)}
        assert not sizes or elements in counted, (op, shape, sizes)


Span = Callable[[Op, Read, int, int], tuple[int, int]]


def _needed(
    graph: OpGraph, output: str, axis: int, position: int, span: Span
) -> dict[str, set[int]]:
    """Positions of each tensor that a position of ``output`` needs through the windows."""
    needed: dict[str, set[int]] = {output: {position}}
    for op in reversed(graph.ops):
        wanted = needed.get(op.writes)
        if wanted is None:
            continue
        for read in op.reads:
            into = needed.setdefault(read.tensor, set())
            for at in wanted:
                low, high = span(op, read, axis, at)
                # The state of a recurrent operator has been through all rows before.
                into.update(range(0 if op.recurrent else low, high + 1))
    return needed


def _positions(tensor: torch.Tensor, graph: OpGraph, name: str, axis: int) -> torch.Tensor:
    """A run-time tensor as (positions along rows or columns, the rest)."""
    described = graph.tensors[name]
    stream = described.stream_axis
    if stream is None or described.extent(axis) == 1:
        return tensor.reshape(1, -1)
    place = stream + axis
    assert tensor.shape[place] == described.extent(axis)
    return tensor.movedim(place, 0).flatten(1)


def _beyond(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], graph: OpGraph, axis: int, span: Span
) -> list[str]:
    """Positions of the output that change with a position of an input they do not need."""
    (output,) = graph.outputs
    written = graph.tensors[output]
    # The samples that return a view of what the last operator wrote cannot be compared by rows.
    with torch.no_grad():
        before = model(*(x.clone() for x in inputs))
    if tuple(before.shape) != written.shape:
        assert before.numel() <= written.elements
        return []
    assert len(graph.inputs) == len(inputs)
    found = []
    for place, given in enumerate(graph.inputs):
        source = graph.tensors[given]
        needs = [
            _needed(graph, output, axis, at, span).get(given, set())
            for at in range(written.extent(axis))
        ]
        for position in range(source.extent(axis)):
            changed = [x.clone() for x in inputs]
            if source.extent(axis) == 1:
                changed[place] += torch.randn_like(changed[place])
            else:
                assert source.stream_axis is not None
                part = changed[place].select(source.stream_axis + axis, position)
                part += torch.randn_like(part)
            with torch.no_grad():
                after = model(*changed)
            old = _positions(before, graph, output, axis)
            new = _positions(after, graph, output, axis)
            moved = {i for i in range(len(old)) if not torch.equal(old[i], new[i])}
            allowed = {i for i, need in enumerate(needs) if position in need}
            if moved - allowed:
                found.append(f"position {position}: {sorted(moved - allowed)} moved too")
    return found


def _span_in(graph: OpGraph) -> Span:
    def span(op: Op, read: Read, axis: int, at: int) -> tuple[int, int]:
        sizes = graph.tensors[read.tensor].extent(axis), graph.tensors[op.writes].extent(axis)
        return read.window.span(axis, at, *sizes)

    return span


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_output_depends_on_no_more_than_its_window(name: str, axis: int) -> None:
    model, inputs = _model(SAMPLES[name]), _inputs(SAMPLES[name], 1)
    graph = capture_model(model, inputs).graph
    assert not _beyond(model, inputs, graph, axis, _span_in(graph))


COPIES = tuple(rule for rules in (rearranged, indexing, recurrent) for rule in rules.RULES)
NARROWED = [
    *(rule.kind for rule in COPIES),
    *(name for rules in (rearranged, indexing, recurrent) for name in rules.EXTRA_SAMPLES),
]
NARROWED.remove("im2col, col2im")  # the one undoes the other: an output row needs its own only


@pytest.mark.parametrize("name", NARROWED)
def test_a_window_that_is_too_narrow_is_found(name: str) -> None:
    """The samples are worth something: each fails if its rule had a smaller window."""
    model, inputs = _model(SAMPLES[name]), _inputs(SAMPLES[name], 1)
    graph = capture_model(model, inputs).graph
    kinds = {kind for rule in COPIES for kind in (rule.kind, *rule.targets)}
    ours = [op for op in graph if op.kind in kinds]
    assert ours
    for op in ours:
        read = op.reads[0]
        if graph.tensors[read.tensor].rows > 1:
            span = _narrower(_span_in(graph), op, read)
            by_row, by_column = (_beyond(model, inputs, graph, a, span) for a in (0, 1))
            assert by_row or (by_column and read.window.kind is WindowKind.WHOLE), op


def _narrower(exact: Span, op: Op, read: Read) -> Span:
    """One position less for one operand; of a map that is held, the one of the same number."""

    def span(other: Op, its: Read, axis: int, at: int) -> tuple[int, int]:
        low, high = exact(other, its, axis, at)
        if other is not op or its is not read:
            return low, high
        return (at, at) if its.window.kind is WindowKind.WHOLE else (low, high - 1)

    return span


# -- exact windows, so that "never narrower" is not met by reading everything -------------------


def _window(name: str, place: int = -1) -> object:
    _, captured = _capture(SAMPLES[name])
    return captured.graph.ops[place].reads[0].window.to_json()


EXACT = {
    "conv1d": {"kernel": [3, 1], "stride": [2, 1], "dilation": [1, 1], "padding": [1, 0]},
    "max_pool2d stride": {
        "kernel": [2, 2], "stride": [2, 2], "dilation": [1, 1], "padding": [0, 0],
    },
    "adaptive divides": {"kernel": [2, 3], "stride": [2, 3], "dilation": [1, 1], "padding": [0, 0]},
    "adaptive global": "reduce",
    "nearest up": {"scale": [2.0, 2.0]},
    "nearest down": {"kernel": [1, 1], "stride": [2, 3], "dilation": [1, 1], "padding": [0, 0]},
    "interpolate": {"scale": [13 / 8, 21 / 9]},
    "bilinear corners": "whole",
    "reflect rows": {"kernel": [3, 3], "stride": [1, 1], "dilation": [1, 1], "padding": [0, 0]},
    "softmax": "identity",
    "softmax of the map": "whole",
    "layer_norm": "identity",
    "layer norm of the map": "whole",
    "flatten, linear": "reduce",
    "linear, softmax": "identity",
    "linear": "identity",
    "mean of the map": "reduce",
    "attention": "identity",
    "permute": "identity",
    "view": {"kernel": [3, 3], "stride": [3, 3], "dilation": [1, 1], "padding": [0, 0]},
    "split": "identity",
    "cat": "identity",
    "cat over rows": {
        "kernel": [1, 1], "stride": [1, 1], "dilation": [1, 1], "padding": [0, 0],
        "padding_end": [6, 0],
    },
    "map to tokens": {
        "kernel": [7, 7], "stride": [7, 1], "dilation": [1, 1], "padding": [0, 6],
        "transposed": True,
    },
    "tokens to map": {
        "kernel": [21, 4], "stride": [14, 1], "dilation": [1, 1], "padding": [6, 3],
        "padding_end": [0, 3],
    },
    "conv3d along depth": "identity",
    "attention by rows": {
        "kernel": [1, 7], "stride": [1, 1], "dilation": [1, 1], "padding": [0, 3],
    },
    "norms of a signal": "whole",
    "roll": {"kernel": [1, 13], "stride": [1, 1], "dilation": [1, 1], "padding": [0, 6]},
    "roll over rows": "whole",
    "roll of windows": "whole",
    "roll all the way": "identity",
    "flip": "identity",
    "flip of rows": "whole",
    "flip left to right": "identity",
    "repeat": "identity",
    "repeat of rows": "whole",
    "tile": {"kernel": [1, 20], "stride": [1, 1], "dilation": [1, 1], "padding": [0, 13]},
    "channel_shuffle": "identity",
    "unfold": {
        "kernel": [3, 7], "stride": [2, 1], "dilation": [1, 1], "padding": [0, 0],
    },
    "im2col": {
        "kernel": [3, 2], "stride": [2, 1], "dilation": [1, 1], "padding": [1, 0],
    },
    "im2col, col2im": {
        "kernel": [3, 3], "stride": [1, 1], "dilation": [1, 1], "padding": [1, 1],
        "transposed": True,
    },
    "topk": "identity",
    "topk, both": "identity",
    "topk of rows": "whole",
    "index": "identity",
    "index of rows": "whole",
    "index_select": "identity",
    "gather": "identity",
    "gather of rows": "whole",
    "scatter": "identity",
    "scatter over rows": "identity",
    "grid_sample": "whole",
    "crop, pool": {
        "kernel": [2, 2], "stride": [2, 2], "dilation": [1, 1], "padding": [-2, -1],
        "padding_end": [-2, 0],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_window_is_as_narrow_as_it_should_be(name: str) -> None:
    assert _window(name) == EXACT[name]


def test_pixel_shuffle_is_transposed() -> None:
    _, captured = _capture(SAMPLES["pixel_shuffle"])
    assert captured.graph.ops[0].reads[0].window.kind is WindowKind.TRANSPOSED


def test_operator_without_a_rule_reads_everything_and_says_so() -> None:
    model = Run(lambda x: torch.rot90(x, 2, (2, 3)).relu())
    captured = capture_model(model, (torch.randn(2, 3, 4, 5),))
    rot90, relu = captured.graph.ops
    assert rot90.reads[0].window.kind is WindowKind.WHOLE
    assert rot90.reason == "no rule for rot90: it reads its whole inputs"
    assert not relu.reason
    assert captured.unsupported == {"rot90": 1}


def test_in_place_marks_unary_operators_only() -> None:
    def kinds(function: object, *shapes: tuple[int, ...]) -> list[bool]:
        inputs = tuple(torch.randn(2, *shape) for shape in shapes)
        graph = capture_model(Run(function), inputs).graph  # type: ignore[arg-type]
        return [op.in_place for op in graph]

    image = (4, 6, 7)
    assert kinds(lambda x: torch.relu(x) * 2, image) == [True, True]
    assert kinds(lambda x: x * x, image) == [False]
    assert kinds(lambda x, y: x + y, image, image) == [False]
    assert kinds(lambda x: x.softmax(1), image) == [False]
    assert kinds(lambda x: x[:, :2].relu(), image) == [False]
    assert kinds(lambda x: (x > 0).float(), image) == [False, False]


def test_dropout_is_an_operator_in_training_only() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))
    image = torch.randn(2, 4, 6, 7)
    graph = capture_model(model, (image,)).graph
    assert [(op.kind, op.in_place) for op in graph] == [("relu", True), ("dropout", True)]
    assert capture_exported(torch.export.export(model, (image,))).graph == graph
    assert [op.kind for op in capture_model(model.eval(), (image,)).graph] == ["relu"]
