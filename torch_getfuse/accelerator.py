"""On-chip buffers: sizes as people type them, and named accelerators with their sources."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass

from torch_getfuse.errors import OptionError, nearest, shown
from torch_getfuse.limits import MOST, MOST_POSITIONS, MOST_WIDTH
from torch_getfuse.widths import Width, as_width, not_a_width

KB = 1024
MB = 1024 * KB
_UNITS = {
    unit + tail: size
    for unit, size in (("K", KB), ("M", MB), ("G", 1024 * MB))
    for tail in ("", "B", "IB")
} | {"B": 1}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_size(size: int | str) -> int:
    """Bytes of ``"256KB"``, ``"1.5 MiB"``, ``"64k"``, ``"4096"`` or a number.

    K, KB and KiB are all 1024 B, M 1024 K, G 1024 M, in small letters or capitals.

    Raises:
        OptionError: for anything else, for less than one byte and for fractions of a byte.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise OptionError(f"{size!r} is no size: give bytes as an int, or text like '256KB'")
    if isinstance(size, int):
        total: float = size
    else:
        match = _SIZE.fullmatch(size)
        if match is None or (match[2] or "B").upper() not in _UNITS:
            raise OptionError(f"{size!r} is no size in bytes, KB, MB or GB, like '256KB'")
        total = float(match[1]) * _UNITS[(match[2] or "B").upper()]
    if total < 1:
        raise OptionError(f"{size!r} is no size: at least one whole byte is needed")
    if total > MOST:
        raise OptionError(f"{shown(size)} is no size: it is above {MOST} bytes, the most there is")
    if total != int(total):
        raise OptionError(
            f"{size!r} is no size: {total:g} bytes are no whole number; type {math.ceil(total)}"
        )
    return int(total)


def format_size(size: int) -> str:
    """``"1.50 MB"``, ``"36.8 KB"``, ``"512 B"``: at least three figures, 1024-based."""
    if abs(size) < KB:
        return f"{size} B"
    value, unit = (size / KB, "KB") if abs(size) < MB else (size / MB, "MB")
    if value == int(value):
        return f"{int(value)} {unit}"
    return f"{value:.{max(0, 3 - len(str(int(abs(value)))))}f} {unit}"


def format_width(weight_bytes: Width | None) -> str:
    """``"4 B per weight"``, that each counts at the width it is stored in, or that none does."""
    if weight_bytes is None:
        return "weights as stored"
    if not weight_bytes:
        return "weights read in place (0 B: they cost neither DRAM access nor buffer)"
    return f"{weight_bytes} B per weight"


def format_activations(activation_bytes: Width | None, align_channels: int = 1) -> str:
    """``"1 B per activation"``, or that each tensor counts at its own; and how channels lie."""
    width = "activations as stored"
    if activation_bytes is not None:
        width = f"{activation_bytes} B per activation"
    return width if align_channels == 1 else f"{width}, channels in multiples of {align_channels}"


def checked_width(value: object, name: str, zero: bool = False) -> Width:
    """Bytes of an element, whole numbers as ``int``.

    Args:
        name: what the message begins with.
        zero: whether 0 is one.

    Raises:
        OptionError: for what is no multiple of 1/8 byte, or 0, and for what is too wide.
    """
    width = as_width(value)
    if width is None or (not width and not zero):
        raise OptionError(f"{name}={shown(value)} {not_a_width(value, zero)}")
    if width > MOST_WIDTH:
        raise OptionError(
            f"{name}={shown(value)} is above {MOST_WIDTH} bytes, the widest element that is taken"
        )
    return width


