"""The validity predictor: what it computes, learns, writes and refuses; the shipped weights."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from tests.graphs import Builder
from torch_getfuse.errors import GetfuseError
from torch_getfuse.explain import validity
from torch_getfuse.explain.dataset import PackedGroups
from torch_getfuse.explain.features import FEATURES
from torch_getfuse.explain.sampling import sample_groups
from torch_getfuse.explain.trained_weights import WeightsError, load_weights, save_weights
from torch_getfuse.explain.training import data
from torch_getfuse.explain.validity import FitOptions, ValidityModel, evaluate, fit, scores
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.cost.registry import make_scheme


def heavy_graph(rng: Random) -> OpGraph:
    """A chain with skips whose groups need from 10 KB to some MB."""
    build = Builder()
    x = build.input((1, 64, 56, 56))
    for _ in range(7):
        a = build.act(build.conv(x, rng.choice((64, 128, 256)), kernel=rng.choice((1, 3, 5))))
        b = build.conv(a, 64, kernel=rng.choice((1, 3)))
        x = build.add(b, x) if rng.random() < 0.5 else b
    return build.graph()


@pytest.fixture(scope="module")
def tiny() -> PackedGroups:
    loaded = []
    for seed in range(4):
        graph = heavy_graph(Random(seed))
        found = sample_groups(graph, lambda a, w, g=graph: Lbdf(g, "line", a, w), "line", 60, seed)
        loaded.append((graph, list(found)))
    return PackedGroups.of(loaded, "line")


def test_a_batch_is_judged_like_its_groups(tiny: PackedGroups) -> None:
    torch.manual_seed(0)
    model = ValidityModel().eval()
    samples = np.arange(0, len(tiny), 7)
    batch = tiny.batch(samples)
    with torch.no_grad():
        together = model(batch.x, batch.edge_index, batch.batch)
        for k, sample in enumerate(samples):
            one = tiny.batch(samples[k : k + 1])
            alone = model(one.x, one.edge_index)
            assert alone.shape == (1,)
            torch.testing.assert_close(alone[0], together[k], rtol=1e-4, atol=1e-4, msg=str(sample))


def test_shape_of_the_network() -> None:
    model = ValidityModel()
    assert len(model.layers) == 4
    assert [tuple(layer.lin_rel.weight.shape) for layer in model.layers] == [
        (128, FEATURES),
        *[(128, 128)] * 3,
    ]
    no_edges = torch.zeros(2, 0, dtype=torch.int64)
    assert model(torch.zeros(1, FEATURES), no_edges).shape == (1,)


def test_edge_weights_of_one_change_nothing(tiny: PackedGroups) -> None:
    model = ValidityModel().eval()
    batch = tiny.batch(np.array([50]))
    ones = torch.ones(batch.edge_index.shape[1])
    plain = model(batch.x, batch.edge_index)
    torch.testing.assert_close(model(batch.x, batch.edge_index, edge_weight=ones), plain)
    cut = torch.zeros(2, 0, dtype=torch.int64)
    none = model(batch.x, batch.edge_index, edge_weight=0 * ones)
    torch.testing.assert_close(none, model(batch.x, cut))


def test_it_learns(tiny: PackedGroups) -> None:
    model = fit(tiny, FitOptions(epochs=12, batch=64, seed=1), progress=False)
    found = evaluate(model, tiny, tiny.part("train"))
    assert found.majority < 0.8
    assert found.accuracy > found.majority + 0.1


def test_going_on_after_an_interruption_ends_the_same(
    tiny: PackedGroups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = FitOptions(epochs=4, batch=64)
    straight = fit(tiny, options, progress=False)
    checkpoint = tmp_path / "fit.pt"
    real, calls = validity.evaluate, []

    def interrupted(*args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(validity, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny, options, checkpoint, progress=False)
    resumed = fit(tiny, options, checkpoint, progress=False)
    assert len(calls) == 3 + 2, "two epochs were done and are not done again"
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_checkpoint_of_another_run_is_not_used(tiny: PackedGroups, tmp_path: Path) -> None:
    checkpoint = tmp_path / "fit.pt"
    fit(tiny, FitOptions(epochs=1), checkpoint, progress=False)
    other = FitOptions(epochs=1, seed=5)
    again, fresh = fit(tiny, other, checkpoint, progress=False), fit(tiny, other, progress=False)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_scores_by_hand() -> None:
    actual = torch.tensor([True, True, True, False, False])
    predicted = torch.tensor([True, True, False, True, False])
    found = scores(predicted, actual)
    assert found.samples == 5
    assert (found.accuracy, found.majority) == pytest.approx((0.6, 0.6))
    assert found.f1 == pytest.approx(2 / 3)  # precision 2/3, recall 2/3
    assert found.f1_invalid == pytest.approx(0.5)


def test_save_and_load(tmp_path: Path) -> None:
    model = ValidityModel()
    path = tmp_path / "m.safetensors"
    validity.save_model(model, path, "lbdf", "pixel", "abc")
    loaded = validity.load_model("lbdf", "pixel", path, "abc")
    assert validity.model_fingerprint(loaded) == validity.model_fingerprint(model)
    assert validity.model_fingerprint(ValidityModel()) != validity.model_fingerprint(model)
    assert not loaded.training


@pytest.mark.parametrize(
    ("scheme", "granularity", "fingerprint", "named"),
    [
        ("lbdf", "line", None, "granularity='pixel', not 'line'"),
        ("brr", "line", None, "scheme='lbdf', not 'brr'"),
        ("lbdf", "pixel", "other", "data='abc', not 'other'"),
    ],
)
def test_a_mismatch_is_refused(
    tmp_path: Path, scheme: str, granularity: str, fingerprint: str | None, named: str
) -> None:
    path = tmp_path / "m.safetensors"
    validity.save_model(ValidityModel(), path, "lbdf", "pixel", "abc")
    with pytest.raises(WeightsError) as caught:
        validity.load_model(scheme, granularity, path, fingerprint)
    assert named in str(caught.value)
    assert "torch-getfuse train" in str(caught.value)
    assert isinstance(caught.value, GetfuseError)


def test_other_features_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    validity.save_model(ValidityModel(), path, "lbdf", "line", "abc")
    monkeypatch.setattr(validity, "FEATURES_ID", "newer")
    with pytest.raises(WeightsError, match="features="):
        validity.load_model("lbdf", "line", path)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights at"):
        load_weights(tmp_path / "none.safetensors", {})
    path = tmp_path / "m.safetensors"
    save_weights(path, {"a": torch.zeros(3)}, {"k": "v"})
    assert load_weights(path, {"k": "v"})[1] == {"k": "v"}
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightsError, match="cannot be read"):
        load_weights(path, {})


@pytest.mark.parametrize(
    ("scheme", "granularity"), [("lbdf", "line"), ("lbdf", "pixel"), ("brr", "line")]
)
def test_the_shipped_weights_know_new_groups(scheme: str, granularity: str) -> None:
    """Groups drawn with another seed, at another input size than any in the training data."""
    model = validity.load_model(scheme, granularity)
    loaded = []
    for network in ("mobilenet_v2", "squeezenet1_0", "resnet18"):
        graph = data.capture_network(network, 192)
        found = sample_groups(
            graph,
            lambda a, w, g=graph: make_scheme(scheme, g, granularity, a, w),
            granularity,
            170,
            seed=12345,
        )
        loaded.append((graph, list(found)))
    packed = PackedGroups.of(loaded, granularity)
    assert len(packed.keys) >= 500
    found = evaluate(model, packed, np.arange(len(packed)))
    assert found.accuracy > 0.95
    assert found.f1 > 0.93
