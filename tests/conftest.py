"""Settings of the whole test run."""

import os
import tempfile

import pytest

# Two threads on two busy cores wait for each other at every operator, which made whole-network
# tests forty times slower. Read by torch when it is first imported, so set before any test.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Plans that tests cache must neither come from nor go to the user's own folder.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="getfuse-test-cache-")


@pytest.fixture(autouse=True)
def fx_nodes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups run as FX nodes, to the last bit, unless a test is marked ``fast_program``.

    With ``inner="auto"`` the clock says which of two ways a graph runs, and they round differently.
    """
    if request.node.get_closest_marker("fast_program"):
        return
    from torch_getfuse.backend import compiler

    monkeypatch.setattr(
        compiler, "fast_program", lambda *_: (None, "inner auto: runs by FX nodes in tests")
    )


@pytest.fixture(autouse=True)
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits on searches count steps only: the clock would end them elsewhere on a busy machine.

    Tests of the clock itself replace it by one of their own.
    """
    from torch_getfuse.partition import work

    monkeypatch.setattr(work, "clock", lambda: 0.0)