def checked_count(value: object, name: str, unit: str, most: int = MOST_POSITIONS) -> int:
    """A number of ``unit`` from 1 up.

    Args:
        name: what the message begins with.
        unit: what is counted, in the plural.
        most: the largest that is taken.

    Raises:
        OptionError: for what is no whole number, or out of its range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name}={shown(value)} is not a whole number of {unit} from 1 up")
    if value > most:
        raise OptionError(f"{name}={shown(value)} is above {most} {unit}, the most that is taken")
    return value


def format_buffer(size: int) -> str:
    """A buffer of at least ``size`` bytes, as people choose one: ``"433 B"``, ``"24 KB"``."""
    if size < KB:
        return f"{size} B"
    unit, name = (KB, "KB") if size < 10 * MB else (MB, "MB")
    return f"{-(-size // unit)} {name}"


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A buffer and element widths to plan for: ``plan(model, (x,), accelerator=Accelerator(...))``.

    Attributes:
        name: what people type, for one of the presets.
        buffer_bytes: the on-chip buffer ``B`` that fusion groups must fit.
        activation_bytes, weight_bytes: element widths of its arithmetic, multiples of 1/8; 0 for
            weights that are read where they are stored.
        source: where the figures are public.
        align_channels: it stores feature maps with channels padded to a multiple of this.
        dram_bytes_per_second: peak bandwidth of the memory outside; ``None`` where not known.
        dram_picojoules_per_byte: energy of moving a byte from or to it; ``None`` likewise.
        macs_per_second: peak rate of multiply-accumulates; ``None`` likewise.
        read_only: the memory outside is one that is only read (flash): weights come from it,
            feature maps cannot go there.

    Raises:
        OptionError: for sizes that are no whole number from 1 up, for other widths, and for rates
            and energies that are no finite number above 0.
    """

    name: str
    buffer_bytes: int
    activation_bytes: Width
    weight_bytes: Width
    source: str = ""
    align_channels: int = 1
    dram_bytes_per_second: float | None = None
    dram_picojoules_per_byte: float | None = None
    macs_per_second: float | None = None
    read_only: bool = False

    def __post_init__(self) -> None:
        own = f"Accelerator {self.name!r}: "
        checked_count(self.buffer_bytes, f"{own}buffer_bytes", "bytes", MOST)
        checked_count(self.align_channels, f"{own}align_channels", "channels")
        for name, zero in (("activation_bytes", False), ("weight_bytes", True)):
            width = checked_width(getattr(self, name), own + name, zero)
            object.__setattr__(self, name, width)
        for name in ("dram_bytes_per_second", "dram_picojoules_per_byte", "macs_per_second"):
            rate = getattr(self, name)
            if rate is None:
                continue
            number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
            if not number or not 0 < rate <= sys.float_info.max:  # an int may be larger
                raise OptionError(
                    f"{own}{name}={shown(rate)} is not a finite number above 0; leave it out where "
                    "it is not known"
                )


_VELA = "ethos-u-vela 5.2.0, config_files/Arm/vela.ini"
_KIT = "Arm ML embedded evaluation kit"


def _ethos(core: str, macs: int, buffer_bytes: int, system: _System, sram: str) -> Accelerator:
    """An Arm Ethos-U in the memory system that Arm's own tools take for it.

    Args:
        core: ``"u55"``, ``"u65"`` or ``"u85"``.
        macs: multiply-accumulates of 8-bit numbers per cycle.
        system: clock and memory outside of one of Vela's system configurations.
        sram: where the size of the SRAM is from.
    """
    return Accelerator(
        f"ethos-{core}-{macs}",
        buffer_bytes,
        1,
        1,
        f"{_VELA}, {system.section}: {system.clock_hz / 1e6:g} MHz, {system.memory} at "
        f"{system.bytes_per_second / 1e9:g} GB/s; {sram}; {macs} MACs of 8 bits a cycle; "
        "channels in blocks of 16 (NHCWB16)",
        align_channels=16,
        dram_bytes_per_second=system.bytes_per_second,
        macs_per_second=macs * system.clock_hz,
        read_only=system is _U55_SYSTEM,
    )


@dataclass(frozen=True, slots=True)
class _System:
    """A section of vela.ini: clock, and peak bandwidth of the memory outside.

    Bandwidth is clock, times bytes of the AXI port (8 of the U55, 16 of the others), times
    ``*_clock_scale`` (``architecture_features.py``); the comments of vela.ini give the same.
    """

    section: str
    clock_hz: float
    memory: str
    bytes_per_second: float


_U55_SYSTEM = _System("Ethos_U55_High_End_Embedded", 500e6, "read-only flash", 0.5e9)
_U65_SYSTEM = _System("Ethos_U65_High_End", 1e9, "DRAM", 3.75e9)
_U85_SYSTEM = _System("Ethos_U85_SYS_DRAM_Mid", 1e9, "DRAM", 12e9)
_SHARED = f"{_KIT}, Vela command of its examples: Shared_Sram, --arena-cache-size=2097152"
_DEDICATED = "Dedicated_Sram_384KB: arena_cache_size=393216"


