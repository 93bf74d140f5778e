"""Why operators do not fit together: figures, edges, parts, forms, and what cannot be a group."""

from __future__ import annotations

import builtins
import json
import pickle
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from graphs import Builder, random_graph
from networks import operator_graph
from torch import nn

import torch_getfuse
from torch_getfuse.errors import GetfuseError, OptionError
from torch_getfuse.explain_graph import explain_graph
from torch_getfuse.ir import OpGraph
from torch_getfuse.options import Options
from torch_getfuse.partition.cost.scheme import Dram
from torch_getfuse.plugins import ASKED_EXPLAINERS, EXPLAINERS
from torch_getfuse.reporting.explanation import Explanation
from torch_getfuse.reporting.export import plain

CONTROLS = ("random", "all")
BLOCKS = [f"features.{k}" for k in range(4)]


def explain(
    graph: OpGraph,
    operators: Sequence[str] | None = None,
    explainers: Sequence[str] = CONTROLS,
    **options: Any,
) -> Explanation:
    """With one byte per element."""
    widths = {"activation_bytes": 1, "weight_bytes": 1}
    return explain_graph(graph, Options.of({**widths, **options}), operators, explainers)


def chain() -> OpGraph:
    """Two 3x3 convolutions on 8x8, 2 to 4 to 4 channels: 176 B of lines (method, section 3)."""
    build = Builder()
    x = build.input((1, 2, 8, 8))
    build.conv(build.conv(x, 4, kernel=3), 4, kernel=3)
    return build.graph()


WEIGHTS = (2 * 4 * 9 + 4) + (4 * 4 * 9 + 4)


def test_weights_that_stream_are_told_as_such() -> None:
    why = explain(chain(), scheme="cascade", buffer=300)
    assert not why.valid
    (staged,) = (term for term in why.terms if term.kind == "staging")
    assert f"staging of streamed weights of {staged.name} {staged.bytes} B" in " ".join(
        str(why).split()
    )


@pytest.fixture(scope="module")
def mobile() -> Explanation:
    """The first blocks of MobileNetV2, all explainers of the GNN."""
    return explain(operator_graph("mobilenet_v2"), BLOCKS, ASKED_EXPLAINERS, buffer="64KB")


def test_figures_by_hand() -> None:
    why = explain(chain(), buffer=300)
    assert not why.valid
    assert (why.demand_bytes, why.gap_bytes) == (WEIGHTS + 176, WEIGHTS + 176 - 300)
    assert [(t.kind, t.bytes) for t in why.terms] == [
        ("weights", 148),
        ("lines", 96),
        ("weights", 76),
        ("lines", 48),
        ("lines", 32),
    ]
    (edge,) = why.edges
    assert (edge.producer, edge.consumer) == ("conv0", "conv1")
    assert (edge.shape, edge.tensor_bytes, edge.held_bytes) == ((4, 8, 8), 256, 96)
    assert why.dram == Dram(128, 256, WEIGHTS)
    assert why.cut is not None
    assert [part.operators for part in why.cut.parts] == [("conv0",), ("conv1",)]
    assert why.cut.dram == Dram(128 + 256, 256 + 256, WEIGHTS)
    assert why.added_dram_bytes == 512
    assert why.cut.crossing == {"conv0": 256}
    for blame in why.blames:
        assert blame.edges == ((0, 1.0),)
        assert (blame.parts, blame.dram_bytes) == (2, why.cut.dram.total)


def test_fits_says_how_much_room_and_explains_nothing() -> None:
    why = explain(chain(), buffer=500)
    assert why.valid
    assert why.gap_bytes == WEIGHTS + 176 - 500
    assert (why.blames, why.cut, why.added_dram_bytes) == ((), None, 0)
    assert f"fits, {500 - WEIGHTS - 176} B of room left" in str(why)
    assert "blame" not in str(why)


def test_a_buffer_that_is_full_to_the_last_byte_does_not_fit() -> None:
    why = explain(chain(), buffer=WEIGHTS + 176)
    assert not why.valid
    assert why.gap_bytes == 0
    assert "full to the last byte" in str(why)


