"""Every test of the backend starts with nothing compiled and nothing warned of."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from torch_getfuse.backend import compiler
from torch_getfuse.backend.inner import compile_groups as inner
from torch_getfuse.backend.packed import fast


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Dynamo keeps compiled code, and the backend what it has warned of, for the whole process."""
    torch._dynamo.reset()
    compiler._warned.clear()
    inner._warned.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["packed", "live"])
def always(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The fast program wins whatever the clock says, on packed weights or where they lie."""
    monkeypatch.setattr(fast, "_times", lambda *_: (0.001, 0.002))
    live = request.param == "live"
    monkeypatch.setattr(fast, "_seen_faster", lambda *given: (given[3], given[4] if live else []))
