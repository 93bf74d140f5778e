"""The steps of the oracle of cascade against arithmetic by hand."""

from __future__ import annotations

import pytest

from tests.cascade_simulator import (
    ALONE,
    LINE,
    Around,
    Cascade,
    Illegal,
    Stripes,
    Way,
)
from tests.graphs import IDENTITY, Builder
from torch_getfuse.ir import OpGraph, Window

AMPLE = 1 << 20


def touching(*names: str, first: str = "", last: tuple[str, ...] = (), beside: int = 0) -> Around:
    return Around(frozenset(names), frozenset(first.split()), frozenset(last), beside)


# -- line ------------------------------------------------------------------------------------------


def inverted_residual() -> OpGraph:
    build = Builder()
    x = build.input((1, 8, 16, 16))
    expanded = build.act(build.conv(x, 48))
    depthwise = build.act(build.conv(expanded, 48, kernel=3, depthwise=True))
    build.add(build.conv(depthwise, 8), x)
    return build.graph()


def two_convolutions() -> OpGraph:
    """Rows of 16, 32 and 32 bytes, eight of each; 76 and 148 bytes of weights."""
    build = Builder()
    build.conv(build.conv(build.input((1, 2, 8, 8)), 4, kernel=3), 4, kernel=3)
    return build.graph()


def test_line_is_section_3() -> None:
    run = Cascade(inverted_residual(), AMPLE).run_step(0b111111, LINE)
    # x 2 rows of 128, expanded 3 of 768 (shared with its activation), depthwise 1, projected 1,
    # sum 1.
    assert run.units == {"x0": 2, "act1": 3, "act3": 1, "conv4": 1, "add5": 1}
    assert run.features == 2 * 128 + 3 * 768 + 768 + 128 + 128
    weights = (48 * 8 + 48) + (48 * 9 + 48) + (8 * 48 + 8)
    assert (run.weights, run.weight) == (weights, weights)
    assert (run.read, run.write) == (8 * 256, 8 * 256)
    assert run.total == 2 * 8 * 256 + weights


def test_line_of_two_convolutions() -> None:
    cascade = Cascade(two_convolutions(), AMPLE, activation_bytes=2, weight_bytes=3)
    run = cascade.run_step(0b11, LINE)
    assert run.features == 2 * (3 * 16 + 3 * 32 + 32)
    assert run.weights == 3 * (76 + 148)
    assert (run.read, run.write, run.weight) == (2 * 128, 2 * 256, 3 * 224)


def test_a_storage_with_a_resident_is_held_whole() -> None:
    build = Builder()
    build.conv(build.act(build.conv(build.input((1, 1, 8, 4)), 1)), 1, kernel=3)
    cascade = Cascade(build.graph(), AMPLE, weight_bytes=0)
    assert cascade.run_step(0b111, LINE).units == {"x0": 1, "act1": 3, "conv2": 1}
    for resident in ("conv0", "act1"):
        run = cascade.run_step(0b111, LINE, touching(resident))
        assert run.units == {"x0": 1, "act1": 8, "conv2": 1}
        assert (run.read, run.write) == (32, 32)
    # The activation alone writes over what it loads: one row, all rows if either of both stays.
    assert cascade.run_step(0b010, LINE).units == {"act1": 1}
    run = cascade.run_step(0b010, LINE, touching("act1"))
    assert (run.units, run.read, run.write) == ({"act1": 8}, 32, 0)
    run = cascade.run_step(0b010, LINE, touching("conv0"))
    assert (run.units, run.read, run.write) == ({"act1": 8}, 0, 32)


def test_a_resident_input_is_read_once_and_a_resident_output_written_once() -> None:
    cascade = Cascade(two_convolutions(), AMPLE, weight_bytes=0)
    first = cascade.run_step(0b01, LINE, touching("x0", "conv0", first="x0"))
    assert (first.read, first.write) == (128, 0)
    assert cascade.run_step(0b01, LINE, touching("x0", "conv0")).read == 0
    last = cascade.run_step(0b10, LINE, touching("conv0", "conv1", beside=7))
    assert (last.read, last.write, last.buffer) == (0, 256, 256 + 256 + 7)


# -- stripes ---------------------------------------------------------------------------------------