_PAPER = "arXiv 2501.00636, evaluation section; one byte per element is ours (docs/method.md)"
ACCELERATORS: dict[str, Accelerator] = {
    preset.name: preset
    for preset in (
        *(
            Accelerator(f"getfuse-{kb}", kb * KB, 1, 1, _PAPER)
            for kb in (128, 256, 512, 1024, 2048)
        ),
        *(_ethos("u55", macs, 2 * MB, _U55_SYSTEM, _SHARED) for macs in (32, 64, 128, 256)),
        *(_ethos("u65", macs, 384 * KB, _U65_SYSTEM, _DEDICATED) for macs in (256, 512)),
        *(
            _ethos("u85", macs, 384 * KB, _U85_SYSTEM, _DEDICATED)
            for macs in (128, 256, 512, 1024, 2048)
        ),
        Accelerator(
            "eyeriss-v1",
            108 * KB,
            2,
            2,
            "Chen et al., Eyeriss, JSSC 2017: 108 KB global buffer, 16-bit fixed point, peak of "
            "33.6 GMAC/s at 200 MHz (section VI)",
            macs_per_second=33.6e9,
        ),
        Accelerator(
            "eyeriss-v2",
            192 * KB,
            1,
            1,
            "Chen et al., Eyeriss v2, JETCAS 2019: 192 KB global buffer, 8-bit fixed point, 192 "
            "PEs of 2 MACs a cycle at 200 MHz",
            macs_per_second=192 * 2 * 200e6,
        ),
        Accelerator(
            "simba-chiplet",
            64 * KB,
            1,
            1,
            "Shao et al., Simba, MICRO 2019: 64 KB global buffer per chiplet, 8-bit, peak of "
            "4 TOPS per chiplet (2 operations a MAC)",
            macs_per_second=2e12,
        ),
        Accelerator(
            "edge-tpu",
            8 * MB,
            1,
            1,
            "Google, coral.ai documentation: about 8 MB of SRAM on the Edge TPU, 8-bit; its FAQ: "
            "4 TOPS (2 operations a MAC)",
            macs_per_second=2e12,
        ),
        Accelerator(
            "tpu-v1",
            24 * MB,
            1,
            1,
            "Jouppi et al., ISCA 2017: 24 MiB Unified Buffer, 8-bit, 65,536 MACs a cycle at "
            "700 MHz, DDR3 weight memory at 34 GB/s",
            dram_bytes_per_second=34e9,
            macs_per_second=65536 * 700e6,
        ),
        Accelerator(
            "gap8-l2",
            512 * KB,
            1,
            1,
            "GreenWaves GAP8 product brief: 512 KB of L2 memory, 8-bit inference",
        ),
        Accelerator(
            "nvdla-small",
            128 * KB,
            1,
            1,
            "NVIDIA, github.com/nvdla/hw, spec/defs/nv_small.spec: convolution buffer of 32 banks "
            "of 512 rows of 8 B; feature maps in memory atoms of 8 B",
            align_channels=8,
        ),
        Accelerator(
            "nvdla-large",
            512 * KB,
            1,
            1,
            "NVIDIA, github.com/nvdla/hw, spec/defs/nv_large.spec: convolution buffer of 16 banks "
            "of 512 rows of 64 B; INT8; feature maps in memory atoms of 32 B",
            align_channels=32,
        ),
        Accelerator(
            "stm32n6",
            4 * 448 * KB,
            1,
            1,
            "ST, STM32N6-GettingStarted-ImageClassification, Neural-ART description: NPU RAM is "
            "AXISRAM3 to AXISRAM6, 448 KB each in the device's memory map; blog.st.com/stm32n6: "
            "600 GOPS (2 operations a MAC)",
            macs_per_second=300e9,
        ),
        Accelerator(
            "k210-kpu",
            2 * MB,
            1,
            1,
            "Canaan, FAQ of nncase (github.com/kendryte/nncase): feature maps in 2 MB of KPU "
            "memory, weights outside it in 6 MB of general memory (both SRAM); 8-bit",
        ),
        Accelerator(
            "max78002",
            1_300_000,
            1,
            0,
            "Zephyr, boards/adi/max78002evkit: 1.3 MB of CNN data memory (taken as 1,300,000 B); "
            "weights of 8 bits in a memory of their own, 2 million at most",
        ),
    )
}


def accelerator(name: str) -> Accelerator:
    """The preset of a name; raises :class:`OptionError` with the nearest one."""
    if name in ACCELERATORS:
        return ACCELERATORS[name]
    hint = nearest(str(name), ACCELERATORS)
    raise OptionError(
        f"accelerator={shown(name)} is not known{hint} (torch-getfuse accelerators lists the "
        "presets)"
    )
