"""From what capture found in an FX graph to operators: batch norms folded, and names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence

from torch import fx

from torch_getfuse.backend.capture.graph_values import Draft
from torch_getfuse.backend.capture.op_order import OperatorOrder
from torch_getfuse.backend.fx_nodes.values import traced_value
from torch_getfuse.backend.rules.rule import Stored
from torch_getfuse.ir import Op, Read
from torch_getfuse.ir.op import default_channels
from torch_getfuse.json_fields import escaped


def fold_batch_norms(
    drafts: Sequence[Draft], outputs: Container[int], order: OperatorOrder
) -> list[Draft]:
    """A convolution and the eval batch norm that alone reads it are one operator.

    Not where something else must run between them. The two vectors of the batch norm become the
    bias.

    Args:
        outputs: the tensors that are returned.
    """
    readers = Counter(base for draft in drafts for base, _ in draft.reads)
    writers = {draft.writes: draft for draft in drafts}
    kept = []
    for draft in drafts:
        conv = writers.get(draft.reads[0][0]) if draft.reads else None
        if (
            draft.kind == "batch_norm"
            and draft.in_place
            and draft.direct
            and conv is not None
            and conv.spec.bias is not None
            and readers[conv.writes] == 1
            and conv.writes not in outputs
            and order.joins(draft.nodes[0], conv)
        ):
            order.fold(draft, conv)
            vector = Stored(draft.weights.elements // 2, draft.weights.bytes // 2)
            conv.weights += vector - conv.spec.bias
            conv.nodes += draft.nodes
            conv.calls += draft.calls
            conv.writes = draft.writes
        else:
            kept.append(draft)
    return kept


_PRODUCTS = ("mm", "_int_mm", "matmul")
_RESCALES = ("to", "mul", "add", "sub")
_SHIFTS = ("to", "add")


def fold_scales(
    drafts: Sequence[Draft], outputs: Container[int], order: OperatorOrder
) -> list[Draft]:
    """A product with integer weights, and the casts, scales and bias behind it, are one linear.

    So ``torch.export`` records a linear layer whose weight is of a class of torchao's, where Dynamo
    has one call. On a processor whose instructions want one operand without signs it shifts the
    integers before the product, and takes out of the result what that added: they are the same
    integers. Not where something else reads what is between them.

    Args:
        outputs: the tensors that are returned.
    """
    readers = Counter(base for draft in drafts for base, _ in draft.reads)
    products: dict[int, Draft] = {}
    shifts: dict[int, list[Draft]] = {}  # tensor -> the casts and the addition that it comes from
    kept: list[Draft] = []
    folded: set[int] = set()
    for draft in drafts:
        source = draft.reads[0][0] if draft.reads else -1
        product = products.pop(source, None)
        if (
            product is not None
            and draft.kind in _RESCALES
            and (draft.in_place or draft.kind == "to")
            and draft.direct
            and readers[product.writes] == 1
            and product.writes not in outputs
            and order.joins(draft.nodes[0], product)
        ):
            if draft.kind != "sub" or not _made_of_its_weights(draft, product):
                product.weights += draft.weights
            order.fold(draft, product)
            product.nodes += draft.nodes
            product.calls += draft.calls
            product.writes = draft.writes
            product.kind = "linear"
            products[draft.writes] = product
            continue
        stored = draft.weights
        if draft.kind in _PRODUCTS and 0 < stored.bytes <= stored.elements:
            products[draft.writes] = draft
            if source in shifts:
                for shift in shifts[source]:
                    order.fold(shift, draft)
                    draft.nodes += shift.nodes
                folded.update(map(id, shifts[source]))
                _read_unshifted(draft, shifts[source][0])
        elif (
            draft.kind in _SHIFTS
            and not stored.elements
            and len(draft.reads) == readers[draft.writes] == 1
            and [len(features) for _, features in draft.calls] == [1]
            and draft.writes not in outputs
            and _is_integer(draft)
        ):
            shifts[draft.writes] = [*shifts.get(source, ()), draft]
        kept.append(draft)
    return [draft for draft in kept if id(draft) not in folded]


def _is_integer(draft: Draft) -> bool:
    """Whether it computes integers from integers."""
    dtypes = [traced_value(draft.nodes[-1]).dtype]
    dtypes += [reading.operand.info.dtype for reading in draft.spec.reads]
    return not any(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)


def _read_unshifted(product: Draft, shift: Draft) -> None:
    """Let a product read what the first shift before it reads."""
    shifted = product.reads[0][0]
    _, [(_, unshifted)] = shift.calls[0]
    product.reads = shift.reads
    product.calls = [
        (node, [(arg, unshifted if at.base == shifted else at) for arg, at in features])
        for node, features in product.calls
    ]


def _made_of_its_weights(draft: Draft, product: Draft) -> bool:
    """Whether the second operand of a draft is computed from that of a product, its weight."""
    return _roots(draft.nodes[0]) <= _roots(product.nodes[0])


def _roots(node: fx.Node) -> set[fx.Node]:
    """The inputs and attributes that the second operand of a node is computed from."""
    waiting = [arg for arg in node.args[1:2] if isinstance(arg, fx.Node)]
    found, roots = set(waiting), set()
    while waiting:
        at = waiting.pop()
        if not at.all_input_nodes:
            roots.add(at)
        waiting += [before for before in at.all_input_nodes if before not in found]
        found.update(at.all_input_nodes)
    return roots


def names_of(drafts: Sequence[Draft]) -> list[str]:
    """Module path, and the kind where the path alone does not say which operator it is."""
    kinds: dict[str, set[str]] = {}
    inside: set[str] = set()
    for draft in drafts:
        path = escaped(draft.module)
        kinds.setdefault(path, set()).add(draft.kind)
        parts = path.split(".")
        inside.update(".".join(parts[:n]) for n in range(len(parts)))
    taken: set[str] = set()
    names = []
    for draft in drafts:
        path, kind = escaped(draft.module), draft.kind
        leaf = path and path not in inside and len(kinds[path]) == 1
        names.append(unique(path if leaf else f"{path}.{kind}" if path else kind, taken))
    return names


def unique(name: str, taken: set[str]) -> str:
    """``name``, or with the first free of the suffixes ``_1``, ``_2``, ..."""
    count, found = 0, name
    while found in taken:
        count += 1
        found = f"{name}_{count}"
    taken.add(found)
    return found


def operator_of(
    draft: Draft, name: str, rank: int, tensors: Mapping[int, str], after: tuple[str, ...]
) -> Op:
    """The operator of a draft, whose tensors have names by now."""
    axis = draft.spec.channel_axis
    return Op(
        name=name,
        kind=draft.kind,
        reads=tuple(Read(tensors[base], window) for base, window in draft.reads),
        writes=name,
        module=escaped(draft.module),
        weight_elements=draft.weights.elements,
        weight_bytes=draft.weights.bytes,
        macs=draft.macs,
        in_place=draft.in_place,
        mixes_channels=draft.spec.mixes_channels,
        groups=draft.spec.groups,
        channel_axis=None if axis == default_channels(rank) else axis,
        recurrent=draft.spec.recurrent,
        reason=draft.reason,
        after=after,
    )
