"""The storages of a step as it runs: rings, and tensors that are on chip as a whole."""

from __future__ import annotations

from dataclasses import dataclass

from torch_getfuse.partition.cost.cascade.groups import Group
from torch_getfuse.partition.cost.cascade.pricing import Beside, Priced
from torch_getfuse.partition.cost.cascade.way import LINE, SLICES
from torch_getfuse.partition.node_set import bits


@dataclass(frozen=True, slots=True)
class Place:
    """Memory of one or more tensors of a step, each written over the one before.

    Attributes:
        tensors: numbers of the tensors, in the order in which they are written.
        units: rows that it has room for.
        unit_bytes: bytes of one.
        resident: whether it holds a tensor that is resident.
    """

    tensors: tuple[int, ...]
    units: int
    unit_bytes: int
    resident: bool

    @property
    def bytes(self) -> int:
        """``units * unit_bytes``."""
        return self.units * self.unit_bytes


def places(group: Group, beside: Beside, priced: Priced) -> list[Place]:
    """The storages of a step in its way; their bytes are ``F_b`` but for weights and
    :attr:`~.pricing.Beside.others`.
    """
    lines = group.facts.lines
    if priced.kind == SLICES:
        assert group.alone is not None, "slices are of an operator alone"
        target = lines.writes[group.alone]
        found = []
        stays = beside.touched | priced.kept
        for tensor in bits(group.tensors):
            resident = bool(stays >> tensor & 1)
            units = 1
            if resident:
                units = lines.units[tensor]
            elif tensor != target:
                edge = lines.edges[tensor, group.alone]
                units = max(1, edge.widest(edge.units_out))
            found.append(Place((tensor,), units, lines.unit_bytes[tensor], resident))
        return found
    shape = group.shape
    if priced.kind == LINE:
        sizes = [storage.line for storage in group.storages]
    else:
        counts = shape.units_in(priced.count)
        sizes = [n * size for n, size in zip(counts, group.unit_bytes.tolist(), strict=True)]
    above = {link.below: link.above for link in priced.joined}
    joined = set(above) | set(above.values())
    found = []
    for k in sorted(set(range(len(group.storages))) - set(above.values())):
        row = [k]
        while row[-1] in above:
            row.append(above[row[-1]])
        last = group.storages[row[-1]]
        unit_bytes = int(group.unit_bytes[row[-1]])
        resident = k in joined or bool(last.tensors & beside.touched)
        size = last.whole if resident else sizes[k]
        tensors = tuple(group.numbers[t] for at in row for t in shape.storages[at])
        found.append(Place(tensors, size // unit_bytes, unit_bytes, resident))
    return found
