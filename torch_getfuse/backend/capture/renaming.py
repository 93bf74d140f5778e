"""One graph under the names of another.

``torch.export`` forgets which module a call is of where the module is itself an exported one (a
PT2E model that another module holds), which Dynamo remembers: the same operators, other names.
"""

from __future__ import annotations

from dataclasses import replace

from torch_getfuse.backend.capture.capture import Capture
from torch_getfuse.ir import OpGraph


def named_as(captured: Capture, graph: OpGraph) -> Capture:
    """The capture with ``graph``'s names, if nothing but names differs; else as it is."""
    ours = captured.graph
    if ours.fingerprint == graph.fingerprint or (
        (len(ours), len(ours.inputs)) != (len(graph), len(graph.inputs))
    ):
        return captured
    names = {mine.name: other.name for mine, other in zip(ours, graph, strict=True)}
    tensors = dict(zip(ours.inputs, graph.inputs, strict=True))
    tensors.update((mine.writes, other.writes) for mine, other in zip(ours, graph, strict=True))
    renamed = OpGraph(
        inputs=graph.inputs,
        outputs=tuple(tensors[name] for name in ours.outputs),
        ops=tuple(
            replace(
                op,
                name=names[op.name],
                module=other.module,
                reads=tuple(replace(read, tensor=tensors[read.tensor]) for read in op.reads),
                writes=tensors[op.writes],
                after=tuple(names[name] for name in op.after),
            )
            for op, other in zip(ours, graph, strict=True)
        ),
        tensors={
            tensors[name]: replace(tensor, name=tensors[name])
            for name, tensor in ours.tensors.items()
        },
    )
    if renamed.fingerprint != graph.fingerprint:
        return captured
    return replace(
        captured,
        graph=renamed,
        nodes={names[name]: nodes for name, nodes in captured.nodes.items()},
        calls={names[name]: calls for name, calls in captured.calls.items()},
        batch_axes={tensors[name]: axes for name, axes in captured.batch_axes.items()},
    )
