"""The fuzzer finds faults that are put in on purpose, and the shrinker makes them short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from fuzz.check import CHANGES, MODES, Failure, check, weight_change
from fuzz.generate import generate
from fuzz.observe import ROUNDINGS, NudgedSums, Observation, difference, observe
from fuzz.program import Program, Statement, runs
from fuzz.reproduce import reproducer
from fuzz.shrink import shrink
from fuzz.surroundings import quietly
from torch_getfuse.backend import compiler
from torch_getfuse.backend.packed import fast
from torch_getfuse.backend.split import submodules
from torch_getfuse.reporting.section import Section

pytestmark = pytest.mark.fast_program


def program(*lines: str, setup: tuple[str, ...] = (), buffer: str = "256") -> Program:
    """A program written by hand; the last line is what it returns."""
    first, *rest = lines[:-1]
    statements = (Statement(first, setup), *map(Statement, rest))
    return Program(0, ("data(k, 1, 4, 6, 6)",), statements, lines[-1], buffer=buffer)


#: Reads on both sides of a write.
ORDERED = program(
    "v0 = x0.sum(2)",
    "v1 = torch.sigmoid(v0)",
    "x0.mul_(2)",
    "v2 = x0.sum(3)",
    "v3 = v1 + F.relu(v2)",
    "(v3, v1)",
)

CONVOLUTION = program(
    "v0 = self.m0(x0)",
    "v1 = F.relu(v0)",
    "(v1,)",
    setup=("self.m0 = nn.Conv2d(4, 4, 3, padding=1)",),
)


def failures(of: Program, way: str) -> list[Failure]:
    with quietly():
        return check(of, [way]).failures


def edited(change: Callable[[fx.Graph], None]) -> Callable[..., Any]:
    """A stand-in for the compiler's last step: the graph as traced, but for ``change``."""

    def compile_graph(
        capture: Any, plan: Any, options: Any, record: Any, *_: Any
    ) -> Callable[..., Any]:
        record.sections.append(Section(plan))
        graph = fx.Graph()
        graph.output(graph.graph_copy(capture.graph_module.graph, {}))
        change(graph)
        forward: Callable[..., Any] = fx.GraphModule(capture.graph_module, graph).forward
        return forward

    return compile_graph


def write_first(graph: fx.Graph) -> None:
    first = next(node for node in graph.nodes if node.op == "call_method")
    for node in [node for node in graph.nodes if node.target == "mul_"]:
        first.prepend(node)


def drop_write(graph: fx.Graph) -> None:
    for node in [node for node in graph.nodes if node.target == "mul_"]:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)


def nothing(graph: fx.Graph) -> None:
    pass


@pytest.mark.parametrize("way", ["eager", "depth_first", "torch.compile"])
def test_sound(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """The stand-in itself makes no fault."""
    monkeypatch.setattr(compiler, "_compile", edited(nothing))
    assert not failures(ORDERED, way)


@pytest.mark.parametrize("way", ["eager", "depth_first", "torch.compile"])
@pytest.mark.parametrize("fault", [write_first, drop_write])
def test_a_write_that_moves_or_is_dropped(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[fx.Graph], None], way: str
) -> None:
    monkeypatch.setattr(compiler, "_compile", edited(fault))
    # The plan of a way that is none of the compiled ones comes from inner eager, which is held too.
    first = [] if way in MODES else ["eager: values"]
    assert [f.kind for f in failures(ORDERED, way)] == [*first, f"{way}: values"]


def test_order_by_data_edges_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """About one program in 60 runs in another order."""

    def data_only(gm: fx.GraphModule, nodes: Sequence[fx.Node], *_: Any) -> list[set[int]]:
        index = {node: i for i, node in enumerate(nodes)}
        return [{index[s] for s in node.all_input_nodes if s in index} for node in nodes]

    monkeypatch.setattr(submodules, "order_edges", data_only)
    assert any(failures(generate(seed), "eager") for seed in range(200, 500))


@pytest.mark.parametrize("change", CHANGES)
def test_stale_weights(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """A fast program that keeps the weights of the first call, however they are changed."""

    def stale(gm: fx.GraphModule, inputs: Sequence[Any], *_: Any) -> tuple[Any, str]:
        kept = [v.detach().clone() if isinstance(v, nn.Parameter) else None for v in inputs]

        def run(*args: Any) -> Any:
            return gm.forward(*(a if k is None else k for a, k in zip(args, kept, strict=True)))

        return run, "stale"

    seed = next(s for s in range(1000) if weight_change(s) == change)
    failing = replace(CONVOLUTION, seed=seed)
    assert not failures(failing, "auto")
    monkeypatch.setattr(compiler, "fast_program", stale)
    expected = [] if change == "none" else ["auto: values"]
    assert [f.kind for f in failures(failing, "auto")] == expected


def test_shrinking(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    long = program(
        "v0 = F.relu(x0)",
        "v1 = v0.permute(0, 2, 3, 1)",
        "v2 = x0.view(-1)",
        "v2.mul_(3)",
        "v4 = torch.cat([x0, x0], 1)",
        "v5 = v1.sum()",
        "v6 = v4 * v5",
        "(v6, v0, x0)",
    )
    monkeypatch.setattr(compiler, "_compile", edited(drop_write))
    monkeypatch.setattr(fast, "_times", fast._times)  # the reproducer sets it
    (failure,) = failures(long, "eager")
    short, again = shrink(long, failure)
    assert again.kind == failure.kind
    assert len(short.statements) <= 2
    assert failures(short, "eager")
    with pytest.raises(SystemExit):
        exec(reproducer(short, again), {})
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("seed", [0, 1])  # exported by a strict trace, and by none
def test_what_a_strict_export_says_of_an_input_is_torch_s_own(seed: int) -> None:
    turned = program("v0 = x0.mul_(2)", "v0.transpose_(1, 3)", "v2 = x0.sum(1)", "(v2, x0)")
    with quietly():
        found = check(replace(turned, seed=seed), ["export"])
    assert not found.failures
    assert ("export" in found.checked) == (seed == 1)


@pytest.mark.parametrize("seed", range(20))
def test_a_program_is_a_function_of_its_seed(seed: int) -> None:
    first = generate(seed)
    torch.manual_seed(seed + 1)
    assert generate(seed) == first
    assert runs(first)
    compile(first.source, "program", "exec")


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("exact", [True, False])
def test_one_value_that_differs_is_seen(dtype: torch.dtype, exact: bool) -> None:
    def seen(last: float) -> Observation:
        value = torch.tensor([1.0, float(last > 0), last]).to(dtype)
        return observe(lambda: value, nn.Module(), ())

    assert not difference(seen(2.0), seen(2.0), exact=exact)
    assert "3" in difference(seen(2.0), seen(3.0), exact=exact)


def test_which_of_equal_sums_comes_first_is_a_rounding() -> None:
    def seen(order: int, factor: float) -> Observation:
        x = torch.ones(4, 8)
        ranks = (x @ x.T).sort(-1).indices
        return observe(
            lambda: (ranks.flip(-1) if order < 0 else ranks, x * factor), nn.Module(), ()
        )

    def near() -> list[Observation]:
        found = []
        for way in ROUNDINGS:
            with NudgedSums(way):
                found.append(seen(1, 1.0))
        return found

    right = seen(1, 1.0)
    assert "result 0" in difference(right, seen(-1, 1.0), exact=False)
    assert not difference(right, seen(-1, 1.0), exact=False, unsure=near)
    assert "result 1" in difference(right, seen(-1, 1.01), exact=False, unsure=near)
