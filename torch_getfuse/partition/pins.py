"""Pins: what a plan must keep together, keep apart, or keep on chip, whatever it costs.

People name operators and tensors; :func:`pins_of` makes masks of them for one graph. Under
LBDF and BRR every search asks :class:`~.cost.scheme.Evaluator` whether a group is valid, and that
asks them; under cascade :mod:`~.steps.lattice` asks, where all steps come from.

``split_before`` is monotone: a group with such an edge inside stays illegal however it grows.
``together`` is not: a group that holds a part of a set becomes legal when the rest has joined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch_getfuse.errors import OptionError, nearest, some_of
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.node_set import (
    ancestors,
    bits,
    convex_hull,
    descendants,
    mask_of,
)
from torch_getfuse.partition.selection import no_operator, selected


@dataclass(frozen=True, slots=True)
class Whole:
    """Operators that must share a group.

    Attributes:
        mask: them, with everything on paths between them, which no other group can hold.
        text: the pin as people type it, for errors and reports.
    """

    mask: int
    text: str


@dataclass(frozen=True)
class Pins:
    """The pins of one graph, as masks.

    Attributes:
        apart: consumer -> mask of producers that must not share its group.
        wholes: disjoint sets, each of which shares one group.
        kept: tensors that must be resident, or live in one step alone (cascade).
    """

    apart: Mapping[int, int] = field(default_factory=dict)
    wholes: tuple[Whole, ...] = ()
    kept: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.apart or self.wholes or self.kept)

    @property
    def loose(self) -> int:
        """Mask of operators that are not merged with the producer over whose output they write.

        Some optimum keeps the two together only where that breaks no pin.
        """
        return mask_of(self.apart) | self.in_wholes

    @property
    def in_wholes(self) -> int:
        """Mask of all operators of :attr:`wholes`."""
        return sum(whole.mask for whole in self.wholes)

    def torn(self, mask: int) -> bool:
        """Whether a group holds an edge that must be a border; so does every larger one."""
        return any(mask >> i & 1 and mask & makers for i, makers in self.apart.items())

    def allow(self, mask: int) -> bool:
        """Whether a group keeps to :attr:`apart` and :attr:`wholes`."""
        return not self.torn(mask) and all(
            whole.mask & mask in (0, whole.mask) for whole in self.wholes
        )

    def broken(self, graph: OpGraph, mask: int) -> str:
        """Why :meth:`allow` is false; empty where it is true."""
        for i, makers in self.apart.items():
            if mask >> i & 1 and mask & makers:
                maker = graph.ops[(mask & makers).bit_length() - 1].name
                return f"holds {maker} and {graph.ops[i].name}, but a border is pinned between them"
        for whole in self.wholes:
            if outside := whole.mask & ~mask if whole.mask & mask else 0:
                inside = whole.mask & mask
                names = [graph.ops[m.bit_length() - 1].name for m in (inside, outside)]
                return f"holds {names[0]} without {names[1]}; pinned by {whole.text}"
        return ""


NONE = Pins()


def pins_of(
    graph: OpGraph,
    keep: Sequence[str] = (),
    split_before: Sequence[str] = (),
    together: Sequence[Sequence[str]] = (),
    sequential: bool = False,
) -> Pins:
    """The masks of pins.

    Args:
        graph: whose operators and tensors they name. An operator is named as in reports, or by a
            module's path, which selects all operators below it; a tensor by its own name, or by
            that of the operator or module that makes it.
        keep: tensors that must stay on chip from their producer to their last reader.
        split_before: operators before which a group must end: every edge into them from outside of
            what the name selects is a border.
        together: sets of operators that share a group.
        sequential: whether tensors may be resident between groups (cascade); else a tensor stays
            on chip only where its producer and all its readers share a group.

    Raises:
        OptionError: for a name that the graph has not, and for pins that contradict each other.
    """
    if not (keep or split_before or together):
        return NONE
    apart: dict[int, int] = {}
    for name in split_before:
        chosen = _selected(graph, name, "split_before")
        edges = {i: graph.makers[i] & ~chosen for i in bits(chosen)}
        if not any(edges.values()):
            raise OptionError(
                f"split_before={name!r}: no operator of the graph comes before it, so there is "
                "no border to pin; leave it out"
            )
        for i, makers in edges.items():
            if makers:
                apart[i] = apart.get(i, 0) | makers
    wanted: list[Whole] = []
    for names in together:
        mask = 0
        for name in names:
            mask |= _selected(graph, name, "together")
        if mask.bit_count() < 2:
            found = "one operator" if mask else "no operator"
            raise OptionError(
                f"together={list(names)!r} selects {found}; name two or more, or a module that "
                "contains several"
            )
        wanted.append(Whole(mask, f"together={list(names)!r}"))
    kept: list[str] = []
    for name in keep:
        tensors = _tensors(graph, name)
        kept += tensors
        if not sequential:
            wanted += [Whole(_users(graph, tensor), f"keep={tensor!r}") for tensor in tensors]
    wholes = _disjoint(graph, wanted) if wanted else ()
    for whole in wholes:
        for i in bits(whole.mask):
            if torn := apart.get(i, 0) & whole.mask:
                maker = graph.ops[torn.bit_length() - 1].name
                raise OptionError(
                    f"{whole.text} puts {maker} and {graph.ops[i].name} into one group, and "
                    "split_before= a border between them; leave one of the two out"
                )
    return Pins(apart, wholes, tuple(dict.fromkeys(kept)) if sequential else ())


def _selected(graph: OpGraph, name: str, option: str) -> int:
    found = selected(graph, name)
    if not found:
        raise OptionError(f"{option}: {no_operator(graph, name)}")
    return found


def _tensors(graph: OpGraph, name: str) -> list[str]:
    """The tensors that a name stands for: one, or what a module hands on."""
    if name in graph.tensors:
        found = [name]
    else:
        chosen = selected(graph, name)
        found = [
            graph.ops[i].writes
            for i in bits(chosen)
            if graph.readers[i] & ~chosen or chosen == 1 << i
        ]
        if not found:
            hint = "; nothing outside it reads it"
            if not chosen:
                known = list(graph.tensors)
                hint = nearest(name, known) or f"; there are {some_of(known, 4)}"
            raise OptionError(f"keep={name!r} is no tensor and hands on none{hint}")
    for tensor in found:
        if not graph.consumers[tensor]:
            raise OptionError(f"keep={tensor!r}: nothing reads it, so there is nothing to keep")
    return found


def _users(graph: OpGraph, tensor: str) -> int:
    """Mask of the operators that make and read a tensor."""
    users = mask_of(graph.consumers[tensor])
    return users | 1 << graph.producer[tensor] if tensor in graph.producer else users


def _disjoint(graph: OpGraph, wanted: Sequence[Whole]) -> tuple[Whole, ...]:
    """Sets with everything on paths between their members; those that no plan can hold in different
    groups, because they overlap or wait for each other, as one.
    """
    above, below = ancestors(graph), descendants(graph)
    left = list(wanted)
    while True:
        left = [Whole(convex_hull(w.mask, above, below), w.text) for w in left]
        before = [_union(above, w.mask) for w in left]
        reach = [
            {k for k, other in enumerate(left) if other.mask & (before[i] | left[i].mask)}
            for i in range(len(left))
        ]
        for middle in range(len(left)):
            for row in reach:
                if middle in row:
                    row |= reach[middle]
        joined = [
            tuple(k for k in range(len(left)) if k in reach[i] and i in reach[k])
            for i in range(len(left))
        ]
        merged = [
            Whole(
                mask_of(i for k in rows for i in bits(left[k].mask)),
                " and ".join(dict.fromkeys(left[k].text for k in rows)),
            )
            for rows in dict.fromkeys(joined)
        ]
        if merged == left:
            return tuple(left)
        left = merged


def _union(sets: Sequence[int], mask: int) -> int:
    total = 0
    for i in bits(mask):
        total |= sets[i]
    return total