def check(why: Explanation) -> None:
    """What holds for every explanation."""
    if why.demand_bytes is not None:
        assert sum(term.bytes for term in why.terms) == why.demand_bytes
    assert [t.bytes for t in why.terms] == sorted((t.bytes for t in why.terms), reverse=True)
    members = set(why.operators)
    assert {name for edge in why.edges for name in (edge.producer, edge.consumer)} <= members
    for blame in why.blames:
        scores = [score for _, score in blame.edges]
        assert scores[0] == 1
        assert scores == sorted(scores, reverse=True)
        assert all(0 <= edge < len(why.edges) for edge, _ in blame.edges)
    if why.cut is None:
        return
    covered = [name for part in why.cut.parts for name in part.operators]
    assert sorted(covered) == sorted(why.operators)
    home = {name: k for k, part in enumerate(why.cut.parts) for name in part.operators}
    for part in why.cut.parts:
        if part.fits:
            assert part.buffer_bytes is not None
            assert part.buffer_bytes < why.buffer_bytes
        else:
            assert set(part.operators) <= set(why.unfusable)
    cut = {k for k, e in enumerate(why.edges) if home[e.producer] != home[e.consumer]}
    assert set(why.cut.edges) == cut
    # Parts stand in an order in which they can run.
    assert all(home[e.producer] <= home[e.consumer] for e in why.edges)


def test_a_network(mobile: Explanation) -> None:
    check(mobile)
    assert not mobile.valid
    assert len(mobile.operators) == 16
    assert [blame.explainer for blame in mobile.blames] == list(ASKED_EXPLAINERS)
    assert mobile.probability is not None
    assert 0 <= mobile.probability <= 1
    assert mobile.cut is not None
    # Each tensor that the cut takes out of the group is written, and read by one part more.
    assert mobile.added_dram_bytes == 2 * sum(mobile.cut.crossing.values())


def test_the_predictor_is_called_wrong_only_where_it_is(mobile: Explanation) -> None:
    def told(**changes: Any) -> str:
        text = replace(mobile, **changes).render(plain(160))
        return next(line for line in text.splitlines() if line.startswith("GNN"))

    buffer = mobile.buffer_bytes
    assert told(probability=0.1, demand_bytes=buffer, untrained="").endswith(": right")
    assert told(probability=0.9, demand_bytes=buffer, untrained="").endswith(": wrong")
    # It predicts F_b < B: an obstacle, such as an unfusable operator on a path, is not its fault.
    assert told(
        probability=0.9, demand_bytes=buffer - 1, valid=False, obstacles=("two pieces",)
    ).endswith(": right")
    assert told(probability=0.9, demand_bytes=None, untrained="").endswith(": wrong")
    far = told(probability=0.9, demand_bytes=buffer, untrained="buffers of 128 KB to 2 MB")
    assert far.endswith(": wrong, but it was trained for buffers of 128 KB to 2 MB only")


@pytest.mark.parametrize(
    "options",
    [
        {"buffer": "256KB"},
        {"buffer": "64KB", "granularity": "pixel"},
        {"buffer": "64KB", "scheme": "brr"},
        {"buffer": "256KB", "explainer": "random"},
        {"buffer": "128KB", "explainer": None, "split_rule": "most_operators"},
    ],
)
def test_the_whole_fusable_graph(options: dict[str, Any]) -> None:
    why = explain(operator_graph("mobilenet_v2"), **options)
    check(why)
    assert why.unfusable == ()
    assert why.cut is not None
    assert all(part.fits for part in why.cut.parts)


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs(seed: int) -> None:
    rng = Random(seed)
    graph = random_graph(rng)
    options = {"scheme": rng.choice(["lbdf", "brr"]), "granularity": rng.choice(["line", "pixel"])}
    names = [op.name for op in graph.ops]
    for operators in (None, rng.sample(names, rng.randint(1, len(names)))):
        try:
            why = explain(graph, operators, buffer=rng.choice([60, 200, 600]), **options)
        except OptionError as error:
            assert "no edge joins" in str(error) or "fits the buffer alone" in str(error)  # noqa: PT017
        else:
            check(why)
            str(why)


def test_same_seed_same_answer() -> None:
    graph = operator_graph("mobilenet_v2")
    first, second = (explain(graph, BLOCKS, CONTROLS, buffer="64KB").to_dict() for _ in range(2))
    for form in (first, second):
        for blame in form["explainers"]:
            del blame["seconds"]
    assert first == second


def test_operators_between_are_added() -> None:
    why = explain(operator_graph("mobilenet_v2"), ["features.1", "features.3.add"], buffer="64KB")
    check(why)
    assert "features.2.conv.2" in why.added
    assert "features.1.conv.1" not in why.added
    assert "on a path between" in str(why)