def test_one_stripe_holds_whole_maps_and_streams_at_no_cost() -> None:
    run = Cascade(two_convolutions(), AMPLE).run_step(0b11, Way("stripes", 1))
    assert run.units == {"x0": 8, "conv0": 8, "conv1": 8}
    assert run.features == 128 + 256 + 256
    # Both stream through room for the larger: of 4 channels a slice of 16 is everything.
    assert (run.weights, run.weight) == (148, 76 + 148)


def test_two_stripes() -> None:
    """Rows made at the end of a stripe: x 6, 8; middle 5, 8; out 4, 8.

    After the first, row 5 of the middle needs x from row 4 on, row 4 of the output needs the middle
    from row 3 on: x holds 6 rows, then 8 - 4; the middle 5, then 8 - 3; the output 4, then 4.
    """
    run = Cascade(two_convolutions(), AMPLE).run_step(0b11, Way("stripes", 2))
    assert run.units == {"x0": 6, "conv0": 5, "conv1": 4}
    assert run.features == 6 * 16 + 5 * 32 + 4 * 32
    assert run.weight == 2 * (76 + 148)
    assert (run.read, run.write) == (128, 256)


def test_as_many_stripes_as_rows_hold_what_lines_hold() -> None:
    cascade = Cascade(two_convolutions(), AMPLE)
    assert cascade.run_step(0b11, Way("stripes", 8)).units == cascade.run_step(0b11, LINE).units


def test_three_stripes_of_eight_rows_are_uneven() -> None:
    """Output rows 3, 6, 8; middle 4, 7, 8; x 5, 8, 8.

    Middle: 4, then 7 - 2, then 8 - 5; x: 5, then 8 - 3, then 8 - 6.
    """
    run = Cascade(two_convolutions(), AMPLE).run_step(0b11, Way("stripes", 3))
    assert run.units == {"x0": 5, "conv0": 5, "conv1": 3}


@pytest.mark.parametrize(
    ("stays", "held", "fetched"),
    [
        # Twice one of four channels: 2 * 19 of the first, 2 * 37 of the second.
        (0b00, 74, 3 * (76 + 148)),
        (0b01, 76 + 74, 76 + 3 * 148),
        (0b10, 148 + 38, 3 * 76 + 148),
        (0b11, 76 + 148, 76 + 148),
    ],
)
def test_weights_stay_or_stream(stays: int, held: int, fetched: int) -> None:
    cascade = Cascade(two_convolutions(), AMPLE, slice_channels=1)
    run = cascade.run_step(0b11, Way("stripes", 3, stays))
    assert (run.weights, run.weight) == (held, fetched)


@pytest.mark.parametrize(
    ("buffer_bytes", "way", "need", "fetched"),
    [
        (401, LINE, 176 + 76 + 148, 76 + 148),
        # Eight stripes hold 176 for rows, and here the second's weights and a slice of the first's.
        (400, Way("stripes", 8, 0b10), 176 + 148 + 38, 8 * 76 + 148),
        # Four stripes hold 4, 4 and 2 rows; all weights are fetched four times, less than the
        # second's eight times.
        (362, Way("stripes", 4), 256 + 74, 4 * (76 + 148)),
        (330, Way("stripes", 8, 0b01), 176 + 76 + 74, 76 + 8 * 148),
        # Seven stripes hold 4, 3 and 2 rows: the first of them makes two rows.
        (326, Way("stripes", 7), 64 + 96 + 64 + 74, 7 * (76 + 148)),
        (298, Way("stripes", 8), 176 + 74, 8 * (76 + 148)),
    ],
)
def test_what_stays_is_chosen_for_the_least_traffic(
    buffer_bytes: int, way: Way, need: int, fetched: int
) -> None:
    cascade = Cascade(two_convolutions(), buffer_bytes, slice_channels=1)
    found = cascade.best_way(0b11, ALONE)
    assert found is not None
    assert (found[0], found[1].buffer, found[1].weight) == (way, need, fetched)
    assert Cascade(two_convolutions(), 250, slice_channels=1).best_way(0b11, ALONE) is None


def test_pooling_and_a_scale_wait_for_the_whole_map_in_every_stripe() -> None:
    build = Builder()
    x = build.input((1, 1, 4, 4))
    pooled = build.op("pool", [(x, Window.reduce())], (1, 1, 1, 1))
    build.op("mul", [(x, IDENTITY), (pooled, IDENTITY)], (1, 1, 4, 4))
    run = Cascade(build.graph(), AMPLE).run_step(0b11, Way("stripes", 2))
    # The first stripe makes the pooled unit, so all of x is read; the scale stays to the end.
    assert run.units == {"x0": 4, "pool0": 1, "mul1": 2}


