"""Versions of torch: what is said of those that were not tried, and what older ones lack."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_getfuse
from torch_getfuse.backend import compiler, torch_versions
from torch_getfuse.backend.torch_versions import (
    FEATURES,
    TRIED,
    Feature,
    UntriedTorchWarning,
    warn_if_untried,
)

ROOT = Path(torch_getfuse.__file__).parents[1]


@pytest.fixture
def as_version(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing was said yet in this process."""
    monkeypatch.setattr(torch_versions, "_told", set())
    return monkeypatch


@pytest.mark.parametrize(
    ("version", "age"), [("2.99.0+cpu", "newer"), ("3.0.0a0+git12ab", "newer"), ("2.8.1", "older")]
)
def test_an_untried_version_is_used_with_one_warning(
    version: str, age: str, as_version: pytest.MonkeyPatch
) -> None:
    as_version.setattr(torch, "__version__", version)
    model, x = nn.Conv2d(3, 4, 3).eval(), torch.rand(1, 3, 8, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = torch_getfuse.plan(model, (x,), cache=False)
        compiled = torch.compile(model, backend="getfuse", options={"strict": True, "cache": False})
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))
    assert len(plan.groups) == 1
    texts = [str(one.message) for one in caught if one.category is UntriedTorchWarning]
    assert len(texts) == 1
    for part in (version, age, f"{TRIED[0]} to {TRIED[-1]}", "pip install"):
        assert part in texts[0]


@pytest.mark.parametrize("version", [*TRIED, "2.10", "2.12"])
def test_tried_versions_and_those_in_between_say_nothing(
    version: str, as_version: pytest.MonkeyPatch
) -> None:
    as_version.setattr(torch, "__version__", f"{version}.1+cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untried()


def test_a_feature_says_from_which_version_on_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    feature = Feature("this test", "2.11", "torch.nothing is not there", "it is skipped")
    versions = {"2.9.1": True, "2.10.0+cpu": True, "2.11.0": False, "3.0": False}
    for version, lacks in versions.items():
        monkeypatch.setattr(torch, "__version__", version)
        assert bool(feature.missing()) == lacks
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert feature.missing() == (
        "this test needs torch 2.11 or newer, this is 2.9.1: torch.nothing is not there; "
        "it is skipped"
    )


@pytest.mark.parametrize(("version", "lacks"), [("2.9.1", True), ("2.14.1", False)])
def test_a_report_notes_what_the_version_lacks(
    version: str, lacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(compiler, "compile_children", lambda *_: [])  # inductor takes a minute
    model, x = nn.Conv2d(3, 4, 3).eval(), torch.rand(1, 3, 8, 8)
    options = {"inner": "inductor", "strict": True, "cache": False}
    compiled = torch.compile(model, backend="getfuse", dynamic=True, options=options)
    with torch.no_grad():
        compiled(x)
    (section,) = torch_getfuse.report(compiled).sections
    note = "needs torch 2.13 or newer, this is 2.9.1"
    assert any(note in text for text in section.notes) == lacks


def test_what_is_tried_is_what_may_be_installed() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bounds = re.findall(r'"torch(?=[<>=!~])([^"]*)"', project)
    assert set(bounds) == {f">={TRIED[0]}"}


def test_ci_runs_what_was_tried() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    versions = re.findall(r'torch: "([0-9.]+)"', workflow)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (usual,) = re.findall(r"^TORCH := 'torch>=([0-9.]+),", makefile, re.M)
    minors = [version.rpartition(".")[0] for version in versions]
    assert sorted([*minors, usual]) == sorted(TRIED)


def test_the_page_has_what_versions_lack() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    for version in TRIED:
        assert f"| {version}." in page, f"docs/compatibility.md has no row for torch {version}"
    for feature in FEATURES.values():
        assert feature.name in page
        assert feature.since in TRIED
