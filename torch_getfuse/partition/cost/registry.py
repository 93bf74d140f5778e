"""The cost models by name, or as what makes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch_getfuse import plugins
from torch_getfuse.errors import OptionError, nearest
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.scheme import NO_CHOICE, FusionScheme
from torch_getfuse.widths import Width

SCHEMES = plugins.SCHEMES.built_in

SchemeLike = str | Callable[..., FusionScheme]
"""A name, or what makes a cost model of a graph: a :class:`FusionScheme` class, a function."""


def make_scheme(
    scheme: SchemeLike,
    graph: OpGraph,
    granularity: str,
    activation_bytes: Width | None,
    weight_bytes: Width | None,
    slice_channels: int = 16,
) -> FusionScheme:
    """The cost model of a graph.

    Args:
        scheme: a name, or called as ``scheme(graph, activation_bytes=, weight_bytes=)``, with
            ``granularity=`` where it has ``granularities``.
        graph: its channels are aligned as it says (:meth:`OpGraph.stored_as`).
        activation_bytes, weight_bytes: element widths in bytes; ``None``: as stored.
        granularity: unit of the streams; of no account where the scheme has no choice.
        slice_channels: of no account where plans are not sequences of steps.

    Raises:
        OptionError: for an unknown name or granularity, or where no :class:`FusionScheme` comes
            of it.
        PluginError: where a package's cost model cannot be loaded.
    """
    make = plugins.SCHEMES.load(scheme)
    unit = effective_granularity(scheme, granularity)
    chosen: dict[str, Any] = {}
    if plugins.fact(make, "granularities", ()):
        chosen["granularity"] = unit
    if plugins.fact(make, "sequential", False):
        chosen["slice_channels"] = slice_channels
    graph = graph.stored_as(activation_bytes)
    found = make(
        graph, activation_bytes=graph.activation_width, weight_bytes=weight_bytes, **chosen
    )
    if not isinstance(found, FusionScheme):
        raise OptionError(
            f"scheme={plugins.name_of(scheme)} makes a {type(found).__name__} of a graph; it must "
            "make a torch_getfuse.FusionScheme"
        )
    found.name = plugins.name_of(scheme)
    return found


def effective_granularity(scheme: SchemeLike, granularity: str) -> str:
    """The granularity that counts: plans of a scheme without a choice compare equal.

    Raises:
        OptionError: for one that the scheme has not.
    """
    known = plugins.fact(plugins.SCHEMES.load(scheme), "granularities", ())
    if not known:
        return NO_CHOICE
    if granularity not in known:
        raise OptionError(
            f"granularity={granularity!r} is not one of {', '.join(map(repr, known))}, which "
            f"scheme {plugins.name_of(scheme)!r} has{nearest(str(granularity), known)}"
        )
    return granularity
