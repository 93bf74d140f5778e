"""Settings of the whole test run."""

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

# Two threads on two busy cores wait for each other at every operator, which made whole-network
# tests forty times slower. Read by torch when it is first imported, so set before any test.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Printed text has a width and colours of its own on every machine.
for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
    os.environ.pop(name, None)

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
def guards_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo times its guards for a log, after it has flushed the processor's caches: 50 ms."""
    if module := sys.modules.get("torch._dynamo.guards"):  # in the second test that compiles
        monkeypatch.setattr(module, "profile_guard_manager", lambda *_: 0.0, raising=False)


@pytest.fixture(autouse=True)
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits on searches count steps only: the clock would end them elsewhere on a busy machine.

    Tests of the clock itself replace it by one of their own.
    """
    from torch_getfuse.partition import work

    monkeypatch.setattr(work, "clock", lambda: 0.0)


# -- tiers: what was measured says which tests are quick -------------------------------------------

DURATIONS = Path(__file__).with_name("durations.json")
"""Test -> seconds, of the tests that took at least :data:`LEAST` (``make durations``)."""
LEAST, SLOW = 0.5, 4.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--store-durations", action="store_true", help=f"write {DURATIONS.name} after the run"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the seconds that they were recorded with; a new test took none.

    ``quick`` leaves out the folders whose tests compile or train, however short each is. A test
    that needs what the installed torch lacks is skipped, in the words of the table that says so.
    """
    seconds = json.loads(DURATIONS.read_text(encoding="utf-8"))
    for item in items:
        for marker in item.iter_markers("needs_torch"):
            from torch_getfuse.backend.torch_versions import FEATURES

            if lacks := FEATURES[marker.args[0]].missing():
                item.add_marker(pytest.mark.skip(reason=lacks))
        took = seconds.get(item.nodeid.removeprefix("tests/"), 0.0)
        if took > SLOW:
            item.add_marker("slow")
        compiles = item.nodeid.removeprefix("tests/").startswith(("backend/", "fuzz/", "explain/"))
        if took < LEAST and not compiles and not item.get_closest_marker("slow"):
            item.add_marker("quick")


_took: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _took[report.nodeid.removeprefix("tests/")] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--store-durations") and not hasattr(session.config, "workerinput"):
        known = {name: round(took, 1) for name, took in _took.items() if took >= LEAST}
        DURATIONS.write_text(json.dumps(known, indent=0, sort_keys=True) + "\n", encoding="utf-8")
