"""What a reader must know of the mode in which a graph was traced."""

from __future__ import annotations

from torch import fx

from torch_getfuse.backend.fx_nodes.normalize import normalise
from torch_getfuse.backend.rules.registry import positional


def mode_notes(gm: fx.GraphModule) -> tuple[str, ...]:
    """A sentence for a graph in training mode that would be another one in eval mode.

    What counts is what the graph says: a model in training mode without batch norm and dropout
    has the same plan in either mode.
    """
    norms = drops = 0
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        call = normalise(node, positional)
        if call.args.get("training") is True:
            norms += call.name.endswith("batch_norm")
            drops += "dropout" in call.name and call.args.get("p") != 0
        dropped = call.args.get("dropout_p")
        drops += isinstance(dropped, float) and dropped > 0
    if not norms and not drops:
        return ()
    told = []
    if norms:
        told.append(
            f"{_count(norms, 'batch norm')} of the batch's statistics, not folded into the "
            "convolutions"
        )
    if drops:
        told.append(f"{_count(drops, 'random dropout')}")
    return (
        f"the model is in training mode: {' and '.join(told)}; call model.eval() first for the "
        "plan of inference",
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