def test_a_map_that_only_a_reduction_reads_is_let_go_after_its_stripe() -> None:
    build = Builder()
    x = build.input((1, 1, 4, 4))
    body = build.conv(x, 1, kernel=3)
    build.op("pool", [(body, Window.reduce())], (1, 1, 1, 1))
    cascade = Cascade(build.graph(), AMPLE)
    # There is one unit at the end, so at most one stripe; by lines one row is enough.
    assert [w.count for w in cascade.ways(0b11) if w.kind == "stripes"] == [1, 1]
    assert cascade.run_step(0b11, Way("stripes", 1)).units == {"x0": 4, "conv0": 4, "pool1": 1}
    assert cascade.run_step(0b11, LINE).units == {"x0": 3, "conv0": 1, "pool1": 1}


def test_rows_that_a_stride_skips_are_still_held() -> None:
    """Every second row is picked, twice, and the one row that is left needs one of each."""
    build = Builder()
    x = build.input((1, 1, 4, 1))
    strided = build.op("pick", [(x, Window.sliding((1, 1), (2, 2)))], (1, 1, 2, 1))
    build.add(build.op("pick", [(strided, Window.sliding((1, 1), (2, 2)))], (1, 1, 1, 1)))
    graph = build.graph()
    run = Stripes(graph, 0b111, 1)
    # The last sum needs row 0 of the second, row 0 of the first, row 0 of x: one row is loaded.
    assert run.wanted(1) == {"x0": {0}, "pick0": {0}, "pick1": {0}, "add2": {0}}
    assert run.peak == {"x0": 1, "pick0": 1, "pick1": 1, "add2": 1}
    # Row 1 of the first, never made, counts as still to come: from row 2 of x on it needs all.
    assert run.released("x0", {"x0": {0, 1, 2}, "pick0": {0}}) == {0, 1}


def test_a_window_in_the_padding_needs_nothing() -> None:
    """Rows of a 1x1 window with padding 1: the first and the last lie outside."""
    build = Builder()
    x = build.input((1, 1, 2, 2))
    window = Window.sliding((1, 1), padding=(1, 1))
    build.op("conv", [(x, window)], (1, 1, 4, 4))
    run = Stripes(build.graph(), 1, 4)
    assert [len(run.wanted(stripe)["x0"]) for stripe in (1, 2, 3, 4)] == [0, 1, 2, 2]
    assert run.peak == {"x0": 1, "conv0": 1}


@pytest.mark.parametrize("way", [LINE, Way("stripes", 1), Way("slices", 2)])
def test_a_map_of_which_nothing_is_needed_has_room_for_one_row(way: Way) -> None:
    build = Builder()
    x = build.input((1, 1, 1, 2))
    window = Window.sliding((1, 1), (3, 3), padding=(1, 1))
    build.op("conv", [(x, window)], (1, 2, 1, 2), 4, mixes=True)
    run = Cascade(build.graph(), AMPLE).run_step(1, way)
    assert run.units == {"x0": 1, "conv0": 1}


# -- slices ----------------------------------------------------------------------------------------


def one_convolution() -> OpGraph:
    """Four rows of 8 bytes to four of 32; 8 channels, 24 bytes of weights."""
    build = Builder()
    build.conv(build.input((1, 2, 4, 4)), 8)
    return build.graph()


def test_slices_read_the_input_again() -> None:
    cascade = Cascade(one_convolution(), AMPLE)
    run = cascade.run_step(1, Way("slices", 3))
    assert (run.features, run.weights) == (8 + 32, 8)
    assert (run.read, run.write, run.weight) == (3 * 32, 128, 24)
    assert cascade.run_step(1, Way("slices", 5)).weights == 5  # 24 / 5, rounded up
    run = cascade.run_step(1, Way("slices", 3), touching("x0", first="x0"))
    assert (run.features, run.read) == (32 + 32, 32)
    run = cascade.run_step(1, Way("slices", 3), touching("x0", "conv0"))
    assert (run.features, run.read, run.write) == (32 + 128, 0, 128)


