"""From nothing to weights that load, on a tiny data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_getfuse.explain.explainers import make_ranker
from torch_getfuse.explain.trained_weights import WeightsError, load_weights
from torch_getfuse.explain.training import data, train
from torch_getfuse.explain.validity import load_model, model_fingerprint


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "TABLE_1", {"squeezenet1_0": 1})


@pytest.mark.usefixtures("small")
def test_one_command_makes_weights_that_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--scheme", "lbdf", "--granularity", "pixel", "--groups", "60", "--epochs", "2"]
    command += ["--synthetic", "0"]
    paths = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    assert train.main([*command, *paths, "--jobs", "1", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["groups"] >= 58
    assert result["samples"] == 5 * result["groups"]
    assert {Path(file).name for file in result["files"]} == {
        "lbdf_pixel_validity.safetensors",
        "lbdf_pixel_pg.safetensors",
        "lbdf_pixel_rg.safetensors",
    }
    folder = tmp_path / "out"
    model = load_model("lbdf", "pixel", folder / "lbdf_pixel_validity.safetensors")
    assert all(Path(file).stat().st_mode & 0o044 == 0o044 for file in result["files"])
    graph = data.load_graph("squeezenet1_0", 224, tmp_path / "data")
    for name in ("pgexplainer", "rgexplainer", "gnnexplainer", "saliency"):
        rank = make_ranker(
            name, graph, "lbdf", 2**18, granularity="pixel", model=model, folder=folder
        )
        assert rank((1 << len(graph)) - 1)
    # The same command again: the same weights, from data and state that are there already.
    again = train.train(
        "lbdf",
        "pixel",
        tmp_path / "again",
        data=tmp_path / "data",
        groups=60,
        epochs=2,
        jobs=1,
        progress=False,
        synthetic=0,
    )
    repeated = load_model("lbdf", "pixel", Path(again.files[0]))
    assert model_fingerprint(repeated) == model_fingerprint(model)
    for first, second in zip(result["files"], again.files, strict=True):
        # Not byte by byte: safetensors writes its metadata in any order.
        (state, told), (state_again, told_again) = (
            load_weights(Path(file), {}) for file in (first, second)
        )
        assert told == told_again
        assert all(torch.equal(value, state_again[name]) for name, value in state.items())
    with pytest.raises(WeightsError, match="granularity="):
        load_model("lbdf", "line", Path(again.files[0]))


@pytest.mark.usefixtures("small")
def test_explainers_learn_from_what_searches_ask(tmp_path: Path) -> None:
    packed, _ = data.build("lbdf", "line", tmp_path, 60, jobs=1, progress=False, synthetic=0)
    chosen = train.explained_samples(packed, "lbdf", 1000, seed=0)
    assert len(chosen) > 5
    assert np.isin(chosen, packed.part("train")).all()
    assert not packed.labels[chosen].any()
    assert packed.fits_alone(True)[chosen].all()
    assert packed.group_sizes()[chosen].min() > 2
