"""The cost models by name."""

from __future__ import annotations

from torch_getfuse.errors import OptionError, nearest
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.brr.model import Brr
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.cost.scheme import FusionScheme

SCHEMES = ("lbdf", "brr")


def make_scheme(
    name: str, graph: OpGraph, granularity: str, activation_bytes: int, weight_bytes: int | None
) -> FusionScheme:
    """The cost model ``name`` of a graph; ``granularity`` is LBDF's.

    Raises:
        OptionError: for an unknown name.
    """
    if name == "lbdf":
        return Lbdf(graph, granularity, activation_bytes, weight_bytes)
    if name == "brr":
        return Brr(graph, activation_bytes, weight_bytes)
    raise OptionError(f"scheme={name!r} is not one of {SCHEMES}{nearest(name, SCHEMES)}")
