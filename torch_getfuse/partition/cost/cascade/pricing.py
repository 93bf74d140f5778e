"""The best way of a step: what it holds, what it reads again, which weights stay.

docs/method.md, section 12. A step is a :class:`~.groups.Group` beside residents: tensors that it
touches and that are on chip as a whole, and bytes of others that it does not touch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from torch_getfuse.partition.cost.cascade.groups import Bytes, Group
from torch_getfuse.partition.cost.cascade.shape import Link
from torch_getfuse.partition.cost.cascade.way import LINE, SLICES, STRIPES
from torch_getfuse.partition.cost.cascade.weights import most_staying
from torch_getfuse.partition.node_set import bits


@dataclass(frozen=True, slots=True)
class Beside:
    """The residents of a step.

    Attributes:
        touched: mask of the tensors that the step touches and that are resident.
        staying: mask of those of them that are alive after the step.
        others: bytes of the residents that it does not touch.
        free: whether tensors whose whole life is in the step are resident where that is of use;
            otherwise those that are stand in ``touched``.
    """

    touched: int = 0
    staying: int = 0
    others: int = 0
    free: bool = True


NOTHING = Beside(free=False)

ANY = 1 << 62
"""As much traffic as may be."""

_WAYS, _STRIPES, _ROOMS = 90, 12, 25
"""Steps counted for looking for the best way of a step beside some residents, for whether stripes
can be one, and for what some numbers of them leave of the buffer."""

_CELLS = 100  # numbers of a table of stripes that are looked at for a step


@dataclass(frozen=True, slots=True)
class Priced:
    """One way of a step.

    Attributes:
        reread: bytes that it reads again, beyond the first time.
        buffer: ``F_b`` in bytes.
        kind, count: of the :class:`~.way.Way`.
        stay: mask of the operators whose weights stay.
        joined: the links of which the later tensor is written over the earlier.
        kept: mask of the tensors that are resident in this step alone.
    """

    reread: int
    buffer: int
    kind: str
    count: int
    stay: int
    joined: tuple[Link, ...] = ()
    kept: int = 0


class Held(NamedTuple):
    """What the storages of a step take.

    Attributes:
        bytes: of all of them.
        joined: links that are used.
    """

    bytes: int
    joined: tuple[Link, ...] = ()


_KINDS = {LINE: 0, STRIPES: 1, SLICES: 2}


def best_way(group: Group, beside: Beside, limit: int) -> Priced | None:
    """The way with the least traffic, then the least buffer.

    Args:
        limit: the buffer in bytes; ``F_b`` is below it.

    Returns:
        ``None`` where no way fits.
    """
    found = [*_once(group, beside, limit), *slices(group, beside, limit)]
    best = min(found, key=_rank, default=None)
    if best is None or best.reread or beside.others + group.least + group.weights < best.buffer:
        found += _stripes(group, beside, limit, None if best is None else best.reread)
    return min(found, key=_rank, default=None)


def smallest_way(group: Group, beside: Beside = NOTHING) -> Priced:
    """The way with the least buffer, whatever it reads again: what a group that does not fit
    would need.

    All weights stream or none does: one that stays takes at least as much as its staging.
    """
    found = list(_once(group, beside, ANY))
    shape, first = group.shape, 2
    while first <= shape.most_stripes:
        table = shape.table(first)
        for k, row in enumerate(table):
            sizes = (row * group.unit_bytes).tolist()
            held = _held(group, beside, sizes, partial(shape.stripe_links, first + k), ANY)
            need, again = held.bytes + group.least_staging, (first + k - 1) * group.weights
            kept = _kept(group, beside, held.joined)
            found.append(Priced(again, need, STRIPES, first + k, 0, held.joined, kept))
        first += len(table)
    if group.alone is not None:
        most = group.facts.channels[group.alone]
        found += slices(group, beside, ANY, least=most) if most > 1 else ()
    return min(found, key=lambda priced: (priced.buffer, *_rank(priced)))


def least_reread(group: Group, beside: Beside, limit: int, most: int) -> int | None:
    """What the best way reads again, in bytes; ``None`` where no way fits with up to ``most``."""
    others, touched = beside.others, beside.touched
    if touched:
        line = others + sum([s.whole if s.tensors & touched else s.line for s in group.storages])
    else:
        line = others + group.line
    if line + group.weights < limit:
        return 0
    key = group.local(touched), group.local(beside.staying), others, beside.free, limit
    known = group.memo.get(key)
    if known is None or (known[0] is None and known[1] < most):
        known = group.memo[key] = _search_ways(group, beside, limit, most), most
    found = known[0]
    return None if found is None or found > most else found


def _search_ways(group: Group, beside: Beside, limit: int, most: int) -> int | None:
    """What the best way reads again; ``None`` where no way fits with up to ``most``."""
    group.facts.count(_WAYS)
    if any(True for _ in _once(group, beside, limit)):
        return 0
    best = most + 1
    for again in slices, _stripes:
        for priced in again(group, beside, limit, best - 1) if best > 0 else ():
            best = min(best, priced.reread)
    return None if best > most else best


def _rank(priced: Priced) -> tuple[int, int, int, int]:
    return priced.reread, priced.buffer, _KINDS[priced.kind], priced.count


def _once(group: Group, beside: Beside, limit: int) -> Iterator[Priced]:
    """The ways that read nothing again: lines, and one stripe."""
    shape, weights = group.shape, group.weights
    sizes = [storage.line for storage in group.storages]
    line = _held(group, beside, sizes, lambda: shape.line_links, limit - weights)
    if line.bytes + weights < limit:
        stay = sum(1 << own.op for own in group.weighted)
        need = line.bytes + weights
        yield Priced(0, need, LINE, 1, stay, line.joined, _kept(group, beside, line.joined))
    sizes = [storage.at_once for storage in group.storages]
    streamed = limit - group.least_staging
    whole = _held(group, beside, sizes, lambda: shape.stripe_links(1), streamed)
    if whole.bytes < streamed:
        need = whole.bytes + group.least_staging
        yield Priced(0, need, STRIPES, 1, 0, whole.joined, _kept(group, beside, whole.joined))


def slices(
    group: Group, beside: Beside, limit: int, most: int | None = None, least: int = 2
) -> Iterator[Priced]:
    """An operator alone, its weights in the fewest slices that fit, from ``least`` on."""
    position = group.alone
    if position is None or not group.weights:
        return
    facts, lines = group.facts, group.facts.lines
    maps, again = beside.others, 0
    choices: list[tuple[int, int]] = []  # tensors that may stay for this step alone, bytes more
    for tensor in bits(group.tensors):
        if beside.touched >> tensor & 1:
            maps += facts.size[tensor]
        elif tensor == lines.writes[position]:
            maps += lines.unit_bytes[tensor]
        else:
            edge = lines.edges[tensor, position]
            held = max(1, edge.widest(edge.units_out)) * lines.unit_bytes[tensor]
            maps += held
            again += facts.size[tensor]
            if beside.free and group.private >> tensor & 1:
                choices.append((tensor, facts.size[tensor] - held))
    for chosen in range(1 << len(choices)):
        kept = [choice for k, choice in enumerate(choices) if chosen >> k & 1]
        need = maps + sum(more for _, more in kept)
        room = limit - 1 - need
        if room < 1:
            continue
        count = max(least, -(-group.weights // room))
        reread = (count - 1) * (again - sum(facts.size[tensor] for tensor, _ in kept))
        if count <= facts.channels[position] and (most is None or reread <= most):
            need -= -group.weights // count
            yield Priced(reread, need, SLICES, count, 0, (), sum(1 << t for t, _ in kept))


def _stripes(group: Group, beside: Beside, limit: int, most: int | None = None) -> Iterator[Priced]:
    """Two stripes and more, as long as one of them may read again no more than ``most``.

    In a :attr:`~.groups.Group.steady` group no storage needs less in stripes than in lines: so
    stripes that read nothing again are never better than lines, and where all weights do not fit
    beside the lines, some are read again in each further stripe.
    """
    shape, weights = group.shape, group.weights
    for first, rooms in _rooms(group, beside, limit, most):
        again = np.arange(first - 1, first - 1 + len(rooms))
        good = rooms >= group.least_staging
        if most is not None:
            good &= again * (weights - rooms) <= most
        for k in np.flatnonzero(good).tolist():
            count = first + k
            if most is not None and (count - 1) * (weights - int(rooms[k])) > most:
                continue
            sizes = (shape.table(first)[k] * group.unit_bytes).tolist()
            held = _held(group, beside, sizes, partial(shape.stripe_links, count), limit)
            staying = most_staying(group.weighted, limit - 1 - held.bytes)
            if staying is None:
                continue
            reread = (count - 1) * (weights - staying.held)
            if most is None or reread <= most:
                most = reread
                need = held.bytes + staying.held + staying.staging
                kept = _kept(group, beside, held.joined)
                yield Priced(reread, need, STRIPES, count, staying.ops, held.joined, kept)
        if most is not None and first - 1 > most:
            return  # what is read again is a byte in each further stripe at least


def least_in_stripes(group: Group, beside: Beside | None, limit: int, most: int) -> int | None:
    """A lower bound of what a step reads again in two stripes or more, in bytes.

    Without ``beside``: whatever is resident. ``None`` where it does not fit, or reads again more
    than ``most`` in any case.
    """
    found = None
    for first, rooms in _rooms(group, beside, limit, most):
        again = np.arange(first - 1, first - 1 + len(rooms)) * np.maximum(group.weights - rooms, 0)
        again = again[rooms >= group.least_staging]
        if len(again) and (least := int(again.min())) <= most:
            found = most = least
            if not least:
                break
    return found


def _rooms(
    group: Group, beside: Beside | None, limit: int, most: int | None
) -> Iterator[tuple[int, Bytes]]:
    """What is left of the buffer for weights in so many stripes and in some more, at most.

    Ends where every further stripe reads again more than ``most`` in any case. Storages that may
    be written over a resident are not counted. Without ``beside``: whatever is resident.
    """
    group.facts.count(_STRIPES)
    weights = group.weights
    least = group.least + (0 if beside is None else beside.others)
    if most is not None and weights + least - (limit - 1) > most:
        return
    shape = group.shape
    if shape.steady and beside is not None:
        if most == 0:
            return
        sizes = [storage.line for storage in group.storages]
        least = _held(group, beside, sizes, lambda: shape.line_links, limit).bytes
    if least + group.least_staging >= limit:
        return
    excess = max(weights + least - (limit - 1), 0)
    apart = np.ones(len(group.storages), bool)
    if beside is None:
        apart[[link.above for link in shape.links]] = False
        whole, streams = 0, group.unit_bytes * apart
    else:
        fixed = np.array([bool(storage.tensors & beside.touched) for storage in group.storages])
        apart[[shape.links[k].above for k in _usable(group, beside)]] = False
        whole = beside.others + int(group.wholes @ (fixed & apart))
        streams = group.unit_bytes * (apart & ~fixed)
    first = 2
    while first <= shape.most_stripes and (most is None or (first - 1) * excess <= most):
        table = shape.table(first)
        group.facts.count(_ROOMS + table.size // _CELLS)
        yield first, limit - 1 - whole - table @ streams
        first += len(table)


def _kept(group: Group, beside: Beside, joined: tuple[Link, ...]) -> int:
    """Mask of the tensors that are resident in a step alone, to be joined."""
    found = 0
    for link in joined:
        found |= 1 << group.numbers[link.source] | 1 << group.numbers[link.target]
    return found & ~beside.touched


def _usable(group: Group, beside: Beside) -> list[int]:
    """Numbers of the links of which both tensors are resident, or may be."""
    if not group.links:
        return []
    free = group.private if beside.free else 0
    sources, targets = beside.touched & ~beside.staying | free, beside.touched | free
    return [
        k for k, (source, target) in enumerate(group.links) if sources & source and targets & target
    ]


def _held(
    group: Group, beside: Beside, sizes: Sequence[int], links_of: Callable[[], int], enough: int
) -> Held:
    """Bytes of all storages, and of the residents that the step does not touch.

    Args:
        sizes: bytes of each storage if nothing in it is resident.
        links_of: the links of which other readers have let go in time.
        enough: as many bytes or more need not be exact.
    """
    costs = [
        storage.whole if storage.tensors & beside.touched else size
        for storage, size in zip(group.storages, sizes, strict=True)
    ]
    total = beside.others + sum(costs)
    usable = _usable(group, beside)
    if not usable:
        return Held(total)
    links = group.shape.links
    most = total - sum([costs[links[k].above] for k in usable])
    if most >= enough:
        return Held(most)
    wholes = [storage.whole for storage in group.storages]
    saved, joined = _join(costs, wholes, [links[k] for k in usable])
    if total - saved < enough and any(links[k].others for k in usable):
        eligible = links_of()
        over: dict[int, Link] = {}  # several over one operand: none of them is ever written
        for k in usable:
            if eligible >> k & 1:
                over.setdefault(links[k].source, links[k])
        saved, joined = _join(costs, wholes, list(over.values()))
    return Held(total - saved, joined)


def _join(
    costs: Sequence[int], wholes: Sequence[int], links: Sequence[Link]
) -> tuple[int, tuple[Link, ...]]:
    """Which links to use, so that the storages take least.

    Storages that are joined in a row take what one takes as a whole; one that is joined to none
    takes its ``costs``. If at most one link leads from each storage, they are a forest, and what is
    saved is exact; else it is an upper bound.

    Returns:
        Bytes saved, and the links.
    """
    into: dict[int, list[Link]] = {}
    for link in links:
        into.setdefault(link.above, []).append(link)
    # Least bytes of a storage and all below it: all told, and without the row that it ends, which
    # is to go on; with the link into it that this takes.
    ended: dict[int, tuple[int, Link | None]] = {}
    open_: dict[int, tuple[int, Link | None]] = {}

    def settle(storage: int) -> None:
        if storage in ended:
            return
        incoming = into.get(storage, ())
        for link in incoming:
            settle(link.below)
        below = sum(ended[link.below][0] for link in incoming)
        apart: tuple[int, Link | None] = (below, None)
        joined = apart
        for link in incoming:
            less = below - ended[link.below][0] + open_[link.below][0]
            if joined[1] is None or less < joined[0]:
                joined = (less, link)
        open_[storage] = joined if joined[1] and joined[0] < apart[0] else apart
        ended[storage] = (below + costs[storage], None)
        if joined[1] and joined[0] + wholes[storage] < ended[storage][0]:
            ended[storage] = (joined[0] + wholes[storage], joined[1])

    used: list[Link] = []
    saved = 0
    inner = {link.below for link in links}
    for storage in dict.fromkeys(link.above for link in links):
        if storage in inner:
            continue
        settle(storage)
        saved -= ended[storage][0]
        pending = [(storage, ended)]
        while pending:
            at, table = pending.pop()
            saved += costs[at]
            taken = table[at][1]
            for link in into.get(at, ()):
                pending.append((link.below, open_ if link is taken else ended))
            if taken is not None:
                used.append(taken)
    return saved, tuple(sorted(used, key=lambda link: link.op))
