"""Quantised networks: quantize, dequantize and choose-qparams fold into their neighbours.

A quantize and a dequantize are taken for views: the tensor is the same, its elements are stored
otherwise. So a convolution behind a dequantize reads the integers. How wide a tensor is where it
crosses DRAM follows from all of its readers (:func:`settle_quantisation`). Scales that are chosen
from the values need these first: what is quantised by them is read whole, unless each row has its
own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from torch import fx

from torch_getfuse.backend.capture.graph_values import Draft, Feature, Value, View
from torch_getfuse.backend.fx_nodes.effects import written_at
from torch_getfuse.backend.fx_nodes.normalize import normalise
from torch_getfuse.backend.fx_nodes.values import copy_node, rewritten, traced_value
from torch_getfuse.backend.rules.quantisation import Quantisation, quantisation_of
from torch_getfuse.backend.rules.registry import positional
from torch_getfuse.backend.rules.rule import Stored
from torch_getfuse.backend.rules.view_windows import Layout
from torch_getfuse.ir import OpGraph


def quantisation(node: fx.Node) -> Quantisation | None:
    """What a node does, if it is a call that quantises; ``None`` for any other."""
    if node.op != "call_function":
        return None
    return quantisation_of(normalise(node, positional).name)


def with_own_dequantize(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` itself, or a copy in which each reader of a dequantized tensor has its own dequantize.

    So that what crosses the border of a fusion group is the integers. Not where something writes
    to the result, which all readers must see.
    """
    written = written_at(gm)
    shared = {
        node
        for node in gm.graph.nodes
        if len(node.users) > 1
        and node not in written
        and quantisation(node) is Quantisation.DEQUANTIZE
    }
    if not shared:
        return gm
    used: set[fx.Node] = set()

    def place(graph: fx.Graph, node: fx.Node, placed: Mapping[fx.Node, fx.Node]) -> fx.Node:
        own = dict(placed)
        for source in node.all_input_nodes:
            if source in shared:
                if source in used:
                    own[source] = copy_node(graph, source, placed)
                used.add(source)
        return copy_node(graph, node, own)

    return rewritten(gm, place)


def kept_as_operators(gm: fx.GraphModule) -> frozenset[fx.Node]:
    """Quantising calls that are no views, since their operand or result is written in place.

    An activation in place of a dequantized tensor that nobody else reads (``relu6_`` of it) is
    none of them: to the network it writes over the tensor itself.
    """
    found = [node for node in gm.graph.nodes if quantisation(node) is not None]
    written = written_at(gm) if found else {}
    position = {node: at for at, node in enumerate(gm.graph.nodes)} if written else {}

    def changes(node: fx.Node, since: fx.Node) -> bool:
        return any(at > position[since] for at in written.get(node, ()))

    kept = set()
    for node in found:
        source = node.args[0]
        moves = isinstance(source, fx.Node) and changes(source, node)
        if moves or (changes(node, node) and not _alone(node)):
            kept.add(node)
    return frozenset(kept)


def _alone(node: fx.Node) -> bool:
    """Whether nothing else shows the tensor that is dequantized: one chain from a call to it."""
    quantize = node.args[0]
    if not isinstance(quantize, fx.Node) or quantisation(quantize) is not Quantisation.QUANTIZE:
        return False
    source = quantize.args[0]
    return (
        len(quantize.users) == 1
        and isinstance(source, fx.Node)
        and len(source.users) == 1
        and source.op == "call_function"
    )


def settle_quantisation(
    drafts: Sequence[Draft], values: Mapping[fx.Node, Value], returned: Iterable[fx.Node]
) -> dict[int, int]:
    """Gives each dequantize to its reader; and the widths of tensors that are stored quantised.

    A tensor is stored as integers where all that read it, and whoever it is returned to, read it
    through a quantize: its writer quantises, or for an input of the network whoever gives it. Where
    one of them reads it as it was, or two quantise it otherwise (other scales are other integers),
    it is stored as it was, once, and the others quantise as they read.
    Scales that are chosen from its values do not count: it has to be whole before it is quantised.
    What only an activation in place reads (the output of a convolution before its ReLU) is as wide
    as the activation's result, which is written over it: kernels quantise once, after both.

    Returns:
        Base -> bits of an element; bases that are not stored quantised are left out.
    """
    operators = {call for draft in drafts for call, _ in draft.calls}
    seen: dict[int, list[_Integers | None]] = {}
    for draft in drafts:
        for _, operands in draft.calls:
            for node, feature in operands:
                chain = list(_shown(node, partial(_is_of, values, feature.base)))
                seen.setdefault(feature.base, []).append(_integers(chain, values))
                _take_over(draft, [n for n in chain if n not in operators])
    for node in returned:
        value = values.get(node)
        if isinstance(value, Feature):
            chain = list(_shown(node, partial(_is_of, values, value.base)))
            seen.setdefault(value.base, []).append(_integers(chain, values))
    stored = {
        base: found[0][0]
        for base, found in seen.items()
        if found[0] is not None and all(other == found[0] for other in found)
    }
    for draft in reversed(drafts):
        if draft.in_place and draft.writes in stored:  # in place: it has one operand
            source = draft.reads[0][0]
            if seen.get(source) == [None]:
                stored[source] = stored[draft.writes]
    return stored