@pytest.mark.parametrize(
    ("buffer_bytes", "way", "need", "total"),
    [
        (65, LINE, 64, 32 + 128 + 24),  # 8 + 32 + 24
        (64, Way("slices", 2), 52, 2 * 32 + 128 + 24),
        (53, Way("slices", 2), 52, 2 * 32 + 128 + 24),
        (52, Way("slices", 3), 48, 3 * 32 + 128 + 24),
        # Slices of one row of weights each are the last resort of an operator.
        (44, Way("slices", 8), 43, 8 * 32 + 128 + 24),
    ],
)
def test_the_fewest_slices_that_fit(buffer_bytes: int, way: Way, need: int, total: int) -> None:
    cascade = Cascade(one_convolution(), buffer_bytes)
    found = cascade.best_way(1, ALONE)
    assert found is not None
    assert (found[0], found[1].buffer, found[1].total) == (way, need, total)
    assert not cascade.unfusable
    assert Cascade(one_convolution(), 43).unfusable == 1


def test_in_slices_nothing_is_in_place() -> None:
    build = Builder()
    build.op("prelu", [(build.input((1, 4, 3, 2)), IDENTITY)], (1, 4, 3, 2), 4, in_place=True)
    cascade = Cascade(build.graph(), AMPLE)
    assert cascade.run_step(1, LINE).features == 8
    run = cascade.run_step(1, Way("slices", 4), touching("x0", "prelu0", last=("x0", "prelu0")))
    assert (run.features, run.weights) == (24 + 24, 1)
    with pytest.raises(Illegal, match="does not run in 5 slices"):
        cascade.run_step(1, Way("slices", 5))


# -- writing over a resident -----------------------------------------------------------------------


def residual(kernel: int) -> Cascade:
    """z = x + f(x), eight rows of 32 bytes each."""
    build = Builder()
    x = build.input((1, 4, 8, 8))
    build.add(build.conv(x, 4, kernel=kernel), x)
    return Cascade(build.graph(), AMPLE, weight_bytes=0)


BOTH = touching("x0", "add1", first="x0", last=("x0", "add1"))


def test_a_sum_over_a_resident_operand() -> None:
    """A 1x1 convolution is done with row r of x when the sum writes row r: 256 instead of 512."""
    cascade = residual(1)
    assert cascade.run_step(0b11, LINE, BOTH, {}).features == 256 + 32 + 256
    run = cascade.run_step(0b11, LINE, BOTH)
    assert run.units == {"add1": 8, "conv0": 1}
    assert run.storage == {"x0": "add1", "conv0": "conv0", "add1": "add1"}
    assert run == cascade.run_step(0b11, LINE, BOTH, {"add1": "x0"})
    # In stripes of two rows the convolution keeps two.
    assert cascade.run_step(0b11, Way("stripes", 4), BOTH).units == {"add1": 8, "conv0": 2}


def test_a_sum_does_not_write_over_rows_that_are_still_needed() -> None:
    """A 3x3 convolution needs row r of x again when the sum writes row r, but for one stripe."""
    cascade = residual(3)
    for way in (LINE, Way("stripes", 8), Way("stripes", 2)):
        assert cascade.run_step(0b11, way, BOTH).units["x0"] == 8
        with pytest.raises(Illegal, match="cannot be written over"):
            cascade.run_step(0b11, way, BOTH, {"add1": "x0"})
    # In one stripe the convolution has run over the whole map before the sum begins.
    run = cascade.run_step(0b11, Way("stripes", 1), BOTH)
    assert run.units == {"add1": 8, "conv0": 8}


def test_what_else_forbids_to_write_over_an_operand() -> None:
    cascade = residual(1)
    for around in (
        touching("x0", "add1", last=("add1",)),  # a later step reads x
        touching("x0", last=("x0",)),
        touching("add1", last=("add1",)),
    ):
        run = cascade.run_step(0b11, LINE, around)
        assert run.storage["x0"] == "x0"
    build = Builder()
    x = build.input((1, 1, 4, 4))
    thin = build.input((1, 1, 1, 4))
    build.op("mul", [(x, IDENTITY), (thin, IDENTITY)], (1, 1, 4, 4))
    build.op("mix", [(x, IDENTITY)], (1, 1, 4, 4), mixes=True)
    build.op("shift", [(x, Window.sliding((3, 3), padding=(1, 1)))], (1, 1, 4, 4))
    wider = Cascade(build.graph(), AMPLE)
    everything = tuple(wider.graph.tensors)
    for i, over in enumerate((["x0"], [], [])):
        around = touching(*everything, last=everything)
        pairs = wider.overwritable(wider.schedule(1 << i), around)
        assert [x for several in pairs for x, _ in several] == over


