"""Answers about strides, asked of inductor as it is and as it is mended."""

from __future__ import annotations

import inspect
import random
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sympy  # type: ignore[import-untyped]
import torch
from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._inductor import config, ir, sizevars
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.virtualized import V
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.functions import FloorDiv, ModularIndexing, PythonMod, Where
from torch.utils._sympy.value_ranges import ValueRangeError

from torch_getfuse.backend import torch_private
from torch_getfuse.backend.inner.inductor_patches import mended
from torch_getfuse.backend.inner.inductor_patches.replaced import replaced
from torch_getfuse.backend.inner.inductor_patches.strides import _SUMS, STRIDES, _along_loops
from torch_getfuse.backend.torch_versions import FEATURES

if lacks := FEATURES["strides"].missing():
    pytest.skip(lacks, allow_module_level=True)

LOOPS = sympy.symbols("d0 d1 d2", integer=True, nonnegative=True)
SIZES = sympy.symbols("s0 s1", integer=True, positive=True)


def nested(size: sympy.Expr, times: int) -> sympy.Expr:
    """A height or width after so many layers of stride two."""
    for _ in range(times):
        size = FloorDiv(size - 1, 2) + 1
    return size


def draw(rng: random.Random) -> sympy.Expr:
    """An index of a map: loops times strides, some loops merged, an offset."""
    height, width = (nested(size, rng.randrange(3)) for size in SIZES)
    strides = rng.choice(
        [[height * width * 4, height * width, width], [height * width * 4, 1, 4], [8, 4, 1]]
    )
    index = rng.choice([0, height, height * width + 3])
    for loop, stride in zip(LOOPS, rng.sample(strides, 3), strict=True):
        divided = rng.choice([4, 16, 16 * width, 7 * height])
        term = rng.choice([loop, loop, FloorDiv(loop, divided), ModularIndexing(loop, 1, 16)])
        index += stride * term
    return sympy.sympify(index)


@pytest.mark.parametrize("seed", range(15))
def test_answers_stay_the_same(seed: int) -> None:
    rng = random.Random(seed)
    index, loop = draw(rng), rng.choice(LOOPS)
    for name, kinds, others in (
        ("stride_at", (sympy.Basic,), ()),
        ("simplify_index_in_vec_range", _SUMS, (16,)),
    ):
        original = getattr(sizevars, name)
        ours = _along_loops(original, kinds)(index, loop, *others)
        theirs = original(index, loop, *others)
        assert (ours == 1) == (theirs == 1)  # what vectors are loaded by
        assert (ours == 0) == (theirs == 0)
        assert ours.free_symbols <= index.free_symbols | theirs.free_symbols
        for _ in range(20):
            at = {symbol: rng.randrange(1, 64) for symbol in (*LOOPS, *SIZES)}
            at |= dict.fromkeys(theirs.free_symbols - set(at), 7)  # stand for quotients
            assert ours.xreplace(at) == theirs.xreplace(at)


def test_what_is_no_sum_is_asked_as_it_is() -> None:
    given = []

    def original(index: Any, variable: sympy.Symbol) -> Any:
        given.append(index)
        return sympy.S.Zero

    condition = sympy.Ge(SIZES[0], 1024)
    assert _along_loops(original, _SUMS)(condition, LOOPS[0]) == 0
    assert given == [condition]


