"""docs/accelerators.md has the figures of every preset."""

from __future__ import annotations

from pathlib import Path

from torch_getfuse.accelerator import ACCELERATORS, Accelerator, format_size

PAGE = Path(__file__).parents[1] / "docs" / "accelerators.md"


def row(preset: Accelerator) -> str:
    rates = (preset.dram_bytes_per_second, preset.macs_per_second)
    cells = [
        f"`{preset.name}`",
        format_size(preset.buffer_bytes),
        f"{preset.activation_bytes} B, {preset.weight_bytes} B",
        *("not given" if rate is None else f"{rate / 1e9:g} G" for rate in rates),
        preset.source,
    ]
    return f"| {' | '.join(cells)} |"


def test_the_page_lists_every_preset_as_it_is() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert rows == [row(preset) for preset in ACCELERATORS.values()]