def _shown(node: fx.Node, of_it: Callable[[fx.Node], bool]) -> Iterable[fx.Node]:
    """A view of a tensor and the views that it is one of, the innermost last.

    Args:
        of_it: whether a node shows that tensor.
    """
    at: fx.Node | None = node
    while at is not None:
        yield at
        sources = [n for n in at.all_input_nodes if of_it(n)]
        at = sources[0] if len(sources) == 1 else None


def _is_of(values: Mapping[fx.Node, Value], base: int, node: fx.Node) -> bool:
    value = values.get(node)
    return isinstance(value, Feature) and value.base == base


_Integers = tuple[int, str, Layout | None]
"""Bits of an element; by which scale, zero point and range it is quantised; and of what, where
there is one scale per position of an axis.
"""


def _integers(chain: Iterable[fx.Node], values: Mapping[fx.Node, Value]) -> _Integers | None:
    """The integers that a chain of views shows, by the quantize next to the tensor."""
    found = None
    for node in chain:
        if quantisation(node) is Quantisation.QUANTIZE and not _chosen(node):
            source = node.args[0]
            shown = values[source] if isinstance(source, fx.Node) else None
            one = "per_tensor" in str(node.target)
            layout = shown.layout if isinstance(shown, Feature) and not one else None
            bits = 8 * int(traced_value(node).dtype.itemsize)
            found = bits, str((node.args[1:], node.kwargs)), layout
    return found


def _chosen(node: fx.Node) -> bool:
    """Whether what it quantises by is computed from values while the network runs."""
    above = [source for source in node.all_input_nodes if source is not node.args[0]]
    while above:
        source = above.pop()
        if quantisation(source) is Quantisation.CHOOSE:
            return True
        above += source.all_input_nodes
    return False


def _take_over(draft: Draft, chain: list[fx.Node]) -> None:
    """The reader has what lies between the integers and itself, if nobody else reads it."""
    own: list[fx.Node] = []
    for node in chain:
        if len(node.users) != 1 or quantisation(node) is Quantisation.QUANTIZE:
            break
        own.append(node)
        if quantisation(node) is Quantisation.DEQUANTIZE:
            draft.dequantizes += own
            break


def move_dequantizes(
    drafts: Iterable[Draft], scales: Mapping[fx.Node, Mapping[fx.Node, Stored]]
) -> None:
    """Each dequantize, and the views behind it, from its operand's writer to its reader.

    Scales and zero points become weights of the operator that has the call, each once.
    """
    drafts = list(drafts)
    moved = {node for draft in drafts for node in draft.dequantizes}
    for draft in drafts:
        draft.nodes = [node for node in draft.nodes if node not in moved] + draft.dequantizes
        parts: dict[fx.Node, Stored] = {}
        for node in draft.nodes:
            parts.update(scales.get(node, {}))
        draft.weights += Stored.sum(parts.values())


def quantisation_notes(
    gm: fx.GraphModule, graph: OpGraph, views: Mapping[fx.Node, View]
) -> tuple[str, ...]:
    """What a report says of a quantised network; nothing of any other.

    How many calls are folded, how many tensors there are of each width, and where scales are chosen
    from values while the network runs.
    """
    kinds = Counter(kind for node in gm.graph.nodes if (kind := quantisation(node)) is not None)
    if not kinds:
        return ()
    widths = Counter(8 * graph.width(name) for name in graph.tensors)
    told = ", ".join(f"{n} of {bits:g} bits" for bits, n in sorted(widths.items()))
    q, dq = kinds[Quantisation.QUANTIZE], kinds[Quantisation.DEQUANTIZE]
    kept = sum(op.kind in _KINDS for op in graph)
    notes = [
        f"quantised: {q} quantize and {dq} dequantize calls, {kept} of them operators of "
        f"their own, the others folded; tensors: {told}"
    ]
    given = [name for name in graph.inputs if graph.width(name) < graph.activation_bytes]
    if given:
        notes.append(
            f"{', '.join(given)}: read through a quantize alone, so planned as quantised "
            "by whoever gives it"
        )
    taken = {
        views[node].tensor
        for node in gm.graph.output_node().all_input_nodes
        if node in views
        and traced_value(node).dtype.is_floating_point
        and any(
            quantisation(shown) is Quantisation.QUANTIZE
            for shown in _shown(node, partial(_is_view, views, views[node].tensor))
        )
    }
    taken = {name for name in taken if graph.width(name) < graph.activation_bytes}
    if narrow := [n for n in dict.fromkeys(graph.outputs) if n in taken and n not in given]:
        notes.append(
            f"{', '.join(narrow)}: returned dequantized, counted as the integers it is stored "
            "as: whoever takes it dequantizes"
        )
    if chosen := kinds[Quantisation.CHOOSE]:
        notes.append(
            f"dynamic quantisation: {chosen} times scales are chosen from values, for "
            "which a tensor is stored as it was and read whole, but where each row has "
            "its own scale"
        )
    return tuple(notes)


def _is_view(views: Mapping[fx.Node, View], tensor: str, node: fx.Node) -> bool:
    return node in views and views[node].tensor == tensor


_KINDS = tuple(kind.value for kind in (Quantisation.QUANTIZE, Quantisation.DEQUANTIZE))
