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
from torch.utils._sympy.functions import Mod

_SUMS = (sympy.Add, sympy.Mul)


def mend_strides() -> None:
    """From now on inductor answers the first where it would fail, and the second at once.

    For the whole process, because inductor compiles backward graphs when nobody of ours is near.
    Its answers are the same otherwise.
    """
    from torch._inductor import ir, sizevars  # seconds; only where inductor is about to compile

    _replace(ir.Layout, "_stride_expr_ge_or_false", lambda old: staticmethod(_told(old)))
    _replace(sizevars, "stride_at", lambda old: _along_loops(old, (sympy.Basic,)))
    # What divides the variable decides here, by what it is a multiple of.
    _replace(sizevars, "simplify_index_in_vec_range", lambda old: _along_loops(old, _SUMS))


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    if original.__module__ != __name__:
        setattr(owner, name, make(original))


def _told(original: Any) -> Any:
    from torch._inductor.virtualized import V

    def _stride_expr_ge_or_false(left: Any, right: Any) -> bool:
        symbolic = all(isinstance(one, sympy.Expr) for one in (left, right)) and right != 0
        powers = sympy.Mod(left, right).atoms(sympy.Pow) if symbolic else ()
        if not any(power.exp.is_negative for power in powers):
            return bool(original(left, right))
        known: Callable[[Any], bool] = V.graph.sizevars.guard_or_false
        if known(sympy.Eq(right, 0)):
            return True
        if known(sympy.Eq(left, 0)):
            return False
        # Unlike %, torch's own Mod is not taken apart by sympy.
        return known(sympy.Ge(left, right)) or known(sympy.Eq(Mod(left, right), 0))

    return _stride_expr_ge_or_false


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
