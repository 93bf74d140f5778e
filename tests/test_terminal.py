"""Width, colours and wrapping of printed text."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_getfuse.reporting.export import MARKDOWN, plain
from torch_getfuse.terminal import (
    HELD_SPACE,
    Mark,
    Marked,
    hanging,
    numbers,
    share,
    text_width,
    uses_colour,
    wrap,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 120 columns, where it is asked for."""
    answer = os.terminal_size((120, 30))
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_: answer)


@pytest.mark.usefixtures("size")
def test_width(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    assert (text_width(pipe), text_width(Terminal())) == (100, 120)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert text_width() == 120
    for columns, width in (("90", 90), ("20", 80), ("500", 160), ("0", 100), ("wide", 100)):
        monkeypatch.setenv("COLUMNS", columns)
        assert text_width(pipe) == width, columns


@pytest.mark.parametrize(
    ("settings", "pipe", "terminal"),
    [
        ({}, False, True),
        ({"TERM": "dumb"}, False, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, False, True),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, True, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_colour(
    settings: dict[str, str], pipe: bool, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert uses_colour(io.StringIO()) is pipe
    assert uses_colour(Terminal()) is terminal


WORDS = st.one_of(
    st.text("abcdefg.", min_size=1, max_size=30).filter(lambda word: ".." not in word),
    st.tuples(st.integers(0, 9999), st.sampled_from(["B", "KB", "MB", "ms", "ops)", "GMACs"])).map(
        lambda pair: f"{pair[0] / 10:g} {pair[1]}"
    ),
)


@given(st.lists(WORDS, min_size=1, max_size=12), st.integers(14, 60))
def test_lines_keep_to_the_width_and_numbers_to_their_units(words: list[str], width: int) -> None:
    lines = wrap(" ".join(words), width)
    assert max(map(len, lines)) <= width
    for word in words:
        if re.match(r"\d", word) or len(word) <= width:
            assert any(word in line for line in lines)
    if not any("..." in line for line in lines):
        assert "".join(lines).replace(" ", "") == "".join(words).replace(" ", "")


def test_long_names_are_wrapped_at_their_dots() -> None:
    name = "features.denseblock4.denselayer16.conv2"
    assert wrap(f"{name}: 3.5 KB over", 24) == [
        "features.denseblock4.",
        "denselayer16.conv2:",
        "3.5 KB over",
    ]
    assert wrap(name, 39) == [name]
    assert wrap("aten._scaled_dot_product_attention", 20) == [
        "aten._scaled_dot_",
        "product_attention",
    ]
    assert wrap("abcdefghijklmnopqrstuvwxyz", 11) == ["abcd...wxyz"]
    assert wrap("3 x features.0 .. features.1 (2 ops)", 16) == [
        "3 x",
        "features.0 ..",
        "features.1",
        "(2 ops)",
    ]
    assert wrap(HELD_SPACE * 2 + "features.denseblock4", 13) == ["  features.", "denseblock4"]


def test_hanging_lines() -> None:
    assert hanging("one two three", 9, "- ", "  ") == ["- one two", "  three"]


def test_numbers_of_groups() -> None:
    assert numbers([3]) == "3"
    assert numbers([0, 1, 2, 5]) == "0-2, 5"
    assert numbers([12, 16]) == "12, 16"
    assert numbers([22, 24, 26]) == "22, 24, 26"
    assert numbers([1, 4, 7, 10, 20]) == "1, 4 .. 10, 20"
    assert numbers([]) == ""


def test_tables_fit_and_move_columns_below() -> None:
    rows = [["0", "features.0.0 .. features.2.conv.2 (10 ops)", "249 KB", "next " * 12 + "x"]]
    headers = ("group", "operators", "buffer", "why it ends")
    wide = plain(160).table(rows, headers, "llrl", below=(1, 3)).splitlines()
    assert wide[0].split("  ")[-1] == "why it ends"
    narrow = plain(80).table(rows, headers, "llrl", below=(1, 3)).splitlines()
    assert narrow[1] == "    why it ends"
    assert narrow[3].split() == [*rows[0][0].split(), *rows[0][1].split(), "249", "KB"]
    assert narrow[4].startswith("    next next")
    least = plain(50).table(rows, headers, "llrl", below=(1, 3)).splitlines()
    assert least[:5] == [
        "group  buffer",
        "    operators",
        "    why it ends",
        "-----  ------",
        "0      249 KB",
    ]
    assert least[5] == "    features.0.0 .. features.2.conv.2 (10 ops)"
    assert MARKDOWN.table(rows, headers, "llrl", below=(1, 3)).count("\n") == 2


def test_a_crowded_table_has_its_columns_closer_together() -> None:
    rows = [[str(k) * 8 for k in range(9)]]
    headers = ["two words", *["name"] * 8]
    table = plain(80).table(rows, headers, "r" * 9).splitlines()
    assert [line.rstrip() for line in table[:2]] == [
        "     two     name     name     name     name     name     name     name     name",
        "   words",
    ]
    assert max(map(len, table)) == 9 * 8 + 8
    with_room = plain(90).table(rows, headers, "r" * 9).splitlines()
    assert with_room[0].startswith("two words      name")


def test_colours_change_nothing_but_colours() -> None:
    rows = [["a", Marked("12 KB (50.0%)", Mark.SAVED)], ["bb", Marked("x " * 60, Mark.OVER)]]
    painted = plain(80, colour=True).table(rows, ("name", "text"), "lr", (1,))
    bare = re.sub(r"\x1b\[[0-9;]*m", "", painted)
    assert bare == plain(80).table(rows, ("name", "text"), "lr", (1,))
    assert "\x1b[32m12 KB (50.0%)\x1b[0m" in painted
    for line in painted.splitlines():
        assert line.count("\x1b[31m") == line.count("\x1b[0m") - line.count("\x1b[32m")
    assert "\x1b" not in MARKDOWN.table(rows, ("name", "text"), "lr")


def test_shares_are_marked_near_the_limit() -> None:
    marks = [getattr(share(used, 100), "mark", None) for used in (89, 90, 99, 100, 120)]
    assert marks == [None, Mark.NEAR, Mark.NEAR, Mark.OVER, Mark.OVER]
    assert share(50, 100) == "50.0%"
