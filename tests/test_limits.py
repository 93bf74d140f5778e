"""One set of limits: what options take can be planned, saved and read again, or is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import torch_getfuse
from tests.graphs import Builder
from tests.partition.test_pins import chain
from torch_getfuse.accelerator import Accelerator
from torch_getfuse.errors import FileError, GetfuseError, OptionError, PlanError
from torch_getfuse.limits import MOST, MOST_POSITIONS, MOST_WIDTH
from torch_getfuse.options import Options
from torch_getfuse.partition.plan import load_plan
from torch_getfuse.planner import plan_graph

BORDERS: dict[str, tuple[Any, int]] = {
    "buffer": (MOST, MOST + 1),
    "activation_bytes": (MOST_WIDTH, MOST_WIDTH + 1),
    "weight_bytes": (MOST_WIDTH, MOST_WIDTH + 1),
    "align_channels": (MOST_POSITIONS, MOST_POSITIONS + 1),
    "slice_channels": (MOST_POSITIONS, MOST_POSITIONS + 1),
    "budget": (MOST, MOST + 1),
}
"""Option -> the most that it takes, and the first number that it does not."""


@pytest.mark.parametrize("name", BORDERS)
def test_an_option_above_its_limit_is_refused_with_both_numbers(name: str) -> None:
    most, above = BORDERS[name]
    assert getattr(Options.of({name: most}), name) == most
    with pytest.raises(OptionError, match=rf"^{name}={above} is .*above {most} ") as raised:
        Options.of({name: above})
    assert len(str(raised.value)) < 120
    with pytest.raises(OptionError, match=rf"^{name}=an integer of 16610 bits "):
        Options.of({name: 10**5000})


@pytest.mark.parametrize("name", ["activation_bytes", "weight_bytes", "align_channels"])
def test_an_accelerator_has_the_same_limits(name: str) -> None:
    figures = {"buffer_bytes": 4096, "activation_bytes": 1, "weight_bytes": 1}
    most, above = BORDERS[name]
    assert Accelerator("chip", **{**figures, name: most})
    with pytest.raises(OptionError, match=rf"^Accelerator 'chip': {name}={above} is above {most} "):
        Accelerator("chip", **{**figures, name: above})
    with pytest.raises(OptionError, match=rf"^Accelerator 'chip': buffer_bytes={MOST + 1} is abov"):
        Accelerator("chip", **{**figures, "buffer_bytes": MOST + 1})


eighths = st.integers(1, 8 * MOST_WIDTH).map(lambda bits: bits / 8)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    buffer=st.sampled_from([1, 1000, MOST - 1, MOST]) | st.integers(1, MOST),
    scheme=st.sampled_from(["lbdf", "brr", "cascade"]),
    granularity=st.sampled_from(["line", "pixel"]),
    activation_bytes=st.sampled_from([None, 0.125, 1, MOST_WIDTH]) | eighths,
    weight_bytes=st.sampled_from([None, 0, 0.125, MOST_WIDTH]) | eighths,
    align_channels=st.sampled_from([1, 16, MOST_POSITIONS]) | st.integers(1, MOST_POSITIONS),
    slice_channels=st.sampled_from([1, MOST_POSITIONS]) | st.integers(1, MOST_POSITIONS),
    residency=st.booleans(),
    pins=st.sampled_from([{}, {"split_before": ["conv4"]}, {"keep": ["conv0"]}]),
)
def test_what_options_take_can_be_saved_and_read(
    tmp_path: Path, pins: dict[str, Any], **options: Any
) -> None:
    try:
        plan = plan_graph(chain(), Options(**options, **pins, time_limit=1, budget=20))
    except OptionError as error:
        if "keep=" not in str(error):
            raise
        return  # what is pinned does not fit
    plan.save(tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert again == plan
    assert again.verify() == plan


def test_a_plan_whose_figures_no_file_may_state_is_refused() -> None:
    build = Builder()
    build.conv(build.input((1, 4, 64, 2**16)), 4)
    options = {"activation_bytes": MOST_WIDTH, "align_channels": MOST_POSITIONS}
    with pytest.raises(PlanError, match=rf"DRAM access of \d+ B is above {MOST} B, .* smaller"):
        plan_graph(build.graph(), Options(buffer=MOST, **options))  # type: ignore[arg-type]


def results() -> dict[str, tuple[Callable[[str], None], tuple[str, ...]]]:
    """What is saved -> how, and the suffixes of its files."""
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).eval(), torch.zeros(1, 3, 8, 8)
    plan = torch_getfuse.plan(net, (x,), buffer="4KB", scheme="cascade")
    return {
        "plan": (plan.save, (".json",)),
        "report": (torch_getfuse.report(plan).save, (".txt", ".json", ".csv", ".html", ".svg")),
        "explanation": (
            torch_getfuse.explain(net, (x,), None, ["all"]).save,
            (".txt", ".json", ".dot", ".svg"),
        ),
        "sweep": (
            torch_getfuse.sweep(net, (x,), buffers=["4KB"], n_jobs=1).save,
            (".txt", ".json", ".jsonl", ".csv", ".svg"),
        ),
        "appraisal": (torch_getfuse.price(net, (x,), plan).save, (".txt", ".md", ".json")),
        "points": (
            lambda path: torch_getfuse.sweep(net, (x,), path=path, n_jobs=1) and None,
            (".jsonl",),
        ),
    }


def test_a_missing_folder_is_told_with_the_way_out(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    for what, (save, suffixes) in results().items():
        for suffix in suffixes:
            path = str(folder / f"{what}{suffix}")
            told = f"cannot write '{path}': there is no folder '{folder}'; make it, or"
            with pytest.raises(GetfuseError, match=f"^{re.escape(told)}") as raised:
                save(path)
            assert isinstance(raised.value, FileError)
            assert isinstance(raised.value, OSError), "as it was before"
            assert (raised.value.filename, raised.value.strerror) == (
                path,
                "No such file or directory",
            )
    with pytest.raises(FileError, match="it is a folder; give the path of a file in it"):
        results()["plan"][0](str(tmp_path))