def test_part_of_a_block_that_is_moved_as_one() -> None:
    names = ["features.2.conv.0.0", "features.2.conv.0.2", "features.2.conv.1.0"]  # no ReLU6
    why = explain(operator_graph("mobilenet_v2"), names, buffer="40KB")
    check(why)
    assert why.operators == tuple(names)


def test_an_unfusable_operator() -> None:
    why = explain(operator_graph("mobilenet_v2"), ["features.18.0"])
    check(why)
    assert why.unfusable == why.operators == ("features.18.0",)
    assert (why.blames, why.cut) == ((), None)
    assert "features.18.0 alone needs 413 KB: unfusable" in str(why)


def test_a_group_with_an_unfusable_operator() -> None:
    why = explain(operator_graph("mobilenet_v2"), ["features.17", "classifier"], buffer="1MB")
    check(why)
    assert why.unfusable == ("classifier.1",)
    assert why.cut is not None
    assert [part.fits for part in why.cut.parts] == [True, False]
    assert "classifier.1: unfusable" in str(why)


def test_operators_that_no_edge_joins() -> None:
    build = Builder()
    x = build.input((1, 2, 8, 8))
    a, b = build.conv(x, 4), build.conv(x, 4)
    build.conv(build.add(a, b), 4)
    with pytest.raises(OptionError, match=r"no edge joins conv0 and conv1.*add add2, where"):
        explain(build.graph(), ["conv0", "conv1"])
    assert explain(build.graph(), ["conv0", "conv1", "add2"]).valid
    build = Builder()
    build.conv(build.input((1, 2, 8, 8)), 4)
    build.conv(build.input((1, 2, 8, 8)), 4)
    with pytest.raises(OptionError, match=r"so no group can hold both$"):
        explain(build.graph(), ["conv0", "conv1"])
    pieces = explain(build.graph())
    assert not pieces.valid
    assert pieces.obstacles == ("it consists of 2 pieces that no edge connects",)
    assert "no group" in str(pieces)


