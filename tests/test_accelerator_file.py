"""Presets of a TOML file: what is read, and one clear line for everything that is wrong with it."""

from __future__ import annotations

import json
import os
import pickle
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import torch_getfuse
from torch_getfuse.accelerator import ACCELERATORS, Accelerator
from torch_getfuse.accelerator_file import KEYS, find_accelerator, load_accelerators
from torch_getfuse.backend.plan_cache import cache_key
from torch_getfuse.cli import main as cli
from torch_getfuse.errors import OptionError
from torch_getfuse.options import Options

PAGE = Path(__file__).parents[1] / "docs" / "accelerators.md"
NPU = '[npu]\nbuffer = "2KB"\nactivation_bytes = 1\nweight_bytes = 0.5\n'
MODEL = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 3)).eval()
X = torch.zeros(1, 3, 8, 8)


@pytest.fixture
def chips(tmp_path: Path) -> Path:
    path = tmp_path / "chips.toml"
    path.write_text(NPU)
    return path


def test_the_example_of_the_page_is_read_as_it_says(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    path = tmp_path / "chips.toml"
    path.write_text(example)
    npu, large = load_accelerators(str(path)).values()
    assert npu == Accelerator(
        "npu",
        393216,
        1,
        0.5,
        "data sheet, section 4; DRAM: Horowitz, ISSCC 2014",
        16,
        3.2e9,
        162.5,
        256e9,
    )
    assert set(KEYS) == set(re.findall(r"^(\w+) =", example, re.MULTILINE))
    assert large == Accelerator("npu-large", 1 << 20, 1, 1)
    assert find_accelerator(f"{path}:npu-large") == large


def test_the_only_preset_of_a_file_needs_no_name(chips: Path) -> None:
    wanted = Accelerator("npu", 2048, 1, 0.5)
    assert find_accelerator(str(chips)) == find_accelerator(f"{chips}:npu") == wanted
    options = Options(accelerator=str(chips), weight_bytes=1)
    assert (options.buffer_bytes, options.activation_bytes, options.weight_bytes) == (2048, 1, 1)


def test_names_with_colons_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "Many:chips.TOML"
    path.write_text(NPU.replace("npu", '"a:b.toml"') + NPU.replace("npu", '"c d"'))
    assert find_accelerator(f"{path}:a:b.toml").name == "a:b.toml"
    assert find_accelerator(f"{path}:c d").name == "c d"


def test_presets_of_the_package_are_found_as_before() -> None:
    assert find_accelerator("eyeriss-v1") is ACCELERATORS["eyeriss-v1"]
    with pytest.raises(OptionError, match="did you mean 'eyeriss-v1'"):
        find_accelerator("eyeris-v1")


def test_a_file_is_read_once(chips: Path) -> None:
    """Copies of the options, also those in worker processes, need the file no more."""
    options = Options(accelerator=str(chips))
    chips.unlink()
    assert options.accelerator == Accelerator("npu", 2048, 1, 0.5)
    assert pickle.loads(pickle.dumps(options)) == options
    assert replace(options, seed=1).accelerator == options.accelerator


def test_plans_and_their_cache_go_by_the_figures(chips: Path) -> None:
    """Not by the name of the file, which may say something else tomorrow."""
    figures = Options(buffer=2048, activation_bytes=1, weight_bytes=0.5)
    options = Options(accelerator=str(chips))
    plan = torch_getfuse.plan(MODEL, (X,), accelerator=str(chips))
    assert (plan.buffer_bytes, plan.activation_bytes, plan.weight_bytes) == (2048, 1, 0.5)
    assert cache_key(plan.graph, options) == cache_key(plan.graph, figures)
    chips.write_text(NPU.replace("0.5", "4"))
    wider = Options(accelerator=str(chips))
    assert cache_key(plan.graph, wider) != cache_key(plan.graph, options)
    other = torch_getfuse.plan(MODEL, (X,), accelerator=str(chips))
    assert other.dram_bytes > plan.dram_bytes


def test_sweeps_take_a_file(chips: Path) -> None:
    (record,) = torch_getfuse.sweep(MODEL, (X,), accelerator=f"{chips}:npu", n_jobs=1).records
    assert (record["buffer_bytes"], record["weight_bytes"]) == (2048, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"chips.toml' has no preset; write one: a line \[name\], then buffer"),
        ("[npu\n", r"chips.toml' is no TOML: .*line 1"),
        (NPU + NPU, r"is no TOML: .*line 5"),
        ("buffer = 3\n", "'buffer' = 3 stands outside a preset"),
        ("[[npu]]\nbuffer = 3\n", "'npu' = a list of 1 stands outside a preset"),
        ("[npu]\n", "preset 'npu' has no 'buffer'; needed are buffer, activation_bytes, weight"),
        (NPU.replace("weight_bytes = 0.5", ""), "preset 'npu' has no 'weight_bytes'"),
        (NPU + "[npu.inner]\n", "preset 'npu': unknown key 'inner' = an object of 0"),
        (NPU + "macs_per_secnd = 3\n", "'macs_per_secnd' = 3; did you mean 'macs_per_second'"),
        (NPU + "name = 'x'\n", "unknown key 'name' = 'x'; known: buffer,"),
        (NPU.replace('"2KB"', '"2XB"'), "preset 'npu': buffer='2XB' is no size"),
        (NPU.replace('"2KB"', "2.5"), "preset 'npu': buffer=2.5 is no size"),
        (NPU.replace('"2KB"', "0"), "preset 'npu': buffer=0 is no size"),
        (NPU.replace('"2KB"', "0x" + "f" * 9000), "buffer = an integer of 36000 bits is no size"),
        (NPU.replace('"2KB"', f'"{"9" * 400}"'), r"buffer = '9+\.\.\. is no size"),
        (NPU.replace('"2KB"', f'"{"9" * 40}"'), f"buffer='{'9' * 40}' is no size: it is above"),
        (NPU.replace('"2KB"', "9" * 5000), "is no TOML"),
        (NPU.replace('"2KB"', "[1]"), r"buffer = a list of 1 is no size"),
        (NPU.replace("0.5", "0.3"), "chips.toml'.*'npu': weight_bytes=0.3 is not a multiple of"),
        (NPU.replace("0.5", "true"), "'npu': weight_bytes=True is not a multiple of"),
        (NPU.replace("0.5", "nan"), "'npu': weight_bytes=nan is not a multiple of"),
        (NPU.replace("es = 1\n", "es = 0\n"), "'npu': activation_bytes=0 is not a multiple of"),
        (NPU + "align_channels = 16.0\n", "'npu': align_channels=16.0 is not a whole number"),
        (NPU + "macs_per_second = '3'\n", "'npu': macs_per_second='3' is not a finite number"),
        (NPU + "dram_bytes_per_second = inf\n", "dram_bytes_per_second=inf is not a finite"),
        (NPU + "dram_bytes_per_second = 0\n", "dram_bytes_per_second=0 is not a finite"),
        (NPU + f"macs_per_second = {'9' * 400}\n", "macs_per_second = an integer of 1329 bits is"),
        (NPU + "macs_per_second = 2026-01-01\n", "macs_per_second = datetime.* is no number that"),
        (NPU + f"{'k' * 9000} = 3\n", r"unknown key 'k+\.\.\. = 3; known: buffer"),
        (NPU + "source = 3\n", "preset 'npu': source = 3 is no text on one line"),
        (NPU + 'source = "a\\u001b[2J"\n', r"source = 'a\\x1b\[2J' is no text on one line"),
        (NPU.replace("npu", '"a\\u001b"'), r"preset 'a\\x1b': a name has 1 to 60 printable"),
        (NPU.replace("npu", "n" * 9000), r"preset 'n+\.\.\.: a name has 1 to 60"),
        (NPU.replace("npu", '""'), "preset '': a name has 1 to 60 printable"),
        (NPU + f"source = {'[' * 100_000}\n", "is no (TOML|file of presets)"),
    ],
)
def test_what_is_wrong_with_a_file(
    text: str, message: str, chips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chips.write_text(text)
    with pytest.raises(OptionError, match=message) as told:
        find_accelerator(str(chips))
    assert str(chips) in str(told.value)
    assert len(str(told.value)) < 1000
    for asked in (["report", "cli_models:small", "--accelerator", str(chips)], ["accelerators"]):
        if asked == ["accelerators"]:
            asked = [*asked, str(chips)]
        assert cli.main(asked) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("torch-getfuse: ")


def test_which_of_several(chips: Path) -> None:
    chips.write_text("".join(NPU.replace("npu", name) for name in ("npu", "npu-large", "dsp")))
    for asked, message in (
        ("", r"has 3 presets: npu, npu-large, dsp; name one: '.*chips.toml:npu'"),
        (":npu-lage", "has no preset 'npu-lage'; did you mean 'npu-large'"),
        (":", "has no preset ''; it has npu, npu-large, dsp"),
        (":xyz", "has no preset 'xyz'; it has npu, npu-large, dsp"),
    ):
        with pytest.raises(OptionError, match=message):
            find_accelerator(f"{chips}{asked}")


def test_what_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "chips.toml"
    with pytest.raises(OptionError, match=r"chips.toml' cannot be read: No such file.*check the"):
        find_accelerator(str(path))
    with pytest.raises(OptionError, match=r"cannot be read: .*null"):
        find_accelerator("a\0.toml")
    path.mkdir()
    with pytest.raises(OptionError, match="cannot be read: "):
        find_accelerator(f"{path}:npu")
    path.rmdir()
    path.write_bytes(b"\xff\xfe" + NPU.encode("utf-16"))
    with pytest.raises(OptionError, match="is no text file; presets are TOML in UTF-8"):
        find_accelerator(str(path))
    path.write_text("#" * (2**20 + 1))
    with pytest.raises(OptionError, match="is larger than 1048576 B"):
        find_accelerator(str(path))
    path.write_text(NPU + "#" * (2**20 - len(NPU)))
    assert find_accelerator(str(path)).name == "npu"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a pipe of POSIX")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe.toml"
    os.mkfifo(path)
    with pytest.raises(OptionError, match="no regular file"):
        find_accelerator(str(path))


def test_the_command_lists_presets(chips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["accelerators"]) == 0
    out = capsys.readouterr().out
    table, _, sources = out.partition("\nSources\n")
    for preset in ACCELERATORS.values():
        (line,) = [line for line in table.splitlines() if line.split()[:1] == [preset.name]]
        assert ("blocks of" in line) == (preset.align_channels > 1)
        assert preset.source in " ".join(sources.split())
    assert re.search(
        r"^tpu-v1 +24 MB +1 B, 1 B +as they are +34 G +not given +45875.2 G$", out, re.M
    )
    assert cli.main(["accelerators", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [asdict(a) for a in ACCELERATORS.values()]
    assert cli.main(["accelerators", str(chips)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^npu +2 KB +1 B, 0.5 B +as they are", out, re.MULTILINE)
    assert "npu: not given" in out
    assert cli.main(["accelerators", str(chips), "--json"]) == 0
    (form,) = json.loads(capsys.readouterr().out)
    assert (form["name"], form["weight_bytes"], form["macs_per_second"]) == ("npu", 0.5, None)


def test_a_file_on_the_command_line(chips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["cli_models:small", "--input", "1x3x8x8"]
    assert cli.main(["report", *model, "--accelerator", f"{chips}:npu", "--json"]) == 0
    (section,) = json.loads(capsys.readouterr().out)["sections"]
    told = section["assumptions"]
    assert (told["buffer_bytes"], told["activation_bytes"], told["weight_bytes"]) == (2048, 1, 0.5)
