"""What the pages say of files, links and keys is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_getfuse

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]  # it tells of former files
SOURCES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("torch_getfuse", "tests", "benchmarks", "examples", "docs")
    for path in (ROOT / folder).rglob("*")
]


def in_repository(name: str) -> bool:
    return (ROOT / name).exists() or any(
        source == name or source.endswith("/" + name) for source in SOURCES
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_name_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w./-])((?:[\w-]+/)*\w+\.(?:py|md|jsonl))(?![\w(])", text))
    mine = {name for name in named if name.endswith((".py", ".md")) or name.startswith("docs/")}
    assert not {name for name in mine if not in_repository(name)} - NOT_OURS


NOT_OURS = {"method.py", "model.py"}
"""Files of a reader's own that examples mention."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_sources_cite_pages_that_exist() -> None:
    for path in (ROOT / "torch_getfuse").rglob("*.py"):
        for cited in re.findall(r"[\w/-]+\.md\b", path.read_text(encoding="utf-8")):
            assert in_repository(cited), f"{path.relative_to(ROOT)} cites {cited}"


@pytest.mark.parametrize("name", sorted(torch_getfuse.__all__))
def test_the_reference_has_every_exported_name(name: str) -> None:
    page = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    value = getattr(torch_getfuse, name)
    if name == "__version__":
        assert f"`torch_getfuse.{name}`" in page
        return
    home = value.__module__
    written = home if home == "torch_getfuse.errors" else f"{home}.{name}"
    assert f"\n::: {written}\n" in page


def test_the_plan_file_page_knows_every_key() -> None:
    page = (ROOT / "docs/plan-file.md").read_text(encoding="utf-8")
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    plan = torch_getfuse.plan(model, (torch.rand(1, 3, 8, 8),), buffer="64KB", cache=False)
    form = plan.to_dict()
    graph = form["graph"]
    keys = {*form, *graph, *graph["ops"][0], *form["groups"][0], *form["stages"][0]}
    assert not {key for key in keys if f'"{key}"' not in page and f"`{key}`" not in page}
