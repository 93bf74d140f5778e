"""What a plan from outside is worth, as an object that prints and exports.

Text formats use human-readable sizes (1024-based), data formats integer bytes.
:mod:`torch_getfuse.price_graph` computes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch_getfuse.accelerator import format_activations, format_size, format_width
from torch_getfuse.atomic_files import replace_text
from torch_getfuse.partition.cost.scheme import CostTerm, Dram
from torch_getfuse.partition.plan import PartitionPlan
from torch_getfuse.reporting.blame import dram_dict
from torch_getfuse.reporting.export import (
    MARKDOWN,
    PLAIN,
    Style,
    compact,
    counted,
    features,
)
from torch_getfuse.reporting.section import Section
from torch_getfuse.reporting.suffixes import APPRAISAL, known_suffix

SCHEMA_VERSION = 1
_TERMS = 8  # of each group, in the data formats


@dataclass(frozen=True)
class PricedGroup:
    """One group of a plan from outside.

    Attributes:
        ops: its operators in topological order, those that the names select.
        problems: why it is no legal group, one sentence each; empty for a legal one.
        buffer_bytes: ``F_b``; ``None`` where the cost model has no schedule for it.
        dram: of a legal group what it moves; else what crosses its border and its weights, once.
        terms: what fills the buffer, largest first.
        way: how it runs, as a step of a cascade plan; empty under other schemes.
    """

    ops: tuple[str, ...]
    problems: tuple[str, ...]
    buffer_bytes: int | None
    dram: Dram
    terms: tuple[CostTerm, ...]
    way: str = ""

    @property
    def legal(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values; sizes in bytes."""
        return {
            "ops": list(self.ops),
            "legal": self.legal,
            "problems": list(self.problems),
            "buffer_bytes": self.buffer_bytes,
            **dram_dict(self.dram),
            "terms": [
                {"kind": term.kind, "name": term.name, "bytes": term.bytes}
                for term in self.terms[:_TERMS]
            ],
            **({"way": self.way} if self.way else {}),
        }