@pytest.mark.parametrize(
    ("operators", "explainers", "told"),
    [
        (["conv3"], CONTROLS, "'conv3' is neither an operator.*did you mean 'conv"),
        ([], CONTROLS, "operators is empty"),
        (None, ["salency"], "did you mean 'saliency'"),
    ],
)
def test_mistakes(operators: list[str] | None, explainers: Sequence[str], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        explain(chain(), operators, explainers)


def test_nothing_fits_alone() -> None:
    with pytest.raises(OptionError, match="no operator fits the buffer alone"):
        explain(chain(), buffer=10)


def test_a_scheme_without_a_schedule() -> None:
    # Squeeze-and-Excite with its loop inside has no rate (docs/method.md, section 4).
    graph = operator_graph("mobilenet_v3_small")
    why = explain(graph, ["features.1.block"], scheme="brr")
    check(why)
    assert (why.demand_bytes, why.gap_bytes, why.terms) == (None, None, ())
    assert "no schedule" in str(why)
    assert why.granularity is None
    json.loads(why.to_json())


# -- forms --------------------------------------------------------------------------------


def test_json(mobile: Explanation, tmp_path: Path) -> None:
    path = tmp_path / "why.json"
    mobile.save(path)
    form = json.loads(path.read_text())
    assert form == mobile.to_dict()
    assert form["schema_version"] == 1

    def sizes(value: object, key: str = "") -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                sizes(inner, name)
        elif isinstance(value, list):
            for inner in value:
                sizes(inner, key)
        elif key.endswith("bytes") and value is not None:
            assert type(value) is int, key

    sizes(form)
    assert form["cut"]["added_feature_bytes"] == mobile.added_dram_bytes


def test_text(mobile: Explanation, tmp_path: Path) -> None:
    text = str(mobile)
    assert max(map(len, text.splitlines())) <= 100
    assert "16 operators under a buffer of 64 KB: 42.0 KB too much" in text
    assert "3 rows of features.2.conv.0.2, 10.5 KB each" in text
    assert "weights of features.3.conv.0.0" in text
    mobile.save(tmp_path / "why.txt")
    assert (tmp_path / "why.txt").read_text() == text + "\n"
    mobile.save(tmp_path / "why.md")
    assert (tmp_path / "why.md").read_text().startswith("### 16 operators")


def test_all_explainers_keep_to_the_width() -> None:
    why = explain(operator_graph("mobilenet_v2"), None, EXPLAINERS.built_in)
    assert max(map(len, str(why).splitlines())) <= 100


def test_dot(mobile: Explanation, tmp_path: Path) -> None:
    path = tmp_path / "why.dot"
    mobile.save(path)
    text = path.read_text()
    assert text.startswith("digraph")
    assert text.count("{") == text.count("}")
    assert all(f'[label="{name}"]' in text for name in mobile.operators)
    assert text.count(" -> ") == len(mobile.edges)
    assert mobile.cut is not None
    assert text.count("style=dashed]") == len(mobile.cut.edges)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_pictures(mobile: Explanation, tmp_path: Path, suffix: str, start: bytes) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"why{suffix}"
    mobile.save(path)
    drawn = path.read_bytes()
    assert drawn.startswith(start)
    mobile.save(path)
    assert path.read_bytes() == drawn, "a picture depends on what it shows alone"
    assert "matplotlib.pyplot" not in sys.modules, "a picture needs no window"


def test_the_numbers_of_a_picture_are_those_of_the_table(mobile: Explanation) -> None:
    rows = [line.split() for line in str(mobile).splitlines() if " -> " in line]
    table = {(row[0], row[2]): row[-2 if row[-1] == "cut" else -1] for row in rows}
    boxes = mobile.drawing().boxes
    drawn = {
        (boxes[arrow.source].label, boxes[arrow.target].label): f"{arrow.score:.2f}"
        for arrow in mobile.drawing().arrows
        if arrow.score
    }
    assert len(drawn) > 3
    assert drawn == table
    assert max(arrow.share for arrow in mobile.drawing().arrows) == 1
    assert mobile.to_dot().count("label=") >= len(drawn)
    # By hand: the mean of the table's columns, 0 where an explainer does not name an edge.
    edge = mobile.blames[0].edges[0][0]
    scores = [dict(blame.edges).get(edge, 0.0) for blame in mobile.blames]
    assert mobile.mean_scores[edge] == pytest.approx(sum(scores) / len(ASKED_EXPLAINERS))


def test_controls_do_not_count() -> None:
    why = explain(chain(), explainers=["saliency", "all"], buffer=300)
    assert [blame.explainer for blame in why.shown_blames] == ["saliency"]
    assert why.mean_scores == tuple(dict(why.blames[0].edges).get(k, 0.0) for k in range(1))
    assert "mean" not in str(why), "one explainer is its own mean"


def test_a_picture_of_one_operator(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    explain(operator_graph("mobilenet_v2"), ["features.18.0"]).save(tmp_path / "why.png")


def test_pictures_without_matplotlib(
    mobile: Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = builtins.__import__

    def refuse(name: str, *args: Any, **rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *args, **rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(GetfuseError, match=r"torch-getfuse\[plots\]"):
        mobile.save(tmp_path / "why.png")
    assert not (tmp_path / "why.png").exists()


def test_unknown_suffix(mobile: Explanation) -> None:
    with pytest.raises(OptionError, match=r"did you mean '\.json'"):
        mobile.save("why.jsn")


# -- the public function ------------------------------------------------------------------


def test_api() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    x = torch.zeros(1, 3, 8, 8)
    why = torch_getfuse.explain(model, (x,), ["0", "1"], ["all"], buffer=300)
    assert isinstance(why, torch_getfuse.Explanation)
    assert why.operators == ("0", "1")
    # 4 bytes per element as traced: 112 weights, 3 rows of 24, 1 row of 32
    assert why.demand_bytes == 4 * (112 + 72 + 32)
    exported = torch.export.export(model, (x,))
    again = torch_getfuse.explain(exported, operators=["0", "1"], explainers=["all"], buffer=300)
    assert again.fingerprint == why.fingerprint
    with pytest.raises(OptionError, match="did you mean 'buffer'"):
        torch_getfuse.explain(model, (x,), bufer=300)


def test_the_page_of_an_explanation(
    mobile: Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    x = torch.zeros(1, 3, 8, 8)
    why = torch_getfuse.explain(model, (x,), ["0", "1"], ["all"], buffer=300, cache=False)
    why.save(tmp_path / "why.html")
    page = (tmp_path / "why.html").read_text()
    assert page == torch_getfuse.report(model, x, buffer=300, cache=False).to_html(why)
    assert pickle.loads(pickle.dumps(why)).to_html() == page
    with pytest.raises(OptionError, match=r"report\(model, x\)\.to_html\(explanation\)"):
        mobile.save(tmp_path / "why.html")
