"""What the figures of a run depend on, as digests: code, weights, libraries."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

from torch_getfuse.explain.trained_weights import weights_path

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch_getfuse", "benchmarks")


@cache
def code_digest(*modules: str) -> str:
    """A digest of modules and all that they import from this repository.

    Comments, docstrings and the layout of the code do not count, so that a row is not run again
    for a better sentence.
    """
    digest = hashlib.sha256()
    for name in sorted(closure(modules)):
        digest.update(name.encode())
        digest.update(ast.dump(_bare(name)).encode())
    return digest.hexdigest()[:16]


@cache
def function_digest(module: str, name: str) -> str:
    """A digest of one function of a module and of the module's constants that it names."""
    body = _bare(module).body
    function = next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == name)
    named = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    constants = [
        node
        for node in body
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id in named for target in node.targets)
    ]
    text = "".join(map(ast.dump, (function, *constants)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def closure(modules: Iterable[str]) -> set[str]:
    """The modules and everything that they import, directly or not, from this repository."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _imports(name)
    return found


@cache
def weights_digest(scheme: str, granularity: str, *models: str) -> str:
    """A digest of shipped weights: ``"validity"``, ``"pg"``, ``"rg"`` of one cost model."""
    digest = hashlib.sha256()
    for model in models:
        digest.update(weights_path(model, scheme, granularity).read_bytes())
    return digest.hexdigest()[:16]


def versions(*libraries: str) -> str:
    """``"torch 2.13.0, pymoo 0.6.1"``."""
    return ", ".join(f"{name} {version(name)}" for name in libraries)


def _file(name: str) -> Path | None:
    """The file of a module of this repository; packages count as their modules do."""
    path = ROOT / name.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)


@cache
def tree(name: str) -> ast.Module:
    """The syntax tree of a module of this repository."""
    path = _file(name)
    if path is None:
        raise ValueError(f"no module {name!r} below {ROOT.name}/: correct the list of modules")
    return ast.parse(path.read_text(encoding="utf-8"))


def _bare(name: str) -> ast.Module:
    """A module without docstrings."""
    found = ast.parse(ast.unparse(tree(name)))
    for node in ast.walk(found):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node, clean=False
        ):
            del node.body[0]
    return found


def _imports(name: str) -> Iterator[str]:
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for full in names:
            if full.partition(".")[0] in _PACKAGES and _file(full) is not None:
                yield full