@dataclass(frozen=True)
class Appraisal:
    """A plan from outside under a cost model of this package.

    Attributes:
        groups: in the order in which they were given.
        problems: what is wrong with the plan as a whole, one sentence each.
        plan: the priced plan, where it is legal: it can be reported, split and run like any other.
            Its bound is that of :attr:`best`.
        best: our plan for the same graph, options and pins.
        residents_exact: whether ways and resident tensors of the given steps are proved to be the
            best (cascade); ``None`` under other schemes and for a plan that is not legal.
    """

    groups: tuple[PricedGroup, ...]
    problems: tuple[str, ...]
    plan: PartitionPlan | None
    best: PartitionPlan
    residents_exact: bool | None = None

    @property
    def legal(self) -> bool:
        """Whether it is a legal plan (docs/method.md, section 1)."""
        return self.plan is not None

    @cached_property
    def _ours(self) -> Section:
        return Section(self.best)

    @cached_property
    def network(self) -> Dram | None:
        """DRAM access of the whole network under the plan, per sample; ``None`` if not legal."""
        return None if self.plan is None else Section(self.plan).network_planned

    @property
    def unfused(self) -> Dram:
        """DRAM access of the whole network with every operator alone, per sample."""
        return self._ours.network_unfused

    @property
    def ours(self) -> Dram:
        """DRAM access of the whole network under :attr:`best`, per sample."""
        return self._ours.network_planned

    @property
    def above_best(self) -> float | None:
        """How far the plan is above :attr:`best`, as a fraction of it; negative if below."""
        total = None if self.network is None else self.network.total
        return None if total is None or not self.ours.total else total / self.ours.total - 1

    @property
    def above_optimum(self) -> float | None:
        """How far it can be above the optimum of the whole network at most; ``None`` if unknown."""
        bound = self._ours.lower_bound
        return None if self.network is None or not bound else self.network.total / bound - 1

    @property
    def distance(self) -> str:
        """How far it is from the optimum, in words."""
        if self.network is None or self.above_best is None:
            return "none: what is not legal has no distance"
        standing = self.best.standing
        if self.best.proof == "optimal":
            if self.network.total == self.ours.total:
                return f"optimal ({standing})"
            return f"{self.above_best:.1%} above the optimum ({standing})"
        side = "above" if self.above_best >= 0 else "below"
        text = f"{abs(self.above_best):.1%} {side} our plan, which is not proved to be the best"
        if self.above_optimum is not None:
            text += f"; at most {self.above_optimum:.1%} above the optimum ({standing})"
        return text

    # -- forms ----------------------------------------------------------------------------

    def __str__(self) -> str:
        return _render(self, PLAIN)

    def to_markdown(self) -> str:
        """Headings and pipe tables."""
        return _render(self, MARKDOWN) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values; sizes are integer bytes per sample, totals of the whole network."""
        best = self.best
        return {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": best.graph.fingerprint,
            "scheme": best.scheme,
            "buffer_bytes": best.buffer_bytes,
            "activation_bytes": best.activation_bytes,
            "align_channels": best.align_channels,
            "weight_bytes": best.weight_bytes,
            "pins": best.pins,
            "legal": self.legal,
            "problems": list(self.problems),
            "groups": [group.to_dict() for group in self.groups],
            "totals": {
                "plan": None if self.network is None else dram_dict(self.network),
                "unfused": dram_dict(self.unfused),
                "best": dram_dict(self.ours),
                "lower_bound_bytes": self._ours.lower_bound,
            },
            "proof": best.proof,
            "claimed_by": best.claimed_by,
            "above_best": self.above_best,
            "above_optimum": self.above_optimum,
            "residents_exact": self.residents_exact,
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def save(self, path: str | Path) -> None:
        """Write it by suffix: ``.txt``, ``.md``, ``.json``.

        Raises:
            OptionError: for another suffix.
        """
        forms = {".txt": lambda: f"{self}\n", ".md": self.to_markdown, ".json": self.to_json}
        replace_text(path, forms[known_suffix(path, "an appraisal", APPRAISAL)]())


def _render(made: Appraisal, style: Style) -> str:
    wrong = sum(not group.legal for group in made.groups)
    noun = "step" if made.best.scheme == "cascade" else "group"
    verdict = "a legal plan"
    if not made.legal:
        verdict = f"not a legal plan: {counted(wrong, noun)} of {len(made.groups)} wrong" + (
            f", and {counted(len(made.problems), 'problem')} of the whole" if made.problems else ""
        )
    parts = [style.heading(f"The plan from outside: {verdict}"), _totals(made, style)]
    parts.append(style.table(_facts(made), (), "ll", {1: 88}))
    parts.append(style.heading(f"Its {noun}s"))
    parts.append(_group_table(made, style, noun))
    told = [f"{noun} {k}: {text}" for k, group in enumerate(made.groups) for text in group.problems]
    if told := [*made.problems, *told]:
        parts.append(style.heading("What is wrong"))
        parts += [style.paragraph(text) for text in told]
    return "\n\n".join(parts)


def _totals(made: Appraisal, style: Style) -> str:
    columns = (made.unfused, made.network, made.ours)

    def row(name: str, size: Any) -> list[str]:
        return [name, *("-" if dram is None else format_size(size(dram)) for dram in columns)]

    rows = [
        row("features", features),
        row("weights", lambda dram: dram.weight),
        row("whole network", lambda dram: dram.total),
    ]
    return style.table(rows, ("DRAM access per sample", "unfused", "this plan", "our plan"), "lrrr")


def _facts(made: Appraisal) -> list[list[str]]:
    best = made.best
    proof = {
        "optimal": f"optimal ({best.standing})",
        "bound": f"at most {best.gap:.1%} above the optimum ({best.standing})",
    }.get(best.proof or "", "nothing proved")
    rows = [["distance", made.distance], ["our plan", f"{len(best.groups)} groups; {proof}"]]
    if made.residents_exact is not None:
        rows.append(
            [
                "steps",
                "ways and resident tensors are the best for this sequence of steps"
                if made.residents_exact
                else "ways and resident tensors are good ones, not proved to be the best",
            ]
        )
    if best.pins:
        rows.append(["pinned", "; ".join(f"{name}={what}" for name, what in best.pins.items())])
    rows.append(
        [
            "assumptions",
            f"scheme {best.scheme}, buffer {format_size(best.buffer_bytes)}, "
            f"{format_activations(best.activation_bytes, best.align_channels)}, "
            f"{format_width(best.weight_bytes)}, "
            "one sample at a time",
        ]
    )
    return rows


def _group_table(made: Appraisal, style: Style, noun: str) -> str:
    buffer = made.best.buffer_bytes
    rows = [
        [
            str(k),
            compact(group.ops) if group.ops else "",
            *([group.way] if noun == "step" else []),
            "none" if group.buffer_bytes is None else format_size(group.buffer_bytes),
            "" if group.buffer_bytes is None else f"{group.buffer_bytes / buffer:.1%}",
            *map(format_size, group.dram),
            "" if group.legal else "no",
        ]
        for k, group in enumerate(made.groups)
    ]
    way = ("way",) if noun == "step" else ()
    headers = (noun, "operators", *way, "buffer", "share", "read", "write", "weights", "legal")
    return style.table(rows, headers, "rl" + "l" * len(way) + "rrrrrl", {1: 44})
