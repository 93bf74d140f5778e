"""The pages on extending: their code is the example's, or runs; their figures are counted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.plugin_package import EXAMPLE, ROOT

PAGES = sorted((ROOT / "docs" / "extending").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_on_the_pages(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that begins with a path is a part of that file; any other is run, in order."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.chdir(tmp_path)
    found = blocks(page, "python")
    assert found
    names: dict[str, object] = {}
    for block in found:
        head, _, rest = block.partition("\n")
        if head.startswith("# examples/"):
            assert rest in (ROOT / head[2:]).read_text(encoding="utf-8"), head
        else:
            exec(compile(block, str(page), "exec"), names)


def test_entry_points_on_the_pages_are_those_of_the_example() -> None:
    project = (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8")
    found = [block for page in PAGES for block in blocks(page, "toml")]
    assert found
    assert all(block.strip() in project for block in found)


def test_the_table_counts_the_lines_of_the_example() -> None:
    page = (ROOT / "docs" / "extending" / "README.md").read_text(encoding="utf-8")
    for what, name in (
        ("a cost model", "cost_model"),
        ("a search", "search"),
        ("an explainer", "explainer"),
    ):
        lines = (EXAMPLE / "getfuse_example" / f"{name}.py").read_text().count("\n")
        (row,) = re.findall(rf"^\| {what} \|.*\|$", page, re.M)
        assert row.endswith(f"| 0 | {lines} + 1 |")
