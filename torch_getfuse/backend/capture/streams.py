"""Which axis of each tensor is that of its rows, and the windows that follow from it.

A map ``(1, C, H, W)`` streams over axis 2. Of any other tensor the axis is found, once all
operators are known (docs/method.md, section 2):

1. An output streams along the rows of the operand with the most rows, where they run along it.
2. Otherwise along the axis that its rule names: the length of a signal ``(1, C, L)``, depth or
   height of a volume ``(1, C, D, H, W)``, whichever is longer.
3. What has neither, as an input of the graph, streams as its first reader does, and tokens
   ``(1, N, C)`` that a linear layer or a norm takes in, over ``N``.

Everything else is one unit.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch_getfuse.backend.capture.bases import Bases, has_rows
from torch_getfuse.backend.capture.graph_values import Draft, Feature, fits
from torch_getfuse.backend.rules.rule import Reading, Spec
from torch_getfuse.backend.rules.view_windows import All, Along, Atom, read_window
from torch_getfuse.ir import Tensor, Window, WindowKind

log = logging.getLogger(__name__)


def settle_streams(bases: Bases, drafts: Sequence[Draft], inputs: Sequence[int]) -> None:
    """Give tensors their axes of rows, and operators their windows.

    Args:
        bases: the tensors.
        drafts: operators in the order of the program.
        inputs: numbers of the tensors that come from outside.
    """
    wishes = _wishes(bases, drafts)
    for base in inputs:
        bases.stream(base, wishes.get(base))
    for draft in drafts:
        bases.stream(draft.writes, None if draft.joint else _stream(bases, draft, wishes))
        if draft.spec.reads:
            _read(bases, draft)


def _wishes(bases: Bases, drafts: Sequence[Draft]) -> dict[int, int]:
    """Per tensor, the axis along which the rows of its first reader run that has any."""
    found: dict[int, int] = {}
    for draft in reversed(drafts):
        if draft.joint:
            continue
        out = draft.spec.stream_axis
        if out is None:
            out = found.get(draft.writes)
        for reading in draft.spec.reads:
            axis = _wished(bases, reading, out)
            if axis is not None:
                found[reading.operand.value.base] = axis
    return found


def _wished(bases: Bases, reading: Reading, out: int | None) -> int | None:
    """Axis of the tensor that a reading would have as rows, if its output streams over ``out``."""
    feature: Feature = reading.operand.value
    shape = bases[feature.base].tensor.shape
    if reading.accesses is None:
        return None
    places = [
        (place, access.axis)
        for place, access in enumerate(reading.accesses)
        if isinstance(access, Along)
    ]
    if out is not None:
        along = [place for place, axis in places if axis == out]
    elif len(shape) != 4 and any(isinstance(access, All) for access in reading.accesses):
        # The axes that are taken in together are a row: tokens, of which there are the most.
        along = [place for place, _ in places if place != reading.operand.batch]
        along.sort(key=lambda place: -reading.operand.shape[place])
    else:
        return None
    for place in along[:1]:
        for atom in bases.of_one_sample(feature).axes[place]:
            if atom.axis >= 0 and atom.size > 1:
                return atom.axis if has_rows(shape, atom.axis) else None
    return None


def _stream(bases: Bases, draft: Draft, wishes: dict[int, int]) -> int | None:
    """The axis of rows of what an operator writes."""
    spec, shape = draft.spec, bases[draft.writes].info.shape
    if spec.stream_axis is not None and len(shape) == 4:
        return spec.stream_axis
    if not spec.reads and draft.reads:
        like = bases[draft.reads[0][0]]
        return like.tensor.stream_axis if like.info.shape == shape else None
    followed, streams = _followed(bases, spec, shape)
    if followed is not None:
        return followed
    if spec.stream_axis is not None:
        return spec.stream_axis
    return None if streams else wishes.get(draft.writes)


def _followed(bases: Bases, spec: Spec, shape: tuple[int, ...]) -> tuple[int | None, bool]:
    """The axis of an output that runs along the rows of an operand, and if any has several."""
    sources = [bases[r.operand.value.base].tensor for r in spec.reads]
    pairs = sorted(zip(spec.reads, sources, strict=True), key=lambda pair: -pair[1].rows)
    rank = len(shape)
    for reading, source in pairs:
        if source.stream_axis is None:
            continue
        hits = bases.of_one_sample(reading.operand.value).find(source.stream_axis)
        if not hits:
            continue
        place = max(hits, key=_reach)[0]
        axis: int | None = place
        if reading.accesses is not None and isinstance(access := reading.accesses[place], Along):
            axis = access.axis
        elif reading.operand.shape != shape or _reduces(reading, place):
            axis = None
        if axis is not None and axis < rank and has_rows(shape, axis):
            return axis, True
    return None, any(source.rows > 1 for source in sources)


def _reach(hit: tuple[int, Atom]) -> int:
    return hit[1].stride * hit[1].size


def _reduces(reading: Reading, place: int) -> bool:
    """Whether an axis of an operand is one that the operator sums over."""
    access = None if reading.accesses is None else reading.accesses[place]
    return isinstance(access, All) and access.reduce


def _read(bases: Bases, draft: Draft) -> None:
    """The windows of an operator, and whether its result can take the place of its operand."""
    target, spec = bases[draft.writes].tensor, draft.spec
    reads: dict[int, Window] = {}
    for reading in spec.reads:
        base = reading.operand.value.base
        source = bases[base].tensor
        window = _window(bases, reading, source, target)
        if not fits(window, source, target):
            draft.reason = f"{window} of {source.shape} does not give {target.shape}"
            log.warning("%s: %s; it is taken to read its whole input", spec.kind, draft.reason)
            window = Window.whole()
        if base in reads and reads[base] != window:
            # One tensor through two windows: no single window says both.
            window = Window.whole()
        reads[base] = window
    if not draft.reason and any(window.kind is WindowKind.WHOLE for window in reads.values()):
        draft.reason = spec.reason_if_whole
    draft.reads = list(reads.items())
    draft.in_place = spec.in_place and len(spec.reads) == 1 and _keeps(bases, draft)


def _window(bases: Bases, reading: Reading, source: Tensor, target: Tensor) -> Window:
    if reading.accesses is None:
        return Window.whole()
    layout = bases.of_one_sample(reading.operand.value)
    return read_window(source, layout, reading.accesses, target)


def _keeps(bases: Bases, draft: Draft) -> bool:
    """True where the result can take the place of the one operand."""
    ((read, window),) = draft.reads
    if window.kind is not WindowKind.IDENTITY:
        return False
    source, target = bases[read], bases[draft.writes]
    same_units = source.tensor.elements == target.tensor.elements
    return (
        same_units
        and source.info.dtype == target.info.dtype
        and (source.tensor.rows == target.tensor.rows)
    )