def test_sizes_are_not_searched_for_what_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What took minutes: sympy.simplify of an index with the nested sizes of a deep layer."""
    seen = []
    simplify = sympy.simplify
    monkeypatch.setattr(sympy, "simplify", lambda e: seen.append(e) or simplify(e))
    height, width = (nested(size, 5) for size in SIZES)
    d0, d1, d2 = LOOPS
    index = 832 * height * width * d0 + width * d1 + FloorDiv(d2, 16) * height
    windows = height * FloorDiv(d0 + width * d1, 7 * width) + ModularIndexing(d0, 7, width)
    rolled = ModularIndexing(d0 + PythonMod(7 * width - 3, 7 * width), 1, 7 * width)
    windows += ModularIndexing(Where(rolled < 0, rolled + width, rolled), 7, height)
    sizevars.stride_at_vec_range.cache_clear()
    with replaced(STRIDES):
        step = sizevars.stride_at(windows, d0)
        steps = [sizevars.stride_at_vec_range(index, d, 16) for d in (d1, d2)]
    for at in ((3, 5, 0), (6, 0, 2), (69, 4, 1)):
        values = dict(zip((*LOOPS, *SIZES), (*at, 224, 320), strict=True))
        later = windows.xreplace({d0: d0 + 1}).xreplace(values)
        assert step.xreplace(values) == later - windows.xreplace(values)
    assert steps == [width, 0]
    assert seen
    assert max(sympy.count_ops(expression) for expression in seen) < 30
    assert not any(expression.free_symbols & set(SIZES) for expression in seen)


# -- The originals are back -------------------------------------------------------------------

ORIGINALS = (
    (ir.Layout, "_stride_expr_ge_or_false"),
    (sizevars, "stride_at"),
    (sizevars, "simplify_index_in_vec_range"),
)


def held() -> list[Any]:
    """What inductor has under these names, as it holds it."""
    return [inspect.getattr_static(owner, name) for owner, name in ORIGINALS]


BEFORE = held()
NEEDED = [replacement.needed for replacement in STRIDES]
"""Some of the faults are mended in later versions of torch."""


def test_every_replaced_function_is_listed_above() -> None:
    assert [replacement.function.place() for replacement in STRIDES] == list(ORIGINALS)


def test_originals_are_back_after_nested_contexts_and_errors() -> None:
    with replaced(STRIDES):
        inside = held()
        assert [a is not b for a, b in zip(inside, BEFORE, strict=True)] == NEEDED
        assert isinstance(inside[0], staticmethod)
        with pytest.raises(ZeroDivisionError), replaced(STRIDES):
            raise ZeroDivisionError
        assert held() == inside
    assert held() == BEFORE


def test_nothing_is_replaced_where_a_name_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sizevars, "simplify_index_in_vec_range")
    with (
        pytest.raises(torch_private.UnsupportedTorchError, match="simplify_index"),
        replaced(STRIDES),
    ):
        raise AssertionError("one function is missing")
    monkeypatch.undo()
    assert held() == BEFORE


def test_other_versions_of_torch_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    with replaced(STRIDES):
        assert held() == BEFORE


def test_other_threads_get_the_originals() -> None:
    """Two threads in a context, one of which leaves first, and one that is in none."""
    d0 = LOOPS[0]
    index = 3 * d0 * nested(SIZES[0], 2)
    asked: dict[str, list[Any]] = {"inside": [], "outside": []}

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any) -> Any:
            asked[name].append(args)
            return original(*args)

        return ask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizevars, "stride_at", watched("outside", sizevars.stride_at))
        own = [
            type(STRIDES[1])(STRIDES[1].function, lambda original: watched("inside", original)),
        ]
        entered, leave = threading.Event(), threading.Event()

        def other() -> None:
            with replaced(own):
                entered.set()
                leave.wait(60)
                sizevars.stride_at(index, d0)

        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(60)
        sizevars.stride_at(index, d0)
        assert (len(asked["inside"]), len(asked["outside"])) == (0, 1)
        with replaced(own):
            sizevars.stride_at(index, d0)
        assert (len(asked["inside"]), len(asked["outside"])) == (1, 2)
        leave.set()
        thread.join()
        assert (len(asked["inside"]), len(asked["outside"])) == (2, 3)
    assert held() == BEFORE


class Split(nn.Module):
    """Channels split behind a strided convolution, as in ShuffleNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.first(x).chunk(2, dim=1)
        return torch.cat([left, self.second(right).relu()], 1)


@pytest.mark.parametrize("backward", [False, True])
def test_functions_are_replaced_in_compilations_only(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in that of a backward graph, which inductor compiles by itself without backward=True."""
    during: list[list[Any]] = []

    def compile_one(gm: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Any:
        during.append(held())
        return make_boxed_func(gm.forward)  # instead of C++, which takes a minute

    monkeypatch.setattr(mended, "inductor_compile", compile_one)
    torch.manual_seed(0)
    model = Split()
    compiled = torch.compile(
        model,
        backend="getfuse",
        dynamic=True,
        options={"inner": "inductor", "strict": True, "backward": backward},
    )
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    with config.patch(force_disable_caches=True):  # a graph from the cache is not compiled
        result = compiled(x)
        assert during
        assert held() == BEFORE
        result.square().sum().backward()
    assert len(during) >= 2
    assert held() == BEFORE
    for now in during:
        assert [a is not b for a, b in zip(now, BEFORE, strict=True)] == NEEDED
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)


def test_the_fault_is_there_outside_and_mended_inside() -> None:
    """A row of N and a map of N**2, where N is the height of a map after a stride of two."""
    env = ShapeEnv()
    height = env.create_symbol(32, ConstantSource("height"), DimDynamic.DYNAMIC, positive=True)
    row = nested(height, 1)
    square = sympy.expand(row**2)
    handler = types.SimpleNamespace(sizevars=SizeVarAllocator(env))
    with V.set_graph_handler(handler):
        if STRIDES[0].needed:
            with pytest.raises(ValueRangeError, match="Invalid ranges"):
                ir.Layout._stride_expr_ge_or_false(4 * row, square)
        else:  # mended in torch itself
            assert not ir.Layout._stride_expr_ge_or_false(4 * row, square)
        with replaced(STRIDES):
            assert not ir.Layout._stride_expr_ge_or_false(4 * row, square)
            assert ir.Layout._stride_expr_ge_or_false(square, row)
