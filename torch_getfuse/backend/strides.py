"""An order of symbolic strides that inductor cannot tell, told.

Inductor (torch 2.13) asks whether one stride is a multiple of another by ``left % right``. Of a row
and a map, N and N**2, sympy makes a remainder of reciprocals, and inductor fails to bound it:
``ValueRangeError: Invalid ranges [0:-1]`` (pytorch issues 188323 and 188422; mended after 2.13 by
pull request 190965). Any split of channels behind a strided convolution, as in ShuffleNetV2, leads
there once height and width are symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy  # type: ignore[import-untyped]
from torch.utils._sympy.functions import Mod


def tell_stride_order() -> None:
    """From now on inductor answers that question where it would fail.

    For the whole process, because inductor compiles backward graphs when nobody of ours is near;
    where it would not fail, nothing changes.
    """
    from torch._inductor import ir  # seconds; only where inductor is about to compile

    original = ir.Layout._stride_expr_ge_or_false
    if getattr(original, "__module__", None) != __name__:
        setattr(ir.Layout, original.__name__, staticmethod(_told(original)))


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