def test_each_operator_writes_over_one_operand_and_each_operand_is_written_over_once() -> None:
    build = Builder()
    x, y = build.input((1, 1, 4, 4)), build.input((1, 1, 4, 4))
    build.add(x, y)
    graph = build.graph()
    cascade, around = Cascade(graph, AMPLE), touching(*graph.tensors, last=tuple(graph.tensors))
    assert cascade.overwritable(cascade.schedule(1), around) == [[("x0", "add0"), ("x1", "add0")]]
    assert cascade.run_step(1, LINE, around).features == 2 * 16
    # Two readers of one operand: neither may write over what the other needs later.
    build = Builder()
    x = build.input((1, 1, 4, 4))
    build.op("neg", [(x, IDENTITY)], (1, 1, 4, 4))
    build.op("abs", [(x, IDENTITY)], (1, 1, 4, 4))
    graph = build.graph()
    cascade, around = Cascade(graph, AMPLE), touching(*graph.tensors, last=tuple(graph.tensors))
    # They advance together and abs is last in each step: it may, neg may not.
    for way in (LINE, Way("stripes", 1), Way("stripes", 3)):
        run = cascade.run_step(0b11, way, around)
        assert run.storage == {"x0": "abs1", "neg0": "neg0", "abs1": "abs1"}
        assert run.features == 2 * 16


def test_writing_over_joins_chains_in_place() -> None:
    """conv, act, then a sum with x over act (or over x), then act: two storages of whole maps."""
    build = Builder()
    x = build.input((1, 1, 4, 4))
    build.act(build.add(build.act(build.conv(x, 1)), x))
    graph = build.graph()
    cascade = Cascade(graph, AMPLE, weight_bytes=0)
    assert cascade.run_step(0b1111, LINE).units == {"x0": 1, "act1": 1, "act3": 1}
    names = ("act1", "add2")
    run = cascade.run_step(0b1111, LINE, touching(*names, last=names))
    assert run.units == {"x0": 1, "act3": 4}
    assert {name for name in run.storage if run.storage[name] == "act3"} == {
        "conv0",
        "act1",
        "add2",
        "act3",
    }


@pytest.mark.parametrize("pool_first", [True, False])
def test_a_reduction_lets_go_at_once_by_lines_and_after_its_turn_in_stripes(
    pool_first: bool,
) -> None:
    build = Builder()
    x = build.input((1, 1, 4, 4))
    for kind in ("pool", "neg") if pool_first else ("neg", "pool"):
        if kind == "pool":
            build.op("pool", [(x, Window.reduce())], (1, 1, 1, 1))
        else:
            build.op("neg", [(x, IDENTITY)], (1, 1, 4, 4))
    graph = build.graph()
    names = tuple(graph.tensors)
    cascade, around = Cascade(graph, AMPLE), touching(*names, last=names)
    assert cascade.run_step(0b11, LINE, around).features == 16 + 1
    for count in (1, 2, 4):
        run = cascade.run_step(0b11, Way("stripes", count), around)
        assert run.features == (16 if pool_first else 32) + 1


def test_a_reader_has_let_go_of_rows_that_it_never_needs() -> None:
    """The second operator reads the last two of four rows, and stands after the one that writes.

    In four stripes it has made 0, 1, 1 and 2 rows when row 0, 1, 2 and 3 are written over, and
    needs x from row 2, 3, 3 and 4 on. In two it still needs row 3 when that is written over.
    """
    build = Builder()
    x = build.input((1, 1, 4, 4))
    build.op("neg", [(x, IDENTITY)], (1, 1, 4, 4))
    crop = Window.sliding((1, 1), padding=(-2, 0), padding_end=(0, 0))
    build.op("crop", [(x, crop)], (1, 1, 2, 4))
    graph = build.graph()
    names = tuple(graph.tensors)
    cascade, around = Cascade(graph, AMPLE), touching(*names, last=names)
    for way, features in ((LINE, 24), (Way("stripes", 4), 24), (Way("stripes", 2), 40)):
        assert cascade.run_step(0b11, way, around).features == features
