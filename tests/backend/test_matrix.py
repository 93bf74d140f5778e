"""The affordable part of the matrix of settings: outputs, gradients and buffers as eager's.

``tests/matrix.py`` says what the whole is and when a combination holds; ``make matrix`` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matrix
import pytest
import torch
from matrix import AFFORDABLE, DTYPES, INNER, MODES, NETWORKS, PRODUCT, SHAPES, Combination, check
from torch import fx

import torch_getfuse


def test_the_affordable_part_has_every_value_of_every_network() -> None:
    assert len(PRODUCT) == len(set(PRODUCT)) == (11 * 3 - 1) * 2 * 2 * 2
    for values, field in ((MODES, "mode"), (DTYPES, "dtype"), (INNER, "inner"), (SHAPES, "shapes")):
        assert {getattr(c, field) for c in AFFORDABLE} == set(values)
    for name in NETWORKS:
        ours = [c for c in AFFORDABLE if c.network == name]
        assert {c.mode for c in ours} == set(MODES), name
        assert {c.dtype for c in ours} == set(DTYPES), name


@pytest.mark.slow
@pytest.mark.parametrize("combination", AFFORDABLE, ids=str)
def test_equal_to_eager(combination: Combination) -> None:
    result = check(combination)
    assert result["holds"], {kind: result[kind] for kind in ("outputs", "gradients", "buffers")}


@pytest.mark.parametrize(
    ("dtype", "nearby", "factor", "holds"),
    [
        ("bf16", 0, 1.0, True),
        ("bf16", 0, 1.1, False),
        ("bf16", matrix.NEARBY, 1.1, False),
        ("fp32", 0, 1.1, False),
    ],
)
def test_gradients_that_are_a_tenth_off_do_not_hold(
    monkeypatch: pytest.MonkeyPatch, dtype: str, nearby: int, factor: float, holds: bool
) -> None:
    """In bf16 as well, in which fifty layers round: else the matrix would hold whatever is run."""
    scaled = 0

    def inner(gm: fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., object]:
        nonlocal scaled
        # Those with which the backward begins; a batch norm would take a factor out of the forward.
        first = any(node.name == "tangents_1" for node in gm.graph.find_nodes(op="placeholder"))
        scaled += first
        scale = factor if first else 1.0
        return lambda *args: tuple(
            value * scale
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for value in gm(*args)
        )

    monkeypatch.setitem(matrix.OPTIONS["inductor"], "inner", inner)
    c = Combination("mobilenet_v2", "train", "static", dtype, "inductor")
    result = matrix.compare(c, dtype, nearby)
    assert scaled
    assert result["holds"] is holds
    assert result["outputs"]["equal"]


@pytest.mark.parametrize(
    ("dtype", "inner", "second"),
    [("fp32", "inductor", "double"), ("bf16", "inductor", "nearby"), ("bf16", "eager", None)],
)
@pytest.mark.parametrize("settles", [True, False])
def test_what_differs_by_rounding_is_compared_once_more(
    monkeypatch: pytest.MonkeyPatch, dtype: str, inner: str, second: str | None, settles: bool
) -> None:
    calls: list[tuple[str, int]] = []

    def compare(c: Combination, dtype: str, nearby: int = 0) -> dict[str, object]:
        calls.append((dtype, nearby))
        return {"holds": settles and len(calls) == 2, "groups": len(calls)}

    monkeypatch.setattr(matrix, "compare", compare)
    result = check(Combination("small", "train", "static", dtype, inner))
    assert result["groups"] == 1
    if second is None:
        assert calls == [(dtype, 0)]
        assert result["holds"] is False
    else:
        assert calls[1] == (("double", 0) if second == "double" else ("bf16", matrix.NEARBY))
        assert result["holds"] is settles
        assert result[second] == {"groups": 2}


@pytest.mark.slow
def test_inductor_inside_on_mobilenet_v2() -> None:
    """One group at a time through inductor takes about a minute; small maps, inference only."""
    from matrix import build

    model = build("mobilenet_v2").eval()
    options = {"strict": True, "inner": "inductor", "buffer": "8MB"}
    compiled = torch.compile(model, backend="getfuse", options=options)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)
    (section,) = torch_getfuse.report(compiled).sections
    assert any("groups compiled in" in note for note in section.notes)
