"""Makes a failing program short: drops what can go while the failure stays."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from .check import Failure, check
from .program import Program, runs


def shrink(program: Program, failure: Failure) -> tuple[Program, Failure]:
    """The shortest program found that fails in the same way, and how it does."""

    def fails(candidate: Program) -> Failure | None:
        if not runs(candidate):
            return None
        found = check(candidate, [failure.mode]).failures
        return next((f for f in found if f.kind == failure.kind), None)

    return smallest(program, failure, fails)


def smallest(
    program: Program, failure: Failure, fails: Callable[[Program], Failure | None]
) -> tuple[Program, Failure]:
    """Greedy: the first smaller program that still fails is taken, until none does."""
    while True:
        for candidate in _smaller(program):
            found = fails(candidate)
            if found is not None:
                program, failure = candidate, found
                break
        else:
            return program, failure


def _smaller(program: Program) -> Iterator[Program]:
    """Programs with less in them, those with a statement less first."""
    for index in reversed(range(len(program.statements))):
        statement = program.statements[index]
        used = statement.target and re.search(
            rf"\b{statement.target}\b",
            " ".join([*(s.text for s in program.statements[index + 1 :]), program.results]),
        )
        for stand_in in statement.reads if used else ("",):
            yield program.without(index, stand_in)
    names = list(dict.fromkeys(re.findall(r"\b[vx]\d+\b", program.results)))
    if len(names) > 1:
        for name in names:
            rest = ", ".join(n for n in names if n != name)
            yield replace(program, results=f"({rest},)")
    elif program.results != names[0]:
        yield replace(program, results=names[0])
    last = f"x{len(program.inputs) - 1}"
    used_text = " ".join([*(s.text for s in program.statements), program.results])
    if len(program.inputs) > 1 and not re.search(rf"\b{last}\b", used_text):
        yield replace(program, inputs=program.inputs[:-1])
    for i, text in enumerate(program.inputs):
        plain = re.search(r"data\([^()]*\)", text)
        if plain and plain[0] != text:
            inputs = (*program.inputs[:i], plain[0], *program.inputs[i + 1 :])
            yield replace(program, inputs=inputs)
    if program.training:
        yield replace(program, training=False)
