"""Packages that offer something by entry points: written down by hand, or installed by pip."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "plugin"


def offer(folder: Path, package: str, points: Mapping[str, Mapping[str, str]]) -> None:
    """Make a folder on ``sys.path`` say that a package of version 1.0 is installed in it.

    Args:
        points: group of entry points -> name -> ``"module:attribute"``.
    """
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = []
    for group, names in points.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in names.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def install_example(folder: Path) -> Path:
    """Install ``examples/plugin`` into a folder as a user would, without any network."""
    sources, target = folder / "sources", folder / "site"
    shutil.copytree(EXAMPLE, sources)  # building leaves files beside them
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--no-build-isolation", "--no-index"),
            *("--target", str(target), str(sources)),
        ],
        check=True,
        timeout=300,
    )
    return target
