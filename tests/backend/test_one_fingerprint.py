"""Writes, dead code and casts: one fingerprint from ``plan``, export and ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import torch_getfuse
from torch_getfuse.backend.capture.capture import capture_exported, capture_fx, capture_model
from torch_getfuse.backend.rules.rule import Run
from torch_getfuse.errors import NoOperatorError
from torch_getfuse.ir import OpGraph, WindowKind

Read = tuple[str, list[str]]


def ways(model: nn.Module, *shapes: tuple[int, ...], dtype: torch.dtype | None = None) -> OpGraph:
    """The graph of a model, the same however it is captured."""

    def inputs() -> tuple[Tensor, ...]:
        return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)

    found: list[OpGraph] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        found.append(capture_fx(gm, example_inputs).graph)
        return gm.forward

    model.eval()
    with torch.no_grad():
        graph = capture_model(model, inputs()).graph
        for strict in (False, True):
            program = torch.export.export(model, inputs(), strict=strict)
            found.append(capture_exported(program).graph)
        torch.compile(model, backend=backend, dynamic=False)(*inputs())
    assert len(found) == 3
    for other in found:
        assert other.to_dict() == graph.to_dict()
        assert other.fingerprint == graph.fingerprint
    return graph


def reads(graph: OpGraph) -> list[Read]:
    """The operators' kinds, and the tensors that they read."""
    return [(op.kind, [read.tensor for read in op.reads]) for op in graph]


def masked(x: Tensor) -> Tensor:
    x[x > 0] = 2
    return x + 1


def gathered(x: Tensor) -> Tensor:
    y = x.relu()
    y[:, [0, 2]] = x[:, 1:3]
    return y * 2


def accumulated(x: Tensor) -> Tensor:
    y = x.relu()
    y.index_put_((torch.tensor([0]),), x[:1], accumulate=True)
    return y * 2


def empty_part(x: Tensor) -> Tensor:
    y = x.relu()
    y[:, 4:] = 2
    y[:, 4:] *= 2
    y[:, 4:].copy_(x[:, 4:])
    return y * 2


def through_a_view(x: Tensor) -> Tensor:
    y = x.relu()
    y.view(-1).mul_(2)
    return y - 1


def through_a_transpose(x: Tensor) -> Tensor:
    first, second = x.relu().chunk(2, 1)
    first.mT.mul_(x[:, :2])
    return first + second


def foreach(x: Tensor) -> Tensor:
    torch._foreach_add_([x], 1)
    return x + 1


def foreach_of_two(x: Tensor) -> Tensor:
    y, z = x.relu(), x.tanh()
    torch._foreach_mul_([y, z], 2)
    return y - z


def foreach_of_a_part(x: Tensor) -> Tensor:
    y, z = x.relu(), x.tanh()
    torch._foreach_mul_([y[:, 1:], z], 2)
    return y - z


def foreach_of_nothing(x: Tensor) -> Tensor:
    y, nothing = x.relu(), x[:, :0] * 2
    torch._foreach_add_([y, nothing], 1)
    nothing.add_(1)
    return y - 1


def foreach_of_a_constant(x: Tensor) -> Tensor:
    y, constant = x.relu(), torch.tensor([1.0, 0.0])
    torch._foreach_add_([constant, y], 1)
    return y.view(-1) - 1


def foreach_twice(x: Tensor) -> Tensor:
    y = x.relu()
    torch._foreach_mul_([y, y], 2)
    return y - 1


