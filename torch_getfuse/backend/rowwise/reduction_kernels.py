"""Kernels of operators that take in each row of their input as it arrives (``reduce`` windows)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from torch_getfuse.backend.fx_nodes.normalize import normalise
from torch_getfuse.backend.rowwise.calls import NoRowKernel, Values, fill
from torch_getfuse.backend.rowwise.kernels import Accumulator, Site
from torch_getfuse.backend.rowwise.sliding import node_shape
from torch_getfuse.backend.rules.registry import positional

Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_COMBINE: dict[str, Combine] = {
    "sum": torch.add,
    "nansum": torch.add,
    "count_nonzero": torch.add,
    "prod": torch.mul,
    "amax": torch.maximum,
    "amin": torch.minimum,
    "max": torch.maximum,
    "min": torch.minimum,
    "any": torch.logical_or,
    "all": torch.logical_and,
    "logsumexp": torch.logaddexp,
}
_POOLS = {f"adaptive_{word}_pool{n}d": word for word in ("avg", "max") for n in (1, 2, 3)}


def make(site: Site, name: str) -> Accumulator:
    """The kernel of a call by its plain name.

    Raises:
        NoRowKernel: where the operator has other inputs, several output units, or no rule.
    """
    what = f"{site.op.name} ({site.op.kind})"
    if len(site.core.operands) != 1 or len(site.op.reads) != 1:
        raise NoRowKernel(f"{what} takes in the rows of one input beside another")
    if site.target.rows != 1:
        raise NoRowKernel(f"{what} has {site.target.rows} units of output, each from all rows")
    if name in _POOLS:
        return _Pool(site, _POOLS[name] == "max")
    if name in _COMBINE or name == "mean":
        return _Reduce(site, name)
    if name in ("var", "std"):
        return _Spread(site, name)
    if name in ("norm", "linalg_vector_norm"):
        return _Norm(site)
    if name in ("linear", "matmul", "mm"):
        return _Linear(site, name)
    raise NoRowKernel(f"{what} over the rows of a map has no rule that takes them in one by one")


def axes_of(args: Mapping[str, Any]) -> Any:
    """The axes of a call; ``var(x, unbiased)`` has none, so it takes all."""
    dims = args.get("dim")
    return None if isinstance(dims, bool) else dims


class _Rows(Accumulator):
    """Its one input, by rows."""

    def __init__(self, site: Site) -> None:
        operands = site.operands(by_rows=True)
        super().__init__(site, operands)
        self.operand = operands[0]
        if self._pick is not None:
            raise NoRowKernel(f"{self.op.name} gives positions beside values")
        self.units = site.source(0).rows
        if self.operand.block > 1 or self.operand.size != self.units * self.operand.within:
            raise NoRowKernel(f"{self.op.name} takes in some of the rows, or rows that are cut up")
        self.out_dtype = site.dtype

    def row(self, block: torch.Tensor, row: int) -> torch.Tensor:
        """The part of the operand that is a row of the tensor."""
        within = self.operand.within
        return self.operand.take(block, row, row * within, (row + 1) * within)

    def block(self, block: torch.Tensor, row: int) -> torch.Tensor:
        """The operand's row, in float32 where it is shorter."""
        found = self.row(block, row)
        return found.float() if found.dtype in (torch.bfloat16, torch.float16) else found

    def finish(self, values: Values, state: Any) -> torch.Tensor:
        """The accumulator in the output's dtype."""
        return self._finish(values, self.result(values, state).to(self.out_dtype))

    def result(self, values: Values, state: Any) -> torch.Tensor:
        """The output out of the accumulator."""
        found: torch.Tensor = state
        return found


class _Reduce(_Rows):
    """Sums, extrema and their like over axes of which one is that of rows."""

    def __init__(self, site: Site, name: str) -> None:
        super().__init__(site)
        args = normalise(site.core.node, positional).args
        rank = len(self.operand.shape)
        dims = axes_of(args)
        if dims is None or (isinstance(dims, (list, tuple)) and not dims):
            self.dims = tuple(range(rank))
        else:
            self.dims = tuple(int(d) % rank for d in (dims if _many(dims) else (dims,)))
        self.keep = bool(args.get("keepdim"))
        self.name = name
        self.count = 1
        for dim in self.dims:
            self.count *= self.operand.shape[dim]

    def part(self, block: torch.Tensor) -> torch.Tensor:
        """The reduction of one row."""
        name, dims, keep = self.name, self.dims, self.keep
        if name in ("max", "min"):
            name = f"a{name}"
        if name == "mean":
            return block.sum(dims, keep)
        if name == "count_nonzero":
            return torch.count_nonzero(block, dims)
        if name in ("prod", "any", "all"):
            for dim in sorted(dims, reverse=True):
                block = getattr(torch, name)(block, dim, keep)
            return block
        found: torch.Tensor = getattr(torch, name)(block, dims, keep)
        return found

    def take(self, values: Values, state: Any, block: torch.Tensor, row: int) -> Any:
        """The accumulator combined with one row's reduction."""
        part = self.part(self.block(block, row))
        return part if state is None else _COMBINE.get(self.name, torch.add)(state, part)

    def result(self, values: Values, state: Any) -> torch.Tensor:
        """The accumulator, divided for a mean."""
        found: torch.Tensor = state / self.count if self.name == "mean" else state
        return found


