"""A cost model: a group runs operator by operator, and whole maps stay on chip between them."""

from __future__ import annotations

from torch_getfuse import CostTerm, FusionScheme, bits


class WholeMaps(FusionScheme):
    """Whole feature maps and all weights of a group on chip.

    A map is on chip from the operator that makes it, or first reads it, to the last that reads it.
    """

    name = "whole_maps"
    # What crosses the border moves once, as FusionScheme.dram() has it; weights are read once.
    additive = True
    # An operator that joins downstream makes no map live for a shorter time.
    monotone = True
    holds_weights = True

    def buffer(self, mask: int, buffer_bytes: int) -> int:
        """The weights, and the maps of the step at which most bytes are live."""
        return sum(term.bytes for term in self.terms(mask, buffer_bytes))

    def terms(self, mask: int, buffer_bytes: int) -> tuple[CostTerm, ...]:
        """The weights of each operator, then each map that is live at the peak."""
        graph = self.graph
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for i in bits(mask):
            op = graph.ops[i]
            for tensor in (*(read.tensor for read in op.reads), op.writes):
                first.setdefault(tensor, i)
                last[tensor] = i
        change = dict.fromkeys(bits(mask), 0)  # bytes that become live at each operator
        ended = dict.fromkeys(bits(mask), 0)  # bytes that are live there for the last time
        for tensor in first:
            change[first[tensor]] += self._bytes(tensor)
            ended[last[tensor]] += self._bytes(tensor)
        live = most = peak = 0
        for i in bits(mask):
            live += change[i]
            if live > most:
                most, peak = live, i
            live -= ended[i]
        weights = [
            CostTerm("weights", graph.ops[i].name, self.weights[i], 1)
            for i in bits(mask)
            if self.weights[i]
        ]
        maps = [
            CostTerm("maps", tensor, graph.tensors[tensor].rows, graph.row_bytes[tensor])
            for tensor in first
            if first[tensor] <= peak <= last[tensor]
        ]
        return (*weights, *maps)

    def _bytes(self, tensor: str) -> int:
        return self.graph.tensor_bytes[tensor]
