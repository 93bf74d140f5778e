"""The JSON of a plan file: its version is an integer, its keys are compared once."""

from __future__ import annotations

import pytest

from torch_getfuse.errors import PlanError
from torch_getfuse.json_fields import _unique_keys
from torch_getfuse.partition.plan import PartitionPlan


@pytest.mark.parametrize("version", [True, 1.0, 2.0, "2", None, [2]])
def test_a_version_that_is_no_integer_is_refused(version: object) -> None:
    with pytest.raises(PlanError, match="schema_version is"):
        PartitionPlan.from_dict({"schema_version": version})


class _Counted(str):
    """A key that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        type(self).compared += 1
        return str.__eq__(self, other)


def test_a_key_that_stands_twice_is_found_in_one_pass() -> None:
    names = [f"k{i}" for i in range(2000)]
    pairs = [(_Counted(name), 0) for name in [*names, names[-1]]]
    with pytest.raises(ValueError, match="'k1999' stands twice"):
        _unique_keys(pairs)
    assert _Counted.compared < 2 * len(pairs)
