"""``torch-getfuse accelerators``: the presets of ``--accelerator``, or those of a TOML file."""

from __future__ import annotations

import argparse
import dataclasses

from torch_getfuse.accelerator import ACCELERATORS, Accelerator, format_size
from torch_getfuse.accelerator_file import load_accelerators
from torch_getfuse.cli.command import Command, print_json
from torch_getfuse.cli.completers import completed_by, files

_COLUMNS = (
    "name",
    "buffer",
    "activation, weight",
    "channels",
    "DRAM B/s",
    "DRAM pJ/B",
    "MAC/s",
)


def run(args: argparse.Namespace) -> int:
    """Print the presets; returns the exit code."""
    presets = ACCELERATORS if args.file is None else load_accelerators(args.file)
    if args.json:
        print_json([dataclasses.asdict(preset) for preset in presets.values()])
        return 0
    from torch_getfuse.reporting.export import plain
    from torch_getfuse.terminal import text_width, uses_colour

    rows = [_row(preset) for preset in presets.values()]
    style = plain(text_width(), uses_colour())
    print(style.table(rows, _COLUMNS, "l" * len(_COLUMNS), (2,)))
    print(f"\n{style.heading('Sources')}\n")
    named: dict[str, list[str]] = {}
    for preset in presets.values():
        named.setdefault(preset.source or "not given", []).append(preset.name)
    for source, names in named.items():
        print(style.paragraph(f"{', '.join(names)}: {source}"))
    return 0


def _row(preset: Accelerator) -> tuple[str, ...]:
    aligned = preset.align_channels
    return (
        preset.name,
        format_size(preset.buffer_bytes),
        f"{preset.activation_bytes} B, {preset.weight_bytes} B",
        "as they are" if aligned == 1 else f"blocks of {aligned}",
        *(
            "not given" if rate is None else f"{rate / scale:g}{unit}"
            for rate, scale, unit in (
                (preset.dram_bytes_per_second, 1e9, " G"),
                (preset.dram_picojoules_per_byte, 1, ""),
                (preset.macs_per_second, 1e9, " G"),
            )
        ),
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    file = parser.add_argument(
        "file", metavar="FILE.toml", nargs="?", help="list the presets of this file instead"
    )
    completed_by(file, files(".toml"))
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


COMMAND = Command(
    "accelerators",
    "list the presets of --accelerator, or those of a TOML file of your own",
    "accelerators chips.toml",
    _arguments,
    run,
)
