"""What the page shows of one section of a report, as plain values.

Operators, tensors and units are given by position. A *unit* is a box of the graph: a fusion group,
a step of a cascade plan, or an unfusable operator that stands in no group. Units come in an order
in which they can run; sizes are integer bytes per sample, as in the other data formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_getfuse.accelerator import format_activations, format_size, format_width
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.scheme import CostTerm, Dram
from torch_getfuse.partition.node_set import bits, topological_order
from torch_getfuse.reporting.blame import term_text
from torch_getfuse.reporting.explanation import Explanation
from torch_getfuse.reporting.operators_table import tensor_places
from torch_getfuse.reporting.section import Section, is_fusable
from torch_getfuse.reporting.section_tables import section_facts

WEIGHTS, LINES, RESIDENTS = "weights", "lines", "residents"
_SHARES = {"weights": WEIGHTS, "staging": WEIGHTS, "slice": WEIGHTS, "resident": RESIDENTS}
"""Kinds of terms -> parts of a bar; every other kind is lines of tensors."""


def section_figures(section: Section) -> dict[str, Any]:
    """The plain values of one section."""
    plan, graph = section.plan, section.plan.graph
    units = _units(section)
    home = {name: k for k, unit in enumerate(units) for name in unit["ops"]}
    at = {name: k for k, name in enumerate(graph.tensors)}
    skips = skip_edges(graph)
    steps = section.steps
    return {
        "name": section.name,
        "fingerprint": graph.fingerprint,
        "scheme": plan.scheme,
        "noun": "group" if steps is None else "step",
        "buffer": plan.buffer_bytes,
        "assumptions": _assumptions(section),
        "facts": [list(row) for row in section_facts(section)],
        "dram": {
            "unfused": _traffic(section.unfused, section.outside),
            "planned": _traffic(section.planned, section.outside),
            "bound": section.lower_bound,
            "proof": plan.proof,
            "standing": plan.standing,
            "floor": section.floor.total,
        },
        "inputs": [at[name] for name in graph.inputs],
        "outputs": [at[name] for name in dict.fromkeys(graph.outputs)],
        "tensors": _tensors(section),
        "ops": [
            {
                "name": op.name,
                "kind": op.kind,
                "module": op.module,
                "unit": home[op.name],
                "reads": [
                    {
                        "tensor": at[read.tensor],
                        "window": str(read.window),
                        "skip": (i, at[read.tensor]) in skips,
                    }
                    for read in op.reads
                ],
                "writes": at[op.writes],
                "weights": op.weight_elements,
                "weight_bytes": section.scheme.weights[i],
                "macs": op.macs,
                "alone": list(section.alone(op.name)),
                "needs": section.needs.get(op.name),
                "unfusable": op.name in section.unfusable,
                "held_whole": section.held_whole.get(op.name, ""),
            }
            for i, op in enumerate(graph)
        ],
        "units": [{**unit, "ops": [graph.index[name] for name in unit["ops"]]} for unit in units],
        "again": []
        if steps is None
        else [
            {
                "step": entry.step,
                "op": graph.index[entry.operator],
                "what": entry.what,
                "times": entry.times,
                "extra": entry.extra_bytes,
                "lacks": entry.lacking_bytes,
            }
            for entry in steps.again
        ],
        "unsupported": dict(section.unsupported),
        "notes": [*section.remarks, *_reach(section)],
    }


def explanation_figures(explanation: Explanation) -> dict[str, Any]:
    """The plain values of an explanation: its data format, what its text says of it, means."""
    texts = [
        {"text": term_text(term), "bytes": term.bytes, "part": _SHARES.get(term.kind, LINES)}
        for term in explanation.terms
    ]
    pairs = zip(explanation.edges, explanation.mean_scores, strict=True)
    told = {
        "headline": explanation.headline,
        "added": list(explanation.added),
        "terms": texts,
        "means": [[edge.producer, edge.consumer, mean] for edge, mean in pairs],
    }
    return {**explanation.to_dict(), **told}


def _traffic(fusable: Dram, outside: Dram) -> dict[str, int]:
    return {
        "features": fusable.read + fusable.write,
        "weights": fusable.weight,
        "unfusable": outside.total,
    }


def _assumptions(section: Section) -> list[str]:
    plan = section.plan
    found = [] if section.accelerator is None else [f"accelerator {section.accelerator.name}"]
    found += [f"scheme {plan.scheme}", f"buffer {format_size(plan.buffer_bytes)}"]
    if section.granularity:
        found.append(f"granularity {section.granularity}")
    found.append(format_activations(plan.activation_bytes, plan.align_channels))
    found.append(format_width(plan.weight_bytes))
    return found


def _reach(section: Section) -> list[str]:
    reach = section.reach
    if reach is None:
        return []
    return [reach.told(section.network_planned.total, bool(section.unfusable))]


# -- units --------------------------------------------------------------------------------


def _units(section: Section) -> list[dict[str, Any]]:
    """Groups and the unfusable operators beside them, in an order in which they can run."""
    plan, graph = section.plan, section.plan.graph
    masks = plan.masks()
    units = [
        {
            "name": f"fusion_group_{k}",
            "number": k,
            "ops": group.ops,
            "fusable": is_fusable(group),
            "buffer": group.buffer_bytes,
            "dram": list(group.dram),
            "needs": needs,
            "ends": group.ends,
            "way": str(group.way or ""),
            "terms": [_term(term) for term in _terms(section, k, masks[k])],
        }
        for k, (group, needs) in enumerate(zip(plan.groups, section.border_needs, strict=True))
    ]
    for name in plan.apart:
        masks.append(1 << graph.index[name])
        units.append(
            {
                "name": "",
                "number": None,
                "ops": (name,),
                "fusable": False,
                "buffer": 0,
                "dram": list(section.unfusable[name]),
                "needs": section.needs[name],
                "ends": "unfusable: alone it does not fit the buffer",
                "way": "",
                "terms": [],
            }
        )
    if not plan.apart:
        return units
    order = topological_order(masks, graph)
    assert order is not None, "a legal plan has an order"
    return [units[k] for k in order]


def _terms(section: Section, k: int, mask: int) -> Sequence[CostTerm]:
    """What fills the buffer in a group, largest first."""
    if section.steps is not None:
        terms = section.steps.terms(k)
    else:
        terms = section.scheme.terms(mask, section.plan.buffer_bytes)
    return sorted(terms, key=lambda term: -term.bytes)


def _term(term: CostTerm) -> dict[str, Any]:
    return {
        "part": _SHARES.get(term.kind, LINES),
        "name": term.name,
        "text": term_text(term),
        "bytes": term.bytes,
    }


# -- tensors ------------------------------------------------------------------------------


def _tensors(section: Section) -> list[dict[str, Any]]:
    """Shape, size and place of every tensor.

    ``place`` is that of :func:`tensor_places`.
    """
    places = tensor_places(section)
    graph, steps = section.plan.graph, section.steps
    staying = {} if steps is None else {entry.tensor: entry for entry in steps.staying}
    leaving = {} if steps is None else {entry.tensor: entry for entry in steps.leaving}
    found = []
    for name, tensor in graph.tensors.items():
        maker = graph.producer.get(name)
        form = {
            "name": name,
            "shape": list(tensor.shape),
            "bytes": graph.tensor_bytes[name],
            "maker": maker,
            "readers": list(graph.consumers[name]),
            "place": places[name],
        }
        if name in staying:
            form["stay"] = [staying[name].first, staying[name].last]
        elif name in leaving:
            form["why"] = leaving[name].reason
        found.append(form)
    return found


def skip_edges(graph: OpGraph) -> set[tuple[int, int]]:
    """(operator, position of a tensor that it reads) of every skip connection.

    An edge is one if a longer path joins its two ends: the shortcut of a residual block, and the
    map that a Squeeze-and-Excite block scales, but not the branches of an Inception block.
    """
    at = {name: k for k, name in enumerate(graph.tensors)}
    before: list[int] = []  # per operator, the mask of all that it depends on
    found = set()
    for i, op in enumerate(graph):
        makers = graph.makers[i]
        reached = makers
        for j in bits(makers):
            reached |= before[j]
        before.append(reached)
        for read in op.reads:
            maker = graph.producer.get(read.tensor)
            if maker is not None and any(before[j] >> maker & 1 for j in bits(makers)):
                found.add((i, at[read.tensor]))
    return found
