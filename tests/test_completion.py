"""What a shell offers after TAB, through argcomplete and a real bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from torch_getfuse.accelerator import ACCELERATORS
from torch_getfuse.cli import completers
from torch_getfuse.cli import main as cli
from torch_getfuse.models import import_torchvision

ROOT = Path(__file__).resolve().parents[1]

# -- what each argument offers ------------------------------------------------------------


def test_names_of_a_list_with_commas() -> None:
    complete = completers.name_list(["lbdf", "brr", "cascade"])
    assert complete("") == ["brr", "cascade", "lbdf"]
    assert complete("lbdf,b") == ["lbdf,brr"]
    assert complete("lbdf,brr,") == ["lbdf,brr,cascade"]


def test_files_by_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plan.json", "plan.txt", ".hidden.json"):
        Path(name).touch()
    Path("plans").mkdir()
    Path("plans", "one.json").touch()
    complete = completers.files(".json")
    assert complete("") == ["plan.json", "plans/"]
    assert complete("plans/") == ["plans/one.json"]
    assert complete(f"{tmp_path}/plan.") == [f"{tmp_path}/plan.json"]
    assert complete("no-such-folder/") == []


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.pt2").touch()
    assert completers.models("t") == ["timm:", "torchvision:", "transformers:", "tiny.pt2"]
    assert completers.models("my_module:") == []
    assert completers.accelerators("eyeriss") == ["eyeriss-v1", "eyeriss-v2"]
    assert completers.accelerators("") == sorted(ACCELERATORS)


def test_a_library_that_is_not_installed() -> None:
    assert completers.registered_models("no_such_library") == set()


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_models_of_torchvision_are_all_found() -> None:
    known = import_torchvision().models.list_models()
    assert completers.registered_models("torchvision") == set(known)
    assert completers.models("torchvision:mobilenet_v2") == ["torchvision:mobilenet_v2"]


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
def test_models_of_timm_are_all_found() -> None:
    import_torchvision()
    import timm

    assert completers.registered_models("timm") == set(timm.list_models())


# -- the scripts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shell", "told"),
    [
        ("bash", "-F _python_argcomplete torch-getfuse"),
        ("zsh", "#compdef torch-getfuse"),
        ("fish", "complete --command torch-getfuse"),
    ],
)
def test_scripts(capsys: pytest.CaptureFixture[str], shell: str, told: str) -> None:
    pytest.importorskip("argcomplete")
    assert cli.main(["completion", shell]) == 0
    assert told in capsys.readouterr().out


def test_another_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "tcsh"]) == 2
    assert "choose from" in capsys.readouterr().err


def test_without_argcomplete(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install 'torch-getfuse[completion]'" in capsys.readouterr().err


# -- after TAB ----------------------------------------------------------------------------

PROGRAM = """#!{python}
import os, sys
sys.path[:0] = {path!r}

def leave(code):
    heavy = sorted({{"numpy", "torch"}} & sys.modules.keys())
    if heavy:
        os.write(8, "\\v".join(heavy).encode())
    os.kill(os.getpid(), 9) if heavy else leave_now(code)

leave_now, os._exit = os._exit, leave
from torch_getfuse.cli.main import main
main()
"""
"""As the installed program, but kills itself where completing has imported something slow."""


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("torch-getfuse rep", ["report "]),
        ("torch-getfuse completion ", ["bash", "zsh", "fish"]),
        ("torch-getfuse report x:y --scheme c", ["cascade "]),
        ("torch-getfuse report x:y --accelerator eye", ["eyeriss-v1", "eyeriss-v2"]),
        ("torch-getfuse report x:y --residen", ["--residency "]),
        ("torch-getfuse run x:y --granul", []),
        ("torch-getfuse sweep x:y --schemes lbdf,b", ["lbdf,brr "]),
        ("torch-getfuse explain x:y --explainers sal", ["saliency "]),
        ("torch-getfuse bench plann", ["planning "]),
        # A colon parts words in bash: what stands before it stays.
        ("torch-getfuse report torchvision:mobilenet_v", ["mobilenet_v2", "mobilenet_v3_large"]),
    ],
)
def test_bash(tmp_path: Path, line: str, offered: list[str]) -> None:
    pytest.importorskip("argcomplete")
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    program = tmp_path / "torch-getfuse"
    path = [str(ROOT), *(entry for entry in sys.path if entry)]
    program.write_text(PROGRAM.format(python=sys.executable, path=path))
    program.chmod(0o755)
    # What readline does: words are split at COMP_WORDBREAKS, and the function fills COMPREPLY.
    typed = line.replace(":", " : ").split(" ")
    script = f"""
        eval "$(torch-getfuse completion bash)"
        COMP_LINE={line!r} COMP_POINT={len(line)} COMP_TYPE=9
        COMP_WORDS=({" ".join(repr(word) for word in typed)})
        COMP_CWORD={len(typed) - 1}
        _python_argcomplete torch-getfuse
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    run = subprocess.run(
        [bash, "--norc", "-c", script],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = run.stdout.strip("\n").split("\n")
    assert found[: len(offered)] == offered if offered else found == [""], run.stderr
