"""Torch's own samples of its operators, each between two elementwise operators, hold.

Every operator of ``op_db`` with its first samples in float32 and in one integer dtype: inner eager
equals eager to the last bit, inner depth_first to rounding, and the plan verifies. What Dynamo
itself does not compile, or compiles to something else, is found by asking ``backend="eager"``.
``make opinfo`` takes every sample, the tests one in :data:`EVERY` operators in a fixed draw.
"""

from __future__ import annotations

import copy
import itertools
import os
import types
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fuzz.check import check_case
from fuzz.program import Case
from fuzz.surroundings import quietly
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

pytestmark = pytest.mark.opinfo

WHOLE = os.environ.get("GETFUSE_OPINFO") == "all"
EVERY = 1 if WHOLE else 2
SAMPLES = 10 if WHOLE else 2
BLOCK = 20
WAYS = ("eager", "depth_first")

KNOWN: dict[str, str] = {}
"""Full name of an operator -> why it does not hold yet; it must fail."""


def full_name(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


# By a hash of the name, so that operators new to torch move none of the others.
CHOSEN = sorted(
    (op for op in op_db if zlib.crc32(full_name(op).encode()) % EVERY == 0), key=full_name
)


def dtypes(op: Any) -> list[torch.dtype]:
    supported = op.supported_dtypes("cpu")
    integers = (d for d in (torch.int64, torch.int32, torch.int8) if d in supported)
    return [*({torch.float32} & supported), *itertools.islice(integers, 1)]


def programs(op: Any, dtype: torch.dtype) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Functions of the tensors of a sample: elementwise, the operator, elementwise."""
    torch.manual_seed(0)
    for sample in itertools.islice(op.sample_inputs("cpu", dtype), SAMPLES):
        leaves, form = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

        def run(*tensors: Any, leaves: Any = leaves, form: Any = form, places: Any = places) -> Any:
            given = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                # Keeps the values that the operator asks for (positive, ordered, invertible).
                given[place] = tensor if tensor.dtype is torch.bool else tensor * 1
            args, kwargs = pytree.tree_unflatten(given, form)
            found = op.op(*args, **kwargs)
            return pytree.tree_map_only(torch.Tensor, lambda t: t + 1, found)

        yield run, tuple(leaves[i] for i in places)


class Wrapped(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        # Code of its own: Dynamo would take another operator for a recompile of this one.
        self.run = types.FunctionType(
            run.__code__.replace(), run.__globals__, run.__name__, run.__defaults__, run.__closure__
        )
        self.run.__kwdefaults__ = run.__kwdefaults__

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.run(*tensors)


def case_of(run: Callable[..., Any], tensors: tuple[Any, ...]) -> Case:
    def inputs(k: int) -> tuple[Any, ...]:
        return tuple(copy.deepcopy(tensor.detach()) for tensor in tensors)

    return Case(lambda: Wrapped(run), inputs)


@pytest.mark.parametrize("start", range(0, len(CHOSEN), BLOCK))
def test_samples_hold(start: int) -> None:
    wrong, checked = [], 0
    with quietly(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in CHOSEN[start : start + BLOCK]:
            torch._dynamo.reset()
            failures = []
            for dtype in dtypes(op):
                for number, (run, tensors) in enumerate(programs(op, dtype)):
                    verdict = check_case(case_of(run, tensors), ways=WAYS)
                    checked += not verdict.skipped
                    failures += [
                        f"{full_name(op)} {dtype} sample {number}: {f.mode}: {f.message}"
                        for f in verdict.failures
                    ]
            if full_name(op) in KNOWN:
                assert failures, f"{full_name(op)} holds now: take it off the list"
            else:
                wrong += failures
    assert not wrong, "\n".join(wrong)
    assert checked, "torch itself compiles none of these"
