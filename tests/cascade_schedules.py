"""How the steps of cascade run, unit by unit and stripe by stripe (docs/method.md, section 12)."""

from __future__ import annotations

from tests.simulator import Simulator
from torch_getfuse.ir import Op, OpGraph, WindowKind


class Line(Simulator):
    """Section 3's schedule, which also notes where an operand could not be written over."""

    def __init__(self, graph: OpGraph, mask: int) -> None:
        self.kept: set[tuple[str, str]] = set()
        super().__init__(graph, mask)

    def note(self, name: str) -> None:
        super().note(name)
        if name not in self.makers:
            return
        op, unit = self.makers[name], self.made[name] - 1
        for x in (read.tensor for read in op.reads):
            for other, read in self.readers[x]:
                holds = read.window.kind is not WindowKind.REDUCE and other is not op
                if holds and self.keep[other.name, x][self.made[other.writes]] <= unit:
                    self.kept.add((op.name, x))


class Stripes(Simulator):
    """A step in stripes, operator by operator, on sets of unit numbers."""

    def __init__(self, graph: OpGraph, mask: int, count: int) -> None:
        self.count = count
        self.kept: set[tuple[str, str]] = set()
        super().__init__(graph, mask)

    def wanted(self, stripe: int) -> dict[str, set[int]]:
        """The units of each tensor that exist at the end of a stripe."""
        wanted: dict[str, set[int]] = {}
        for name in reversed(self.tensors):  # each tensor stands before those made of it
            if not self.readers[name]:
                wanted[name] = set(range(-(-stripe * self.units[name] // self.count)))
                continue
            ends = [0]
            for op, read in self.readers[name]:
                spans = [self.spans[op.name, read.tensor][unit] for unit in wanted[op.writes]]
                ends += [span.stop for span in spans if span]
            wanted[name] = set(range(max(ends)))
        return wanted

    def lowest_needed(self, op: Op, tensor: str, done: set[int]) -> int:
        """The lowest unit of an operand that the output units that are not done need."""
        spans = self.spans[op.name, tensor]
        starts = [span.start for u, span in enumerate(spans) if u not in done and span]
        return min(starts, default=self.units[tensor])

    def run(self) -> None:
        made: dict[str, set[int]] = {name: set() for name in self.tensors}
        # What each reduction had taken in by the end of its last turn.
        taken: dict[tuple[str, str], set[int]] = {pair: set() for pair in self.spans}
        for stripe in range(1, self.count + 1):
            wanted, before = self.wanted(stripe), dict(made)
            for op in self.group:
                for read in op.reads:
                    if read.tensor not in self.makers:
                        made[read.tensor] = wanted[read.tensor]
                for unit in wanted[op.writes] - made[op.writes]:
                    for read in op.reads:
                        if not self.let_go(op, read.tensor, unit, made, taken):
                            self.kept.add((op.name, read.tensor))
                made[op.writes] = wanted[op.writes]
                for read in op.reads:
                    taken[op.name, read.tensor] = made[read.tensor]
            for last in self.peak:
                first = next(name for name in self.tensors if self.storage[name] == last)
                live = made[first] - self.released(last, before)
                self.peak[last] = max(self.peak[last], len(live))

    def let_go(
        self,
        op: Op,
        tensor: str,
        unit: int,
        made: dict[str, set[int]],
        taken: dict[tuple[str, str], set[int]],
    ) -> bool:
        """Whether all readers of an operand but ``op`` are done with one of its units."""
        for other, read in self.readers[tensor]:
            if other is op:
                continue
            if read.window.kind is WindowKind.REDUCE:
                if unit not in taken[other.name, tensor]:
                    return False
            elif unit >= self.lowest_needed(other, tensor, made[other.writes]):
                return False
        return True

    def released(self, name: str, made: dict[str, set[int]]) -> set[int]:
        """Units that are made and that no reader needs, nor any unit before them."""
        lowest = [
            self.lowest_needed(op, name, made[op.writes])
            for op, read in self.readers[name]
            if read.window.kind is not WindowKind.REDUCE
        ]
        return {unit for unit in made[name] if all(unit < low for low in lowest)}
