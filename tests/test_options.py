"""Options, sizes and presets: every wrong value has one clear line."""

from __future__ import annotations

import pytest

from torch_getfuse.accelerator import (
    ACCELERATORS,
    Accelerator,
    accelerator,
    format_size,
    parse_size,
)
from torch_getfuse.cli.options import _option_help
from torch_getfuse.errors import OptionError
from torch_getfuse.options import CHOICES, Options
from torch_getfuse.partition.cost.lbdf.model import GRANULARITIES
from torch_getfuse.partition.cost.registry import SCHEMES


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256KB", 262144),
        ("1MB", 1 << 20),
        ("1.5 kb", 1536),
        ("4096", 4096),
        (77, 77),
        ("2GB", 2**31),
    ],
)
def test_sizes_are_1024_based(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "0KB",
        "12XB",
        "",
        "-3KB",
        "KB",
        "1.0001KB",
        0,
        -5,
        True,
        None,
        10**5000,
        "9" * 400,
        2**60 + 1,
    ],
    ids=range(13),
)
def test_wrong_sizes_are_refused(text: object) -> None:
    with pytest.raises(OptionError, match=r"size"):
        parse_size(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (512, "512 B"), (1024, "1 KB"), (37683, "36.8 KB"), (1572864, "1.50 MB")],
)
def test_sizes_as_text(size: int, text: str) -> None:
    assert format_size(size) == text


def test_the_choices_are_what_the_package_offers() -> None:
    assert CHOICES["scheme"] == SCHEMES
    assert CHOICES["granularity"] == GRANULARITIES


def test_defaults() -> None:
    options = Options.of({})
    assert options.buffer_bytes == 256 * 1024
    assert (options.scheme, options.granularity, options.method) == ("lbdf", "line", "auto")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bufer": "1KB"}, "unknown option 'bufer'; did you mean 'buffer'"),
        ({"buffer": "12XB"}, "buffer='12XB'.*256KB"),
        ({"buffer": "0KB"}, "buffer='0KB'.*at least one whole byte"),
        ({"scheme": "lbfd"}, "scheme='lbfd' is not one of .*did you mean 'lbdf'"),
        ({"scheme": "optimus"}, "scheme='optimus' is not one of 'lbdf', 'brr'"),
        ({"granularity": "pixels"}, "did you mean 'pixel'"),
        ({"method": "exakt"}, "did you mean 'exact'"),
        ({"activation_bytes": 0}, "activation_bytes=0"),
        ({"weight_bytes": 1.3}, "weight_bytes=1.3 is not a multiple of .*1.25 and 1.375"),
        ({"weight_bytes": -1}, "weight_bytes=-1"),
        ({"activation_bytes": 0.01}, "activation_bytes=0.01.*0.125 is near"),
        ({"activation_bytes": float("nan")}, "activation_bytes=nan"),
        ({"activation_bytes": True}, "activation_bytes=True"),
        ({"align_channels": 0}, "align_channels=0"),
        ({"align_channels": 1.5}, "align_channels=1.5"),
        ({"time_limit": -1}, "time_limit=-1"),
        ({"strict": "yes"}, "strict='yes'"),
        ({"accelerator": "eyeris-v1"}, "did you mean 'eyeriss-v1'"),
        ({"plan": ""}, "plan=''"),
        ({"inner": ""}, "inner=''"),
        ({"inner": 3}, "inner=3 is not 'auto', 'eager'"),
        ({"backward": "yes"}, "backward='yes'"),
        ({"cache": ""}, "cache=''"),
        ({"cache": 1}, "cache=1"),
    ],
)
def test_wrong_options_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Options.of(given)


def test_unknown_accelerators_and_the_help_say_what_lists_them() -> None:
    for name in ("mychip", "zzz"):
        with pytest.raises(
            OptionError, match=r"not known.*torch-getfuse accelerators lists the pres"
        ):
            Options(accelerator=name)
    assert "its name (torch-getfuse accelerators lists them)" in _option_help()["accelerator"]


def test_an_accelerator_sets_what_is_not_given() -> None:
    options = Options.of({"accelerator": "eyeriss-v1", "weight_bytes": 1})
    assert (options.buffer_bytes, options.activation_bytes, options.weight_bytes) == (110592, 2, 1)


def test_every_preset_has_a_source() -> None:
    assert all(
        preset.source and accelerator(name) is preset for name, preset in ACCELERATORS.items()
    )
    assert {128, 256, 512, 1024, 2048} <= {p.buffer_bytes // 1024 for p in ACCELERATORS.values()}


# Name -> buffer, bytes and multiply-accumulates a second. The rates are the product of core_clock,
# bytes of the AXI port and clock_scale of ethos-u-vela 5.2.0's vela.ini.
ETHOS = {
    "ethos-u55-32": (2097152, 500e6 * 8 * 0.125, 32 * 500e6),
    "ethos-u55-256": (2097152, 500e6 * 8 * 0.125, 256 * 500e6),
    "ethos-u65-512": (393216, 1e9 * 16 * 0.234375, 512 * 1e9),
    "ethos-u85-128": (393216, 1e9 * 16 * 0.75, 128 * 1e9),
    "ethos-u85-2048": (393216, 1e9 * 16 * 0.75, 2048 * 1e9),
}


@pytest.mark.parametrize("name", ETHOS)
def test_ethos_presets_have_the_figures_of_vela(name: str) -> None:
    preset = accelerator(name)
    found = (preset.buffer_bytes, preset.dram_bytes_per_second, preset.macs_per_second)
    assert found == ETHOS[name]
    assert (preset.activation_bytes, preset.weight_bytes) == (1, 1)
    assert preset.dram_picojoules_per_byte is None  # Vela has none


RATES = ("dram_bytes_per_second", "dram_picojoules_per_byte", "macs_per_second")


@pytest.mark.parametrize("field", RATES)
def test_rates_of_an_accelerator_are_finite_numbers_above_0(field: str) -> None:
    assert getattr(Accelerator("chip", 4096, 1, 1, **{field: 2.5}), field) == 2.5
    for wrong in (0, -1.0, float("nan"), float("inf"), "3e9", True):
        with pytest.raises(OptionError, match=rf"Accelerator 'chip': {field}=.* above 0; leave it"):
            Accelerator("chip", 4096, 1, 1, **{field: wrong})
