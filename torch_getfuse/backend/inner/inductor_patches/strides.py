"""Questions about symbolic strides that inductor cannot answer, or takes minutes for, answered.

Inductor (torch 2.13) asks whether one stride is a multiple of another by ``left % right``. Of a row
and a map, N and N**2, sympy makes a remainder of reciprocals, and inductor fails to bound it:
``ValueRangeError: Invalid ranges [0:-1]`` (pytorch issues 188323 and 188422; mended after 2.13 by
pull request 190965). Any split of channels behind a strided convolution, as in ShuffleNetV2, leads
there once height and width are symbols.

And it asks how an index changes along a loop, by simplifying the whole index (pytorch issue 133734,
pull request 186319). Where its sizes are nested quotients, because the group has no sizes of its
own (:mod:`own_sizes`), sympy looks for what cancels in them for minutes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import sympy  # type: ignore[import-untyped]

from torch_getfuse.backend.inner.inductor_patches.replaced import Replacement
from torch_getfuse.backend.torch_private import (
    SIMPLIFIED_INDEX,
    STRIDE_AT,
    STRIDE_COMPARISON,
    Mod,
    inductor_knows,
)

_SUMS = (sympy.Add, sympy.Mul)


def _comparison(original: Callable[..., Any]) -> Callable[..., bool]:
    """``original(left, right)``, answered where it would fail."""

    def stride_expr_ge_or_false(left: Any, right: Any) -> bool:
        symbolic = all(isinstance(one, sympy.Expr) for one in (left, right)) and right != 0
        powers = sympy.Mod(left, right).atoms(sympy.Pow) if symbolic else ()
        if not any(power.exp.is_negative for power in powers):
            return bool(original(left, right))
        if inductor_knows(sympy.Eq(right, 0)):
            return True
        if inductor_knows(sympy.Eq(left, 0)):
            return False
        # Unlike %, torch's own Mod is not taken apart by sympy.
        return inductor_knows(sympy.Ge(left, right)) or inductor_knows(
            sympy.Eq(Mod(left, right), 0)
        )

    return stride_expr_ge_or_false


def _along_loops(original: Any, kinds: tuple[Any, ...]) -> Any:
    """``original(index, variable, ...)``, with a symbol for what the loop leaves as it is.

    Args:
        kinds: the expressions that are taken apart for it.
    """

    @functools.lru_cache
    def along_loops(index: Any, variable: sympy.Symbol, *others: Any) -> Any:
        if not isinstance(index, sympy.Expr):
            return original(index, variable, *others)
        constants: dict[sympy.Expr, sympy.Symbol] = {}
        short = _shortened(index, variable, kinds, constants)
        back = {symbol: expression for expression, symbol in constants.items()}
        return original(short, variable, *others).xreplace(back)

    return along_loops


def _shortened(
    expression: sympy.Expr,
    variable: sympy.Symbol,
    kinds: tuple[Any, ...],
    constants: dict[sympy.Expr, sympy.Symbol],
) -> sympy.Expr:
    """``expression`` with a symbol for each of its constant parts, as large as can be."""
    if expression.is_Number:
        return expression
    if not expression.has(variable):
        name = f"constant_{len(constants)}"
        return constants.setdefault(expression, sympy.Symbol(name, integer=True))
    if not expression.args or not isinstance(expression, kinds):
        return expression
    parts = list(expression.args)
    if isinstance(expression, _SUMS):
        constant = [part for part in parts if not (part.is_Number or part.has(variable))]
        parts = [part for part in parts if part.is_Number or part.has(variable)]
        parts += [expression.func(*constant)] if constant else []
    return expression.func(*(_shortened(part, variable, kinds, constants) for part in parts))


STRIDES = (
    Replacement(STRIDE_COMPARISON, _comparison),
    Replacement(STRIDE_AT, lambda original: _along_loops(original, (sympy.Basic,))),
    # What divides the variable decides here, by what it is a multiple of.
    Replacement(SIMPLIFIED_INDEX, lambda original: _along_loops(original, _SUMS)),
)
"""Answers that are inductor's own, except where it fails; the last two come at once."""
