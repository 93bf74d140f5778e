"""Plans kept in memory and on disk: what finds them, what makes them anew, damage, sharing."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_getfuse.api import plan as make_plan
from torch_getfuse.atomic_files import PART_PREFIX
from torch_getfuse.backend import compiler, plan_cache
from torch_getfuse.backend.plan_cache import cache_key, find_plan, store_plan
from torch_getfuse.options import Options
from torch_getfuse.partition.fusion_group import Stage
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.reporting.report import Report, Section

MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
X = torch.ones(1, 3, 8, 8)


@pytest.fixture(autouse=True)
def no_plans() -> Iterator[None]:
    plan_cache.clear_memory()
    plan_cache._warned.clear()
    yield
    plan_cache.clear_memory()


@pytest.fixture(scope="module")
def plan() -> PartitionPlan:
    return make_plan(MODEL, (X,))


def options(folder: object, **more: object) -> Options:
    return Options.of({"cache": folder, **more})


def test_a_stored_plan_is_found_in_memory_and_on_disk(plan: PartitionPlan, tmp_path: Path) -> None:
    asked = options(tmp_path)
    assert find_plan(plan.graph, asked) is None
    store_plan(plan, plan.graph, asked)
    assert find_plan(plan.graph, asked) is plan
    plan_cache.clear_memory()
    assert find_plan(plan.graph, asked) == plan
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_the_key_has_what_matters_and_nothing_else(plan: PartitionPlan) -> None:
    key = cache_key(plan.graph, Options())
    assert cache_key(plan.graph, Options(strict=True, inner="inductor", progress=False)) == key
    assert cache_key(plan.graph, Options(activation_bytes=4)) == key, "the traced width"
    for other in (
        {"buffer": "1KB"}, {"scheme": "brr"}, {"granularity": "pixel"}, {"activation_bytes": 1},
        {"weight_bytes": 1}, {"method": "exact"}, {"explainer": None}, {"budget": 7},
        {"split_rule": "most_operators"}, {"seed": 1}, {"time_limit": 1},
        {"accelerator": "eyeriss-v1"}, {"residency": False}, {"slice_channels": 8},
        {"align_channels": 16}, {"activation_bytes": 0.5}, {"weight_bytes": 0},
    ):  # fmt: skip
        assert cache_key(plan.graph, Options.of(other)) != key, other


def test_every_option_is_in_the_key_or_changes_no_plan() -> None:
    known = {field.name for field in dataclasses.fields(Options)}
    # As the graph has them.
    resolved = {"activation_bytes", "weight_bytes", "align_channels", "accelerator"}
    named = {"scheme", "method", "explainer"}  # as what they stand for
    running = {"inner", "backward", "cache", "plan", "strict", "progress"}
    assert known == {*plan_cache._MATTERS} | resolved | named | running


def test_a_file_of_other_steps_is_dropped(tmp_path: Path) -> None:
    asked = options(tmp_path, scheme="cascade")
    made = make_plan(MODEL, (X,), scheme="cascade")
    store_plan(made, made.graph, asked)
    plan_cache.clear_memory()
    assert find_plan(made.graph, asked) == made
    plan_cache.clear_memory()
    (path,) = tmp_path.iterdir()
    for changed in ({"residency": False}, {"slice_channels": 8}):
        other = options(tmp_path, scheme="cascade", **changed)
        path.rename(tmp_path / f"{cache_key(made.graph, other)}.json")
        (path,) = tmp_path.iterdir()
        with pytest.warns(UserWarning, match=f"its {next(iter(changed))} is"):
            assert find_plan(made.graph, other) is None
        store_plan(made, made.graph, asked)
        plan_cache.clear_memory()
        (path,) = tmp_path.iterdir()


def test_weights_of_several_widths_are_found_again(tmp_path: Path) -> None:
    mixed = nn.Sequential(nn.Conv2d(3, 4, 3), Half()).eval()
    made = make_plan(mixed, (X,))
    assert made.weight_bytes is None
    store_plan(made, made.graph, options(tmp_path))
    plan_cache.clear_memory()
    assert find_plan(made.graph, options(tmp_path)) == made


class Half(nn.Module):
    """A convolution in half precision, between casts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3).half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.half()).float()


def test_no_cache_keeps_nothing(plan: PartitionPlan) -> None:
    store_plan(plan, plan.graph, options(False))
    assert find_plan(plan.graph, options(False)) is None
    assert not plan_cache._memory


