"""What people install: built from the sources, put into an environment of its own, and used."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import torch_getfuse

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "torch_getfuse"
NOT_SHIPPED = {"__pycache__"}

BUILD = """
import sys
from setuptools import build_meta
print(build_meta.build_sdist(sys.argv[1]))
"""

USE = """
import torch, torch_getfuse
from torch_getfuse.explain.trained_weights import WEIGHTS
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
x = torch.randn(1, 3, 16, 16)
compiled = torch.compile(model.eval(), backend="getfuse", options={"cache": False})
with torch.no_grad():
    assert torch.equal(compiled(x), model(x))
assert torch_getfuse.report(compiled).sections
assert list(WEIGHTS.glob("*.safetensors"))
print(torch_getfuse.__version__, torch_getfuse.__file__)
"""


def run(*command: str, cwd: Path) -> str:
    # A checkout on PYTHONPATH would stand before what is installed.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=env, check=False, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built from what git knows: building leaves files beside sources."""
    folder = tmp_path_factory.mktemp("sdist")
    sources = folder / "sources"
    sources.mkdir()
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in names.splitlines():
        if (ROOT / name).is_file():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            (sources / name).write_bytes((ROOT / name).read_bytes())
    made = run(sys.executable, "-c", BUILD, str(folder), cwd=sources).splitlines()[-1]
    return folder / made


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel, built from the source distribution alone."""
    folder = sdist.parent / "wheel"
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check")
    how = ("--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, *how, "--wheel-dir", str(folder), str(sdist), cwd=sdist.parent)
    (made,) = folder.glob("*.whl")
    return made


def shipped() -> set[str]:
    """Every file of the package that is no cache."""
    return {
        file.relative_to(ROOT).as_posix()
        for file in PACKAGE.rglob("*")
        if file.is_file() and not NOT_SHIPPED.intersection(file.parts)
    }


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert inside == shipped()


def test_the_sdist_holds_every_file_of_the_package(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert shipped() | {"LICENSE", "README.md", "pyproject.toml"} <= inside


def test_it_works_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """torch and the other packages are those of the running environment; ours is the wheel."""
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    # A path in a .pth is searched after the environment's own, and its .pth files are not read:
    # an editable install there does not show.
    site = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip()
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(site) / "packages.pth").write_text("\n".join(sorted(packages)) + "\n", encoding="utf-8")
    version, where = run(python, "-c", USE, cwd=tmp_path).split()
    assert version == torch_getfuse.__version__
    assert Path(where).is_relative_to(tmp_path / "env")
    command = str(tmp_path / "env" / "bin" / "torch-getfuse")
    assert run(command, "--version", cwd=tmp_path).split() == ["torch-getfuse", version]


def test_the_citation_is_of_this_version() -> None:
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (version,) = (line.removeprefix("version: ") for line in lines if line.startswith("version:"))
    assert f'version = "{version}"' in project
