"""What the package keeps for the whole process does not grow with the graphs that it plans."""

from __future__ import annotations

import gc
import importlib
import pkgutil
import weakref
from collections.abc import Sized
from random import Random
from types import ModuleType

import torch
from torch import nn

import torch_getfuse
from tests.graphs import random_graph
from torch_getfuse.backend.fx_nodes.per_target import PerTarget
from torch_getfuse.backend.fx_nodes.targets import resolve
from torch_getfuse.options import Options
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.planner import plan_graph


def modules() -> list[ModuleType]:
    """Every module of the package that can be imported without running it."""
    names = [m.name for m in pkgutil.walk_packages(torch_getfuse.__path__, "torch_getfuse.")]
    return [importlib.import_module(name) for name in names if not name.endswith("__main__")]


def kept() -> dict[str, int]:
    """Sizes of the caches and containers of all modules."""
    found: dict[str, int] = {}
    for module in modules():
        for name, value in vars(module).items():
            where = f"{module.__name__}.{name}"
            if name.startswith("__") or isinstance(value, (str, type, ModuleType)):
                continue
            if hasattr(value, "cache_info"):
                found[where] = value.cache_info().currsize
            elif isinstance(value, Sized | PerTarget) and not isinstance(value, torch.Tensor):
                found[where] = len(value)
    return found


def plan_some(rng: Random, count: int) -> None:
    for number in range(count):
        graph = random_graph(rng, rng.randint(6, 14), rng.choice((9, 14, 20)))
        for scheme, granularity in (("lbdf", "line"), ("lbdf", "pixel"), ("brr", "line")):
            options = Options(
                buffer=rng.choice((1, 2, 4)) * 1024,
                scheme=scheme,
                granularity=granularity,
                method=("exact", "auto")[number % 2],
                progress=False,
            )
            plan_graph(graph, options)


def test_planning_many_graphs_grows_nothing() -> None:
    rng = Random(7)
    modules()
    plan_some(rng, 2)
    before = kept()
    assert len(before) > 50
    plan_some(rng, 10)
    after = kept()
    grown = {name: (size, after[name]) for name, size in before.items() if after[name] > size}
    assert not grown


def test_a_cost_model_goes_with_its_graph() -> None:
    graph = random_graph(Random(8), 12, 14)
    scheme = Lbdf(graph)
    scheme.buffer((1 << len(graph)) - 1)
    model, edge = weakref.ref(scheme), weakref.ref(scheme._fans)
    del scheme
    gc.collect()
    assert model() is None
    assert edge() is None


def test_what_is_known_of_a_function_goes_with_it() -> None:
    """A closure may hold a model; names and functions of torch stay."""

    def make() -> tuple[weakref.ref[nn.Module], weakref.ref[object]]:
        model = nn.Linear(2, 2)

        def call(x: torch.Tensor) -> torch.Tensor:
            return model(x)  # type: ignore[no-any-return]

        assert not resolve(call).known
        return weakref.ref(model), weakref.ref(call)

    resolve("relu")
    resolve(torch.relu)
    before = len(resolve)
    references = make()
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert len(resolve) == before
    assert resolve(torch.relu) is resolve(torch.relu)
    assert resolve("relu") is resolve("relu")
