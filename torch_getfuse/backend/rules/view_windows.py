"""How a view addresses its base tensor, and the window a consumer of that view has on the base.

A view (reshape, permute, slice, ...) is no operator: its consumers read the base tensor. A
:class:`Layout` records, per axis of the view, which pieces of which base axes it runs over; an
operator rule says, per axis of its operand, what an output position needs (:class:`Along`,
:class:`All`). :func:`read_window` puts the two together. It never claims a narrower window than
the true one: whatever the algebra cannot follow becomes ``whole``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch_getfuse.ir import Tensor, Window, WindowKind
from torch_getfuse.ir.window import size_slid, size_transposed

NO_AXIS = -1
"""Axis of an :class:`Atom` that runs over no known base axis (broadcast, or lost track of)."""


@dataclass(frozen=True, slots=True)
class Atom:
    """A strided run of positions of one base axis: ``start + stride * i`` for ``i < size``."""

    axis: int
    size: int
    stride: int = 1
    start: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """Per axis of a view its atoms, slowest first; the axis' size is the product of theirs."""

    axes: tuple[tuple[Atom, ...], ...]

    @classmethod
    def of(cls, shape: Sequence[int]) -> Layout:
        """The tensor itself."""
        return cls(tuple((Atom(axis, size),) for axis, size in enumerate(shape)))

    @classmethod
    def opaque(cls, shape: Sequence[int]) -> Layout:
        """A view that cannot be followed: each of its elements may be any of the base's."""
        return cls(tuple((Atom(NO_AXIS, size, 0),) for size in shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements per axis of the view."""
        return tuple(math.prod(atom.size for atom in atoms) for atoms in self.axes)

    def permute(self, dims: Sequence[int]) -> Layout:
        """The axes in another order."""
        return Layout(tuple(self.axes[dim % len(self.axes)] for dim in dims))

    def expand(self, shape: Sequence[int]) -> Layout:
        """Broadcast to ``shape``."""
        new = len(shape) - len(self.axes)
        axes: list[tuple[Atom, ...]] = [(Atom(NO_AXIS, size, 0),) for size in shape[:new]]
        for atoms, old, size in zip(self.axes, self.shape, shape[new:], strict=True):
            axes.append(atoms if old == size else (Atom(NO_AXIS, size, 0),))
        return Layout(tuple(axes))

    def reshape(self, shape: Sequence[int]) -> Layout:
        """The same elements in the same order under another shape."""
        if self.shape == tuple(shape):
            return self
        queue = [atom for atoms in self.axes for atom in atoms if atom.size != 1]
        axes = []
        for size in shape:
            taken: list[Atom] = []
            left = size
            while left > 1:
                if not queue:
                    return Layout.opaque(shape)
                atom = queue.pop(0)
                if atom.size > left:
                    inner, rest = divmod(atom.size, left)
                    if rest:
                        return Layout.opaque(shape)
                    queue.insert(0, Atom(atom.axis, inner, atom.stride))
                    atom = Atom(atom.axis, left, atom.stride * inner, atom.start)
                if left % atom.size:
                    return Layout.opaque(shape)
                left //= atom.size
                taken = _append(taken, atom)
            axes.append(tuple(taken))
        return Layout(tuple(axes))

    def slice(self, axis: int, start: int, size: int, step: int = 1) -> Layout:
        """``size`` positions of one axis, from ``start``."""
        axis %= len(self.axes)
        if (start, size, step) == (0, self.shape[axis], 1):
            return self
        atoms = self.axes[axis]
        if len(atoms) == 1 and atoms[0].axis != NO_AXIS:
            old = atoms[0]
            new = Atom(old.axis, size, old.stride * step, old.start + old.stride * start)
        else:
            new = Atom(NO_AXIS, size, 0)
        return Layout((*self.axes[:axis], (new,), *self.axes[axis + 1 :]))

    def select(self, axis: int) -> Layout:
        """One position of an axis, which goes away; so do the base axes that it runs over."""
        axis %= len(self.axes)
        gone = {atom.axis for atom in self.axes[axis] if atom.size > 1}
        return Layout(
            tuple(
                tuple(Atom(NO_AXIS, a.size, 0) if a.axis in gone else a for a in atoms)
                for place, atoms in enumerate(self.axes)
                if place != axis
            )
        )

    def unsqueeze(self, axis: int) -> Layout:
        """A new axis of size one."""
        axis %= len(self.axes) + 1
        return Layout((*self.axes[:axis], (), *self.axes[axis:]))

    def mixed(self, axis: int) -> Layout:
        """Each position of an axis may be any of it."""
        axis %= len(self.axes)
        size = self.shape[axis]
        lost = (Atom(NO_AXIS, size, 0),)
        return Layout((*self.axes[:axis], lost, *self.axes[axis + 1 :]))

    def squeeze(self, axes: Sequence[int]) -> Layout:
        """Without those of ``axes`` that have size one."""
        rank, shape = len(self.axes), self.shape
        gone = {axis % rank for axis in axes if shape[axis % rank] == 1}
        return Layout(tuple(atoms for i, atoms in enumerate(self.axes) if i not in gone))

    def without_batch(self, axis: int, inner: int, samples: int) -> Layout:
        """The layout over one sample of a base tensor whose ``axis`` holds a batch.

        Args:
            axis: axis of the base tensor that the batch is in.
            inner: product of the sizes inside of the batch there.
            samples: of the batch.
        """
        if samples == 1:
            return self

        def own(atom: Atom) -> list[Atom]:
            return _of_one_sample(atom, inner, samples) if atom.axis == axis else [atom]

        axes = []
        for atoms in self.axes:
            kept: list[Atom] = []
            for atom in atoms:
                for part in own(atom):
                    kept = _append(kept, part)
            axes.append(tuple(kept))
        return Layout(tuple(axes))

    def find(self, axis: int) -> list[tuple[int, Atom]]:
        """(axis of the view, atom) for every atom that runs over a base axis."""
        return [
            (i, atom) for i, atoms in enumerate(self.axes) for atom in atoms if atom.axis == axis
        ]


def _of_one_sample(atom: Atom, inner: int, samples: int) -> list[Atom]:
    """A run along an axis with a batch, position ``outer * samples * inner + sample * inner + i``,
    as runs of the axis of one sample, ``outer * inner + i``.
    """
    block, reach = inner * samples, atom.stride * atom.size
    outer, sample, inside = atom.start // block, atom.start // inner % samples, atom.start % inner
    start = outer * inner + inside
    if sample == 0 and (atom.size == 1 or atom.stride % block == 0):
        return [Atom(atom.axis, atom.size, atom.stride // samples or 1, start)]
    if sample == 0 and inside + atom.stride * (atom.size - 1) < inner:
        return [Atom(atom.axis, atom.size, atom.stride, start)]
    if atom.start == 0 and reach % block == 0:
        outside = [Atom(atom.axis, reach // block, inner)] if reach > block else []
        if inner % atom.stride == 0:
            within = inner // atom.stride
            return [*outside, *([Atom(atom.axis, within, atom.stride)] if within > 1 else [])]
        if atom.stride % inner == 0:
            return outside
    if inner == 1 and reach <= block:
        return []  # some of the samples
    return [Atom(NO_AXIS, atom.size, 0)]


def _append(atoms: list[Atom], atom: Atom) -> list[Atom]:
    """Adds an atom, joined to the one before where the two are one run."""
    if atoms and atoms[-1].axis == atom.axis and atoms[-1].stride == atom.stride * atom.size:
        last = atoms[-1]
        joined = Atom(atom.axis, last.size * atom.size, atom.stride, last.start + atom.start)
        return [*atoms[:-1], joined]
    return [*atoms, atom]


@dataclass(frozen=True, slots=True)
class Along:
    """Output axis ``axis`` runs along this operand axis, through a one-dimensional window.

    ``kind`` is SLIDING (the default of kernel 1 and stride 1 is the identity), TRANSPOSED or
    RESIZE. ``padding_end`` is what the operator declares; :func:`read_window` corrects it to
    the true output size where the operator rounds (ceil mode).
    """

    axis: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    padding: int = 0
    padding_end: int = 0
    kind: WindowKind = WindowKind.SLIDING


@dataclass(frozen=True, slots=True)
class All:
    """Every output position needs the whole of this operand axis.

    ``reduce``: each position is taken in as it arrives and need not be held.
    """

    reduce: bool = False


Access = Along | All
_Step = Along | Literal["reduce", "whole", "lost"]


def read_window(
    source: Tensor, layout: Layout, accesses: Sequence[Access], target: Tensor
) -> Window:
    """The window that an operator has on ``source`` when it reads it through a view.

    Args:
        source: the base tensor, per sample.
        layout: of the operand over the base, without the batch.
        accesses: one per axis of the operand.
        target: the tensor that the operator writes.
    """
    if source.stream_axis is None:
        return Window.identity()
    row = source.stream_axis
    # Only a map of rank 4 has columns (Tensor.cols); otherwise a unit holds all but the rows.
    has_cols = len(source.shape) == 4
    out_row = target.stream_axis
    out_col = out_row + 1 if out_row is not None and len(target.shape) == 4 else None
    find = _Finder(layout, accesses)
    rows = find.step(row, source.rows, out_row, target.rows)
    cols = find.step(row + 1, source.cols, out_col, target.cols) if has_cols else Along(0)
    if "lost" in (rows, cols):
        if source.rows * source.cols > 1:
            return Window.whole()
        reduces = any(isinstance(access, All) and access.reduce for access in accesses)
        return Window.reduce() if reduces else Window.identity()
    return _join(rows, cols, source, target)


@dataclass(frozen=True, slots=True)
class _Finder:
    layout: Layout
    accesses: Sequence[Access]

    def step(self, axis: int, size: int, out_axis: int | None, out_size: int) -> _Step:
        """What an output position needs of base axis ``axis``, which has ``size`` positions."""
        hits = self.layout.find(axis)
        if not hits:
            return "lost"
        wanted = [self.accesses[place] for place, _ in hits]
        if all(isinstance(access, All) for access in wanted):
            covered = math.prod(atom.size for _, atom in hits) == size
            every = all(isinstance(access, All) and access.reduce for access in wanted)
            return "reduce" if every and covered else "whole"
        start = sum(atom.start for _, atom in hits)
        runs = [(place, atom) for place, atom in hits if atom.size > 1] or hits[:1]
        place, atom = max(runs, key=lambda run: run[1].stride)
        access = self.accesses[place]
        if isinstance(access, All) or access.axis != out_axis:
            # One position is the same for every output position, whichever axis it is on.
            return Along(0) if size == 1 and not isinstance(access, All) else "whole"
        along = list(self.layout.axes[place])
        before, behind = along[: along.index(atom)], along[along.index(atom) + 1 :]
        if any(other.size > 1 for other in before):
            return "whole"
        within = math.prod(other.size for other in behind)
        if len(runs) > 1:
            # The axis is cut up: along the output's rows run blocks of ``atom.stride`` positions.
            inside = sorted((run for _, run in runs if run is not atom), key=lambda run: run.stride)
            if within > 1 or not is_run(inside, atom.stride):
                return "whole"
            return _in_blocks(access, atom.stride, start)
        if within > 1:
            # ``within`` output positions, of other axes of the base, to each position of this one.
            return _spread_out(access, within) if (atom.stride, start) == (1, 0) else "whole"
        if (atom.size, atom.stride, start) == (size, 1, 0):
            return access
        if access.kind is not WindowKind.SLIDING or (atom.size == 1 and out_size > 1):
            # A single position of several that is broadcast: no window stays in one place.
            return "whole"
        return Along(
            access.axis,
            access.kernel,
            access.stride * atom.stride,
            access.dilation * atom.stride,
            access.padding * atom.stride - start,
        )


def is_run(atoms: Sequence[Atom], size: int) -> bool:
    """Whether runs, the fastest first, together go through ``size`` positions in a row."""
    reached = 1
    for atom in atoms:
        if atom.stride != reached:
            return False
        reached *= atom.size
    return reached == size


def _in_blocks(access: Along, block: int, start: int) -> _Step:
    """A window whose positions are blocks of ``block`` positions of the base, from ``start``."""
    if access.kind is not WindowKind.SLIDING:
        return "whole"
    reach = access.dilation * (access.kernel - 1)
    return Along(
        access.axis,
        (reach + 1) * block,
        access.stride * block,
        padding=access.padding * block - start,
    )


def _spread_out(access: Along, within: int) -> _Step:
    """A window over positions of which ``within`` after each other are in one of the base.

    Output r needs positions r*s - p and on: of the base, floor((r*s - p) / within) and on.
    """
    if access.kind is not WindowKind.SLIDING:
        return "whole"
    low, high = -access.padding, access.dilation * (access.kernel - 1) - access.padding
    if access.stride % within == 0:
        first, last = low // within, high // within
        return Along(access.axis, last - first + 1, access.stride // within, padding=-first)
    if within % access.stride:
        return "whole"
    step = within // access.stride
    low, high = low // access.stride, high // access.stride
    return Along(access.axis, high - low + step, step, padding=high, kind=WindowKind.TRANSPOSED)


def _join(rows: _Step, cols: _Step, source: Tensor, target: Tensor) -> Window:
    """One window from what is needed of the rows and of the columns."""
    reduces = rows == "reduce" and (cols == "reduce" or source.cols == 1)
    if reduces or (cols == "reduce" and source.rows == 1):
        # Into several units, one after the other, the input is needed for each of them.
        units = source.rows * source.cols, target.rows * target.cols
        return Window.reduce() if 1 in units else Window.whole()
    if isinstance(rows, str):
        return Window.whole()
    one = source.cols == 1 < target.cols and not _is_plain(rows)
    if isinstance(cols, str) or one:  # one position for all is all of one position
        cols = _all_columns(rows.kind, source.cols, target.cols)
    steps = (rows, cols)
    sizes = [(source.extent(axis), target.extent(axis)) for axis in (0, 1)]
    plain = [_is_plain(step) for step in steps]
    if all(plain):
        same = all(size_in in (1, size_out) for size_in, size_out in sizes)
        if same:
            return Window.identity()
    if any(even and size[0] < size[1] for even, size in zip(plain, sizes, strict=True)):
        # Broadcast along one axis and a window along the other: no window says both.
        return Window.whole()
    kinds = {step.kind for step, even in zip(steps, plain, strict=True) if not even}
    if len(kinds) > 1:
        return Window.whole()
    # Without any: a crop that starts at the first position.
    kind = kinds.pop() if kinds else WindowKind.SLIDING
    cropped = any(even and size[0] != size[1] for even, size in zip(plain, sizes, strict=True))
    if cropped and kind is not WindowKind.SLIDING:
        return Window.whole()
    if kind is WindowKind.RESIZE:
        return Window.resize((sizes[0][1] / sizes[0][0], sizes[1][1] / sizes[1][0]))
    make = Window.transposed if kind is WindowKind.TRANSPOSED else Window.sliding
    ends = [_end(step, kind, *size) for step, size in zip(steps, sizes, strict=True)]
    return make(
        kernel=(rows.kernel, cols.kernel),
        stride=(rows.stride, cols.stride),
        dilation=(rows.dilation, cols.dilation),
        padding=(rows.padding, cols.padding),
        padding_end=(ends[0], ends[1]),
    )


def _all_columns(kind: WindowKind, size_in: int, size_out: int) -> Along:
    """Every column, from any position: a kernel that reaches both borders."""
    reach = size_out - 1
    if kind is WindowKind.TRANSPOSED:
        return Along(0, size_in + reach, padding=size_in - 1, kind=kind)
    return Along(0, size_in + reach, padding=reach, padding_end=reach)


def _is_plain(step: Along) -> bool:
    """True where an output position needs the position of the same number only."""
    return step.kind is WindowKind.SLIDING and (
        (step.kernel, step.stride, step.padding, step.padding_end) == (1, 1, 0, 0)
    )


def _end(step: Along, kind: WindowKind, size_in: int, size_out: int) -> int:
    """The padding behind the last position that makes the window imply the true output size."""
    taps = step.kernel, step.stride, step.dilation
    if kind is WindowKind.TRANSPOSED:
        return size_transposed(*taps, step.padding, size_in) - size_out
    if size_slid(*taps, step.padding + step.padding_end, size_in) == size_out:
        return step.padding_end
    reach = step.dilation * (step.kernel - 1)
    return (size_out - 1) * step.stride + reach + 1 - size_in - step.padding
