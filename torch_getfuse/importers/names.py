"""Foreign names to operators: several may stand for one, and one for several that are fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch_getfuse.errors import OptionError, some_of
from torch_getfuse.ir import OpGraph

_NAMED = 8  # names that an error lists


def matched(
    graph: OpGraph,
    groups: Sequence[Sequence[str]],
    operator_of: Callable[[str], str | None],
    silent: Callable[[str], bool] = lambda name: False,
) -> list[list[str]]:
    """Groups of foreign names as groups of operators, each operator once.

    Args:
        graph: the operators.
        groups: foreign names.
        operator_of: the operator that a foreign name stands for, ``None`` if it is not known.
        silent: whether a foreign name stands for something that is no operator here.

    Raises:
        OptionError: lists the names that stand for nothing, and an operator that the groups divide.
    """
    home: dict[str, int] = {}
    by: dict[str, str] = {}
    unknown: list[str] = []
    found: list[list[str]] = []
    for k, group in enumerate(groups):
        found.append([])
        for foreign in group:
            name = operator_of(foreign)
            if name is None or name not in graph.index:
                if not silent(foreign):
                    unknown.append(foreign)
                continue
            if home.setdefault(name, k) != k:
                raise OptionError(
                    f"{name} ({graph.ops[graph.index[name]].kind}) is one operator here, but "
                    f"{by[name]!r} stands in group {home[name]} and {foreign!r} in group {k}; put "
                    "them into one group"
                )
            if name not in by:
                found[k].append(name)
            by.setdefault(name, foreign)
    if unknown:
        raise OptionError(
            f"{len(unknown)} names stand for no operator of the graph: {some_of(unknown, _NAMED)}; "
            "the operators are named as in torch_getfuse.plan(...).graph"
        )
    return [group for group in found if group]


def with_fused(graph: OpGraph, groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """Groups with the operators that are named by none, each in the group of its only reader.

    A tool that has fused an operator into the next one names the result alone.
    """
    home = {name: k for k, group in enumerate(groups) for name in group}
    found = [set(group) for group in groups]
    for i in reversed(range(len(graph))):
        name, readers = graph.ops[i].name, graph.readers[i]
        if name in home or readers.bit_count() != 1:
            continue
        reader = graph.ops[readers.bit_length() - 1].name
        if reader in home:
            home[name] = home[reader]
            found[home[reader]].add(name)
    return [[op.name for op in graph if op.name in group] for group in found]
