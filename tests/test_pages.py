"""Code on the pages of docs/ runs, in order, as a reader would run it, and prints what is shown."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_getfuse
from torch_getfuse.models import import_torchvision

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*) -->\n\n?)?^```python\n(?P<code>.*?)^```$"
    r"(?:\n\n```text\n(?P<shown>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
PAGES = {
    page.relative_to(ROOT).as_posix(): list(BLOCK.finditer(page.read_text(encoding="utf-8")))
    for page in sorted((ROOT / "docs").glob("*.md"))
}
NOT_RUN = {"docs/sweep.md": 2, "docs/referee.md": 1}
"""Blocks that need a cluster, or files of other tools: test_sweep.py and test_importers.py."""


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, blocks in PAGES.items() if blocks])
def test_code_runs_and_prints_what_is_shown(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``<!-- needs: NAME -->`` above a block: it runs where that package is installed."""
    monkeypatch.chdir(tmp_path)
    import_torchvision()  # transformers and timm import it, and it may be of another torch build
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    names = {"torch": torch, "torch_getfuse": torch_getfuse}
    names.update(model=model, x=torch.randn(1, 3, 16, 16))
    skipped = 0
    for block in PAGES[page]:
        note = block["note"] or ""
        if note.startswith("not run: "):
            skipped += 1
            continue
        if note.startswith("needs: ") and not importlib.util.find_spec(note[len("needs: ") :]):
            continue
        exec(compile(block["code"], page, "exec"), names)
        printed = capsys.readouterr().out
        if block["shown"] is not None:
            assert printed == block["shown"]
    assert skipped == NOT_RUN.get(page, 0)
