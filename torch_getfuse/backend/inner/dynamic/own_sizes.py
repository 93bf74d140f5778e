"""Fusion groups compiled for sizes of their own.

The sizes of a map in the middle of a network are nested quotients of those of its input, and
compilers ask hundreds of questions of each: whether one divides another, which is larger, how an
index changes along a loop. Inductor spends its time there: minutes for one block of Swin-T. To a
group that is compiled on its own such a size is just a number that it is given. So it gets fake
inputs of a shape environment of its own, where each of these numbers is a symbol; what the compiler
assumes of it becomes a guard there, and is asked again of the environment around it, whose guards
Dynamo checks. Equal groups become equal graphs, which a compiler's cache finds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols

from torch_getfuse.backend.fx_nodes.effects import attribute
from torch_getfuse.backend.fx_nodes.fake_run import FakeRun
from torch_getfuse.backend.fx_nodes.values import is_plain, size_hint, traced_value
from torch_getfuse.backend.torch_private import (
    ConstantSource,
    FakeTensor,
    FakeTensorMode,
    FloorDiv,
    Max,
    Mod,
    SymT,
    TensorifyState,
    enable_python_dispatcher,
    hint_of,
    is_view,
    preserve_rng_state,
    storage_key,
    symbol_is_type,
    traced_symbols,
)
from torch_getfuse.errors import CaptureError


def _sizes(values: Iterable[Any]) -> Iterator[torch.SymInt]:
    """The symbolic ones among values, and among the shapes, strides and storages of tensors."""
    for value in values:
        sizes: Sequence[Any] = (value,)
        if isinstance(value, torch.Tensor) and is_plain(value):
            length = value.untyped_storage().nbytes()
            sizes = (*value.shape, *value.stride(), value.storage_offset(), length)
        yield from (size for size in sizes if isinstance(size, torch.SymInt))


def _inputs(child: fx.GraphModule) -> list[Any]:
    return [traced_value(node) for node in child.graph.find_nodes(op="placeholder")]


def may_own_sizes(child: fx.GraphModule) -> bool:
    """Whether a child of symbolic sizes can be traced again, with others.

    Not where something belongs to the environment around it: sizes that depend on data, symbolic
    floats, tensors that are not plain ones, graphs that its operators call.
    """
    values = _inputs(child)
    sizes = list(_sizes(values))
    if not sizes or any(free_unbacked_symbols(size) for size in sizes):
        return False
    # Inductor asks Dynamo to make those numbers that it cannot make tensors, and notes which.
    if any(
        symbol_is_type(symbol, SymT.FLOAT) and not TensorifyState.should_specialize(symbol.name)
        for symbol in traced_symbols(sizes[0].node.shape_env)
    ):
        return False
    tensors = [value for value in values if not isinstance(value, (int, torch.SymInt))]
    if not all(isinstance(tensor, FakeTensor) and is_plain(tensor) for tensor in tensors):
        return False
    kinds = {(storage_key(tensor), tensor.dtype) for tensor in tensors}
    if len(kinds) > len({storage for storage, _ in kinds}):
        return False  # one storage read in two ways
    return not any(
        "unbacked_bindings" in node.meta
        or (node.op == "get_attr" and isinstance(attribute(child, node.target), nn.Module))
        for node in child.graph.nodes
    )


def _parts(size: sympy.Expr) -> Iterator[sympy.Expr]:
    """What a size is a polynomial of, or a maximum: symbols, quotients, remainders, ... of them.

    Strides are products of such maxima as ``Max(1, s53)``.
    """
    if isinstance(size, (sympy.Add, sympy.Mul, Max)):
        for term in size.args:
            yield from _parts(term)
    elif isinstance(size, sympy.Pow) and size.exp.is_Integer and size.exp.is_positive:
        yield from _parts(size.base)
    elif not size.is_number:
        yield size


def _equal(env: ShapeEnv) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """What the guards of an environment say to be equal."""
    pairs = {(g.expr.lhs, g.expr.rhs): None for g in env.guards if isinstance(g.expr, sympy.Eq)}
    divided = [  # a // b == c and a % b == 0: a == b * c
        (left.base, right * left.divisor)
        for left, right in pairs
        if isinstance(left, FloorDiv) and (Mod(*left.args), sympy.Integer(0)) in pairs
    ]
    return [*pairs, *divided]


class OwnSizes:
    """A shape environment for one child, which :func:`may_own_sizes`.

    Its symbols stand for parts of the sizes of the child's inputs. Of a map that has
    ``(s53 - 1)//2 + 1`` rows, the symbol is their number, not ``(s53 - 1)//2``. Where guards of the
    environment around the child, or those of a trial, say that one is made of others, it is.

    Args:
        child: its nodes carry the traced values of the environment around it; it is not changed.
    """

    def __init__(self, child: fx.GraphModule) -> None:
        values = _inputs(child)
        sizes = list(_sizes(values))
        self._around: ShapeEnv = sizes[0].node.shape_env
        self._env = ShapeEnv()
        self._sizes = list(dict.fromkeys(size.node.expr for size in sizes))
        self._own: dict[sympy.Expr, sympy.Expr] = {}
        self._back: dict[sympy.Symbol, sympy.Expr] = {}
        self._made: dict[sympy.Symbol, sympy.Expr] = {}
        modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
        self._mode = FakeTensorMode(
            shape_env=self._env,
            allow_non_fake_inputs=any(mode.allow_non_fake_inputs for mode in modes),
        )
        self._mode.allow_scalar_outputs = any(mode.allow_scalar_outputs for mode in modes)
        self._add_parts()
        self._use_guards(child)

    def _add_parts(self) -> None:
        parts = {size: list(dict.fromkeys(_parts(size))) for size in self._sizes}
        known = {size: size for size, made_of in parts.items() if made_of == [size]}
        for size, made_of in parts.items():
            if len(made_of) == 1 and (size - made_of[0]).is_Integer:
                known.setdefault(made_of[0], size)
        for part in dict.fromkeys(part for made_of in parts.values() for part in made_of):
            self._add(part, known.get(part, part))

    def _use_guards(self, child: fx.GraphModule) -> None:
        # By way of marks, because the symbols of both environments may have the same names.
        marks = {part: sympy.Dummy(integer=True) for part in self._own}
        own = {mark: self._own[part] for part, mark in marks.items()}
        for pair in _equal(self._around):
            left, right = (side.xreplace(marks) for side in pair)
            if left.free_symbols | right.free_symbols <= own.keys():
                self._eliminate((left - right).xreplace(own))
        self._run(child, self.inputs(child))
        for left, right in _equal(self._env):
            self._eliminate(left - right)

    @property
    def sizes(self) -> list[sympy.Expr]:
        """What the symbols stand for, each a size around the child."""
        used = set().union(*(self._expression(size).free_symbols for size in self._sizes))
        return [size for symbol, size in self._back.items() if symbol in used]

    def _add(self, part: sympy.Expr, size: sympy.Expr) -> None:
        bounds = self._around.bound_sympy(size)
        symbol = self._env.create_symbol(
            hint_of(self._around, size),
            ConstantSource(f"own_{len(self._own)}"),
            DimDynamic.DYNAMIC,
            positive=bounds.lower > 0 or None,
            do_not_specialize_zero_one=True,
        )
        self._env.constrain_symbol_range(symbol, bounds.lower, bounds.upper)
        self._own[part] = symbol - (size - part)
        self._back[symbol] = size

    def _expression(self, size: sympy.Expr) -> sympy.Expr:
        return self._simple(size.xreplace(self._own))

    def _simple(self, own: sympy.Expr) -> sympy.Expr:
        # Expanded, for the constant of a part to cancel against that of its size.
        return sympy.expand(own.xreplace(self._made))

    def _eliminate(self, zero: sympy.Expr) -> None:
        """Express a symbol by others where ``zero`` says how: that of the fewest sizes."""
        zero = self._simple(zero)
        free = zero.free_symbols
        order = list(self._back)
        counts = Counter(s for size in self._sizes for s in self._expression(size).free_symbols)
        for symbol in sorted(free, key=lambda s: (counts[s], -order.index(s))):
            factor = zero.coeff(symbol)
            rest = zero - factor * symbol
            if factor in (1, -1) and not rest.has(symbol):
                value = {symbol: -factor * rest}
                self._made = {s: e.xreplace(value) for s, e in self._made.items()} | value
                return

    def inputs(self, child: fx.GraphModule) -> list[Any]:
        """Fake inputs for a child, in this environment, like those that its nodes carry.

        Tensors share storages as those do.
        """
        values = _inputs(child)
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        uses = Counter(storage_key(tensor) for tensor in tensors)
        bases: dict[int, torch.Tensor] = {}
        with self._mode, torch.no_grad():
            for tensor in tensors:
                if is_view(tensor) or uses[storage_key(tensor)] > 1:
                    length = self._size(tensor.untyped_storage().nbytes())
                    base = torch.empty(
                        length // tensor.dtype.itemsize, dtype=tensor.dtype, device=tensor.device
                    )
                    bases.setdefault(storage_key(tensor), base)
            return [
                self._tensor(value, bases.get(storage_key(value)))
                if isinstance(value, torch.Tensor)
                else self._size(value)
                for value in values
            ]

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        return self._env.create_symintnode(self._expression(size.node.expr), hint=size_hint(size))

    def _tensor(self, tensor: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
        shape = [self._size(size) for size in tensor.shape]
        strides = [self._size(stride) for stride in tensor.stride()]
        if base is not None:
            own = base.as_strided(shape, strides, self._size(tensor.storage_offset()))
        else:
            own = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(own, tensor.requires_grad)
        return own.requires_grad_(tensor.requires_grad)

    def trace(self, child: fx.GraphModule, inputs: Sequence[Any]) -> None:
        """Give the nodes of a child values of this environment, in place.

        A size that is a number here becomes one in the graph.
        """
        for node, value in zip(child.graph.find_nodes(op="placeholder"), inputs, strict=True):
            if isinstance(value, int):
                node.replace_all_uses_with(value)
        child.recompile()
        for node, value in self._run(child, inputs).items():
            node.meta["example_value" if "example_value" in node.meta else "val"] = value

    def _run(self, child: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
        # Without the dispatcher some operators take no symbolic sizes (padding).
        with self._mode, enable_python_dispatcher(), preserve_rng_state():
            trace = FakeRun(child, self._mode)
            trace.run(*inputs)
        return trace.values

    def ask_around(self) -> None:
        """Make what was assumed of the sizes guards of the environment around the child.

        Raises:
            CaptureError: where it does not hold there.
        """
        made = [(sympy.Eq(symbol, value), False) for symbol, value in self._made.items()]
        guards = [(guard.expr, guard.size_oblivious) for guard in self._env.guards]
        for expr, oblivious in dict.fromkeys([*made, *guards]):
            assumed = expr.xreplace(self._back)
            if self._around.evaluate_expr(assumed, size_oblivious=oblivious) != sympy.true:
                raise CaptureError(f"a group was compiled for sizes with {assumed}, which is wrong")