class _Norm(_Reduce):
    """``norm`` and ``linalg_vector_norm``: of the norms so far and the next row's."""

    def __init__(self, site: Site) -> None:
        super().__init__(site, "norm")
        args = normalise(site.core.node, positional).args
        order = args.get("ord", args.get("p", 2))
        self.order = 2.0 if order in (None, "fro") else float(order)

    def part(self, block: torch.Tensor) -> torch.Tensor:
        """The norm of one row."""
        found: torch.Tensor = torch.linalg.vector_norm(block, self.order, self.dims, self.keep)
        return found

    def take(self, values: Values, state: Any, block: torch.Tensor, row: int) -> Any:
        """The norm of the two norms."""
        part = self.part(self.block(block, row))
        if state is None:
            return part
        return torch.linalg.vector_norm(torch.stack((state, part)), self.order, 0)


class _Spread(_Reduce):
    """Variance and standard deviation: count, mean and squares around it (Chan et al. 1979)."""

    def __init__(self, site: Site, name: str) -> None:
        super().__init__(site, name)
        args = normalise(site.core.node, positional).args
        correction = args.get("correction")
        if correction is None:
            given = args.get("dim")
            unbiased = given if isinstance(given, bool) else args.get("unbiased")
            correction = 0 if unbiased is False else 1
        self.correction = correction

    def take(self, values: Values, state: Any, block: torch.Tensor, row: int) -> Any:
        """Mean and squares of the rows so far and of one more."""
        block = self.block(block, row)
        count = self.count // self.units
        mean = block.mean(self.dims, True)
        squares = (block - mean).square().sum(self.dims, True)
        if state is None:
            return count, mean, squares
        before, old_mean, old_squares = state
        total, shift = before + count, mean - old_mean
        mean = old_mean + shift * (count / total)
        return total, mean, old_squares + squares + shift.square() * (before * count / total)

    def result(self, values: Values, state: Any) -> torch.Tensor:
        """The squares over the count less the correction, and its root."""
        count, _, squares = state
        found: torch.Tensor = squares / max(0, count - self.correction)
        if not self.keep:
            found = found.squeeze(self.dims)
        return found.sqrt() if self.name == "std" else found


class _Pool(_Rows):
    """Adaptive pooling of the map to one position."""

    def __init__(self, site: Site, maximum: bool) -> None:
        super().__init__(site)
        self.maximum = maximum
        self.dims = tuple(range(site.rank))[2:] if site.rank > 3 else (site.rank - 1,)
        self.count = 1
        for dim in self.dims:
            self.count *= self.operand.shape[dim]

    def take(self, values: Values, state: Any, block: torch.Tensor, row: int) -> Any:
        """The sum or maximum of the rows so far."""
        block = self.block(block, row)
        part = block.amax(self.dims, True) if self.maximum else block.sum(self.dims, True)
        if state is None:
            return part
        return torch.maximum(state, part) if self.maximum else state + part

    def result(self, values: Values, state: Any) -> torch.Tensor:
        """The accumulator, divided for an average."""
        found: torch.Tensor = state if self.maximum else state / self.count
        return found


class _Linear(_Rows):
    """A linear layer over a flattened map: each row meets its columns of the weight."""

    def __init__(self, site: Site, name: str) -> None:
        super().__init__(site)
        args = normalise(site.core.node, positional).args
        (_, view), stream = site.core.operands[0], site.source(0).stream_axis
        atoms = view.layout.axes[-1]
        places = [k for k, atom in enumerate(atoms) if atom.axis == stream and atom.size > 1]
        if len(places) != 1:
            raise NoRowKernel(f"{self.op.name}: no axis of the weight runs along the rows")
        self.sizes = tuple(atom.size for atom in atoms)
        self.place = places[0]
        self.transposed = name == "linear"
        self.weight = args.get("weight", args.get("other", args.get("mat2")))
        self.bias = args.get("bias")
        if self.weight not in self.weights:
            raise NoRowKernel(f"{self.op.name}: the matrix is computed from the input")
        if len(node_shape(self.weight)) != 2:
            raise NoRowKernel(f"{self.op.name}: the rows meet a vector, not a matrix")

    def take(self, values: Values, state: Any, block: torch.Tensor, row: int) -> Any:
        """The product of one row and its share of the weight, added up."""
        weight: torch.Tensor = fill(self.weight, values)
        if self.transposed:
            share = weight.view(-1, *self.sizes).select(1 + self.place, row)
            share = share.reshape(len(weight), -1).t()
        else:
            share = weight.view(*self.sizes, -1).select(self.place, row)
            share = share.reshape(-1, weight.shape[1])
        product = self.row(block, row) @ share
        if product.dtype in (torch.bfloat16, torch.float16):
            product = product.float()
        return product if state is None else state + product

    def result(self, values: Values, state: Any) -> torch.Tensor:
        """The sum with the bias."""
        bias = fill(self.bias, values)
        found: torch.Tensor = state if bias is None else state + bias
        return found


def _many(value: Any) -> bool:
    return isinstance(value, (list, tuple))
