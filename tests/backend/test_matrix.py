"""The affordable part of the matrix of settings: outputs, gradients and buffers as eager's.

``tests/matrix.py`` says what the whole is and when a combination holds; ``make matrix`` runs it.
"""

from __future__ import annotations

import pytest
import torch
from matrix import AFFORDABLE, DTYPES, INNER, MODES, NETWORKS, PRODUCT, SHAPES, Combination, check

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
