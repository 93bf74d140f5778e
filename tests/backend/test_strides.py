"""How an index changes along a loop, asked of inductor as it is and as it is mended."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import sympy  # type: ignore[import-untyped]
from torch.utils._sympy.functions import FloorDiv, ModularIndexing, PythonMod, Where

from torch_getfuse.backend.inner.inductor_patches.strides import _SUMS, _along_loops, mend_strides

LOOPS = sympy.symbols("d0 d1 d2", integer=True, nonnegative=True)
SIZES = sympy.symbols("s0 s1", integer=True, positive=True)


def nested(size: sympy.Expr, times: int) -> sympy.Expr:
    """A height or width after so many layers of stride two."""
    for _ in range(times):
        size = FloorDiv(size - 1, 2) + 1
    return size


def unmended(name: str) -> Callable[..., Any]:
    """Inductor's own function, also where another test has mended it."""
    from torch._inductor import sizevars

    found = getattr(sizevars, name)
    while found.__module__ != sizevars.__name__:
        found = next(
            cell.cell_contents
            for cell in found.__wrapped__.__closure__
            if getattr(cell.cell_contents, "__name__", "") == name
        )
    return found  # type: ignore[no-any-return]


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
        original = unmended(name)
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
    from torch._inductor import sizevars

    mend_strides()
    mend_strides()  # once is enough
    seen = []
    simplify = sympy.simplify
    monkeypatch.setattr(sympy, "simplify", lambda e: seen.append(e) or simplify(e))
    height, width = (nested(size, 5) for size in SIZES)
    d0, d1, d2 = LOOPS
    index = 832 * height * width * d0 + width * d1 + FloorDiv(d2, 16) * height
    windows = height * FloorDiv(d0 + width * d1, 7 * width) + ModularIndexing(d0, 7, width)
    rolled = ModularIndexing(d0 + PythonMod(7 * width - 3, 7 * width), 1, 7 * width)
    windows += ModularIndexing(Where(rolled < 0, rolled + width, rolled), 7, height)
    step = sizevars.stride_at(windows, d0)
    for at in ((3, 5, 0), (6, 0, 2), (69, 4, 1)):
        values = dict(zip((*LOOPS, *SIZES), (*at, 224, 320), strict=True))
        later = windows.xreplace({d0: d0 + 1}).xreplace(values)
        assert step.xreplace(values) == later - windows.xreplace(values)
    assert sizevars.stride_at_vec_range(index, d1, 16) == width
    assert sizevars.stride_at_vec_range(index, d2, 16) == 0
    assert seen
    assert max(sympy.count_ops(expression) for expression in seen) < 30
    assert not any(expression.free_symbols & set(SIZES) for expression in seen)
