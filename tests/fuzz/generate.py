"""Seed -> program: statements are tried on real tensors, and kept where eager takes them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from .program import REFUSALS, Program, Statement, namespace, runs
from .templates import ANYTHING, NETWORK

_MOST_ELEMENTS = 2048
_MOST_BYTES = 64
_TRIALS = 60
"""Lines that are tried for a program at most."""

_INTEGERS = (torch.int64, torch.int32, torch.int8, torch.uint8)
_DTYPES = ("float32",) * 12 + (
    "float64", "bfloat16", "float16", "int64", "int64", "int32", "int8", "uint8", "bool",
    "complex64",
)  # fmt: skip
_SHAPES = (
    "2, 4, 6, 6", "1, 4, 8, 8", "1, 3, 5, 7", "2, 4, 6, 6", "1, 4, 8, 8", "2, 4, 8", "1, 4, 9",
    "2, 6", "4, 4", "3, 4", "6", "4", "", "1", "2, 0, 4", "1, 4, 1, 1", "2, 3, 4, 4, 4",
)  # fmt: skip

_KINDS: dict[str, Callable[[Tensor], bool]] = {
    "any": lambda t: True,
    "num": lambda t: t.dtype is not torch.bool and not t.is_complex(),
    "f": Tensor.is_floating_point,
    "f2": lambda t: t.is_floating_point() and t.dim() == 2,
    "f3": lambda t: t.is_floating_point() and t.dim() == 3,
    "f4": lambda t: t.is_floating_point() and t.dim() == 4,
    "i": lambda t: t.dtype in _INTEGERS,
    "b": lambda t: t.dtype is torch.bool,
    "z": Tensor.is_complex,
}


def generate(seed: int) -> Program:
    """The program of a seed: the same on every machine with this torch."""
    attempt = 0
    while True:
        program = _Generator(Random(f"{seed}/{attempt}"), seed).program()
        if program is not None and runs(program):
            return program
        attempt += 1


class _NoOperand(Exception):
    """No live value is of the kind that a template asks for."""


class _Generator:
    def __init__(self, rng: Random, seed: int) -> None:
        self.rng, self.seed = rng, seed
        self.network = rng.random() < 0.2
        self.module = nn.Module()
        self.names = {**namespace(), "self": self.module}
        self.values: dict[str, Tensor] = {}
        self.statements: list[Statement] = []

    def program(self) -> Program | None:
        """A program of at least two statements, or ``None`` where the draw was unlucky."""
        rng = self.rng
        training = rng.random() < (0.1 if self.network else 0.3)
        self.module.train(training)
        inputs = self._inputs()
        wanted = rng.randint(2, 12)
        with torch.no_grad(), torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(self.seed)
            for _ in range(_TRIALS):
                self._try()
                if len(self.statements) >= wanted:
                    break
        if len(self.statements) < 2:
            return None
        buffer = rng.choice(("256", "1KB", "1KB", "4KB", "16KB", "256KB"))
        made = tuple(self.statements)
        program = Program(self.seed, inputs, made, self._results(), training, buffer)
        # Two calls whose inputs lie in memory otherwise: apart at first, then overlapping.
        if len(inputs) > 1 and rng.random() < 0.4:
            lapped = replace(program, inputs=self._overlapping(inputs))
            program = lapped if runs(lapped) else program
        return program

    # -- inputs -------------------------------------------------------------------------

    def _inputs(self) -> tuple[str, ...]:
        rng = self.rng
        found: list[str] = []
        shape = rng.choice(_SHAPES[:2] if self.network else _SHAPES)
        for i in range(rng.choice((1, 1, 2, 2, 3))):
            if i and rng.random() < 0.4:
                shape = rng.choice(_SHAPES)
            dtype = "float32" if self.network and not i else rng.choice(_DTYPES)
            kind = "" if dtype == "float32" else f", dtype=torch.{dtype}"
            text = f"data({10 * i} + k, {shape}{kind})" if shape else f"data({10 * i} + k{kind})"
            sizes = [int(n) for n in shape.split(", ")] if shape else []
            layout = rng.random()
            if layout < 0.1 and len(sizes) == 4:
                text += ".contiguous(memory_format=torch.channels_last)"
            elif layout < 0.18 and len(sizes) > 1:
                turned = ", ".join(map(str, [*sizes[:-2], sizes[-1], sizes[-2]]))
                text = f"data({10 * i} + k, {turned}{kind}).transpose(-1, -2)"
            elif layout < 0.24 and sizes:
                text = f"data({10 * i} + k, {', '.join(map(str, [*sizes[:-1], 2 * sizes[-1]]))}"
                text += f"{kind})[..., ::2]"
            elif layout < 0.29 and sizes:
                text = f"data({10 * i} + k, {', '.join(map(str, [*sizes[:-1], 1]))}{kind})"
                text += f".expand({shape})"
            elif layout < 0.34 and i:
                text = rng.choice((f"x{i - 1}", "x0"))
            elif layout < 0.38 and i:
                text = f"x{i - 1}.view(-1)"
            elif layout < 0.42 and i:
                text = f"x{i - 1}[..., :1]"
            found.append(text)
            names = {**self.names, "k": 0, **self.values}
            try:
                value = eval(text, names)
            except REFUSALS:
                found[-1] = text = f"data({10 * i} + k, {shape or '1'})"
                value = eval(text, names)
            self.values[f"x{i}"] = value
        return tuple(found)

    def _overlapping(self, inputs: tuple[str, ...]) -> tuple[str, ...]:
        """Inputs of the same shapes; from the second call on, plain ones are views of one vector.

        Only float32 is moved: a vector has one dtype.
        """
        found = []
        for i, text in enumerate(inputs):
            value = self.values[f"x{i}"]
            plain = re.fullmatch(r"data\([^()]*\)", text)
            if plain and value.dtype is torch.float32:
                start, size = self.rng.choice((0, 0, 2)), value.numel()
                if start + size <= 600:
                    shape = ", ".join(map(str, value.shape))
                    text = f"base[{start}:{start + size}].view({shape}) if k else {text}"
            found.append(text)
        return tuple(found)

    # -- statements -----------------------------------------------------------------------

    def _try(self) -> None:
        """Draw a line, run it, and keep it if eager takes it and its values are small."""
        shares, kinds = zip(*(NETWORK if self.network else ANYTHING))
        template = self.rng.choice(self.rng.choices(kinds, shares)[0])
        number = len(self.statements)
        try:
            filled = self._fill(template.replace("@", str(number)))
        except _NoOperand:
            return
        *setup, text = (part.strip() for part in filled.split(";;"))
        if text.startswith("= "):
            text = f"v{number} {text}"
        statement = Statement(text, tuple(setup))
        names = {**self.names, **self.values}
        try:
            for line in setup:
                exec(line, names)
            self.module.train(self.module.training)
            exec(text, names)
        except REFUSALS:
            return
        found = {n: v for n, v in names.items() if re.fullmatch(r"[vx]\d+", n)}
        if statement.target and not isinstance(found[statement.target], Tensor):
            return
        if any(v.numel() > _MOST_ELEMENTS or v.dim() > 5 for v in found.values()):
            return
        emptied = any(not v.numel() for n, v in found.items() if n not in self.values)
        if emptied and self.rng.random() < 0.7:
            return
        self.values = found
        self.statements.append(statement)

    def _pick(self, accepts: Callable[[Tensor], bool]) -> str:
        fitting = [name for name, value in self.values.items() if accepts(value)]
        if not fitting:
            raise _NoOperand
        if self.rng.random() < 0.5:
            fitting = fitting[-2:]
        return self.rng.choice(fitting)

    def _fill(self, template: str) -> str:
        """A template with everything in braces filled in."""
        setup, _, line = template.rpartition(";;")
        chosen: list[str] = []

        def fill(match: re.Match[str]) -> str:
            word = match[1]
            if word.isdigit():
                return chosen[int(word)]
            if word in _KINDS:
                chosen.append(self._pick(_KINDS[word]))
                return chosen[-1]
            if word in ("like", "same"):
                return self._beside(word, chosen[0])
            return self._property(word, self.values[chosen[0]] if chosen else None)

        # The line first: its values decide what the lines of __init__ say.
        line = re.sub(r"\{(\w+)\}", fill, line)
        setup = re.sub(r"\{(\w+)\}", fill, setup)
        return f"{setup};;{line}" if setup else line

    def _beside(self, word: str, first: str) -> str:
        """Another operand: ``like``, of a shape that broadcasts; ``same``, of shape and dtype."""
        value = self.values[first]

        def fits(other: Tensor) -> bool:
            if word == "same":
                return other.shape == value.shape and other.dtype == value.dtype
            try:
                torch.broadcast_shapes(other.shape, value.shape)
            except RuntimeError:
                return False
            return True

        return self._pick(fits)

    def _property(self, word: str, first: Tensor | None) -> str:
        """A constant, or a property of the first value."""
        rng = self.rng
        shape = list(first.shape) if first is not None else []
        rank = len(shape)
        axis = rng.randrange(rank) if rank else 0
        if word == "channels":
            return str(shape[1] if rank > 1 else 1)
        if word == "last":
            return str(shape[-1] if shape else 1)
        if word == "dim":
            return str(axis - rank if rank and rng.random() < 0.4 else axis)
        if word == "axis":
            return str(axis)
        if word == "narrow":
            length = rng.randint(0 if rng.random() < 0.1 else 1, max(1, shape[axis] if rank else 1))
            start = rng.randint(0, max(0, (shape[axis] if rank else 1) - length))
            return f"{axis}, {start}, {length}"
        if word == "perm":
            return ", ".join(map(str, rng.sample(range(rank), rank)))
        if word == "shape":
            return self._shape(shape)
        if word == "expand":
            grown = [rng.choice((2, 3)) if n == 1 else rng.choice((n, -1)) for n in shape]
            return ", ".join(map(str, [2, *grown] if rng.random() < 0.3 else grown)) or "2"
        if word == "repeat":
            return ", ".join(str(rng.choice((1, 1, 2))) for _ in range(max(1, rank)))
        if word == "index":
            parts = [rng.choice((":", ":", "0", "1:", ":1", "::2", "-1", ":-1")) for _ in shape]
            return ", ".join(parts[: rng.randint(1, max(1, rank))]) or "..."
        choices: dict[str, tuple[Any, ...]] = {
            "c": (0.5, -0.5, 1.5, 0, 2),
            "k": (1, 1, 2, 3),
            "n": (2, 3, 4, 5),
            "wide": (2, 4, 4, 6),
            "kernel": (1, 2, 3, 3),
            "pad": (0, 1, 1, 2),
            "flag": (True, False),
            "dtype": ("float64", "bfloat16", "int64", "int32", "int8", "bool", "float32"),
        }
        return str(rng.choice(choices[word]))

    def _shape(self, shape: list[int]) -> str:
        """Another shape of as many elements: two axes merged, one taken apart, or a ``-1``."""
        rng, new = self.rng, list(shape)
        if len(new) > 1 and rng.random() < 0.6:
            at = rng.randrange(len(new) - 1)
            new[at : at + 2] = [new[at] * new[at + 1]]
        else:
            at = rng.randrange(len(new)) if new else 0
            even = new and new[at] % 2 == 0 and new[at]
            new[at : at + 1] = [2, new[at] // 2] if even else [1, *new[at : at + 1]]
        if rng.random() < 0.3 and 0 not in new:
            new[rng.randrange(len(new))] = -1
        return ", ".join(map(str, new))

    def _results(self) -> str:
        """What the module returns: mostly what nothing reads, at times inputs, dicts, repeats."""
        rng = self.rng
        read = {name for s in self.statements for name in s.reads}
        unread = [n for n in self.values if n not in read and n.startswith("v")]
        names = unread or list(self.values)[-1:]
        others = [n for n in self.values if n not in names]
        if others and rng.random() < 0.4:
            names = [*names, *rng.sample(others, min(len(others), rng.randint(1, 2)))]
        if rng.random() < 0.1:
            names = [*names, names[0]]
        form = rng.random()
        if len(names) == 1 and form < 0.5:
            return names[0]
        if form < 0.15:
            return "{" + ", ".join(f"'r{i}': {n}" for i, n in enumerate(names)) + "}"
        if form < 0.25:
            return f"[{names[0]}, ({', '.join(names[1:])},)]" if names[1:] else f"[{names[0]}]"
        return f"({', '.join(names)},)"
