"""The optimum of every network, cost model and buffer, to the byte (``tests/make_goldens.py``)."""

from __future__ import annotations

import pytest

from tests.make_goldens import COMMAND, FOLDER, FORMS, KILOBYTES, golden, load
from tests.networks import SIZES, operator_graph
from torch_getfuse.options import CHOICES


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SIZES)
def test_optimum(name: str, form: str) -> None:
    wanted = load(name).get(form, {})
    for kilobytes in KILOBYTES:
        assert str(kilobytes) in wanted, (
            f"{name} has no golden for {form} at {kilobytes} KB: {COMMAND} {name}"
        )
        assert golden(operator_graph(name), form, kilobytes) == wanted[str(kilobytes)], (
            f"{name}, {form}, {kilobytes} KB; if the change is meant: {COMMAND} {name}"
        )


def test_every_cost_model_has_goldens() -> None:
    granularities = {"lbdf": CHOICES["granularity"]}
    for scheme in CHOICES["scheme"]:
        for granularity in granularities.get(str(scheme), ("line",)):
            assert (scheme, granularity) in FORMS.values(), (
                f"scheme {scheme!r}, granularity {granularity!r} has no goldens: add it to FORMS "
                f"in tests/make_goldens.py and run {COMMAND}"
            )


def test_no_golden_is_left_over() -> None:
    files = {path.stem for path in FOLDER.glob("*.json")}
    assert files == set(SIZES), f"run {COMMAND}, and delete what is no network"
    for name in files:
        assert load(name).keys() == FORMS.keys()
        assert all(table.keys() == set(map(str, KILOBYTES)) for table in load(name).values())
        assert all(
            type(number) is int
            for table in load(name).values()
            for figures in table.values()
            for number in figures.values()
        )
