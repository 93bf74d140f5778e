"""Groups compiled for sizes of their own: shallow sizes, sound guards, equal results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sympy  # type: ignore[import-untyped]
import torch
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.utils._sympy.functions import FloorDiv, Mod

from torch_getfuse.backend.fx_nodes.values import traced_value
from torch_getfuse.backend.inner.dynamic.own_sizes import OwnSizes, may_own_sizes
from torch_getfuse.backend.torch_private import hint_of, traced_symbols
from torch_getfuse.errors import CaptureError

SHAPES = ((2, 8, 40, 56), (3, 8, 72, 40), (4, 8, 33, 49))


class Seen:
    """An inner backend that runs groups as they are and keeps what it was given."""

    def __init__(self, look: Callable[[Sequence[Any]], None] = lambda inputs: None) -> None:
        self.groups: list[tuple[fx.GraphModule, list[Any]]] = []
        self._look = look

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.groups.append((gm, list(inputs)))
        self._look(inputs)
        return gm.forward

    def sizes(self) -> list[tuple[sympy.Expr, int]]:
        """All symbolic sizes of tensors, each with the number of convolutions in its group."""
        found = []
        for gm, inputs in self.groups:
            values = [*inputs, *(traced_value(node) for node in gm.graph.nodes)]
            convs = sum("conv" in str(node.target) for node in gm.graph.nodes)
            for value in values:
                if isinstance(value, torch.Tensor):
                    sizes = (size for size in value.shape if isinstance(size, torch.SymInt))
                    found += [(size.node.expr, convs) for size in sizes]
        return found

    def assert_shallow(self) -> None:
        """No more quotients than layers of the group make."""
        assert self.sizes()
        for size, convs in self.sizes():
            assert len(size.atoms(FloorDiv)) <= convs, size


def compiled_with(
    model: nn.Module, inner: Seen, dynamic: bool = True
) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    torch._dynamo.reset()
    chosen = {"buffer": "8KB", "strict": True, "inner": inner, "cache": False}
    counter = CompileCounterWithBackend(
        lambda gm, inputs: torch._dynamo.lookup_backend("getfuse")(gm, inputs, options=chosen)
    )
    return torch.compile(model, backend=counter, dynamic=dynamic), counter


def check(model: nn.Module, inner: Seen, shapes: Sequence[tuple[int, ...]] = SHAPES) -> int:
    """Compare at each size; how often it was compiled."""
    compiled, counter = compiled_with(model.eval(), inner)
    with torch.no_grad():
        for shape in shapes:
            x = torch.randn(shape)
            assert torch.equal(compiled(x), model(x)), shape
    return counter.frame_count


def strided() -> nn.Module:
    """Four equal layers, each of which halves the rows; a buffer of 8 KB holds one."""
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, (2, 1), 1), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(*layers)


class Windows(nn.Module):
    """Maps padded to whole windows of 7, as in Swin, and taken apart into them."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(8, 4, 3, 2, 1)
        self.mix = nn.ModuleList([nn.Linear(4, 4) for _ in range(blocks)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x).permute(0, 2, 3, 1)
        for mix in self.mix:
            batch, height, width, _ = x.shape
            y = nn.functional.pad(x, (0, 0, 0, (7 - width % 7) % 7, 0, (7 - height % 7) % 7))
            rows, columns = y.shape[1] // 7, y.shape[2] // 7
            y = y.view(batch, rows, 7, columns, 7, 4).permute(0, 1, 3, 2, 4, 5)
            y = mix(y.reshape(batch * rows * columns, 49, 4)).softmax(1)
            y = y.view(batch, rows, columns, 7, 7, 4).permute(0, 1, 3, 2, 4, 5)
            x = x + y.reshape(batch, rows * 7, columns * 7, 4)[:, :height, :width]
        return x


def test_sizes_are_not_nested() -> None:
    """However deep in a network they are."""
    inner = Seen()
    assert check(strided(), inner) == 1
    assert len(inner.groups) >= 4
    inner.assert_shallow()


def test_equal_groups_are_equal_graphs() -> None:
    inner = Seen()
    check(strided(), inner)
    convs = []
    for gm, inputs in inner.groups:
        if "conv2d" in gm.code:
            calls = [str(node.target) for node in gm.graph.nodes if node.op != "placeholder"]
            shapes = [v.shape if isinstance(v, torch.Tensor) else v for v in inputs]
            convs.append((calls, shapes))
    assert len(convs) == 4
    assert len(set(map(str, convs))) == 1


def test_sizes_made_of_others_are_known_to_be() -> None:
    """A padded map is seven times as high as its windows, and these are seven rows high."""
    inner = Seen()
    assert check(Windows(2), inner) == 1
    inner.assert_shallow()
    assert not any(size.has(Mod) for size, _ in inner.sizes())
    windows = [
        node.meta["example_value"].shape
        for gm, _ in inner.groups
        for node in gm.graph.nodes
        if node.target == "softmax"
    ]
    assert windows
    assert all(shape[1] == 49 and isinstance(shape[1], int) for shape in windows)


def test_what_a_compiler_assumes_is_guarded() -> None:
    """A size that it compares, or takes for a number, is compared by Dynamo in later calls."""

    def compare(inputs: Sequence[Any]) -> None:
        for value in inputs:
            if isinstance(value, torch.Tensor) and value.dim() == 4:
                compared.append(bool(value.shape[2] > 6))

    compared: list[bool] = []
    shapes = ((2, 8, 96, 56), (2, 8, 80, 40), (2, 8, 40, 40))
    # The last layer's input has 12, 10 and 5 rows.
    assert check(strided(), Seen(compare), shapes) == 2
    assert len(set(compared)) == 2

    def fix(inputs: Sequence[Any]) -> None:
        for value in inputs:
            if isinstance(value, torch.Tensor) and value.dim() == 4:
                int(value.shape[2])

    shapes = ((2, 8, 96, 56), (3, 8, 96, 40), (2, 8, 80, 56))
    assert check(strided(), Seen(fix), shapes) == 2


class Rows(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(3)


def test_sizes_that_a_compiler_finds_equal() -> None:
    """Two symbols become one after the group was traced: results have the strides of either."""

    def equate(inputs: Sequence[Any]) -> None:
        for value in inputs:
            if isinstance(value, torch.Tensor) and value.dim() == 4:
                found.append(bool(value.shape[2] == value.shape[3]))

    found: list[bool] = []
    shapes = ((2, 8, 56, 28), (3, 8, 72, 36), (2, 8, 40, 40))
    assert check(nn.Sequential(strided(), Rows()), Seen(equate), shapes) == 2
    assert check(nn.Sequential(strided()[0], Rows()), Seen(equate), shapes) == 2
    assert len(set(found)) == 2


def test_training_at_every_size() -> None:
    """Compiled as often as AOTAutograd alone compiles it."""
    torch.manual_seed(0)
    model = nn.Sequential(strided(), nn.BatchNorm2d(8))
    alone, other = copy.deepcopy(model), copy.deepcopy(model)
    inner = Seen()

    def steps(run: Callable[..., Any], owner: nn.Module) -> list[list[Any]]:
        results = []
        for shape in SHAPES:
            owner.zero_grad()
            y = run(torch.ones(shape).cumsum(3).sin())
            y.square().mean().backward()
            gradients = [parameter.grad for parameter in owner.parameters()]
            results.append([y.detach(), *gradients, *(b.clone() for b in owner.buffers())])
        return results

    compiled, ours = compiled_with(other, inner)
    torch.testing.assert_close(steps(compiled, other), steps(model, model))
    torch._dynamo.reset()
    theirs = CompileCounterWithBackend("aot_eager")
    steps(torch.compile(alone, backend=theirs, dynamic=True), alone)
    assert ours.frame_count == theirs.frame_count
    inner.assert_shallow()


def test_fixed_shapes_stay_as_they_are() -> None:
    def look(inputs: Sequence[Any]) -> None:
        modes.update(id(value.fake_mode) for value in inputs if isinstance(value, torch.Tensor))

    modes: set[int] = set()
    compiled, _ = compiled_with(strided().eval(), Seen(look), dynamic=False)
    with torch.no_grad():
        compiled(torch.randn(SHAPES[0]))
    assert len(modes) == 1


class Halves(nn.Module):
    """A group reads one half of a map after another group's result was written over the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        left, right = y.chunk(2, 1)
        z = self.b(left)
        right.add_(z)
        left.mul_(2)
        return y.relu() + torch.cat([right, left], 1)


def test_inputs_that_share_memory_do_so_in_the_trace() -> None:
    shared = 0

    def look(inputs: Sequence[Any]) -> None:
        nonlocal shared
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        shared += len(tensors) - len({t.untyped_storage()._cdata for t in tensors})

    check(Halves(), Seen(look))
    assert shared


class Chosen(nn.Module):
    """Sizes that depend on data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 4, 3, 2, 1), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        rows = y.permute(0, 2, 3, 1).reshape(-1, 4)
        rows = rows[torch.nonzero(rows[:, 0] > 0).squeeze(1)]
        return self.b(rows).sum(0) + y.mean((0, 2, 3))


def test_sizes_that_depend_on_data() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert check(Chosen(), Seen()) == 1


def child_of(model: nn.Module) -> fx.GraphModule:
    kept: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        kept.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, dynamic=True)(torch.randn(SHAPES[0]))
    return kept[0]


