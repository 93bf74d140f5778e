"""Networks in float and in each quantised form: what is counted, and what the plans move.

    python benchmarks/quantised.py                                  # the table of docs/quantised.md
    python benchmarks/quantised.py --networks resnet18 --forms xnnpack

Needs ``pip install torchao --no-deps``. Weights are random; one random image calibrates. Times are
not measured.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import fx

from torch_getfuse.backend.capture.capture import Capture, capture_model
from torch_getfuse.backend.capture.quantisation import quantisation
from torch_getfuse.backend.torch_private import is_dynamo_weight
from torch_getfuse.models import import_torchvision
from torch_getfuse.options import Options
from torch_getfuse.planner import plan_graph
from torch_getfuse.reporting.section import Section

NETWORKS = ("mobilenet_v2", "resnet18", "mobilenet_v3_large")
SCHEMES = ("lbdf", "cascade")
BUFFER = "256KB"


def plain(name: str) -> torch.nn.Module:
    """The float network, with random weights."""
    return import_torchvision().models.get_model(name, weights=None).eval()


def pt2e(model: torch.nn.Module, x: torch.Tensor, quantizer: Any) -> torch.nn.Module:
    """A model quantised by PT2E, calibrated by one input."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    prepared(x)
    return convert_pt2e(prepared)


def x86(name: str, x: torch.Tensor) -> torch.nn.Module:
    """As inductor on x86 takes it: convolution, addition and ReLU requantise once."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86_inductor

    quantizer = x86_inductor.X86InductorQuantizer()
    quantizer.set_global(x86_inductor.get_default_x86_inductor_quantization_config())
    return pt2e(plain(name), x, quantizer)


def xnnpack(name: str, x: torch.Tensor) -> torch.nn.Module:
    """As XNNPACK takes it: int8, a scale per output channel of a weight."""
    from torchao.testing.pt2e._xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    quantizer = XNNPACKQuantizer()
    quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
    return pt2e(plain(name), x, quantizer)


def int8_weights(name: str, x: torch.Tensor) -> torch.nn.Module:
    """torchao, int8 weights of linear layers alone."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = plain(name)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def int8_dynamic(name: str, x: torch.Tensor) -> torch.nn.Module:
    """torchao, int8 weights and dynamic int8 activations of linear layers."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = plain(name)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def int4_weights(name: str, x: torch.Tensor) -> torch.nn.Module:
    """torchao, int4 weights of linear layers in groups of 32: on a CPU it keeps a byte for each."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = plain(name)
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    return model


def eager(name: str, x: torch.Tensor) -> torch.nn.Module:
    """torchvision's quantizable model, by torch's eager-mode quantisation, as it comes."""
    torch.backends.quantized.engine = "fbgemm"
    build = getattr(import_torchvision().models.quantization, name)
    return build(weights=None, quantize=True).eval()


FORMS: dict[str, Callable[[str, torch.Tensor], torch.nn.Module]] = {
    "x86": x86,
    "xnnpack": xnnpack,
    "int8_weights": int8_weights,
    "int8_dynamic": int8_dynamic,
    "int4_weights": int4_weights,
    "eager": eager,
}


def stored_bytes(capture: Capture) -> int:
    """Bytes of all parameters and buffers that the graph reads, counted by torch itself.

    Of a batch norm that is folded into a convolution one vector of four: the convolution's bias.
    """
    leaves: dict[fx.Node, int] = {}
    for node in capture.graph_module.graph.find_nodes(op="placeholder"):
        if node.users and is_dynamo_weight(node):
            leaves[node] = _bytes(node.meta["example_value"])
    folded = 0
    for nodes in capture.nodes.values():
        for node in nodes[1:]:
            vectors = [leaves[n] for n in node.all_input_nodes if n in leaves]
            if node.target is F.batch_norm:
                own_bias = len([n for n in nodes[0].all_input_nodes if n in leaves]) > 1
                folded += sum(vectors) - (0 if own_bias else vectors[0])
    return sum(leaves.values()) - folded


def _bytes(tensor: Any) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def rows(name: str, forms: Iterable[str]) -> list[list[object]]:
    """The rows of one network."""
    x = torch.randn(1, 3, 224, 224)
    found: list[list[object]] = []
    groups: dict[str, Any] = {}

    def row(label: str, capture: Capture, stored: object, **widths: int) -> None:
        graph = capture.graph
        kinds = Counter(quantisation(node) is not None for node in capture.graph_module.graph.nodes)
        cells: list[object] = []
        for scheme in SCHEMES:
            section = Section(plan_graph(graph, Options(buffer=BUFFER, scheme=scheme, **widths)))
            own = [group.ops for group in section.plan.groups]
            if label == "float, 1 B":
                groups[scheme] = own
            same = groups.get(scheme)
            cells += [
                section.network_unfused.total,
                section.network_planned.total,
                "-" if same is None else "yes" if own == same else "no",
            ]
        width = widths.get("activation_bytes")
        tensors = Counter(8 * (width or graph.width(t)) for t in graph.tensors)
        counted = sum(graph.stored_bytes(op) for op in graph)
        if "weight_bytes" in widths:
            counted = graph.weight_elements * widths["weight_bytes"]
        told = ", ".join(f"{n}x{bits}" for bits, n in sorted(tensors.items()))
        found.append([name, label, len(graph), kinds[True], told, counted, stored, *cells])

    torch.manual_seed(0)
    capture = capture_model(plain(name), (x,))
    row("float, 1 B", capture, "-", activation_bytes=1, weight_bytes=1)
    row("float, 4 B", capture, stored_bytes(capture))
    for form in forms:
        torch.manual_seed(0)
        try:
            made = FORMS[form](name, x)
        except ValueError as error:  # the X86 quantizer, where a module is called twice
            found.append([name, form, f"torchao: {error}"])
            continue
        capture = capture_model(made, (x,))
        row(form, capture, stored_bytes(capture))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    head = [
        "network",
        "form",
        "operators",
        "q/dq folded",
        "tensors x bits",
        "weight bytes",
        "stored",
    ]
    for scheme in SCHEMES:
        head += [f"{scheme} unfused", "planned", "groups as float"]
    with torch.no_grad():
        for name in given.networks:
            print(tabulate(rows(name, given.forms), head, "github", intfmt=","), flush=True)
            print()


if __name__ == "__main__":
    main()
