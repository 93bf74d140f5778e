"""The pages as a site: built strictly, so that no link leads nowhere and every name resolves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'href="examples/quickstart.html"' in home
    reference = (tmp_path / "reference.html").read_text(encoding="utf-8")
    for name in ("torch_getfuse.api.plan", "torch_getfuse.options.Options", "torch_getfuse.errors"):
        assert f'id="{name}' in reference