def test_an_assumption_that_fails_around_the_group_is_refused() -> None:
    child = child_of(strided().eval())
    assert may_own_sizes(child)
    sizes = OwnSizes(child)
    (height,) = (v for v in sizes.inputs(child) if isinstance(v, torch.SymInt) and v == 40)
    assert bool(height == 40)
    sizes.ask_around()
    around = sizes._around
    (symbol,) = (s for s, size in sizes._back.items() if hint_of(around, size) == 40)
    sizes._back[symbol] += 1
    with pytest.raises(CaptureError, match="a group was compiled for sizes with"):
        sizes.ask_around()


def test_symbols_of_the_same_name_are_kept_apart() -> None:
    """Symbols are named by a hash of where they come from."""
    child = child_of(strided().eval())
    sizes = OwnSizes(child)
    assert not sizes._made
    around, (name, *_) = sizes._around, list(sizes._back)
    stranger = around.create_symbol(80, ConstantSource("own_0"), DimDynamic.DYNAMIC)
    assert stranger.name == name.name
    (height,) = (s for s, hint in traced_symbols(around).items() if hint == 40)
    # Not the size of the group that has this name.
    assert around.evaluate_expr(sympy.Eq(stranger, 2 * height)) == sympy.true
    assert not OwnSizes(child)._made
