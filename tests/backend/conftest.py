"""Every test of the backend starts with nothing compiled and nothing warned of."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from torch_getfuse.backend import compiler
from torch_getfuse.backend.inner import compile_groups as inner


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Dynamo keeps compiled code, and the backend what it has warned of, for the whole process."""
    torch._dynamo.reset()
    compiler._warned.clear()
    inner._warned.clear()
    yield
    torch._dynamo.reset()
