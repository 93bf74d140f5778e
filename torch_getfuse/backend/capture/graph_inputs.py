"""What the tensors are that a graph is given: maps of a batch, one for all samples, or weights.

A trace records shapes and no names of axes, so the batch is inferred: it leads the input of the
highest rank, or follows the steps of a recurrent layer. What the other inputs are shows in how they
are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from torch_getfuse.backend.fx_nodes.normalize import Invocation, normalise
from torch_getfuse.backend.fx_nodes.values import tensor_info, traced_value
from torch_getfuse.backend.rules.registry import facts_of, positional
from torch_getfuse.backend.rules.rule import ViewForm


def is_weight_argument(node: fx.Node) -> bool:
    """Whether an input is read as a weight, and as nothing else.

    So are the parameters that ``torch.func.functional_call`` is given as plain tensors.
    """
    for user in node.users:
        call = _call(user)
        if call is None:
            return False
        rule = facts_of(call.name)
        names = {name for name, value in rule.named(call.args).items() if value is node}
        if not names or not names.issubset(rule.weights):
            return False
    return bool(node.users)


def batch_size(inputs: Sequence[fx.Node]) -> int:
    """Samples of the first of the inputs of the highest rank; 1 for an unbatched map.

    One of leading size 1 is passed over for another of that rank: it may be a mask for all samples.
    """

    def rank(node: fx.Node) -> tuple[int, bool]:
        shape = tensor_info(traced_value(node)).shape
        return len(shape), bool(shape) and shape[0] != 1

    best = max(inputs, key=rank, default=None)
    if best is None or traced_value(best).dim() < 2 or _unbatched(best):
        return 1
    return max(1, tensor_info(traced_value(best)).shape[batch_axis(best)])


def batch_axis(node: fx.Node) -> int:
    """Axis of an input that its batch leads: 1 of the steps ``(T, N, F)`` of a recurrent layer.

    The layer reads the input, or what operators that keep its first two axes make of it.
    """
    if traced_value(node).dim() != 3:
        return 0
    lead = tensor_info(traced_value(node)).shape[:2]  # symbols as their hints
    found = [node]  # grows while it is gone through
    for source in found:
        for user in source.users:
            call, result = _call(user), traced_value(user)
            if call is None:
                continue
            rule = facts_of(call.name)
            if rule.recurrent and call.args.get("input") is source:
                return 0 if call.args.get("batch_first") else 1
            keeps = isinstance(result, torch.Tensor) and tensor_info(result).shape[:2] == lead
            if keeps and rule.view is not ViewForm.MOVE and user not in found:
                found.append(user)
    return 0


def is_for_all_samples(node: fx.Node, batch: int) -> bool:
    """Whether a map is broadcast along the batch, as a mask or a grid for all samples is.

    Its leading size tells nothing: that of a 16x16 mask is divisible by 8 samples.
    """
    rank = traced_value(node).dim()
    seen: set[fx.Node] = set()
    found = [node] if batch > 1 else []  # and what is computed from it element by element
    for value in found:
        for user in value.users:
            call, result = _call(user), traced_value(user)
            if call is None or not isinstance(result, torch.Tensor):
                continue
            rule = facts_of(call.name)
            shape = tensor_info(result).shape
            mixes = rule.elementwise or rule.batched
            if mixes and result.dim() > rank and shape[0] == batch:
                return True
            # Of a flat input, an exported graph reads what `flatten` gives, a trace the input.
            keeps = shape == tensor_info(traced_value(value)).shape
            shows = keeps and rule.view not in (None, ViewForm.MOVE)
            if (shows or (rule.elementwise and result.dim() == rank)) and user not in seen:
                seen.add(user)
                found.append(user)
    return False


def _call(node: fx.Node) -> Invocation | None:
    called = node.op in ("call_function", "call_method")
    return normalise(node, positional) if called else None


def _unbatched(node: fx.Node) -> bool:
    """True where a convolution or pool over n axes reads an input of n + 1 axes."""
    end = f"{traced_value(node).dim() - 1}d"
    for user in node.users:
        name = call.name if (call := _call(user)) is not None else ""
        slides = ("conv" in name or "pool" in name) and name.endswith(end)
        if slides and user.args[:1] == (node,):
            return True
    return False
