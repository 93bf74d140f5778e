"""Least time and energy of a sample, by the peak figures of an accelerator: estimates, no bounds
of what a chip will take.

The roofline model (Williams et al., CACM 2009) over whole networks: DRAM access and
multiply-accumulates (MACs) run at their peak rates and overlap perfectly, nothing else takes time,
and energy is that of DRAM access alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch_getfuse.accelerator import Accelerator
from torch_getfuse.partition.cost.scheme import Dram
from torch_getfuse.widths import Width

_PREFIXES = ((12, "T"), (9, "G"), (6, "M"), (3, "k"), (0, ""), (-3, "m"), (-6, "u"), (-9, "n"))


def with_prefix(value: float, unit: str, figures: int = 3) -> str:
    """``"300.8 MMACs"``, ``"1.17 ms"``: with a decimal prefix, unlike sizes in bytes."""
    rounded = float(f"{value:.{figures}g}")
    for exponent, prefix in _PREFIXES:
        if rounded >= 10.0**exponent:
            return f"{rounded / 10.0**exponent:.{figures}g} {prefix}{unit}"
    return f"{rounded:g} {unit}"


@dataclass(frozen=True)
class Estimates:
    """What the figures of an accelerator say of one sample; ``None`` where one is not given.

    Attributes:
        accelerator: whose figures these are.
        unfused, planned: DRAM access of the whole network, in bytes.
        macs: multiply-accumulates of the operators whose number is known; ``None`` if none is.
        widths: bytes of an activation and of a weight in the plan; ``None`` where they differ.
    """

    accelerator: Accelerator
    unfused: Dram
    planned: Dram
    macs: int | None
    widths: tuple[Width | None, Width | None]

    @property
    def known(self) -> bool:
        """Whether there is anything to tell."""
        return self.mac_seconds is not None or any(
            value is not None
            for dram in (self.unfused, self.planned)
            for value in (self.dram_seconds(dram), self.dram_joules(dram))
        )

    def moved(self, dram: Dram) -> int:
        """Bytes that cross to the memory outside; of read-only memory those of weights."""
        return dram.weight if self.accelerator.read_only else dram.total

    def dram_seconds(self, dram: Dram) -> float | None:
        """Least time of DRAM access."""
        rate = self.accelerator.dram_bytes_per_second
        return None if rate is None else self.moved(dram) / rate

    @property
    def mac_seconds(self) -> float | None:
        """Least time of the multiply-accumulates."""
        rate = self.accelerator.macs_per_second
        return None if rate is None or self.macs is None else self.macs / rate

    def dram_joules(self, dram: Dram) -> float | None:
        """Least energy of DRAM access."""
        energy = self.accelerator.dram_picojoules_per_byte
        return None if energy is None else self.moved(dram) * energy * 1e-12

    def bound(self, dram: Dram) -> str | None:
        """``"dram"`` or ``"macs"``, whichever takes longer; ``None`` unless both are known."""
        access, compute = self.dram_seconds(dram), self.mac_seconds
        if access is None or compute is None:
            return None
        return "dram" if access >= compute else "macs"

    def assumptions(self) -> str:
        """What the estimates leave out, in words."""
        target = self.accelerator
        told = (
            f"peak figures of {target.name}; DRAM access and MACs at the same time; one sample; no "
            "other work, traffic or energy"
        )
        if target.read_only:
            told += "; of its memory outside, which is read-only flash, the reads of weights alone"
        own = (target.activation_bytes, target.weight_bytes)
        if self.mac_seconds is not None and self.widths != own:
            told += (
                f"; its MAC rate is for activations of {own[0]} B and weights of {own[1]} B, which "
                "are not the plan's"
            )
        return told

    # -- forms ----------------------------------------------------------------------------

    def facts(self) -> list[list[str]]:
        """Rows of a name and a text."""
        memory = "flash reads" if self.accelerator.read_only else "DRAM access"
        times, energy = [], self.accelerator.dram_picojoules_per_byte
        if (rate := self.accelerator.dram_bytes_per_second) is not None:
            pair = self._pair(self.dram_seconds(self.unfused), self.dram_seconds(self.planned), "s")
            times.append(f"{memory} {pair} at {rate / 1e9:g} GB/s")
        if self.mac_seconds is not None:
            rate = self.accelerator.macs_per_second
            assert rate is not None
            shown = with_prefix(self.mac_seconds, "s")
            times.append(f"MACs {shown} at {rate / 1e9:g} G a second")
        rows = []
        if times:
            rows.append(["estimate: least time", "; ".join(times) + self._bound(memory)])
        if energy is not None:
            pair = self._pair(self.dram_joules(self.unfused), self.dram_joules(self.planned), "J")
            rows.append(["estimate: least energy", f"{memory} {pair} at {energy:g} pJ per byte"])
        return [*rows, ["estimates assume", self.assumptions()]]

    @staticmethod
    def _pair(unfused: float | None, planned: float | None, unit: str) -> str:
        assert unfused is not None
        assert planned is not None
        one, other = with_prefix(unfused, unit), with_prefix(planned, unit)
        return one if one == other else f"{one} -> {other}"

    def _bound(self, memory: str) -> str:
        """Which of the two takes longer, unfused and planned."""
        names = {"dram": memory, "macs": "MACs"}
        before, after = self.bound(self.unfused), self.bound(self.planned)
        if before is None or after is None:
            return ""
        if before == after:
            return f": bound by {names[after]}"
        return f": bound by {names[before]} unfused, by {names[after]} as planned"

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, in seconds and joules."""
        sides = {"unfused": self.unfused, "planned": self.planned}
        return {
            "accelerator": self.accelerator.name,
            "dram_seconds": {name: self.dram_seconds(dram) for name, dram in sides.items()},
            "mac_seconds": self.mac_seconds,
            "bound": {name: self.bound(dram) for name, dram in sides.items()},
            "dram_joules": {name: self.dram_joules(dram) for name, dram in sides.items()},
            "assumptions": self.assumptions(),
        }
