"""What was compiled: lets ``report(model)`` find the plans that a model runs with.

The backend itself holds no state per model, for Dynamo decides when it is called: once per graph
break, again on recompiles, and not at all for the second instance of a class. Each graph that it
returns carries a record, which lives as long as Dynamo keeps that graph.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import CodeType
from typing import Any

from torch import fx, nn

from torch_getfuse.backend.torch_private import (
    backend_of,
    is_compiled_function,
    original_function,
    original_module,
    traced_code,
)
from torch_getfuse.reporting.section import Section


class CompiledGraph:
    """One graph that the backend compiled.

    Args:
        gm: the graph, with its inputs.
        options: as they were given to the backend.

    Attributes:
        sections: its parts of a report: the graph, and its backward graph where that is planned
            (which torch compiles later); empty where planning failed.
        failures: part -> why it runs unplanned: ``""`` for the graph, else ``"forward"`` or
            ``"backward"``.
        code: the code object that Dynamo traced, the outermost one.
        parameters: weak references to the parameters that the graph reads: among its inputs, or
            its own attributes, which they are where ``torch._inductor.config.freezing`` is on.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[object],
        options: Mapping[str, Any],
    ) -> None:
        self.options = dict(options)
        self.sections: list[Section] = []
        self.failures: dict[str, str] = {}
        self.code = traced_code()
        self.parameters = [
            weakref.ref(value)
            for value in (*example_inputs, *gm.parameters())
            if isinstance(value, nn.Parameter)
        ]

    def add_notes(self, notes: Sequence[str]) -> None:
        """Add to the notes of the graph's own section."""
        self.replace_notes((), notes)

    def replace_notes(self, old: Collection[str], new: Sequence[str]) -> None:
        """The same, without some that were added before."""
        section = self.sections[0]
        left = (note for note in section.notes if note not in old)
        self.sections[0] = replace(section, notes=(*left, *new))

    def replaces(self, other: CompiledGraph) -> bool:
        """Whether both are one piece of code, compiled for other inputs or settings.

        Then a call runs one of them; otherwise it may run both, as after a graph break.
        """
        if self.code is None or self.code is not other.code:
            return False
        theirs = {id(value) for reference in other.parameters if (value := reference()) is not None}
        return self.shares(theirs) or not (self.parameters or theirs)

    def shares(self, identities: set[int]) -> bool:
        """Whether one of its parameters is among the tensors of these ``id`` s."""
        alive = (reference() for reference in self.parameters)
        return any(value is not None and id(value) in identities for value in alive)


_records: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()
_order: weakref.WeakKeyDictionary[CompiledGraph, int] = weakref.WeakKeyDictionary()
_count = itertools.count()
_lock = threading.Lock()


def remember(compiled: Callable[..., Any], record: CompiledGraph) -> Callable[..., Any]:
    """Tie a record to the callable that the backend returns, and return a callable that has it."""

    def run(*args: Any) -> Any:
        return compiled(*args)

    run.getfuse_record = record  # type: ignore[attr-defined]
    with _lock:
        _records.add(record)
        _order[record] = next(_count)
    return run


def find(model: object) -> tuple[list[CompiledGraph], bool]:
    """Records of a module, compiled wrapper or function, and whether they are of this instance.

    Records that were given a parameter of the module are its own; of a bound method, those of its
    code. A module whose class was compiled for another instance runs that instance's code (Dynamo
    shares it), so those records are its plans as well; the second value is then ``False``. A
    function has no instances. Of a compiled wrapper, only what was compiled with its options.
    """
    target = original_function(original_module(model))
    with _lock:
        records = sorted(_records, key=_order.__getitem__)
    options = _wrapper_options(model)
    found = _of_target(target, [record for record in records if record.options == options])
    return found if found[0] else _of_target(target, records)


def _of_target(
    target: object, records: Sequence[CompiledGraph]
) -> tuple[list[CompiledGraph], bool]:
    """:func:`find` of a module or function among ``records``."""
    module = getattr(target, "__self__", target)
    function = type(target).forward if isinstance(target, nn.Module) else target
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    same = [record for record in records if code is not None and _within(record.code, code)]
    if not isinstance(module, nn.Module):
        return same, True
    identities = {id(parameter) for parameter in module.parameters()}
    candidates = records if module is target else same
    own = [record for record in candidates if record.shares(identities)]
    if own:
        ours = set(own) | {record for record in same if not record.parameters}
        return [record for record in records if record in ours], True
    return same, not any(record.parameters for record in same)


def compiler_of(model: object) -> str | None:
    """The name of the backend that ``torch.compile`` was given; ``None`` where it is not known."""
    name = getattr(backend_of(model), "compiler_name", None)
    return name if isinstance(name, str) else None


def is_compiled(model: object) -> bool:
    """Whether ``model`` is what ``torch.compile`` returns, or a module after ``.compile()``."""
    return backend_of(model) is not None or is_compiled_function(model)


def _wrapper_options(model: object) -> Mapping[str, Any] | None:
    """The options in what ``torch.compile`` returned; ``None`` where they are not to be found."""
    given = getattr(backend_of(model), "kwargs", None)
    return given.get("options", {}) if isinstance(given, Mapping) else None


def _within(traced: CodeType | None, code: CodeType) -> bool:
    """Whether ``traced`` is ``code`` or what Dynamo made of the rest of it after a graph break."""
    if traced is None or traced.co_filename != code.co_filename:
        return False
    if traced.co_name == code.co_name:
        return traced.co_firstlineno == code.co_firstlineno
    lines = [line for _, _, line in code.co_lines() if line is not None]
    resumed = traced.co_name.startswith(f"torch_dynamo_resume_in_{code.co_name}")
    return resumed and min(lines) <= traced.co_firstlineno <= max(lines)