def out(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    torch.add(x, x, out=y)
    return y.relu()


def out_of_a_part(x: Tensor) -> Tensor:
    y = torch.zeros(2, 4, 6, 6)
    torch.mul(x[1:], 2, out=y[1:])
    return y.relu()


def out_of_two(x: Tensor) -> Tensor:
    y, places = x.relu(), torch.zeros(2, 4, 6, 6, dtype=torch.int64)
    torch.sort(x, 1, out=(y, places))
    return y.relu() + places


def sorted_and_read(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.sort(-1, descending=True)[1], x.mean(), F.pad(x, (1, 2))


def pooled_to_its_size(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.relu()
    return F.adaptive_max_pool2d(y, 6) + 1, F.adaptive_max_pool2d(y, 3)


def pooled_indices(x: Tensor) -> Tensor:
    return F.adaptive_max_pool2d(x, 6, return_indices=True)[1] + x


def reshaped_in_place(x: Tensor) -> Tensor:
    y, z = x.relu(), x.tanh()
    w = y.mT.softmax(1)
    y.unsqueeze_(0)
    return y.squeeze(0) + z + w


def cast(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.relu()
    z = x.type_as(y).to(y)
    return x.tanh(), z + y


@pytest.mark.parametrize(
    ("function", "operators"),
    [
        (masked, [("gt", ["input"]), ("copy", ["input", "gt"]), ("add", ["copy"])]),
        (gathered, [("relu", ["input"]), ("copy", ["relu", "input"]), ("mul", ["copy"])]),
        (
            accumulated,
            [("relu", ["input"]), ("index_put", ["relu", "input"]), ("mul", ["index_put"])],
        ),
        (empty_part, [("relu", ["input"]), ("mul", ["relu"])]),
        (through_a_view, [("relu", ["input"]), ("mul", ["relu"]), ("sub", ["mul"])]),
        (
            through_a_transpose,
            [("relu", ["input"]), ("mul", ["relu", "input"]), ("add", ["mul"])],
        ),
        (foreach, [("_foreach_add", ["input"]), ("add", ["_foreach_add"])]),
        *(
            (
                function,
                [
                    *(("relu", ["input"]), ("tanh", ["input"])),
                    *(("_foreach_mul", ["relu", "tanh"]), ("sub", ["_foreach_mul"])),
                ],
            )
            for function in (foreach_of_two, foreach_of_a_part)
        ),
        *(
            (
                function,
                [("relu", ["input"]), ("_foreach_add", ["relu"]), ("sub", ["_foreach_add"])],
            )
            for function in (foreach_of_a_constant, foreach_of_nothing)
        ),
        (
            foreach_twice,
            [("relu", ["input"]), ("_foreach_mul", ["relu"]), ("sub", ["_foreach_mul"])],
        ),
        (out, [("add", ["input"]), ("relu", ["add"])]),
        (out_of_a_part, [("mul", ["input"]), ("relu", ["mul"])]),
        (out_of_two, [("sort", ["input"]), ("relu", ["sort"]), ("add", ["relu", "sort"])]),
        (sorted_and_read, [("sort", ["input"]), ("mean", ["input"]), ("pad", ["input"])]),
        (
            pooled_to_its_size,
            [("relu", ["input"]), ("add", ["relu"]), ("adaptive_max_pool2d", ["relu"])],
        ),
        (
            pooled_indices,
            [("adaptive_max_pool2d", ["input"]), ("add", ["adaptive_max_pool2d", "input"])],
        ),
        (
            reshaped_in_place,
            [
                *(("relu", ["input"]), ("tanh", ["input"]), ("softmax", ["relu"])),
                *(("add", ["relu", "tanh"]), ("add", ["add", "softmax"])),
            ],
        ),
        (cast, [("relu", ["input"]), ("tanh", ["input"]), ("add", ["input", "relu"])]),
    ],
)
def test_one_graph_of_writes_and_casts(
    function: Callable[[Tensor], Any], operators: list[Read]
) -> None:
    graph = ways(Run(function), (2, 4, 6, 6))
    assert reads(graph) == operators
    # No operator waits for another but those whose tensors it reads or overwrites.
    late = {op.name: op.after for op in graph if op.after}
    assert function in (masked, gathered) or not late


def test_a_tensor_that_is_written_whole_is_read_row_by_row() -> None:
    graph = ways(Run(out), (2, 4, 6, 6))
    assert graph.ops[1].reads[0].window.kind is WindowKind.IDENTITY
    graph = ways(Run(out_of_a_part), (2, 4, 6, 6))
    assert graph.tensors["mul"].shape == (1, 4, 6, 6)
    assert graph.ops[1].reads[0].window.kind is WindowKind.IDENTITY


def test_several_tensors_that_are_written_are_one() -> None:
    assert ways(Run(foreach_of_two), (2, 4, 6, 6)).tensors["_foreach_mul"].elements == 288
    # A part of one: the whole of it is made anew.
    assert ways(Run(foreach_of_a_part), (2, 4, 6, 6)).tensors["_foreach_mul"].elements == 288
    assert ways(Run(foreach_twice), (2, 4, 6, 6)).tensors["_foreach_mul"].shape == (1, 4, 6, 6)


def test_an_input_that_is_written_is_a_result_whatever_is_returned() -> None:
    def flat(x: Tensor) -> tuple[Tensor, Tensor]:
        x.view(-1).mul_(2)
        return x, x

    def unread(x: Tensor) -> Tensor:
        y = x.tanh()
        x[1:, ::2] = 2
        return y

    assert ways(Run(flat), (4, 4)).outputs == ("mul",)
    assert ways(Run(unread), (3, 9, 4)).outputs == ("tanh", "copy")
    assert ways(Run(unread), (1, 9, 4)).outputs == ("tanh",)  # the part is empty


def test_a_component_of_a_complex_input_is_a_view() -> None:
    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.real, x.imag, x.imag.tanh()

    graph = ways(Run(run), (2, 4, 6, 6), dtype=torch.complex64)
    assert reads(graph) == [("tanh", ["input"])]
    assert graph.ops[0].reads[0].window.kind is WindowKind.IDENTITY


def test_what_dead_code_reads_says_nothing_of_the_batch() -> None:
    def run(x: Tensor, y: Tensor) -> Tensor:
        torch.matmul(y, y.mT)
        torch.rand_like(y)
        return x.tanh()

    graph = ways(Run(run), (4, 4), (3, 4))
    assert graph.inputs == ("input",)
    assert graph.tensors["tanh"].shape == (1, 4)
    graph = ways(Run(run), (6, 4, 4), (3, 4, 4, 4))
    assert graph.tensors["tanh"].shape == (1, 4, 4)


def test_the_first_input_that_is_read_says_what_the_batch_is() -> None:
    def run(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = y.tanh()
        return x.relu(), z

    graph = ways(Run(run), (1, 4, 6, 6), (2, 4, 6, 6))
    assert [graph.tensors[name].shape[0] for name in graph.inputs] == [1, 1]


def test_the_width_is_that_of_the_first_input_that_is_read() -> None:
    def run(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = y.double().tanh()
        return x.relu(), z

    class Mixed(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return run(x, y)

    inputs = torch.randn(2, 4), torch.randn(2, 4).to(torch.bfloat16)
    exported = capture_exported(torch.export.export(Mixed(), inputs)).graph
    assert exported.activation_bytes == 2
    assert capture_model(Mixed(), inputs).graph.fingerprint == exported.fingerprint


def test_weights_that_are_written_into_a_map_count() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(4))
            self.register_buffer("places", torch.tensor([0, 2]))

        def forward(self, x: Tensor) -> Tensor:
            y = x.relu()
            y[:, 0] = self.token
            y[:, self.places] = x[:, :2]
            return y + 1

    graph = ways(Token(), (2, 6, 4))
    assert [op.weight_elements for op in graph] == [0, 4, 2, 0]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_custom_operator_writes_what_its_schema_says(fresh: bool) -> None:
    name = f"one_fingerprint::write_{fresh}"
    schema = "(Tensor x, Tensor(a!) y) -> " + ("Tensor" if fresh else "()")

    def write(x: Tensor, y: Tensor) -> Tensor | None:
        y.copy_(x * 2)
        return x + 1 if fresh else None

    with torch.library._scoped_library("one_fingerprint", "FRAGMENT") as library:
        library.define(f"write_{fresh}{schema}")
        library.impl(f"write_{fresh}", write, "CompositeExplicitAutograd")

        def run(x: Tensor) -> Tensor:
            y = x.relu()
            found = getattr(torch.ops.one_fingerprint, f"write_{fresh}")(x, y)
            return y - (found if fresh else 1)

        graph = ways(Run(run), (2, 4, 6, 6))
    assert reads(graph) == [
        *(("relu", ["input"]), (name, ["input", "relu"])),
        ("sub", [graph.ops[1].name]),
    ]
    assert graph.tensors[graph.ops[1].writes].elements == 144 * (1 + fresh)


def test_a_plan_of_one_capture_splits_another() -> None:
    def run(x: Tensor, y: Tensor) -> Tensor:
        v = torch.empty_like(x)
        torch.add(x, y, out=v)
        v[v > 1] = 0
        w = v.unsqueeze(0)
        w.squeeze_(0)
        return w.relu() - y

    inputs = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    plan = torch_getfuse.plan(Run(run), inputs)
    program = torch.export.export(Run(run), inputs)
    right = run(*inputs)
    assert torch.equal(torch_getfuse.split(program, (), plan)(*inputs), right)
    assert torch.equal(torch_getfuse.split(Run(run), inputs, plan)(*inputs), right)


def test_a_write_into_nothing_is_no_operator() -> None:
    def run(x: Tensor) -> Tensor:
        x[4:].mul_(2)
        return x

    with pytest.raises(NoOperatorError):
        ways(Run(run), (2, 4))


def test_an_exported_change_of_shape_orders_nothing() -> None:
    """In the program's module the change is a view as well, so that its plan can be split."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.sigmoid()
        z = F.conv2d(y, torch.ones(4, 4, 3, 3), padding=1)
        y[0, :1, 0].transpose_(1, 1)
        return y, z

    x = torch.rand(1, 4, 8, 8)
    program = torch.export.export(Run(run), (x,))
    plan = torch_getfuse.plan(program, buffer=100, cache=False)
    assert len(plan.unfusable) == 2
    split = torch_getfuse.split(program, (), plan)
    assert all(map(torch.equal, split(x), run(x)))