def test_a_plan_that_ran_out_of_time_is_not_written(plan: PartitionPlan, tmp_path: Path) -> None:
    late = replace(plan, stages=(Stage("local", plan.dram_bytes, 1, 10.0, "time limit"),))
    store_plan(late, late.graph, options(tmp_path))
    assert find_plan(late.graph, options(tmp_path)) is late
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "figures", "bytes"])
def test_a_damaged_entry_is_dropped_with_a_warning(
    plan: PartitionPlan, tmp_path: Path, damage: str
) -> None:
    asked = options(tmp_path)
    store_plan(plan, plan.graph, asked)
    plan_cache.clear_memory()
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    if damage == "truncated":
        path.write_text(text[: len(text) // 2])
    elif damage == "figures":
        need = plan.groups[0].buffer_bytes
        path.write_text(text.replace(f'"buffer_bytes": {need}', '"buffer_bytes": 1', 1))
    else:
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="dropped a damaged entry of the plan cache"):
        assert find_plan(plan.graph, asked) is None
    assert not list(tmp_path.iterdir())
    store_plan(plan, plan.graph, asked)
    plan_cache.clear_memory()
    assert find_plan(plan.graph, asked) == plan


def test_a_folder_that_cannot_be_written_is_warned_of_once(
    plan: PartitionPlan, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    asked = options(tmp_path / "file" / "below")
    with pytest.warns(UserWarning, match="cannot write the plan cache"):
        store_plan(plan, plan.graph, asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store_plan(plan, plan.graph, asked)


def test_the_backend_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = compiler.plan_graph

    def count(*args: object) -> PartitionPlan:
        made.append(args)
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(compiler, "plan_graph", count)
    settings = {"cache": str(tmp_path), "strict": True}
    for forget in (False, False, True):
        if forget:
            plan_cache.clear_memory()
        torch._dynamo.reset()
        compiled = torch.compile(MODEL, backend="getfuse", options=settings)
        assert torch.equal(compiled(X), MODEL(X))
    assert len(made) == 1


WORK = """
import sys, torch, warnings
warnings.simplefilter("error", UserWarning)
from pathlib import Path
from torch import nn
torch.manual_seed(0)
for width in range(4, 9):
    m = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3)).eval()
    x = torch.ones(1, 3, 8, 8)
    c = torch.compile(m, backend="getfuse", options={"cache": sys.argv[1], "strict": True})
    assert torch.equal(c(x), m(x))
    torch._dynamo.reset()
"""


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    runs = [subprocess.Popen([sys.executable, "-c", WORK, str(tmp_path)]) for _ in range(2)]
    assert [run.wait(timeout=180) for run in runs] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 5, "one file per plan, no leftovers"


def test_the_default_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plan_cache.default_folder() == tmp_path / "torch_getfuse"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert plan_cache.default_folder() == Path.home() / ".cache" / "torch_getfuse"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert plan_cache.default_folder().parent.name == "Caches"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert plan_cache.default_folder() == tmp_path / "torch_getfuse"


def test_a_plan_from_the_disk_claims_its_bound(plan: PartitionPlan, tmp_path: Path) -> None:
    asked = options(tmp_path)
    store_plan(plan, plan.graph, asked)
    plan_cache.clear_memory()
    found = find_plan(plan.graph, asked)
    assert found is not None
    assert (plan.claimed_by, found.claimed_by) == ("", "the plan cache")
    assert "optimal (claimed by the plan cache)" in str(Report((Section(found),)))
    assert "optimal (proved)" in str(Report((Section(plan),)))


@pytest.mark.parametrize(
    "other",
    [
        {"buffer": "128KB"},
        {"scheme": "brr"},
        {"granularity": "pixel"},
        {"activation_bytes": 1},
        {"weight_bytes": 1},
        {"weight_bytes": 0},
        {"align_channels": 16},
    ],
    ids=str,
)
def test_an_entry_that_holds_a_plan_for_something_else(
    plan: PartitionPlan, tmp_path: Path, other: dict[str, object]
) -> None:
    asked, swapped = options(tmp_path), options(tmp_path, **other)
    store_plan(plan, plan.graph, asked)
    (path,) = tmp_path.iterdir()
    path.rename(tmp_path / f"{cache_key(plan.graph, swapped)}.json")
    with pytest.warns(UserWarning, match="asked for is"):
        assert find_plan(plan.graph, swapped) is None


@pytest.mark.parametrize("entry", ["deep", "folder", "pipe"])
def test_an_entry_that_is_no_plan_at_all(plan: PartitionPlan, tmp_path: Path, entry: str) -> None:
    asked = options(tmp_path)
    path = tmp_path / f"{cache_key(plan.graph, asked)}.json"
    if entry == "deep":
        path.write_text("[" * 100_000)
    elif entry == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert find_plan(plan.graph, asked) is None
        store_plan(plan, plan.graph, asked)
        store_plan(plan, plan.graph, asked)
    assert len(told) == 1, [str(w.message) for w in told]


def test_a_folder_that_is_a_file_is_warned_of_once(plan: PartitionPlan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    asked = options(tmp_path / "file")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            plan_cache.clear_memory()
            assert find_plan(plan.graph, asked) is None
            store_plan(plan, plan.graph, asked)
    assert len(told) == 1


def test_what_killed_processes_left_goes(plan: PartitionPlan, tmp_path: Path) -> None:
    old, young = (tmp_path / f"{PART_PREFIX}{name}.json" for name in ("old", "young"))
    for path in (old, young):
        path.write_text("half")
    os.utime(old, (0, 0))
    store_plan(plan, plan.graph, options(tmp_path))
    assert not old.exists()
    assert young.exists(), "another process may be writing it"


def test_the_folder_of_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plan_cache.folder_of("~/plans") == tmp_path / "plans"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.warns(UserWarning, match="Could not determine home"):
        folder = plan_cache.default_folder()
    assert folder == Path(tempfile.gettempdir()) / "torch_getfuse"
