"""Scales that are chosen from the values of a tensor, while the network runs: who waits for it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from torch_getfuse.backend.capture.calls import Calls
from torch_getfuse.backend.capture.graph_values import Draft, Feature
from torch_getfuse.backend.capture.quantisation import quantisation
from torch_getfuse.backend.rules.quantisation import Quantisation, by_rows
from torch_getfuse.backend.rules.rule import Alias, Call, Operand, Reading, Spec
from torch_getfuse.backend.rules.view_windows import Layout


def scales_waited_for(
    call: Call, result: Alias | Spec, drafts: Sequence[Draft], calls: Calls
) -> list[Reading]:
    """The tensors from whose values scales of a call were chosen, and which nothing that it reads
    has waited for.

    A tensor that was read whole on the way has been waited for, with all that led to it; one that
    was read by rows has where each row has a scale of its own.

    Args:
        result: what the rule says of the call.
        drafts: the operators before it.
        calls: of the same graph.
    """
    chosen = {
        part
        for operand in call.operands
        if operand.weight
        for part in operand.value.parts
        if quantisation(part) is Quantisation.CHOOSE
    }
    if not chosen:
        return []
    seen = {operand.value.base for operand in call.activations}
    readings = result.reads if isinstance(result, Spec) else ()
    complete = {reading.operand.value.base for reading in readings if _is_whole(reading)}
    if isinstance(result, Alias) and isinstance(value := result.operand.value, Feature):
        shown = [change(value.layout) for change in result.changes]
        if all(layout == Layout.opaque(layout.shape) for layout in shown):
            complete.add(value.base)
    for draft in reversed(drafts):
        if draft.writes in seen:
            for reading in draft.spec.reads:
                base = reading.operand.value.base
                seen.add(base)
                if draft.writes in complete or _is_whole(reading):
                    complete.add(base)
    found = []
    for choice in sorted(chosen, key=lambda node: node.name):
        source = choice.args[0]
        assert isinstance(source, fx.Node)
        operand = calls.argument(source)
        assert isinstance(operand, Operand)
        if operand.weight or operand.value.base in complete:
            continue
        invocation = calls.invocation(choice)
        if operand.value.base in seen and by_rows(invocation.name, invocation.args):
            continue
        complete.add(operand.value.base)
        found.append(Reading(operand, None))
    return found


def _is_whole(reading: Reading) -> bool:
    opaque = Layout.opaque(reading.operand.shape)
    return reading.accesses is None or reading.operand.value.layout == opaque
