"""A program: Python source of a module and its inputs, in lines that can be dropped one by one.

The source is the program. What is checked is what it prints, so a failing one can be pasted.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DATA = '''\
def data(seed, *shape, dtype=torch.float32):
    """Values in -2 to 2 that depend on the seed alone."""
    g = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(shape, generator=g) < 0.5
    if dtype.is_complex:
        return torch.randn(shape, generator=g, dtype=dtype)
    if not dtype.is_floating_point:
        return torch.randint(0 if dtype is torch.uint8 else -4, 5, shape, generator=g).to(dtype)
    return (4 * torch.rand(shape, generator=g) - 2).to(dtype)
'''

PRELUDE = f"import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n\n{_DATA}"

_NAME = re.compile(r"\b[vx]\d+\b")


def namespace() -> dict[str, Any]:
    """The names that the lines of a program may use."""
    names: dict[str, Any] = {"torch": torch, "F": F, "nn": nn, "Tensor": Tensor}
    exec(_DATA, names)
    return names


@dataclass(frozen=True)
class Statement:
    """A line of ``forward``, and the lines of ``__init__`` that it needs."""

    text: str
    setup: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """The value that the line makes; empty for one that is run for its effect."""
        left = re.match(r"([vx]\d+) = ", self.text)
        return left[1] if left else ""

    @property
    def reads(self) -> tuple[str, ...]:
        """The values that the line names, in order; the one that it makes is not among them."""
        found = _NAME.findall(self.text)
        return tuple(dict.fromkeys(found[1:] if self.target else found))


@dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
        inputs: expressions of ``x0``, ``x1``, ... in terms of ``k``, the number of the call;
            an expression may name ``base``, a vector that several inputs are views of.
        statements: of ``forward``.
        results: the expression that ``forward`` returns.
        training: whether the module is in train mode.
        buffer: the on-chip buffer to plan for.
    """

    seed: int
    inputs: tuple[str, ...]
    statements: tuple[Statement, ...]
    results: str
    training: bool = False
    buffer: str = "1KB"

    @property
    def source(self) -> str:
        """Self-contained Python that defines ``M``, ``build()`` and ``inputs(k)``."""
        names = [f"x{i}" for i in range(len(self.inputs))]
        setup = dict.fromkeys(line for s in self.statements for line in s.setup)
        lines = [
            PRELUDE,
            "",
            "class M(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        {line}" for line in setup),
            "",
            f"    def forward({', '.join(['self', *names])}):",
            *(f"        {s.text}" for s in self.statements),
            f"        return {self.results}",
            "",
            "",
            "def build():",
            "    with torch.random.fork_rng():",
            f"        torch.manual_seed({self.seed})",
            f"        return M().train({self.training})",
            "",
            "",
            "def inputs(k):",
        ]
        if any("base" in text for text in self.inputs):
            lines.append("    base = data(90 + k, 600)")
        lines += [f"    {name} = {text}" for name, text in zip(names, self.inputs)]
        lines.append(f"    return {', '.join(names)},")
        return "\n".join(lines) + "\n"

    def load(self) -> Case:
        """The program's own functions."""
        # Dynamo keeps what it knows of sizes by file name and line.
        name = f"<fuzz {self.seed} {zlib.crc32(self.source.encode())}>"
        code = compile(self.source, name, "exec")
        found: dict[str, Any] = {}
        exec(code, found)
        return Case(found["build"], found["inputs"])

    def without(self, index: int, stand_in: str = "") -> Program:
        """The program less one statement, whose value is ``stand_in`` everywhere after it."""
        gone = self.statements[index]
        rest = list(self.statements[:index]) + list(self.statements[index + 1 :])
        results = self.results
        if gone.target and stand_in:
            word = re.compile(rf"\b{gone.target}\b")
            rest[index:] = [replace(s, text=word.sub(stand_in, s.text)) for s in rest[index:]]
            results = word.sub(stand_in, results)
        return replace(self, statements=tuple(rest), results=results)


@dataclass(frozen=True)
class Case:
    """What a program's source defines.

    Attributes:
        build: makes the module, the same each time.
        inputs: makes the inputs of the first or second call.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]


def runs(program: Program, calls: int = 2) -> bool:
    """Whether eager accepts a program."""
    try:
        case = program.load()
        with torch.no_grad(), torch.random.fork_rng():
            model = case.build()
            for k in range(calls):
                model(*case.inputs(k))
    except REFUSALS:
        return False
    return True


REFUSALS = (
    RuntimeError, TypeError, ValueError, LookupError, NameError, AttributeError, ArithmeticError,
    AssertionError,
)  # fmt: skip
"""What torch raises of a line that it does not take."""
