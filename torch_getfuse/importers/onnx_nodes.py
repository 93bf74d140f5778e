"""Lists of ONNX node names.

``torch.onnx.export`` keeps the path of the module that a node comes from: the exporter that is the
default since torch 2.9 in the node's metadata (``pkg.torch.onnx.name_scopes``), the older one in
the node's name, as in ``/features/features.0/features.0.0/Conv``. Several nodes may be one operator
here: SiLU is Sigmoid and Mul in ONNX, hard-swish Add, Clip, Mul and Div.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch_getfuse.errors import OptionError
from torch_getfuse.importers.names import matched
from torch_getfuse.ir import OpGraph

_SCOPES = "pkg.torch.onnx.name_scopes"
_SILENT = frozenset(
    {
        *("BatchNormalization", "Cast", "Constant", "ConstantOfShape", "Dropout", "Expand"),
        *("Flatten", "Identity", "Reshape", "Shape", "Squeeze", "Transpose", "Unsqueeze"),
        *("QuantizeLinear", "DequantizeLinear"),
    }
)
"""Kinds of nodes that are no operators here: views, constants, and what folds into neighbours."""

_KINDS = {
    "Add": ("add",),
    "Mul": ("mul",),
    "Sub": ("sub",),
    "Div": ("div",),
    "Concat": ("cat",),
    "ReduceMean": ("mean", "adaptive_avg_pool2d"),
    "GlobalAveragePool": ("adaptive_avg_pool2d",),
    "MaxPool": ("max_pool2d",),
    "Softmax": ("softmax",),
}
"""Kinds of nodes that functions make -> kinds of operators, where a module has several."""


def onnx_groups(
    graph: OpGraph, groups: Sequence[Sequence[str]], model: str | Path | None = None
) -> list[list[str]]:
    """Groups of ONNX nodes as groups of operators.

    Args:
        graph: the operator graph of the module that was exported.
        groups: names of nodes.
        model: the ``.onnx`` file, whose nodes say which module they come from; ``None`` where the
            names themselves do.

    Raises:
        OptionError: for names that stand for no operator, for an operator that the groups divide,
            and where ``model`` is given and ``onnx`` is not installed.
    """
    nodes = {} if model is None else _nodes(model)
    used: dict[tuple[str, str], int] = {}
    found: dict[str, str | None] = {}
    for name in (name for group in groups for name in group):
        path, kind, label = nodes.get(name) or _by_name(name)
        found[name] = _operator(graph, path, kind, label, used)
    kinds = {name: (nodes.get(name) or _by_name(name))[1] for name in found}
    return matched(graph, groups, found.get, lambda name: kinds[name] in _SILENT)


def _operator(
    graph: OpGraph, path: str, kind: str, label: str, used: dict[tuple[str, str], int]
) -> str | None:
    """The operator of a node of a module; of several of one kind the next one."""
    here = [op for op in graph if op.module == path]
    if kind in _SILENT or not here:
        return None
    kinds = (label, *_KINDS.get(kind, ()))
    same = [op for op in here if op.kind in kinds]
    if not same:
        return here[0].name if len(here) == 1 else None
    turn = used.get((path, same[0].kind), 0)
    used[path, same[0].kind] = turn + 1
    return same[min(turn, len(same) - 1)].name


def _by_name(name: str) -> tuple[str, str, str]:
    """Module path and kind of a node by its name: ``/features/features.0/Conv_1``."""
    *path, last = name.strip("/").split("/")
    return path[-1] if path else "", last.split("_")[0], ""


def _nodes(model: str | Path) -> dict[str, tuple[str, str, str]]:
    """Node -> module path, kind, and the name of the traced operator without its number."""
    try:
        import onnx
    except ImportError as error:
        raise OptionError(f"reading {str(model)!r} needs onnx: pip install onnx") from error
    found = {}
    for node in onnx.load(str(model), load_external_data=False).graph.node:
        found[node.name] = _scope(node)
    return found


def _scope(node: Any) -> tuple[str, str, str]:
    for name in node.input:
        # A batch norm that was folded into it has left its own scope, but not the weight.
        if name.endswith(".weight"):
            return name.removesuffix(".weight"), node.op_type, ""
    scopes = {entry.key: entry.value for entry in node.metadata_props}.get(_SCOPES)
    if scopes is None:
        return _by_name(node.name)
    *modules, traced = ast.literal_eval(scopes)
    path = modules[-1] if modules else ""
    return path, node.op_type, traced.rstrip("0123456789").rstrip("_")
